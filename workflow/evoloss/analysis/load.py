"""Result files of every stage as tidy tables, one `pandas.DataFrame` per stage.

A failed search and a diverged run are rows of these tables, with a status and a reason, so that no
figure or table can leave them out by accident. Empty lists of files give empty tables with the
usual columns.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from evoloss.dataset_card import read_dataset_card
from evoloss.errors import DataError
from evoloss.results import read_json, read_parquet

RUN_KEYS = ["task", "model", "method", "search_seed", "train_seed"]
"""What names one training run; ``search_seed`` is missing for the baselines."""

SEARCH_KEYS = ["task", "method", "search_seed"]
"""What names one search."""

RUN_COLUMNS = [
    *RUN_KEYS,
    "step",
    "split",
    "metric",
    "value",
    "learning_rate",
    "status",
    "reason",
    "version",
    "commit",
]
HISTORY_COLUMNS = [
    "generation",
    "best_fitness",
    "median_fitness",
    "best_expression",
    "best_complexity",
    "median_complexity",
    "candidates",
    "evaluated",
    "archive_hits",
    "rejected",
    "gradient_hits",
    "stopped",
    "diverged",
    "zero_gradient",
    "training_steps",
    "seconds_local_search",
    "seconds_rejection",
    "seconds_fitness",
    "seconds_total",
]
SEARCH_COLUMNS = [
    *SEARCH_KEYS,
    "model",
    "status",
    "reason",
    "learning_rate",
    "version",
    "commit",
    *HISTORY_COLUMNS,
]
DATASET_COLUMNS = [
    "name",
    "kind",
    "num_rows",
    "train",
    "validation",
    "test",
    "input_shape",
    "num_outputs",
    "smallest_class",
    "source",
    "source_version",
    "licence",
    "checksum",
]
TUNED_COLUMNS = ["task", "model", "best_learning_rate", "at_edge", "validation_metric", "metric"]

Paths = Iterable[str | Path]
_SEED = re.compile(r"seeds?_([\d_-]+)(\.\w+)?$")


def identify(path: str | Path) -> dict[str, Any]:
    """Read ``task``, ``model`` (train_model only), ``method`` and ``seed`` (searches only) off a file's path.

    Raises
    ------
    DataError
        The path does not follow the layout of ``results/``.
    """
    parts = Path(path).parts
    for i, part in enumerate(parts):
        match = _SEED.match(part)
        with_model = "train_model" in parts[:i]
        task = i - (3 if with_model else 2)
        if match is None or task < 0:
            continue
        return {
            "task": parts[task],
            "model": parts[i - 2] if with_model else None,
            "method": parts[i - 1],
            "seed": None if with_model else int(match.group(1)),
        }
    raise DataError(f"the path {path} names no seed; expected .../<task>/<method>/seed_<number>...")


def version_of(document: Mapping[str, Any]) -> str | None:
    """Return the evoloss version that a file's provenance names, or None."""
    provenance = document.get("provenance") or {}
    version = provenance.get("evoloss", provenance.get("version"))
    return None if version is None else str(version)


def commit_of(document: Mapping[str, Any]) -> str | None:
    """Return the commit that a file's provenance names, marked if there were changes on top, or None."""
    provenance = document.get("provenance") or {}
    commit = provenance.get("commit")
    if commit is None:
        return None
    return str(commit)[:12] + (" with changes" if provenance.get("dirty") else "")


