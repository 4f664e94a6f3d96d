"""The engine where it is not plain: Adam, several networks a loss, little memory, divergence, threads."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path as FilePath

import numpy as np
import pytest
import torch
from toy_tasks import make_toy_task

import oracle
from evoloss.config_file import read_config
from evoloss.engine import Engine, LocalSearchSettings, TaskLoss, TrainingRun, TrainingSettings
from evoloss.engine.engine import FAST_PATHS
from evoloss.engine.general import GeneralPath
from evoloss.engine.path import Path
from evoloss.engine.precision import set_torch_kernels
from evoloss.engine.streams import draw_batches
from evoloss.engine.threads import map_on_threads
from evoloss.errors import ConfigError
from evoloss.expressions import Program, compile_weighted_tree, parse_expression
from evoloss.search.gp_search import GPSearch
from evoloss.stages.searching import build_search_settings
from evoloss.tasks import Task

CPU = torch.device("cpu")
PLAIN = TrainingSettings(16, 0.05, precision="float64")
ADAM = replace(PLAIN, optimizer="adam", learning_rate=0.01, weight_decay=1e-2)
FORMULAS = (
    "mul(-1, mul(y, log(f(x))))",
    "square(sub(y, f(x)))",
    "add(mul(square(sub(y, f(x))), tanh(f(x))), aq(sub(f(x), y), add(y, f(x))))",
)


def compile_formulas(*formulas: str) -> list[Program]:
    return [compile_weighted_tree(parse_expression(formula)) for formula in formulas]


def make_tasks(kind: str = "classification") -> dict[str, Task]:
    outputs = 3 if kind == "classification" else 1
    tasks = {
        name: make_toy_task(kind, input_shape=shape, num_outputs=outputs, rows=20)
        for name, shape in {"linear": (6,), "mlp": (6,), "lenet5": (1, 28, 28)}.items()
    }
    if kind == "classification":
        text = make_toy_task(input_shape=(16,), vocabulary_size=12, rows=20)
        tasks |= {"char_cnn": text, "gru": text}
    return tasks


def make_task(model_name: str) -> Task:
    return make_tasks()[model_name]


@pytest.mark.parametrize("model_name", ["linear", "mlp", "lenet5", "char_cnn"])
def test_training_equals_torch_adam(model_name: str) -> None:
    engine = Engine(make_task(model_name), model_name, ADAM, CPU)
    programs = compile_formulas(*FORMULAS)
    found = list(engine.train(engine.population_loss(programs), 7, 5, splits=("test",)))[-1]
    batches = draw_batches(20, 16, 7, 5, "batches")
    for p, program in enumerate(programs):
        model = engine.build_model(5)
        oracle.train(engine.task, model, program, ADAM, batches)
        test = (engine.task.test.x, engine.task.test.y)
        _, expected = oracle.measure(engine.task, model, test)
        assert found.task_loss[p] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("model_name", ["linear", "mlp"])
@pytest.mark.parametrize("settings", [ADAM, replace(PLAIN, momentum=0.9)], ids=["adam", "sgd"])
def test_losers_leave_with_their_optimiser(model_name: str, settings: TrainingSettings) -> None:
    """Who stays goes on as if the others had never been there."""
    engine = Engine(make_task(model_name), model_name, settings, CPU)
    programs = compile_formulas(*FORMULAS)
    run = TrainingRun(engine, engine.population_loss(programs), 9, 0, num_networks=2)
    run.advance(4)
    run.keep([2, 0])
    run.advance(9)
    alone = [engine.compute_fitness([programs[p]], 9, 0, num_networks=2)[0] for p in (2, 0)]
    np.testing.assert_allclose(run.evaluate("validation").metric, alone, rtol=1e-12)


def test_local_search_through_adam_is_refused() -> None:
    engine = Engine(make_toy_task(), "linear", ADAM, CPU)
    with pytest.raises(ConfigError, match=r"training.optimizer: adam .*methods: evomal"):
        engine.local_search(compile_formulas(FORMULAS[1]), LocalSearchSettings(2, 1, 0.01), 0)


@pytest.mark.parametrize("model_name", ["linear", "lenet5"])
def test_fitness_over_several_networks_is_the_mean_of_single_ones(model_name: str) -> None:
    engine = Engine(make_task(model_name), model_name, PLAIN, CPU)
    programs = compile_formulas(*FORMULAS)
    batches = draw_batches(20, 16, 5, 3, "fitness", "batches")
    validation = (engine.task.validation.x, engine.task.validation.y)
    expected = []
    for program in programs:
        metrics = []
        for stream in ((), ("network", 1), ("network", 2)):
            model = engine.build_model(3, "fitness", *stream)
            oracle.train(engine.task, model, program, PLAIN, batches)
            metrics.append(oracle.measure(engine.task, model, validation)[0])
        expected.append(np.mean(metrics))
    found = engine.compute_fitness(programs, 5, 3, "fitness", num_networks=3)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    # the task loss, whose population has no programs
    run = TrainingRun(engine, TaskLoss(engine.task, 2), 5, 3, "fitness", num_networks=2)
    run.advance(5)
    assert run.evaluate("validation").metric.shape == (2,)


def test_one_diverged_network_makes_the_fitness_nan() -> None:
    """At a rate where some initial parameters diverge under x^4 and others do not yet."""
    task = make_toy_task("regression", num_outputs=1)
    engine = Engine(task, "linear", replace(PLAIN, learning_rate=0.04), CPU)
    programs = compile_formulas("square(square(sub(f(x), y)))", FORMULAS[1])
    streams = [(0,), *((0, "network", s) for s in range(1, 6))]
    run = TrainingRun(engine, engine.population_loss(programs), 40, 0, num_networks=6)
    run.advance(40)
    mean = run.evaluate("validation").metric
    batches = draw_batches(60, 16, 40, 0, "batches")
    diverged = []
    for stream in streams:
        model = engine.build_model(*stream)
        oracle.train(engine.task, model, programs[0], engine.settings, batches)
        diverged.append(not torch.isfinite(model(engine.task.validation.x)).all().item())
    assert any(diverged)
    assert not all(diverged)
    assert np.isnan(mean[0])
    assert np.isfinite(mean[1])


@pytest.mark.parametrize(("precision", "expected"), [("tf32", True), ("float32", False)])
def test_products_on_a_gpu_are_set_and_restored(precision: str, expected: bool) -> None:
    """The switches exist without a GPU too; what was set before comes back, also after an error."""
    products, layers = torch.backends.cuda.matmul, torch.backends.cudnn
    before = (products.allow_tf32, layers.allow_tf32)

    def fail() -> None:
        with set_torch_kernels(precision, torch.device("cuda")):
            assert (products.allow_tf32, layers.allow_tf32) == (expected, expected)
            raise ConfigError("inside")

    with pytest.raises(ConfigError, match="inside"):
        fail()
    assert (products.allow_tf32, layers.allow_tf32) == before
    with set_torch_kernels(precision, CPU):
        assert (products.allow_tf32, layers.allow_tf32) == before


def test_tf32_on_a_cpu_is_float32(caplog: pytest.LogCaptureFixture) -> None:
    task, programs = make_toy_task(), compile_formulas(*FORMULAS)
    with caplog.at_level(logging.INFO, "evoloss"):
        results = [
            Engine(task, "linear", replace(PLAIN, precision=precision), CPU).compute_fitness(
                programs, 9, 0
            )
            for precision in ("float32", "tf32")
        ]
    assert results[0].tolist() == results[1].tolist()
    assert [r.message for r in caplog.records if "tf32" in r.message] == [
        "training.precision: tf32 is a GPU's; on cpu it is float32"
    ]


@pytest.mark.parametrize("model_name", ["linear", "mlp", "lenet5", "char_cnn", "gru"])
def test_bf16_is_close_to_float32(model_name: str) -> None:
    """bfloat16 has 8 significant bits; the loss and what leaves the network are float32."""
    losses = {}
    for precision in ("float32", "bf16"):
        settings = replace(PLAIN, precision=precision)
        engine = Engine(make_task(model_name), model_name, settings, CPU)
        loss = engine.population_loss(compile_formulas(*FORMULAS))
        losses[precision] = list(engine.train(loss, 10, 0))[-1].task_loss
    assert losses["bf16"].tolist() != losses["float32"].tolist()
    np.testing.assert_allclose(losses["bf16"], losses["float32"], rtol=0.03)


BAD = {
    "inf": "mul(1e200, square(square(mul(1e200, sub(f(x), y)))))",
    "nan": "sub(square(mul(1e200, f(x))), square(mul(1e200, add(f(x), y))))",
    "late": "mul(1e6, square(square(square(add(f(x), f(x))))))",
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("path", [*FAST_PATHS, GeneralPath], ids=lambda path: path.name)
def test_divergence_ends_a_candidate_never_its_neighbours(path: type[Path], bad: str) -> None:
    """In every path: training and local search go on for the others as if the bad loss were not there."""
    settings = replace(PLAIN, learning_rate=0.05, momentum=0.9)
    kind = "regression" if bad == "late" else "classification"
    engines = [Engine(task, name, settings, CPU) for name, task in make_tasks(kind).items()]
    able = [
        engine
        for engine in engines
        if path.find_obstacle(engine.task, engine.build_model(0), settings) is None
    ]
    # a path for GPUs does not offer itself here, but works
    engine = (able or engines)[0]
    engine.path = path(engine.task, engine.build_model(0), settings)
    good, other = compile_formulas(FORMULAS[1], "mul(0.5, square(sub(y, f(x))))")
    (broken,) = compile_formulas(BAD[bad])
    fitness = engine.compute_fitness([good, broken, other], 12, 0)
    assert np.isnan(fitness[1])
    np.testing.assert_allclose(fitness[[0, 2]], engine.compute_fitness([good, other], 12, 0))
    search = LocalSearchSettings(3, 1, 0.01)
    tuned = engine.local_search([good, broken, other], search, 1)
    expected = engine.local_search([good, other], search, 1)
    np.testing.assert_allclose(tuned[0].weights, expected[0].weights, rtol=1e-9)
    np.testing.assert_allclose(tuned[2].weights, expected[1].weights, rtol=1e-9)
    assert np.isfinite(tuned[1].weights).all()
    if bad != "late":
        assert tuned[1].weights.tolist() == broken.weights.tolist()


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_weights_that_no_float32_holds_end_a_candidate_without_a_warning() -> None:
    engine = Engine(make_toy_task("regression"), "linear", replace(PLAIN, precision="float32"), CPU)
    (huge,) = compile_formulas("square(mul(1e200, sub(y, f(x))))")
    loss = engine.population_loss([huge])
    loss.set_weights(huge.weights)
    assert np.isinf(loss.packed.weights).any()
    assert np.isnan(engine.compute_fitness([huge], 3, 0)).all()


@pytest.fixture
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("model_name", ["mlp", "lenet5", "char_cnn", "gru"])
def test_threads_change_no_result(model_name: str) -> None:
    engine = Engine(make_task(model_name), model_name, PLAIN, CPU)
    engine.path = GeneralPath(engine.task, engine.build_model(0), PLAIN)
    programs = compile_formulas(*FORMULAS, "mul(0.5, square(sub(y, f(x))))", "abs(sub(y, f(x)))")
    results = []
    for threads in (2, 1):
        torch.set_num_threads(threads)
        tuned = engine.local_search(programs, LocalSearchSettings(3, 1, 0.01), 1)
        evaluation = list(engine.train(engine.population_loss(tuned), 5, 0))[-1]
        results.append((np.concatenate([p.weights for p in tuned]), evaluation.task_loss))
    for two, one in zip(*results, strict=True):
        np.testing.assert_allclose(two, one, rtol=1e-9)


@pytest.mark.usefixtures("two_threads")
def test_an_error_in_a_thread_is_raised_and_leaves_the_threads_as_they_were() -> None:
    def work(worker: list[int], item: int) -> int:
        if item == 3:
            raise ConfigError("item 3")
        worker.append(item)
        return torch.get_num_threads()

    with pytest.raises(ConfigError, match="item 3"):
        map_on_threads(list[int], work, range(6))
    assert torch.get_num_threads() == 2
    assert map_on_threads(list[int], work, range(3)) == [1, 1, 1]
    assert map_on_threads(list[int], work, range(1)) == [2]
    assert torch.get_num_threads() == 2


def test_a_search_averages_over_networks() -> None:
    """The configured number reaches the fitness: that of the best loss is found again by hand."""
    config = read_config(FilePath(__file__).parents[2] / "workflow" / "presets" / "tiny.yaml")
    search = {**config["search"], "num_networks": 3, "population_size": 8, "racing_rungs": []}
    settings = build_search_settings(search, {})
    engine = Engine(make_toy_task(), "linear", PLAIN, CPU)
    (best, *_) = GPSearch(engine, settings, 0).run().front
    programs = [compile_weighted_tree(best.tree)]
    values = [
        engine.compute_fitness(programs, settings.fitness_steps, 0, "fitness", num_networks=count)[
            0
        ]
        for count in (3, 1)
    ]
    assert best.fitness == pytest.approx(values[0], rel=1e-12)
    assert values[0] != values[1]
