"""Figure: best and median fitness of the searches by generation, and the size of their candidates."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from evoloss.analysis.final import order_methods
from evoloss.analysis.load import SEARCH_KEYS
from evoloss.analysis.style import (
    PANEL_HEIGHT,
    axis_scale,
    describe_failure,
    empty_figure,
    log_axis_if_wide,
    method_style,
    metric_label,
    note_in_panel,
    panel_grid,
)

MOST_MARKERS = 8
"""On a line."""


def draw_search_progress(searches: pd.DataFrame) -> Figure:
    """Draw two panels per task: fitness, and below it complexity; means over search seeds, and every search.

    Parameters
    ----------
    searches : DataFrame
        As made by `evoloss.analysis.load.load_searches`, with the task's ``metric``.
    """
    groups = list(searches.groupby("task"))
    if not groups:
        return empty_figure("No searches.")
    columns = min(2 if len(groups) in (2, 4) else 3, len(groups))
    rows = math.ceil(len(groups) / columns)
    figure, panels = panel_grid(
        2 * rows * columns, columns=columns, height=0.75 * PANEL_HEIGHT, height_ratios=(2.0, 1.0)
    )
    for place in range(rows * columns):
        upper = panels[place + place // columns * columns]
        lower = panels[place + (place // columns + 1) * columns]
        if place >= len(groups):
            upper.remove()
            lower.remove()
            continue
        task, group = groups[place]
        _draw_fitness(upper, group)
        _draw_complexity(lower, group)
        upper.set_title(str(task), loc="left")
        lower.sharex(upper)
    handles = [
        Line2D([], [], color=style.colour, marker=style.marker, linewidth=2, label=name)
        for name, style in (
            (name, method_style(name)) for name in order_methods(list(searches["method"]))
        )
    ]
    handles += [
        Line2D([], [], color="#666666", linewidth=2, label="best, mean of searches"),
        Line2D([], [], color="#666666", linewidth=0.7, label="each search"),
        Line2D([], [], color="#666666", linestyle="dashed", label="median, mean of searches"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, handlelength=3)
    return figure


def _space_markers(points: int, number: int) -> tuple[int, int]:
    """Return the first point of line ``number`` that has a marker, and how many points further the next one is.

    They are few enough to tell them apart, and not where the line before has its own: of lines that coincide both show.
    """
    every = math.ceil(points / MOST_MARKERS)
    return number * every // 2, max(1, every)


def _draw_complexity(axes: Axes, group: pd.DataFrame) -> None:
    for number, method in enumerate(order_methods(list(group["method"]))):
        style = method_style(method)
        mine = group[(group["method"] == method) & group["generation"].notna()]
        sizes = mine.pivot_table(
            index="generation", columns="search_seed", values="median_complexity"
        )
        axes.plot(sizes.index, sizes, color=style.colour, linewidth=0.7, alpha=0.7)
        axes.plot(
            sizes.index,
            sizes.mean(axis=1),
            color=style.colour,
            linestyle="dashed",
            marker=style.marker,
            markevery=_space_markers(len(sizes), number),
            markersize=3.5,
            linewidth=1.2,
        )
    axes.set_ylim(0, 1.05 * axes.get_ylim()[1])  # room for the highest marker
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("generation")
    axes.set_ylabel("nodes")


def _draw_fitness(axes: Axes, group: pd.DataFrame) -> None:
    metric = group["metric"].dropna().iloc[0] if group["metric"].notna().any() else None
    scale = axis_scale(metric)
    shown = []
    for number, method in enumerate(order_methods(list(group["method"]))):
        style = method_style(method)
        mine = group[(group["method"] == method) & group["generation"].notna()]
        tables = {}
        for name in ("best_fitness", "median_fitness"):
            table = mine.pivot_table(index="generation", columns="search_seed", values=name)
            # a generation in which everything was rejected has no median: a gap, not a peak
            tables[name] = table.where(np.isfinite(table)) * scale
        for seed in tables["best_fitness"].columns:
            best = tables["best_fitness"][seed]
            axes.plot(best.index, best, color=style.colour, linewidth=0.7, alpha=0.7)
        for name, table in tables.items():
            mean = table.mean(axis=1)
            line: dict[str, Any] = {"linestyle": "dashed", "linewidth": 1.2}
            if name == "best_fitness":
                line = {"marker": style.marker, "markersize": 4.5, "linewidth": 2.0}
                line["markevery"] = _space_markers(len(mean), number)
            axes.plot(mean.index, mean, color=style.colour, **line)
            shown.append(mean.to_numpy(dtype=float))
    log_axis_if_wide(axes, np.concatenate(shown) if shown else [])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel(metric_label(metric, "fitness:"))
    failed = group[group["status"] == "failed"].drop_duplicates(SEARCH_KEYS)
    note_in_panel(axes, [describe_failure(row) for row in failed.to_dict("records")], top=True)
