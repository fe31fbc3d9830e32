"""The ways to decode by name: which drafter, made of which of the bundle's models."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal, get_args

from deploy.formats.bundle import Bundle
from deploy.runtime.backend import Backend
from deploy.runtime.backends import BackendName, open_backend, open_head
from deploy.runtime.drafters.base import Drafter, DraftModel
from deploy.runtime.drafters.cascade import Cascade
from deploy.runtime.drafters.lookup import NUM_TOKENS, LookupDrafter
from deploy.runtime.drafters.model import EagleDrafter, LanguageModelDrafter
from deploy.runtime.drafters.none import NoDrafter
from deploy.runtime.tree import MOST_NODES, TreeLimits

Mode = Literal["auto", "plain", "lookup", "chain", "eagle", "eagle-tree", "opt-tree", "cascade", "cascade-lookup"]
MODES: tuple[Mode, ...] = get_args(Mode)
NEEDS: dict[Mode, tuple[str, ...]] = {
    "auto": (),
    "plain": (),
    "lookup": (),
    "chain": ("intermediate",),
    "eagle": ("eagle-target",),
    "eagle-tree": ("eagle-target",),
    "opt-tree": ("eagle-target",),
    "cascade": ("intermediate", "eagle-intermediate"),
    "cascade-lookup": ("intermediate",),
}
"""The bundle's components that a mode cannot do without."""


def require_mode(name: str) -> Mode:
    """`name` as a mode. Raises ValueError for an unknown one."""
    for mode in MODES:
        if mode == name:
            return mode
    raise ValueError(f"mode={name!r} is not known; use {', '.join(MODES)}")


@dataclass(frozen=True)
class DraftOptions:
    """Sizes of drafts; None takes the mode's own. depth, width, num_nodes: as in TreeLimits; of a cascade they shape
    the inner drafts, min_draft_length the draft for the target. A lookup drafts up to `depth` tokens.

    Raises ValueError for a size below 1.
    """

    depth: int | None = None
    width: int | None = None
    num_nodes: int | None = None
    min_draft_length: int | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} is out of range; use 1 or more")


_TREE = ("depth", "width", "num_nodes")
_SIZES: dict[Mode, tuple[str, ...]] = {
    "auto": (),
    "plain": (),
    "lookup": ("depth",),
    "chain": _TREE,
    "eagle": _TREE,
    "eagle-tree": _TREE,
    "opt-tree": _TREE,
    "cascade": (*_TREE, "min_draft_length"),
    "cascade-lookup": ("depth", "min_draft_length"),
}
"""What of DraftOptions a mode takes: auto chooses sizes itself, and plain drafts nothing."""
_DEFAULTS: dict[Mode, TreeLimits] = {
    "chain": TreeLimits(depth=3, width=1, num_nodes=3),
    "eagle": TreeLimits(depth=4, width=1, num_nodes=4, min_probability=0.1),
    "eagle-tree": TreeLimits(depth=6, width=3, num_nodes=8, min_probability=0.1),
    "opt-tree": TreeLimits(depth=6, width=3, num_nodes=6, min_gain=0.15),
    "cascade": TreeLimits(depth=4, width=3, num_nodes=6, min_probability=0.1),
}
_MIN_DRAFT_LENGTH = 4


def available_modes(bundle: Bundle) -> tuple[Mode, ...]:
    """The modes for which the bundle has everything."""
    roles = {component.role for component in bundle.manifest.components}
    return tuple(mode for mode in MODES if roles.issuperset(NEEDS[mode]))


def require_possible(name: str, bundle: Bundle, options: DraftOptions | None = None) -> Mode:
    """`name` as a mode that `bundle` can do with such drafts; no model is loaded.

    Raises ValueError for an unknown mode, one that the bundle lacks components for, and sizes that it does not take.
    """
    mode, possible = require_mode(name), available_modes(bundle)
    if mode not in possible:
        roles = {component.role for component in bundle.manifest.components}
        missing = [role for role in NEEDS[mode] if role not in roles]
        raise ValueError(
            f"mode={mode!r} needs {' and '.join(missing)}, which {bundle.path} does not have; "
            f"it can: {', '.join(possible)}"
        )
    sizes = {size: value for size, value in asdict(options or DraftOptions()).items() if value is not None}
    if unknown := [f"{size}={value}" for size, value in sizes.items() if size not in _SIZES[mode]]:
        known = ", ".join(_SIZES[mode]) or "no sizes of drafts"
        raise ValueError(
            f"mode={mode!r} does not take {', '.join(unknown)}: it takes {known}; leave others out, or change the mode"
        )
    return mode