def finish(frame: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    """Return ``frame`` with exactly ``columns`` in this order and integers that may be missing."""
    frame = frame.reindex(columns=columns)
    for name in ("search_seed", "train_seed", "step", "generation"):
        if name in frame.columns:
            frame[name] = pd.to_numeric(frame[name]).astype("Int64")
    return frame.reset_index(drop=True)


def read_table(path: str | Path) -> pd.DataFrame:
    """Read a table of ``aggregate_results`` with the column types it was written from."""
    frame = read_parquet(path)
    return finish(frame, [str(name) for name in frame.columns])


def join_frames(frames: list[pd.DataFrame], columns: list[str]) -> pd.DataFrame:
    """Stack frames that may be empty, without letting empty ones decide the column types."""
    frames = [frame for frame in frames if len(frame)]
    return finish(pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(), columns)


def load_runs(paths: Paths) -> pd.DataFrame:
    """Read the files of ``train_model``: one row per run, step, split and metric.

    A loss that does not exist because its search failed gives one row per run that it would have
    had: no step, no value, ``status`` "failed" and the reason.

    Raises
    ------
    DataError
        A file cannot be read or is not of ``train_model``.
    """
    frames: list[pd.DataFrame] = []
    for path in sorted(map(str, paths)):
        frame = read_parquet(path)
        metadata = frame.attrs.pop("metadata", {})
        rate = metadata.get("learning_rate")
        shared = {
            "learning_rate": float(rate) if isinstance(rate, int | float) else float("nan"),
            "version": version_of(metadata),
            "commit": commit_of(metadata),
        }
        frames.append(frame.assign(**shared, status="ok", reason=None))
        known = identify(path)
        run = {key: metadata.get(key, known[key]) for key in ("task", "model", "method")}
        if "train_seeds" not in metadata:
            raise DataError(f"{path} names no train_seeds; only train_model writes such files")
        missing = [
            {**run, **shared, "train_seed": seed, **entry, "status": "failed"}
            for seed in metadata["train_seeds"]
            for entry in metadata.get("missing", [])
        ]
        frames.append(pd.DataFrame(missing))
    return join_frames(frames, RUN_COLUMNS)


def load_searches(searches: Paths, histories: Paths) -> pd.DataFrame:
    """Read hall of fame and history of every search: one row per search and generation.

    A search without a single generation keeps one row, without numbers, so that its status stays
    visible.
    """
    history_of = {tuple(identify(path).values()): path for path in sorted(map(str, histories))}
    frames = []
    for path in sorted(map(str, searches)):
        known = identify(path)
        document = read_json(path)
        history = history_of.get(tuple(known.values()))
        frame = pd.DataFrame() if history is None else read_parquet(history)
        frame.attrs.clear()
        if frame.empty:
            frame = pd.DataFrame({"generation": [None]})
        frames.append(
            frame.assign(
                task=document.get("task", known["task"]),
                method=document.get("method", known["method"]),
                search_seed=document.get("search_seed", known["seed"]),
                model=document.get("model"),
                status=document.get("status", "ok"),
                reason=document.get("reason"),
                learning_rate=document.get("learning_rate"),
                version=version_of(document),
                commit=commit_of(document),
            )
        )
    return join_frames(frames, SEARCH_COLUMNS)


def load_datasets(paths: Paths) -> pd.DataFrame:
    """Read the dataset cards: one row per dataset."""
    rows = []
    for path in sorted(map(str, paths)):
        card = read_dataset_card(path)
        counts = (card["class_counts"] or {}).get("train")
        rows.append(
            {
                **card,
                **card["sizes"],
                "input_shape": " x ".join(map(str, card["input_shape"])),
                "smallest_class": min(counts.values()) if counts else None,
            }
        )
    return join_frames([pd.DataFrame(rows)], DATASET_COLUMNS)


def load_tuned(paths: Paths) -> pd.DataFrame:
    """Read the tuned learning rates, one row per task and model.

    ``at_edge``: the best one ends its grid.
    """
    rows = []
    for path in sorted(map(str, paths)):
        document = read_json(path)
        best = document.get("best_learning_rate")
        grid = document.get("grid") or []
        rates = [point.get("learning_rate") for point in grid]
        scores = [
            point.get("validation_metric") for point in grid if point["learning_rate"] == best
        ]
        edge = bool(rates) and best in (min(rates), max(rates))
        rows.append({**document, "at_edge": edge, "validation_metric": next(iter(scores), None)})
    return join_frames([pd.DataFrame(rows)], TUNED_COLUMNS)


def primary_metrics(runs: pd.DataFrame) -> dict[str, str]:
    """Return each task's reported metric: the error rate if it has one, else the squared error."""
    return {
        str(task): "error_rate" if "error_rate" in set(names) else "mse"
        for task, names in runs.groupby("task")["metric"]
    }
