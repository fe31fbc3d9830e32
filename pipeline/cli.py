"""The command line: compose the configuration, run the graph, tell the user.

Exit status: 0 done; 1 a bug (with traceback) or Hydra's own complaint about the command line; 2 something the
user can mend, in one line; 130 interrupted; 141 whoever read the output went away (`--help | head`).
"""

from __future__ import annotations

import logging
import math
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import pipeline
from deploy.kernels.cpu.threads import choose_threads
from pipeline.errors import is_user_error, one_line
from pipeline.graph import Selection, Stage
from pipeline.memory import keep_freed_memory
from pipeline.run import Outcome, closing_lines, run_pipeline
from pipeline.schema import Config, register
from pipeline.store import Store
from pipeline.tracking import make_tracker

logger = logging.getLogger(__name__)

EXIT_BUG = 1
EXIT_USER = 2
EXIT_INTERRUPTED = 130
EXIT_NO_READER = 141
FULL_ERROR = "HYDRA_FULL_ERROR"
DEBUG = "UNDERSTUDY_DEBUG"  # keep every traceback, the user's errors included
# Read by libraries when they are loaded, so they are set before anything heavy is imported. GOMP_SPINCOUNT: OpenMP
# threads that wait by spinning cost a factor of 20 when another process takes one of two cores (measured), and a short
# spin costs nothing on an idle machine. The others: one progress bar, ours, and no library's.
ENVIRONMENT = {
    "GOMP_SPINCOUNT": "10000",
    "TQDM_DISABLE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}
PLACES = ("store", "bundles", "path", "dataset", "initial")
"""Keys of the configuration that may name a file or a directory."""
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")

GraphBuilder = Callable[[Config], list[Stage]]


def main() -> None:
    """Run `python -m pipeline`; ends the process through SystemExit when something went wrong."""
    if "--debug" in sys.argv:
        sys.argv.remove("--debug")
        os.environ[DEBUG] = "1"
    if os.environ.get(FULL_ERROR, "0") not in ("0", ""):
        os.environ[DEBUG] = "1"
    os.environ[FULL_ERROR] = "1"  # Hydra then hands every error to us instead of printing and exiting
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    register()
    entry = hydra.main(version_base="1.3", config_path=str(config_directory()), config_name="config")(_task)
    try:
        entry()
    except KeyboardInterrupt:
        _fail("interrupted; finished stages are kept, the same command continues", EXIT_INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is flushed at the end has a place to go
        sys.exit(EXIT_NO_READER)
    except (CompactHydraException, OmegaConfBaseException) as error:
        if _is_debug():
            raise
        cause = f"\n{error.__cause__}" if error.__cause__ is not None else ""
        _fail(f"{error}{cause}", EXIT_BUG)
    except Exception as error:
        if _is_debug() or not is_user_error(error):
            traceback.print_exc()
            sys.exit(EXIT_BUG)
        _fail(one_line(error), EXIT_USER)


def config_directory() -> Path:
    """Where `conf/` lies: inside the package when installed from a wheel, beside it in a checkout."""
    package = Path(pipeline.__file__).resolve().parent
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def run_config(config: Config, run_dir: Path, build_graph: GraphBuilder) -> list[Outcome]:
    """Run the graph that `build_graph` makes of `config`, recorded in `run_dir`.

    Raises what `run_pipeline` raises; the run is then recorded as failed.
    """
    keep_freed_memory()
    plain = cast(dict[str, Any], OmegaConf.to_container(cast(DictConfig, config), resolve=True, enum_to_str=True))
    check_finite(plain)
    tracker = make_tracker(config.tracking, run_dir)
    tracker.start_run(plain)
    status = "failed"
    try:
        selection = Selection(_names(config.stage), config.from_stage, _names(config.force))
        outcomes = run_pipeline(build_graph(config), Store(Path(config.store)), tracker, logger.info, selection)
        for line in closing_lines(outcomes):
            logger.info(line)
        status = "finished"
        return outcomes
    except Exception:
        _log_to_file_only()
        raise
    finally:
        tracker.finish(status)


def check_finite(config: dict[str, Any] | list[Any], key: str = "") -> None:
    """Raises ValueError naming the key of a number that is infinite or none, at any depth: no JSON has one, so no
    artifact's key could."""
    for name, value in config.items() if isinstance(config, dict) else enumerate(config):
        where = f"{key}[{name}]" if isinstance(config, list) else f"{key}.{name}" if key else str(name)
        if isinstance(value, dict | list):
            check_finite(value, where)
        elif isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{where}={value} is not finite; give a number that is, or null for no limit")


def _task(config: DictConfig) -> None:
    from pipeline.stages.graph import build_graph

    expand_home(config)
    try:
        if config.threads is not None:
            os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(choose_threads(config.threads))))
        run_config(cast(Config, config), Path(HydraConfig.get().runtime.output_dir), build_graph)
    except Exception as error:
        if _is_debug() or not is_user_error(error):
            raise
        _fail(one_line(error), EXIT_USER)  # SystemExit: Hydra adds no lines of its own


def expand_home(config: DictConfig) -> None:
    """`~` in files and directories of the configuration, in place: no shell expands it behind a `=`, and Hydra, which
    wants quotes around it (store="~/x"), hands it on."""
    for key in config:
        if OmegaConf.is_missing(config, key) or OmegaConf.is_interpolation(config, str(key)):
            continue
        value = config[key]
        if isinstance(value, DictConfig):
            expand_home(value)
        elif key in PLACES and isinstance(value, str) and value.startswith("~"):
            config[key] = str(Path(value).expanduser())


def _is_debug() -> bool:
    return os.environ.get(DEBUG) == "1"


def _names(value: str | Sequence[str] | None) -> tuple[str, ...]:
    """One name, several or none, as the command line allows, to a tuple."""
    if value is None:
        return ()
    return (value,) if isinstance(value, str) else tuple(str(name) for name in value)


def _log_to_file_only() -> None:
    """The traceback of the current error to run.log: the terminal shows one line of it, or all of it later."""
    record = logger.makeRecord(logger.name, logging.ERROR, __file__, 0, "the run failed", (), sys.exc_info())
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(record)


def _fail(message: str, status: int) -> None:
    sys.stderr.write(f"error: {message}\n")
    sys.exit(status)
