"""Searches and trainings that are stopped anywhere and started again end as if nothing had happened."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toy_tasks import make_toy_task

from evoloss.checkpoint import Checkpoints
from evoloss.engine import Engine, LocalSearchSettings, TrainingSettings
from evoloss.engine.filters import RejectionSettings
from evoloss.engine.racing import RacingSettings
from evoloss.engine.snapshot import restore_snapshot, take_snapshot
from evoloss.engine.training_run import TrainingRun
from evoloss.errors import CheckpointError
from evoloss.expressions import compile_weighted_tree, parse_expression
from evoloss.search.gp_search import GPSearch, SearchResult
from evoloss.search.individuals import Variation, VariationSettings, to_expression
from evoloss.search.search_state import describe_archive, restore_archive
from evoloss.search.settings import SearchSettings
from evoloss.seeding import global_random
from evoloss.tasks import Task

CPU = torch.device("cpu")
VARIATION = VariationSettings(3, 1.4, 0.7, 0.25, 0.05, 2, 4, 6)
SETTINGS = SearchSettings(
    population_size=6,
    num_generations=2,
    fitness_steps=120,
    variation=VARIATION,
    rejection=RejectionSettings(20, 20, 0.05, 2),
    local_search=LocalSearchSettings(4, 1, 0.01),
    initial_deviation=0.001,
    racing=RacingSettings((0.25, 0.5)),
)
TRAINING = TrainingSettings(16, 0.05, momentum=0.9, nesterov=True, weight_decay=1e-3)


class Kill(Exception):  # noqa: N818
    """The process ends here."""


class KilledCheckpoints(Checkpoints):
    """Real checkpoints at every safe point; the process is killed after a number of them, before or after the write."""

    def __init__(self, directory: Path, points: int, *, write_last: bool) -> None:
        super().__init__(directory, "job", interval=0)
        self.points = points
        self.write_last = write_last

    def reach_safe_point(self, get_state: Callable[[], Any], *, due: bool = False) -> None:
        self.points -= 1
        if self.points >= 0 or self.write_last:
            super().reach_safe_point(get_state, due=due)
        if self.points < 0:
            raise Kill


def make_task(model: str) -> Task:
    if model == "mlp":
        return make_toy_task("regression", num_outputs=1, rows=40)
    if model == "lenet5":
        return make_toy_task(input_shape=(1, 28, 28), rows=40)
    if model == "gru":
        return make_toy_task(input_shape=(8,), vocabulary_size=12, rows=40)
    return make_toy_task()


def run_search(
    model: str, settings: SearchSettings, checkpoints: Checkpoints | None = None
) -> SearchResult:
    engine = Engine(make_task(model), model, TRAINING, CPU)
    return GPSearch(engine, settings, 3, checkpoints).run()


def without_clocks(result: SearchResult) -> list[dict[str, Any]]:
    return [
        {key: str(value) for key, value in row.items() if not key.startswith("seconds")}
        for row in result.history
    ]


@pytest.mark.parametrize("method", ["evomal", "gp_lfl"])
@pytest.mark.parametrize("model", ["linear", "mlp", "gru", "lenet5"])
def test_a_search_killed_again_and_again_ends_the_same(
    model: str, method: str, tmp_path: Path
) -> None:
    settings = SETTINGS if method == "evomal" else replace(SETTINGS, local_search=None)
    if model in ("gru", "lenet5"):
        settings = replace(settings, num_generations=1)
    check_killed_search(model, settings, tmp_path, most_points=3)


@pytest.mark.usefixtures("narrow_bounds")
@pytest.mark.parametrize("local_search", [None, LocalSearchSettings(2, 1, 0.01)])
def test_a_search_with_racing_killed_again_and_again_ends_the_same(
    local_search: LocalSearchSettings | None, tmp_path: Path
) -> None:
    """Racing knows enough to stop somebody only after some generations."""
    settings = replace(
        SETTINGS,
        population_size=20,
        num_generations=12,
        fitness_steps=16,
        local_search=local_search,
        initial_deviation=0.001 if local_search else 0.0,
    )
    result = check_killed_search("linear", settings, tmp_path, most_points=12)
    assert sum(row["stopped"] for row in result.history) > 2


def check_killed_search(
    model: str, settings: SearchSettings, directory: Path, most_points: int
) -> SearchResult:
    """Kill a search after fewer than ``most_points`` safe points, until it ends; compare it with an undisturbed one."""
    expected = run_search(model, settings)
    generator = random.Random(0)
    kills = 0
    while True:
        checkpoints = KilledCheckpoints(
            directory, generator.randrange(most_points), write_last=generator.random() < 0.5
        )
        try:
            found = run_search(model, settings, checkpoints)
            break
        except Kill:
            kills += 1
    assert kills >= 1
    assert found.front == expected.front
    assert without_clocks(found) == without_clocks(expected)
    return found


def test_a_local_search_on_threads_equals_one_on_a_thread_and_goes_on_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    formulas = (
        "square(sub(y, f(x)))",
        "mul(-1, mul(y, log(f(x))))",
        # ends at its first step, and its neighbours go on
        "mul(1e200, square(square(mul(1e200, sub(f(x), y)))))",
        "abs(sub(mul(2, y), f(x)))",
        "tanh(mul(y, f(x)))",
    )
    programs = [compile_weighted_tree(parse_expression(formula)) for formula in formulas]
    settings = LocalSearchSettings(10, 1, 0.01)
    monkeypatch.setattr("evoloss.engine.local_search.STRIDE", 4)

    def search(threads: int, resume: Any = None) -> tuple[Any, list[Any]]:
        engine = Engine(make_task("linear"), "linear", replace(TRAINING, precision="float64"), CPU)
        points: list[Any] = []
        torch.set_num_threads(threads)
        found = engine.local_search(
            programs,
            settings,
            0,
            resume=resume,
            at_safe_point=lambda describe: points.append(copy.deepcopy(describe())),
        )
        return [program.loss_params for program in found], points

    before = torch.get_num_threads()
    try:
        expected, _ = search(1)
        found, points = search(2)
        resumed, _ = search(1, points[1])
    finally:
        torch.set_num_threads(before)
    assert [point["step"] for point in points] == [4, 8]
    assert points[0]["loss_params"]["alive"] == [True, True, False, True, True]
    for one, two, three in zip(expected, found, resumed, strict=True):
        np.testing.assert_allclose(two, one, rtol=1e-9)
        np.testing.assert_allclose(three, one, rtol=1e-9)
    moved = [
        not np.array_equal(one, program.loss_params)
        for one, program in zip(expected, programs, strict=True)
    ]
    assert moved == [True, True, False, True, True]


def test_archive_comes_back_exactly() -> None:
    search = GPSearch(Engine(make_task("linear"), "linear", TRAINING, CPU), SETTINGS, 0)
    search.run()
    found = restore_archive(describe_archive(search.archive, before=99))
    assert found == search.archive


def test_individuals_come_back_exactly() -> None:
    variation = Variation(VARIATION)
    with global_random(random.Random(0)):
        for individual in variation.initial_population(50):
            found = variation.build_individual(to_expression(individual))
            assert [node.name for node in found] == [node.name for node in individual]


@pytest.mark.parametrize("model", ["linear", "mlp", "gru", "lenet5"])
@pytest.mark.parametrize(
    "training",
    [TRAINING, TrainingSettings(16, 0.01, optimizer="adam"), TrainingSettings(16, 0.05)],
    ids=["nesterov", "adam", "sgd"],
)
def test_a_training_goes_on_exactly(model: str, training: TrainingSettings) -> None:
    engine = Engine(make_task(model), model, training, CPU)
    programs = [
        compile_weighted_tree(parse_expression(text))
        for text in ("square(sub(y, f(x)))", "log(sub(f(x), f(x)))", "abs(sub(y, f(x)))")
    ]
    loss = engine.population_loss(programs)

    def start() -> TrainingRun:
        return TrainingRun(engine, loss, 9, 1, num_networks=2)

    whole = start()
    whole.advance(9)
    first = start()
    first.advance(4)
    progress = first.describe()
    second = start()
    second.restore(progress)
    second.advance(9)
    expected, found = whole.evaluate("validation"), second.evaluate("validation")
    np.testing.assert_array_equal(found.metric, expected.metric)
    np.testing.assert_array_equal(found.task_loss, expected.task_loss)


def test_snapshot_fills_what_is_there_and_adds_what_is_not() -> None:
    current = {"plain": 1}
    assert restore_snapshot(current["plain"], take_snapshot(2)) == 2
    tensor = torch.zeros(3)
    assert restore_snapshot(tensor, torch.ones(3)) is tensor
    assert tensor.tolist() == [1, 1, 1]
    assert restore_snapshot([], [torch.ones(2)])[0].tolist() == [1, 1]
    with pytest.raises(CheckpointError, match="tensor"):
        restore_snapshot(torch.zeros(2), torch.zeros(3))


@pytest.mark.parametrize("points", [0, 1, 3])
def test_a_final_training_goes_on_exactly(points: int) -> None:
    engine = Engine(make_task("linear"), "linear", TRAINING, CPU)
    loss = engine.population_loss([compile_weighted_tree(parse_expression("abs(sub(y, f(x)))"))])
    splits, places = ("train", "validation", "test"), (0, 60, 100, 200)
    expected = list(engine.train(loss, 200, 1, evaluate_at=places, splits=splits))
    left, progress = points, None

    def stop(describe: Callable[[], Any]) -> None:
        nonlocal left, progress
        left -= 1
        if left < 0:
            progress = take_snapshot(describe())
            raise Kill

    found = []
    disturbed = engine.train(loss, 200, 1, evaluate_at=places, splits=splits, at_safe_point=stop)
    with pytest.raises(Kill):
        found.extend(disturbed)
    found += engine.train(loss, 200, 1, evaluate_at=places, splits=splits, resume=progress)
    assert repr(found) == repr(expected)
