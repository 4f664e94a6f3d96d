"""Figure: learning curves of every method, validation and training metric against the step."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from evoloss.analysis.final import order_methods
from evoloss.analysis.load import RUN_KEYS, primary_metrics
from evoloss.analysis.style import (
    axis_scale,
    empty_figure,
    log_axis_if_wide,
    method_style,
    metric_label,
    note_in_panel,
    panel_grid,
)


def average_curves(runs: pd.DataFrame) -> pd.DataFrame:
    """Return mean, std and number of runs per method, split and step.

    A run that diverges (any value not finite) leaves the average altogether, so that the mean does
    not jump where it ends.
    """
    finite = np.isfinite(runs["value"].to_numpy(dtype=float))
    bad = runs.assign(bad=~finite).groupby(RUN_KEYS, dropna=False)["bad"].transform("any")
    values = runs[~bad].groupby(["method", "split", "step"])["value"]
    table = values.agg(["mean", "std", "count"]).reset_index()
    return table.assign(std=table["std"].fillna(0.0))


def draw_learning_curves(runs: pd.DataFrame) -> Figure:
    """Draw a panel per task and model: mean validation metric, with a band of one std over runs.

    Parameters
    ----------
    runs : DataFrame
        As made by `evoloss.analysis.load.load_runs`.
    """
    groups = list(runs.groupby(["task", "model"]))
    if not groups:
        return empty_figure("No finished training runs.")
    metrics = primary_metrics(runs)
    figure, panels = panel_grid(len(groups))
    for axes, ((task, model), group) in zip(panels, groups, strict=True):
        _draw_panel(axes, group, metrics[str(task)])
        axes.set_title(f"{task}, {model}", loc="left")
    methods = order_methods(list(runs["method"]))
    handles = [
        Line2D([], [], color=style.colour, linestyle=style.line, linewidth=2, label=name)
        for name, style in ((name, method_style(name)) for name in methods)
    ]
    handles.append(Line2D([], [], color="#666666", linewidth=2.0, label="thick: validation"))
    handles.append(Line2D([], [], color="#666666", linewidth=0.7, label="thin: training"))
    figure.legend(handles=handles, loc="outside lower center", ncols=6, handlelength=3)
    return figure


def _draw_panel(axes: Axes, group: pd.DataFrame, metric: str) -> None:
    scale = axis_scale(metric)
    fine = group[(group["status"] == "ok") & (group["metric"] == metric)]
    curves = average_curves(fine)
    shown = []
    # the solid line, which comes last in that order, lies below: curves that coincide stay visible between dashes
    for method in reversed(order_methods(list(fine["method"]))):
        style = method_style(method)
        for split, width in (("train", 0.7), ("validation", 1.7)):
            curve = curves[(curves["method"] == method) & (curves["split"] == split)]
            steps = curve["step"].to_numpy(dtype=float)
            mean, std = (curve[name].to_numpy(dtype=float) * scale for name in ("mean", "std"))
            axes.plot(steps, mean, color=style.colour, linestyle=style.line, linewidth=width)
            shown.append(mean)
            if split == "validation":
                # a band below zero means nothing, and a logarithmic axis could not show it
                low = np.maximum(mean - std, 0.5 * mean)
                axes.fill_between(
                    steps, low, mean + std, color=style.colour, alpha=0.13, linewidth=0
                )
    log_axis_if_wide(axes, np.concatenate(shown) if shown else [])
    axes.set_xlabel("training step")
    axes.set_ylabel(metric_label(metric))
    axes.set_xlim(left=0)
    note_in_panel(axes, _remarks(group, fine), top=True)


def _remarks(group: pd.DataFrame, fine: pd.DataFrame) -> list[str]:
    failed = group[group["status"] == "failed"].drop_duplicates(["method", "search_seed"])
    remarks = [
        f"{row['method']}, search seed {row['search_seed']}: search failed"
        for row in failed.to_dict("records")
    ]
    bad = fine[~np.isfinite(fine["value"].to_numpy(dtype=float))].drop_duplicates(RUN_KEYS)
    for method, runs in bad.groupby("method"):
        remarks.append(f"{method}: {len(runs)} of its runs diverged, left out")
    return remarks
