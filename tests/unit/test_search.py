"""The search on toy tasks: repair, elitism, archive, determinism, planted truth, failure."""

from __future__ import annotations

import itertools
import operator
import random
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from deap import gp
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_tasks import make_toy_task

from evoloss.engine import Engine, LocalSearchSettings, TrainingSettings
from evoloss.engine.filters import RejectionSettings
from evoloss.engine.racing import Contest, find_contenders
from evoloss.expressions import compile_weighted_tree, evaluate_program, parse_expression
from evoloss.search.archive import WORST, Archive, Record
from evoloss.search.gp_search import GPSearch
from evoloss.search.history import describe_generation
from evoloss.search.individuals import Individual, Variation, VariationSettings, to_expression
from evoloss.search.selection import Parent, list_contests, plan_children
from evoloss.search.settings import SearchSettings
from evoloss.seeding import derive_seed, global_random

VARIATION = VariationSettings(4, 1.4, 0.70, 0.25, 0.05, 2, 4, 10)


def make_settings(**changes: Any) -> SearchSettings:
    values: dict[str, Any] = {
        "population_size": 16,
        "num_generations": 5,
        "fitness_steps": 40,
        "variation": VARIATION,
        "rejection": RejectionSettings(60, 40, 0.05, 2),
        "local_search": LocalSearchSettings(10, 1, 0.01),
        "initial_deviation": 1e-3,
    }
    return SearchSettings(**(values | changes))


def make_engine(kind: str = "classification") -> Engine:
    outputs = 1 if kind == "regression" else 3
    task = make_toy_task(kind, num_outputs=outputs)
    return Engine(task, "linear", TrainingSettings(16, 0.1), torch.device("cpu"))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_trees_mean_what_deap_means(seed: int) -> None:
    """A DEAP tree and its expression compute the same, and repair leaves both terminals in every tree."""
    variation = Variation(VARIATION)
    rng, plans = random.Random(seed), np.random.default_rng(seed)
    with global_random(rng):
        population = variation.initial_population(4)
        for _ in range(3):
            for individual in population:
                individual.fitness.values = (random.random(),)
            population = variation.next_generation(population, variation.plan_children(4, plans))
    y, f = (np.random.default_rng(seed + i).uniform(-2, 2, 5) for i in range(2))
    for individual in population:
        expression = to_expression(individual)
        assert expression.contains("y")
        assert expression.contains("f(x)")
        assert expression.height == individual.height <= VARIATION.max_height
        assert expression.complexity == len(individual)
        program = compile_weighted_tree(expression)
        found = evaluate_program(program, y, f, program.weights.tolist(), np)
        np.testing.assert_allclose(found, interpret(individual, y, f), equal_nan=True)


def interpret(tree: gp.PrimitiveTree, y: np.ndarray, f: np.ndarray) -> np.ndarray:
    """Evaluate a tree in DEAP's own prefix order with plain NumPy definitions."""
    functions = {
        "add": np.add, "sub": np.subtract, "mul": np.multiply, "min": np.minimum,
        "max": np.maximum, "sign": np.sign, "square": np.square, "abs": np.abs, "tanh": np.tanh,
        "aq": lambda a, b: a / np.sqrt(1 + b**2),
        "log": lambda a: np.log(np.maximum(np.abs(a), 1e-7)),
        "sqrt": lambda a: np.sqrt(np.maximum(np.abs(a), 1e-7)),
    }  # fmt: skip
    nodes = iter(tree)

    def value() -> np.ndarray:
        node = next(nodes)
        if isinstance(node, gp.Primitive):
            return functions[node.name](*[value() for _ in range(node.arity)])
        constants = {"1.0": np.ones_like(f), "-1.0": -np.ones_like(f)}
        return {"y": y, "f(x)": f, **constants}[node.format()]

    return value()


def test_one_terminal_is_repaired() -> None:
    variation = Variation(VARIATION)
    for terminal in variation.primitives.terminals[object]:
        with global_random(random.Random(0)):
            tree = variation._finish([terminal])
        assert {"y", "f(x)"} <= {node.symbol for node in to_expression(tree).walk()}


@pytest.mark.parametrize("height", [1, 2, 4])
def test_repair_holds_the_height_limit(height: int) -> None:
    """Even where every leaf is as deep as a leaf may be."""
    variation = Variation(
        replace(VARIATION, init_min_height=height, init_max_height=height, max_height=height)
    )
    for seed in range(20):
        with global_random(random.Random(seed)):
            population = variation.initial_population(25)
        for individual in population:
            expression = to_expression(individual)
            assert expression.height == individual.height <= height
            assert expression.contains("y")
            assert expression.contains("f(x)")


