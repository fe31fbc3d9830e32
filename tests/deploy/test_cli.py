import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models

from deploy.cli import run
from deploy.commands.inspect import _provenance_facts
from deploy.formats.bundle import MANIFEST, write_manifest
from tests.deploy.conftest import byte_tokenizer

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
    assert shown["reads"] == "what enters layers 0, 1, 2 of the target"
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


RATES = {
    "decode_tok_s",
    "e2e_tok_s",
    "ttft_ms",
    "rounds",
    "tokens",
    "tau",
    "acceptance_by_position",
    "survival",
    "nodes_per_round",
    "levels_per_round",
    "predicted_tok_s",
    "round_ms",
    "identical_to_plain",
}
MEASURED = RATES | {"width", "mbsu"}


def test_bench_writes_the_documented_form(capsys, bundle, tmp_path):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "new" / "result.json"
    lines = [{"prompt": "Hi"}, {"id": "x", "category": "talk", "turns": ["a", "b"]}, {"prompt": "left out"}]
    prompts.write_text("\n".join(map(json.dumps, lines)))
    arguments = ["bench", bundle, "--prompts", prompts, "-n", "4", "--limit", "2", "--json", out]
    code, text, err = call(capsys, *arguments)
    assert (code, err) == (0, "")
    assert "talk" in text
    result = json.loads(out.read_text())
    assert list(result) == ["machine", "bundle", "rows_ms", "drafts_ms", "repeats", "modes"]
    assert set(result["machine"]) == {"cpu", "family_model", "cores", "isa", "threads", "load_average"}
    assert result["bundle"] == "b"
    assert list(result["rows_ms"]["target"]) == ["1", "2", "3", "4", "5", "6", "8", "12", "16"]
    assert list(result["modes"]) == ["plain", "lookup", "auto"]
    plain = result["modes"]["plain"]
    assert set(plain) == MEASURED | {"peak_rss_mb", "memory", "by_category"}
    assert set(result["modes"]["auto"]) == set(plain) | {"choices"}
    assert set(plain["by_category"]) == {"all", "talk"}
    assert all(set(rates) == MEASURED for rates in plain["by_category"].values())
    assert plain["tokens"] == plain["rounds"] == sum(rates["tokens"] for rates in plain["by_category"].values()) <= 12
    assert plain["round_ms"]["verify"] > 0
    assert all(mode["identical_to_plain"] == {"same": 3, "total": 3} for mode in result["modes"].values())


def test_bench_measures_the_modes_that_are_named_and_the_target_alone(capsys, tiny, tmp_path):
    bundle, out = tiny.bundle_with_head(tmp_path / "b"), tmp_path / "result.json"
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Hi"}')
    arguments = ["bench", bundle, "--prompts", tmp_path / "prompts.jsonl", "-n", "9", "--repeats", "2", "--json", out]
    code, text, _ = call(capsys, *arguments, "--modes", "eagle, opt-tree")
    assert code == 0
    assert "opt-tree" in text
    result = json.loads(out.read_text())
    assert list(result["modes"]) == ["plain", "eagle", "opt-tree"]
    assert set(result["drafts_ms"]) == {"eagle-target"}
    eagle = result["modes"]["eagle"]
    assert eagle["identical_to_plain"] == {"same": 2, "total": 2}
    assert set(eagle["memory"]) == {"target", "eagle-target"}
    sizes = {role: size["weight_bytes"] for role, size in eagle["memory"].items()}
    share = sizes["eagle-target"] / sizes["target"]
    assert eagle["mbsu"] == pytest.approx(eagle["tau"] / (share * eagle["nodes_per_round"] + 1), abs=1e-3)
    assert "synthetic" not in result


def test_synthetic_acceptance_is_reported_apart_from_every_mode(capsys, tiny, tmp_path):
    bundle, out = tiny.bundle_with_head(tmp_path / "b"), tmp_path / "result.json"
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Hi"}')
    arguments = ["bench", bundle, "--prompts", tmp_path / "prompts.jsonl", "-n", "60", "--json", out]
    code, text, _ = call(capsys, *arguments, "--modes", "eagle", "--synthetic-acceptance", "1,0.5")
    assert code == 0
    assert "synthetic (none)" in text
    assert "synthetic (eagle)" in text
    result = json.loads(out.read_text())
    assert list(result["modes"]) == ["plain", "eagle"]
    assert result["synthetic"]["acceptance"] == [1.0, 0.5]
    for found in result["synthetic"]["modes"].values():
        assert set(found) == RATES | {"peak_rss_mb", "memory", "by_category"}
        assert found["acceptance_by_position"] == pytest.approx([1, 0.5], abs=0.05)
        assert found["identical_to_plain"] == {"same": 1, "total": 1}
        assert found["predicted_tok_s"] > 0


def test_with_a_reference_only_the_target_alone_is_measured(capsys, bundle, tmp_path):
    out = tmp_path / "result.json"
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Hi"}')
    arguments = ["bench", bundle, "--prompts", tmp_path / "prompts.jsonl", "-n", "2", "--json", out]
    assert call(capsys, *arguments, "--backend", "reference-bf16")[0] == 0
    assert list(json.loads(out.read_text())["modes"]) == ["plain"]


