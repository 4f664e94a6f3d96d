"""Models that are more than their layers: no path may leave out what it cannot see."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from toy_tasks import make_toy_task

import oracle
from evoloss.engine import Engine, TrainingSettings
from evoloss.engine.functional import FunctionalModel, find_addition
from evoloss.engine.streams import draw_batches
from evoloss.expressions import compile_weighted_tree, parse_expression
from evoloss.tasks import models

CPU = torch.device("cpu")
PLAIN = TrainingSettings(16, 0.1, precision="float64")


class Positive(nn.Linear):
    """A linear layer with another forward method."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.abs(), self.bias)


class Scaled(nn.Linear):
    """A linear layer with one more parameter."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * super().forward(x)


def double(module: nn.Module, inputs: tuple[Tensor, ...], outputs: Tensor) -> Tensor:
    return outputs * 2


def make_dense(change: Callable[[nn.Sequential], object] = lambda model: None) -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    change(model)
    return model


def share_weight(model: nn.Sequential) -> None:
    model[2].weight = model[0].weight


def hook_container(model: nn.Sequential) -> None:
    model.register_forward_hook(double)


def hook_inputs(model: nn.Sequential) -> None:
    model[2].register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))


def hook_gradient(model: nn.Sequential) -> None:
    model[2].register_full_backward_hook(lambda module, inner, outer: (inner[0] * 2,))


def replace_forward(model: nn.Sequential) -> None:
    model[1].forward = torch.sin  # type: ignore[method-assign]


def make_twice() -> nn.Module:
    layer = nn.Linear(6, 6)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), nn.Linear(6, 3))


def make_linear() -> nn.Module:
    layer = nn.Linear(6, 3)
    layer.register_forward_hook(double)
    return nn.Sequential(nn.Flatten(), layer)


def make_convolutions(shared: bool) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        first, second = (nn.Conv2d(1, 1, 3, padding=1) for _ in range(2))
        if shared:
            second.weight = first.weight
        else:
            second.register_forward_hook(double)
        return nn.Sequential(first, nn.Tanh(), second, nn.Flatten(), nn.Linear(36, 3))

    return make


ALTERED: dict[str, Callable[[], nn.Module]] = {
    "subclass": lambda: Positive(6, 3),
    "parameter": lambda: Scaled(6, 3),
    "linear hook": make_linear,
    "shared weight": lambda: make_dense(share_weight),
    "container hook": lambda: make_dense(hook_container),
    "input hook": lambda: make_dense(hook_inputs),
    "forward method": lambda: make_dense(replace_forward),
    "module used twice": make_twice,
    "shared convolution": make_convolutions(shared=True),
    "convolution hook": make_convolutions(shared=False),
}


def make_engine(name: str, monkeypatch: pytest.MonkeyPatch) -> Engine:
    shape = (1, 6, 6) if "convolution" in name else (6,)
    monkeypatch.setitem(models.MODELS, "mine", lambda task: ALTERED[name]())
    return Engine(make_toy_task(input_shape=shape), "mine", PLAIN, CPU)


@pytest.mark.parametrize("name", ALTERED)
def test_training_equals_the_oracle(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(name, monkeypatch)
    programs = [
        compile_weighted_tree(parse_expression(text))
        for text in ("square(sub(y, f(x)))", "mul(-1, mul(y, log(f(x))))")
    ]
    found = list(engine.train(engine.population_loss(programs), 12, 3, splits=("test",)))[-1]
    batches = draw_batches(len(engine.task.train.y), 16, 12, 3, "batches")
    for p, program in enumerate(programs):
        model = engine.build_model(3)
        oracle.train(engine.task, model, program, PLAIN, batches)
        test = (engine.task.test.x, engine.task.test.y)
        assert found.task_loss[p] == pytest.approx(oracle.measure(engine.task, model, test)[1])


@pytest.mark.parametrize("inner_steps", [1, 2])
@pytest.mark.parametrize("name", ALTERED)
def test_meta_gradients_equal_the_oracle(
    name: str, inner_steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(name, monkeypatch)
    programs = [
        compile_weighted_tree(parse_expression(text))
        for text in ("square(sub(y, f(x)))", "mul(-1, mul(y, log(f(x))))")
    ]
    inner = [engine.batch("train", torch.arange(16) + 16 * k) for k in range(inner_steps)]
    outer = engine.batch("train", torch.arange(40, 56))
    model = engine.build_model(0)
    _, found = engine.meta_gradients(
        engine.prepare(model, inner, outer), engine.population_loss(programs)
    )
    samples = [(batch.x, batch.y) for batch in (*inner, outer)]
    # a fresh copy each, as torch's own functional_call changes a model that uses a module twice
    expected = [
        oracle.compute_meta_gradient(
            engine.task, engine.build_model(0), program, PLAIN, samples[:-1], samples[-1]
        )[1]
        for program in programs
    ]
    np.testing.assert_allclose(found, np.concatenate(expected), rtol=1e-8, atol=1e-12)
    assert all(isinstance(p, nn.Parameter) for m in model.modules() for p in m._parameters.values())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (share_weight, "Linear 2 shares a parameter with Linear 0"),
        (hook_container, "Sequential (the model) has a hook"),
        (hook_inputs, "Linear 2 has a hook"),
        (hook_gradient, "Linear 2 has a hook"),
        (replace_forward, "Tanh 1 has a forward method of its own"),
        (lambda model: None, None),
    ],
)
def test_what_layers_do_not_tell(
    change: Callable[[nn.Sequential], object], sentence: str | None
) -> None:
    assert find_addition(make_dense(change)) == sentence


@pytest.mark.parametrize("name", ALTERED)
def test_a_functional_model_leaves_the_model_as_it_was(name: str) -> None:
    torch.manual_seed(0)
    model = ALTERED[name]().double()
    x = torch.randn(4, *((1, 6, 6) if "convolution" in name else (6,)), dtype=torch.float64)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    before = model(x)
    found = FunctionalModel(model)(dict(other.named_parameters()), x)
    torch.testing.assert_close(found, other(x))
    torch.testing.assert_close(model(x), before)
    assert all(isinstance(p, nn.Parameter) for m in model.modules() for p in m._parameters.values())
