"""A two-layer causal language model as a task, and texts for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from train.loop.batches import Batch
from train.loop.loop import train
from train.loop.settings import TrainSettings
from train.loop.state import TrainResult
from train.loop.task import Losses

VOCABULARY, HIDDEN = 37, 24
SEED = 7


@dataclass(frozen=True)
class Text:
    """A chain of tokens in which most follow from the one before; the first third is not learned from."""

    token_ids: npt.NDArray[np.int32]

    def loss_mask(self) -> npt.NDArray[np.bool_]:
        return np.arange(len(self.token_ids)) >= len(self.token_ids) // 3


def texts(count: int, seed: int, shortest: int = 3, longest: int = 40) -> list[Text]:
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        tokens = [int(rng.integers(VOCABULARY))]
        for _ in range(int(rng.integers(shortest, longest)) - 1):
            tokens.append(int(rng.integers(VOCABULARY)) if rng.random() < 0.1 else (3 * tokens[-1] + 1) % VOCABULARY)
        found.append(Text(np.array(tokens, np.int32)))
    return found


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN, bias=False)
        self.out = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x: [T, H]. mask: bool [T, T], True where a row may look."""
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        weights = (q @ k.T / HIDDEN**0.5).masked_fill(~mask, float("-inf")).softmax(-1)
        return x + functional.gelu(self.out(weights @ v))


class TinyModel(nn.Module):
    def __init__(self, seed: int = 0, dropout: float = 0.1) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.head = nn.Linear(HIDDEN, VOCABULARY)
        self.dropout = nn.Dropout(dropout)
        self.frozen = nn.Parameter(torch.ones(HIDDEN), requires_grad=False)
        self.register_buffer("num_forwards", torch.zeros((), dtype=torch.int64))
        self.recomputes = False

    def gradient_checkpointing_enable(self) -> None:
        self.recomputes = True

    def forward(self, token_ids: Tensor, position: Tensor, starts: Tensor, features: Tensor | None) -> Tensor:
        """Logits [T, V]."""
        if self.training:
            self.num_forwards += 1
        text = torch.bucketize(torch.arange(len(token_ids), device=starts.device), starts[1:], right=True)
        mask = (text[:, None] == text[None]) & (position[:, None] >= position[None])
        x = self.embed(token_ids) * self.frozen
        if features is not None:
            x = x + features[:, 0]
        for layer in self.layers:
            x = checkpoint(layer, x, mask, use_reentrant=False) if self.recomputes else layer(x, mask)
        return self.head(self.dropout(x))


@dataclass
class TinyTask:
    """taus: what evaluation returns as tau, one after the other, instead of 1 + the share of tokens guessed."""

    model: TinyModel = field(default_factory=TinyModel)
    heldout: Sequence[Text] = field(default_factory=lambda: texts(5, seed=99))
    taus: list[float] = field(default_factory=list)
    num_batches: int = 0

    def losses(self, model: nn.Module, batch: Batch) -> Losses:
        self.num_batches += 1
        logits = model(batch.token_ids, batch.position, batch.starts, batch.features)
        counted = batch.loss_mask[1:] & (batch.position[1:] > 0)
        losses = functional.cross_entropy(logits[:-1].float(), batch.token_ids[1:], reduction="none")
        guessed = (logits[:-1].argmax(-1) == batch.token_ids[1:]) & counted
        # `where`, not a product: a position that is not counted must not spread a NaN.
        total = torch.where(counted, losses, 0.0).sum()
        return Losses(total, counted.sum(), {"accuracy": guessed.sum().float()})

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        guessed, count, device = 0, 0, self.model.embed.weight.device
        for text in self.heldout:
            ids = torch.from_numpy(text.token_ids.astype(np.int64)).to(device)
            position = torch.arange(len(ids), device=device)
            logits = model(ids, position, torch.tensor([0, len(ids)], device=device), None)
            guessed += int((logits[:-1].argmax(-1) == ids[1:]).sum())
            count += len(ids) - 1
        accuracy = guessed / count
        return {"tau": self.taus.pop(0) if self.taus else 1.0 + accuracy, "accuracy": accuracy}


def run(task: TinyTask, out: Path, *, sequences: Sequence[Text] | None = None, **options: Any) -> TrainResult:
    """Train on 60 texts with small settings; `options` are settings or arguments of `train`."""
    arguments: dict[str, Any] = {"seed": SEED, "features": None, "on_log": _ignore, "on_progress": _ignore}
    arguments["is_start_trained"] = False
    arguments |= {name: options.pop(name) for name in list(options) if name in arguments}
    small: dict[str, Any] = {"tokens_per_batch": 64, "max_length": 32, "accumulation": 2, "evaluate_every": 0.25}
    settings = TrainSettings(**{**small, "learning_rate": 1e-2, "log_every": 1, **options})
    return train(task, texts(60, seed=1) if sequences is None else sequences, settings, out, **arguments)


def _ignore(*_values: Any) -> None:
    pass
