"""Figure: the learned losses, typeset.

matplotlib's own mathtext does the typesetting, so no TeX is needed. A formula that is too wide for
its column is set smaller; one that would become unreadable, or that mathtext cannot set, is written
as plain text over several lines.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.mathtext import MathTextParser

from evoloss.analysis.style import describe_failure, empty_figure, method_style, new_figure

FIGURE_SETTINGS = {"svg.fonttype": "path", "mathtext.fontset": "dejavuserif"}
"""Settings for this figure alone: as SVG text, brackets and roots need fonts that browsers lack."""

WIDTH = 13.0
_FORMULA_LEFT, _FORMULA_RIGHT = 2.65, 10.9
_FONT_SIZE, _SMALLEST = 13.0, 8.0
_WRAP, _MAX_LINES = 96, 6


@dataclass(frozen=True)
class Typeset:
    """A formula ready to draw: its text, font size in points, and height in inches."""

    text: str
    size: float
    height: float
    math: bool


def typeset_formula(latex: object, infix: object, room: float) -> Typeset:
    """Fit a formula into ``room`` inches of width.

    Parameters
    ----------
    latex, infix : str or missing
        The formula as LaTeX (without dollar signs) and as plain text.
    """
    if isinstance(latex, str) and latex and "$" not in latex:
        text = f"${latex}$".replace(r"\frac", r"\dfrac")
        try:
            # measured at 72 dpi: one pixel is one point
            base = 10.0
            parsed = MathTextParser("path").parse(text, dpi=72, prop=FontProperties(size=base))
            width, height = (
                float(side) / 72.0 / base for side in (parsed[0], parsed[1] + parsed[2])
            )
            size = min(_FONT_SIZE, room / width if width else _FONT_SIZE)
            if size >= _SMALLEST:
                return Typeset(text, size, height * size, math=True)
        except ValueError:
            pass  # mathtext does not know a command: the plain text serves
    plain = infix if isinstance(infix, str) and infix else "(no formula)"
    lines = textwrap.wrap(plain, _WRAP) or [plain]
    if len(lines) > _MAX_LINES:
        lines = [*lines[: _MAX_LINES - 1], "… (in full in the table of losses)"]
    return Typeset("\n".join(lines), 9.0, 0.17 * len(lines), math=False)


def draw_formulas(losses: pd.DataFrame) -> Figure:
    """Draw one line per loss: method and search seed, formula, scale, complexity before and after.

    Parameters
    ----------
    losses : DataFrame
        As made by `evoloss.analysis.load_losses.load_losses`; drawn under `FIGURE_SETTINGS`.
    """
    if losses.empty:
        return empty_figure("No learned losses.")
    room = _FORMULA_RIGHT - _FORMULA_LEFT - 0.2
    rows = losses.to_dict("records")
    formulas = [typeset_formula(row["latex"], row["infix"], room) for row in rows]
    heights = [max(0.42, formula.height + 0.24) for formula in formulas]
    tasks = [str(row["task"]) for row in rows]
    starts = [i == 0 or tasks[i] != tasks[i - 1] for i in range(len(rows))]
    total = sum(heights) + 0.48 * sum(starts) + 0.55
    figure = new_figure(WIDTH, total)
    figure.set_layout_engine("none")
    page = _Page(figure, total)
    page.heading()
    for row, formula, height, start in zip(rows, formulas, heights, starts, strict=True):
        if start:
            page.task(str(row["task"]))
        page.loss(row, formula, height)
    return figure


class _Page:
    """A figure written from top to bottom, in inches."""

    def __init__(self, figure: Figure, height: float) -> None:
        self.figure = figure
        self.height = height
        self.top = 0.0

    def write(self, x: float, y: float, text: str, **style: object) -> None:
        self.figure.text(x / WIDTH, 1.0 - y / self.height, text, va="center", **style)  # type: ignore[arg-type]

    def heading(self) -> None:
        for x, text in (
            (0.25, "method, search seed"),
            (_FORMULA_LEFT, "loss of one element, without its scale"),
            (_FORMULA_RIGHT, "scale"),
            (_FORMULA_RIGHT + 0.95, "complexity"),
        ):
            self.write(x, 0.25, text, fontsize=9, color="#555555")
        self.top = 0.42

    def task(self, name: str) -> None:
        self.write(0.25, self.top + 0.28, name, fontsize=11, fontweight="bold")
        self.rule(self.top + 0.45)
        self.top += 0.48

    def rule(self, y: float) -> None:
        line = [1.0 - y / self.height] * 2
        self.figure.add_artist(
            Line2D([0.25 / WIDTH, 1 - 0.25 / WIDTH], line, color="#bbbbbb", linewidth=0.8)
        )

    def loss(self, row: Mapping[Any, Any], formula: Typeset, height: float) -> None:
        middle = self.top + height / 2
        self.top += height
        style = method_style(str(row["method"]))
        self.write(0.37, middle, "●", color=style.colour, fontsize=8, ha="center")
        self.write(0.52, middle, f"{row['method']}, {row['search_seed']}", fontsize=9.5)
        if row["status"] == "failed":
            text = textwrap.shorten(describe_failure(row), 130)
            self.write(_FORMULA_LEFT, middle, text, fontsize=9, color="#7a0000")
            return
        family = {} if formula.math else {"family": "monospace"}
        self.write(_FORMULA_LEFT, middle, formula.text, fontsize=formula.size, **family)
        scale = row["scale"]
        if isinstance(scale, float) and scale == scale:
            self.write(_FORMULA_RIGHT, middle, f"\u00d7 {scale:.3g}", fontsize=9.5)
        before, after = (_count(row[f"complexity_{name}"]) for name in ("before", "after"))
        self.write(_FORMULA_RIGHT + 0.95, middle, f"{before} → {after}", fontsize=9.5)


def _count(value: object) -> str:
    return f"{value:.0f}" if isinstance(value, int | float) and value == value else "?"
