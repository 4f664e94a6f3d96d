"""The batched path (made for GPUs) does on any device what the general path and plain autograd do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from test_engine import CPU, FORMULAS, HEAVY_BALL, NESTEROV, PLAIN, make_task, weighted
from torch import nn
from toy_tasks import make_toy_task

from evoloss.engine import Engine, LocalSearchSettings, TrainingSettings
from evoloss.engine import batched as batched_module
from evoloss.engine.batched import BatchedPath, count_activations
from evoloss.engine.cuda_graphs import StepRunner
from evoloss.engine.general import GeneralPath
from evoloss.engine.path import Path
from evoloss.tasks import Split, Task, models

MODELS = ("linear", "mlp", "lenet5", "char_cnn", "gru")
ADAM = TrainingSettings(16, 0.01, precision="float64", optimizer="adam", weight_decay=1e-3)
SETTINGS = {"sgd": PLAIN, "heavy": HEAVY_BALL, "nesterov": NESTEROV, "adam": ADAM}


def make_engine(
    path: type[Path], task: Task, model_name: str, settings: TrainingSettings, **options: Any
) -> Engine:
    engine = Engine(task, model_name, settings, CPU, **options)
    engine.path = path(engine.task, engine.build_model(0), engine.settings)
    return engine


def formulas_for(model_name: str) -> list[str]:
    """A logarithm of a regression's outputs is singular."""
    return list(FORMULAS[model_name == "mlp" :])


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("model_name", MODELS)
def test_training_equals_general_path(model_name: str, settings: TrainingSettings) -> None:
    task = make_task(model_name)
    results = []
    for path in (BatchedPath, GeneralPath):
        engine = make_engine(path, task, model_name, settings)
        programs = [weighted(formula) for formula in formulas_for(model_name)]
        loss = engine.population_loss(programs)
        evaluations = engine.train(
            loss, 6, 1, evaluate_at=(0, 3), splits=("train", "validation", "test")
        )
        results.append(np.stack([evaluation.task_loss for evaluation in evaluations]))
    np.testing.assert_allclose(results[0], results[1], rtol=1e-9)


@pytest.mark.parametrize("settings", [PLAIN, NESTEROV], ids=["sgd", "nesterov"])
@pytest.mark.parametrize("model_name", MODELS)
def test_meta_gradients_equal_general_path(model_name: str, settings: TrainingSettings) -> None:
    """The general path's are compared with double backpropagation in test_engine."""
    task = make_task(model_name)
    results = []
    for path in (BatchedPath, GeneralPath):
        engine = make_engine(path, task, model_name, settings)
        loss = engine.population_loss([weighted(f) for f in formulas_for(model_name)])
        inner = engine.batch("train", torch.arange(5))
        outer = engine.batch("validation", torch.arange(4))
        context = engine.prepare(engine.build_model(3), [inner], outer)
        assert context.nbytes > inner.x.nbytes
        results.append(engine.meta_gradients(context, loss))
    for found, expected in zip(*results, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_local_search_equals_general_path() -> None:
    task = make_toy_task()
    tuned = []
    for path in (BatchedPath, GeneralPath):
        engine = make_engine(path, task, "mlp", NESTEROV, widths=(20, 20))
        programs = [weighted(formula) for formula in FORMULAS]
        found = engine.local_search(programs, LocalSearchSettings(6, 1, 0.01), 2)
        tuned.append(np.concatenate([program.weights for program in found]))
    np.testing.assert_allclose(tuned[0], tuned[1], rtol=1e-9)


def test_what_cannot_be_differentiated_in_bf16_is_not_batched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Training alone would pass; a meta-step would end the job."""
    layers = (nn.Linear(6, 4), nn.LayerNorm(4), nn.Linear(4, 3))
    monkeypatch.setitem(models.MODELS, "mine", lambda task: nn.Sequential(*layers))
    failures = {}
    for precision in ("float32", "bf16"):
        engine = Engine(
            make_toy_task(), "mine", TrainingSettings(16, 0.1, precision=precision), CPU
        )
        path = BatchedPath(engine.task, engine.build_model(0), engine.settings)
        failures[precision] = path.find_failure(engine.task.train.x[:2])
    assert failures["float32"] is None
    assert "torch.func cannot batch it: " in str(failures["bf16"])


class Masking(nn.Module):
    """It keeps a mask that was computed of a network's hidden values."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.masks: dict[int, torch.Tensor] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.layer(x)
        if len(x) not in self.masks:
            self.masks[len(x)] = torch.ones_like(hidden)
        return hidden * self.masks[len(x)]


def test_what_is_kept_under_vmap_is_not_batched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.MODELS, "mine", lambda task: Masking())
    engine = Engine(make_toy_task(), "mine", TrainingSettings(16, 0.1), CPU)
    model = Masking()
    failure = BatchedPath(engine.task, model, engine.settings).find_failure(engine.task.train.x[:2])
    assert "torch.func cannot batch it: " in str(failure)
    program = weighted(FORMULAS[0])
    assert engine.compute_fitness([program], 3, 0) >= 0
    engine.local_search([program], LocalSearchSettings(2, 1, 0.01), 0)


