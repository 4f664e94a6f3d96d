"""Figure: every learned loss as a curve beside the standard loss, value and gradient."""

from __future__ import annotations

import logging
import textwrap

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D

from evoloss.analysis.final import order_methods
from evoloss.analysis.loss_curves import (
    DOMAINS,
    Curve,
    element_loss,
    standard_loss,
    trace_loss,
    view_limits,
)
from evoloss.analysis.style import (
    SEED_LINES,
    describe_failure,
    empty_figure,
    method_style,
    new_figure,
)
from evoloss.errors import ExpressionError

log = logging.getLogger(__name__)

_STANDARD = {"color": "#8c8c8c", "linewidth": 4.0, "alpha": 0.6}
_LABELS = {
    ("classification", 1.0): "target class (y = 1)",
    ("classification", 0.0): "other class (y = 0)",
}
Traced = dict[tuple[str, int], list[Curve]]


def draw_losses(losses: pd.DataFrame) -> Figure:
    """Draw one row per task: value for each label, then gradient for each label.

    Parameters
    ----------
    losses : DataFrame
        As made by `evoloss.analysis.load_losses.load_losses`.
    """
    groups = list(losses.groupby("task"))
    if not groups:
        return empty_figure("No learned losses.")
    kinds = {str(task): _kind(group) for task, group in groups}
    figure = new_figure(13.0, 2.75 * len(groups) + 0.6)
    rows = figure.subfigures(len(groups), 1, squeeze=False).ravel()
    for row, (task, group) in zip(rows, groups, strict=True):
        _draw_row(row, str(task), group, kinds[str(task)])
    _add_legend(figure, losses, set(kinds.values()))
    return figure


def _draw_row(row: SubFigure, task: str, group: pd.DataFrame, kind: str) -> None:
    traced, remarks = trace_losses(group, kind)
    count = len(DOMAINS[kind].labels)
    panels = row.subplots(1, 2 * count)
    for i in range(count):
        _draw_panel(panels[i], traced, kind, i, gradient=False)
        _draw_panel(panels[count + i], traced, kind, i, gradient=True)
    panels[0].set_ylabel("value (scaled)")
    panels[count].set_ylabel("gradient (scaled)")
    row.suptitle(task, x=0.01, ha="left", fontweight="bold", fontsize=10.5)
    if remarks:
        text = textwrap.fill("; ".join(remarks), 170)
        row.supxlabel(text, x=0.01, ha="left", fontsize=7.5, color="#7a0000")


def _kind(group: pd.DataFrame) -> str:
    named = [kind for kind in group["kind"] if kind in DOMAINS]
    if named:
        return str(named[0])
    return "regression" if "mse" in set(group.get("metric", [])) else "classification"


def trace_losses(group: pd.DataFrame, kind: str) -> tuple[Traced, list[str]]:
    """Return a task's curves by (method, search seed), and a remark for each loss that has none."""
    traced: Traced = {}
    remarks = []
    for row in group.to_dict("records"):
        if row["status"] == "failed" or not isinstance(row["expression"], str):
            remarks.append(describe_failure(row))
            continue
        try:
            curves = trace_loss(element_loss(row["expression"]), DOMAINS[kind])
        except ExpressionError as error:
            log.warning("loss of %s, %s cannot be drawn: %s", row["task"], row["method"], error)
            curves = None
        if curves is None:
            remarks.append(
                f"{row['method']}, seed {row['search_seed']} not drawn: "
                "its gradient is zero or not finite"
            )
        else:
            traced[str(row["method"]), int(row["search_seed"])] = curves
    return traced, remarks


def _draw_panel(axes: Axes, traced: Traced, kind: str, index: int, *, gradient: bool) -> None:
    domain = DOMAINS[kind]
    standard = trace_loss(standard_loss(kind)[1], domain)
    everything = [
        curves[index] for curves in ([standard] if standard else []) + list(traced.values())
    ]
    if standard is not None:
        curve = standard[index]
        axes.plot(curve.axis, curve.gradient if gradient else curve.value, **_STANDARD)  # type: ignore[arg-type]
    for (method, seed), curves in traced.items():
        curve = curves[index]
        axes.plot(
            curve.axis,
            curve.gradient if gradient else curve.value,
            color=method_style(method).colour,
            linestyle=SEED_LINES[seed % len(SEED_LINES)],
            linewidth=1.4,
        )
    axes.set_ylim(view_limits([c.gradient if gradient else c.value for c in everything]))
    label = domain.labels[index]
    axes.set_title(_LABELS.get((kind, label), f"y = {label:g}"), fontweight="normal", fontsize=9)
    axes.set_xlabel("f(x) - y" if domain.residual else "f(x)", labelpad=1)
    axes.axhline(0.0, color="#666666", linewidth=0.6, zorder=1)
    axes.tick_params(labelsize=8)


def _add_legend(figure: Figure, losses: pd.DataFrame, kinds: set[str]) -> None:
    names = " / ".join(standard_loss(kind)[0] for kind in sorted(kinds))
    handles = [Line2D([], [], label=names, **_STANDARD)]  # type: ignore[arg-type]
    handles += [
        Line2D([], [], color=method_style(name).colour, linewidth=2, label=name)
        for name in order_methods(list(losses["method"]))
    ]
    handles += [
        Line2D(
            [],
            [],
            color="#333333",
            linestyle=SEED_LINES[seed % len(SEED_LINES)],
            label=f"search seed {seed}",
        )
        for seed in sorted(losses["search_seed"].dropna().unique())[: len(SEED_LINES)]
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), handlelength=3)
