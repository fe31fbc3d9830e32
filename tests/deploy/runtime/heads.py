"""EAGLE heads beside their targets, and what to ask them for."""

import numpy as np

from deploy.formats.architectures import ModelShape
from deploy.formats.eagle_record import Owner
from deploy.formats.speculators import EagleDirectory
from deploy.runtime.sampling import SamplingParams
from deploy.runtime.tree import TreeLimits
from tests.deploy.runtime.rows import VOCABULARY

HIDDEN = 96
OWNER = Owner("c" * 64, {"model.safetensors": "f" * 64}, "a" * 64, "b" * 64)
LIMITS = [
    TreeLimits(depth=4, width=1, num_nodes=4),
    TreeLimits(depth=3, width=3, num_nodes=9),
    TreeLimits(depth=5, width=4, num_nodes=20, min_probability=0.01),
    TreeLimits(depth=6, width=2, num_nodes=7, min_gain=0.05),
]
SAMPLING = [
    SamplingParams(),
    SamplingParams(repetition_penalty=1.5),
    SamplingParams(temperature=0.8, seed=3),
    SamplingParams(temperature=0.8, top_k=6, top_p=0.95, repetition_penalty=1.3, seed=1 << 63),
]
# (target's embedding tied, head)
HEADS = {
    "three states": (True, {"feature_layers": (0, 1, 2), "norm_before_residual": True}),
    "one state, untied": (False, {"feature_layers": (2,), "norm_before_residual": False}),
    "two states, copy": (True, {"feature_layers": (0, 2), "norm_before_residual": False, "embedding": "copy"}),
}


class Case:
    """A head, its target's directory, and texts with states that it reads."""

    def __init__(self, tiny, folder, name):
        tied, choices = HEADS[name]
        config = tiny.config(tie_word_embeddings=tied, max_position_embeddings=400)
        self.model = tiny.model(folder / "m", config, tiny.Quantized(), spread=0.4)
        shape = ModelShape.from_config(config)
        tiny.head(folder / "h", shape, OWNER, seed=3, spread=0.12, **choices)
        self.head = EagleDirectory.open(folder / "h", shape)

    def text(self, count, seed=0):
        rng = np.random.default_rng([11, seed])
        width = HIDDEN * len(self.head.config.feature_layers)
        return rng.integers(0, VOCABULARY, count).tolist(), rng.standard_normal((count, width)).astype(np.float32)
