"""The fast path of dense networks against the general path and the oracle."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import pairwise
from pathlib import Path as FilePath
from typing import Any

import numpy as np
import pytest
import torch
from expression_strategies import draw_loss
from numpy.typing import NDArray
from torch import Tensor, nn
from toy_tasks import make_toy_task

import oracle
from evoloss.config_file import read_config
from evoloss.engine import Engine, LocalSearchSettings, PopulationLoss, TrainingSettings
from evoloss.engine.dense import DensePath
from evoloss.engine.dense_layers import read_layers
from evoloss.engine.dense_meta import CHUNK_BYTES, DenseContext
from evoloss.engine.general import GeneralPath
from evoloss.engine.linear import LinearPath
from evoloss.engine.mask_products import is_worthwhile, multiply_mask
from evoloss.engine.path import Path
from evoloss.engine.products import has_onednn, product
from evoloss.engine.snapshot import restore_snapshot, take_snapshot
from evoloss.engine.streams import Batch, draw_batches
from evoloss.engine.tiles import Tiles
from evoloss.errors import ConfigError
from evoloss.expressions import Program, compile_weighted_tree, parse_expression
from evoloss.stages.searching import search_loss
from evoloss.stages.setup import StageInput
from evoloss.tasks import Split, Task
from evoloss.tasks.datasets import prepare_dataset, save_dataset

CPU = torch.device("cpu")
PLAIN = TrainingSettings(16, 0.05, precision="float64")
SETTINGS = {
    "sgd": PLAIN,
    "heavy": replace(PLAIN, learning_rate=0.02, momentum=0.8, weight_decay=5e-3),
    "nesterov": replace(PLAIN, learning_rate=0.01, momentum=0.9, nesterov=True, weight_decay=5e-3),
    "adam": replace(PLAIN, optimizer="adam", learning_rate=0.01, weight_decay=1e-3),
}
# none of them is singular where the toy tasks evaluate it
FORMULAS = (
    "square(sub(y, f(x)))",
    "add(mul(square(sub(y, f(x))), tanh(f(x))), aq(sub(f(x), y), add(y, f(x))))",
    "square(square(sub(y, f(x))))",
)
KINDS = {
    "one output": ("regression", 1),
    "two outputs": ("regression", 2),
    "binary": ("classification", 1),
    "classes": ("classification", 3),
}


def make_task(kind: str) -> Task:
    name, outputs = KINDS[kind]
    if kind != "binary":
        return make_toy_task(name, num_outputs=outputs)
    task = make_toy_task(num_outputs=2)
    return replace(task, num_outputs=1)


def make_network(kind: str, num_outputs: int, seed: int = 0) -> nn.Module:
    """small: every stepped weight is formed; wide and deep: low rank, with and without biases; rectified: masks."""
    torch.manual_seed(seed)
    layers: dict[str, list[nn.Module]] = {
        "small": [nn.Flatten(), nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, num_outputs)],
        "sigmoid at the end": [
            nn.Sequential(nn.Linear(6, 9), nn.Sigmoid()),
            nn.Linear(9, num_outputs),
            nn.Sigmoid(),
        ],
        "wide": [
            nn.Flatten(), nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 30, bias=False), nn.Tanh(),
            nn.Linear(30, num_outputs),
        ],
        "deep": [
            nn.Linear(6, 50, bias=False), nn.Tanh(), nn.Linear(50, 60), nn.ReLU(),
            nn.Linear(60, 40), nn.Linear(40, num_outputs, bias=False),
        ],
        "rectified": [
            nn.Linear(6, 41), nn.ReLU(), nn.Linear(41, 35), nn.ReLU(), nn.Linear(35, num_outputs),
        ],
    }  # fmt: skip
    return nn.Sequential(*layers[kind]).double()


NETWORKS = ("small", "sigmoid at the end", "wide", "deep", "rectified")


@pytest.fixture
def masks_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of masks and of a ReLU's values without its zeros are used however small they are."""
    for name in ("mask_products.MIN_TERMS", "sparse_products.MIN_ROWS"):
        monkeypatch.setattr(f"evoloss.engine.{name}", 1)
    for name in ("mask_products", "sparse_products"):
        monkeypatch.setattr(f"evoloss.engine.{name}.MIN_MULTIPLICATIONS", 1)
    monkeypatch.setattr("evoloss.engine.sparse_products.MAX_PADDING", float("inf"))


