"""Trains and searches under a real limit on the address space; started by test_memory.py, prints JSON.

Usage: little_memory.py MODE, where MODE is ample (no limit), little (some networks fit) or none (not even one does).
"""

from __future__ import annotations

import json
import logging
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from toy_tasks import make_toy_task

from evoloss.engine import Engine, LocalSearchSettings, TrainingSettings
from evoloss.errors import ModelError
from evoloss.expressions import compile_weighted_tree, parse_expression

ROWS = 500
OUTPUTS = {"ample": 10, "little": 10, "none": 2_000}
SIZE = {"ample": 500, "little": 500, "none": 4}
"""One float64 array over batch and outputs takes 40 kB for each loss, times 500 losses 20 MB. Where not even one
loss shall fit it takes 8 MB: far more than the headroom and the freed memory that the process may take again."""
HEADROOM = {"little": 30 * 2**20, "none": 2**20}
FORMULAS = ("tanh(square(sub(y, f(x))))", "square(sub(y, f(x)))", "abs(sub(y, f(x)))")
SEARCH = LocalSearchSettings(2, 1, 0.01)


class Lines(logging.Handler):
    """Keeps the messages."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def limit(mode: str) -> None:
    """Let the process take no more than it has now, plus some."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    size = pages * resource.getpagesize() + HEADROOM[mode]
    resource.setrlimit(resource.RLIMIT_AS, (size, resource.RLIM_INFINITY))


def work(mode: str) -> dict[str, Any]:
    """Return fitnesses and weights, or the errors, and what was logged."""
    lines = Lines()
    logging.getLogger("evoloss").addHandler(lines)
    # of linear classifiers the local search takes one loss after the other, whatever memory there is
    task = make_toy_task("regression", rows=ROWS, num_outputs=OUTPUTS[mode])
    engine = Engine(
        task, "linear", TrainingSettings(ROWS, 0.05, precision="float64"), torch.device("cpu")
    )
    programs = [compile_weighted_tree(parse_expression(FORMULAS[i % 3])) for i in range(SIZE[mode])]
    # libraries take their buffers, and compiled kernels are loaded
    engine.compute_fitness(programs[:2], 2, 0)
    engine.local_search(programs[:2], SEARCH, 1)
    result: dict[str, Any] = {}
    for name in ("fitness", "weights"):
        if mode != "ample":
            limit(mode)
        try:
            if name == "fitness":
                result[name] = engine.compute_fitness(programs, 3, 0).tolist()
            else:
                tuned = engine.local_search(programs, SEARCH, 1)
                result[name] = [program.weights.tolist() for program in tuned]
        except ModelError as error:
            result[name] = str(error)
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return result | {"log": lines.lines}


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.stdout.write(json.dumps(work(sys.argv[1])))
