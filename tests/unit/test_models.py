"""Base models: each has exact derivatives under the transforms the engine uses, and learns."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vjp, vmap

from evoloss.errors import ModelError
from evoloss.tasks import MODELS, Split, Task, build_model

Params = dict[str, Tensor]
ROWS = 7
SMALL = {
    "mlp": {"widths": (12, 9)},
    "char_cnn": {"embedding_size": 5, "num_filters": 8},
    "gru": {"embedding_size": 5, "num_hidden": 6},
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Small tensors are slower on many threads, most of all when tests share the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_task(model_name: str, num_rows: int = ROWS) -> Task:
    """Return a small random task that suits the model."""
    generator = torch.Generator().manual_seed(0)
    if model_name in ("char_cnn", "gru"):
        x = torch.randint(1, 30, (num_rows, 16), generator=generator)
        x[torch.arange(16) >= torch.randint(2, 17, (num_rows, 1), generator=generator)] = 0
        vocabulary_size = 30
    else:
        shape = (1, 28, 28) if model_name == "lenet5" else (10,)
        x = torch.randn(num_rows, *shape, generator=generator)
        vocabulary_size = None
    y = torch.randint(0, 4, (num_rows,), generator=generator)
    split = Split(x, y)
    return Task(
        "toy", "classification", "error_rate", "cross_entropy", 4, tuple(x.shape[1:]),
        split, split, split, vocabulary_size,
    )  # fmt: skip


def make_function(model_name: str) -> tuple[Callable[[Params], Tensor], Params, Task]:
    """Return parameters -> outputs in float64, the parameters and the task."""
    task = make_task(model_name).to("cpu", torch.float64)
    model = build_model(model_name, task, 1, **SMALL.get(model_name, {})).double()
    params = {name: value.detach() for name, value in model.named_parameters()}
    return lambda p: functional_call(model, p, (task.train.x,)), params, task


def draw_like(params: Params, seed: int) -> Params:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(value.shape, generator=generator, dtype=value.dtype)
        for name, value in params.items()
    }


@pytest.mark.parametrize("model_name", sorted(MODELS))
def test_shapes_and_seeds(model_name: str) -> None:
    """The seed alone decides the weights, and the global random state is left alone."""
    task = make_task(model_name)
    before = torch.get_rng_state()
    models = [
        build_model(model_name, task, seed, **SMALL.get(model_name, {})) for seed in (1, 1, 2)
    ]
    assert torch.equal(torch.get_rng_state(), before)
    first, same, other = (nn.utils.parameters_to_vector(model.parameters()) for model in models)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert models[0](task.train.x).shape == (ROWS, 4)
    assert not list(models[0].buffers())


@pytest.mark.parametrize("model_name", sorted(MODELS))
def test_jvp_and_vjp_are_adjoint_and_exact(model_name: str) -> None:
    """<J v, u> = <v, J' u>, and J v agrees with central differences (float64)."""
    function, params, _ = make_function(model_name)
    direction = draw_like(params, 2)
    outputs, forward = jvp(function, (params,), (direction,))
    cotangent = draw_like({"u": outputs}, 3)["u"]
    _, pull_back = vjp(function, params)
    (reverse,) = pull_back(cotangent)
    left = (forward * cotangent).sum()
    right = sum((direction[name] * reverse[name]).sum() for name in params)
    assert left.item() == pytest.approx(float(right), rel=1e-10)
    step = 1e-7
    above = function({name: value + step * direction[name] for name, value in params.items()})
    below = function({name: value - step * direction[name] for name, value in params.items()})
    # Kinks (ReLU, maximum) are crossed with negligible probability at this step.
    assert torch.allclose((above - below) / (2 * step), forward, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_name", sorted(MODELS))
def test_vmap_equals_a_loop(model_name: str) -> None:
    """A population evaluated at once gives the outputs and gradients of its members."""
    function, params, _ = make_function(model_name)
    population = [draw_like(params, seed) for seed in range(3)]
    stacked = {name: torch.stack([member[name] for member in population]) for name in params}
    outputs = vmap(function)(stacked)
    gradients = vmap(grad(lambda p: function(p).square().sum()))(stacked)
    for i, member in enumerate(population):
        assert torch.allclose(outputs[i], function(member), rtol=1e-9)
        expected = grad(lambda p: function(p).square().sum())(member)
        for name, value in expected.items():
            assert torch.allclose(gradients[name][i], value, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("model_name", sorted(MODELS))
def test_vmap_over_params_and_batches(model_name: str) -> None:
    """Every member may have a batch of its own."""
    task = make_task(model_name)
    model = build_model(model_name, task, 1, **SMALL.get(model_name, {}))
    params = {name: value.detach() for name, value in model.named_parameters()}
    stacked = {name: torch.stack([value, 2.0 * value]) for name, value in params.items()}
    batches = torch.stack([task.train.x[:3], task.train.x[3:6]])
    outputs = vmap(lambda p, x: functional_call(model, p, (x,)))(stacked, batches)
    assert torch.allclose(outputs[0], model(batches[0]), atol=1e-5)


@pytest.mark.parametrize("model_name", sorted(MODELS))
def test_derivatives_through_an_inner_step(model_name: str) -> None:
    """The gradient of the task loss after one SGD step, with respect to the step size, is exact."""
    function, params, task = make_function(model_name)

    def outer(rate: Tensor) -> Tensor:
        inner = grad(lambda p: task.compute_task_loss(function(p), task.train.y))(params)
        stepped = {name: params[name] - rate * inner[name] for name in params}
        return task.compute_task_loss(function(stepped), task.train.y)

    rate, step = torch.tensor(0.05, dtype=torch.float64), 1e-6
    numeric = (outer(rate + step) - outer(rate - step)) / (2 * step)
    assert grad(outer)(rate).item() == pytest.approx(numeric.item(), rel=1e-6)


@pytest.mark.parametrize("model_name", sorted(MODELS))
def test_learns_with_plain_sgd(model_name: str) -> None:
    """Forty full-batch steps of plain SGD lower the task loss by a third."""
    task = make_task(model_name, num_rows=24)
    model = build_model(model_name, task, 1, **SMALL.get(model_name, {}))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.5)
    start = task.compute_task_loss(model(task.train.x), task.train.y).item()
    for _ in range(40):
        loss = task.compute_task_loss(model(task.train.x), task.train.y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss.item() < start * 2 / 3


def test_gru_ignores_padding() -> None:
    """Columns of padding to the right change nothing."""
    task = make_task("gru")
    model = build_model("gru", task, 0)
    names = task.train.x[:, :6].clamp(min=1)
    padded = torch.cat([names, torch.zeros_like(task.train.x[:, :10])], 1)
    assert torch.equal(model(names), model(padded))


def test_paper_sizes() -> None:
    """Default sizes are the paper's: 2 x 1000, and LeNet-5's 61,706 weights for 10 classes."""
    mlp = build_model("mlp", make_task("mlp"), 0)
    assert [m.out_features for m in mlp if isinstance(m, nn.Linear)] == [1000, 1000, 4]
    lenet5 = build_model("lenet5", make_task("lenet5"), 0)
    assert sum(p.numel() for p in lenet5.parameters()) == 61_706 - 6 * 85


@pytest.mark.parametrize(
    ("model_name", "suits", "words"),
    [
        ("lenet", "lenet5", "did you mean 'lenet5'"),
        ("lenet5", "mlp", "needs images .* numeric inputs of shape"),
        ("lenet5", "gru", "needs images .* text inputs"),
        ("linear", "gru", "needs numeric inputs, but task 'toy' has text"),
        ("mlp", "char_cnn", "needs numeric inputs"),
        ("gru", "mlp", "needs text"),
        ("char_cnn", "lenet5", "needs text"),
    ],
)
def test_misfits_are_refused(model_name: str, suits: str, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        build_model(model_name, make_task(suits), 0)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda task: nn.Linear(task.inputs, 3), "AttributeError: .*'inputs'"),
        (lambda task: None, "its builder returns no torch.nn.Module, but NoneType"),
        (lambda task: nn.Linear, "its builder returns no torch.nn.Module, but type"),
    ],
)
def test_a_builder_that_fails_is_told(
    make: Callable[[Task], nn.Module], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MODELS, "mine", make)
    with pytest.raises(ModelError, match=f"task 'toy': model 'mine' cannot be built: {words}"):
        build_model("mine", make_task("mlp"), 0)