def test_float32_is_accurate() -> None:
    task = make_task("lenet5")
    found, expected = (
        make_engine(BatchedPath, task, "lenet5", replace(NESTEROV, precision=precision))
        for precision in ("float32", "float64")
    )
    programs = [weighted(formula) for formula in FORMULAS]
    losses = [
        list(engine.train(engine.population_loss(programs), 8, 0))[-1].task_loss
        for engine in (found, expected)
    ]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_select_keeps_networks_and_their_optimiser(settings: TrainingSettings) -> None:
    task = make_task("lenet5")
    engine = make_engine(BatchedPath, task, "lenet5", settings)
    loss = engine.population_loss([weighted(formula) for formula in FORMULAS])
    train, path = engine.task.train, engine.path
    batches = torch.arange(48).reshape(6, 8) % len(train)

    def advance(state: Any, own: Any, steps: torch.Tensor) -> None:
        path.advance(state, own, train.x, engine.encoded_targets["train"], steps)

    models = [engine.build_model(number) for number in range(3)]
    whole = path.start(models)
    advance(whole, loss, batches)
    some = path.start(models)
    advance(some, loss, batches[:3])
    some = path.select(some, [2, 0])
    advance(some, loss.select([2, 0]), batches[3:])
    x = task.test.x
    torch.testing.assert_close(path.outputs(some, x), path.outputs(whole, x)[[2, 0]])
    for p, model in enumerate(models):
        alone = path.start([model])
        advance(alone, loss.select([p]), batches)
        torch.testing.assert_close(path.outputs(alone, x)[0], path.outputs(whole, x)[p])


def test_networks_start_as_their_models() -> None:
    engine = make_engine(BatchedPath, make_task("gru"), "gru", PLAIN)
    models = [engine.build_model(number) for number in range(3)]
    x = engine.task.test.x
    with torch.no_grad():
        expected = torch.stack([model(x) for model in models])
    torch.testing.assert_close(engine.path.outputs(engine.path.start(models), x), expected)


@pytest.mark.parametrize("model_name", ["mlp", "lenet5"])
def test_divergence_ends_a_candidate_never_its_neighbours(model_name: str) -> None:
    settings = replace(PLAIN, learning_rate=1e3)
    engine = make_engine(BatchedPath, make_task(model_name), model_name, settings)
    bad = weighted("square(square(mul(1e200, sub(f(x), y))))")
    good = weighted("mul(1e-9, sub(f(x), y))")
    together = engine.compute_fitness([bad, good], 5, 0)
    alone = engine.compute_fitness([good], 5, 0)
    assert np.isnan(together[0])
    np.testing.assert_allclose(together[1:], alone, rtol=1e-12)


