"""One training step of an EAGLE-3 head: ours, and the same maths in plain torch (benchmarks/eagle_plain.py).

    python -m benchmarks.eagle_step [--conversations 36] [--unrolls 5] [--draft-vocab 8192] [--json OUT]

All do the same conversations in the same process, forward, backward and AdamW, in turns; the plain one also with
conversations sorted by length, its best case, in which next to nothing is padding (but no training visits texts in
that order). SmolLM2-135M's shape, random weights and states; conversations of 50 to 400 tokens. Tokens are all that a
batch holds, padding not counted. The share of time outside matrix products is a profile of one step:
1 − time in products / time in all operations.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.eagle_plain import PlainBatch, PlainEagle, plain_loss
from benchmarks.machine import write_json
from deploy.formats.architectures import ModelShape
from deploy.formats.eagle_config import EagleConfig
from deploy.kernels.cpu.threads import choose_threads
from deploy.runtime.machine import describe_machine
from train.distillation import Teacher
from train.eagle.head import EagleHead
from train.eagle.objective import TrainingTimeTest
from train.loop.batches import Batch, pack

SMOLLM2_135M = {
    "model_type": "llama",
    "num_hidden_layers": 30,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "rms_norm_eps": 1e-05,
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    "vocab_size": 49152,
}
PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "scaled_dot_product", "linear")
DECAY = 0.9
Step = Callable[[Batch], None]


def draw_lengths(count: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """(prompt, response) lengths: a system prompt and a short question, then an answer; 50 to 400 tokens in all."""
    total = np.clip(rng.lognormal(5.3, 0.55, count), 50, 400).astype(int)
    prompt = np.minimum(rng.integers(35, 75, count), total - 10)
    return [(int(p), int(t - p)) for p, t in zip(prompt, total, strict=True)]


def make_batch(lengths: list[tuple[int, int]], shape: ModelShape, draft_vocab: int, rng: np.random.Generator) -> Batch:
    """Random tokens and states; one written token in twenty lies outside the draft vocabulary (ids below its size)."""
    totals = [prompt + response for prompt, response in lengths]
    num_tokens = sum(totals)
    inside = rng.random(num_tokens) < 0.95
    ids = np.where(inside, rng.integers(0, draft_vocab, num_tokens), rng.integers(0, shape.vocab_size, num_tokens))
    features = torch.from_numpy(rng.standard_normal((num_tokens, 4, shape.hidden_size), dtype=np.float32))
    return Batch(
        token_ids=torch.from_numpy(ids),
        loss_mask=torch.from_numpy(np.concatenate([np.arange(sum(parts)) >= parts[0] for parts in lengths])),
        position=torch.from_numpy(np.concatenate([np.arange(total) for total in totals])),
        starts=torch.from_numpy(np.cumsum([0, *totals])),
        features=features,
    )


def make_batches(sort: bool, arguments: argparse.Namespace, shape: ModelShape) -> list[Batch]:
    """The same conversations either way: packed in random order, or sorted by length first."""
    rng = np.random.default_rng(0)
    lengths = draw_lengths(arguments.conversations, rng)
    totals = [sum(parts) for parts in lengths]
    order = sorted(range(len(totals)), key=totals.__getitem__) if sort else range(len(totals))
    packed = pack(totals, order, arguments.tokens_per_batch)
    return [make_batch([lengths[index] for index in indices], shape, arguments.draft_vocab, rng) for indices in packed]


def optimized(model: nn.Module, loss: Callable[[Batch], Tensor]) -> Step:
    """A training step: forward, backward, AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(batch: Batch) -> None:
        optimizer.zero_grad()
        loss(batch).backward()
        optimizer.step()

    return step


