"""A model that no population can be trained of is refused in one sentence that names its module."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from toy_tasks import make_toy_task

import oracle
from evoloss.engine import Engine, LocalSearchSettings, TrainingSettings
from evoloss.engine.check_model import check_model
from evoloss.errors import ModelError
from evoloss.expressions import compile_weighted_tree, parse_expression
from evoloss.tasks import models

WELL = {
    "linear": make_toy_task(),
    "mlp": make_toy_task("regression", num_outputs=1),
    "lenet5": make_toy_task(input_shape=(1, 28, 28)),
    "char_cnn": make_toy_task(input_shape=(16,), vocabulary_size=12),
    "gru": make_toy_task(input_shape=(16,), vocabulary_size=12),
}


class Branching(nn.Module):
    """Control flow that depends on computed values."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x


class Counting(nn.Module):
    """A buffer that is counted up."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x


class Remembering(nn.Module):
    """Attributes that calls change: a number, a list, a tensor."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.number, self.mean, self.what = 0, torch.zeros(()), what
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        if self.what == "number":
            self.number += 1
        elif self.what == "seen":
            self.seen.append(len(x))
        else:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean()
        return x


class Caching(nn.Module):
    """It keeps its last output, which no other one depends on."""

    def forward(self, x: Tensor) -> Tensor:
        self.last = x
        return x


class Starting(nn.Module):
    """It starts from the statistics of the first inputs, kept in an attribute or in a tuple or dict that it had."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where
        self.mean: Tensor | None = None
        self.pair: tuple[Tensor | None, int] = (None, 0)
        self.known: dict[str, Tensor | None] = {"mean": None}

    def forward(self, x: Tensor) -> Tensor:
        means = {"mean": self.mean, "pair": self.pair[0], "known": self.known["mean"]}
        mean = means[self.where]
        if mean is None:
            mean = x.detach().mean(0)
            if self.where == "mean":
                self.mean = mean
            elif self.where == "pair":
                self.pair = (mean, 1)
            else:
                self.known["mean"] = mean
        return x - mean


class Keeping(nn.Module):
    """It keeps a function of its parameters, which belong to one network of many."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4))
        self.kept: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        if not self.kept:
            self.kept["weight"] = torch.softmax(self.weight, 0)
        return x * self.kept["weight"]


class Choosing(nn.Module):
    """It knows its first inputs and fails for all others."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[float, int] = {}

    def forward(self, x: Tensor) -> Tensor:
        if not self.known:
            self.known = {float(value): place for place, value in enumerate(x[:, 0])}
        return x + sum(self.known[float(value)] for value in x[:, 0])


class Stepping(nn.Module):
    """A layer before and after a state of its own: not these remember."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(4, 4), nn.Linear(4, 4)
        self.state: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        h = self.enter(x)
        if self.state is not None:
            h = h + self.state
        self.state = h.detach().mean(0)
        outputs: Tensor = self.leave(h)
        return outputs


class Clamping(nn.Module):
    """It changes its own parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight.mul_(0.9)
        return x * self.weight


class CachingByShape(nn.Module):
    """It keeps what depends on the shape of the inputs alone."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[int, Tensor] = {}
        self.identity = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if len(x) not in self.kept:
            self.kept[len(x)] = self.identity(torch.arange(x.shape[1]) / 10)
        return x + self.kept[len(x)]


class Noisy(nn.Module):
    """A random layer that torch does not know as one."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)


class Centring(nn.Module):
    """It overwrites what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        x -= 1
        return x


class Overwriting(nn.Module):
    """It overwrites what it is given, and only then calls a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x -= 1
        outputs: Tensor = self.layer(x)
        return outputs


class Attention(nn.Module):
    """An encoder layer over the inputs as a sequence, whose attention torch computes by a fused kernel of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Linear(1, 4)
        self.encoder = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
        self.output = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.output(self.encoder(self.embedding(x.unsqueeze(-1))).mean(1))
        return outputs