def test_rates_are_the_shares_of_the_offspring(monkeypatch: pytest.MonkeyPatch) -> None:
    variation = Variation(VARIATION)
    plans = np.random.default_rng(2)
    drawn: Counter[str] = Counter()
    for name in ("_crossover", "_mutate"):
        original = getattr(variation, name)

        def count(*args: Any, _name: str = name, _original: Any = original, **kwargs: Any) -> Any:
            drawn[_name] += 1
            return _original(*args, **kwargs)

        monkeypatch.setattr(variation, name, count)
    with global_random(random.Random(2)):
        population = variation.initial_population(40)
        for _ in range(50):
            for individual in population:
                individual.fitness.values = (random.random(),)
            population = variation.next_generation(population, variation.plan_children(40, plans))
            drawn["offspring"] += 38
    assert len(population) == 40
    assert drawn["_crossover"] / drawn["offspring"] == pytest.approx(0.70, abs=0.05)
    assert drawn["_mutate"] / drawn["offspring"] == pytest.approx(0.25, abs=0.05)


def select_parents(population: list[Individual], count: int, parsimony_size: float) -> list[int]:
    """Return the numbers of the winners of ``count`` double tournaments of 4."""
    plan = plan_children(count, len(population), 4, 0.0, 0.0, np.random.default_rng(0))
    return [child.parents[0].select(population, parsimony_size) for child in plan]


@pytest.mark.parametrize(("parsimony_size", "share"), [(1.0, 0.5), (1.4, 0.6), (2.0, 0.75)])
def test_parsimony_prefers_the_smaller_of_two_winners(parsimony_size: float, share: float) -> None:
    """Of two tournament winners the smaller is taken with probability parsimony_size / 2 (Luke and Panait 2002).

    In a population of one small and one large tree, equally fit, the two differ half of the time.
    """
    small, large = (
        make_individual(Variation(VARIATION), text)
        for text in ("sub(y, f(x))", "square(sub(y, f(x)))")
    )
    for individual in (small, large):
        individual.fitness.values = (1.0,)
    chosen = select_parents([small, large], 4000, parsimony_size)
    assert chosen.count(0) / len(chosen) == pytest.approx(share, abs=0.025)


def test_selection_looks_at_fitness_before_size() -> None:
    variation = Variation(VARIATION)
    small = make_individual(variation, "sub(y, f(x))")
    large = make_individual(variation, "square(sub(y, f(x)))")
    small.fitness.values, large.fitness.values = (2.0,), (1.0,)
    chosen = select_parents([small, large], 4000, parsimony_size=2.0)
    # the small one must fill two tournaments of 4, each with probability 1/16, or one and be preferred
    assert chosen.count(1) / len(chosen) == pytest.approx((15 / 16) ** 2, abs=0.02)


def test_a_tie_in_fitness_goes_to_the_first_of_the_tournament() -> None:
    variation = Variation(VARIATION)
    population = [make_individual(variation, "sub(y, f(x))") for _ in range(3)]
    for individual, fitness in zip(population, (2.0, 1.0, 1.0), strict=True):
        individual.fitness.values = (fitness,)
    parent = Parent(((0, 2, 1), (0, 1, 2)), 0.49)
    assert parent.select(population, 1.4) == 2
    assert replace(parent, draw=0.5).select(population, 1.4) == 1


def test_contests_are_all_that_fitness_is_asked_for() -> None:
    """The elite and every tournament: another fitness of someone else does not change the next generation."""
    variation = Variation(replace(VARIATION, elitism_rate=0.15))
    for seed in range(8):
        with global_random(random.Random(seed)):
            population = variation.initial_population(20)
        fitnesses = np.random.default_rng(seed).permutation(20).astype(float)
        plan = variation.plan_children(20, np.random.default_rng(seed))
        assert len(plan) == 17
        contests = list_contests(plan, 3, 20)
        parents = sum(len(child.parents) for child in plan)
        assert len(contests) == 2 * parents + 1
        asked = find_contenders(contests, fitnesses, fitnesses)
        assert 3 < asked.sum() < 20
        generations = []
        for values in (fitnesses, np.where(asked, fitnesses, fitnesses + 100.0)):
            for individual, value in zip(population, values.tolist(), strict=True):
                individual.fitness.values = (value,)
            with global_random(random.Random(seed)):
                following = variation.next_generation(population, plan)
            generations.append([list(individual) for individual in following])
        assert generations[0] == generations[1]
    assert list_contests([], 0, 20) == []
    assert list_contests([], 3, 4) == [Contest(frozenset(range(4)), 3)]
    # two of the four are one loss: three places are for the three there are
    assert Contest(frozenset(range(4)), 3).renumber([5, 6, 6, 7]) == Contest(
        frozenset([5, 6, 7]), 3
    )


def test_the_elite_survives_unchanged() -> None:
    variation = Variation(VARIATION)
    with global_random(random.Random(1)):
        population = variation.initial_population(20)
        for i, individual in enumerate(population):
            individual.fitness.values = (float(i + 1),)
        plan = variation.plan_children(20, np.random.default_rng(1))
        children = variation.next_generation(population, plan)
    assert len(children) == 20
    assert list(children[0]) == list(population[0])
    assert not children[0].fitness.valid


