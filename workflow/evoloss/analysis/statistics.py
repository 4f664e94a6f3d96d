"""Paired tests of every method against the baselines.

Two methods are compared on the same training seeds, which share initial weights and batches, so the
test is the paired t-test (Student 1908, Biometrika 6) on the differences per training seed,
two-sided at 5 %, with the 95 % confidence interval of the mean difference. A learned method has
several losses, one per search seed: their errors are first averaged within a training seed. The
test therefore speaks about *these* searched losses and new training seeds, not about a new search;
the data split is fixed too (Bouthillier et al. 2021, arXiv 2103.03098, on what such seeds leave
out). p values are not corrected for the number of comparisons.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from evoloss.analysis.final import average_searches, order_methods

SIGNIFICANCE = 0.05
COMPARATORS = ("baseline", "baseline_tuned")

LOWER, HIGHER = "lower", "higher"
NO_DIFFERENCE = f"no difference at p<{SIGNIFICANCE}"
NOT_TESTED = "not tested"

COMPARISON_COLUMNS = [
    "task",
    "model",
    "method",
    "comparator",
    "metric",
    "mean",
    "comparator_mean",
    "difference",
    "ci_low",
    "ci_high",
    "p_value",
    "pairs",
    "verdict",
    "note",
]


@dataclass(frozen=True)
class PairedTest:
    """A paired t-test: mean of ``first - second``, its 95 % confidence interval, p value, remark.

    What cannot be computed is NaN and ``note`` says why.
    """

    difference: float
    ci_low: float
    ci_high: float
    p_value: float
    pairs: int
    note: str = ""

    @property
    def verdict(self) -> str:
        """Whether the first sample is lower, higher, not different, or could not be tested."""
        if math.isnan(self.p_value):
            return NOT_TESTED
        if self.p_value >= SIGNIFICANCE:
            return NO_DIFFERENCE
        return LOWER if self.difference < 0 else HIGHER


def paired_t_test(first: Sequence[float], second: Sequence[float]) -> PairedTest:
    """Compare two samples of equal length pair by pair; pairs with a value not finite are left out.

    With fewer than two pairs there is no p value, nor where all pairs differ by the same amount,
    for then there is no spread to judge by. If all pairs are equal, p is 1: nothing differs.
    """
    a, b = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    usable = np.isfinite(a) & np.isfinite(b)
    a, b = a[usable], b[usable]
    n, nan = len(a), math.nan
    if n == 0:
        return PairedTest(nan, nan, nan, nan, 0, "no pair of results")
    difference = float(np.mean(a - b))
    if n == 1:
        return PairedTest(difference, nan, nan, nan, n, "one pair is too few for a test")
    if np.array_equal(a, b):
        return PairedTest(0.0, 0.0, 0.0, 1.0, n, "identical in all pairs")
    # rounding alone gives equal differences a spread of some 1e-16 of the values
    if np.ptp(a - b) <= 1e-12 * float(np.max(np.abs([a, b]))):
        return PairedTest(
            difference, difference, difference, nan, n, "the same difference in all pairs"
        )
    result = stats.ttest_rel(a, b)
    interval = result.confidence_interval(1.0 - SIGNIFICANCE)
    low, high = float(interval.low), float(interval.high)
    return PairedTest(difference, low, high, float(result.pvalue), n)


def compare_methods(final: pd.DataFrame) -> pd.DataFrame:
    """Test every method against `COMPARATORS`: one row per task, model, method and comparator.

    Means are over the pairs of the test, so ``mean - comparator_mean`` is ``difference``; a
    negative difference is in favour of the method. ``note`` says what the verdict lacks.
    """
    averaged = average_searches(final)
    rows: list[dict[str, Any]] = []
    for (task, model), group in final.groupby(["task", "model"], sort=False):
        here = averaged[(averaged["task"] == task) & (averaged["model"] == model)]
        methods = order_methods(group["method"])
        table = here.pivot(index="train_seed", columns="method", values="test")
        table = table.reindex(columns=methods)
        head = {"task": task, "model": model, "metric": group["metric"].iloc[0]}
        for method in methods:
            for comparator in _comparators_of(method, methods):
                row = _compare(table, method, comparator)
                notes = [row["note"], *_missing_runs(group, method, comparator)]
                rows.append({**head, **row, "note": "; ".join(filter(None, notes))})
    return pd.DataFrame(rows, columns=pd.Index(COMPARISON_COLUMNS))


def _comparators_of(method: str, methods: Sequence[str]) -> list[str]:
    """Return what a method is compared with: the tuned baseline with the plain one, never back."""
    weaker = COMPARATORS[: COMPARATORS.index(method)] if method in COMPARATORS else COMPARATORS
    return [comparator for comparator in weaker if comparator in methods]


def _compare(table: pd.DataFrame, method: str, comparator: str) -> dict[str, Any]:
    pairs = table[[method, comparator]].dropna()
    test = paired_t_test(list(pairs[method]), list(pairs[comparator]))
    return {
        "method": method,
        "comparator": comparator,
        "mean": pairs[method].mean(),
        "comparator_mean": pairs[comparator].mean(),
        "difference": test.difference,
        "ci_low": test.ci_low,
        "ci_high": test.ci_high,
        "p_value": test.p_value,
        "pairs": test.pairs,
        "verdict": test.verdict,
        "note": test.note,
    }


def _missing_runs(group: pd.DataFrame, *methods: str) -> list[str]:
    """Say how many runs of each method are missing from a comparison."""
    notes = []
    for method in methods:
        runs = group[group["method"] == method]
        for status, words in (("diverged", "diverged"), ("failed", "lack a loss: search failed")):
            count = int((runs["status"] == status).sum())
            if count:
                notes.append(f"{count} of {len(runs)} runs of {method} {words}")
    return notes
