"""Logging for workflow scripts: always the rule's log file, and the terminal if there is one."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from evoloss.errors import EvolossError

_PREFIX_WILDCARDS = ("dataset", "task", "model", "method", "search_seed", "train_seed_group")


@contextmanager
def script_logging(snakemake: Any) -> Iterator[logging.Logger]:
    """Log to ``snakemake.log`` while the block runs; use it under ``if __name__ == "__main__":``.

    An `EvolossError` is an answer to the user: it ends the script with exit code 1 and its one
    sentence in the log and on the terminal. Any other exception is a bug: its traceback goes to the
    log and it propagates. Ctrl-C ends the script without one.

    Parameters
    ----------
    snakemake
        The object that Snakemake gives to a ``script:``.

    Yields
    ------
    logging.Logger
        The logger of the package, for a line of the script's own.
    """
    logger = logging.getLogger("evoloss")
    handlers = list(_make_handlers(snakemake))
    root = logging.getLogger()
    for handler in handlers:
        root.addHandler(handler)
    level, logger.level = logger.level, logging.INFO
    logging.captureWarnings(True)
    try:
        yield logger
    except EvolossError as error:
        logger.error("%s", error)
        if not sys.stderr.isatty():  # else the terminal's handler has just said it
            sys.stderr.write(f"{_describe_job(snakemake)}: {error}\n")
        sys.exit(1)
    except KeyboardInterrupt:
        logger.error("interrupted")
        sys.exit(128 + signal.SIGINT)
    except Exception:
        handlers[0].handle(_make_record(sys.exc_info()))
        raise
    finally:
        logging.captureWarnings(False)
        logger.setLevel(level)
        for handler in handlers:
            root.removeHandler(handler)
            handler.close()


def _make_handlers(snakemake: Any) -> Iterator[logging.Handler]:
    path = Path(str(snakemake.log[0]))
    path.parent.mkdir(parents=True, exist_ok=True)
    # a job that goes on from a checkpoint goes on in its log
    directory = snakemake.params.get("checkpoints")
    mode = "a" if directory and Path(directory).is_dir() else "w"
    file = logging.FileHandler(path, mode=mode, encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    yield file
    if sys.stderr.isatty():
        terminal = logging.StreamHandler(sys.stderr)
        prefix = _describe_job(snakemake).replace("%", "%%")
        terminal.setFormatter(logging.Formatter(f"{prefix}: %(message)s"))
        yield terminal


def _make_record(exception: Any) -> logging.LogRecord:
    return logging.LogRecord(
        "evoloss", logging.CRITICAL, __file__, 0, "unexpected error", (), exception
    )


def _describe_job(snakemake: Any) -> str:
    """Return ``diabetes/mlp/evomal/0-4`` from the wildcards, or the rule's name without any."""
    wildcards = dict(snakemake.wildcards.items())
    parts = [str(wildcards[name]) for name in _PREFIX_WILDCARDS if name in wildcards]
    return "/".join(parts) or str(snakemake.rule)
