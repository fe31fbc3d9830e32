"""evaluate: `evaluate.json`, what each mode of the bundle gives on held-out text, and `plan.json` from it.

Both depend on the machine, which the summary says (`is_reproducible`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.graph import BuildContext
from pipeline.stages.assemble import assemble, extensions, link_or_copy
from pipeline.stages.calibrate import SAMPLES

if TYPE_CHECKING:
    from deploy.formats.bundle import Bundle
    from deploy.runtime.benchmark import BenchRequest
    from deploy.runtime.modes import DrafterFactory, Mode
    from deploy.runtime.prompts import PromptRecord
    from deploy.runtime.session import Session

RESULT = "evaluate.json"
PLAN = "plan.json"
REHEARSED_SHARE = 4
"""One of so many prompts is answered by the intermediate's modes before the measurement: what auto knows of them then
is what a plan would say."""
LONGEST_PROMPT = 256


def check(config: dict[str, Any], *, has_generated: bool, num_heldout: int) -> None:
    """Raises ValueError on values out of range, and where no prompt would be left.

    has_generated: whether there are generated conversations. num_heldout: samples that calibrate holds out.
    """
    for key in ("max_tokens", "repeats"):
        if config[key] < 1:
            raise ValueError(f"evaluate.{key}={config[key]} must be 1 or more")
    for key in ("num_prompts", "num_texts"):
        if config[key] < 0:
            raise ValueError(f"evaluate.{key}={config[key]} must be 0 or more")
    if not 1e-3 <= config["temperature"] <= 100:
        raise ValueError(f"evaluate.temperature={config['temperature']} must be 0.001 … 100")
    num_prompts = config["num_prompts"] if has_generated else 0
    if num_prompts + min(config["num_texts"], num_heldout) == 0:
        raise ValueError(
            f"evaluate has nothing to answer (evaluate.num_prompts={num_prompts}, evaluate.num_texts="
            f"{config['num_texts']}, held out by calibrate: {num_heldout}); raise one of them, or set evaluate=none"
        )


def build(threads: int | None, context: BuildContext) -> None:
    """Writes `evaluate.json` and `plan.json`. Raises RuntimeError when a mode changes an answer."""
    from deploy.runtime.auto_mode import INTERMEDIATE_MODES
    from deploy.runtime.benchmark import BenchRequest, costs_for
    from deploy.runtime.generation import GenerationOptions
    from deploy.runtime.modes import DrafterFactory, available_modes
    from deploy.runtime.plan_file import make_plan
    from deploy.runtime.sampling import SamplingParams
    from deploy.runtime.session import Session

    config = context.config
    directory = context.scratch / "bundle"
    bundle = _open(context, directory)
    session = Session.open(bundle, threads=threads)
    factory = DrafterFactory(bundle, session.backend, "cpu", threads)
    records = _records(context, session)
    forced: list[Mode] = [mode for mode in available_modes(bundle) if mode != "auto"]
    modes: list[Mode] = [*forced, "auto"]
    greedy = GenerationOptions(config["max_tokens"], SamplingParams())
    sampled = GenerationOptions(config["max_tokens"], SamplingParams(config["temperature"], seed=context.seed))
    costs = costs_for(factory, modes)
    expected = {}
    if rehearsed := [mode for mode in forced if mode in INTERMEDIATE_MODES]:
        first = BenchRequest(rehearsed, records[::REHEARSED_SHARE], greedy, costs=costs)
        rehearsal, _ = _bench(context, session, factory, first, "rehearsal")
        expected = _expected(make_plan(rehearsal, costs))
    request = BenchRequest(modes, records, greedy, config["repeats"], costs=costs, expected=expected)
    result, _ = _bench(context, session, factory, request, "greedy answers")
    again = BenchRequest(modes, records, sampled, costs=costs, expected=expected)
    compared, _ = _bench(context, session, factory, again, f"answers at temperature {config['temperature']}")
    result["sampled"] = {"temperature": config["temperature"], "modes": compared["modes"]}
    _write(context.out / RESULT, result)
    _write(context.out / PLAN, make_plan(result, costs))
    _summarize(context, result)


def _open(context: BuildContext, directory: Path) -> Bundle:
    """The bundle as it will be, but for report and card; its files are links into the store."""
    from deploy.formats.bundle import REQUIRED_FILES, Bundle, write_manifest

    components = assemble(context.inputs, directory, link_or_copy)
    for name in REQUIRED_FILES:
        if not (directory / name).exists():
            (directory / name).write_text("", encoding="utf-8")
    manifest = write_manifest(
        directory,
        name="evaluated",
        components=components,
        provenance={},
        licence="",
        extensions=extensions(context.inputs),
    )
    return Bundle(directory, manifest)


def _records(context: BuildContext, session: Session) -> list[PromptRecord]:
    """Held-out prompts: conversations up to the target's first word, and windows of text up to their middle.

    Those that do not fit the context are left out. Raises ValueError when none is left.
    """
    from compress.calibration.samples import read_samples, spread
    from deploy.runtime.prompts import PromptRecord

    found = []
    if "generate" in context.inputs:
        from train.data.conversations import read_conversations

        conversations = read_conversations(context.inputs["generate"], "heldout")[: context.config["num_prompts"]]
        for talk in conversations:
            ids = tuple(talk.token_ids[: talk.spans[0][0]].tolist())
            found.append(PromptRecord(f"generate/{talk.index}", "conversation", (), ids))
    samples = read_samples(context.inputs["calibrate"] / SAMPLES, "heldout")
    found += [
        PromptRecord(f"calibrate/{sample.source}", sample.group, (), sample.ids[: _half(sample.ids)])
        for sample in spread(samples, min(context.config["num_texts"], len(samples)))
    ]
    context_length, max_tokens = session.backend.shape.context_length, context.config["max_tokens"]
    fitting = [record for record in found if record.token_ids and len(record.token_ids) + max_tokens <= context_length]
    if not fitting:
        raise ValueError(
            f"evaluate.max_tokens={max_tokens}: no prompt with such an answer fits the target's context of"
            f" {context_length}; lower it, or set evaluate=none"
        )
    context.summary["left_out"] = len(found) - len(fitting)
    return fitting


def _half(ids: Sequence[int]) -> int:
    return min(len(ids) // 2, LONGEST_PROMPT)


def _bench(
    context: BuildContext, session: Session, factory: DrafterFactory, request: BenchRequest, what: str
) -> tuple[dict[str, Any], Any]:
    """A measurement with its progress shown. Raises RuntimeError naming the mode that changed an answer."""
    from deploy.runtime.benchmark import bench

    with ExitStack() as stack:

        def begin(num_answers: int) -> Callable[[], None]:
            bar = stack.enter_context(context.progress(num_answers, what, "answers"))
            return lambda: bar.update(1)

        result, costs = bench(session, factory, request, begin)
    for mode, found in result["modes"].items():
        same = found["identical_to_plain"]
        if same["same"] != same["total"]:
            raise RuntimeError(
                f"evaluate: mode {mode} changed {same['total'] - same['same']} of {same['total']} answers ({what}); a"
                " mode may change the speed alone, so this is a bug of the runtime"
            )
    return result, costs


def _expected(plan: dict[str, Any]) -> dict[Any, Any]:
    from deploy.runtime.plan import Expectation

    return {mode: Expectation.from_json(found) for mode, found in plan["modes"].items()}


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _summarize(context: BuildContext, result: dict[str, Any]) -> None:
    from pipeline.report.evaluation import summary_lines

    modes = result["modes"]
    context.summary["is_reproducible"] = False
    context.summary["modes"] = {
        mode: {key: found[key] for key in ("decode_tok_s", "e2e_tok_s", "tau", "predicted_tok_s")}
        for mode, found in modes.items()
    }
    context.summary["lines"] = summary_lines(result)
    rates = {f"{mode}/decode_tok_s": found["decode_tok_s"] for mode, found in modes.items() if found["decode_tok_s"]}
    context.tracker.summary(context.stage, rates)
