"""One measured point in a process of its own, so that its peak memory is its own."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.candidates import SIZES, draw_candidates
from benchmarks.machine import read_peak_memory
from benchmarks.phases import make_phases
from benchmarks.workloads import Workload, make_workload
from evoloss.engine import choose_device
from evoloss.errors import EvolossError

REPEATS = 3


class PointError(EvolossError):
    """The process of a point failed."""


@dataclass(frozen=True)
class Point:
    """What is measured: ``steps`` of local search and as many of fitness, with candidates of ``sizes`` (nodes)."""

    workload: str
    population: int
    steps: int
    threads: int
    device: str = "cpu"
    sizes: tuple[tuple[int, int], ...] = SIZES


def measure_point(point: Point) -> dict[str, Any]:
    """Measure in this process: seconds of local search and fitness, and bytes of memory.

    Seconds are of the whole population, the median of 3 calls after a first one, which prepares what generations share.
    """
    torch.set_num_threads(point.threads)
    workload = _shorten(make_workload(point.workload), point.steps)
    engine = workload.build_engine(choose_device(point.device))
    programs = draw_candidates(engine, workload, point.population, 0, point.sizes)
    before = read_peak_memory()
    seconds = {}
    for phase in make_phases(engine, workload, 1.0):
        if phase.name == "rejection":  # it trains no network
            continue
        phase.run_engine(programs, 0)
        runs = [phase.run_engine(programs, 0)[0] for _ in range(REPEATS)]
        seconds[phase.name] = statistics.median(runs) * len(programs)
    return {
        **asdict(point),
        "mean_nodes": statistics.fmean(map(len, programs)),
        "seconds": seconds,
        "memory_before": before,
        "peak_memory": read_peak_memory(),
    }


def _shorten(workload: Workload, steps: int) -> Workload:
    local_search = workload.local_search and replace(workload.local_search, meta_steps=steps)
    return replace(workload, local_search=local_search, fitness_steps=steps)


def run_point(point: Point) -> dict[str, Any]:
    """Measure in a new process.

    Raises
    ------
    PointError
        If that process fails, with the last line it wrote.
    """
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.point", json.dumps(asdict(point))],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise PointError(
            f"measuring {point.workload} with {point.population} candidates failed: {last}"
        )
    result: dict[str, Any] = json.loads(done.stdout)
    return result


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    given["sizes"] = tuple(tuple(pair) for pair in given["sizes"])
    sys.stdout.write(json.dumps(measure_point(Point(**given))))
