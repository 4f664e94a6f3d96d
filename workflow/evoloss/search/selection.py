"""Which individuals compete for offspring, drawn before any of them has its fitness.

Who meets whom in a tournament does not depend on who wins it. Known beforehand, it tells racing whose fitness nothing
will ask for (`evoloss.engine.racing`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from deap import gp

from evoloss.engine.racing import Contest

Tournament = tuple[int, ...]
"""Numbers of the individuals that compete by fitness, drawn with replacement."""


@dataclass(frozen=True)
class Parent:
    """A double tournament, fitness first: one of the winners of two tournaments, more often the smaller one.

    Luke and Panait, "Fighting Bloat with Nonparametric Parsimony Pressure", PPSN 2002. ``draw``, in [0, 1), decides
    between the two winners.
    """

    tournaments: tuple[Tournament, Tournament]
    draw: float

    def select(self, population: Sequence[gp.PrimitiveTree], parsimony_size: float) -> int:
        """Return the winner's number: of two sizes the smaller with probability ``parsimony_size / 2``.

        Between equal sizes chance decides, between equal fitnesses the order of the tournament.
        """
        small, large = (
            min(tournament, key=lambda i: population[i].fitness.values[0])
            for tournament in self.tournaments
        )
        share = parsimony_size / 2
        if len(population[small]) == len(population[large]):
            share = 0.5
        elif len(population[small]) > len(population[large]):
            small, large = large, small
        return small if self.draw < share else large


@dataclass(frozen=True)
class Child:
    """One individual to come: how it is made (crossover, mutation, reproduction) and from which parents."""

    kind: str
    parents: tuple[Parent, ...]


def plan_children(
    count: int,
    size: int,
    tournament_size: int,
    crossover_rate: float,
    mutation_rate: float,
    generator: np.random.Generator,
) -> list[Child]:
    """Draw how ``count`` children come from a population of ``size``; what is neither rate's is reproduction."""
    children = []
    for draw in generator.random(count):
        kind = "reproduction"
        if draw < crossover_rate:
            kind = "crossover"
        elif draw < crossover_rate + mutation_rate:
            kind = "mutation"
        parents = []
        for _ in range(2 if kind == "crossover" else 1):
            first, second = generator.integers(size, size=(2, tournament_size)).tolist()
            parents.append(Parent((tuple(first), tuple(second)), generator.random()))
        children.append(Child(kind, tuple(parents)))
    return children


def list_contests(children: Sequence[Child], num_elite: int, size: int) -> list[Contest]:
    """Return all that the fitness of ``size`` individuals is asked for: each tournament, and who is the elite."""
    contests = [
        Contest(frozenset(tournament))
        for child in children
        for parent in child.parents
        for tournament in parent.tournaments
    ]
    return contests + [Contest(frozenset(range(size)), num_elite)] * (num_elite > 0)
