"""transformers on any device: requests in batches of a fixed size, in the order of their submission.

A batch is padded on the left and sampled together; it shrinks as rows end. Noise hangs on seed, sample index and
position alone, but logits may differ in their last bits with the batch's shape: the engine is not batch-invariant.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from train.data.engines.base import Completion, Request

CANDIDATES = 1024
"""Truncated sampling looks at this many of the most likely tokens; the nucleus of a sane model is far smaller."""
COMPACT_BELOW = 0.75
"""Finished rows leave the batch once fewer than this share of its rows is still being written."""


def choose_device(name: str) -> tuple[torch.device, torch.dtype]:
    """The device ("auto": a CUDA device where there is one) and the type to compute in there.

    Raises ValueError for a device that this machine does not have.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"generate.engine.device={name} cannot be used ({error}); use auto, cpu or cuda") from error
    return device, torch.float32 if device.type == "cpu" else torch.bfloat16


class TransformersEngine:
    """See `train.data.engines.base.Engine`."""

    is_batch_invariant = False

    def __init__(self, model: PreTrainedModel, end_ids: frozenset[int], *, batch_size: int, seed: int) -> None:
        self._model, self._end_ids, self.capacity, self._seed = model.eval(), end_ids, batch_size, seed
        self._waiting: deque[Request] = deque()

    def submit(self, request: Request) -> None:
        """Queue a request."""
        self._waiting.append(request)

    def completions(self) -> Generator[Completion, None, None]:
        """Completions in the order of submission, batch by batch, until no request is left."""
        try:
            while self._waiting:
                size = min(self.capacity, len(self._waiting))
                batch = [self._waiting.popleft() for _ in range(size)]
                yield from self._complete(batch)
        finally:
            self._waiting.clear()

    @torch.inference_mode()
    def _complete(self, batch: list[Request]) -> list[Completion]:
        device = self._model.device
        ids, mask = (part.to(device) for part in _left_padded([request.prompt for request in batch]))
        written: list[list[int]] = [[] for _ in batch]
        rows, cache, step_ids = list(range(len(batch))), None, ids
        while rows:
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -step_ids.shape[1] :]
            out = self._model(
                step_ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = out.past_key_values
            noise_at = [(batch[row].sample_index, len(batch[row].prompt) + len(written[row])) for row in rows]
            chosen = _sample(out.logits[:, -1].float(), [batch[row] for row in rows], self._seed, noise_at)
            for row, token in zip(rows, chosen.tolist(), strict=True):
                if not self._is_finished(batch[row], written[row]):
                    written[row].append(token)
            step_ids, mask = chosen[:, None], torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
            alive = [i for i, row in enumerate(rows) if not self._is_finished(batch[row], written[row])]
            if not alive:
                break
            if len(alive) < COMPACT_BELOW * len(rows):
                keep = torch.tensor(alive, device=device)
                cache.batch_select_indices(keep)
                step_ids, mask, rows = step_ids[keep], mask[keep], [rows[i] for i in alive]
        return [
            Completion(request.number, tuple(tokens), tokens[-1] in self._end_ids)
            for request, tokens in zip(batch, written, strict=True)
        ]

    def _is_finished(self, request: Request, tokens: list[int]) -> bool:
        return len(tokens) == request.max_tokens or bool(tokens and tokens[-1] in self._end_ids)


def _left_padded(prompts: list[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
    """ids and mask, int64 [rows, longest]."""
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return ids, mask


def _sample(logits: Tensor, requests: list[Request], seed: int, noise_at: list[tuple[int, int]]) -> Tensor:
    """Nucleus sampling (arXiv 1904.09751) by Gumbel-max over logits float32 [rows, vocabulary]; ids int64 [rows].

    noise_at: (sample index, position) of each row, which with the seed keys its noise. Temperature 0 is greedy.
    """
    device = logits.device
    values, ids = logits.topk(min(CANDIDATES, logits.shape[1]), dim=-1)
    temperature = torch.tensor([request.temperature for request in requests], device=device)[:, None]
    top_p = torch.tensor([request.top_p for request in requests], device=device)[:, None]
    is_greedy = temperature == 0
    scaled = values / torch.where(is_greedy, torch.ones_like(temperature), temperature)
    probs = torch.softmax(scaled, -1)
    is_cut = probs.cumsum(-1) - probs >= top_p
    noise = torch.stack([_gumbel(seed, index, position, values.shape[1]) for index, position in noise_at]).to(device)
    scores = torch.where(is_greedy, scaled, scaled + noise).masked_fill(is_cut, -torch.inf)
    return ids.gather(1, scores.argmax(-1, keepdim=True))[:, 0]


def _gumbel(seed: int, sample_index: int, position: int, size: int) -> Tensor:
    """Standard Gumbel noise float32 [size] for one row's candidates, from a counter-based generator."""
    generator = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, position, sample_index]))
    return torch.from_numpy(generator.gumbel(size=size).astype(np.float32))
