"""What training a drafter reads besides weights: whose it will be, conversations, counts of tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from deploy.formats.eagle_record import Owner
from pipeline.graph import BuildContext
from pipeline.manifest import Manifest

if TYPE_CHECKING:
    from train.data.conversations import Conversation

MODEL = "model/"


def read_owner(context: BuildContext) -> Owner:
    """Whose head this will be. Raises ValueError when the conversations were made under another chat template."""
    from deploy.formats.chat import ChatTemplate

    target, quantized = context.manifests["target"], context.manifests["quantize"]
    identity = ChatTemplate.from_directory(context.inputs["target"] / MODEL).identity
    made_under = json.loads((context.inputs["generate"] / "data.json").read_text(encoding="utf-8"))["chat_template"]
    if made_under != identity:
        raise ValueError(
            f"generate's conversations were made under the chat template {made_under[:16]}, and the target's is"
            f" {identity[:16]}; generate them again (force=generate)"
        )
    return Owner(quantized.content, _model_files(quantized), _model_files(target)["tokenizer.json"], identity)


def read_heldout(directory: Path, limit: int) -> list[Conversation]:
    """Greedy held-out conversations, the first `limit` of them. Raises ValueError when there is none."""
    from train.data.conversations import read_conversations

    greedy = [found for found in read_conversations(directory, "heldout") if found.temperature == 0]
    if not greedy:
        raise ValueError(
            "no held-out conversation is greedy, and acceptance is measured on those; raise"
            " generate.heldout_greedy_share or generate.num_heldout"
        )
    return greedy[:limit]


def count_vocabulary(
    source: str, conversations: Sequence[Conversation], tokenizer_file: Path, vocab_size: int
) -> npt.NDArray[np.int64]:
    """How often each of the target's tokens occurs, int64 [vocab_size], in what `eagle.vocabulary.counts` names."""
    from train.vocabulary import count_tokens

    if source == "generated":
        return count_tokens((found.token_ids[found.loss_mask()] for found in conversations), vocab_size)
    from compress.calibration.texts import python_documents
    from deploy.formats.tokenizer import load_tokenizer

    tokenizer: Any = load_tokenizer(tokenizer_file)
    documents = [document.text for group in python_documents().values() for document in group]
    encoded = tokenizer.encode_batch(documents, add_special_tokens=False)
    return count_tokens((np.array(found.ids, dtype=np.int64) for found in encoded), vocab_size)


def _model_files(manifest: Manifest) -> dict[str, str]:
    """sha256 of the files of an artifact's `model/`, by name."""
    return {name.removeprefix(MODEL): e.sha256 for name, e in manifest.files.items() if name.startswith(MODEL)}
