"""Low-rank adapters (LoRA, arXiv 2106.09685) on an existing model, by peft: trained, then merged into its weights."""

from dataclasses import dataclass

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class AdapterSizes:
    """rank: of each adapter. alpha: its product is multiplied by alpha / rank."""

    rank: int
    alpha: int


def add_adapters(lm: PreTrainedModel, sizes: AdapterSizes) -> PeftModel:
    """Puts an adapter on every linear layer of `lm`'s decoder, in place, and freezes everything else.

    They start at zero: the model's output is what it was. Returns what `merge` takes.
    """
    config = LoraConfig(
        r=sizes.rank,
        lora_alpha=sizes.alpha,
        target_modules=list(LAYERS),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(lm, config)


def merge(adapted: PeftModel) -> PreTrainedModel:
    """The model without adapters, their products added to its weights."""
    merged: PreTrainedModel = adapted.merge_and_unload()
    return merged
