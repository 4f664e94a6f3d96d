"""Final metrics of every run, and their mean and spread per method.

A run whose test metric is not finite has diverged: it has no error. It is replaced neither by the
chance level nor by a worst case, but left out and counted; the count stands beside every mean and
verdict that lacks it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import pandas as pd

from evoloss.analysis.load import RUN_KEYS, finish, primary_metrics

METHODS = ("baseline", "baseline_tuned", "gp_lfl", "evomal")
"""The order of methods in every table and figure; others follow by name."""

FINAL_COLUMNS = [
    *RUN_KEYS,
    "metric",
    "train",
    "validation",
    "test",
    "status",
    "reason",
    "learning_rate",
    "search_model",
    "version",
    "commit",
]
SUMMARY_COLUMNS = [
    "task",
    "model",
    "method",
    "metric",
    "mean",
    "std",
    "std_runs",
    "train_mean",
    "validation_mean",
    "train_seeds",
    "runs",
    "diverged",
    "failed",
    "learning_rate",
]
_CELL = ["task", "model", "method"]


def order_methods(names: Iterable[str]) -> list[str]:
    """Return method names without repeats, baselines first, unknown ones last by name."""
    rank = {name: i for i, name in enumerate(METHODS)}
    return sorted(set(names), key=lambda name: (rank.get(name, len(rank)), name))


def sort_results(frame: pd.DataFrame) -> pd.DataFrame:
    """Sort a table by task, model, method (baselines first), seeds and generation."""
    rank = {name: i for i, name in enumerate(order_methods(frame["method"]))}
    keys = [*RUN_KEYS[:3], "search_seed", "train_seed", "generation"]
    return frame.sort_values(
        [name for name in keys if name in frame.columns],
        key=lambda column: column.map(rank) if column.name == "method" else column,
        kind="stable",
        ignore_index=True,
    )


def final_results(runs: pd.DataFrame, searches: pd.DataFrame) -> pd.DataFrame:
    """Return one row per run: train, validation and test metric at its last step.

    ``status`` is "ok", "diverged" (the test metric is not finite) or "failed" (its search found no
    loss); ``search_model`` is the model that the task's losses were searched with.
    """
    metrics = primary_metrics(runs)
    done = runs[(runs["status"] == "ok") & (runs["metric"] == runs["task"].map(metrics))]
    keys = [*RUN_KEYS, "metric"]
    last = done[done["step"] == done.groupby(RUN_KEYS, dropna=False)["step"].transform("max")]
    values = last.groupby([*keys, "split"], dropna=False)["value"].last().unstack("split")
    values = values.reindex(columns=["train", "validation", "test"])
    info = last.groupby(keys, dropna=False)[["learning_rate", "version", "commit"]].first()
    frame = values.join(info).reset_index()
    finite = np.isfinite(frame["test"].to_numpy(dtype=float))
    frame["status"] = ["ok" if ok else "diverged" for ok in finite]
    frame["reason"] = [None if ok else "the test metric is not finite" for ok in finite]
    failed = runs[runs["status"] == "failed"]
    if len(failed):
        failed = failed.assign(metric=failed["task"].map(metrics))
        frame = pd.concat([frame, failed.reindex(columns=frame.columns).astype({"test": float})])
    models = searches.dropna(subset=["model"]).groupby("task")["model"].first()
    frame["search_model"] = frame["task"].map(models)
    return sort_results(finish(frame, FINAL_COLUMNS))


def average_searches(final: pd.DataFrame) -> pd.DataFrame:
    """Average a learned method over its search seeds: one row per method and training seed."""
    finite = final[final["status"] == "ok"]
    return finite.groupby([*_CELL, "train_seed"], as_index=False)[
        ["train", "validation", "test"]
    ].mean()


def summarise_methods(final: pd.DataFrame) -> pd.DataFrame:
    """Return mean and spread of the test metric per task, model and method.

    ``mean`` and ``std`` are over training seeds, after averaging over search seeds; ``std_runs`` is
    over all single runs; a spread of fewer than two values is NaN. ``learning_rate`` is NaN where
    the runs of a method used several.
    """
    seeds = dict(iter(average_searches(final).groupby(_CELL)))
    rows = []
    for keys, runs in final.groupby(_CELL, sort=False):
        mine = seeds.get(keys, pd.DataFrame(columns=["train", "validation", "test"], dtype=float))
        rates = runs["learning_rate"].dropna().unique()
        rows.append(
            {
                **dict(zip(_CELL, keys, strict=True)),
                "metric": runs["metric"].iloc[0],
                "mean": mine["test"].mean(),
                "std": mine["test"].std(ddof=1),
                "std_runs": runs.loc[runs["status"] == "ok", "test"].std(ddof=1),
                "train_mean": mine["train"].mean(),
                "validation_mean": mine["validation"].mean(),
                "train_seeds": len(mine),
                "runs": int((runs["status"] == "ok").sum()),
                "diverged": int((runs["status"] == "diverged").sum()),
                "failed": int((runs["status"] == "failed").sum()),
                "learning_rate": float(rates[0]) if len(rates) == 1 else math.nan,
            }
        )
    return pd.DataFrame(rows, columns=pd.Index(SUMMARY_COLUMNS))
