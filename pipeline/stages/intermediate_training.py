"""The intermediate stage's work: a start, a vocabulary, two phases of training, and the best of all checkpoints.

Imported by the stage only when it builds: everything here needs torch.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from deploy.formats.model_dir import ModelDirectory
from pipeline.graph import BuildContext
from pipeline.stages.assemble import TOKENIZER_FILES
from pipeline.stages.drafter_inputs import count_vocabulary, read_heldout
from pipeline.stages.intermediate import (
    HISTORY,
    MODEL,
    RECORD,
    VOCABULARY,
    has_lens,
    learns_distribution,
    needs_teacher,
    planned_layers,
    sizes,
)
from pipeline.stages.training import run_training, train_settings
from pipeline.stages.training_history import history, write_history
from train.data.conversations import Conversation, read_conversations
from train.eagle.initial import make_teacher, target_norm, target_rows
from train.elementwise import rms_normalize
from train.features import FeatureSource
from train.intermediate.adapters import AdapterSizes, add_adapters, merge
from train.intermediate.initial import from_layers, from_noise, write_model
from train.intermediate.language_model import LanguageModel
from train.intermediate.lens import fit_lens
from train.intermediate.objective import Distribution, DraftVocabulary, Tokens
from train.intermediate.rollout import HeldOutTexts
from train.intermediate.shapes import layers_config, random_config
from train.intermediate.task import IntermediateTask
from train.intermediate.texts import cut_documents
from train.loop.batches import TokenSequence
from train.loop.state import TrainResult
from train.vocabulary import keep_most_frequent

if TYPE_CHECKING:
    from torch import Tensor

COPIED = ("generation_config.json", *TOKENIZER_FILES)


@dataclass
class _Best:
    """The weights that accept most, of the start and of every phase's best evaluation. start_tau: of the start."""

    start_tau: float
    tau: float = 0.0
    phase: str = ""
    state: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class _Work:
    """What the phases share. counts: int64 [V], of the draft vocabulary."""

    context: BuildContext
    model: LanguageModel
    target: ModelDirectory
    vocabulary: DraftVocabulary
    counts: npt.NDArray[np.int64]
    conversations: Sequence[Conversation]
    heldout: HeldOutTexts

    def task(self, objective: Tokens | Distribution) -> IntermediateTask:
        return IntermediateTask(self.model, objective, self.heldout, self.context.config["num_drafted"])


def train_intermediate(unkeyed: dict[str, Any], threads: int | None, context: BuildContext) -> None:
    """Fills the stage's artifact. unkeyed: settings by phase that are no part of its key, and the file of texts."""
    import torch

    config, inputs = context.config, context.inputs
    torch.manual_seed(context.seed)
    with ExitStack() as stack:
        target = stack.enter_context(ModelDirectory.open(inputs["target"] / MODEL))
        source = stack.enter_context(ModelDirectory.open(inputs.get("source", inputs["target"]) / MODEL))
        model, written = _start(config, target, source)
        work = _prepare(context, model, target)
        features = stack.enter_context(_teacher(context, threads)) if needs_teacher(config) else None
        if has_lens(config):
            assert features is not None
            _fit_head(work, features)
        best = _Best(start_tau=work.task(Tokens(work.vocabulary)).replay(model)["tau"])
        _keep_if_better(best, work, best.start_tau, "as it starts")
        results, told = {}, {}
        for phase in config["phases"]:
            settings = train_settings({**config[phase]["train"], **unkeyed[phase]})
            taught_by = features if phase == "align" and learns_distribution(config) else None
            result, log = _run_phase(work, phase, settings, unkeyed["text"], taught_by)
            _keep_if_better(best, work, result.best.tau, phase)
            is_timed = settings.max_seconds is not None
            results[phase] = (result, is_timed)
            told[phase] = history(log, result.evaluations, with_seconds=is_timed)
        _restore(best, model)
        write_model(model.lm, written, context.out / MODEL)
    _write(context, work, best, results, told)


