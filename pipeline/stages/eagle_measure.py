"""What a trained head is worth with each size of draft vocabulary, in the form in which it is served; and its files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from deploy.formats.eagle_config import EagleConfig
from deploy.formats.eagle_record import Acceptance, Owner, TrainingRecord
from deploy.formats.model_dir import ModelDirectory
from deploy.formats.speculators import EMBEDDING, write_eagle
from pipeline.stages.served_form import as_served, served_bytes, served_matrix
from train.eagle.head import EagleHead
from train.eagle.rollout import HeldOut
from train.replay import Acceptance as Replay
from train.vocabulary import VocabularyChoice, best_choice, keep_most_frequent, mbsu

Ids = npt.NDArray[np.int64]
Weights = dict[str, npt.NDArray[np.float32]]
LM_HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Measured:
    """A head with the draft vocabulary that is worth most, as it goes into the file.

    served, plain: acceptance with the weights as the runtime holds them, and as trained. cost_ratio: bytes over the
    target's. choices: what every size is worth, the one it was trained with first.
    """

    config: EagleConfig
    weights: Weights
    draft_ids: Ids
    served: Acceptance
    plain: Acceptance
    cost_ratio: float
    choices: tuple[VocabularyChoice, ...]

    @property
    def mbsu(self) -> float:
        """Of the size that was kept."""
        return best_choice(self.choices).mbsu


def measure_sizes(
    head: EagleHead,
    heldout: HeldOut,
    target: ModelDirectory,
    counts: Ids,
    draft_ids: Ids,
    smaller: Sequence[int],
    target_bytes: int,
) -> Measured:
    """Replays the head with its own vocabulary and with `smaller` ones of the most frequent tokens in `counts`.

    draft_ids: int64 [D], the head's vocabulary. target_bytes: of the target's weights as the runtime holds them.
    """
    import torch

    weights = {name: value.detach().float().cpu().numpy() for name, value in head.state_dict().items()}
    served_head = _served(head, weights, target)
    num_drafted = head.config.num_drafted
    ids = torch.from_numpy(draft_ids).to(head.fc.weight.device)
    choices, replays = [], {}
    for size in (len(draft_ids), *smaller):
        kept = np.searchsorted(draft_ids, keep_most_frequent(counts, size, target.eos_token_ids))
        replays[size] = heldout.replay(served_head, ids, num_drafted, kept=torch.from_numpy(kept).to(ids.device))
        num_bytes = served_bytes({**weights, LM_HEAD: weights[LM_HEAD][kept]})
        tau = replays[size].tau
        worth = mbsu(tau, drafter_bytes=num_bytes, target_bytes=target_bytes, num_drafted=num_drafted)
        choices.append(VocabularyChoice(size, tau, num_bytes, worth))
    best = best_choice(choices)
    kept = np.searchsorted(draft_ids, keep_most_frequent(counts, best.size, target.eos_token_ids))
    plain = heldout.replay(head, ids, num_drafted, kept=torch.from_numpy(kept).to(ids.device))
    weights[LM_HEAD] = weights[LM_HEAD][kept]
    if head.config.embedding == "copy":
        weights[EMBEDDING] = target.float32("model.embed_tokens.weight")
    return Measured(
        config=replace(head.config, draft_vocab_size=best.size),
        weights=weights,
        draft_ids=draft_ids[kept],
        served=share_of_rounds(replays[best.size]),
        plain=share_of_rounds(plain),
        cost_ratio=best.drafter_bytes / target_bytes,
        choices=tuple(choices),
    )


def write_head(directory: Path, measured: Measured, owner: Owner, record: TrainingRecord) -> None:
    """The head's files; see deploy.formats.speculators."""
    write_eagle(directory, measured.config, measured.weights, measured.draft_ids, owner, record)


def _served(head: EagleHead, weights: Weights, target: ModelDirectory) -> EagleHead:
    """The head with the weights, and the embedding where it is tied, that the runtime reads."""
    import torch

    embedding = target.float32("model.embed_tokens.weight")
    if target.shape.tied_embeddings:
        embedding = served_matrix(embedding)
    served = EagleHead(head.config, torch.from_numpy(embedding))
    served.load_state_dict({name: torch.from_numpy(values) for name, values in as_served(weights).items()})
    return served.to(head.fc.weight.device)


def share_of_rounds(replay: Replay) -> Acceptance:
    """Shares of all rounds, so that τ is about 1 + their sum (a text's last rounds draft past its end)."""
    return Acceptance(tuple(accepted / replay.rounds for accepted in replay.accepted), replay.tau)
