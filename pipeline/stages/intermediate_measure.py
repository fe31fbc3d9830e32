"""measure: what the quantized intermediate is worth as a drafter, as the runtime computes it, and with which tokens.

The runtime itself computes the held-out texts, int8 activations included; one pass with the whole head serves every
size of vocabulary. Bytes are those that a token reads: layers and the head's rows, not the embedding, of which a token
looks up one row (docs/methods.md).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt

from compress.load import load_float32
from deploy.formats.draft_vocabulary import write_draft_vocabulary
from deploy.formats.eagle_record import Acceptance, TrainingRecord, record_json
from deploy.formats.model_dir import ModelDirectory
from deploy.formats.speculators import RECORD_FILE
from deploy.runtime.backend import SEQUENCE_END, Row
from deploy.runtime.cpu_backend import CpuBackend
from pipeline.graph import BuildContext
from pipeline.report.drafter import summary_line
from pipeline.stages.drafter_inputs import read_heldout, read_owner
from pipeline.stages.eagle_measure import share_of_rounds
from pipeline.stages.intermediate import MEASURED, MODEL, RECORD, VOCABULARY
from pipeline.stages.served_form import read_bytes
from train.intermediate.language_model import LanguageModel
from train.intermediate.objective import DraftVocabulary
from train.intermediate.rollout import HeldOutTexts
from train.replay import Acceptance as Replay
from train.replay import WrittenText
from train.vocabulary import VocabularyChoice, best_choice, keep_most_frequent, mbsu

ROWS_PER_CALL = 128
"""Rows whose logits exist at once: 25 MB of them at a vocabulary of 49,152."""
SERVED_FORM = "as quantized, computed by the runtime: activations int8 in groups of 32, plain matrices int8"
Ids = npt.NDArray[np.int64]


def measure_intermediate(threads: int | None, context: BuildContext) -> None:
    """Fills the stage's artifact."""
    config = context.config
    directory = context.inputs["quantize-intermediate"] / MODEL
    heldout = HeldOutTexts(read_heldout(context.inputs["generate"], config["heldout_conversations"]))
    found = json.loads((context.inputs["intermediate"] / VOCABULARY).read_text(encoding="utf-8"))
    ids, counts = np.array(found["ids"], dtype=np.int64), np.array(found["counts"], dtype=np.int64)
    with ModelDirectory.open(context.inputs["quantize"] / MODEL) as target:
        target_bytes = read_bytes(CpuBackend(target, threads=threads), target.shape.vocab_size)
    with ModelDirectory.open(directory) as files:
        backend = CpuBackend(files, threads=threads)
        vocabularies = {len(ids): ids, **{size: _cut(ids, counts, size, files) for size in config["trim"]}}
        likeliest = LikeliestTokens(backend, list(vocabularies.values()))
        replays: dict[int, Replay] = {}
        choices = []
        with context.progress(len(vocabularies), "acceptance by size of vocabulary", "sizes") as bar:
            for size, kept in vocabularies.items():
                replays[size] = heldout.replay(likeliest.of(kept), config["num_drafted"], kept)
                num_bytes = read_bytes(backend, size)
                tau = replays[size].tau
                worth = mbsu(tau, drafter_bytes=num_bytes, target_bytes=target_bytes, num_drafted=config["num_drafted"])
                choices.append(VocabularyChoice(size, tau, num_bytes, worth))
                bar.update(1)
        vocab_size = files.shape.vocab_size
    best = best_choice(choices)
    plain = _plain(context, heldout, vocabularies[best.size], vocab_size)
    served = share_of_rounds(replays[best.size])
    record = _record(context, served, plain, best, choices, target_bytes, found["total"])
    _write(context, record, vocabularies[best.size], vocab_size)
    _summarize(context, record, best, target_bytes)


