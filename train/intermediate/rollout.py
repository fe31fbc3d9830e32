"""What an intermediate model is worth: how many of its drafts the target would have accepted (train/replay.py).

A language model drafts from the text alone, so its likeliest token after every token of a text, in one pass, is every
draft that a replay can need: the draft at depth j counts only where those before it were the text's own.
"""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import linear

from train.chains import Chains, find_chains
from train.intermediate.cross_entropy import LOGITS_PER_SLICE, MIN_ROWS
from train.intermediate.language_model import LanguageModel
from train.intermediate.objective import DraftVocabulary
from train.loop.batches import Batch
from train.replay import Acceptance, Replay, WrittenText, count_matches, greedy_texts, pack_texts, text_batch

LikeliestAfter = Callable[[Sequence[WrittenText], Sequence[int]], Sequence[int]]
"""(texts, indices into their packed tokens) → the target's id of the likeliest next token after each."""


class HeldOutTexts:
    """Greedy texts of the target, and the replay of any language model on them.

    conversations: those sampled at a temperature above 0 are left out. Raises ValueError when no greedy one has two
    written tokens in a row.
    """

    def __init__(self, conversations: Sequence[WrittenText]) -> None:
        greedy = greedy_texts(conversations)
        self.num_conversations = len(greedy)
        self._parts = pack_texts(greedy)

    def replay(self, likeliest: LikeliestAfter, num_drafted: int, ids: npt.NDArray[np.int64]) -> Acceptance:
        """Speculative decoding with `num_drafted` tokens a round. ids: the target's, of the draft vocabulary."""
        found = Replay(num_drafted, ids)
        for texts in self._parts:
            batch = text_batch(texts)
            chains = find_chains(batch, num_drafted)
            read = _read_tokens(batch, chains)
            needed = read[chains.drafts_written].unique()
            after = torch.full_like(batch.token_ids, -1)
            after[needed] = torch.tensor(likeliest(texts, needed.tolist()), dtype=torch.int64)
            found.add(texts, chains, count_matches(batch, chains, after[read]))
        return found.acceptance()

    @torch.no_grad()
    def replay_model(self, model: LanguageModel, vocabulary: DraftVocabulary, num_drafted: int) -> Acceptance:
        """The replay of a torch model that drafts from `vocabulary`."""
        device = vocabulary.ids.device
        rows = vocabulary.rows(model.head)

        def likeliest(texts: Sequence[WrittenText], after: Sequence[int]) -> list[int]:
            states = model.states(text_batch(texts).to(device))[torch.tensor(after, device=device)]
            parts = states.split(max(LOGITS_PER_SLICE // len(rows), MIN_ROWS))
            places = [linear(part, rows).argmax(-1) for part in parts]
            return vocabulary.ids[torch.cat(places)].tolist()

        return self.replay(likeliest, num_drafted, vocabulary.ids.cpu().numpy())


def _read_tokens(batch: Batch, chains: Chains) -> Tensor:
    """int64 [k, C]: the token after which each chain drafts at each step."""
    num_tokens = len(batch.token_ids)
    return torch.stack([chains.read_tokens(step, num_tokens) for step in range(chains.num_steps)])