@pytest.mark.parametrize("mode", ["plain", "lookup", "eagle", "eagle-tree", "opt-tree", "auto", None])
def test_no_mode_changes_a_text(capsys, tiny, tmp_path, mode):
    bundle = tiny.bundle_with_head(tmp_path / "b")
    arguments = ["generate", bundle, "-p", "Hi", "-n", "30", "--temperature", "0.9", "--json"]
    expected = json.loads(call(capsys, *arguments, "--mode", "plain")[1])
    code, out, _ = call(capsys, *arguments, *(("--mode", mode) if mode else ()))
    found = json.loads(out)
    assert code == 0
    assert found["token_ids"] == expected["token_ids"]
    assert found["speculation"]["mode"] == (mode or "auto")
    assert expected["speculation"]["rounds"] == len(expected["token_ids"]) - 1
    assert expected["speculation"]["tau"] == 1


def test_sizes_shape_the_drafts(capsys, tiny, tmp_path):
    bundle = tiny.bundle_with_head(tmp_path / "b")
    arguments = ["generate", bundle, "-p", "Hi", "-n", "40", "--json", "--mode", "opt-tree"]
    small = json.loads(call(capsys, *arguments, "--depth", "1", "--width", "2", "--nodes", "2")[1])["speculation"]
    assert 0 < small["nodes_per_round"] <= 2
    assert 0 < small["levels_per_round"] <= 1


def test_stats_tell_of_the_drafts(capsys, tiny, tmp_path):
    bundle = tiny.bundle_with_head(tmp_path / "b")
    _, _, err = call(capsys, "generate", bundle, "-p", "Hi", "-n", "9", "--mode", "eagle", "--stats")
    (line,) = (line for line in err.splitlines() if line.startswith("mode eagle: "))
    assert re.search(r"\d rounds, τ 1\.\d\d; acceptance by position 0\.\d.* s in drafts, .* s in verification", line)


def test_tune_shows_costs_and_candidates_and_keeps_what_it_measured(capsys, tiny, tmp_path):
    bundle = tiny.bundle_with_head(tmp_path / "b")
    code, out, err = call(capsys, "tune", bundle)
    assert (code, err) == (0, "")
    shown = {line.split("│")[1].strip() for line in out.splitlines() if line.count("│") > 2}
    assert {"target", "eagle-target", "plain", "lookup-16", "eagle"} <= shown
    assert "depth" in out
    kept = Path(out.rsplit("kept in ", 1)[1].strip())
    assert set(json.loads(kept.read_text())["rows_ms"]) == {"target"}


def test_tune_does_not_call_an_older_file_its_own(monkeypatch, capsys, tiny, tmp_path):
    bundle = tiny.bundle_with_head(tmp_path / "b")
    call(capsys, "tune", bundle)

    def refuse(path, costs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("deploy.runtime.auto_mode.write_costs", refuse)
    code, out, _ = call(capsys, "tune", bundle)
    assert code == 0
    assert "not kept: the cache cannot be written" in out


def test_inspect_shows_any_provenance():
    assert _provenance_facts({"stages": {"a": "text", "b": {"config": {"bits": 4}}}, "note": ["x"]}) == [
        ("stage a", "text"),
        ("stage b", "bits=4"),
        ("note", '["x"]'),
    ]


def test_inspect_shows_the_modes_and_the_plan(capsys, tiny, tmp_path):
    bundle = tmp_path / "b"
    bundle.mkdir()
    (bundle / "plan.json").write_text(json.dumps(tiny.plan()))
    tiny.bundle_with_head(bundle)
    code, out, _ = call(capsys, "inspect", bundle)
    assert code == 0
    assert "auto, plain, lookup, eagle, eagle-tree, opt-tree" in out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.count("│") == 6]
    assert ["eagle (fastest)", "700", "710", "1.7", "0.5 / 0.2"] in rows


