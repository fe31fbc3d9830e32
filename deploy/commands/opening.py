"""What the options of a command say about who answers and who drafts."""

from __future__ import annotations

from pathlib import Path

from deploy.formats.bundle import Bundle
from deploy.runtime.backends import BackendName
from deploy.runtime.modes import DraftOptions, Mode, require_mode
from deploy.runtime.session import Session


def chosen_mode(name: str | None, backend: BackendName) -> Mode:
    """The mode that is asked for; by default auto, which has no use where the model is a slow reference.

    Raises ValueError for an unknown name.
    """
    if name is None:
        return "auto" if backend == "cpu" else "plain"
    return require_mode(name)


def draft_options(
    depth: int | None, width: int | None, nodes: int | None, min_draft_length: int | None
) -> DraftOptions | None:
    """None where nothing is given."""
    given = DraftOptions(depth, width, nodes, min_draft_length)
    return None if given == DraftOptions() else given


def open_session(
    bundle: Path, mode: Mode, drafts: DraftOptions | None, backend: BackendName, threads: int | None
) -> Session:
    """Raises ValueError as `Session.open`, and BundleError as `Bundle.open`."""
    return Session.open(Bundle.open(bundle), mode=mode, drafts=drafts, backend=backend, threads=threads)
