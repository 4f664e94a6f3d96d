"""A practitioner's own table: a CSV file with one target column."""

from __future__ import annotations

import hashlib
import warnings
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
FEW_CATEGORIES = 20
"""So many different texts are categories; with more, they are identifiers if they are more than half the rows."""
MISSING_MARKERS = (
    "NA",
    "N/A",
    "n/a",
    "#N/A",
    "<NA>",
    "NaN",
    "nan",
    "-nan",
    "null",
    "NULL",
    "None",
    "?",
)
"""No value, among numbers; a column of texts may have categories of these names."""
MAX_NUMERIC_CLASSES = 20
"""A column of numbers with decimals and more distinct values is a quantity, not a label."""


def load_csv(name: str, options: Mapping[str, Any]) -> Source:
    """Read a CSV file with a header line; every column but the target is an input.

    Columns of numbers are standardised, and columns of text become one input for each of their values (one-hot).

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
        If the file is missing or unreadable, a column is missing, a value is missing or not finite, or a
        column is neither of numbers nor of categories.
    """
    _check_options(name, options)
    path, target, kind = Path(options["path"]), options["target"], options["kind"]
    where = f"dataset {name!r}: {path}"
    table = _read_table(where, path)
    if target not in table.columns:
        raise DataError(f"{where} has no column {describe_choices(target, table.columns)}")
    _check_missing(where, table)
    _check_stray_texts(where, table)
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
        with warnings.catch_warnings():
            # rows with more values than the header has columns: pandas would only warn, and drop some
            warnings.simplefilter("error", pd.errors.ParserWarning)
            table = pd.read_csv(
                path, keep_default_na=False, na_values=[""], low_memory=False, index_col=False
            )
    except (ValueError, OSError, pd.errors.ParserError, pd.errors.ParserWarning) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{where} cannot be read as CSV: {reason}") from error
    if table.empty:
        raise DataError(f"{where} has no rows below its header")
    return table.apply(_parse_numbers)


def _parse_numbers(column: pd.Series[Any]) -> pd.Series[Any]:
    """Return a column of texts as one of numbers, if they are nothing but numbers and markers of missing values."""
    if pd.api.types.is_numeric_dtype(column) or column.isna().all():
        return column
    numbers = pd.to_numeric(column, errors="coerce")
    rest = column[numbers.isna() & column.notna()]
    if numbers.notna().any() and rest.isin(MISSING_MARKERS).all():
        return numbers.astype(np.float64)
    return column


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
        listed = ", ".join(
            f"{column!r} ({count} {'row' if count == 1 else 'rows'})"
            for column, count in counts.items()
        )
        raise DataError(
            f"{where} has missing or infinite values in column {listed}; fill or drop them"
        )


def _check_stray_texts(where: str, table: pd.DataFrame) -> None:
    """Refuse texts in a column of numbers: each of its numbers would become a category."""
    for column in table.columns:
        values = table[column]
        if pd.api.types.is_numeric_dtype(values):
            continue
        texts = pd.to_numeric(values, errors="coerce").isna().to_numpy(dtype=bool)
        if 0 < texts.mean() <= 0.5 and values.nunique() > FEW_CATEGORIES:
            first = int(np.flatnonzero(texts)[0])
            others = f" (and {texts.sum() - 1} more rows)" if texts.sum() > 1 else ""
            raise DataError(
                f"{where}: column {column!r} has numbers, but row {first + 1} below the header has "
                f"{values.iloc[first]!r}{others}; make it a number, drop the row, or, if these are categories, "
                "begin all of them with a letter"
            )


def _check_inputs(where: str, inputs: pd.DataFrame) -> None:
    if inputs.shape[1] == 0:
        raise DataError(f"{where} has no column besides the target; at least one input is needed")
    for column in inputs.columns:
        values = inputs[column]
        most = min(MAX_CATEGORIES, max(FEW_CATEGORIES, len(inputs) // 2))
        if not pd.api.types.is_numeric_dtype(values) and values.nunique() > most:
            raise DataError(
                f"{where}: column {column!r} is not numeric and has {values.nunique()} distinct "
                f"values in {len(inputs)} rows (at most {most}); drop it or make it numeric"
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
        if numeric and len(classes) > MAX_NUMERIC_CLASSES and np.any(classes % 1 != 0):
            raise DataError(
                f"{where}: target column {target.name!r} has {len(classes)} different numbers with decimals, "
                "which are no classes; set kind: regression"
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