@pytest.mark.parametrize(
    ("content", "more", "reason"),
    [
        ('{"prompt": "a"}\n{"prompt": ', (), "line 2: not JSON"),
        ('{"turns": 3}', (), "line 1: needs"),
        ("", (), "is empty"),
        ('{"prompt": "a"}', ("--limit", "0"), "--limit"),
        ('{"prompt": "a"}', ("--json", "{parent}"), "is a directory"),
        ('{"prompt": "a"}', ("--temperature", "-1"), "temperature=-1.0"),
        ('{"prompt": "a"}', ("--repeats", "0"), "--repeats"),
        ('{"prompt": "a"}', ("--modes", "plain,dance"), "mode='dance' is not known; use auto, plain"),
        ('{"prompt": "a"}', ("--modes", "eagle"), "mode='eagle' needs eagle-target, .* it can: auto, plain, lookup"),
        ('{"prompt": "a"}', ("--modes", ""), "mode='' is not known"),
        ('{"prompt": "a"}', ("--synthetic-acceptance", "0.5,1.2"), "synthetic acceptance 1.2 is out of range"),
        ('{"prompt": "a"}', ("--synthetic-acceptance", "-0.1"), "synthetic acceptance -0.1 is out of range"),
        ('{"prompt": "a"}', ("--synthetic-acceptance", "nan"), "synthetic acceptance nan is out of range"),
        ('{"prompt": "a"}', ("--synthetic-acceptance", "much"), "synthetic acceptance 'much' is not a list"),
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
    assert re.search(reason, err)


def test_figures_are_shown_where_their_file_cannot_be_written(capsys, bundle, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a"}')
    code, out, err = call(
        capsys, "bench", bundle, "--prompts", prompts, "-n", "4", "--modes", "plain", "--json", "/dev/full"
    )
    assert code == 2
    assert "No space left on device" in err
    assert "plain" in out


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


@pytest.mark.parametrize("fault", ["no tokenizer", "more tokens than the model"])
def test_verify_refuses_a_tokenizer_that_the_runtime_refuses(capsys, bundle, fault):
    path, tokenizer = bundle / "tokenizer.json", byte_tokenizer()
    if fault == "no tokenizer":
        path.write_text("{}")
    else:
        tokenizer.add_tokens([f"<x{number}>" for number in range(50)])
        tokenizer.save(str(path))
    (bundle / MANIFEST).unlink()
    write_manifest(bundle, name="tiny", components={"target": "target"}, provenance={}, licence="x")
    code, out, err = call(capsys, "verify", bundle)
    assert (code, out) == (1, "")
    (problem, count) = err.splitlines()
    assert count.endswith("1 problem")
    assert problem.startswith(f"{path}: ")
    assert call(capsys, "generate", bundle, "-p", "x")[2] == f"error: {problem}\n"


def test_without_a_command_the_help_appears_as_it_is(capsys):
    code, out, err = call(capsys)
    assert (code, out) == (2, "")
    assert err == call(capsys, "--help")[1]
    assert "\nCommands:\n  generate " in err


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
        (["generate", "{bundle}", "-p", "x", "--mode", "dance"], "mode='dance' is not known; use auto, plain, lookup"),
        (["chat", "{bundle}", "--mode", "dance"], "mode='dance' is not known"),
        (["generate", "{bundle}", "-p", "x", "--mode", "chain"], "needs intermediate"),
        (["generate", "{bundle}", "-p", "x", "--mode", "eagle"], "does not have; it can: auto, plain, lookup"),
        (["generate", "{bundle}", "-p", "x", "--depth", "3"], "mode='auto' does not take depth=3"),
        (["chat", "{bundle}", "--mode", "plain", "--nodes", "99"], "mode='plain' does not take num_nodes=99"),
        (["generate", "{bundle}", "-p", "x", "--mode", "lookup", "--width", "77"], "width=77: it takes depth"),
        (["generate", "{bundle}", "-p", "x", "--min-draft-length", "-7"], "min_draft_length=-7 is out of range"),
        (["generate", "{bundle}", "-p", "x", "--mode", "lookup", "--depth", "-3"], "depth=-3 is out of range"),
        (["tune", "/nowhere/at/all"], "no such directory"),
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
    assert err.count("ended by") == err.count("mode auto: ") == 2
    assert "of them cached" in err.splitlines()[2]


def test_a_chat_that_starts_over_forgets_the_turns_before(monkeypatch, capsys, bundle):
    _, out, _ = talk(monkeypatch, capsys, bundle, "Hi\nAgain\n/new\nHi\n")
    _, once, _ = talk(monkeypatch, capsys, bundle, "Hi\n")
    assert out.startswith(once)
    assert out.endswith(once)


def test_a_chat_turn_that_does_not_fit_is_taken_back(monkeypatch, capsys, bundle):
    code, out, err = talk(monkeypatch, capsys, bundle, "x" * 200 + "\nHi\n")
    _, once, _ = talk(monkeypatch, capsys, bundle, "Hi\n")
    assert (code, out) == (0, once)
    assert re.search("context of 128; .*, or start over with /new$", err.strip())


def test_a_chat_line_that_is_not_utf_8_is_that_turns_error(monkeypatch, capsys, bundle):
    _, once, _ = talk(monkeypatch, capsys, bundle, "Hi\n")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\nHi\n"), encoding="utf-8"))
    code, out, err = call(capsys, "chat", bundle, "-n", "4")
    assert (code, out) == (0, once)
    assert "not Unicode text: '\\udce9' at character" in err


def test_a_character_that_is_cut_off_is_the_same_in_the_stream_and_in_json(monkeypatch, capsys, bundle):
    """Tokens that stand for the bytes of a character, one by one, and a decoder that gives up whole runs of them."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"<unk>": 256}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    monkeypatch.setattr("deploy.runtime.session.open_tokenizer", lambda *_: tokenizer)
    arguments = ["generate", bundle, "-p", "Hi", "--raw", "-n", "60", "--temperature", "2", "--mode", "plain"]
    code, text, _ = call(capsys, *arguments)
    assert code == 0
    assert "\ufffd" in text
    assert json.loads(call(capsys, *arguments, "--json")[1])["text"] + "\n" == text
