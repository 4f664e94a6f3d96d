"""Where the results come from: code, versions and hardware, as the result files name them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from evoloss.analysis.load import Paths, commit_of, version_of
from evoloss.analysis.tables import Column, Table
from evoloss.results import read_json, read_parquet

_TABLE = (
    Column("files", "result files", "integer"),
    Column("evoloss", "evoloss"),
    Column("commit", "commit"),
    Column("cpu", "CPU"),
    Column("cores", "CPU threads of a job", "integer"),
    Column("gpu", "GPU"),
    Column("platform", "system"),
    Column("python", "Python"),
    Column("packages", "packages"),
)
ORIGIN_COLUMNS = [column.name for column in _TABLE]


def _read_document(path: str) -> Mapping[str, Any]:
    if Path(path).suffix != ".parquet":
        return dict(read_json(path))
    return dict(read_parquet(path).attrs.get("metadata", {}))


def _read_origin(document: Mapping[str, Any]) -> tuple[Any, ...]:
    provenance = document.get("provenance") or {}
    hardware = provenance.get("hardware") or {}
    gpu = hardware.get("gpu")
    packages = sorted((provenance.get("packages") or {}).items())
    return (
        version_of(document),
        commit_of(document),
        hardware.get("cpu"),
        hardware.get("cores"),
        f"{gpu}, CUDA {hardware.get('cuda')}" if gpu else None,
        provenance.get("platform"),
        provenance.get("python"),
        ", ".join(f"{name} {version}" for name, version in packages if version) or None,
    )


def load_origins(inputs: Mapping[str, Paths]) -> pd.DataFrame:
    """Return one row per different origin, with the number of files that have it, the most frequent first.

    Parameters
    ----------
    inputs
        Lists of paths of result files, as `evoloss.analysis.aggregate.aggregate_results` gets them.
    """
    paths = sorted({str(path) for given in inputs.values() for path in given})
    counts = Counter(_read_origin(_read_document(path)) for path in paths)
    rows = sorted(((count, *origin) for origin, count in counts.items()), key=_rank)
    frame = pd.DataFrame(rows, columns=pd.Index(ORIGIN_COLUMNS))
    frame["cores"] = pd.to_numeric(frame["cores"]).astype("Int64")
    return frame


def _rank(row: tuple[Any, ...]) -> tuple[int, str]:
    return -row[0], repr(row)


def origin_table(origins: pd.DataFrame) -> Table:
    """Return the table for readers; a note says so if the results have several origins."""
    notes = ["Results of different origins repeat only approximately."] if len(origins) > 1 else []
    return Table("Origin of the results", _TABLE, origins, notes)


def describe_versions(frames: Iterable[pd.DataFrame]) -> list[str]:
    """Return a warning if the results stem from several evoloss versions, else nothing."""
    versions = sorted({str(v) for frame in frames for v in frame["version"].dropna().unique()})
    if len(versions) < 2:
        return []
    names = ", ".join(versions)
    advice = "run the workflow again before comparing them"
    return [f"**These results mix evoloss versions {names}: {advice}.**"]


def describe_origin(frames: Iterable[pd.DataFrame]) -> list[str]:
    """Return one sentence that names the versions and commits that computed the results."""
    pairs = {
        (str(version), str(commit))
        for frame in frames
        for version, commit in frame[["version", "commit"]]
        .drop_duplicates()
        .itertuples(index=False)
        if pd.notna(version)
    }
    names = [
        f"evoloss {version}" + (f", commit {commit}" if commit not in ("None", "nan") else "")
        for version, commit in sorted(pairs)
    ]
    return [f"Computed by {'; '.join(names)}."] if names else []
