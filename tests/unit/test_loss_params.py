"""Loss parameters during a local search: Adam as torch defines it, and compiled meta-steps like single ones."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from toy_tasks import make_toy_task

from evoloss.engine import Engine, LocalSearchSettings, PopulationLoss, TrainingSettings
from evoloss.engine.loss_params import LossParams, join_progress
from evoloss.engine.path import Context
from evoloss.expressions import Program, compile_weighted_tree, parse_expression

FORMULAS = (
    "square(sub(y, f(x)))",
    "mul(-1, mul(y, log(f(x))))",
    "mul(1e200, square(square(mul(1e200, sub(f(x), y)))))",  # its gradient is not finite
    "tanh(mul(y, f(x)))",
)


def make_programs() -> list[Program]:
    return [compile_weighted_tree(parse_expression(formula)) for formula in FORMULAS]


def draw_gradients(params: LossParams, count: int) -> NDArray[np.float64]:
    generator = np.random.default_rng(0)
    scale = 10.0 ** generator.uniform(-12, 3, len(params.weights))
    return generator.standard_normal((count, len(params.weights))) * scale


def test_steps_are_those_of_torch() -> None:
    params = LossParams(make_programs(), 0.03)
    expected = torch.from_numpy(params.weights.copy()).requires_grad_()
    adam = torch.optim.Adam([expected], lr=0.03)
    for gradient in draw_gradients(params, 40):
        expected.grad = torch.from_numpy(np.where(params.trainable, gradient, 0.0))
        adam.step()
        params.update(gradient)
    np.testing.assert_allclose(params.weights, expected.detach().numpy(), rtol=1e-12)
    assert params.num_steps == 40


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_gradient_that_is_not_finite_ends_its_candidate_alone(bad: float) -> None:
    found, expected = LossParams(make_programs(), 0.01), LossParams(make_programs(), 0.01)
    first = found.offsets[1] + int(np.flatnonzero(found.trainable[found.offsets[1] :])[0])
    own = slice(found.offsets[1], found.offsets[2])
    for step, gradient in enumerate(draw_gradients(found, 5)):
        if step == 2:
            before = found.weights[own].copy()
            expected.update(gradient)
            gradient[first] = bad
            found.update(gradient)
        else:
            expected.update(gradient)
            found.update(gradient)
    assert found.alive.tolist() == [True, False, True, True]
    np.testing.assert_array_equal(found.weights[own], before)
    others = np.ones(len(found.weights), dtype=bool)
    others[own] = False
    np.testing.assert_array_equal(found.weights[others], expected.weights[others])


def test_what_is_not_trained_may_have_any_gradient_and_stays() -> None:
    params = LossParams(make_programs()[:2], 0.01)
    before = params.weights.copy()
    assert not params.trainable.all()
    params.update(np.where(params.trainable, 1.0, np.nan))
    assert params.alive.all()
    np.testing.assert_array_equal(params.weights != before, params.trainable)


def test_shares_come_back_from_the_progress_of_all() -> None:
    programs = make_programs()
    whole, shares = (
        LossParams(programs, 0.01),
        [LossParams(programs[i:j], 0.01) for i, j in ((0, 1), (1, 4))],
    )
    for gradient in draw_gradients(whole, 3):
        whole.update(gradient)
    weight = program = 0
    for share in shares:
        share.restore(whole.describe(), program, weight)
        weight, program = weight + len(share.weights), program + len(share.alive)
    joined, expected = join_progress([share.describe() for share in shares]), whole.describe()
    assert joined.keys() == expected.keys()
    for name, value in expected.items():
        assert np.array_equal(joined[name], value), name


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_compiled_meta_steps_equal_single_ones(precision: str) -> None:
    settings = TrainingSettings(16, 0.05, precision=precision)
    engine = Engine(make_toy_task(), "linear", settings, torch.device("cpu"))
    assert engine.path.compiled_meta_steps is not None
    search = LocalSearchSettings(60, 1, 0.01)
    points: list[Any] = []
    found = engine.local_search(
        make_programs(), search, 0, at_safe_point=lambda describe: points.append(describe())
    )
    assert [point["step"] for point in points] == [25, 50]
    assert [point["loss_params"]["alive"] for point in points] == [[True, True, False, True]] * 2
    # whoever wants to look after every step gets steps one by one
    looked: list[int] = []
    single = engine.local_search(
        make_programs(), search, 0, on_step=lambda step, values, programs: looked.append(step)
    )
    assert looked == list(range(1, 61))
    for one, other in zip(found, single, strict=True):
        np.testing.assert_allclose(one.loss_params, other.loss_params, rtol=1e-5)
    moved = [
        not np.array_equal(one.loss_params, start.loss_params)
        for one, start in zip(found, make_programs(), strict=True)
    ]
    assert moved == [True, True, False, True]


def test_candidates_whose_search_has_ended_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others go on as they do without them, and a search with nobody left goes through its steps."""
    settings = TrainingSettings(16, 0.05, precision="float64")
    engine = Engine(make_toy_task(), "mlp", settings, torch.device("cpu"), widths=(8,))
    search = LocalSearchSettings(6, 1, 0.01)
    programs = make_programs()
    good = [program for p, program in enumerate(programs) if p != 2]
    expected = engine.local_search(good, search, 1)
    sizes = []
    compute = Engine.meta_gradients

    def count(self: Engine, context: Context, loss: PopulationLoss) -> object:
        sizes.append(loss.size)
        return compute(self, context, loss)

    monkeypatch.setattr(Engine, "meta_gradients", count)
    values = []
    found = engine.local_search(programs, search, 1, on_step=lambda _, v, __: values.append(v))
    assert sizes == [4, 3, 3, 3, 3, 3]
    np.testing.assert_array_equal(found[2].weights, programs[2].weights)
    for a, b in zip([found[0], found[1], found[3]], expected, strict=True):
        np.testing.assert_allclose(a.weights, b.weights, rtol=1e-10)
    assert np.isfinite(np.array(values)[:, [0, 1, 3]]).all()
    assert np.isnan(np.array(values)[1:, 2]).all()
    points: list[Any] = []
    engine.local_search(
        programs, search, 1, at_safe_point=lambda describe: points.append(copy.deepcopy(describe()))
    )
    sizes.clear()
    resumed = engine.local_search(programs, search, 1, resume=points[2])
    assert sizes == [3, 3, 3]
    for a, b in zip(resumed, found, strict=True):
        np.testing.assert_array_equal(a.weights, b.weights)
    sizes.clear()
    (alone,) = engine.local_search([programs[2]], search, 1)
    assert sizes == [1]
    np.testing.assert_array_equal(alone.weights, programs[2].weights)
