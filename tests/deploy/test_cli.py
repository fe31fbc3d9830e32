import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.cli import run

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def bundle(tmp_path, tiny):
    return tiny.bundle(tmp_path / "b")


def call(capsys, *arguments):
    code = run([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_generate_streams_the_text_and_json_holds_the_same(capsys, bundle):
    arguments = ["generate", bundle, "-p", "Hi", "-n", "12", "--temperature", "1.2", "--seed", "9"]
    code, text, err = call(capsys, *arguments)
    assert (code, err) == (0, "")
    code, out, _ = call(capsys, *arguments, "--json")
    result = json.loads(out)
    assert code == 0
    assert text == result["text"] + "\n"
    assert result["completion_tokens"] == len(result["token_ids"]) <= 12
    assert result["finish_reason"] in ("eos", "length")


def test_raw_continues_the_text_without_the_template(capsys, bundle):
    chat = json.loads(call(capsys, "generate", bundle, "-p", "Hi", "-n", "1", "--json")[1])
    raw = json.loads(call(capsys, "generate", bundle, "-p", "Hi", "-n", "1", "--json", "--raw")[1])
    assert raw["prompt_tokens"] == 2
    assert chat["prompt_tokens"] > 20


def test_the_system_message_is_in_the_prompt(capsys, bundle):
    def count(*more):
        return json.loads(call(capsys, "generate", bundle, "-p", "Hi", "-n", "1", "--json", *more)[1])["prompt_tokens"]

    assert count("--system", "Be brief") > count()


def test_stats_go_to_stderr(capsys, bundle):
    code, out, err = call(capsys, "generate", bundle, "-p", "Hi", "-n", "4", "--stats", "--backend", "reference-bf16")
    assert code == 0
    assert "tokens/s" in err
    assert "tokens/s" not in out


def test_inspect_shows_what_the_bundle_holds(capsys, bundle):
    code, out, _ = call(capsys, "inspect", bundle)
    assert code == 0
    for text in ("tiny", "llama", "4-bit, groups of 32", "apache-2.0", "prose", "12.5", "source: kind", "128 tokens"):
        assert text in out


def test_inspect_shows_what_a_drafter_is_worth(capsys, tiny, tmp_path):
    bundle = tiny.bundle_with_head(tmp_path / "b")
    code, out, _ = call(capsys, "inspect", bundle)
    assert code == 0
    shown = {
        line.split("│")[1].strip(): line.split("│")[2].strip() for line in out.splitlines() if line.count("│") == 3
    }
    assert shown["draft vocabulary"] == "37 tokens"
    assert shown["acceptance"] == "0.500 / 0.250 / 0.125 by position"
    assert shown["τ"].startswith("1.88 tokens a call of the target at 3 drafted")
    assert shown["MBSU"].startswith("1.40")
    assert shown["reads"] == "what enters layers 0, 1, 2"
    sizes = {role: sum(f.stat().st_size for f in (bundle / role).iterdir()) for role in ("target", "eagle-target")}
    assert shown["of the target"] == f"{sizes['eagle-target'] / sizes['target']:.1%} of its size"


def test_inspect_shows_what_would_run_it(monkeypatch, capsys, bundle):
    monkeypatch.setenv("UNDERSTUDY_ISA", "scalar")
    monkeypatch.setenv("UNDERSTUDY_THREADS", "3")
    assert "scalar, 3 threads" in call(capsys, "inspect", bundle)[1]
    monkeypatch.setenv("UNDERSTUDY_ISA", "sse9")
    code, out, _ = call(capsys, "inspect", bundle)
    assert code == 0
    assert "none: UNDERSTUDY_ISA='sse9' is unknown" in out


def test_without_the_native_library_inspect_and_the_references_work_and_generate_says_why(bundle, tmp_path):
    environment = {**os.environ, "UNDERSTUDY_CPU_LIBRARY": str(tmp_path / "none.so")}

    def deploy(*arguments):
        command = [sys.executable, "-m", "deploy", *map(str, arguments)]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)

    inspected = deploy("inspect", bundle)
    assert inspected.returncode == 0
    assert "none: " in inspected.stdout
    assert deploy("generate", bundle, "-p", "Hi", "-n", "2", "--backend", "reference-int8").returncode == 0
    refused = deploy("generate", bundle, "-p", "Hi")
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "none.so: the native library is missing, which UNDERSTUDY_CPU_LIBRARY names" in refused.stderr


def test_the_default_backend_says_what_the_reference_says(capsys, bundle):
    arguments = ["generate", bundle, "-p", "Hi", "-n", "20", "--temperature", "1.2", "--top-k", "50", "--seed", "3"]
    default = call(capsys, *arguments)
    assert default[0] == 0
    assert call(capsys, *arguments, "--backend", "reference-int8") == default
    assert call(capsys, *arguments, "--threads", "1") == default


RATES = {"decode_tok_s", "e2e_tok_s", "ttft_ms", "rounds", "tokens"}


def test_bench_writes_the_documented_form(capsys, bundle, tmp_path):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "new" / "result.json"
    lines = [{"prompt": "Hi"}, {"id": "x", "category": "talk", "turns": ["a", "b"]}, {"prompt": "left out"}]
    prompts.write_text("\n".join(map(json.dumps, lines)))
    arguments = ["bench", bundle, "--prompts", prompts, "-n", "4", "--limit", "2", "--json", out]
    code, text, err = call(capsys, *arguments)
    assert (code, err) == (0, "")
    assert "talk" in text
    result = json.loads(out.read_text())
    assert set(result) == {"machine", "bundle", "rows_ms", "modes"}
    assert set(result["machine"]) == {"cpu", "family_model", "cores", "isa", "threads", "load_average"}
    assert result["bundle"] == "b"
    assert list(result["rows_ms"]["target"]) == ["1", "2", "4", "6", "8", "12", "16"]
    plain = result["modes"]["plain"]
    assert set(plain) == RATES | {"peak_rss_mb", "by_category"}
    assert set(plain["by_category"]) == {"all", "talk"}
    assert all(set(rates) == RATES for rates in plain["by_category"].values())
    assert plain["tokens"] == sum(rates["tokens"] for rates in plain["by_category"].values()) <= 12


@pytest.mark.parametrize(
    ("content", "more", "reason"),
    [
        ('{"prompt": "a"}\n{"prompt": ', (), "line 2: not JSON"),
        ('{"turns": 3}', (), "line 1: needs"),
        ("", (), "is empty"),
        ('{"prompt": "a"}', ("--limit", "0"), "--limit"),
        ('{"prompt": "a"}', ("--json", "{parent}"), "is a directory"),
        ('{"prompt": "a"}', ("--temperature", "-1"), "temperature=-1.0"),
        ('{"id": "wide", "prompt": "' + "x" * 300 + '"}', ("-n", "1"), "prompt 'wide'"),
    ],
)
def test_a_mistake_in_a_benchmark_is_one_line(capsys, bundle, tmp_path, content, more, reason):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(content)
    filled = [argument.format(parent=tmp_path) for argument in more]
    code, out, err = call(capsys, "bench", bundle, "--prompts", prompts, *filled)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert reason in err


def test_verify_accepts_a_sound_bundle(capsys, bundle):
    code, out, err = call(capsys, "verify", bundle)
    assert (code, err) == (0, "")
    assert "sound" in out


def test_verify_names_every_problem_and_exits_with_1(capsys, bundle):
    (bundle / "README.md").write_text("changed")
    (bundle / "extra").write_text("x")
    code, out, err = call(capsys, "verify", bundle)
    assert (code, out) == (1, "")
    assert "README.md" in err
    assert "extra: not listed" in err
    assert "2 problems" in err


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["generate", "/nowhere/at/all", "-p", "x"], "/nowhere/at/all: no such directory"),
        (["generate", "{parent}", "-p", "x"], "not a bundle"),
        (["inspect", "{parent}"], "not a bundle"),
        (["verify", "/nowhere/at/all"], "no such directory"),
        (["generate", "{bundle}"], "--prompt"),
        (["generate", "{bundle}", "-p", "x", "-n", "many"], "-n"),
        (["generate", "{bundle}", "-p", "x", "-n", "0"], "max_tokens=0"),
        (["generate", "{bundle}", "-p", "x", "-n", "500"], "exceeds the model's context of 128"),
        (["generate", "{bundle}", "-p", "x", "--temperature", "-1"], "temperature=-1.0"),
        (["generate", "{bundle}", "-p", "x", "--top-p", "0"], "top_p=0.0"),
        (["generate", "{bundle}", "-p", "x", "--backend", "gpu9"], "gpu9"),
        (["generate", "{bundle}", "-p", "x", "--stop", ""], "stop=''"),
        (["generate", "{bundle}", "-p", "", "--raw"], "no tokens"),
        (["generate", "{bundle}", "-p", "x", "--raw", "--system", "y"], "--system"),
        (["generate", "{bundle}", "-p", "x", "--mode", "chain"], "--mode"),
        (["dance"], "dance"),
    ],
)
def test_a_mistake_is_one_line_on_stderr_and_exit_code_2(capsys, bundle, arguments, reason):
    filled = [argument.format(bundle=bundle, parent=bundle.parent) for argument in arguments]
    code, out, err = call(capsys, *filled)
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert reason in err