def make_steps(arguments: argparse.Namespace, shape: ModelShape) -> tuple[Step, Step]:
    """Our step and the plain one, from the same weights."""
    config = EagleConfig.for_target(
        shape,
        draft_vocab_size=arguments.draft_vocab,
        feature_layers=(2, 15, 27),
        norm_before_residual=False,
        num_drafted=4,
        embedding="reference",
    )
    torch.manual_seed(0)
    embedding = torch.randn(shape.vocab_size, shape.hidden_size) * 0.1
    head, plain = EagleHead(config, embedding), PlainEagle(config, embedding)
    plain.load_state_dict(head.state_dict())
    target_norm, target_rows = nn.RMSNorm(shape.hidden_size, shape.rms_norm_eps), embedding[: arguments.draft_vocab]
    in_vocabulary = torch.arange(shape.vocab_size) < arguments.draft_vocab
    teacher = Teacher(target_norm.weight.detach(), target_rows, shape.rms_norm_eps)
    objective = TrainingTimeTest(teacher, in_vocabulary, arguments.unrolls, DECAY, (0, 1, 2), 3)

    def our_loss(batch: Batch) -> Tensor:
        losses = objective.losses(head, batch)
        return losses.total / losses.count

    def their_loss(batch: Batch) -> Tensor:
        total, count = plain_loss(
            plain,
            PlainBatch(batch),
            target_norm=target_norm,
            target_rows=target_rows,
            in_vocabulary=in_vocabulary,
            num_steps=arguments.unrolls,
            decay=DECAY,
        )
        return total / count

    return optimized(head, our_loss), optimized(plain, their_loss)


def outside_products(step: Step, batch: Batch) -> float:
    """Share of one step's time that is spent outside matrix products."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step(batch)
    events = profile.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    inside = sum(event.self_cpu_time_total for event in events if any(name in event.key for name in PRODUCTS))
    return 1.0 - inside / total


def measure(cases: dict[str, tuple[Step, list[Batch]]]) -> dict[str, dict[str, Any]]:
    """Every case's batches once, in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for step, batches in cases.values():
        step(batches[0])
    for turn in range(max(len(batches) for _, batches in cases.values())):
        for name, (step, batches) in cases.items():
            if turn < len(batches):
                begin = time.perf_counter()
                step(batches[turn])
                seconds[name].append(time.perf_counter() - begin)
    result = {}
    for name, (step, batches) in cases.items():
        num_tokens = sum(len(batch.token_ids) for batch in batches)
        largest = max(batches, key=lambda batch: len(batch.token_ids))
        result[name] = {
            "tokens_per_second": num_tokens / sum(seconds[name]),
            "batches": len(batches),
            "outside_products": outside_products(step, largest),
        }
    return result


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, default=36)
    parser.add_argument("--unrolls", type=int, default=5)
    parser.add_argument("--draft-vocab", type=int, default=8192)
    parser.add_argument("--tokens-per-batch", type=int, default=2048)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    threads = choose_threads(arguments.threads)
    torch.set_num_threads(threads)
    shape = ModelShape.from_config(SMOLLM2_135M)
    ours, plain = make_steps(arguments, shape)
    random, by_length = make_batches(False, arguments, shape), make_batches(True, arguments, shape)
    found = measure({"ours": (ours, random), "plain": (plain, random), "plain, sorted by length": (plain, by_length)})
    for name, figures in found.items():
        ratio = found["ours"]["tokens_per_second"] / figures["tokens_per_second"]
        print(
            f"{name:<24} {figures['tokens_per_second']:7.0f} tokens/s, outside products "
            f"{figures['outside_products']:.1%}; ours is {ratio:.2f}×"
        )
    write_json(
        arguments.json,
        {
            "machine": describe_machine(None) | {"threads": threads},
            "conversations": arguments.conversations,
            "unrolls": arguments.unrolls,
            "draft_vocab": arguments.draft_vocab,
            "tokens_per_batch": arguments.tokens_per_batch,
            "torch": torch.__version__,
            "cases": found,
        },
    )


if __name__ == "__main__":
    main()
