"""Figure: final test error per task and model, every run, and the test against a baseline."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from evoloss.analysis.final import order_methods, summarise_methods
from evoloss.analysis.statistics import (
    HIGHER,
    LOWER,
    NOT_TESTED,
)
from evoloss.analysis.style import (
    axis_scale,
    empty_figure,
    method_style,
    metric_label,
    panel_grid,
)

COMPARATOR = "baseline_tuned"
_WORDS = {LOWER: "lower", HIGHER: "higher", NOT_TESTED: "not tested"}


def panel_title(task: object, model: object, search_model: object) -> str:
    """Return a panel's title; it says so if the losses were searched with another model."""
    if isinstance(search_model, str) and search_model != model:
        return f"{task}, {model}\n(losses found with {search_model})"
    return f"{task}, {model}"


def draw_test_error(final: pd.DataFrame, comparison: pd.DataFrame) -> Figure:
    """Draw mean and standard deviation over training seeds, with single runs as small points.

    Parameters
    ----------
    final, comparison : DataFrame
        As made by `evoloss.analysis.statistics`.
    """
    groups = list(final.groupby(["task", "model"], sort=False))
    if not groups:
        return empty_figure("No finished training runs.")
    summary = summarise_methods(final)
    figure, panels = panel_grid(len(groups), height=3.4)
    for axes, ((task, model), runs) in zip(panels, groups, strict=True):
        here = (summary["task"] == task) & (summary["model"] == model)
        tests = comparison[
            (comparison["task"] == task)
            & (comparison["model"] == model)
            & (comparison["comparator"] == COMPARATOR)
        ]
        _draw_panel(axes, runs, summary[here], tests.set_index("method"))
        axes.set_title(panel_title(task, model, runs["search_model"].iloc[0]), loc="left")
    figure.supxlabel(
        "Large: mean ± std over training seeds. Small: every run. "
        f"Above: error against {COMPARATOR}, paired t-test over training seeds.",
        fontsize=8.5,
        color="#444444",
    )
    return figure


def _break_name(name: str) -> str:
    """Break a long method name at its first underscore."""
    return name.replace("_", "_\n", 1) if len(name) > 10 else name


def _draw_panel(axes: Axes, runs: pd.DataFrame, summary: pd.DataFrame, tests: pd.DataFrame) -> None:
    metric = runs["metric"].iloc[0]
    scale = axis_scale(metric)
    methods = order_methods(list(runs["method"]))
    for position, method in enumerate(methods):
        mine = runs[runs["method"] == method]
        row = summary[summary["method"] == method].iloc[0]
        style = method_style(method)
        values = mine.loc[mine["status"] == "ok", "test"].to_numpy(dtype=float) * scale
        # spread the single runs evenly: a fixed pattern, so that the figure is the same every time
        offsets = (
            np.linspace(0.12, 0.34, len(values)) if len(values) > 1 else np.full(len(values), 0.2)
        )
        axes.plot(
            position + offsets,
            values,
            linestyle="none",
            marker=style.marker,
            markersize=3.2,
            markerfacecolor="white",
            markeredgewidth=0.8,
            color=style.colour,
            alpha=0.85,
        )
        if np.isfinite(row["mean"]):
            spread = row["std"] if np.isfinite(row["std"]) else 0.0
            axes.errorbar(
                position - 0.12,
                row["mean"] * scale,
                yerr=spread * scale,
                marker=style.marker,
                markersize=7,
                capsize=4,
                color=style.colour,
                linewidth=1.6,
            )
    axes.set_xlim(-0.6, len(methods) - 0.4)
    axes.set_xticks(range(len(methods)), [_break_name(name) for name in methods])
    axes.grid(visible=False, axis="x")
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axes.set_ylabel(metric_label(metric, "test"))
    axes.margins(y=0.08)
    _annotate(axes, methods, runs, tests)


def _annotate(axes: Axes, methods: list[str], runs: pd.DataFrame, tests: pd.DataFrame) -> None:
    """Write verdict and p value above each method, and what is missing from it below."""
    low, high = axes.get_ylim()
    above = 0.24 if any(method in tests.index for method in methods) else 0.0
    below = 0.0 if (runs["status"] == "ok").all() else 0.13
    axes.set_ylim(low - below * (high - low), high + above * (high - low))
    for position, method in enumerate(methods):
        at = axes.get_xaxis_transform()
        if method in tests.index:
            test = tests.loc[method]
            p = test["p_value"]
            p_text = "" if not np.isfinite(p) else "p<0.001" if p < 0.001 else f"p={p:.3f}"
            word = _WORDS.get(str(test["verdict"]), "no difference")
            strong = test["verdict"] in (LOWER, HIGHER)
            axes.text(
                position,
                0.99,
                "\n".join(filter(None, [word.replace(" ", "\n"), p_text])),
                transform=at,
                ha="center",
                va="top",
                fontsize=7.5,
                fontweight="bold" if strong else "normal",
                color="black" if strong else "#555555",
            )
        mine = runs[runs["method"] == method]
        counts = [(int((mine["status"] == s).sum()), s) for s in ("failed", "diverged")]
        missing = [f"{count} of {len(mine)}\n{status}" for count, status in counts if count]
        if missing:
            axes.text(
                position,
                0.01,
                "\n".join(missing),
                transform=at,
                ha="center",
                va="bottom",
                fontsize=7,
                color="#7a0000",
            )