def _start(
    config: dict[str, Any], target: ModelDirectory, source: ModelDirectory
) -> tuple[LanguageModel, dict[str, Any]]:
    """The model before any training, and its config.json."""
    import torch

    initial, vocab_size = config["initial"], target.shape.vocab_size
    if initial["kind"] == "random":
        lm = from_noise(target, sizes(initial))
        written = random_config(target.config, sizes(initial))
    else:
        layers = planned_layers(initial, source.shape)
        lm = from_layers(source, layers, vocab_size, unties=has_lens(config))
        written = layers_config(source.config, len(layers), vocab_size, unties=has_lens(config))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return LanguageModel(lm, trains_ends=config["trains_ends"]).to(device), written


def _prepare(context: BuildContext, model: LanguageModel, target: ModelDirectory) -> _Work:
    import torch

    config, generated, vocab_size = context.config, context.inputs["generate"], target.shape.vocab_size
    conversations = read_conversations(generated, "train")
    tokenizer = context.inputs["target"] / MODEL / "tokenizer.json"
    counts = count_vocabulary(config["vocabulary"]["counts"], conversations, tokenizer, vocab_size)
    size = config["vocabulary"]["size"] or vocab_size
    ids = torch.from_numpy(keep_most_frequent(counts, size, target.eos_token_ids))
    return _Work(
        context=context,
        model=model,
        target=target,
        vocabulary=DraftVocabulary.of(ids, vocab_size).to(model.head.device),
        counts=counts,
        conversations=conversations,
        heldout=HeldOutTexts(read_heldout(generated, config["heldout_conversations"])),
    )


def _fit_head(work: _Work, features: FeatureSource) -> None:
    """lm_head reads the model's states as the target's reads its own, as far as a linear map can."""
    import torch

    context, device = work.context, work.model.head.device
    num_tokens = context.config["initial"]["lens_tokens"]
    with ModelDirectory.open(context.inputs["quantize"] / MODEL) as quantized:
        every = torch.arange(quantized.shape.vocab_size)
        norm, rows = target_norm(quantized).to(device), target_rows(quantized, every).to(device)
        eps = quantized.shape.rms_norm_eps
    with context.progress(num_tokens, "fitting the head", "tokens") as bar:
        lens = fit_lens(
            work.model,
            work.conversations,
            features,
            lambda states: rms_normalize(states, eps) * norm,
            num_tokens=num_tokens,
            seed=context.seed,
            on_tokens=bar.update,
        )
    with torch.no_grad():
        work.model.head.copy_(rows @ lens)


def _run_phase(
    work: _Work, phase: str, settings: Any, text: dict[str, Any], features: FeatureSource | None
) -> tuple[TrainResult, Any]:
    """Trains the model, in place; afterwards it has the phase's best weights."""
    context, config = work.context, work.context.config
    sequences: Sequence[TokenSequence] = work.conversations
    objective: Tokens | Distribution = Tokens(work.vocabulary)
    adapted = None
    if phase == "pretrain":
        sequences = _texts(context, text, settings.max_length)
    else:
        if features is not None:
            objective = _distribution(work)
        lora = config["align"]["lora"]
        if lora is not None:
            adapted = add_adapters(work.model.lm, AdapterSizes(lora["rank"], lora["alpha"]))
    what = "pre-training on text" if phase == "pretrain" else "aligning with the target"
    result, log = run_training(context, work.task(objective), sequences, settings, what, features=features, phase=phase)
    if adapted is not None:
        work.model.lm = merge(adapted)
    return result, log


def _texts(context: BuildContext, text: dict[str, Any], max_length: int) -> Sequence[TokenSequence]:
    """Parts of all documents but those that calibrate holds out. text: `intermediate.pretrain.text`."""
    from compress.calibration import texts
    from deploy.formats.tokenizer import load_tokenizer

    heldout_share = context.config["pretrain"]["text"]["heldout_share"]
    if text["source"] == "python":
        documents = [document for group in texts.python_documents().values() for document in group]
    elif text["source"] == "file":
        documents = texts.file_documents(Path(text["path"]), "intermediate.pretrain.text.path")
    else:
        key = "intermediate.pretrain.text"
        documents = texts.dataset_documents(text["dataset"], text["dataset_split"], text["column"], key)
    kept, _ = texts.split_documents(documents, heldout_share=heldout_share, seed=context.seed)
    tokenizer: Any = load_tokenizer(context.inputs["target"] / MODEL / "tokenizer.json")
    encoded = tokenizer.encode_batch([document.text for document in kept], add_special_tokens=False)
    return cut_documents((found.ids for found in encoded), max_length)


