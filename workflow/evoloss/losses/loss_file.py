"""Loss files: a learned loss as JSON that anyone can read, and that runs no code when loaded.

``loss(y, f(x)) = scale * mean(expression)``. The schema is ``loss.schema.json`` beside this module.
"""

from __future__ import annotations

import json
import math
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema

from evoloss.errors import ExpressionError, LossFileError
from evoloss.expressions.expression import Expression, format_text, parse_expression
from evoloss.expressions.formatting import format_infix, format_latex
from evoloss.expressions.operators import PREDICTION
from evoloss.losses.learned_loss import LearnedLoss
from evoloss.results import write_json

FORMAT = "evoloss-loss"
FORMAT_VERSION = 1
MAX_BYTES = 1_000_000


@cache
def _validator() -> Any:
    text = resources.files("evoloss.losses").joinpath("loss.schema.json").read_text("utf-8")
    return jsonschema.Draft202012Validator(json.loads(text))


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {twice[:100]!r} occurs twice")
    return record


def _read_record(path: Path) -> Any:
    """Return the JSON value in ``path``; size, encoding and nesting bounded."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise LossFileError(f"loss file {path} cannot be read: {error}") from error
    if len(raw) > MAX_BYTES:
        raise LossFileError(
            f"loss file {path} is larger than {MAX_BYTES} bytes, so it is not a loss"
        )
    try:
        return json.loads(
            raw.decode("utf-8"),
            parse_constant=_refuse_constant,
            object_pairs_hook=_refuse_duplicates,
        )
    except RecursionError as error:
        raise LossFileError(f"loss file {path} is nested too deeply to be a loss") from error
    except ValueError as error:  # includes UnicodeDecodeError and JSONDecodeError
        raise LossFileError(f"loss file {path} is truncated or not JSON: {error}") from error


def read_loss(path: str | Path) -> dict[str, Any]:
    """Read and check a loss file.

    Returns
    -------
    dict
        Keys of ``loss.schema.json``; ``status`` is ``ok`` or ``failed`` (then ``expression`` may be
        None).

    Raises
    ------
    LossFileError
        In one sentence: unreadable, truncated, not JSON, another format or version, not a loss.
    """
    path = Path(path)
    record = _read_record(path)
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise LossFileError(f'loss file {path} is not a loss: it lacks "format": "{FORMAT}"')
    version = record.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        shown = repr(version)[:100]
        raise LossFileError(
            f"loss file {path} has format_version {shown}; this evoloss reads {FORMAT_VERSION}"
        )
    try:
        problem = jsonschema.exceptions.best_match(_validator().iter_errors(record))
        if problem is not None:
            place = ".".join(str(part) for part in problem.absolute_path) or "the top level"
            message = problem.message[:200]
            raise LossFileError(f"loss file {path} is not a valid loss at {place[:100]}: {message}")
        if record["status"] == "ok":
            _check_formula(record)
    except RecursionError as error:
        raise LossFileError(f"loss file {path} is nested too deeply to be a loss") from error
    except (ExpressionError, OverflowError, ValueError) as error:
        raise LossFileError(f"loss file {path} holds no usable formula: {error}") from error
    return record


def _check_formula(record: dict[str, Any]) -> None:
    if not math.isfinite(float(record["scale"])):
        raise ValueError("its scale is not finite")
    expression = parse_expression(record["expression"])
    if not expression.contains(PREDICTION):
        raise ValueError(f"expression {format_text(expression)[:100]} does not contain f(x)")


def load(path: str | Path, reduction: str = "mean") -> LearnedLoss:
    """Load a learned loss from its file, ready to be called as ``loss(input, target)``.

    Parameters
    ----------
    path : str or Path
        A ``loss.json`` written by the workflow.
    reduction : {"mean", "sum", "none"}
        As for the losses of ``torch.nn``.

    Raises
    ------
    LossFileError
        If the file is not a loss, or records a search that failed.
    ValueError
        For an unknown reduction.
    """
    record = read_loss(path)
    if record["status"] != "ok":
        raise LossFileError(f"loss file {path} holds no loss: {record['reason']}")
    return LearnedLoss(record["expression"], float(record["scale"]), record["kind"], reduction)


def save_loss(
    path: str | Path,
    *,
    kind: str,
    expression: Expression | None,
    scale: float = 1.0,
    reason: str | None = None,
    provenance: dict[str, Any] | None = None,
) -> None:
    """Write a loss file, whole or not at all.

    Parameters
    ----------
    expression : Expression or None
        None records a failed search; then ``reason`` must tell why.

    Raises
    ------
    LossFileError
        If what would be written is not a valid loss file.
    """
    failed = expression is None
    record: dict[str, Any] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "status": "failed" if failed else "ok",
        "reason": reason,
        "kind": kind,
        "expression": None if expression is None else format_text(expression),
        "scale": None if failed else float(scale),
        "text": None if expression is None else format_infix(expression),
        "latex": None if expression is None else format_latex(expression),
        "complexity": None if expression is None else expression.complexity,
        "provenance": provenance or {},
    }
    problem = jsonschema.exceptions.best_match(_validator().iter_errors(record))
    if problem is not None:
        raise LossFileError(f"cannot write loss file {path}: {problem.message}")
    try:
        if not failed:
            _check_formula(record)
    except (ExpressionError, ValueError) as error:
        raise LossFileError(f"cannot write loss file {path}: {error}") from error
    write_json(Path(path), record)
