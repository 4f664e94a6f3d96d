"""The fast path of convolutional networks against the general path and the oracle."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, jvp
from toy_tasks import make_toy_task

import oracle
from evoloss.engine import PopulationLoss, TrainingSettings
from evoloss.engine.convolution_activations import ACTIVATIONS, activate
from evoloss.engine.convolution_network import Network
from evoloss.engine.convolutional import CHUNK, EVALUATION_BATCH, ConvolutionalPath
from evoloss.engine.general import GeneralPath
from evoloss.engine.path import Path
from evoloss.engine.streams import Batch, draw_batches
from evoloss.expressions import Program, compile_weighted_tree, parse_expression
from evoloss.tasks import Split, Task, build_model

SHAPE = (2, 13, 15)
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
    "mul(-1, mul(y, log(f(x))))",
)


def make_network(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layers: dict[str, list[nn.Module]] = {
        "one layer": [nn.Conv2d(2, 3, (13, 15)), nn.Flatten()],
        # strides, uneven kernels and paddings, no biases, a module before the first weight
        "strides": [
            nn.AvgPool2d(1), nn.Conv2d(2, 7, (3, 2), stride=(2, 3), padding=(1, 2), bias=False),
            nn.ReLU(), nn.Sequential(nn.Conv2d(7, 5, 2, stride=(1, 2)), nn.Sigmoid()),
            nn.Flatten(), nn.Linear(90, 3, bias=False),
        ],
        "words for padding": [
            nn.Conv2d(2, 4, (3, 4), padding="same"), nn.Tanh(), nn.ReLU(),
            nn.Conv2d(4, 13, 1, padding="valid"), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(117, 3),
        ],
        # windows that overlap, do not divide the image, reach over its edge
        "pooling": [
            nn.Tanh(), nn.Conv2d(2, 6, 5), nn.MaxPool2d(3, 2, padding=1, ceil_mode=True),
            nn.Conv2d(6, 8, 2), nn.Tanh(),
            nn.AvgPool2d((2, 3), (1, 2), padding=(1, 0), count_include_pad=False, ceil_mode=True),
            nn.MaxPool2d((2, 1), dilation=(2, 1)), nn.Flatten(1, 3), nn.Linear(32, 9), nn.Tanh(),
            nn.Linear(9, 3), nn.Tanh(),
        ],
        # means over windows that tile the images, behind every kind of activation
        "activated pooling": [
            nn.Conv2d(2, 7, 2), nn.Tanh(), nn.AvgPool2d((3, 2)), nn.Conv2d(7, 4, 1), nn.Sigmoid(), nn.AvgPool2d((2, 1)),
            nn.Conv2d(4, 5, (1, 2)), nn.ReLU(), nn.AvgPool2d((1, 3)), nn.Flatten(), nn.Linear(20, 3),
        ],
    }  # fmt: skip
    return nn.Sequential(*layers[name]).double()


NETWORKS = ("one layer", "strides", "words for padding", "pooling", "activated pooling")


def make_task(rows: int = 60) -> Task:
    return make_toy_task(input_shape=SHAPE, rows=rows)


def weighted(formula: str, seed: int = 1) -> Program:
    program = compile_weighted_tree(parse_expression(formula))
    noise = np.random.default_rng(seed).normal(0, 0.05, len(program.loss_params))
    return program.with_loss_params(program.loss_params * (1 + noise))


def make_loss(task: Task, count: int = 3, dtype: torch.dtype = torch.float64) -> PopulationLoss:
    return PopulationLoss(task, [weighted(FORMULAS[i % 3], i) for i in range(count)], dtype)


def take(task: Task, split: Split, count: int) -> Batch:
    y = split.y[:count]
    return Batch(split.x[:count], y, task.encode_targets(y, split.x.dtype))


def train(path: Path, task: Task, loss: PopulationLoss, models: list[nn.Module]) -> Tensor:
    """Return validation outputs after 5 steps of all networks and 4 more of all but the first, backwards."""
    batches = draw_batches(len(task.train.y), 16, 9, 1)
    targets = task.encode_targets(task.train.y, task.train.x.dtype)
    state = path.start(models)
    path.advance(state, loss, task.train.x, targets, batches[:5])
    keep = list(range(loss.size - 1, 0, -1))
    state = path.select(state, keep)
    path.advance(state, loss.select(keep), task.train.x, targets, batches[5:])
    return path.outputs(state, task.validation.x)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("network", NETWORKS)
def test_training_equals_the_general_path(network: str, settings: TrainingSettings) -> None:
    task = make_task()
    loss = make_loss(task)
    models = [make_network(network, seed % 2) for seed in range(loss.size)]
    before = [p.clone() for p in models[0].parameters()]
    assert ConvolutionalPath.find_obstacle(task, models[0], settings) is None
    found = train(ConvolutionalPath(task, models[0], settings), task, loss, models)
    expected = train(GeneralPath(task, models[0], settings), task, loss, models)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    for p, value in zip(models[0].parameters(), before, strict=True):
        assert torch.equal(p, value)


@st.composite
def networks(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    """Return one or two convolutions of any size, activated and perhaps pooled, a linear layer, and a batch."""
    channels, *size = (draw(st.integers(*bounds)) for bounds in ((1, 4), (3, 12), (3, 12)))
    shape = (channels, *size)
    layers: list[nn.Module] = []
    for _ in range(draw(st.integers(1, 2))):
        kernel = tuple(draw(st.integers(1, min(5, side))) for side in size)
        stride, padding = (draw(st.integers(1, 2)), draw(st.sampled_from([1, 1, 2]))), 1
        outputs = draw(st.sampled_from([1, 3, 4, 6, 7, 12, 16]))
        layers.append(
            nn.Conv2d(channels, outputs, kernel, stride, padding, bias=draw(st.booleans()))
        )
        layers.append(draw(st.sampled_from([nn.Tanh, nn.Sigmoid, nn.ReLU]))())
        size = [
            (a + 2 * padding - k) // s + 1 for a, k, s in zip(size, kernel, stride, strict=True)
        ]
        channels = outputs
        if draw(st.booleans()):
            window = tuple(draw(st.integers(1, min(3, side))) for side in size)
            layers.append(nn.AvgPool2d(window))
            size = [side // width for side, width in zip(size, window, strict=True)]
    layers += [nn.Flatten(), nn.Linear(channels * size[0] * size[1], 3, bias=draw(st.booleans()))]
    torch.manual_seed(draw(st.integers(0, 9)))
    batch = draw(st.sampled_from([1, 3, 8, 16, 17, 33]))
    return nn.Sequential(*layers).double(), torch.randn(batch, *shape).double()


@settings(max_examples=60, deadline=None)
@given(networks())
def test_layers_and_their_derivatives_equal_autograd(case: tuple[nn.Module, Tensor]) -> None:
    model, x = case
    params = {name: p.detach() for name, p in model.named_parameters()}
    arrays = [p.numpy() for p in params.values()]
    outputs = model(x)
    upstream = torch.randn_like(outputs)
    gradients = torch.autograd.grad(outputs, list(model.parameters()), upstream)
    directions = {name: torch.randn_like(p) for name, p in params.items()}
    _, along = jvp(lambda p: functional_call(model, p, (x,)), (params,), (directions,))
    kept, used = (
        Network(model, tuple(x.shape[1:]), len(x), np.dtype(np.float64)) for _ in range(2)
    )
    activations = kept.forward(arrays, kept.enter(x))
    np.testing.assert_allclose(activations[-1].T, outputs.detach(), atol=1e-10)
    found = used.tangent(arrays, activations, [d.numpy() for d in directions.values()])
    np.testing.assert_allclose(found.T, along, atol=1e-10)
    upstream_array = np.ascontiguousarray(upstream.T.numpy())
    for own, gradient in zip(
        used.backward(arrays, activations, upstream_array), gradients, strict=True
    ):
        np.testing.assert_allclose(own, gradient, atol=1e-9)


def test_long_training_and_large_splits_are_done_in_parts() -> None:
    task = make_task(EVALUATION_BATCH * CHUNK + 5)
    loss = make_loss(task, 2)
    model = make_network("one layer")
    batches = draw_batches(len(task.train.y), 4, CHUNK + 3, 1)
    targets = task.encode_targets(task.train.y, torch.float64)
    results = []
    for path in (ConvolutionalPath(task, model, PLAIN), GeneralPath(task, model, PLAIN)):
        state = path.start([model, model])
        path.advance(state, loss, task.train.x, targets, batches)
        results.append(path.outputs(state, task.validation.x))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("num_inner", "num_outer"), [(4, 4), (4, 30), (30, 5)])
@pytest.mark.parametrize("settings", [SETTINGS["sgd"], SETTINGS["nesterov"]], ids=["sgd", "nag"])
@pytest.mark.parametrize("network", NETWORKS)
def test_meta_gradient_equals_double_backprop(
    network: str, settings: TrainingSettings, num_inner: int, num_outer: int
) -> None:
    task = make_task()
    loss = make_loss(task)
    model = make_network(network)
    inner, outer = take(task, task.train, num_inner), take(task, task.validation, num_outer)
    path = ConvolutionalPath(task, model, settings)
    context = path.prepare(model, inner, outer)
    # other contexts must leave this one alone
    path.meta_gradients(path.prepare(make_network(network, 1), inner, outer), loss)
    values, gradient = path.meta_gradients(context, loss)
    for p, program in enumerate(loss.programs):
        value, expected = oracle.compute_meta_gradient(
            task, model, program, settings, [(inner.x, inner.y)], (outer.x, outer.y)
        )
        found = gradient[loss.offsets[p] : loss.offsets[p + 1]]
        assert values[p].item() == pytest.approx(value, rel=1e-9)
        assert np.linalg.norm(found - expected) <= 1e-8 * np.linalg.norm(expected)


def test_context_tells_its_size() -> None:
    task = make_task()
    model = make_network("strides")
    inner, outer = take(task, task.train, 4), take(task, task.validation, 4)
    context = ConvolutionalPath(task, model, PLAIN).prepare(model, inner, outer)
    # at least the parameters and both batches, each as it was given and laid out
    shared = sum(p.nbytes for p in model.parameters()) + 4 * inner.x.nbytes
    assert shared < context.nbytes < 10 * shared


def test_float32_is_accurate() -> None:
    """LeNet-5, whose tanh is computed differently in float32."""
    double = make_toy_task(input_shape=(1, 28, 28), rows=32)
    results = []
    for dtype, precision in ((torch.float32, "float32"), (torch.float64, "float64")):
        task = double.to(torch.device("cpu"), dtype)
        settings = TrainingSettings(16, 0.05, precision=precision)
        model = build_model("lenet5", task, 3).to(dtype)
        loss = make_loss(task, 3, dtype)
        path = ConvolutionalPath(task, model, settings)
        inner, outer = take(task, task.train, 32), take(task, task.validation, 32)
        values, gradient = path.meta_gradients(path.prepare(model, inner, outer), loss)
        outputs = train(path, task, loss, [model] * 3)
        results.append((values, torch.from_numpy(gradient), outputs))
    (values, gradient, outputs), (values64, gradient64, outputs64) = results
    torch.testing.assert_close(values.double(), values64, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(outputs.double(), outputs64, rtol=0.0, atol=2e-6)
    for a, b in zip(loss.offsets[:-1], loss.offsets[1:], strict=True):
        error = (gradient[a:b] - gradient64[a:b]).norm() / gradient64[a:b].norm()
        assert error < 2e-6


def test_tanh_is_accurate_everywhere() -> None:
    small = torch.logspace(-44, 1.5, 20_001, dtype=torch.float64)
    special = torch.tensor([0.0, torch.inf, -torch.inf, torch.nan])
    x = torch.cat([small.float(), -small.float(), torch.linspace(-12, 12, 200_001), special])
    found = x.clone()
    activate(found.numpy(), ACTIVATIONS.index("Tanh"))
    expected = torch.tanh(x.double())
    assert found.nan_to_num(0.0).abs().max() == 1.0
    torch.testing.assert_close(found.double(), expected, rtol=5e-7, atol=1e-44, equal_nan=True)


def test_divergence_ends_a_network_never_its_neighbours() -> None:
    regression = make_toy_task("regression", input_shape=SHAPE, num_outputs=3)
    bad = weighted("square(square(square(sub(f(x), y))))")
    good = weighted("mul(1e-9, sub(f(x), y))")
    model = make_network("strides")
    settings = replace(PLAIN, learning_rate=1e3)
    outputs, values = [], []
    for programs in ([good], [bad, good, bad, good]):
        loss = PopulationLoss(regression, programs, torch.float64)
        path = ConvolutionalPath(regression, model, settings)
        state = path.start([model] * loss.size)
        targets = regression.encode_targets(regression.train.y, torch.float64)
        batches = draw_batches(60, 16, 20, 0)
        path.advance(state, loss, regression.train.x, targets, batches)
        outputs.append(path.outputs(state, regression.validation.x))
        path = ConvolutionalPath(regression, model, replace(settings, learning_rate=1e300))
        inner = take(regression, regression.train, 4)
        context = path.prepare(model, inner, take(regression, regression.validation, 4))
        values.append(path.meta_gradients(context, loss))
    assert not outputs[1][[0, 2]].isfinite().any()
    assert not values[1][0][[0, 2]].isfinite().any()
    for p in (1, 3):
        assert torch.equal(outputs[1][p], outputs[0][0])
        assert torch.equal(values[1][0][p], values[0][0][0])
    assert outputs[0].isfinite().all()


def test_threads_give_the_same() -> None:
    task = make_task()
    loss = make_loss(task, 5)
    model = make_network("pooling")
    inner, outer = take(task, task.train, 16), take(task, task.validation, 20)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            path = ConvolutionalPath(task, model, PLAIN)
            outputs = train(path, task, loss, [model] * loss.size)
            values, gradient = path.meta_gradients(path.prepare(model, inner, outer), loss)
        finally:
            torch.set_num_threads(1)
        results.append((outputs, values, torch.from_numpy(gradient)))
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-14)


class _OwnConvolution(nn.Conv2d):
    pass


def test_what_it_cannot_handle_is_named() -> None:
    task = make_task()
    again = nn.Conv2d(2, 2, 1)
    frozen = nn.Conv2d(2, 2, 1)
    frozen.weight.requires_grad_(False)
    cases = {
        "no convolution": nn.Linear(2, 3),
        "a module BatchNorm2d": nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)),
        "a module _OwnConvolution": _OwnConvolution(2, 3, 1),
        "groups or dilation": nn.Conv2d(2, 2, 1, groups=2),
        "dilation": nn.Conv2d(2, 2, 3, dilation=2),
        "something else than zeros": nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"),
        "frozen": frozen,
        "used twice": nn.Sequential(again, again),
        "not flat": again,
        "no images": nn.Sequential(nn.Flatten(), nn.Conv2d(2, 2, 1)),
        "some dimensions": nn.Sequential(again, nn.Flatten(2), nn.Linear(195, 3)),
        "a linear layer on inputs (2, 13, 15)": nn.Sequential(again, nn.Linear(15, 3)),
        "smaller than a kernel": nn.Sequential(nn.Conv2d(2, 2, 14), nn.Flatten()),
        "returns indices": nn.Sequential(again, nn.MaxPool2d(2, return_indices=True)),
    }
    for expected, model in cases.items():
        assert expected in str(ConvolutionalPath.find_obstacle(task, model, PLAIN))
