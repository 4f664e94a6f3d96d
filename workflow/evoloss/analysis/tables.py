"""Tables as CSV (every digit, raw units) and Markdown (rounded, percent), one description each.

Both files hold the same rows and columns in the same order; the Markdown file adds headings and
notes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from evoloss.results import write_atomically, write_parquet

EMPTY = "\u2013"
"""What a Markdown cell shows where there is no value."""


@dataclass(frozen=True)
class Column:
    """A column: its name in the CSV file, its heading in Markdown, how values are written there.

    ``kind``: "text", "integer", "number" (4 digits), "p" (p value), "score" or "difference"
    (percent or percentage points where the row's ``metric`` is an error rate), or "code" (a
    formula).
    """

    name: str
    heading: str
    kind: str = "text"


@dataclass(frozen=True)
class Table:
    """A table with its title, columns, rows and notes; ``empty`` is what it says without any row."""

    title: str
    columns: Sequence[Column]
    frame: pd.DataFrame
    notes: Sequence[str] = field(default_factory=tuple)
    empty: str = "No results."


def format_score(value: float, metric: str | None, *, signed: bool = False) -> str:
    """Return an error rate in percent, any other score with 4 significant digits; missing: a dash.

    ``signed``: a difference, with its sign; of error rates, in percentage points (pp).
    """
    if _is_missing(value):
        return EMPTY
    if metric == "error_rate":
        return f"{100 * value:+.2f} pp" if signed else f"{100 * value:.2f} %"
    return f"{value:+.4g}" if signed else f"{value:.4g}"


def format_p(value: float) -> str:
    """Return a p value with 2 digits; below 0.001 the bound alone."""
    if _is_missing(value):
        return EMPTY
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _is_missing(value: Any) -> bool:
    return value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value))


def _format_text(value: Any, _: str | None) -> str:
    text = {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
    return " ".join(text.split()).replace("|", "\\|") or EMPTY


_FORMATS: dict[str, Callable[[Any, str | None], str]] = {
    "text": _format_text,
    "code": lambda value, metric: f"`{_format_text(value, metric)}`",
    "integer": lambda value, _: f"{int(value)}",
    "number": lambda value, _: f"{float(value):.4g}",
    "p": lambda value, _: format_p(float(value)),
    "score": lambda value, metric: format_score(float(value), metric),
    "difference": lambda value, metric: format_score(float(value), metric, signed=True),
}


def format_cell(value: Any, kind: str, metric: str | None = None) -> str:
    """Return the Markdown text of one value; see `Column` for the kinds."""
    return EMPTY if _is_missing(value) else _FORMATS[kind](value, metric)


def to_markdown(table: Table) -> str:
    """Return the table as a Markdown document: title, notes, rows."""
    rows = [
        [
            format_cell(value, column.kind, row.get("metric"))
            for column, value in zip(
                table.columns, (row[c.name] for c in table.columns), strict=True
            )
        ]
        for row in table.frame.to_dict("records")
    ]
    lines = [f"# {table.title}", ""]
    for note in table.notes:
        lines += [f"> {note}", ""]
    if rows:
        headings = [column.heading for column in table.columns]
        right = ["left" if c.kind in ("text", "code") else "right" for c in table.columns]
        body = pd.DataFrame(rows, columns=pd.Index(headings)).to_markdown(
            index=False, colalign=right, disable_numparse=True
        )
        lines.append(str(body))
    else:
        lines.append(table.empty)
    return "\n".join(lines) + "\n"


def write_table(table: Table, csv_path: str | Path, markdown_path: str | Path) -> None:
    """Write a table as CSV and as Markdown."""
    names = [column.name for column in table.columns]
    csv = table.frame.reindex(columns=names).to_csv(index=False, lineterminator="\n")
    for path, text in ((csv_path, csv), (markdown_path, to_markdown(table))):
        write_atomically(path, _writer(text))


def _writer(text: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_text(text, encoding="utf-8")

    return write


def write_frame(
    path: str | Path, frame: pd.DataFrame, title: str, provenance: Mapping[str, Any]
) -> None:
    """Write a table as parquet with its title and provenance; missing values of any kind become nulls."""
    columns = {
        str(name): [None if _is_missing(value) else value for value in frame[name].tolist()]
        for name in frame.columns
    }
    write_parquet(path, columns, {"title": title, "provenance": dict(provenance)})