def weighted(formula: str, seed: int) -> Program:
    program = compile_weighted_tree(parse_expression(formula))
    noise = np.random.default_rng(seed).normal(0, 0.05, len(program.loss_params))
    return program.with_loss_params(program.loss_params * (1 + noise))


def make_loss(task: Task, count: int = 5) -> PopulationLoss:
    programs = [weighted(FORMULAS[i % len(FORMULAS)], i) for i in range(count)]
    return PopulationLoss(task, programs, torch.float64)


def take(task: Task, split: Split, count: int) -> Batch:
    y = split.y[:count]
    return Batch(split.x[:count], y, task.encode_targets(y, split.x.dtype))


def train(path: Path, task: Task, loss: PopulationLoss, models: list[nn.Module]) -> Tensor:
    """Return validation outputs after 5 steps of all networks and 4 more of all but the first, backwards."""
    batches = draw_batches(60, 16, 9, 1)
    targets = task.encode_targets(task.train.y, task.train.x.dtype)
    state = path.start(models)
    path.advance(state, loss, task.train.x, targets, batches[:5])
    keep = list(range(loss.size - 1, 0, -1))
    state = path.select(state, keep)
    path.advance(state, loss.select(keep), task.train.x, targets, batches[5:])
    return path.outputs(state, task.validation.x)


@pytest.mark.usefixtures("masks_everywhere")
@pytest.mark.parametrize("stack_size", [1, 2, 100])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("network", NETWORKS)
def test_training_equals_the_general_path(
    network: str, kind: str, settings: TrainingSettings, stack_size: int
) -> None:
    task = make_task(kind)
    loss = make_loss(task)
    models = [make_network(network, task.num_outputs, seed % 2) for seed in range(loss.size)]
    before = [p.clone() for p in models[0].parameters()]
    path = DensePath(task, models[0], settings)
    path.stack_size = stack_size
    found = train(path, task, loss, models)
    expected = train(GeneralPath(task, models[0], settings), task, loss, models)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    for p, value in zip(models[0].parameters(), before, strict=True):
        assert torch.equal(p, value)


def test_networks_may_start_from_one_model_and_stay_apart_from_it() -> None:
    task = make_task("classes")
    loss = make_loss(task)
    model = make_network("small", 3)
    for stack_size in (1, 100):
        path = DensePath(task, model, PLAIN)
        path.stack_size = stack_size
        found = train(path, task, loss, [model] * loss.size)
        expected = train(GeneralPath(task, model, PLAIN), task, loss, [model] * loss.size)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.usefixtures("masks_everywhere")
