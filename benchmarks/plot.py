"""The figure of the scaling: cost and memory against population, steps and tree size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from evoloss.analysis.style import METHOD_STYLES, MethodStyle, figure_style, panel_grid, save_figure

LABELS = {
    "population": "candidates",
    "steps": "steps",
    "nodes": "nodes of a tree (mean)",
}
STYLES: dict[tuple[str, str], MethodStyle] = {
    ("softmax", "local search"): METHOD_STYLES["evomal"],
    ("softmax", "fitness"): METHOD_STYLES["gp_lfl"],
    ("xor", "fitness"): METHOD_STYLES["baseline_tuned"],
}
SPARE = METHOD_STYLES["baseline"]


def draw_scaling(results: dict[str, Any], svg: Path, png: Path) -> None:
    """Write the figure: one column per variable, seconds above (log-log) and peak memory below."""
    with figure_style():
        figure, axes = panel_grid(2 * len(LABELS), columns=len(LABELS), height=2.6)
        for column, (variable, label) in enumerate(LABELS.items()):
            above, below = axes[column], axes[column + len(LABELS)]
            for workload, lines in results.items():
                _draw_line(above, below, workload, lines[variable])
            for panel in (above, below):
                panel.set_xscale("log")
                panel.set_xlabel(label)
            above.set_yscale("log")
            below.set_ylim(bottom=0)
            above.set_ylabel("seconds" if column == 0 else "")
            below.set_ylabel("peak memory (MiB)" if column == 0 else "")
        handles, names = axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper center", ncols=4)
        save_figure(figure, svg, png)


def _draw_line(above: Axes, below: Axes, workload: str, line: dict[str, Any]) -> None:
    for phase, seconds in line["seconds"].items():
        style = STYLES.get((workload, phase), SPARE)
        look = {"color": style.colour, "marker": style.marker, "linestyle": style.line}
        above.plot(line["values"], seconds, label=f"{workload}, {phase}", markersize=4, **look)
    # one process runs all phases: memory is drawn once, in the look of the last one
    memory = [value / 2**20 for value in line["peak_memory"]]
    below.plot(line["values"], memory, markersize=4, **look)
