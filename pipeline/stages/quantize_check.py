"""Bad values in `conf/quantize/`, refused before any work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from compress.grids import check_group_size
from deploy.formats.architectures import ModelShape

CALIBRATED = ("gptq", "smoothquant", "flattenquant")
"""Methods that read calibration samples."""


def check(config: dict[str, Any], read_shape: Callable[[], ModelShape], key: str = "quantize") -> None:
    """Raises ValueError on a grid that this model or this runtime cannot have.

    read_shape: () → the model's ModelShape; called only when widths matter to the method. key: of the configuration.
    """
    _check_grid(config, key)
    if "weights" in config:
        _check_grid(config["weights"], f"{key}.weights")
    _check_method(config, key)
    if config.get("dampening", 1) <= 0:
        raise ValueError(f"{key}.dampening={config['dampening']} must be above 0; 0.01 is usual")
    if config["method"] == "rtn" and config["observer"] == "imatrix_mse":
        raise ValueError(
            f"{key}.observer=imatrix_mse weighs by calibrated inputs, of which rtn has none; use minmax or mse"
        )
    if config.get("num_samples") is not None and config["num_samples"] < 1:
        raise ValueError(f"{key}.num_samples={config['num_samples']} must be 1 or more; null takes all")
    if config["method"] == "q4_0":
        check_group_size(read_shape(), 32, key)
    if "group_size" in config:
        check_group_size(read_shape(), config["group_size"], key)
    if config["method"] == "smoothquant":
        check_group_size(read_shape(), config["weights"]["group_size"] or 32, f"{key}.weights")


def check_calibration(config: dict[str, Any], calibrate: dict[str, Any], key: str = "quantize") -> None:
    """Raises ValueError when the method calibrates on a group of which `calibrate` makes no samples."""
    if config["method"] not in CALIBRATED:
        return
    if config["calibration"] is not None and not config["calibration"]:
        raise ValueError(f"{key}.calibration=[] names no group of samples; null takes all that calibrate makes")
    text_groups = ["prose", "code"] if calibrate["text"]["source"] == "python" else ["text"]
    made = [group for group in ("chat", "free") if calibrate[group]["num_samples"]]
    made += text_groups if calibrate["text"]["num_samples"] else []
    missing = [group for group in config["calibration"] or [] if group not in made]
    if missing or not made:
        raise ValueError(
            f"{key}.calibration={config['calibration']}: calibrate makes no {', '.join(missing) or 'samples'}"
            f" (it makes: {', '.join(made) or 'none'}); choose among these or raise calibrate's budgets"
        )
    num_made = sum(calibrate[g if g in calibrate else "text"]["num_samples"] for g in config["calibration"] or made)
    if (config["num_samples"] or 0) > num_made:
        raise ValueError(
            f"{key}.num_samples={config['num_samples']}: calibrate makes only {num_made}; raise its budgets"
        )


def _check_grid(grid: dict[str, Any], key: str) -> None:
    if "bits" in grid and grid["bits"] not in (4, 8):
        raise ValueError(f"{key}.bits={grid['bits']} is not supported; use 4 or 8")
    per_output = (None,) if key.endswith(".weights") else ()
    if "group_size" in grid and grid["group_size"] not in (32, 64, 128, *per_output):
        choices = "32, 64 or 128" + (", or null for one scale per output" if per_output else "")
        raise ValueError(f"{key}.group_size={grid['group_size']} is not supported; use {choices}")


def _check_method(config: dict[str, Any], key: str) -> None:
    """What only methods with quantized inputs have."""
    if config.get("solver") == "rtn" and config["weights"]["observer"] == "imatrix_mse":
        raise ValueError(f"{key}.weights.observer=imatrix_mse needs {key}.solver=gptq; use minmax or mse")
    if config["method"] == "smoothquant":
        if not config["alpha"] or not all(0 <= alpha <= 1 for alpha in config["alpha"]):
            raise ValueError(f"{key}.alpha={config['alpha']} must be one or more numbers from 0 to 1, e.g. [0.5,0.8]")
        if config["activations"]["bits"] not in (4, 8):
            raise ValueError(f"{key}.activations.bits={config['activations']['bits']} is not supported; use 4 or 8")
    if config["method"] == "flattenquant":
        if config["alpha"] is not None and not 0 <= config["alpha"] <= 1:
            raise ValueError(f"{key}.alpha={config['alpha']} must be from 0 to 1; null leaves smoothing out")
        if config["beta"] <= 0:
            raise ValueError(f"{key}.beta={config['beta']} must be above 0; the default is 1.3")
        if config["max_expansion"] < 1:
            raise ValueError(f"{key}.max_expansion={config['max_expansion']} must be 1 (nothing is split) or more")
        _check_share(config["int4_share"], config["gamma"], key)


def _check_share(int4_share: float | None, gamma: float | None, key: str) -> None:
    if (int4_share is None) == (gamma is None):
        raise ValueError(
            f"{key}.int4_share={int4_share} and {key}.gamma={gamma}: either decides which layers get 4 bits;"
            f" give one of them and null for the other, e.g. {key}.gamma=0.2 {key}.int4_share=null"
        )
    if int4_share is not None and not 0 <= int4_share <= 1:
        raise ValueError(f"{key}.int4_share={int4_share} must be from 0 (8 bits everywhere) to 1 (4 bits everywhere)")
    if gamma is not None and gamma < 0:
        raise ValueError(f"{key}.gamma={gamma} must be 0 (8 bits everywhere) or more")
