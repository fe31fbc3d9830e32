import io
import json
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
