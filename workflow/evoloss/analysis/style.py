"""One look for all figures: colours, markers and line styles of methods, layout, saving.

Colours are Okabe & Ito's, made to be told apart with any colour vision; marker, line style and
hatch differ too, so that a figure survives a grey printer. Saved files are reproducible: no date, a
fixed salt for the identifiers in SVG.
"""

from __future__ import annotations

import io
import itertools
import math
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from evoloss.results import write_atomically

PNG_DPI = 160
PANEL_WIDTH, PANEL_HEIGHT = 3.7, 3.0
"""Size of one panel in inches."""


@dataclass(frozen=True)
class MethodStyle:
    """How one method looks everywhere."""

    colour: str
    marker: str
    line: Any


METHOD_STYLES = {
    "baseline": MethodStyle("#000000", "s", (0, (5, 1.5))),
    "baseline_tuned": MethodStyle("#009E73", "D", (0, (3, 1, 1, 1))),
    "gp_lfl": MethodStyle("#E69F00", "^", (0, (1, 1))),
    "evomal": MethodStyle("#0072B2", "o", "solid"),
}
_SPARE = (
    MethodStyle("#D55E00", "v", (0, (7, 2))),
    MethodStyle("#CC79A7", "P", (0, (4, 1, 1, 1, 1, 1))),
    MethodStyle("#56B4E9", "X", (0, (2, 2))),
)
SEED_LINES: tuple[Any, ...] = ("solid", (0, (5, 2)), (0, (1, 1.2)), (0, (4, 1, 1, 1)), (0, (8, 2)))
"""Line styles that tell search seeds apart where colour already says the method."""

METRIC_NAMES = {"error_rate": "error rate (%)", "mse": "mean squared error"}

_SETTINGS: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Arial", "Helvetica", "sans-serif"],
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "hatch.linewidth": 0.6,
    "svg.fonttype": "none",
    "svg.hashsalt": "evoloss",
    "mathtext.fontset": "dejavusans",
}


def method_style(name: str) -> MethodStyle:
    """Return a method's style; an unknown method gets one of the spare ones, always the same."""
    if name in METHOD_STYLES:
        return METHOD_STYLES[name]
    return _SPARE[sum(name.encode()) % len(_SPARE)]


@contextmanager
def figure_style(**settings: Any) -> Iterator[None]:
    """Draw with the project's style, plus ``settings``, without touching the global one."""
    with mpl.rc_context({**_SETTINGS, **settings}):  # type: ignore[dict-item]
        yield


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of ``width`` x ``height`` inches that no global state knows of."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def panel_grid(
    count: int,
    *,
    columns: int = 3,
    width: float = PANEL_WIDTH,
    height: float = PANEL_HEIGHT,
    height_ratios: Sequence[float] = (1.0,),
) -> tuple[Figure, list[Axes]]:
    """Return a figure with ``count`` panels (one at least), row by row, and room for a legend.

    ``height`` is the mean height of a panel; ``height_ratios`` are those of the rows, over and over.
    """
    count = max(count, 1)
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    figure = new_figure(max(columns * width, 5.0), rows * height + 0.5)
    ratios = list(itertools.islice(itertools.cycle(height_ratios), rows))
    axes = figure.subplots(rows, columns, squeeze=False, height_ratios=ratios).ravel().tolist()
    for spare in axes[count:]:
        spare.remove()
    return figure, axes[:count]


def save_figure(figure: Figure, svg: str | Path, png: str | Path) -> None:
    """Write a figure as SVG and PNG; the same figure always gives the same bytes."""
    saves: tuple[tuple[str | Path, str, dict[str, Any]], ...] = (
        (svg, "svg", {"metadata": {"Date": None}}),
        (png, "png", {"dpi": PNG_DPI}),
    )
    for path, kind, options in saves:
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, **options)
        write_atomically(path, _writer(buffer.getvalue()))


def _writer(data: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(data)

    return write


def axis_scale(metric: object) -> float:
    """Return the factor from a metric's values to the axis: error rates are shown in percent."""
    return 100.0 if metric == "error_rate" else 1.0


def metric_label(metric: object, prefix: str = "") -> str:
    """Return an axis label such as ``test error rate (%)``."""
    return f"{prefix} {METRIC_NAMES.get(str(metric), 'score')}".strip()


def log_axis_if_wide(axes: Axes, values: Sequence[float] | Any, *, ratio: float = 5.0) -> None:
    """Make the y axis logarithmic if positive ``values`` span more than ``ratio``."""
    shown = np.asarray(values, dtype=float)
    shown = shown[np.isfinite(shown)]
    if len(shown) == 0 or shown.min() <= 0 or shown.max() <= ratio * shown.min():
        return
    axes.set_yscale("log")
    decades = math.log10(shown.max() / shown.min())
    marks = (1.0, 2.0, 5.0) if decades < 2.5 else (1.0,)
    axes.yaxis.set_major_locator(LogLocator(subs=marks))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def note_in_panel(axes: Axes, lines: Sequence[str], *, width: int = 46, top: bool = False) -> None:
    """Write remarks (failed searches, diverged runs) into a panel, wrapped, on a light ground.

    ``top``: in the upper right corner, which falling curves leave free; else in the lower left one.
    """
    if not lines:
        return
    text = "\n".join(textwrap.fill(line, width) for line in lines[:4])
    if len(lines) > 4:
        text += f"\n… and {len(lines) - 4} more"
    axes.text(
        0.98 if top else 0.02,
        0.98 if top else 0.02,
        text,
        transform=axes.transAxes,
        va="top" if top else "bottom",
        ha="right" if top else "left",
        fontsize=7,
        color="#7a0000",
        zorder=10,
        bbox={"boxstyle": "round,pad=0.25", "facecolor": "#fff3f0", "edgecolor": "#e0b0a8"},
    )


def empty_figure(message: str) -> Figure:
    """Return a small figure that says why there is nothing to draw."""
    figure = new_figure(6.0, 1.6)
    figure.text(0.5, 0.5, message, ha="center", va="center", wrap=True)
    return figure


def describe_failure(row: Mapping[Any, Any]) -> str:
    """Return ``evomal, seed 1 failed: reason`` for a row of the searches or losses."""
    reason = row.get("reason")
    why = f": {reason}" if isinstance(reason, str) and reason else ""
    return f"{row['method']}, seed {row['search_seed']} failed{why}"
