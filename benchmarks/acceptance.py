"""What drafters of a target accept on given prompts, answered greedily: simulated τ and acceptance by place.

    python -m benchmarks.acceptance BUNDLE --prompts FILE.jsonl [--heads DIR …] [--intermediates BUNDLE …] [--drafted 4]
        [--categories writing,coding,…] [--per-category 5] [--tokens 128] [--without-loops] [--json OUT]

heads: directories as a bundle's `eagle-target/`; without any drafters named, that of BUNDLE. intermediates: bundles of
the same target whose `intermediate/` is measured. First turns are answered by plain decoding, then speculative decoding
with chains is replayed on the answers (train/replay.py): for a head in torch and float32, the head by itself, before
the runtime rounds its weights; for an intermediate in the runtime, as it is served. Printed too: the share of the
answers' tokens that stand where an answer is known to go round in circles, which any drafter finds easy;
`--without-loops` ends answers there.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.machine import fingerprint, write_json
from benchmarks.speculative import MT_BENCH, choose_records
from deploy.formats.bundle import Bundle
from deploy.formats.digest import sha256_file
from deploy.formats.eagle_record import parse_record
from deploy.formats.speculators import RECORD_FILE, EagleDirectory
from deploy.runtime.cpu_backend import CpuBackend
from deploy.runtime.generation import GenerationOptions, Request
from deploy.runtime.prompts import PromptRecord
from deploy.runtime.session import Session
from pipeline.stages.features import RuntimeFeatures
from pipeline.stages.intermediate_measure import LikeliestTokens
from train.data.conversations import Conversation
from train.data.loops import until_loop
from train.eagle.head import EagleHead
from train.eagle.initial import start_from_head, target_embedding
from train.eagle.rollout import HeldOut
from train.intermediate.rollout import HeldOutTexts


def answer(session: Session, records: Sequence[PromptRecord], num_tokens: int) -> list[Conversation]:
    """The records' first turns with the target's greedy answers, in their order."""
    prompts = [session.encode_chat([{"role": "user", "content": record.turns[0]}]) for record in records]
    requests = [Request(prompt, GenerationOptions(num_tokens)) for prompt in prompts]
    answers = dict(session.generate_many(requests))
    conversations = []
    for index, prompt in enumerate(prompts):
        text = np.array([*prompt, *answers[index].token_ids], np.int32)
        conversations.append(Conversation(text, ((len(prompt), len(text)),), 0.0, index))
    return conversations


def without_loop(conversation: Conversation) -> Conversation:
    """The same question; its answer ends where it is known to loop."""
    ((begin, end),) = conversation.spans
    end = begin + len(until_loop(conversation.token_ids[begin:end].tolist()))
    return Conversation(conversation.token_ids[:end], ((begin, end),), conversation.temperature, conversation.index)


def looping_share(conversations: Sequence[Conversation]) -> float:
    """Of the written tokens, those behind the point where their answer is known to loop."""
    written = [text.token_ids[begin:end].tolist() for text in conversations for begin, end in text.spans]
    return 1 - sum(len(until_loop(tokens)) for tokens in written) / sum(map(len, written))


def measure(
    session: Session, head_dir: Path, bundle: Bundle, groups: dict[str, list[Conversation]], num_drafted: int
) -> Iterator[tuple[str, dict[str, float]]]:
    """Group → its replay's metrics, by the head at `head_dir`."""
    target = bundle.model("target")
    with EagleDirectory.open(head_dir, target.shape) as trained:
        ours = {name: sha256_file(bundle.path / "target" / name) for name in trained.owner.model_files}
        if ours != trained.owner.model_files:
            raise SystemExit(f"{head_dir}: was trained for another target than {bundle.path}'s")
        head = EagleHead(trained.config, target_embedding(target)).eval()
        ids = torch.from_numpy(trained.draft_ids)
        start_from_head(head, trained, ids)
        layers = trained.config.feature_layers
    source = RuntimeFeatures(session.backend, layers)
    for name, conversations in groups.items():
        held_out = HeldOut(conversations, source, tuple(range(len(layers))))
        yield name, held_out.replay(head, ids, num_drafted).metrics()


