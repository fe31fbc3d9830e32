"""Structured configs: the schema against which Hydra checks every key and type.

`register` puts them into Hydra's store; each file in `conf/` starts from one of them. Nodes still typed `Any` are
checked by the schema that their group's files name. Not frozen: OmegaConf makes a frozen dataclass read-only, and
then no file and no override could set its values.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from pipeline.stages import eagle_schema, evaluate_schema, generate_schema, intermediate_schema
from pipeline.stages import schema as stages


class TrackingMode(Enum):
    """Where a run is recorded besides `metrics.jsonl`."""

    none = "none"
    offline = "offline"
    online = "online"


@dataclass
class TrackingConfig:
    """`conf/tracking/`: Weights & Biases.

    entity, run_name: null lets W&B choose. log_files: upload artifacts' contents instead of references.
    timeout_seconds: longest wait for W&B at the start and at the end of a run.
    """

    mode: TrackingMode = MISSING
    project: str = "understudy"
    entity: str | None = None
    run_name: str | None = None
    tags: list[str] = field(default_factory=list)
    log_files: bool = False
    timeout_seconds: float = 30.0


@dataclass
class Config:
    """The root of `conf/config.yaml`.

    stage, force: one name or a list of names of stages. store, bundles: directories; relative ones start at the
    current directory. threads: null takes every core that the process may use. eagle_intermediate: a choice of
    `conf/eagle/`, left out where there is no intermediate.
    """

    name: str = MISSING
    seed: int = MISSING
    store: str = "artifacts"
    bundles: str = "bundles"
    stage: Any = field(default_factory=list)
    from_stage: str | None = None
    force: Any = field(default_factory=list)
    threads: int | None = None
    target: Any = MISSING
    calibrate: Any = MISSING
    quantize: Any = MISSING
    quality: Any = MISSING
    generate: Any = MISSING
    eagle: Any = MISSING
    intermediate: Any = MISSING
    eagle_intermediate: Any = MISSING
    evaluate: Any = MISSING
    tracking: TrackingConfig = MISSING


def register() -> None:
    """Make the schemas known to Hydra under the names that the group files use."""
    store = ConfigStore.instance()
    store.store(name="config_schema", node=Config)
    store.store(group="tracking", name="tracking_schema", node=TrackingConfig)
    for schemas in (stages, generate_schema, eagle_schema, intermediate_schema, evaluate_schema):
        schemas.register()