def test_it_runs_as_a_module_from_another_directory_without_torch(bundle, tmp_path):
    program = (
        "import runpy, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        f"sys.argv = ['deploy', 'generate', {str(bundle)!r}, '-p', 'Hi', '-n', '3']\n"
        "try:\n    runpy.run_module('deploy', run_name='__main__')\n"
        "except SystemExit as end:\n    assert end.code == 0, end.code\n"
        "assert not {'torch', 'transformers', 'safetensors'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_damaged_bundle_is_one_line_and_no_traceback(bundle):
    data = bytearray((bundle / "target" / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (bundle / "target" / "model.safetensors").write_bytes(data)
    command = [sys.executable, "-m", "deploy", "generate", str(bundle), "-p", "x"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "sha256" in done.stderr


def talk(monkeypatch, capsys, bundle, text, *options):
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    return call(capsys, "chat", bundle, "-n", "4", *options)


def test_a_chat_answers_every_line_until_quit(monkeypatch, capsys, bundle):
    code, out, err = talk(monkeypatch, capsys, bundle, "Hi\n\nAgain\n/quit\nnever read\n", "--stats")
    assert code == 0
    assert len(out.splitlines()) >= 2
    assert err.count("ended by") == 2
    assert "of them cached" in err.splitlines()[1]


def test_a_chat_that_starts_over_forgets_the_turns_before(monkeypatch, capsys, bundle):
    _, out, _ = talk(monkeypatch, capsys, bundle, "Hi\nAgain\n/new\nHi\n")
    _, once, _ = talk(monkeypatch, capsys, bundle, "Hi\n")
    assert out.startswith(once)
    assert out.endswith(once)


def test_a_chat_turn_that_does_not_fit_is_taken_back(monkeypatch, capsys, bundle):
    code, out, err = talk(monkeypatch, capsys, bundle, "x" * 200 + "\nHi\n")
    _, once, _ = talk(monkeypatch, capsys, bundle, "Hi\n")
    assert (code, out) == (0, once)
    assert "context" in err
