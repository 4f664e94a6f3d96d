"""Bringing the results of all jobs together: the tables that figures and readers use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from evoloss.analysis.final import final_results, sort_results, summarise_methods
from evoloss.analysis.load import (
    SEARCH_KEYS,
    Paths,
    load_datasets,
    load_runs,
    load_searches,
    load_tuned,
    primary_metrics,
)
from evoloss.analysis.load_losses import load_losses
from evoloss.analysis.missing import describe_missing, load_missing, missing_table
from evoloss.analysis.origin import (
    describe_origin,
    describe_versions,
    load_origins,
    origin_table,
)
from evoloss.analysis.statistics import (
    COMPARATORS,
    compare_methods,
)
from evoloss.analysis.tables import Column, Table, write_frame, write_table
from evoloss.provenance import provenance
from evoloss.results import SEARCH_COUNTS

FAILURE = [*SEARCH_KEYS, "status", "reason"]


@dataclass(frozen=True)
class Results:
    """The tables of one experiment; their columns are named in the modules that make them."""

    runs: pd.DataFrame
    final: pd.DataFrame
    comparison: pd.DataFrame
    losses: pd.DataFrame
    searches: pd.DataFrame
    datasets: pd.DataFrame
    tuned: pd.DataFrame
    origins: pd.DataFrame
    missing: pd.DataFrame


def aggregate_results(
    inputs: Mapping[str, Paths], missing: Sequence[Mapping[str, Any]] = ()
) -> Results:
    """Read all result files.

    Parameters
    ----------
    inputs : mapping
        Lists of paths under ``datasets``, ``runs``, ``tuned``, ``searches``, ``histories``,
        ``simplified``, ``finetuned`` and ``losses``; any of them may be empty.
    missing
        The jobs without a result, see `evoloss.analysis.missing.load_missing`.
    """
    runs = load_runs(inputs["runs"])
    searches = load_searches(inputs["searches"], inputs["histories"])
    searches["metric"] = searches["task"].map(primary_metrics(runs))
    losses = load_losses(
        inputs["losses"], inputs["finetuned"], inputs["simplified"], inputs["searches"]
    )
    losses["metric"] = losses["task"].map(primary_metrics(runs))
    final = final_results(runs, searches)
    return Results(
        runs=runs,
        final=final,
        comparison=compare_methods(final),
        losses=sort_results(losses),
        searches=sort_results(searches),
        datasets=load_datasets(inputs["datasets"]),
        tuned=load_tuned(inputs["tuned"]),
        origins=load_origins(inputs),
        missing=load_missing(missing),
    )


def describe_failures(
    final: pd.DataFrame, searches: pd.DataFrame, losses: pd.DataFrame
) -> list[str]:
    """Return one sentence for every loss that was not found and every method that diverged."""
    rows = pd.concat([losses.reindex(columns=FAILURE), searches.reindex(columns=FAILURE)])
    failed = rows[rows["status"] == "failed"].drop_duplicates(SEARCH_KEYS)
    sentences = []
    for row in failed.to_dict("records"):
        why = f": {row['reason']}" if isinstance(row["reason"], str) else ""
        search = f"{row['task']}, {row['method']}, search seed {row['search_seed']}"
        sentences.append(f"{search} failed{why}")
    for keys, runs in final.groupby(["task", "model", "method"], sort=False):
        count = int((runs["status"] == "diverged").sum())
        if count:
            sentences.append(f"{', '.join(map(str, keys))}: {count} of {len(runs)} runs diverged")
    return [f"**{sentence.rstrip('.')}.**" for sentence in sentences]


def describe_tuning(tuned: pd.DataFrame) -> list[str]:
    """Return one sentence for every learning rate that was best at an end of its grid."""
    edge = tuned[tuned["at_edge"].eq(True)]
    return [
        f"The tuned learning rate of {row['task']}, {row['model']} "
        f"({row['best_learning_rate']:g}) ends its grid: a wider grid may hold a better one."
        for row in edge.to_dict("records")
    ]


def summarise_searches(searches: pd.DataFrame) -> pd.DataFrame:
    """Return one row per search: best fitness, and what its filters caught in all generations."""
    rows: list[dict[Any, Any]] = []
    for keys, search in searches.groupby(SEARCH_KEYS, sort=False, dropna=False):
        last = search.iloc[-1]
        found = pd.notna(last["best_fitness"])
        sums = search[["candidates", *SEARCH_COUNTS, "seconds_total"]].sum(min_count=1)
        rows.append(
            {
                **dict(zip(SEARCH_KEYS, keys, strict=True)),
                **{name: last[name] for name in ("model", "status", "reason", "metric")},
                "learning_rate": last["learning_rate"],
                "generations": int(search["generation"].notna().sum()),
                "best_fitness": last["best_fitness"],
                "best_complexity": last["best_complexity"] if found else None,
                **sums.to_dict(),
            }
        )
    columns = [column.name for column in _SEARCH_TABLE]
    return pd.DataFrame(rows, columns=pd.Index([*columns, "metric"]))


_SCORE_TABLE = (
    Column("task", "task"),
    Column("model", "model"),
    Column("method", "method"),
    Column("metric", "metric"),
    Column("mean", "test mean", "score"),
    Column("std", "std over train seeds", "score"),
    Column("std_runs", "std over runs", "score"),
    Column("validation_mean", "validation mean", "score"),
    Column("train_mean", "train mean", "score"),
    Column("learning_rate", "learning rate", "number"),
    Column("train_seeds", "train seeds", "integer"),
    Column("runs", "runs", "integer"),
    Column("diverged", "diverged", "integer"),
    Column("failed", "failed", "integer"),
    Column("versus_baseline", "against baseline"),
    Column("versus_baseline_tuned", "against baseline_tuned"),
)
_COMPARISON_TABLE = (
    Column("task", "task"),
    Column("model", "model"),
    Column("method", "method"),
    Column("comparator", "comparator"),
    Column("metric", "metric"),
    Column("mean", "mean", "score"),
    Column("comparator_mean", "comparator mean", "score"),
    Column("difference", "difference", "difference"),
    Column("ci_low", "95 % CI low", "difference"),
    Column("ci_high", "95 % CI high", "difference"),
    Column("p_value", "p", "p"),
    Column("pairs", "pairs", "integer"),
    Column("verdict", "test error is"),
    Column("note", "note"),
)
_LOSS_TABLE = (
    Column("task", "task"),
    Column("method", "method"),
    Column("search_seed", "search seed", "integer"),
    Column("status", "status"),
    Column("infix", "formula (without scale)", "code"),
    Column("scale", "scale", "number"),
    Column("tree_complexity", "complexity of the tree", "integer"),
    Column("complexity_before", "with its weights", "integer"),
    Column("complexity_after", "simplified", "integer"),
    Column("verified", "simplification verified"),
    Column("start_score", "score before fine-tuning", "score"),
    Column("best_score", "score after", "score"),
    Column("learning_rate", "learning rate", "number"),
    Column("reason", "reason"),
    Column("expression", "expression", "code"),
)
_SEARCH_TABLE = (
    Column("task", "task"),
    Column("method", "method"),
    Column("search_seed", "search seed", "integer"),
    Column("model", "model"),
    Column("status", "status"),
    Column("learning_rate", "learning rate", "number"),
    Column("generations", "generations", "integer"),
    Column("best_fitness", "best fitness", "score"),
    Column("best_complexity", "its complexity", "integer"),
    Column("candidates", "candidates", "integer"),
    Column("archive_hits", "archive hits", "integer"),
    Column("zero_gradient", "zero gradient", "integer"),
    Column("rejected", "rejected", "integer"),
    Column("gradient_hits", "gradient hits", "integer"),
    Column("stopped", "stopped early", "integer"),
    Column("diverged", "diverged", "integer"),
    Column("evaluated", "evaluated", "integer"),
    Column("training_steps", "training steps of its candidates", "integer"),
    Column("seconds_total", "seconds", "number"),
    Column("reason", "reason"),
)
_DATASET_TABLE = (
    Column("name", "dataset"),
    Column("kind", "kind"),
    Column("num_rows", "rows", "integer"),
    Column("train", "train", "integer"),
    Column("validation", "validation", "integer"),
    Column("test", "test", "integer"),
    Column("input_shape", "input shape"),
    Column("num_outputs", "outputs", "integer"),
    Column("smallest_class", "rows of the smallest class (train)", "integer"),
    Column("source", "source"),
    Column("source_version", "version"),
    Column("licence", "licence"),
    Column("checksum", "checksum"),
)


def describe_results(results: Results) -> dict[str, Table]:
    """Return the tables for readers: test_error, comparison, losses, searches, datasets, origin, missing."""
    frames = [results.final, results.searches, results.losses]
    versions = describe_versions(frames)
    origin = describe_origin(frames)
    failures = describe_failures(results.final, results.searches, results.losses)
    scores = summarise_methods(results.final)
    for comparator in COMPARATORS:
        tests = results.comparison[results.comparison["comparator"] == comparator]
        verdicts = tests.set_index(["task", "model", "method"])["verdict"]
        keys = pd.MultiIndex.from_frame(scores[["task", "model", "method"]])
        scores[f"versus_{comparator}"] = verdicts.reindex(keys).to_numpy()
    warnings = [*describe_missing(results.missing), *versions, *failures]
    tested = (
        "Paired t-test over training seeds, two-sided at 5 %, not corrected for many tests; "
        "negative differences favour the method; pp: percentage points."
    )
    return {
        "test_error": Table(
            "Test error",
            _SCORE_TABLE,
            scores,
            [*warnings, *describe_tuning(results.tuned), *origin],
        ),
        "comparison": Table(
            "Paired comparison with the baselines",
            _COMPARISON_TABLE,
            results.comparison,
            [*warnings, tested, *origin],
        ),
        "losses": Table("Learned losses", _LOSS_TABLE, results.losses, [*warnings, *origin]),
        "searches": Table(
            "Searches",
            _SEARCH_TABLE,
            summarise_searches(results.searches),
            [*warnings, *origin],
        ),
        "datasets": Table("Datasets", _DATASET_TABLE, results.datasets),
        "origin": origin_table(results.origins),
        "missing": missing_table(results.missing),
    }


def write_results(results: Results, outputs: Mapping[str, str | Path]) -> None:
    """Write every table: parquet under its name, and ``{name}_csv`` and ``{name}_md`` for readers.

    Parameters
    ----------
    outputs : mapping
        Paths under ``runs``, ``final``, ``comparison``, ``losses``, ``searches`` and
        ``{table}_csv``, ``{table}_md`` for every table of `describe_results`.
    """
    origin = provenance()
    for name in ("runs", "final", "comparison", "losses", "searches"):
        write_frame(outputs[name], getattr(results, name), name, origin)
    for name, table in describe_results(results).items():
        write_table(table, outputs[f"{name}_csv"], outputs[f"{name}_md"])
