"""DEAP's side of the search: the primitive set, individuals, repair, variation.

DEAP draws from Python's global ``random``; callers lend it a seeded generator (`evoloss.seeding.global_random`).
"""

from __future__ import annotations

import operator
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from deap import base, gp, tools

from evoloss.expressions import OPERATORS, Expression, F, Y, call, constant
from evoloss.expressions.operators import CONSTANT, LABEL, PREDICTION
from evoloss.search.selection import Child, plan_children

ARITHMETIC = ("add", "sub", "mul", "aq")


class Fitness(base.Fitness):  # type: ignore[misc]
    """The validation metric, minimised."""

    weights = (-1.0,)


class Individual(gp.PrimitiveTree):  # type: ignore[misc]
    """A GP tree with its fitness."""

    def __init__(self, content: Any) -> None:
        super().__init__(content)
        self.fitness = Fitness()


@dataclass(frozen=True)
class VariationSettings:
    """Heights in edges, sizes in individuals.

    ``elitism_rate`` is the share of a generation that is the best of the last one, unchanged (at least one individual
    unless it is 0). The others come from crossover and mutation with these probabilities, else from reproduction.
    ``operators`` are the names of the search space's operators, at least one of `ARITHMETIC` among them.
    """

    tournament_size: int
    parsimony_size: float
    crossover_rate: float
    mutation_rate: float
    elitism_rate: float
    init_min_height: int
    init_max_height: int
    max_height: int
    operators: tuple[str, ...] = tuple(OPERATORS)


def build_primitive_set(operators: Sequence[str] = tuple(OPERATORS)) -> gp.PrimitiveSet:
    """Return ``y``, ``f(x)``, +1, -1 and the named operators; the default is the paper's search space."""
    primitives = gp.PrimitiveSet("loss", 2)
    primitives.renameArguments(ARG0=LABEL, ARG1=PREDICTION)
    for op in (OPERATORS[name] for name in operators):
        primitives.addPrimitive(op.evaluate, op.arity, op.name)
    # without a name: a named terminal's value would be its name, not the number
    primitives.addTerminal(1.0)
    primitives.addTerminal(-1.0)
    return primitives


def to_expression(tree: gp.PrimitiveTree) -> Expression:
    """Return a DEAP tree as an expression. Terminals are told apart by their value, never by their printed name."""
    stack: list[Expression] = []
    for node in reversed(tree):
        if isinstance(node, gp.Primitive):
            args = [stack.pop() for _ in range(node.arity)]
            stack.append(call(node.name, *args))
        elif isinstance(node.value, float):
            stack.append(constant(node.value))
        else:
            stack.append({LABEL: Y, PREDICTION: F}[node.value])
    (expression,) = stack
    return expression


def _is_argument(node: Any, value: str) -> bool:
    return isinstance(node, gp.Terminal) and node.value == value


def repair(tree: Individual, primitives: gp.PrimitiveSet, max_height: int) -> Individual:
    """Make both ``y`` and ``f(x)`` occur: replace a random terminal by an arithmetic operator applied to (y, f(x)).

    The order of the two is random. A terminal at ``max_height`` is never chosen, so the height limit holds; where all
    are that deep, the operator above a random one is replaced with all its arguments.
    """
    y, f = (primitives.mapping[name] for name in (LABEL, PREDICTION))
    if all(any(_is_argument(n, a.value) for n in tree) for a in (y, f)):
        return tree
    places: list[int] = []
    parents: list[int] = []
    pending = [(0, 0)]
    for index, node in enumerate(tree):
        depth, parent = pending.pop()
        pending.extend([(depth + 1, index)] * node.arity)
        if node.arity == 0:
            parents.append(parent)
            if depth < max_height:
                places.append(index)
    place = random.choice(places or parents)
    pair = [y, f] if random.random() < 0.5 else [f, y]
    arithmetic = [name for name in ARITHMETIC if name in primitives.mapping]
    # plain list slicing: PrimitiveTree's own checks every replacement's arity
    content = list(tree)
    content[tree.searchSubtree(place)] = [primitives.mapping[random.choice(arithmetic)], *pair]
    return Individual(content)


class Variation:
    """Initialisation, selection and variation with DEAP's operators under the paper's settings."""

    def __init__(self, settings: VariationSettings) -> None:
        self.settings = settings
        self.primitives = build_primitive_set(settings.operators)
        (terminals,) = self.primitives.terminals.values()
        self._constants = [t for t in terminals if isinstance(t.value, float)]
        limit = gp.staticLimit(operator.attrgetter("height"), settings.max_height)
        self._crossover = limit(gp.cxOnePoint)
        self._mutate = limit(gp.mutUniform)

    def _finish(self, tree: Any) -> Individual:
        return repair(Individual(tree), self.primitives, self.settings.max_height)

    def build_individual(self, tree: Expression) -> Individual:
        """Return the individual of ``tree``: what `to_expression` made it from."""
        content: list[Any] = []
        pending = [tree]
        while pending:
            node = pending.pop()
            if node.symbol == CONSTANT:
                content += [t for t in self._constants if t.value == node.value]
            else:
                content.append(self.primitives.mapping[node.symbol])
            pending.extend(reversed(node.args))
        return Individual(content)

    def initial_population(self, size: int) -> list[Individual]:
        """Return ``size`` repaired trees, ramped half-and-half."""
        s = self.settings
        return [
            self._finish(gp.genHalfAndHalf(self.primitives, s.init_min_height, s.init_max_height))
            for _ in range(size)
        ]

    def _grow(self, pset: gp.PrimitiveSet, type_: Any = None) -> Any:
        return gp.genGrow(pset, 0, 2, type_)

    def num_elite(self, size: int) -> int:
        """Return how many of the best of ``size`` individuals survive unchanged."""
        rate = self.settings.elitism_rate
        return max(1, round(rate * size)) if rate > 0 else 0

    def plan_children(self, size: int, generator: np.random.Generator) -> list[Child]:
        """Draw how the individuals that follow the elite come from a population of ``size``."""
        s = self.settings
        rates = s.crossover_rate, s.mutation_rate
        return plan_children(
            size - self.num_elite(size), size, s.tournament_size, *rates, generator
        )

    def next_generation(
        self, population: Sequence[Individual], plan: Sequence[Child]
    ) -> list[Individual]:
        """Return the next population, of the same size: the elite unchanged, then the planned children."""
        best = tools.selBest(population, self.num_elite(len(population)))
        return [Individual(i) for i in best] + [self._make(child, population) for child in plan]

    def _make(self, child: Child, population: Sequence[Individual]) -> Individual:
        size = self.settings.parsimony_size
        parents = [Individual(population[p.select(population, size)]) for p in child.parents]
        if child.kind == "crossover":
            # one of the two children, as in DEAP's varOr: else the shares would not be the rates
            made, _ = self._crossover(*parents)
        elif child.kind == "mutation":
            (made,) = self._mutate(*parents, expr=self._grow, pset=self.primitives)
        else:
            return parents[0]
        return self._finish(made)
