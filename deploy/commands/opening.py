"""What the options of a command say about who answers and who drafts."""

from __future__ import annotations

from pathlib import Path

from deploy.formats.bundle import Bundle
from deploy.runtime.backends import BackendName
from deploy.runtime.devices import DeviceName, bundle_bytes, choose_backend
from deploy.runtime.modes import DraftOptions, Mode, require_mode
from deploy.runtime.session import Session


def chosen_backend(device: DeviceName, backend: BackendName | None, bundle: Bundle) -> BackendName:
    """What computes: `backend` where it is given, otherwise what `device` comes to here.

    Raises ValueError where both are given and differ, and DeviceError for a GPU that cannot be used.
    """
    if backend is not None and device not in ("auto", backend):
        raise ValueError(f"--device {device} and --backend {backend} exclude each other; give one of them")
    return choose_backend(backend or device, bundle_bytes(bundle))


def is_fast(backend: BackendName) -> bool:
    """Whether it is there to be used; a reference is there to define numbers."""
    return backend in ("cpu", "gpu")


def chosen_mode(name: str | None, backend: BackendName) -> Mode:
    """The mode that is asked for; by default auto, which has no use where the model is a slow reference.

    Raises ValueError for an unknown name.
    """
    if name is None:
        return "auto" if is_fast(backend) else "plain"
    return require_mode(name)


def draft_options(
    depth: int | None, width: int | None, nodes: int | None, min_draft_length: int | None
) -> DraftOptions | None:
    """None where nothing is given."""
    given = DraftOptions(depth, width, nodes, min_draft_length)
    return None if given == DraftOptions() else given


def open_session(
    bundle: Path,
    mode: str | None,
    drafts: DraftOptions | None,
    device: DeviceName,
    backend: BackendName | None,
    threads: int | None,
) -> tuple[Session, Mode]:
    """The session, and what `mode` comes to. Raises ValueError as `Session.open`, BundleError as `Bundle.open`."""
    if mode is not None:
        require_mode(mode)
    opened = Bundle.open(bundle)
    chosen = chosen_backend(device, backend, opened)
    decoding = chosen_mode(mode, chosen)
    return Session.open(opened, mode=decoding, drafts=drafts, backend=chosen, threads=threads), decoding