@pytest.mark.parametrize(("num_inner", "num_outer"), [(4, 4), (4, 30), (30, 5)])
@pytest.mark.parametrize("settings", [SETTINGS["sgd"], SETTINGS["nesterov"]], ids=["sgd", "nag"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("chunk_bytes", [1, CHUNK_BYTES])
def test_meta_gradient_equals_double_backprop(
    chunk_bytes: int,
    network: str,
    kind: str,
    settings: TrainingSettings,
    num_inner: int,
    num_outer: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of candidates one by one, as large networks', and of several at a time."""
    monkeypatch.setattr("evoloss.engine.dense_meta.CHUNK_BYTES", chunk_bytes)
    task = make_task(kind)
    loss = make_loss(task)
    model = make_network(network, task.num_outputs)
    inner, outer = take(task, task.train, num_inner), take(task, task.validation, num_outer)
    path = DensePath(task, model, settings)
    values, gradient = path.meta_gradients(path.prepare(model, inner, outer), loss)
    for p, program in enumerate(loss.programs):
        value, expected = oracle.compute_meta_gradient(
            task, model, program, settings, [(inner.x, inner.y)], (outer.x, outer.y)
        )
        found = gradient[loss.offsets[p] : loss.offsets[p + 1]]
        assert values[p].item() == pytest.approx(value, rel=1e-9)
        assert np.linalg.norm(found - expected) <= 1e-8 * np.linalg.norm(expected)


@pytest.mark.usefixtures("masks_everywhere")
def test_one_output_above_a_relu_is_trained_by_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A local search too; nothing else is."""
    counts = {"products": 0}

    def count(*arguments: Any, **options: bool) -> Tiles:
        counts["products"] += 1
        return multiply_mask(*arguments, **options)

    monkeypatch.setattr("evoloss.engine.dense_masked.multiply_mask", count)
    for network, kind, stack_size, expected in (
        ("rectified", "one output", 1, 2),
        ("rectified", "binary", 1, 2),
        ("rectified", "one output", 2, 0),
        ("rectified", "classes", 1, 0),
        ("wide", "one output", 1, 0),
    ):
        counts["products"] = 0
        task = make_task(kind)
        model = make_network(network, task.num_outputs)
        path, loss = DensePath(task, model, PLAIN), make_loss(task, 2)
        path.stack_size = stack_size
        targets = task.encode_targets(task.train.y, task.train.x.dtype)
        state = path.start([model, model])
        if stack_size == 1:
            assert [len(stack) for stack in state] == [1, 1]
        tiled = [stack.params[2].dim() == 4 for stack in state]
        assert tiled == [expected == 2] * len(state)
        path.advance(state, loss, task.train.x, targets, draw_batches(60, 16, 1, 1))
        assert counts["products"] == expected * (2 // stack_size)
    counts["products"] = 0
    task = make_task("one output")
    model = make_network("rectified", 1)
    path = DensePath(task, model, PLAIN)
    context = path.prepare(model, take(task, task.train, 4), take(task, task.validation, 4))
    assert counts["products"] == 1
    path.meta_gradients(context, make_loss(task, 1))
    assert counts["products"] == 2


@pytest.mark.usefixtures("masks_everywhere")
@pytest.mark.parametrize(
    ("kind", "chunk_bytes", "tiled"),
    [("one output", 1, True), ("one output", CHUNK_BYTES, False), ("two outputs", 1, False)],
)
@pytest.mark.parametrize("are_inputs_many", [True, False])
def test_a_local_search_keeps_one_copy_of_a_weight(
    kind: str,
    chunk_bytes: int,
    tiled: bool,
    are_inputs_many: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In tiles if products of masks read it, of one candidate below a single output; zeros are left out either way."""
    monkeypatch.setattr("evoloss.engine.dense_meta.CHUNK_BYTES", chunk_bytes)
    num_inner, num_outer = 12, 16
    monkeypatch.setattr(
        "evoloss.engine.dense_meta.skipping_pays",
        lambda rows, terms, outputs: are_inputs_many or outputs != num_inner,
    )
    task = make_task(kind)
    model, loss = make_network("rectified", task.num_outputs), make_loss(task, 2)
    batches = take(task, task.train, num_inner), take(task, task.validation, num_outer)
    path = DensePath(task, model, SETTINGS["heavy"])
    context = path.prepare(model, *batches)
    assert describe_layers(context)[1] == "low rank"
    layer = context.layers[1]
    assert layer.skips_zeros
    assert isinstance(layer.weight, Tiles) == tiled
    assert (layer.tiled_inputs is not None) == are_inputs_many
    values, gradient = path.meta_gradients(context, loss)
    general = GeneralPath(task, model, SETTINGS["heavy"])
    others = general.meta_gradients(general.prepare(model, *batches), loss)
    torch.testing.assert_close(values, others[0])
    np.testing.assert_allclose(gradient, others[1], rtol=1e-9)


@pytest.mark.usefixtures("masks_everywhere")
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_layers_with_few_zeros_are_trained_alike(
    share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever share of a layer's values may be other than 0 for the zeros to be left out."""
    monkeypatch.setattr("evoloss.engine.sparse_products.MAX_SHARE", share)
    task = make_task("one output")
    loss, model = make_loss(task), make_network("rectified", 1)
    expected = train(GeneralPath(task, model, PLAIN), task, loss, [model] * loss.size)
    path = DensePath(task, model, PLAIN)
    path.stack_size = 1
    found = train(path, task, loss, [model] * loss.size)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    batches = take(task, task.train, 16), take(task, task.validation, 16)
    values, gradient = path.meta_gradients(path.prepare(model, *batches), loss)
    general = GeneralPath(task, model, PLAIN)
    others = general.meta_gradients(general.prepare(model, *batches), loss)
    torch.testing.assert_close(values, others[0])
    np.testing.assert_allclose(gradient, others[1], rtol=1e-9)


def test_large_layers_alone_are_trained_by_masks() -> None:
    """Where it is faster: of the paper's network at its batch size, not of a small one."""
    assert is_worthwhile(128, 1000, 1000)
    assert is_worthwhile(1000, 32, 1000)
    assert not is_worthwhile(1000, 16, 1000)
    assert not is_worthwhile(32, 64, 64)


def describe_layers(context: DenseContext) -> list[str]:
    return [
        "shared" if len(layer.outer) == 2 else "low rank" if layer.low_rank else "formed"
        for layer in context.layers
    ]


def test_layers_take_the_cheaper_form() -> None:
    """So the networks above cover all three forms."""
    found = {}
    for network in NETWORKS:
        task = make_task("one output")
        model = make_network(network, 1)
        path = DensePath(task, model, PLAIN)
        context = path.prepare(model, take(task, task.train, 4), take(task, task.validation, 4))
        found[network] = describe_layers(context)
        kept = [p for layer in context.layers for p in (layer.inputs, layer.jacobian)]
        assert context.nbytes >= sum(p.nbytes for p in kept)
        assert all(isinstance(layer.weight, Tensor) for layer in context.layers)
    assert found["small"] == found["sigmoid at the end"] == ["shared", "formed"]
    assert found["wide"] == ["shared", "low rank", "formed"]
    assert found["deep"] == ["shared", "low rank", "low rank", "formed"]


Gradients = list[NDArray[np.float64]]


def compute_error(found: NDArray[np.float64], expected: NDArray[np.float64]) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def test_float32_meta_gradients_are_accurate() -> None:
    """Against float64 double backprop, on random losses that are not singular.

    A loss counts as singular if weights and parameters moved by a rounding error of float32 move the float64 result by
    more than 2e-6: there no float32 computation can be accurate.
    """
    single = make_toy_task("regression", input_shape=(10,), num_outputs=1, rows=64)
    single = single.to("cpu", torch.float32)
    task = single.to("cpu", torch.float64)
    settings = TrainingSettings(64, 0.01, momentum=0.9, nesterov=True, weight_decay=5e-4)
    torch.manual_seed(0)
    layers = [nn.Linear(10, 192), nn.ReLU(), nn.Linear(192, 192), nn.ReLU(), nn.Linear(192, 1)]
    model = nn.Sequential(*layers)
    rng = np.random.default_rng(0)
    programs = []
    for _ in range(240):
        program = compile_weighted_tree(draw_loss(rng))
        factors = rng.normal(1.0, 1e-3, len(program)).astype(np.float32)
        weights = np.where(program.trainable, factors, program.weights)
        programs.append(replace(program, weights=weights.astype(np.float64)))

    def differentiate(task: Task, network: nn.Module, dtype: torch.dtype, move: float) -> Gradients:
        path = DensePath(task, network, settings)
        batches = take(task, task.train, 64), take(task, task.validation, 64)
        context = path.prepare(network, *batches)
        assert describe_layers(context) == ["formed", "low rank", "formed"]
        moved = [p.weights * (1 + rng.choice([-move, move], len(p))) for p in programs]
        pairs = zip(programs, moved, strict=True)
        loss = PopulationLoss(task, [replace(p, weights=w) for p, w in pairs], dtype)
        return np.split(path.meta_gradients(context, loss)[1], loss.offsets[1:-1])

    found = differentiate(single, model, torch.float32, 0.0)
    model.double()
    precise = differentiate(task, model, torch.float64, 0.0)
    nearby = []
    for _ in range(4):
        network = copy.deepcopy(model)
        for parameter in network.parameters():
            parameter.data *= 1 + torch.from_numpy(rng.choice([-6e-8, 6e-8], parameter.shape))
        nearby.append(differentiate(task, network, torch.float64, 6e-8))
    errors = []
    for p, program in enumerate(programs):
        usable = np.isfinite(precise[p]).all() and precise[p].any()
        if usable and max(compute_error(other[p], precise[p]) for other in nearby) <= 2e-6:
            _, expected = oracle.compute_meta_gradient(
                task, model, program, settings, [(task.train.x, task.train.y)],
                (task.validation.x, task.validation.y),
            )  # fmt: skip
            errors.append(compute_error(found[p], expected))
    assert len(errors) >= 100
    assert max(errors) <= 1e-4
    assert np.median(errors) <= 1e-6


@pytest.mark.parametrize("stack_size", [1, 100])
def test_divergence_ends_a_network_never_its_neighbours(stack_size: int) -> None:
    task = make_task("one output")
    bad = weighted("square(square(square(sub(f(x), y))))", 0)
    good = weighted("mul(1e-9, sub(f(x), y))", 0)
    model = make_network("wide", 1)
    settings = replace(PLAIN, learning_rate=1e3)
    outputs, values = [], []
    for programs in ([good], [bad, good, bad, good]):
        loss = PopulationLoss(task, programs, torch.float64)
        path = DensePath(task, model, settings)
        path.stack_size = stack_size
        state = path.start([model] * loss.size)
        targets = task.encode_targets(task.train.y)
        path.advance(state, loss, task.train.x, targets, draw_batches(60, 16, 20, 0))
        outputs.append(path.outputs(state, task.validation.x))
        settings_now = replace(settings, learning_rate=1e300)
        path = DensePath(task, model, settings_now)
        inner, outer = take(task, task.train, 4), take(task, task.validation, 4)
        values.append(path.meta_gradients(path.prepare(model, inner, outer), loss)[0])
    assert not outputs[1][0].isfinite().any()
    assert not outputs[1][2].isfinite().any()
    for p in (1, 3):
        torch.testing.assert_close(outputs[1][p], outputs[0][0], rtol=1e-12, atol=0.0)
        torch.testing.assert_close(values[1][p], values[0][0], rtol=1e-9, atol=0.0, equal_nan=True)


def test_a_saturated_unit_does_not_hide_an_infinite_weight() -> None:
    task = make_task("one output")
    model = make_network("small", 1)
    path = DensePath(task, model, PLAIN)
    state = path.start([model, model])
    state[0].params[0][1, 0, 0] = torch.inf
    outputs = path.outputs(state, torch.ones(3, 6, dtype=torch.float64))
    assert outputs[0].isfinite().all()
    assert outputs[1].isnan().all()


@pytest.mark.usefixtures("masks_everywhere")
@pytest.mark.parametrize(
    ("network", "kind", "stack_size"),
    [("small", "classes", 2), ("deep", "classes", 2), ("rectified", "one output", 1)],
)
def test_threads_give_the_same(network: str, kind: str, stack_size: int) -> None:
    task = make_task(kind)
    loss = make_loss(task)
    model = make_network(network, task.num_outputs)
    inner, outer = take(task, task.train, 16), take(task, task.validation, 16)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            path = DensePath(task, model, PLAIN)
            path.stack_size = stack_size
            outputs = train(path, task, loss, [model] * loss.size)
            values, gradient = path.meta_gradients(path.prepare(model, inner, outer), loss)
        finally:
            torch.set_num_threads(1)
        results.append((outputs, values, torch.from_numpy(gradient)))
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-14)


def test_the_engine_prefers_it_for_an_mlp() -> None:
    settings = TrainingSettings(16, 0.05)
    engine = Engine(make_toy_task(), "mlp", settings, CPU)
    assert isinstance(engine.path, DensePath)
    assert engine.path.stack_size == 1
    small = DensePath(engine.task, make_network("small", 3).float(), settings)
    assert small.stack_size > 100


class _OwnLinear(nn.Linear):
    pass


@pytest.mark.usefixtures("masks_everywhere")
@pytest.mark.parametrize("stack_size", [1, 2])
def test_a_weight_that_is_not_finite_shows_even_if_no_unit_meets_it(stack_size: int) -> None:
    task = make_task("one output")
    model = make_network("rectified", 1)
    assert isinstance(model, nn.Sequential)
    with torch.no_grad():
        model[0].weight[4], model[0].bias[4] = 0.0, -1.0
        model[2].weight[7, 4] = torch.inf
    path = DensePath(task, model, PLAIN)
    path.stack_size = stack_size
    state = path.start([model, make_network("rectified", 1, 1)])
    outputs = path.outputs(state, task.validation.x)
    assert outputs[0].isnan().all()
    assert outputs[1].isfinite().all()


def test_what_it_cannot_handle_is_named() -> None:
    task = make_task("classes")
    relu = nn.ReLU()
    linear = nn.Linear(6, 6)
    fixed = nn.Linear(6, 3)
    fixed.bias.requires_grad_(False)
    cases = {
        "Conv1d 0": nn.Sequential(nn.Conv1d(1, 1, 3)),
        "Dropout 1": nn.Sequential(nn.Linear(6, 3), nn.Dropout()),
        "ReLU 0.0": nn.Sequential(nn.Sequential(nn.ReLU()), nn.Linear(6, 3)),
        "ReLU 2": nn.Sequential(nn.Linear(6, 3), nn.Tanh(), relu),
        "Flatten 1": nn.Sequential(nn.Linear(6, 3), nn.Flatten()),
        "Flatten 0": nn.Sequential(nn.Flatten(0), nn.Linear(6, 3)),
        "Linear 1 occurs twice": nn.Sequential(linear, linear, nn.Linear(6, 3)),
        "Linear 0 has a fixed parameter": nn.Sequential(fixed),
        "_OwnLinear": nn.Sequential(_OwnLinear(6, 3)),
        "no linear layer": nn.Sequential(nn.Flatten()),
        "not 5 numbers": nn.Sequential(nn.Linear(5, 3)),
    }
    for expected, model in cases.items():
        assert expected in str(DensePath.find_obstacle(task, model, PLAIN))
    wide = nn.Sequential(nn.Linear(6, 800), nn.Tanh(), nn.Linear(800, 800))
    many = make_toy_task(num_outputs=800, rows=2)
    large = replace(PLAIN, batch_size=128)
    assert "800 outputs" in str(DensePath.find_obstacle(many, wide, large))
    assert DensePath.find_obstacle(many, wide, PLAIN) is None
    assert DensePath.find_obstacle(task, make_network("deep", 3), PLAIN) is None
    assert not isinstance(read_layers(nn.Linear(6, 3)), str)


@pytest.mark.parametrize("onednn", [False, True])
def test_large_products_are_exact_for_all_strides(
    onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if onednn and not has_onednn():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr("evoloss.engine.products.prefers_onednn", lambda: onednn)
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 300, generator=generator) for _ in range(2))
    bias = torch.randn(256, generator=generator)
    padded = torch.randn(300, 512, generator=generator)[:, :256]
    few = torch.randn(256, 16, generator=generator)
    operands = [(a, b.t()), (a, b.t().contiguous()), (b.t(), a), (a, padded), (b.t(), few)]
    for left, right in operands:
        expected = (left.double() @ right.double()).float()
        torch.testing.assert_close(product(left, right), expected, rtol=1e-5, atol=1e-4)
    expected = (a.double() @ b.t().double() + bias).float()
    torch.testing.assert_close(product(a, b.t(), bias), expected, rtol=1e-5, atol=1e-4)


def test_linearised_meta_gradients_err_with_the_square_of_the_rate() -> None:
    for kind in KINDS:
        task = make_task(kind)
        loss = make_loss(task)
        # smooth: at a kink the error is of first order
        model = make_network("sigmoid at the end", task.num_outputs)
        batches = take(task, task.train, 12), take(task, task.validation, 9)
        errors, sizes = [], []
        for rate in (4e-3, 1e-3, 2.5e-4):
            settings = replace(PLAIN, learning_rate=rate, weight_decay=0.1)
            path = DensePath(task, model, settings)
            approximate = path.prepare_linearised(model, *batches)
            values, found = path.meta_gradients(approximate, loss)
            expected_values, expected = path.meta_gradients(path.prepare(model, *batches), loss)
            errors.append(np.linalg.norm(found - expected))
            sizes.append(np.linalg.norm(expected))
            torch.testing.assert_close(values, expected_values, rtol=0.05 * rate, atol=0.0)
        assert 0 < errors[2] < 0.01 * sizes[2]
        for coarse, fine in pairwise(errors):
            assert coarse / fine == pytest.approx(16, rel=0.2)


def test_linearised_is_exact_for_linear_models() -> None:
    task = make_task("classes")
    loss = make_loss(task)
    settings = replace(SETTINGS["nesterov"], learning_rate=0.5)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 3)).double()
    batches = take(task, task.train, 12), take(task, task.validation, 9)
    exact, dense, linear = (
        path.meta_gradients(context, loss)
        for path, context in (
            (path, getattr(path, prepare)(model, *batches))
            for path, prepare in (
                (GeneralPath(task, model, settings), "prepare"),
                (DensePath(task, model, settings), "prepare_linearised"),
                (LinearPath(task, model, settings), "prepare_linearised"),
            )
        )
    )
    for values, gradient in (dense, linear):
        torch.testing.assert_close(values, exact[0], rtol=1e-10, atol=0.0)
        np.testing.assert_allclose(gradient, exact[1], rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("model_name", ["linear", "mlp"])
def test_a_linearised_local_search(model_name: str) -> None:
    settings = TrainingSettings(16, 1e-3, precision="float64")
    engine = Engine(make_toy_task(rows=40), model_name, settings, CPU)
    programs = [weighted(formula, 0) for formula in FORMULAS]
    start = np.concatenate([program.weights for program in programs])
    exact, linearised = (
        np.concatenate([p.weights for p in engine.local_search(programs, search, 0)])
        for search in (
            LocalSearchSettings(3, 1, 0.01),
            LocalSearchSettings(3, 1, 0.01, linearised=True),
        )
    )
    difference = np.linalg.norm(exact - linearised) / np.linalg.norm(exact - start)
    assert difference < (1e-9 if model_name == "linear" else 0.02)
    assert np.linalg.norm(exact - start) > 0.01


def test_linearised_local_search_is_refused_where_there_is_none() -> None:
    programs = [weighted(FORMULAS[0], 0)]
    images = make_toy_task(input_shape=(1, 12, 12), rows=20)
    lenet = Engine(images, "lenet5", PLAIN, CPU)
    with pytest.raises(ConfigError, match=r"local_search\.linearised.*linear and dense.*lenet5"):
        lenet.local_search(programs, LocalSearchSettings(2, 1, 0.01, linearised=True), 0)
    mlp = Engine(make_toy_task(), "mlp", PLAIN, CPU)
    with pytest.raises(ConfigError, match=r"linearised.*inner_steps: 1, not 2"):
        mlp.local_search(programs, LocalSearchSettings(2, 2, 0.01, linearised=True), 0)
    many = make_toy_task(num_outputs=3000, rows=2)
    wide = nn.Sequential(nn.Linear(6, 3000)).double()
    with pytest.raises(ConfigError, match=r"linearised.*3000 outputs.*256 MiB"):
        DensePath(many, wide, PLAIN).prepare_linearised(
            wide, take(many, many.train, 2), take(many, many.validation, 2)
        )


@pytest.mark.parametrize("linearised", [False, True])
def test_a_search_tells_how_its_meta_gradients_were_computed(
    tmp_path: FilePath, linearised: bool
) -> None:
    arrays, card = prepare_dataset("diabetes", data_seed=0)
    save_dataset(arrays, card, tmp_path / "diabetes.npz", tmp_path / "diabetes.json")
    task = {"name": "diabetes", "model": "mlp", "label_noise": None, "data_seed": 0}
    training = {"batch_size": 32, "learning_rate": 0.01}
    stage = StageInput(task, training, str(tmp_path / "diabetes.npz"), "cpu", 1)
    tiny = read_config(FilePath(__file__).parents[2] / "workflow" / "presets" / "tiny.yaml")
    local_search = tiny["local_search"] | {"linearised": linearised}
    hall_of_fame, _ = search_loss(stage, "evomal", tiny["search"], local_search, 0)
    assert hall_of_fame["local_search"] == ("linearised" if linearised else "exact")


@pytest.mark.usefixtures("masks_everywhere")
@pytest.mark.parametrize("stack_size", [1, 2])
@pytest.mark.parametrize(("network", "kind"), [("wide", "classes"), ("rectified", "one output")])
def test_training_goes_on_from_a_snapshot(network: str, kind: str, stack_size: int) -> None:
    task = make_task(kind)
    loss = make_loss(task)
    targets, batches = task.encode_targets(task.train.y), draw_batches(60, 16, 8, 1)
    models = [make_network(network, task.num_outputs, seed) for seed in range(loss.size)]
    path = DensePath(task, models[0], SETTINGS["adam"])
    path.stack_size = stack_size
    state, later = path.start(models), path.start(models)
    path.advance(state, loss, task.train.x, targets.double(), batches[:5])
    later = restore_snapshot(later, copy.deepcopy(take_snapshot(state)))
    for continued in (state, later):
        path.advance(continued, loss, task.train.x, targets.double(), batches[5:])
    x = task.validation.x
    assert torch.equal(path.outputs(state, x), path.outputs(later, x))
