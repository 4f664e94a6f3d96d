"""The errors that evoloss raises on purpose; each message is one sentence that a user can act on."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EvolossError(Exception):
    """Base class of every error that evoloss raises on purpose."""


class CheckpointError(EvolossError):
    """A checkpoint is damaged, of another version, or of another job."""


class ConfigError(EvolossError):
    """A configuration key or value is refused."""


class DataError(EvolossError):
    """A dataset is missing, unreadable or unusable for the task."""


class ExpressionError(EvolossError):
    """A loss expression cannot be parsed or evaluated."""


class LossFileError(EvolossError):
    """A loss file is unreadable, of another version, or not a loss."""


class ModelError(EvolossError):
    """A base model is unknown or cannot be trained by the engine."""


def describe_choices(value: object, choices: Iterable[str]) -> str:
    """Return ``"'vlaue' (did you mean 'value'?); accepted: a, b"`` for an error message."""
    names = sorted(str(choice) for choice in choices)
    close = difflib.get_close_matches(str(value), names, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return f"{str(value)!r}{hint}; accepted: {', '.join(names)}"


def take_first_line(error: Exception) -> str:
    """Return what an error of somebody else's says first, or its name if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
