"""quantize with quantized inputs, as a stage: what it writes of a tiny model and what it says of it."""

from __future__ import annotations

import json
import re
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from compress.target.sources import Source
from deploy.formats.architectures import ModelShape, linear_layers, other_tensors
from deploy.formats.model_dir import ModelDirectory
from deploy.formats.safetensors_file import write_safetensors
from pipeline.stages import quality, quantize, sites
from tests.tiny_llama import TINY_LLAMA

CONFIG = {**TINY_LLAMA, "num_hidden_layers": 2}
SOLVED = {
    "dampening": 0.01,
    "activation_order": True,
    "on_singular": "error",
    "calibration": None,
    "num_samples": None,
    "twin": True,
}
WEIGHTS = {"group_size": None, "symmetric": True, "observer": "mse"}
SMOOTHQUANT = {
    "method": "smoothquant",
    "alpha": [0.3, 0.7],
    "weights": {"bits": 8, **WEIGHTS},
    "activations": {"bits": 8, "scope": "tensor"},
    "solver": "gptq",
    **SOLVED,
}
NO_FILE = Source(kind="hf", path=Path(), origin="x")
FLATTENQUANT = {
    "method": "flattenquant",
    "alpha": None,
    "beta": 1.3,
    "threshold": "search",
    "max_expansion": 1.5,
    "criterion": "error",
    "int4_share": 0.5,
    "gamma": None,
    "weights": WEIGHTS,
    "solver": "gptq",
    "correct_inputs": True,
    **SOLVED,
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A target and its samples, as the stages before leave them."""
    root, rng = tmp_path_factory.mktemp("artifacts"), np.random.default_rng(0)
    shape = ModelShape.from_config(CONFIG)
    sizes = other_tensors(shape) | {f"{name}.weight": (rows, columns) for name, rows, columns in linear_layers(shape)}
    tensors = {
        name: (0.2 * rng.standard_normal(size) + name.endswith("norm.weight")).astype(np.float32)
        for name, size in sizes.items()
    }
    (root / "target" / "model").mkdir(parents=True)
    (root / "calibrate").mkdir()
    write_safetensors(root / "target" / "model" / "model.safetensors", tensors)
    (root / "target" / "model" / "config.json").write_text(json.dumps(CONFIG))
    words = WordLevel({f"w{token}": token for token in range(97)}, unk_token="w0")
    Tokenizer(words).save(str(root / "target" / "model" / "tokenizer.json"))  # llmcompressor asks for one
    (root / "target" / "model" / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    records = [
        {"group": group, "split": split, "source": "x", "ids": rng.integers(0, 97, 50).tolist(), "text": ""}
        for split in ("calibration", "heldout")
        for group in ("prose", "code")
        for _ in range(2)
    ]
    (root / "calibrate" / "samples.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    return {"target": root / "target", "calibrate": root / "calibrate"}


def context(inputs: dict[str, Path], out: Path, config: dict[str, Any]) -> Any:
    @contextmanager
    def progress(total: int, label: str, unit: str) -> Any:
        yield SimpleNamespace(update=lambda count: None)

    scratch = out.with_name(f"{out.name}-scratch")
    for directory in (out, scratch):
        directory.mkdir(exist_ok=True)
    return SimpleNamespace(
        stage="quantize",
        inputs=inputs,
        out=out,
        scratch=scratch,
        config=config,
        summary={},
        progress=progress,
        tracker=SimpleNamespace(summary=lambda stage, values: None),
    )


@pytest.fixture(scope="module", params=[SMOOTHQUANT, FLATTENQUANT], ids=lambda config: str(config["method"]))
def built(request: pytest.FixtureRequest, inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    if request.param["method"] == "flattenquant":
        measured = context(inputs, tmp_path_factory.mktemp("sites"), sites.keyed(request.param))
        sites.build(measured)
        inputs = {**inputs, "sites": measured.out}
    found = context(inputs, tmp_path_factory.mktemp("quantize"), request.param)
    quantize.build(NO_FILE, "quantize", found)
    return found


def test_a_build_that_was_interrupted_goes_on_and_gives_the_same_bytes(
    built: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted in the second of two blocks, which leaves the first, and once more when the model is written."""
    done: list[int] = []
    is_interrupted = True

    @contextmanager
    def progress(total: int, label: str, unit: str) -> Any:
        def update(count: int) -> None:
            done.append(count)
            if is_interrupted and len(done) == 9:
                raise KeyboardInterrupt

        yield SimpleNamespace(update=update)

    again = context(built.inputs, tmp_path / "again", built.config)
    again.progress = progress
    with pytest.raises(KeyboardInterrupt):
        quantize.build(NO_FILE, "quantize", again)
    assert not list(again.out.iterdir())
    assert len(list(again.scratch.rglob("*.safetensors"))) == 1
    done.clear()
    is_interrupted = False
    with monkeypatch.context() as patched:
        patched.setattr(quantize, "describe_layers", interrupted)
        with pytest.raises(KeyboardInterrupt):
            quantize.build(NO_FILE, "quantize", again)
    assert len(done) == 14
    quantize.build(NO_FILE, "quantize", again)
    whole, resumed = (
        {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}
        for out in (built.out, again.out)
    )
    assert whole == resumed


def interrupted(*_arguments: Any) -> None:
    raise KeyboardInterrupt


def test_what_sites_can_have_is_told_beside_the_files(inputs: dict[str, Path], tmp_path: Path) -> None:
    measured = context(inputs, tmp_path / "sites", sites.keyed(FLATTENQUANT))
    sites.build(measured)
    told = json.loads((measured.out / "sites.json").read_text())
    assert {path.stem for path in (measured.out / "sites").iterdir()} == set(told)
    assert len(told) == measured.summary["num_sites"] == 8
    for site in told.values():
        assert 0 < site["error_8"] < site["error_4"] <= measured.summary["error_4_worst"]
        assert site["columns_4"] % 32 == site["columns_8"] % 32 == 0
    assert measured.summary["error_4_median"] <= measured.summary["error_4_worst"]


def test_model_twin_and_stats_are_written(built: Any) -> None:
    assert {path.name for path in built.out.iterdir()} == {"model", "twin", "stats.json"}
    for name in ("model", "twin"):
        with ModelDirectory.open(built.out / name) as files:
            has_inputs = files.inputs("model.layers.0.mlp.up_proj") is not None
            assert has_inputs == (name == "model")


@pytest.mark.parametrize("key", ["intermediate.quantize", "quality.variants.other"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_samples": 9}, r"num_samples=9: calibrate made only 4"),
        ({"calibration": ["poems"]}, r"calibration=\['poems'\]: calibrate made no poems samples"),
        ({"num_samples": 1, "dampening": 1e-12}, r"on_singular=error: model\.layers\.0\S* has a singular Hessian"),
    ],
)
def test_what_calibration_does_not_give_is_named_by_the_key_of_the_configuration(
    inputs: dict[str, Path], tmp_path: Path, key: str, changes: dict[str, Any], message: str
) -> None:
    grid = {"bits": 4, "group_size": 32, "symmetric": True, "observer": "minmax"}
    gptq = {"method": "gptq", **grid, **SOLVED, "twin": False, **changes}
    with pytest.raises(ValueError, match=rf"^{re.escape(key)}\.{message}"):
        quantize.build(NO_FILE, key, context(inputs, tmp_path, gptq))


def test_the_figures_are_those_of_the_files(built: Any) -> None:
    stats = json.loads((built.out / "stats.json").read_text())
    int4 = everything = channels = 0
    with ModelDirectory.open(built.out / "model") as files:
        for name, layer in files.layers.items():
            weight: Any = files.linear(name)
            inputs = files.inputs(name)
            assert inputs is not None
            everything += weight.q.size
            channels += layer.num_out * layer.num_in
            int4 += weight.q.size if weight.bits == inputs.grid.bits == 4 else 0
            told = stats["layers"][name]
            assert (told["bits"], told["input_bits"], told["columns"]) == (
                weight.bits,
                inputs.grid.bits,
                weight.shape[1],
            )
    assert stats["inputs"]["int4_share"] == pytest.approx(int4 / everything)
    assert stats["inputs"]["expansion"] == pytest.approx(everything / channels)
    if built.config["method"] == "flattenquant":
        for told in stats["layers"].values():
            assert told["columns"] == told[f"columns_{told['bits']}"]
            assert (told["error_4"] < stats["inputs"]["gamma"]) == (told["bits"] == 4)
        assert 0 < stats["inputs"]["int4_share"] < 1 < stats["inputs"]["expansion"]
    else:
        assert stats["inputs"]["alpha"] in (0.3, 0.7)


def test_shares_are_read_back_from_the_model_alone(built: Any) -> None:
    from benchmarks.frontier import read_figures

    stats = json.loads((built.out / "stats.json").read_text())
    found = read_figures(built.out / "model")
    assert found == {key: pytest.approx(stats["inputs"][key]) for key in ("int4_share", "expansion")}


def test_layers_errors_and_saturation_are_told_and_the_manifest_stays_short(built: Any) -> None:
    stats = json.loads((built.out / "stats.json").read_text())
    for told in stats["layers"].values():
        assert 0 < told["error"] < 0.4
        assert 0 <= told["saturation"] < (0.05 if told["bits"] == 4 else 0.01)  # 4 bits cut off on purpose
    assert stats["inputs"]["saturation"] <= stats["inputs"]["saturation_worst"]
    assert "layers" not in built.summary
    assert built.summary["inputs"] == stats["inputs"]


def test_quality_quantizes_inputs_as_the_file_says(built: Any, inputs: dict[str, Path], tmp_path: Path) -> None:
    measured = context({**inputs, "quantize": built.out}, tmp_path, {})
    quality.build(measured)
    found = json.loads((tmp_path / "quality.json").read_text())
    with_inputs = found["model"]["prose"]["kl"]
    assert 0 < with_inputs < 1

    import torch

    from compress.load import load_float32
    from compress.quality import measure
    from compress.quantized_inputs import InputQuantizedLinear

    model = load_float32(built.out / "model")
    quantized = [m for m in model.modules() if isinstance(m, InputQuantizedLinear)]
    assert len(quantized) == 14
    if built.config["method"] == "smoothquant":  # without flattening the inputs can be left as they are
        for module in quantized:
            module.expand = torch.nn.Identity()
        samples = [json.loads(line) for line in (inputs["calibrate"] / "samples.jsonl").read_text().splitlines()]
        texts = [s["ids"] for s in samples if s["split"] == "heldout" and s["group"] == "prose"]
        without, _ = measure(load_float32(inputs["target"] / "model"), model, texts)
        assert without.kl < with_inputs


def test_torch_has_the_states_of_the_reference_of_the_numerics(built: Any) -> None:
    from deploy.kernels.reference.model import ReferenceBackend
    from pipeline.stages.features import RuntimeFeatures, compare_features

    model = built.out / "model"
    ids = [np.random.default_rng(1).integers(0, 97, 40).astype(np.int32)]
    figures = compare_features(RuntimeFeatures(ReferenceBackend(model), (1, 2)), model, ids)
    first, second = figures["torch_relative_error"].values()
    assert first < 1e-5  # the same codes
    assert second < figures["torch_tolerance"] == (0.5 if built.config["method"] == "flattenquant" else 0.15)
