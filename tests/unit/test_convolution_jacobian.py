"""The Jacobian by convolutions' parameters against autograd, and meta-gradients with it against those without."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_path_convolutional import make_loss, make_network, make_task, take
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from evoloss.engine import TrainingSettings
from evoloss.engine.convolution_jacobian import Jacobian, find_body
from evoloss.engine.convolution_network import Network
from evoloss.engine.convolutional import ConvolutionalPath
from evoloss.engine.lane_sums import make_lane_sums, make_pack


@st.composite
def networks(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    """Return one or two pooled convolutions of any size, a linear layer or two, and a batch."""
    channels, *size = (draw(st.integers(*bounds)) for bounds in ((1, 3), (4, 13), (4, 13)))
    shape = (channels, *size)
    layers: list[nn.Module] = []
    for _ in range(draw(st.integers(1, 2))):
        kernel = tuple(draw(st.integers(1, min(4, side))) for side in size)
        step, padding = draw(st.integers(1, 2)), draw(st.integers(0, 1))
        outputs = draw(st.integers(1, 7))
        layers += [
            nn.Conv2d(channels, outputs, kernel, (step, 1), padding, bias=draw(st.booleans())),
            draw(st.sampled_from([nn.Tanh, nn.Sigmoid, nn.ReLU]))(),
        ]
        size = [
            (side + 2 * padding - k) // s + 1
            for side, k, s in zip(size, kernel, (step, 1), strict=True)
        ]
        window = tuple(
            draw(st.sampled_from([w for w in range(1, side + 1) if side % w == 0])) for side in size
        )
        layers.append(nn.AvgPool2d(window))
        channels, size = outputs, [side // w for side, w in zip(size, window, strict=True)]
    layers += [nn.Flatten(), nn.Linear(channels * size[0] * size[1], draw(st.integers(1, 6)))]
    if draw(st.booleans()):
        layers += [nn.Tanh(), nn.Linear(layers[-1].out_features, 3)]
    torch.manual_seed(draw(st.integers(0, 99)))
    model = nn.Sequential(*layers).double()
    return model, torch.randn(draw(st.integers(1, 19)), *shape, dtype=torch.float64)


def run_forward(model: nn.Module, x: Tensor) -> tuple[Network, list[np.ndarray], list[np.ndarray]]:
    """Return a network like the model, the model's parameters, and the activations."""
    params = [p.detach().numpy() for p in model.parameters()]
    dtype = params[0].dtype
    network = Network(model, tuple(x.shape[1:]), len(x), dtype)
    return network, params, network.forward(params, network.enter(x))


def compute(model: nn.Module, x: Tensor) -> tuple[Jacobian, list[np.ndarray]]:
    network, params, activations = run_forward(model, x)
    jacobian = Jacobian(network.body, activations[-1])
    jacobian.update(network, lambda: network, params, activations)
    return jacobian, params


def differentiate(model: nn.Module, x: Tensor, count: int) -> list[Tensor]:
    """Return the Jacobians (samples, outputs, *shape) by the first ``count`` parameters."""
    params = {name: p.detach() for name, p in model.named_parameters()}

    def run(params: dict[str, Tensor], sample: Tensor) -> Tensor:
        out: Tensor = functional_call(model, params, (sample.unsqueeze(0),))
        return out.squeeze(0)

    found = vmap(jacrev(run), (None, 0))(params, x)
    return [found[name] for name in list(params)[:count]]


def check(model: nn.Module, x: Tensor, rtol: float, atol: float) -> None:
    jacobian, params = compute(model, x)
    count = jacobian.num_arrays
    assert count == sum(1 + (m.bias is not None) for m in model if isinstance(m, nn.Conv2d))
    expected = differentiate(model, x, count)
    upstream = torch.randn(2, expected[0].shape[1], len(x), dtype=x.dtype)
    rows = jacobian.pull_back(upstream).numpy()
    directions = [[torch.randn(p.shape, dtype=x.dtype) for p in params] for _ in range(2)]
    joined = [jacobian.join([d.numpy() for d in direction]) for direction in directions]
    moved = jacobian.push_forward(torch.from_numpy(np.stack(joined)))
    for p in range(2):
        found = jacobian.split(rows[p], params)
        for gradient, own in zip(found, expected, strict=True):
            wanted = torch.einsum("ob,bo...->...", upstream[p], own)
            np.testing.assert_allclose(gradient, wanted.numpy(), rtol=rtol, atol=atol)
        wanted = sum(
            (own * direction).flatten(2).sum(-1).t()
            for own, direction in zip(expected, directions[p], strict=False)
        )
        torch.testing.assert_close(moved[p], wanted, rtol=rtol, atol=atol)