class _Reservoir(nn.Module):
    """A frozen layer, a parameter used twice and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(6, 5)
        self.frozen.requires_grad_(False)
        self.tied = nn.Linear(5, 5)
        self.output = nn.Linear(5, 3)
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.tied(torch.tanh(self.tied(self.frozen(x)) * self.scale))
        outputs: torch.Tensor = self.output(hidden)
        return outputs


def test_frozen_and_tied_parameters_and_buffers() -> None:
    task = make_toy_task()
    torch.manual_seed(0)
    model = _Reservoir().double()
    engine = Engine(task, "linear", NESTEROV, CPU)
    loss = engine.population_loss([weighted(formula) for formula in FORMULAS])
    batches = torch.arange(48).reshape(6, 8)
    results = []
    for path in (BatchedPath(task, model, NESTEROV), GeneralPath(task, model, NESTEROV)):
        state = path.start([model] * 3)
        targets = engine.encoded_targets["train"]
        path.advance(state, loss, task.train.x, targets, batches)
        inner, outer = engine.batch("train", batches[0]), engine.batch("validation", batches[1])
        gradient = path.meta_gradients(path.prepare(model, inner, outer), loss)[1]
        results.append((path.outputs(state, task.test.x).numpy(), gradient))
    for found, expected in zip(*results, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_outputs_do_not_depend_on_the_rows_taken_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(BatchedPath, make_task("char_cnn"), "char_cnn", PLAIN)
    state = engine.path.start([engine.build_model(number) for number in range(3)])
    x = engine.task.test.x
    at_once = engine.path.outputs(state, x)
    monkeypatch.setattr(batched_module, "OUTPUT_ROWS", 7)
    torch.testing.assert_close(engine.path.outputs(state, x), at_once)


def test_obstacles_are_named() -> None:
    """A CPU's; and, on tensors without storage, those of a device: size and what vmap cannot batch."""
    task = make_toy_task()
    model = nn.Sequential(nn.Linear(6, 3)).double()
    assert "CPU" in str(BatchedPath.find_obstacle(task, model, PLAIN))
    x = task.train.x.to("meta")
    elsewhere = replace(task, train=Split(x, task.train.y.to("meta")))
    wide = nn.Sequential(nn.Linear(6, 600_000), nn.Linear(600_000, 3)).to("meta", torch.float64)
    assert "6,000,003 parameters" in str(BatchedPath.find_obstacle(elsewhere, wide, PLAIN))
    many = nn.Sequential(nn.Linear(6, 30_000), nn.Tanh(), nn.Linear(30_000, 3)).to("meta")
    large = replace(PLAIN, batch_size=2048)
    obstacle = BatchedPath.find_obstacle(elsewhere, many.double(), large)
    assert "activations" in str(obstacle)
    dropout = nn.Sequential(nn.Linear(6, 3), nn.Dropout()).to("meta", torch.float64)
    assert "vmap" in str(BatchedPath.find_obstacle(elsewhere, dropout, PLAIN))
    assert BatchedPath.find_obstacle(elsewhere, model.to("meta"), PLAIN) is None


def test_activations_are_counted_by_batch() -> None:
    """A tanh keeps its output; the first layer its input."""
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3))
    found = count_activations(model, torch.randn(5, 6), 128)
    # the tanh's output is kept twice: by itself, and as the next layer's input
    assert found == 128 * (6 + 10 + 10)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("model_name", MODELS)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_graph_equals_ordinary_steps(
    model_name: str, settings: TrainingSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for switch in ("1", "0"):
        monkeypatch.setenv("EVOLOSS_CUDA_GRAPHS", switch)
        engine = Engine(make_task(model_name), model_name, settings, torch.device("cuda"))
        engine.path = BatchedPath(engine.task, engine.build_model(0), settings)
        programs = [weighted(formula) for formula in formulas_for(model_name)]
        results.append(list(engine.train(engine.population_loss(programs), 50, 0))[-1].task_loss)
    np.testing.assert_allclose(results[0], results[1], rtol=1e-9)


def test_a_runner_takes_every_step_once_in_order() -> None:
    seen: list[int] = []
    StepRunner().run(lambda rows: seen.append(int(rows[0])), torch.arange(80).reshape(40, 2))
    assert seen == list(range(0, 80, 2))
