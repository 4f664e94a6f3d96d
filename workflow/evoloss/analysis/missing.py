"""What a report lacks because jobs failed: the table of jobs without a result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from evoloss.analysis.load import finish
from evoloss.analysis.tables import Column, Table

_TABLE = (
    Column("stage", "stage"),
    Column("status", "status"),
    Column("dataset", "dataset"),
    Column("task", "task"),
    Column("model", "model"),
    Column("method", "method"),
    Column("search_seed", "search seed", "integer"),
    Column("train_seed_group", "its train seeds"),
    Column("logs", "what the failed jobs said"),
)
MISSING_COLUMNS = [column.name for column in _TABLE]


def load_missing(entries: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Return the jobs without a result as a table, one row per job, in the given order.

    Parameters
    ----------
    entries
        One mapping per job: ``stage`` (the rule), ``status`` ("failed", or "not run" because what
        it needs has failed), ``logs`` (paths of the failed jobs' logs), and the job's own wildcards.
    """
    rows = [{**entry, "logs": ", ".join(entry["logs"])} for entry in entries]
    return finish(pd.DataFrame(rows, columns=pd.Index(MISSING_COLUMNS)), MISSING_COLUMNS)


def describe_missing(missing: pd.DataFrame) -> list[str]:
    """Return one sentence that counts the jobs without a result; nothing if none is missing."""
    if missing.empty:
        return []
    failed = int((missing["status"] == "failed").sum())
    jobs = "1 job has" if len(missing) == 1 else f"{len(missing)} jobs have"
    return [f"**Incomplete: {jobs} no result ({failed} failed); the table `missing` lists them.**"]


def missing_table(missing: pd.DataFrame) -> Table:
    """Return the table for readers."""
    note = (
        "A job that was not run needs a failed one, whose log is named. "
        "Run the same command again to make what is missing."
    )
    notes = [note] if len(missing) else []
    return Table("Jobs without a result", _TABLE, missing, notes, "Every job has its result.")
