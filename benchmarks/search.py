"""A whole search under the paper's settings, by the clock."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.machine import read_peak_memory
from benchmarks.workloads import Workload, read_paper_section
from evoloss.engine import Engine
from evoloss.results import SEARCH_COUNTS
from evoloss.search.gp_search import GPSearch
from evoloss.search.history import PHASES
from evoloss.search.settings import SearchSettings
from evoloss.stages.searching import ProgressLog, build_search_settings

logger = logging.getLogger(__name__)


def read_paper_search(workload: Workload) -> SearchSettings:
    """Return the search (evomal) of the paper's preset for the workload's dataset."""
    return build_search_settings(
        read_paper_section("search", workload.dataset),
        read_paper_section("local_search", workload.dataset),
    )


def count_trainings(history: Sequence[Mapping[str, Any]]) -> int:
    """Return how many losses were trained, some of them not to the end."""
    return sum(row["evaluated"] + row["diverged"] + row["stopped"] for row in history)


def count_work(history: Sequence[Mapping[str, Any]], settings: SearchSettings) -> dict[str, int]:
    """Return how many local searches, trainings and training steps a search took.

    ``stopped`` are the trainings that a race had stopped when their generation ended; what was trained on after that
    shows in the steps alone.
    """
    counts = {key: sum(row[key] for row in history) for key in ("candidates", *SEARCH_COUNTS)}
    searched = counts["candidates"] - counts["archive_hits"] - counts["zero_gradient"]
    return {
        "local_searches": 0 if settings.local_search is None else searched,
        "trainings": count_trainings(history),
        "stopped": counts["stopped"],
        "training_steps": counts["training_steps"],
    }


def run_search(engine: Engine, settings: SearchSettings, seed: int) -> dict[str, Any]:
    """Run one search; return its wall-clock, seconds by phase, counts of candidates, and the best loss.

    ``processor_seconds`` is what it takes where nothing else runs, on one thread; ``peak_memory`` (bytes) is the whole
    process's so far, earlier searches included.
    """
    started, processor_started = time.perf_counter(), time.process_time()
    result = GPSearch(engine, settings, seed).run(ProgressLog(settings.num_generations))
    seconds = time.perf_counter() - started
    best = result.front[0] if result.front else None
    return {
        "seed": seed,
        "path": engine.path.name,
        "population": settings.population_size,
        "generations": settings.num_generations,
        "seconds": seconds,
        "processor_seconds": time.process_time() - processor_started,
        "peak_memory": read_peak_memory(),
        "seconds_by_phase": {
            phase: sum(row[f"seconds_{phase}"] for row in result.history) for phase in PHASES
        },
        "candidates": sum(row["candidates"] for row in result.history),
        **count_work(result.history, settings),
        "best_expression": str(best.expression) if best else None,
        "best_fitness": best.fitness if best else None,
        "best_complexity": best.complexity if best else None,
    }
