"""The fast path of linear models against the general path and the oracle."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from toy_tasks import make_toy_task

import oracle
from evoloss.engine import PopulationLoss, TaskLoss, TrainingSettings
from evoloss.engine.general import GeneralPath
from evoloss.engine.linear import LinearPath, gram_pays
from evoloss.engine.path import Path
from evoloss.engine.streams import Batch, draw_batches
from evoloss.expressions import Program, compile_weighted_tree, parse_expression
from evoloss.tasks import Split, Task

PLAIN = TrainingSettings(16, 0.05, precision="float64")
SETTINGS = {
    "sgd": PLAIN,
    "decay": replace(PLAIN, weight_decay=5e-2),
    "heavy": replace(PLAIN, learning_rate=0.02, momentum=0.8, weight_decay=5e-3),
    "nesterov": replace(PLAIN, learning_rate=0.01, momentum=0.9, nesterov=True, weight_decay=5e-3),
    "adam": replace(PLAIN, optimizer="adam", learning_rate=0.01, weight_decay=1e-3),
}
MANY = 300
"""Rows of a batch whose Gram matrix is not formed: see `gram_pays`."""

# none of them is singular where the toy tasks evaluate it
FORMULAS = (
    "square(sub(y, f(x)))",
    "add(mul(square(sub(y, f(x))), tanh(f(x))), aq(sub(f(x), y), add(y, f(x))))",
    "square(square(sub(y, f(x))))",
    "sqrt(add(1, abs(sub(y, mul(f(x), f(x))))))",
)
KINDS = {
    "one output": ("regression", 1),
    "two outputs": ("regression", 2),
    "binary": ("classification", 1),
    "classes": ("classification", 3),
}


def make_task(kind: str, rows: int = 60) -> Task:
    name, outputs = KINDS[kind]
    if kind != "binary":
        return make_toy_task(name, num_outputs=outputs, rows=rows)
    return replace(make_toy_task(num_outputs=2, rows=rows), num_outputs=1)


def make_network(num_outputs: int, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(6, num_outputs)).double()


def weighted(formula: str, seed: int) -> Program:
    program = compile_weighted_tree(parse_expression(formula))
    noise = np.random.default_rng(seed).normal(0, 0.05, len(program.loss_params))
    return program.with_loss_params(program.loss_params * (1 + noise))


def make_loss(task: Task, dtype: torch.dtype = torch.float64) -> PopulationLoss:
    programs = [weighted(formula, seed) for seed, formula in enumerate(FORMULAS)]
    return PopulationLoss(task, programs, dtype)


def take(task: Task, split: Split, count: int) -> Batch:
    y = split.y[:count]
    return Batch(split.x[:count], y, task.encode_targets(y, split.x.dtype))


def train(path: Path, task: Task, loss: PopulationLoss, models: list[nn.Module]) -> Tensor:
    """Return validation outputs after 3 and 2 steps of all networks and 4 more of all but the first, backwards."""
    batches = draw_batches(60, 16, 9, 1)
    targets = task.encode_targets(task.train.y, task.train.x.dtype)
    state = path.start(models)
    path.advance(state, loss, task.train.x, targets, batches[:3])
    path.advance(state, loss, task.train.x, targets, batches[3:5])
    keep = list(range(loss.size - 1, 0, -1))
    state = path.select(state, keep)
    path.advance(state, loss.select(keep), task.train.x, targets, batches[5:])
    return path.outputs(state, task.validation.x)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_training_equals_the_general_path(
    kind: str, settings: TrainingSettings, threads: int
) -> None:
    task = make_task(kind)
    loss = make_loss(task)
    models = [make_network(task.num_outputs, seed % 2) for seed in range(loss.size)]
    before = [p.clone() for p in models[0].parameters()]
    path = LinearPath(task, models[0], settings)
    torch.set_num_threads(threads)
    try:
        found = train(path, task, loss, models)
    finally:
        torch.set_num_threads(1)
    expected = train(GeneralPath(task, models[0], settings), task, loss, models)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    for p, value in zip(models[0].parameters(), before, strict=True):
        assert torch.equal(p, value)


@pytest.mark.parametrize(
    ("num_inner", "num_outer"), [(4, 4), (4, 30), (30, 5), (MANY, MANY), (MANY, 7)]
)
@pytest.mark.parametrize(
    "settings", [SETTINGS["sgd"], SETTINGS["decay"], SETTINGS["nesterov"]], ids=["sgd", "wd", "nag"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_meta_gradient_equals_double_backprop(
    kind: str, settings: TrainingSettings, num_inner: int, num_outer: int
) -> None:
    task = make_task(kind, rows=max(60, num_inner))
    task = replace(
        task, validation=Split(*(t[:num_outer] for t in (task.validation.x, task.validation.y)))
    )
    loss = make_loss(task)
    model = make_network(task.num_outputs)
    inner, outer = take(task, task.train, num_inner), take(task, task.validation, num_outer)
    path = LinearPath(task, model, replace(settings, batch_size=num_inner))
    context = path.prepare(model, inner, outer)
    # a Gram matrix of large batches would take much memory, and time
    assert len(context.gram) == (1 if gram_pays(num_inner, num_outer, 6) else 2)
    values, gradient = path.meta_gradients(context, loss)
    for p, program in enumerate(loss.programs):
        value, expected = oracle.compute_meta_gradient(
            task, model, program, settings, [(inner.x, inner.y)], (outer.x, outer.y)
        )
        found = gradient[loss.offsets[p] : loss.offsets[p + 1]]
        assert values[p].item() == pytest.approx(value, rel=1e-9)
        assert np.linalg.norm(found - expected) <= 1e-8 * np.linalg.norm(expected)


@pytest.mark.parametrize("size", [16, MANY])
def test_float32_meta_gradients_are_accurate(size: int) -> None:
    task = make_task("classes", rows=max(60, size))
    gradients: list[NDArray[np.float64]] = []
    for dtype in (torch.float32, torch.float64):
        moved, network = task.to("cpu", dtype), make_network(3).to(dtype)
        path = LinearPath(moved, network, replace(PLAIN, batch_size=size))
        batches = take(moved, moved.train, size), take(moved, moved.validation, size)
        loss = make_loss(moved, dtype)
        gradients.append(path.meta_gradients(path.prepare(network, *batches), loss)[1])
    for single, double in zip(*(np.split(g, loss.offsets[1:-1]) for g in gradients), strict=True):
        assert np.linalg.norm(single - double) <= 3e-6 * np.linalg.norm(double)


@pytest.mark.parametrize("kind", ["one output", "classes"])
def test_divergence_ends_a_network_never_its_neighbours(kind: str) -> None:
    task = make_task(kind)
    bad = weighted("mul(1e200, square(square(square(mul(1e100, sub(f(x), y))))))", 0)
    good = weighted("mul(1e-3, square(sub(f(x), y)))", 0)
    model = make_network(task.num_outputs)
    inner, outer = take(task, task.train, 4), take(task, task.validation, 4)
    outputs, values = [], []
    for programs in ([good], [bad, good, bad, good]):
        loss = PopulationLoss(task, programs, torch.float64)
        path = LinearPath(task, model, PLAIN)
        state = path.start([model] * loss.size)
        targets = task.encode_targets(task.train.y, torch.float64)
        path.advance(state, loss, task.train.x, targets, draw_batches(60, 16, 5, 0))
        outputs.append(path.outputs(state, task.validation.x))
        values.append(path.meta_gradients(path.prepare(model, inner, outer), loss)[0])
    for p in (0, 2):
        assert not outputs[1][p].isfinite().all()
        assert not values[1][p].isfinite()
    for p in (1, 3):
        torch.testing.assert_close(outputs[1][p], outputs[0][0], rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(values[1][p], values[0][0], rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_do_not_depend_on_the_memory_order_of_outputs(kind: str) -> None:
    task = make_task(kind)
    y = task.train.y[:16]
    targets = task.encode_targets(y, torch.float64)
    loss = make_loss(task)
    outputs, direction = torch.randn(
        2, loss.size, 16, task.num_outputs, dtype=torch.float64,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    turned, turned_direction = (t.mT.contiguous().mT for t in (outputs, direction))
    assert task.num_outputs == 1 or not turned.is_contiguous()
    found = loss.output_gradients(turned, targets)
    assert found.stride() == turned.stride()
    torch.testing.assert_close(found, loss.output_gradients(outputs, targets))
    np.testing.assert_allclose(
        loss.weight_gradients(turned, targets, turned_direction),
        loss.weight_gradients(outputs, targets, direction),
        rtol=1e-10,
    )
    own = TaskLoss(task, loss.size)
    pairs = [own.values_and_gradients(t, targets, y) for t in (turned, outputs)]
    for one, other in zip(*pairs, strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(pairs[0][0], task.compute_task_loss(outputs, y))


def test_what_it_cannot_handle_is_named() -> None:
    task = make_task("classes")
    for layers in (
        [nn.Linear(6, 4), nn.Linear(4, 3)],
        [nn.Linear(6, 3, bias=False)],
        [nn.Linear(6, 3), nn.Tanh()],
    ):
        assert LinearPath.find_obstacle(task, nn.Sequential(*layers), PLAIN) is not None
    assert LinearPath.find_obstacle(task, make_network(3), PLAIN) is None
