"""The eagle stage's work: features compared, a vocabulary chosen, the head trained, trimmed, measured, written.

Imported by the stage only when it builds: everything here needs torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from deploy.formats.draft_vocabulary import read_draft_vocabulary
from deploy.formats.eagle_config import EagleConfig
from deploy.formats.eagle_record import Owner, TrainingRecord
from deploy.formats.model_dir import ModelDirectory
from deploy.formats.speculators import EagleDirectory
from deploy.runtime.cpu_backend import CpuBackend
from pipeline.graph import BuildContext
from pipeline.report.drafter import summary_line
from pipeline.stages.drafter_inputs import count_vocabulary, read_heldout, read_owner
from pipeline.stages.eagle import HEAD, HISTORY, feature_layers
from pipeline.stages.eagle_measure import Measured, measure_sizes, write_head
from pipeline.stages.export_drafter import CONFIGS
from pipeline.stages.features import RuntimeFeatures, compare_features
from pipeline.stages.intermediate import MEASURED
from pipeline.stages.served_form import SERVED_FORM, read_bytes
from pipeline.stages.training import run_training, train_settings
from pipeline.stages.training_history import history, write_history
from train.data.conversations import Conversation, read_conversations
from train.eagle.head import EagleHead
from train.eagle.initial import make_teacher, start_from_head, start_from_target, target_embedding
from train.eagle.objective import TrainingTimeTest
from train.eagle.rollout import HeldOut
from train.eagle.task import EagleTask
from train.loop.state import TrainResult
from train.vocabulary import keep_most_frequent, vocabulary_maps

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Data:
    """Conversations, and counts int64 [V] of what the draft vocabulary is chosen by."""

    train: Sequence[Conversation]
    heldout: Sequence[Conversation]
    counts: Any


def train_head(unkeyed: dict[str, Any], initial: Path | None, threads: int | None, context: BuildContext) -> None:
    """Fills the stage's artifact. unkeyed: training settings that are no part of its key. initial: of a head to start
    from."""
    config, model_dir = context.config, context.inputs["quantize"] / "model"
    owner = read_owner(context)
    settings = train_settings({**config["train"], **unkeyed})
    with ModelDirectory.open(model_dir) as target:
        data = _read_data(context, target.shape.vocab_size)
        layers = feature_layers(config, target.shape.num_layers)
        backend = CpuBackend(target, threads=threads)
        source = RuntimeFeatures(backend, sorted({*layers, target.shape.num_layers}))
        compared = compare_features(source, model_dir, _sample(context, data.train))
        columns = tuple(source.layers.index(layer) for layer in layers)
        heldout = HeldOut(data.heldout, source, columns)
        above_ids = _vocabulary_above(context, target.shape.vocab_size)
        size = min(config["vocabulary"]["size"], len(above_ids))
        draft_ids = keep_most_frequent(_only(data.counts, above_ids), size, target.eos_token_ids)
        task, head = _make_task(context, target, layers, columns, heldout, draft_ids)
        key = CONFIGS[context.stage]
        _check_trim(config["vocabulary"]["trim"], target.eos_token_ids, key)
        started = None if initial is None else _start_from(initial, head, target, owner, draft_ids, key)
        result, loss = run_training(
            context,
            task,
            data.train,
            settings,
            "training the head",
            features=source,
            is_start_trained=initial is not None,
        )
        measured = measure_sizes(
            head,
            heldout,
            target,
            _only(data.counts, above_ids),
            draft_ids,
            [smaller for smaller in config["vocabulary"]["trim"] if smaller < size],
            read_bytes(backend, len(above_ids)),
        )
    is_timed = settings.max_seconds is not None
    record = _record(config, measured, result, data, heldout.num_conversations, started, is_timed=is_timed)
    write_head(context.out / HEAD, measured, owner, record)
    write_history(context.out / HISTORY, history(loss, result.evaluations, with_seconds=is_timed))
    _summarize(context, record, measured, result, compared, is_timed=is_timed)


def _read_data(context: BuildContext, vocab_size: int) -> _Data:
    config, generated = context.config, context.inputs["generate"]
    conversations = read_conversations(generated, "train")
    tokenizer = context.inputs["target"] / "model" / "tokenizer.json"
    counts = count_vocabulary(config["vocabulary"]["counts"], conversations, tokenizer, vocab_size)
    return _Data(conversations, read_heldout(generated, config["heldout_conversations"]), counts)


def _vocabulary_above(context: BuildContext, vocab_size: int) -> Ids:
    """The tokens that the model above may choose: all of the target's; of an intermediate, those that it may draft."""
    if "measure" not in context.inputs:
        return np.arange(vocab_size)
    ids = read_draft_vocabulary(context.inputs["measure"] / MEASURED, vocab_size)
    return np.arange(vocab_size) if ids is None else ids


def _only(counts: Ids, ids: Ids) -> Ids:
    """`counts` of these tokens; every other token comes behind them, however often it occurs."""
    found = np.full_like(counts, -1)
    found[ids] = counts[ids]
    return found


def _sample(context: BuildContext, conversations: Sequence[Conversation]) -> list[Any]:
    """Token ids of a few conversations, drawn at random."""
    count = min(context.config["compared_conversations"], len(conversations))
    chosen = np.random.default_rng(context.seed).choice(len(conversations), count, replace=False)
    return [conversations[index].token_ids for index in chosen]