@contextmanager
def _teacher(context: BuildContext, threads: int | None) -> Iterator[FeatureSource]:
    """The quantized target's states in the runtime that serves it, compared with references before they are used."""
    from deploy.runtime.cpu_backend import CpuBackend
    from pipeline.stages.features import RuntimeFeatures, compare_features

    directory = context.inputs["quantize"] / MODEL
    with ModelDirectory.open(directory) as files:
        source = RuntimeFeatures(CpuBackend(files, threads=threads), [files.shape.num_layers])
        (sample, *_) = read_conversations(context.inputs["generate"], "train")
        context.summary["features"] = compare_features(source, directory, [sample.token_ids])
        yield source


def _distribution(work: _Work) -> Distribution:
    with ModelDirectory.open(work.context.inputs["quantize"] / MODEL) as quantized:
        teacher = make_teacher(quantized, work.vocabulary.ids.cpu())
    return Distribution(work.vocabulary, teacher.to(work.model.head.device))


def _keep_if_better(best: _Best, work: _Work, tau: float, phase: str) -> None:
    if tau > best.tau:
        best.tau, best.phase = tau, phase
        best.state = {name: tensor.detach().cpu().clone() for name, tensor in work.model.lm.state_dict().items()}


def _restore(best: _Best, model: LanguageModel) -> None:
    model.lm.load_state_dict(best.state)


def _write(
    context: BuildContext,
    work: _Work,
    best: _Best,
    results: dict[str, tuple[TrainResult, bool]],
    told: dict[str, Any],
) -> None:
    """Everything but the weights, and the summary."""
    out = context.out / MODEL
    for name in COPIED:
        source = context.inputs["target"] / MODEL / name
        if source.is_file():
            shutil.copyfile(source, out / name)
    write_history(context.out / HISTORY, told)
    ids = work.vocabulary.ids.cpu().numpy()
    vocabulary = {"ids": ids.tolist(), "counts": work.counts[ids].tolist(), "total": int(work.counts.sum())}
    (context.out / VOCABULARY).write_text(json.dumps(vocabulary) + "\n", encoding="utf-8")
    trained = [result for result, _ in results.values()]
    is_timed = any(timed for _, timed in results.values())
    seconds = round(sum(result.elapsed_seconds for result in trained), 1)
    aligned = results["align"][0] if "align" in results else None
    record = {
        "tokens": sum(result.tokens for result in trained),
        "seconds": seconds if is_timed else None,
        "data": {
            "train_conversations": aligned.num_sequences if aligned else 0,
            "train_written_tokens": aligned.num_learned if aligned else 0,
            "heldout_conversations": work.heldout.num_conversations,
            "start_tau": round(best.start_tau, 4),
            "best_phase": best.phase,
            "phases": {
                phase: {"tokens": result.tokens, "epochs": round(result.epochs, 3), "best_step": result.best.step}
                for phase, (result, _) in results.items()
            },
        },
    }
    (context.out / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    _summarize(context, work, best, results, record, is_reproducible=not is_timed)


def _summarize(
    context: BuildContext,
    work: _Work,
    best: _Best,
    results: dict[str, tuple[TrainResult, bool]],
    record: dict[str, Any],
    *,
    is_reproducible: bool,
) -> None:
    num_parameters = sum(parameter.numel() for parameter in work.model.lm.parameters())
    context.summary.update(record, tau=best.tau, best_phase=best.phase, is_reproducible=is_reproducible)
    context.summary["parameters"] = num_parameters
    lines = [
        f"{num_parameters / 1e6:.1f} M parameters; τ {best.tau:.2f} ({best.phase}), before quantization",
        f"τ {best.start_tau:.2f} as it starts",
    ]
    lines += [
        f"{phase}: {result.tokens:,} tokens in {result.elapsed_seconds:.0f} s"
        f" ({result.tokens / result.elapsed_seconds:.0f} tokens/s), τ {result.best.tau:.2f}"
        for phase, (result, _) in results.items()
    ]
    context.summary["lines"] = lines
    taus = {f"{phase}/tau": result.best.tau for phase, (result, _) in results.items()}
    context.tracker.summary(context.stage, {"tau": best.tau, **taus, "parameters": num_parameters})
