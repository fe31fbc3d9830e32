"""Which linear layers read the same input and which norm comes right before: inputs are decided on per site."""

from collections.abc import Iterable

SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
NORMS = {"input_layernorm": ("q_proj", "k_proj", "v_proj"), "post_attention_layernorm": ("gate_proj", "up_proj")}


def input_sites(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Linear layers in groups that read one and the same input, in order of their first layer.

    names: module names of the architectures of deploy.formats, ending in `.q_proj` and so on.
    """
    sites: dict[tuple[str, int], list[str]] = {}
    for name in names:
        parent, _, kind = name.rpartition(".")
        (place,) = (i for i, kinds in enumerate(SHARED_INPUTS) if kind in kinds)
        sites.setdefault((parent, place), []).append(name)
    return [tuple(site) for site in sites.values()]


def readers(norm: str, names: Iterable[str]) -> list[str]:
    """Those of the linear layers `names` whose input is the output of `norm`, a module name; none for a final norm."""
    parent, _, kind = norm.rpartition(".")
    return [name for name in names if name.rpartition(".")[2] in NORMS.get(kind, ()) and name.startswith(f"{parent}.")]