def _make_task(
    context: BuildContext,
    target: ModelDirectory,
    layers: tuple[int, ...],
    columns: tuple[int, ...],
    heldout: HeldOut,
    draft_ids: Ids,
) -> tuple[EagleTask, EagleHead]:
    """A head that starts from the target, and what it is to learn. columns: places of `layers` among the features."""
    import torch

    config, ids = context.config, torch.from_numpy(draft_ids)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(context.seed)
    shape = EagleConfig.for_target(
        target.shape,
        draft_vocab_size=len(draft_ids),
        feature_layers=layers,
        norm_before_residual=config["norm_before_residual"],
        num_drafted=config["num_drafted"],
        embedding=config["embedding"],
    )
    head = EagleHead(shape, target_embedding(target))
    start_from_target(head, target, ids)
    _, in_vocabulary = vocabulary_maps(draft_ids, target.shape.vocab_size)
    objective = TrainingTimeTest(
        teacher=make_teacher(target, ids).to(device),
        in_vocabulary=torch.from_numpy(in_vocabulary).to(device),
        num_steps=config["unrolls"],
        decay=config["step_decay"],
        feature_columns=columns,
        teacher_column=len({*layers, target.shape.num_layers}) - 1,
    )
    return EagleTask(head, objective, heldout, ids.to(device), config["num_drafted"]), head


def _check_trim(sizes: Sequence[int], end_ids: Sequence[int], key: str) -> None:
    """Raises ValueError, before the training, for a size that the training would be cut to in vain."""
    fewest = len(set(end_ids))
    for size in sizes:
        if size < fewest:
            raise ValueError(
                f"{key}.vocabulary.trim={list(sizes)}: {size} cannot hold the {fewest} tokens that end a text; leave it"
                " out"
            )


def _start_from(
    initial: Path, head: EagleHead, target: ModelDirectory, owner: Owner, draft_ids: Ids, key: str
) -> dict[str, Any]:
    """Give `head` the weights of a trained one; what of it goes into the record. key: of the configuration.

    Raises ValueError when that one was trained for another tokenizer.
    """
    import torch

    with EagleDirectory.open(initial, target.shape) as trained:
        if trained.owner.tokenizer != owner.tokenizer:
            raise ValueError(
                f"the head at {initial} was trained for another tokenizer ({trained.owner.tokenizer[:16]}) than the"
                f" target's ({owner.tokenizer[:16]}); leave {key}.initial out"
            )
        start_from_head(head, trained, torch.from_numpy(draft_ids))
        return {"content": trained.owner.content, "tokens": trained.training.tokens}


def _record(
    config: dict[str, Any],
    measured: Measured,
    result: TrainResult,
    data: _Data,
    num_heldout: int,
    started: dict[str, Any] | None,
    *,
    is_timed: bool,
) -> TrainingRecord:
    covered = float(data.counts[measured.draft_ids].sum() / data.counts.sum())
    return TrainingRecord(
        tokens=result.tokens,
        seconds=round(result.elapsed_seconds, 1) if is_timed else None,
        served=measured.served,
        served_form=SERVED_FORM,
        plain=measured.plain,
        cost_ratio=measured.cost_ratio,
        mbsu=measured.mbsu,
        settings=config,
        data={
            "train_conversations": result.num_sequences,
            "train_written_tokens": result.num_learned,
            "heldout_conversations": num_heldout,
            "epochs": round(result.epochs, 3),
            "best_step": result.best.step,
            "precision": result.precision,
            "vocabulary_coverage": round(covered, 5),
            "vocabulary_choices": [asdict(choice) for choice in measured.choices],
            **({"started_from": started} if started else {}),
        },
    )


def _summarize(
    context: BuildContext,
    record: TrainingRecord,
    measured: Measured,
    result: TrainResult,
    compared: dict[str, Any],
    *,
    is_timed: bool,
) -> None:
    num_bytes = sum(file.stat().st_size for file in (context.out / HEAD).iterdir())
    figures = {
        "tau": record.served.tau,
        "tau_as_trained": record.plain.tau,
        "mbsu": record.mbsu,
        "draft_vocab_size": len(measured.draft_ids),
        "tokens": result.tokens,
        "tokens_per_second": round(result.tokens / result.elapsed_seconds, 1),
        "training_seconds": round(result.elapsed_seconds, 1),
        "evaluation_seconds": round(result.evaluation_seconds, 1),
    }
    context.summary.update(figures, acceptance_by_position=list(record.served.by_position), data=dict(record.data))
    context.summary.update(features=compared, is_reproducible=not is_timed, skipped_steps=result.skipped_steps)
    context.summary["lines"] = [
        summary_line(context.stage, record.served, num_bytes),
        f"trained on {result.tokens:,} tokens in {result.elapsed_seconds:.0f} s"
        f" ({figures['tokens_per_second']:.0f} tokens/s); draft vocabulary {len(measured.draft_ids)};"
        f" τ {record.plain.tau:.2f} before rounding; MBSU {record.mbsu:.2f}",
    ]
    context.tracker.summary(context.stage, figures)
