"""A quantized model directory as a float32 torch model: the weights that the codes stand for, put into their places.

Where the directory says how a layer's inputs are quantized, the model quantizes them so.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from compress.quantized_inputs import INNER, InputQuantizedLinear, QuantizedInputs
from deploy.formats.activations import LayerInputs
from deploy.formats.architectures import linear_layers
from deploy.formats.model_dir import ModelDirectory
from deploy.formats.packed import GroupedInt


def load_float32(model_dir: Path) -> PreTrainedModel:
    """The model of a directory, packed or plain, in float32 and evaluation mode.

    Packed weights are read by our own reader, so that every method's artifact is measured by one path (transformers
    does not know float minima). Raises ValueError (FormatError) when the directory does not fit its configuration.
    """
    with ModelDirectory.open(model_dir) as files:
        config = AutoConfig.from_pretrained(model_dir)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        linear_names = {layer.name for layer in linear_layers(files.shape)}
        for name in linear_names:
            if inputs := files.inputs(name):
                _quantize_inputs(model, name, inputs)
        state = model.state_dict()
        for name in state:
            state[name].copy_(_tensor(files, name.replace(INNER, "."), linear_names))
        model.tie_weights()
    return model.eval()


def replace_weights(model: PreTrainedModel, layers: Mapping[str, GroupedInt]) -> None:
    """Puts the dequantized weights of `layers` (module name → weight) into the model, in place."""
    for name, weight in layers.items():
        module = model.get_submodule(name)
        module.get_parameter("weight").data.copy_(torch.from_numpy(weight.dequantize()))


def _quantize_inputs(model: PreTrainedModel, name: str, inputs: LayerInputs) -> None:
    linear: Any = model.get_submodule(name)
    num_in = linear.in_features if inputs.flatten is None else len(inputs.flatten)
    inner = torch.nn.Linear(num_in, linear.out_features, bias=linear.bias is not None)
    model.set_submodule(name, InputQuantizedLinear(QuantizedInputs(inputs), inner))


def _tensor(files: ModelDirectory, name: str, linear_names: set[str]) -> torch.Tensor:
    if name == "lm_head.weight" and files.shape.tied_embeddings:
        name = "model.embed_tokens.weight"
    module = name.removesuffix(".weight")
    if module in linear_names:
        weight = files.linear(module)
        return torch.from_numpy(weight.dequantize() if isinstance(weight, GroupedInt) else weight)
    return torch.from_numpy(files.float32(name).copy())