def measure_intermediate(
    bundle: Bundle, target: Bundle, groups: dict[str, list[Conversation]], num_drafted: int, threads: int | None
) -> Iterator[tuple[str, dict[str, float]]]:
    """The same by the intermediate of `bundle`, with its MBSU beside it."""
    directory = bundle.path / bundle.component("intermediate").path
    owner, training = parse_record(json.loads((directory / RECORD_FILE).read_text(encoding="utf-8")))
    ours = {name: sha256_file(target.path / "target" / name) for name in owner.model_files}
    if ours != owner.model_files:
        raise SystemExit(f"{directory}: was trained for another target than {target.path}'s")
    ids = bundle.draft_ids("intermediate")
    with bundle.model("intermediate") as files:
        kept = np.arange(files.shape.vocab_size) if ids is None else ids
        likeliest = LikeliestTokens(CpuBackend(files, threads=threads), [kept])
        for name, conversations in groups.items():
            found = HeldOutTexts(conversations).replay(likeliest.of(kept), num_drafted, kept)
            worth = found.tau / (training.cost_ratio * num_drafted + 1)
            yield name, {**found.metrics(), "cost_ratio": training.cost_ratio, "mbsu": worth}


def show(label: str, found: dict[str, dict[str, float]], num_drafted: int) -> None:
    for name, metrics in found.items():
        places = " ".join(f"{metrics[f'acceptance_{place}']:.2f}" for place in range(1, num_drafted + 1))
        drafted = f"{(metrics['tau'] - 1) / num_drafted:.0%} of all drafts"
        worth = f", MBSU {metrics['mbsu']:.2f}" if "mbsu" in metrics else ""
        print(f"{label} {name:12} τ {metrics['tau']:.2f}, accepted {drafted}, given those before: {places}{worth}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--heads", type=Path, nargs="+", default=[])
    parser.add_argument("--intermediates", type=Path, nargs="+", default=[])
    parser.add_argument("--drafted", type=int, default=4)
    parser.add_argument("--categories", type=lambda text: text.split(","), default=list(MT_BENCH))
    parser.add_argument("--per-category", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--without-loops", action="store_true")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    bundle = Bundle.open(arguments.bundle)
    session = Session.open(bundle, threads=arguments.threads)
    records = choose_records(arguments)
    conversations = answer(session, records, arguments.tokens)
    looping = looping_share(conversations)
    if arguments.without_loops:
        conversations = [without_loop(conversation) for conversation in conversations]
    groups = {"all": conversations}
    for record, conversation in zip(records, conversations, strict=True):
        groups.setdefault(record.category, []).append(conversation)
    num_written = sum(conversation.num_written for conversation in conversations)
    left_out = ", left out" if arguments.without_loops else ""
    print(f"{len(records)} prompts, {num_written} tokens; {looping:.1%} of what was written in loops{left_out}")
    result: dict[str, Any] = {
        "prompts": len(records),
        "tokens_each": arguments.tokens,
        "tokens": num_written,
        "looping_share": looping,
        "loops_left_out": arguments.without_loops,
    }
    default = [] if arguments.heads or arguments.intermediates else [bundle.path / "eagle-target"]
    for head_dir in [*arguments.heads, *default]:
        result[str(head_dir)] = dict(measure(session, head_dir, bundle, groups, arguments.drafted))
        show(str(head_dir), result[str(head_dir)], arguments.drafted)
    for path in arguments.intermediates:
        opened = Bundle.open(path)
        found = dict(measure_intermediate(opened, bundle, groups, arguments.drafted, arguments.threads))
        result[f"{path.name}/intermediate"] = found
        show(f"{path.name}/intermediate", found, arguments.drafted)
    if arguments.json:
        assert isinstance(session.backend, CpuBackend)
        write_json(arguments.json, {"machine": fingerprint(session.backend.runtime), **result})


if __name__ == "__main__":
    main()
