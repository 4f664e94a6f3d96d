"""The history of a search: one row per generation."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from evoloss.results import SEARCH_COUNTS
from evoloss.search.archive import WORST, Archive
from evoloss.search.individuals import Individual

PHASES = ("local_search", "rejection", "fitness")


def describe_generation(
    generation: int,
    population: Sequence[Individual],
    archive: Archive,
    counts: Mapping[str, int],
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """Return a generation's row. ``best_*`` is the best loss found so far, from the archive.

    ``median_fitness`` is that of the individuals that have one, predicted where racing stopped the training.
    ``counts`` has numbers for `SEARCH_COUNTS`, ``seconds`` for `PHASES` and the total.
    """
    fitnesses = [individual.fitness.values[0] for individual in population]
    finite = [fitness for fitness in fitnesses if fitness < WORST]
    front = archive.pareto_front()
    best = front[0] if front else None
    return {
        "generation": generation,
        "best_fitness": best.fitness if best else float("nan"),
        "median_fitness": statistics.median(finite) if finite else float("nan"),
        "best_expression": str(best.expression) if best else "",
        "best_tree": str(best.tree) if best else "",
        "best_complexity": best.complexity if best else 0,
        "median_complexity": float(statistics.median(len(i) for i in population)),
        "candidates": len(population),
        **{name: counts.get(name, 0) for name in SEARCH_COUNTS},
        **{f"seconds_{phase}": value for phase, value in seconds.items()},
    }