def test_global_random_is_left_alone() -> None:
    random.seed(5)
    before = random.getstate()
    rng = random.Random(derive_seed(1, "x"))
    with global_random(rng):
        first = random.random()
    assert random.getstate() == before
    with global_random(rng):
        assert random.random() != first


@pytest.mark.parametrize("local_search", [None, LocalSearchSettings(10, 1, 0.01)])
def test_same_seed_same_search(local_search: LocalSearchSettings | None) -> None:
    def run(seed: int) -> list[tuple[str, float]]:
        search = GPSearch(make_engine(), make_settings(local_search=local_search), seed)
        return [(str(r.expression), r.fitness) for r in search.run().front]

    assert run(3) == run(3)
    assert run(3) != run(4)


def test_search_finds_a_loss_that_trains() -> None:
    """On a linear rule an evolved loss must bring most of the error down; chance level is 2/3."""
    search = GPSearch(make_engine(), make_settings(num_generations=8), 0)
    result = search.run()
    assert result.front[0].fitness < 0.3
    best = [row["best_fitness"] for row in result.history]
    assert best == sorted(best, reverse=True), "elitism and the archive never forget the best"
    for row in result.history:
        seen = (
            "evaluated",
            "archive_hits",
            "zero_gradient",
            "rejected",
            "gradient_hits",
            "stopped",
            "diverged",
        )
        assert sum(row[name] for name in seen) == row["candidates"]


def test_equivalent_trees_are_evaluated_once() -> None:
    search = GPSearch(make_engine("regression"), make_settings(local_search=None), 0)
    variation = search.variation
    trees = [
        "add(square(sub(y, f(x))), 1)", "add(1, square(sub(y, f(x))))",
        "mul(1, add(1, square(sub(y, f(x)))))", "sign(sub(y, f(x)))", "sign(sub(y, f(x)))",
    ]  # fmt: skip
    population = [make_individual(variation, text) for text in trees]
    search.evaluation.evaluate(population, 0, [])
    assert len({ind.fitness.values for ind in population[:3]}) == 1
    steps = search.settings.fitness_steps
    assert search.evaluation.counts == {
        "archive_hits": 3, "evaluated": 1, "zero_gradient": 1, "training_steps": steps,
    }  # fmt: skip
    search.evaluation.evaluate(population, 0, [])
    assert +search.evaluation.counts == {"archive_hits": 5}, "rejected losses are remembered too"


def make_individual(variation: Variation, text: str) -> Individual:
    mapping = variation.primitives.mapping
    names = {"1": "1.0", "-1": "-1.0"}

    def flatten(node: Any) -> list[Any]:
        text = str(node) if not node.args else node.symbol
        return [mapping[names.get(text, text)], *[x for arg in node.args for x in flatten(arg)]]

    return Individual(flatten(parse_expression(text)))


def test_every_candidate_rejected_is_a_result() -> None:
    # with no rejection steps nothing improves, so everything is rejected
    hopeless = make_settings(rejection=RejectionSettings(0, 40, 0.05, 2), num_generations=2)
    result = GPSearch(make_engine(), hopeless, 0).run()
    assert result.front == []
    assert len(result.history) == 3
    assert np.isnan(result.history[-1]["best_fitness"])


def test_pareto_front() -> None:
    tree = parse_expression("sub(y, f(x))")

    def record(fitness: float, complexity: int) -> Record:
        return Record(tree, tree, complexity, "evaluated", fitness, 0)

    points = [(0.3, 3), (0.2, 9), (0.2, 7), (0.25, 8), (WORST, 1), (0.1, 20), (0.3, 5)]
    archive = Archive({str(i): record(*point) for i, point in enumerate(points)})
    front = [(r.fitness, r.complexity) for r in archive.pareto_front()]
    assert front == [(0.1, 20), (0.2, 7), (0.3, 3)]
    assert all(operator.lt(a[0], b[0]) for a, b in itertools.pairwise(front))


def test_a_generation_is_described_by_those_that_have_a_fitness() -> None:
    """Whatever gave it to them; what was rejected or diverged is left out, and the best is from the archive."""
    with global_random(random.Random(0)):
        population = Variation(VARIATION).initial_population(4)
    for individual, fitness in zip(population, (0.9, WORST, 0.2, 0.5), strict=True):
        individual.fitness.values = (fitness,)
    tree = parse_expression("abs(sub(y, f(x)))")
    trained = Record(tree, tree, tree.complexity, "evaluated", 0.3, 0)
    archive = Archive(
        {"a": trained, "b": replace(trained, status="stopped", fitness=0.2, spared=8)}
    )
    row = describe_generation(3, population, archive, {"stopped": 1}, {"total": 2.0})
    assert (row["generation"], row["candidates"], row["stopped"]) == (3, 4, 1)
    assert (row["median_fitness"], row["best_fitness"]) == (0.5, 0.3)
