"""A practitioner's own table: a CSV file with one target column."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from evoloss.errors import ConfigError, DataError, describe_choices
from evoloss.tasks.sources import Source

OPTIONS = ("path", "target", "kind")
KINDS = ("classification", "regression")
MAX_CATEGORIES = 1000
"""A text column with more distinct values is an identifier, not a category."""


def load_csv(name: str, options: Mapping[str, Any]) -> Source:
    """Read a CSV file with a header line; every column but the target is an input.

    Parameters
    ----------
    name : str
        Name of the dataset, for messages and the card.
    options : mapping
        ``path`` (file, relative to the working directory), ``target`` (column), ``kind``
        (classification or regression).

    Raises
    ------
    ConfigError
        If an option is missing, unknown or of the wrong kind.
    DataError
        If the file is missing or unreadable, a column is missing, or a value is missing or not
        finite.
    """
    _check_options(name, options)
    path, target, kind = Path(options["path"]), options["target"], options["kind"]
    where = f"dataset {name!r}: {path}"
    table = _read_table(where, path)
    if target not in table.columns:
        raise DataError(f"{where} has no column {describe_choices(target, table.columns)}")
    _check_missing(where, table)
    inputs = table.drop(columns=target)
    _check_inputs(where, inputs)
    y, class_names = _read_target(where, table[target], kind)
    return Source(
        name=name,
        kind=kind,
        encoding="table",
        x=inputs,
        y=y,
        class_names=class_names,
        source=path.name,
        source_version=f"sha256 {hashlib.sha256(path.read_bytes()).hexdigest()[:16]}",
        licence="unknown (own data)",
    )


def _check_options(name: str, options: Mapping[str, Any]) -> None:
    for key in options:
        if key not in OPTIONS:
            raise ConfigError(f"dataset {name!r}: unknown option {describe_choices(key, OPTIONS)}")
    for key in OPTIONS:
        value = options.get(key)
        if not isinstance(value, str | Path) or not str(value):
            raise ConfigError(
                f"dataset {name!r}: option {key!r} must be a text, not {value!r}; "
                "needed: path, target and kind"
            )
    if options["kind"] not in KINDS:
        raise ConfigError(
            f"dataset {name!r}: unknown kind {describe_choices(options['kind'], KINDS)}"
        )


def _read_table(where: str, path: Path) -> pd.DataFrame:
    if not path.is_file():
        raise DataError(f"{where} does not exist or is not a file")
    try:
        table = pd.read_csv(path)
    except (ValueError, OSError, pd.errors.ParserError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{where} cannot be read as CSV: {reason}") from error
    if table.empty:
        raise DataError(f"{where} has no rows below its header")
    return table


def _check_missing(where: str, table: pd.DataFrame) -> None:
    """Refuse missing and infinite values, naming every column that has some."""
    counts = {}
    for column in table.columns:
        values = table[column]
        bad = values.isna().to_numpy(dtype=bool)
        if pd.api.types.is_numeric_dtype(values):
            bad = bad | ~np.isfinite(values.to_numpy(dtype=np.float64, na_value=np.nan))
        if bad.any():
            counts[str(column)] = int(bad.sum())
    if counts:
        listed = ", ".join(f"{column!r} ({count} rows)" for column, count in counts.items())
        raise DataError(
            f"{where} has missing or infinite values in column {listed}; fill or drop them"
        )


def _check_inputs(where: str, inputs: pd.DataFrame) -> None:
    if inputs.shape[1] == 0:
        raise DataError(f"{where} has no column besides the target; at least one input is needed")
    for column in inputs.columns:
        values = inputs[column]
        if not pd.api.types.is_numeric_dtype(values) and values.nunique() > MAX_CATEGORIES:
            raise DataError(
                f"{where}: column {column!r} is not numeric and has {values.nunique()} distinct "
                f"values (at most {MAX_CATEGORIES}); drop it or make it numeric"
            )


def _read_target(
    where: str, target: pd.Series[Any], kind: str
) -> tuple[NDArray[Any], tuple[str, ...]]:
    numeric = pd.api.types.is_numeric_dtype(target)
    if kind == "classification":
        classes, positions = np.unique(
            target.to_numpy() if numeric else target.astype(str).to_numpy(dtype=np.str_),
            return_inverse=True,
        )
        if len(classes) < 2:
            raise DataError(
                f"{where}: target column {target.name!r} has one class; at least 2 are needed"
            )
        return positions.astype(np.int64), tuple(str(value) for value in classes)
    if not numeric or pd.api.types.is_bool_dtype(target):
        raise DataError(
            f"{where}: target column {target.name!r} is not numeric; regression needs numbers"
        )
    return target.to_numpy(dtype=np.float64), ()
