"""Cost and peak memory against population, steps and tree size, each point in a process of its own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from benchmarks.point import Point, run_point

logger = logging.getLogger(__name__)

WORKLOADS = ("softmax", "xor")


@dataclass(frozen=True)
class Ranges:
    """The values of each variable; the other two stay at the point that is given."""

    population: tuple[int, ...] = (10, 25, 50, 100, 250, 500, 1000)
    steps: tuple[int, ...] = (10, 25, 50, 100, 250)
    nodes: tuple[tuple[int, int], ...] = ((5, 8), (10, 16), (20, 30), (40, 60), (80, 120))


def measure_scaling(
    base: Point, ranges: Ranges, measure: Callable[[Point], dict[str, Any]] = run_point
) -> dict[str, Any]:
    """Return the points along each variable, and the slopes of straight lines through them in log-log scale.

    ``measure`` takes one point, by default in a process of its own. A slope of 1 is proportional; memory is counted
    above what the process held before the first candidate was trained.
    """
    lines = {
        "population": [replace(base, population=value) for value in ranges.population],
        "steps": [replace(base, steps=value) for value in ranges.steps],
        "nodes": [replace(base, sizes=(value,)) for value in ranges.nodes],
    }
    result: dict[str, Any] = {}
    for variable, points in lines.items():
        measured = []
        for point in points:
            logger.info("scaling of %s with %s: %s", base.workload, variable, point)
            measured.append(measure(point))
        result[variable] = describe_line(variable, measured)
    return result


def describe_line(variable: str, measured: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return one variable's values, seconds by phase, memory, and their slopes."""
    x = [point["mean_nodes" if variable == "nodes" else variable] for point in measured]
    seconds = {
        phase: [point["seconds"][phase] for point in measured] for phase in measured[0]["seconds"]
    }
    peak = [point["peak_memory"] for point in measured]
    used = [max(2**20, point["peak_memory"] - point["memory_before"]) for point in measured]
    return {
        "values": x,
        "population": measured[0]["population"] if variable != "population" else None,
        "steps": measured[0]["steps"] if variable != "steps" else None,
        "seconds": seconds,
        "peak_memory": peak,
        "slope_seconds": {phase: fit_slope(x, values) for phase, values in seconds.items()},
        "slope_memory": fit_slope(x, used),
    }


def fit_slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Return the slope of the least-squares line through (log x, log y)."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])