@settings(max_examples=60, deadline=None)
@given(networks())
def test_it_equals_autograd(case: tuple[nn.Module, Tensor]) -> None:
    check(*case, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("batch", [1, 16, 19])
def test_it_is_accurate_in_float32(batch: int) -> None:
    """Where the last vector of samples is not full, too."""
    model = make_network("activated pooling").float()
    check(model, torch.randn(batch, 2, 13, 15), rtol=1e-4, atol=1e-4)


def test_an_update_leaves_nothing_of_the_one_before() -> None:
    x = torch.randn(5, 2, 13, 15, dtype=torch.float64)
    network, params, activations = run_forward(make_network("activated pooling"), x)
    jacobian = Jacobian(network.body, activations[-1])
    upstream = torch.randn(3, len(activations[-1]), 5, dtype=torch.float64)
    for factor in (1.1, 1.0):
        other = [p * factor for p in params]
        activations = network.forward(other, network.enter(x))
        jacobian.update(network, lambda: network, other, activations)
    fresh, _ = compute(make_network("activated pooling"), x)
    assert torch.equal(jacobian.pull_back(upstream), fresh.pull_back(upstream))


def test_a_jacobian_by_no_layer_is_empty() -> None:
    outputs = np.zeros((3, 7))
    jacobian = Jacobian([], outputs)
    rows = jacobian.pull_back(torch.ones(2, 3, 7, dtype=torch.float64))
    assert (jacobian.num_arrays, tuple(rows.shape)) == (0, (2, 0))
    assert jacobian.split(rows[0].numpy(), [outputs]) == []
    assert jacobian.join([outputs]).shape == (0,)
    assert torch.equal(jacobian.push_forward(rows), torch.zeros(2, 3, 7, dtype=torch.float64))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("num_inner", [4, 9])
def test_meta_gradients_are_the_same_with_it_and_without(
    num_inner: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make_task()
    model = make_network("activated pooling")
    path = ConvolutionalPath(task, model, TrainingSettings(16, 0.05, precision="float64"))
    context = path.prepare(model, take(task, task.train, num_inner), take(task, task.validation, 5))
    loss = make_loss(task, 5)
    updates = []
    update = Jacobian.update

    def count(self: Jacobian, *arguments: object) -> None:
        updates.append(self.num_arrays)
        update(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Jacobian, "update", count)
    values, gradient = path.meta_gradients(context, loss)
    assert updates == [6]
    monkeypatch.setattr("evoloss.engine.convolutional.find_body", lambda *_: [])
    expected_values, expected = path.meta_gradients(context, loss)
    assert updates == [6]
    torch.testing.assert_close(values, expected_values, rtol=1e-10, atol=0)
    np.testing.assert_allclose(gradient, expected, rtol=1e-8, atol=1e-13)


def test_it_is_for_many_candidates_of_pooled_convolutions_with_few_parameters() -> None:
    outputs = np.zeros((10, 128), np.float32)
    for name in ("activated pooling", "one layer", "strides", "pooling"):
        network = Network(make_network(name), (2, 13, 15), 2, np.dtype("float64"))
        expected = 3 if name == "activated pooling" else 0
        assert [len(find_body(network, outputs, size)) for size in (6, 7)] == [0, expected]
    wide = nn.Sequential(
        nn.Conv2d(2, 700, 3), nn.ReLU(), nn.AvgPool2d((11, 13)), nn.Flatten(), nn.Linear(700, 2)
    )
    network = Network(wide, (2, 13, 15), 2, np.dtype("float32"))
    assert len(network.body) == 1
    assert find_body(network, outputs, 100) == []


def test_a_candidate_that_is_not_finite_leaves_the_others_alone() -> None:
    """Through the Jacobian, which they share."""
    task = make_task()
    model = make_network("activated pooling")
    path = ConvolutionalPath(task, model, TrainingSettings(16, 0.05, precision="float64"))
    context = path.prepare(model, take(task, task.train, 4), take(task, task.validation, 5))
    loss = make_loss(task, 4)
    values, gradient = path.meta_gradients(context, loss)
    weights = np.concatenate(loss.split_weights())
    own = slice(loss.offsets[1], loss.offsets[2])
    weights[own] = np.inf
    loss.set_weights(weights)
    found_values, found = path.meta_gradients(context, loss)
    others = np.ones(len(weights), dtype=bool)
    others[own] = False
    np.testing.assert_allclose(found[others], gradient[others], rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(found_values[[0, 2, 3]], values[[0, 2, 3]], rtol=1e-10, atol=0)
    assert not np.isfinite(found[own]).all()


@pytest.mark.parametrize(("num_bytes", "num_sums"), [(64, 24), (32, 12), (16, 24), (16, 12)])
@pytest.mark.parametrize("rows", [1, 3, 5, 7])
def test_sums_on_vectors_of_any_length(rows: int, num_bytes: int, num_sums: int) -> None:
    """Wherever the tests run; what the processor lacks LLVM makes of what it has."""
    lanes, count, num_taps = num_bytes // 8, 6, 13
    generator = np.random.default_rng(rows)
    left, right = generator.normal(size=(rows, 9, lanes)), generator.normal(size=(30, lanes))
    left_places, right_places = (generator.permutation(n)[:count] for n in (9, 15))
    taps = generator.permutation(15)[:num_taps]
    found = np.full((rows, num_taps, lanes + 1), 7.0)
    make_lane_sums(num_bytes, num_sums)(
        found.reshape(-1), 1, num_taps * (lanes + 1), lanes + 1,
        left.reshape(-1), 0, 9 * lanes, left_places * lanes, rows,
        right.reshape(-1), lanes, taps * lanes, right_places * lanes,
    )  # fmt: skip
    expected = sum(
        left[:, None, a] * right[1 + taps + b][None]
        for a, b in zip(left_places, right_places, strict=True)
    )
    np.testing.assert_allclose(found[..., 1:], expected, rtol=1e-12)
    assert (found[..., 0] == 7.0).all()
    packed, source = np.full((4, lanes), 7.0), generator.normal(size=(4, lanes + 1))
    make_pack(num_bytes)(packed.reshape(-1), 0, source.reshape(-1), 1, lanes + 1, 4, lanes - 1)
    np.testing.assert_array_equal(packed[:, :-1], source[:, 1:-1])
    assert (packed[:, -1] == 0.0).all()