class LikeliestTokens:
    """The runtime's greedy drafts after tokens of texts, for several vocabularies at once; texts are computed once."""

    def __init__(self, backend: CpuBackend, vocabularies: Sequence[Ids]) -> None:
        self._backend = backend
        self._vocabularies = {len(ids): ids for ids in vocabularies}
        self._known: dict[int, dict[int, dict[int, int]]] = {}

    def of(self, kept: Ids) -> Any:
        """A LikeliestAfter (train/intermediate/rollout.py) that drafts from `kept`."""

        def likeliest(texts: Sequence[WrittenText], after: Sequence[int]) -> list[int]:
            key = id(texts)
            if key not in self._known:
                self._known[key] = self._compute(texts, set(after))
            return [self._known[key][len(kept)][index] for index in after]

        return likeliest

    def _compute(self, texts: Sequence[WrittenText], after: set[int]) -> dict[int, dict[int, int]]:
        """Vocabulary's size → place in the packed texts → the target's id of the likeliest next token."""
        found: dict[int, dict[int, int]] = {size: {} for size in self._vocabularies}
        first = 0
        for text in texts:
            for begin, rows in _calls(text.token_ids.tolist()):
                wanted = [index for index in range(len(rows)) if first + begin + index in after]
                logits = self._backend.forward(rows, logit_rows=wanted).logits
                self._backend.keep(0, range(len(rows)))
                for size, ids in self._vocabularies.items():
                    tokens = ids[logits[:, ids].argmax(1)].tolist()
                    found[size].update(zip((first + begin + index for index in wanted), tokens, strict=True))
            self._backend.reset(0)
            first += len(text.token_ids)
        return found


def _calls(ids: Sequence[int]) -> Iterator[tuple[int, list[Row]]]:
    """A text in parts: where each begins, and its rows."""
    for begin in range(0, len(ids), ROWS_PER_CALL):
        part = ids[begin : begin + ROWS_PER_CALL]
        parents = [SEQUENCE_END, *range(len(part) - 1)]
        yield begin, [Row(token, begin + i, 0, parents[i]) for i, token in enumerate(part)]


def _cut(ids: Ids, counts: Ids, size: int, files: ModelDirectory) -> Ids:
    """The `size` most frequent of `ids`, and what ends a text."""
    ends = np.searchsorted(ids, [token for token in files.eos_token_ids if token in ids]).tolist()
    return ids[keep_most_frequent(counts, size, ends)]


def _plain(context: BuildContext, heldout: HeldOutTexts, kept: Ids, vocab_size: int) -> Acceptance:
    """The same of the weights as they were trained, in torch."""
    import torch

    model = LanguageModel(load_float32(context.inputs["intermediate"] / MODEL))
    vocabulary = DraftVocabulary.of(torch.from_numpy(kept), vocab_size)
    return share_of_rounds(heldout.replay_model(model, vocabulary, context.config["num_drafted"]))


def _record(
    context: BuildContext,
    served: Acceptance,
    plain: Acceptance,
    best: VocabularyChoice,
    choices: Sequence[VocabularyChoice],
    target_bytes: int,
    total: int,
) -> TrainingRecord:
    trained = json.loads((context.inputs["intermediate"] / RECORD).read_text(encoding="utf-8"))
    return TrainingRecord(
        tokens=trained["tokens"],
        seconds=trained["seconds"],
        served=served,
        served_form=SERVED_FORM,
        plain=plain,
        cost_ratio=best.drafter_bytes / target_bytes,
        mbsu=best.mbsu,
        settings=context.manifests["intermediate"].config,
        data={
            **trained["data"],
            "vocabulary_counted_tokens": total,
            "vocabulary_choices": [asdict(choice) for choice in choices],
        },
    )


def _write(context: BuildContext, record: TrainingRecord, kept: Ids, vocab_size: int) -> None:
    """`training.json`, and `draft_vocabulary.json` where the head is trimmed."""
    out = context.out / MEASURED
    out.mkdir(exist_ok=True)
    content = json.dumps(record_json(read_owner(context), record), indent=2, ensure_ascii=False, sort_keys=True)
    (out / RECORD_FILE).write_text(content + "\n", encoding="utf-8")
    if len(kept) < vocab_size:
        write_draft_vocabulary(out, kept)


def _summarize(context: BuildContext, record: TrainingRecord, best: VocabularyChoice, target_bytes: int) -> None:
    figures = {
        "tau": record.served.tau,
        "tau_as_trained": record.plain.tau,
        "mbsu": record.mbsu,
        "draft_vocab_size": best.size,
        "read_bytes": best.drafter_bytes,
        "cost_ratio": record.cost_ratio,
    }
    context.summary.update(figures, acceptance_by_position=list(record.served.by_position), target_bytes=target_bytes)
    context.summary["lines"] = [
        summary_line("intermediate", record.served, best.drafter_bytes),
        f"draft vocabulary {best.size}; τ {record.plain.tau:.2f} before quantization; reads"
        f" {record.cost_ratio:.0%} of the target's bytes a token; MBSU {record.mbsu:.2f}",
    ]
    context.tracker.summary(context.stage, figures)
