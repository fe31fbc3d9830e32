"""The generate stage on a tiny random model: `python generate_tiny.py STORE MODEL [JSON of changed settings]`.

Run by test_generate.py. MODEL holds a model, its tokenizer and its chat template.
"""

from __future__ import annotations

import json
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.graph import BuildContext, Stage
from pipeline.run import Outcome, run_pipeline
from pipeline.stages import generate
from pipeline.store import Store
from pipeline.tracking import Trackers

CONFIG: dict[str, Any] = {
    "writer": "quantized",
    "num_tokens": 4000,
    "num_heldout": 6,
    "heldout_greedy_share": 0.5,
    "temperatures": [0.0, 0.8, 1.0],
    "top_p": 1.0,
    "max_tokens": 24,
    "stop_loops": True,
    "num_turns": 2,
    "shard_size": 8,
    "self_written": {"max_tokens": 24, "temperature": 1.0, "top_p": 1.0, "first_words": []},
    "prompts": {"share": 0.0, "path": None, "dataset": None, "dataset_split": "train", "column": "prompt"},
    "engine": {"kind": "runtime", "num_sequences": 12, "device": "cpu"},
}


def stages(model: Path, config: dict[str, Any]) -> list[Stage]:
    def copy_model(context: BuildContext) -> None:
        shutil.copytree(model, context.out / "model")

    target = Stage("target", "target", 1, {}, copy_model)
    return [
        Stage(
            name="generate",
            instance="generate",
            version=1,
            config=generate.keyed(config),
            build=partial(generate.build, config, 1),
            inputs={"target": target, "model": target},
            seed=3,
            packages=generate.packages(config),
            fingerprint=partial(generate.fingerprint, config),
            check=lambda _config: generate.check(config),
            resumable=True,
            continues=generate.continues,
        )
    ]


def run(store: Path, model: Path, changes: dict[str, Any]) -> Outcome:
    config = CONFIG | {k: CONFIG[k] | v if isinstance(v, dict) else v for k, v in changes.items()}
    return run_pipeline(stages(model, config), Store(store), Trackers([]), print)[-1]


if __name__ == "__main__":
    run(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]) if len(sys.argv) > 3 else {})
