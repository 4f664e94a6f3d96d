"""Figure: what became of the candidates of every search, filter by filter."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from evoloss.analysis.final import order_methods
from evoloss.analysis.load import SEARCH_KEYS
from evoloss.analysis.style import describe_failure, empty_figure, new_figure, note_in_panel

FATES = (
    ("archive_hits", "archive hit (equivalent loss known)", "#56B4E9", "//"),
    ("zero_gradient", "no gradient in f(x)", "#999999", ".."),
    ("rejected", "rejected", "#CC79A7", "xx"),
    ("gradient_hits", "gradient equivalent", "#F0E442", "\\\\"),
    ("diverged", "diverged", "#D55E00", "++"),
    ("stopped", "stopped early (racing)", "#E69F00", "--"),
    ("evaluated", "evaluated by training", "#009E73", ""),
    ("other", "other", "#ffffff", "oo"),
)
"""Counted fates of a candidate, in the order of the filters: name, legend, colour, hatch."""


def count_fates(searches: pd.DataFrame) -> pd.DataFrame:
    """Return, per task and method, how many candidates of all searches met each fate.

    The fates of a row sum to ``candidates``: diverged runs that were also counted as evaluated are
    counted once, and what no counter names is "other".
    """
    names = [name for name, *_ in FATES if name != "other"]
    numbers = searches[["candidates", *names]].apply(pd.to_numeric, errors="coerce").fillna(0.0)
    keys = [searches["task"], searches["method"]]
    counts: pd.DataFrame = numbers.groupby(keys).sum().reset_index()
    excess = (counts[names].sum(axis=1) - counts["candidates"]).clip(lower=0.0)
    counts["evaluated"] -= excess.combine(counts["diverged"], min)
    counts["other"] = (counts["candidates"] - counts[names].sum(axis=1)).clip(lower=0.0)
    return counts


def draw_filters(searches: pd.DataFrame) -> Figure:
    """Draw one stacked bar per task and method: shares of all candidates, in percent.

    Parameters
    ----------
    searches : DataFrame
        As made by `evoloss.analysis.load.load_searches`.
    """
    if searches.empty:
        return empty_figure("No searches.")
    counts = count_fates(searches)
    tasks = sorted(counts["task"].unique())
    methods = order_methods(list(counts["method"]))
    bars = [(task, method) for task in tasks for method in methods]
    failed = searches[searches["status"] == "failed"].drop_duplicates(SEARCH_KEYS)
    figure = new_figure(9.0, 1.6 + 0.36 * len(bars) + 0.3 * len(tasks) + 0.25 * min(len(failed), 5))
    axes = figure.subplots()
    present = _draw_bars(axes, counts, bars)
    handles = [
        Patch(facecolor=colour, hatch=hatch, edgecolor="#333333", label=label)
        for name, label, colour, hatch in FATES
        if name in present
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=3)
    lines = [f"{row['task']}, {describe_failure(row)}" for row in failed.to_dict("records")]
    if lines:
        axes.set_ylim(axes.get_ylim()[0] + 0.4 + 0.55 * min(len(lines), 5), axes.get_ylim()[1])
        note_in_panel(axes, lines, width=130)
    return figure


def _draw_bars(axes: Axes, counts: pd.DataFrame, bars: list[tuple[str, str]]) -> set[str]:
    table = counts.set_index(["task", "method"])
    present: set[str] = set()
    positions, labels = [], []
    place, previous = 0.0, None
    for task, method in bars:
        place += 0.5 if previous not in (None, task) else 0.0
        previous = task
        positions.append(place)
        labels.append(f"{task}, {method}")
        total = float(table["candidates"].get((task, method), 0.0))
        left = 0.0
        for name, _, colour, hatch in FATES:
            count = float(table[name].get((task, method), 0.0))
            share = 100.0 * count / total if total else 0.0
            if share <= 0.0:
                continue
            present.add(name)
            axes.barh(
                place,
                share,
                left=left,
                height=0.8,
                color=colour,
                hatch=hatch,
                edgecolor="#333333",
                linewidth=0.5,
            )
            if share >= 4.5:
                label = axes.text(
                    left + share / 2, place, f"{count:.0f}", ha="center", va="center", fontsize=7.5
                )
                label.set_bbox({"boxstyle": "round,pad=0.12", "facecolor": "white", "linewidth": 0})
            left += share
        axes.text(101, place, f"{total:.0f}", va="center", fontsize=8)
        place += 1.0
    axes.text(101, -0.95, "candidates", fontsize=8, va="center")
    axes.set_yticks(positions, labels)
    axes.set_ylim(place - 0.3, -1.3)
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of all candidates (%)")
    axes.grid(visible=False, axis="y")
    return present
