"""Stage 1, the outer loop: genetic programming over losses, with or without local search (evomal, gp_lfl).

Raymond, Chen, Xue, Zhang, "Learning Symbolic Model-Agnostic Loss Functions via Meta-Learning", TPAMI 2023,
arXiv 2209.08907.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from evoloss.checkpoint import Checkpoints
from evoloss.engine import Engine
from evoloss.engine.racing import Contest
from evoloss.expressions import format_text
from evoloss.search.archive import Archive, Record
from evoloss.search.evaluation import Evaluation
from evoloss.search.history import describe_generation
from evoloss.search.individuals import Individual, Variation, to_expression
from evoloss.search.search_state import (
    describe_archive,
    describe_random,
    parse_tree,
    restore_archive,
    restore_random,
)
from evoloss.search.selection import Child, list_contests
from evoloss.search.settings import SearchSettings
from evoloss.seeding import derive_seed, global_random, numpy_generator


@dataclass(frozen=True)
class SearchResult:
    """The Pareto front (empty if every candidate was rejected) and one history row per generation."""

    front: list[Record]
    history: list[dict[str, Any]]


class GPSearch:
    """One search with one seed. ``on_generation`` is called with each finished history row.

    ``population`` are the individuals of the current generation.
    With ``checkpoints`` it saves its state after every generation and, within one, at the checkpoints' interval; it
    goes on from there, with the result of an undisturbed search (the history's seconds are those of one process).
    """

    def __init__(
        self,
        engine: Engine,
        settings: SearchSettings,
        search_seed: int,
        checkpoints: Checkpoints | None = None,
    ) -> None:
        self.settings = settings
        self._search_seed = search_seed
        self.evaluation = Evaluation(
            engine,
            settings,
            search_seed,
            Archive(),
            None if checkpoints is None else self._reach_safe_point,
        )
        self.variation = Variation(settings.variation)
        self._random = random.Random(derive_seed(search_seed, "genetic programming"))
        self._generation = 0
        self.population: list[Individual] = []
        self._history: list[dict[str, Any]] = []
        self._checkpoints = checkpoints
        self._resume: dict[str, Any] = {}

    @property
    def archive(self) -> Archive:
        """What the search remembers."""
        return self.evaluation.archive

    def run(self, on_generation: Callable[[dict[str, Any]], None] | None = None) -> SearchResult:
        """Run all generations (the initial population is generation 0), from the checkpoint if there is one."""
        self._start()
        while True:
            started = time.perf_counter()
            plan = self.plan_children()
            contests = self._list_contests(plan)
            self.evaluation.evaluate(self.population, self._generation, contests, self._resume)
            row = describe_generation(
                self._generation,
                self.population,
                self.archive,
                self.evaluation.counts,
                self.evaluation.seconds | {"total": time.perf_counter() - started},
            )
            self._history.append(row)
            if on_generation is not None:
                on_generation(row)
            if self._generation == self.settings.num_generations:
                return SearchResult(self.archive.pareto_front(), self._history)
            with global_random(self._random):
                self.population = self.variation.next_generation(self.population, plan)
            self._generation += 1
            self._resume = {}
            if self._checkpoints is not None:
                self._checkpoints.reach_safe_point(lambda: self._describe_state({}), due=True)

    def plan_children(self) -> list[Child]:
        """Return how the current generation's children come about, or would, if it is the last one."""
        stream = numpy_generator(self._search_seed, "selection", self._generation)
        return self.variation.plan_children(self.settings.population_size, stream)

    def _list_contests(self, plan: list[Child]) -> list[Contest]:
        """Return what races in the current generation are about."""
        if not self.settings.racing.rungs:
            return []
        size = self.settings.population_size
        return list_contests(plan, self.variation.num_elite(size), size)

    def _start(self) -> None:
        state = self._checkpoints.load() if self._checkpoints is not None else None
        if state is None:
            with global_random(self._random):
                self.population = self.variation.initial_population(self.settings.population_size)
            return
        self._generation = state["generation"]
        self._history = state["history"]
        self._resume = state["progress"]
        self.evaluation.archive = restore_archive(state["archive"])
        restore_random(self._random, state["random"])
        self.population = [
            self.variation.build_individual(parse_tree(tree)) for tree in state["population"]
        ]

    def _reach_safe_point(self, get_progress: Callable[[], Any]) -> None:
        if self._checkpoints is not None:
            self._checkpoints.reach_safe_point(lambda: self._describe_state(get_progress()))

    def _describe_state(self, progress: dict[str, Any]) -> dict[str, Any]:
        """Return the state before the evaluation of the current generation, and how far that has come."""
        return {
            "generation": self._generation,
            "history": self._history,
            "archive": describe_archive(self.archive, before=self._generation),
            "random": describe_random(self._random),
            "population": [format_text(to_expression(i)) for i in self.population],
            "progress": progress,
        }