class Sneaking(nn.Module):
    """It overwrites what it is given, behind torch's back."""

    def forward(self, x: Tensor) -> Tensor:
        x.data.sub_(1)
        return x


class Unused(nn.Module):
    """A parameter that nothing depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        return x


class Once(torch.autograd.Function):
    """A function whose derivative torch cannot differentiate."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.square()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * gradient

    @staticmethod
    def vmap(info: Any, dims: tuple[int], x: Tensor) -> tuple[Tensor, int]:
        return x.square(), dims[0]


class Square(nn.Module):
    """It can be trained, but not searched for."""

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = Once.apply(x)
        return result


class Pair(nn.Module):
    """Two outputs."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


def wrap(*layers: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Linear(6, 4), *layers, nn.Linear(4, 3))


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (wrap(nn.BatchNorm1d(4)), "module '1' (BatchNorm1d) changes its buffer"),
        (wrap(nn.BatchNorm1d(4)), "use a layer without such state, e.g. GroupNorm"),
        (wrap(nn.Tanh(), Counting()), "module '2' (Counting) changes its buffer 'calls'"),
        (wrap(Remembering("number")), "module '1' (Remembering) changes its attribute 'number'"),
        (wrap(Remembering("seen")), "module '1' (Remembering) changes its attribute 'seen'"),
        (wrap(Remembering("mean")), "module '1' (Remembering) changes its attribute 'mean'"),
        *(
            (wrap(Starting(where)), "module '1' (Starting) remembers earlier calls: its outputs")
            for where in ("mean", "pair", "known")
        ),
        (wrap(Keeping()), "module '1' (Keeping) remembers earlier calls: its outputs depend on"),
        (wrap(Stepping()), "module '1' (Stepping) remembers earlier calls: its outputs depend on"),
        (wrap(Clamping()), "module '1' (Clamping) changes its parameter 'weight' when it is"),
        (
            lambda: nn.Sequential(Choosing(), nn.Linear(6, 3)),
            "it fails when it is called again, in its module '0' (Choosing): ",
        ),
        (wrap(nn.Dropout(0.5)), "module '1' (Dropout) is random"),
        (wrap(nn.Sequential(nn.Tanh(), Noisy())), "module '1.1' (Noisy) is random"),
        (wrap(Branching()), "at once (control flow that depends on computed values, or changes"),
        (wrap(Branching()), "in its module '1' (Branching): vmap"),
        (
            lambda: nn.Sequential(nn.Identity(), Centring(), nn.Linear(6, 3)),
            "module '1' (Centring) changes the model's inputs in place",
        ),
        (
            lambda: nn.Sequential(Sneaking(), nn.Linear(6, 3)),
            "its Sequential changes the model's inputs in place",
        ),
        (Overwriting, "its Overwriting changes the model's inputs in place"),
        (wrap(nn.LazyLinear(4)), "its parameter '1.weight' has no shape before the first call"),
        (
            wrap(nn.LazyBatchNorm1d(affine=False)),
            "its buffer '1.running_mean' has no shape before the first call",
        ),
        (
            lambda: nn.Sequential(nn.Linear(6, 3), nn.Threshold(1e9, float("nan"))),
            "its outputs for 2 rows of the training data are not finite before any training",
        ),
        (wrap(Unused()), "its parameter '1.spare' has no influence on the outputs"),
        (wrap(nn.Linear(5, 4)), "training data, in its module '1' (Linear): mat1 and mat2 shapes"),
        (
            lambda: nn.Linear(6, 2),
            "outputs for 2 rows have shape (2, 2), but the task needs (2, 3)",
        ),
        (lambda: nn.Sequential(nn.Linear(6, 3), Pair()), "it does not return a single tensor"),
        (lambda: nn.Linear(6, 3).requires_grad_(False), "depend on no parameter that requires"),
    ],
)
def test_refused_with_a_sentence(build: Callable[[], nn.Module], sentence: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(ModelError) as caught:
        check_model(build(), "mine", torch.randn(4, 6), 3)
    assert str(caught.value).startswith("model 'mine' cannot be trained here: ")
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", WELL)
@pytest.mark.parametrize("precision", ["float32", "float64", "bf16"])
def test_our_own_models_pass(name: str, precision: str) -> None:
    Engine(WELL[name], name, TrainingSettings(16, 0.1, precision=precision), torch.device("cpu"))


@pytest.mark.parametrize(
    "layer",
    [
        nn.GroupNorm(2, 4),
        nn.LayerNorm(4),
        nn.BatchNorm1d(4, track_running_stats=False),
        nn.Dropout(0.0),
        nn.ReLU(inplace=True),
        Centring(),
        Caching(),
        CachingByShape(),
        nn.Linear(4, 4).requires_grad_(False),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_other_layers_pass(layer: nn.Module) -> None:
    check_model(wrap(layer)(), "mine", torch.randn(4, 6), 3)


def test_a_gradient_hook_is_refused() -> None:
    model = nn.Linear(6, 3)
    model.weight.register_hook(lambda gradient: 10 * gradient)
    with pytest.raises(ModelError, match="its parameter 'weight' has a gradient hook"):
        check_model(model, "mine", torch.randn(4, 6), 3)


def test_the_trial_leaves_no_trace() -> None:
    model = wrap(nn.BatchNorm1d(4))()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with pytest.raises(ModelError):
        check_model(model, "mine", torch.zeros(4, 6), 3)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert not any(module._forward_hooks for module in model.modules())


def test_the_engine_refuses_a_registered_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.MODELS, "mine", lambda task: wrap(nn.Dropout())())
    with pytest.raises(ModelError, match=r"model 'mine' .* module '1' \(Dropout\)"):
        Engine(make_toy_task(), "mine", TrainingSettings(16, 0.1), torch.device("cpu"))


def test_a_model_without_second_derivative_has_no_local_search(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(models.MODELS, "mine", lambda task: wrap(Square())())
    engine = Engine(make_toy_task(), "mine", TrainingSettings(16, 0.1), torch.device("cpu"))
    programs = [compile_weighted_tree(parse_expression("square(sub(y, f(x)))"))]
    assert engine.compute_fitness(programs, 3, 0) >= 0
    with pytest.raises(ModelError, match="model 'mine' has no second derivative, which local sea"):
        engine.local_search(programs, LocalSearchSettings(2, 1, 0.01), 0)


@pytest.mark.parametrize("evaluating", [False, True])
@pytest.mark.parametrize("inner_steps", [1, 2])
def test_attention_can_be_searched_for(
    inner_steps: int,
    evaluating: bool,
    monkeypatch: pytest.MonkeyPatch,
    recwarn: pytest.WarningsRecorder,
) -> None:
    """Its fused kernels have no second derivative, so the engine does not use them."""
    monkeypatch.setitem(models.MODELS, "mine", lambda task: Attention().train(not evaluating))
    settings = TrainingSettings(16, 0.1, precision="float64")
    engine = Engine(make_toy_task(), "mine", settings, torch.device("cpu"))
    program = compile_weighted_tree(parse_expression("square(sub(y, f(x)))"))
    inner = [engine.batch("train", torch.arange(16) + 16 * k) for k in range(inner_steps)]
    outer = engine.batch("train", torch.arange(40, 56))
    model = engine.build_model(0)
    context = engine.prepare(model, inner, outer)
    values, found = engine.meta_gradients(context, engine.population_loss([program]))
    samples = [(batch.x, batch.y) for batch in (*inner, outer)]
    with sdpa_kernel(SDPBackend.MATH):
        value, expected = oracle.compute_meta_gradient(
            engine.task, model, program, settings, samples[:-1], samples[-1]
        )
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    assert values[0] == pytest.approx(value)
    engine.local_search([program], LocalSearchSettings(2, inner_steps, 0.01), 0)
    assert engine.compute_fitness([program], 3, 0) >= 0
    assert not [
        str(warning.message) for warning in recwarn if "performance" in str(warning.message)
    ]
