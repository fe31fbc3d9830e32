"""`python -m pipeline`: bring a bundle up to date. See `conf/` for what can be set."""

import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent


def drop_current_directory() -> None:
    """Take the current directory off the import path.

    `python -m` puts it first, where a `train.py` of the user's would stand in for our package `train`.
    """
    if sys.path and not sys.flags.safe_path and Path(sys.path[0]).resolve() == Path.cwd() != PROJECT:
        del sys.path[0]


if __name__ == "__main__":
    drop_current_directory()
    from pipeline.cli import main

    main()