class DrafterFactory:
    """Makes the drafters of a bundle; models that several of them use are loaded once.

    target: the backend that they draft for, whose kind and threads the others share.
    """

    def __init__(self, bundle: Bundle, target: Backend, backend: BackendName, threads: int | None) -> None:
        self.bundle, self.target = bundle, target
        self._backend: BackendName = backend
        self._threads = threads
        self._models: dict[str, Backend] = {}
        self._heads: dict[str, DraftModel] = {}

    def make(self, mode: Mode, options: DraftOptions | None = None) -> Drafter:
        """The drafter of `mode`. Raises ValueError as `require_possible`, and for a size that is too large."""
        require_possible(mode, self.bundle, options)
        if mode == "auto":
            from deploy.runtime.auto_mode import auto_drafter, machine_costs

            return auto_drafter(self, machine_costs(self))
        options = options or DraftOptions()
        if mode == "plain":
            return NoDrafter()
        if mode == "lookup":
            return _lookup(options)
        if mode == "chain":
            return LanguageModelDrafter(self._draft_model("intermediate"), self._limits(mode, options))
        if mode in ("cascade", "cascade-lookup"):
            return self._cascade(mode, options)
        return EagleDrafter(self.head("eagle-target"), self._limits(mode, options))

    def _cascade(self, mode: Mode, options: DraftOptions) -> Cascade:
        inner: Drafter
        if mode == "cascade":
            inner = EagleDrafter(self.head("eagle-intermediate"), self._limits(mode, options))
        else:
            inner = _lookup(options)
        length = _MIN_DRAFT_LENGTH if options.min_draft_length is None else options.min_draft_length
        return Cascade(self.language_model("intermediate"), inner, min_draft_length=length)

    def _limits(self, mode: Mode, options: DraftOptions) -> TreeLimits:
        own = _DEFAULTS[mode]
        depth = own.depth if options.depth is None else options.depth
        width = own.width if options.width is None else options.width
        nodes = options.num_nodes
        if nodes is None:
            nodes = depth if width == 1 else max(own.num_nodes, depth)
        return TreeLimits(depth, width, nodes, own.min_probability, own.min_gain)

    def language_model(self, role: str) -> Backend:
        """A model of the bundle beside the target. Raises ValueError when its context is shorter than the target's."""
        if role not in self._models:
            ids = self.bundle.draft_ids(role)
            model = open_backend(self._backend, self.bundle.model(role), threads=self._threads, head_ids=ids)
            ours, theirs = model.shape.context_length, self.target.shape.context_length
            if ours < theirs:
                raise ValueError(f"{self.bundle.path}: {role} reads {ours} tokens, the target {theirs}")
            self._models[role] = model
        return self._models[role]

    def _draft_model(self, role: str) -> DraftModel:
        model = self.language_model(role)
        assert isinstance(model, DraftModel)
        return model

    def head(self, role: str) -> DraftModel:
        """An EAGLE head of the bundle, over the model that it drafts for."""
        if role not in self._heads:
            above = self.target if role == "eagle-target" else self.language_model("intermediate")
            self._heads[role] = open_head(self.bundle.head(role, above.shape), above, threads=self._threads)
        return self._heads[role]


def _lookup(options: DraftOptions) -> LookupDrafter:
    if options.depth is None:
        return LookupDrafter()
    if options.depth > MOST_NODES:
        raise ValueError(f"depth={options.depth} is out of range; a lookup drafts 1 … {MOST_NODES} tokens")
    return LookupDrafter(dict.fromkeys(NUM_TOKENS, options.depth))
