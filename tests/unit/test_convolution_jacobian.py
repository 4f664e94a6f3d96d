"""The Jacobian by convolutions' parameters against autograd, and meta-gradients with it against those without."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_path_convolutional import make_loss, make_network, make_task, take
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from evoloss.engine import TrainingSettings
from evoloss.engine.convolution_jacobian import Jacobian, compute_jacobian, is_worthwhile
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


def compute(model: nn.Module, x: Tensor) -> tuple[Network, Jacobian, list[np.ndarray]]:
    params = [p.detach().numpy() for p in model.parameters()]
    network = Network(model, tuple(x.shape[1:]), len(x), np.dtype("float64"))
    activations = network.forward(params, network.enter(x))
    return network, compute_jacobian(network, lambda: network, params, activations), params


def differentiate(model: nn.Module, x: Tensor, count: int) -> list[Tensor]:
    """Return the Jacobians (samples, outputs, *shape) by the first ``count`` parameters."""
    params = {name: p.detach() for name, p in model.named_parameters()}

    def run(params: dict[str, Tensor], sample: Tensor) -> Tensor:
        out: Tensor = functional_call(model, params, (sample.unsqueeze(0),))
        return out.squeeze(0)

    found = vmap(jacrev(run), (None, 0))(params, x)
    return [found[name] for name in list(params)[:count]]


@settings(max_examples=60, deadline=None)
@given(networks())
def test_it_equals_autograd(case: tuple[nn.Module, Tensor]) -> None:
    model, x = case
    network, jacobian, params = compute(model, x)
    count = network.count_body_params()
    assert count == sum(1 + (m.bias is not None) for m in model if isinstance(m, nn.Conv2d))
    expected = differentiate(model, x, count)
    num_outputs = expected[0].shape[1]
    upstream = torch.randn(2, num_outputs, len(x), dtype=torch.float64)
    rows = jacobian.pull_back(upstream).numpy()
    directions = [[torch.randn(p.shape, dtype=torch.float64) for p in params[:count]] for _ in "ab"]
    joined = [jacobian.join([d.numpy() for d in direction]) for direction in directions]
    moved = jacobian.push_forward(torch.from_numpy(np.stack(joined)))
    for p in range(2):
        found = jacobian.split(rows[p], params[:count])
        for gradient, own in zip(found, expected, strict=True):
            wanted = torch.einsum("ob,bo...->...", upstream[p], own)
            np.testing.assert_allclose(gradient, wanted.numpy(), rtol=1e-9, atol=1e-11)
        wanted = sum(
            (own * direction).flatten(2).sum(-1).t()
            for own, direction in zip(expected, directions[p], strict=True)
        )
        torch.testing.assert_close(moved[p], wanted, rtol=1e-9, atol=1e-11)
    # a later one takes the same memory
    other = [p * 1.1 for p in params]
    activations = network.forward(other, network.enter(x))
    again = compute_jacobian(network, lambda: network, other, activations, jacobian)
    assert again is jacobian
    fresh = compute_jacobian(network, lambda: network, other, activations)
    assert torch.equal(again.pull_back(upstream), fresh.pull_back(upstream))


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


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
    used = []

    def count(*arguments: object) -> Jacobian:
        used.append(True)
        return compute_jacobian(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("evoloss.engine.convolutional.compute_jacobian", count)
    values, gradient = path.meta_gradients(context, loss)
    assert used == [True]
    monkeypatch.setattr("evoloss.engine.convolutional.is_worthwhile", lambda *_: False)
    expected_values, expected = path.meta_gradients(context, loss)
    assert used == [True]
    torch.testing.assert_close(values, expected_values, rtol=1e-10, atol=0)
    np.testing.assert_allclose(gradient, expected, rtol=1e-8, atol=1e-13)


def test_it_is_for_many_candidates_of_pooled_convolutions_with_few_parameters() -> None:
    shapes = {"activated pooling": True, "one layer": False, "strides": False, "pooling": False}
    outputs = np.zeros((10, 128), np.float32)
    for name, is_pooled in shapes.items():
        model = make_network(name)
        network = Network(model, (2, 13, 15), 2, np.dtype("float64"))
        params = [p.detach().numpy() for p in model.parameters()]
        assert (len(network.body) > 0) == is_pooled
        body = params[: network.count_body_params()]
        assert is_worthwhile(body, outputs, 7) == is_pooled
        assert not is_worthwhile(body, outputs, 6)
    wide = nn.Sequential(
        nn.Conv2d(2, 700, 3), nn.ReLU(), nn.AvgPool2d((11, 13)), nn.Flatten(), nn.Linear(700, 2)
    )
    network = Network(wide, (2, 13, 15), 2, np.dtype("float32"))
    params = [p.detach().numpy() for p in wide.parameters()]
    assert len(network.body) == 1
    assert not is_worthwhile(params[: network.count_body_params()], outputs, 100)


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
