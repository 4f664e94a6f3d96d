"""What racing does to a search's tournaments: how many it decides otherwise than full trainings would."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from evoloss.expressions.canonical import canonical_key
from evoloss.search.gp_search import GPSearch
from evoloss.search.individuals import to_expression

Tournament = tuple[tuple[str, float], ...]
"""Key in the archive and fitness of every aspirant, as the search had it."""


def list_tournaments(search: GPSearch) -> list[Tournament]:
    """Return the tournaments by fitness of the current generation."""
    entrants = [
        (canonical_key(to_expression(individual)), individual.fitness.values[0])
        for individual in search.population
    ]
    return [
        tuple(entrants[i] for i in tournament)
        for child in search.plan_children()
        for parent in child.parents
        for tournament in parent.tournaments
    ]


def count_changed(tournaments: Sequence[Tournament], true_fitness: Mapping[str, float]) -> int:
    """Return how many were won by one that another would have beaten; NaN in ``true_fitness``: it diverges.

    Whoever is not in ``true_fitness`` has the fitness that the search gave.
    """

    def correct(key: str, fitness: float) -> float:
        value = true_fitness.get(key, fitness)
        return math.inf if math.isnan(value) else value

    changed = 0
    for tournament in tournaments:
        winner = min(tournament, key=lambda entrant: entrant[1])
        changed += correct(*winner) > min(correct(*entrant) for entrant in tournament)
    return changed
