"""Conformance of every operator: torch == numpy == SymPy, finite values and gradients, no NaN."""

from __future__ import annotations

import numpy as np
import pytest
import sympy
import torch
from expression_strategies import finite
from hypothesis import given, settings
from hypothesis import strategies as st

from evoloss.expressions import OPERATORS
from evoloss.expressions.canonical import protected_log, protected_sqrt, quotient_factor
from evoloss.expressions.operators import PROTECTION
from evoloss.expressions.symbolic import sympy_namespace

EDGES = [0.0, -0.0, 1.0, -1.0, 1e-7, -1e-7, 0.99e-7, 1.01e-7, 1e-8, 1e-300, 1e6, -1e6, 0.5, 20.0]
PAIRS = np.array([(a, b) for a in EDGES for b in EDGES]).T
NUMPY_FORMS = [
    {
        "plog": np.vectorize(protected_log),
        "psqrt": np.vectorize(protected_sqrt),
        "quotient": np.vectorize(quotient_factor),
    },
    "numpy",
]
every_operator = pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)


def torch_value_and_gradients(operator, args, dtype=torch.float64):
    inputs = [torch.tensor(arg, dtype=dtype, requires_grad=True) for arg in args]
    value = operator.evaluate(torch, *inputs)
    gradients = torch.autograd.grad(value.sum(), inputs, allow_unused=True)
    return value.detach().numpy(), [
        np.zeros_like(args[0]) if gradient is None else gradient.numpy() for gradient in gradients
    ]


def draw_args(operator, seed=0, size=200):
    drawn = np.random.default_rng(seed).uniform(-4, 4, (2, size))
    return np.concatenate([PAIRS, drawn], axis=1)[: operator.arity]


@every_operator
def test_torch_numpy_and_sympy_agree(operator):
    args = draw_args(operator)
    expected = operator.evaluate(np, *args)
    value, _ = torch_value_and_gradients(operator, args)
    np.testing.assert_allclose(value, expected, rtol=1e-14)
    symbols = sympy.symbols("a b", real=True)[: operator.arity]
    form = operator.sympy(sympy_namespace(), *symbols)
    evaluate = sympy.lambdify(symbols, form, modules=NUMPY_FORMS)
    np.testing.assert_allclose(evaluate(*args), expected, rtol=1e-14)


@every_operator
def test_sympy_folds_constants_as_numpy_does(operator):
    for args in draw_args(operator, size=20).T:
        form = operator.sympy(sympy_namespace(), *[sympy.Float(arg, precision=53) for arg in args])
        assert form.is_number
        expected = float(operator.evaluate(np, *args))
        assert float(form) == pytest.approx(expected, rel=1e-12, abs=1e-300)


@every_operator
def test_gradient_agrees_with_differences(operator):
    args = draw_args(operator)[:, PAIRS.shape[1] :]  # random points, away from edges
    _, gradients = torch_value_and_gradients(operator, args)
    for place, gradient in enumerate(gradients):
        step = np.zeros_like(args)
        step[place] = 1e-6
        difference = operator.evaluate(np, *(args + step)) - operator.evaluate(np, *(args - step))
        np.testing.assert_allclose(gradient, difference / 2e-6, rtol=1e-5, atol=1e-7)


@every_operator
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_edges_are_finite(operator, dtype):
    value, gradients = torch_value_and_gradients(operator, PAIRS[: operator.arity], dtype)
    assert np.isfinite(value).all()
    assert all(np.isfinite(gradient).all() for gradient in gradients)


@every_operator
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_everything_in_range_is_finite(operator, data):
    args = [np.array(data.draw(st.lists(finite, min_size=8, max_size=8))) for _ in range(2)]
    for dtype in (torch.float64, torch.float32):
        value, gradients = torch_value_and_gradients(operator, args[: operator.arity], dtype)
        assert np.isfinite(value).all()
        assert all(np.isfinite(gradient).all() for gradient in gradients)


@every_operator
def test_infinite_arguments_never_raise_and_finite_ones_never_give_nan(operator):
    largest = np.finfo(np.float64).max
    with np.errstate(all="ignore"):
        value = operator.evaluate(np, *[np.array([largest, -largest, 1e-308])] * operator.arity)
        operator.evaluate(np, *[np.array([np.inf, -np.inf, np.nan])] * operator.arity)
    assert not np.isnan(value).any()


@every_operator
def test_commutative_flag_is_true_to_the_operator(operator):
    if operator.arity == 2:
        same = np.array_equal(operator.evaluate(np, *PAIRS), operator.evaluate(np, *PAIRS[::-1]))
        assert same == operator.commutative


@pytest.mark.parametrize("name", ["log", "sqrt"])
def test_protection_is_constant_below_its_threshold(name):
    inside = np.array([0.0, 0.3, -0.999]) * PROTECTION
    value, (gradient,) = torch_value_and_gradients(OPERATORS[name], [inside])
    assert len(set(value.tolist())) == 1
    assert not gradient.any()
