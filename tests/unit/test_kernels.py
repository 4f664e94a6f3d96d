"""The compiled kernels agree with autograd through the torch form of the same operator table."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numba.core.caching import NullCache
from numba.core.dispatcher import Dispatcher

from evoloss.engine import kernel_forward, kernel_reverse, kernel_rows, kernels
from evoloss.engine.kernels import loss_gradients, mixed_gradients, pack_programs
from evoloss.errors import ExpressionError
from evoloss.expressions import (
    OPERATORS,
    Expression,
    F,
    Y,
    call,
    compile_expression,
    compile_weighted_tree,
    constant,
    evaluate_program,
)
from evoloss.expressions.program import Program


def trees(max_leaves: int = 12) -> st.SearchStrategy[Expression]:
    leaves = st.sampled_from([Y, F, constant(1.0), constant(-1.0), constant(0.7)])

    def extend(children: st.SearchStrategy[Expression]) -> st.SearchStrategy[Expression]:
        by_arity = {
            k: st.sampled_from([op.name for op in OPERATORS.values() if op.arity == k])
            for k in (1, 2)
        }
        return st.one_of(
            st.builds(call, by_arity[1], children), st.builds(call, by_arity[2], children, children)
        )

    return st.recursive(leaves, extend, max_leaves=max_leaves)


def autograd(program: Program, y: np.ndarray, f: np.ndarray, u: np.ndarray) -> tuple:
    """Value, dM/df and d(sum u dM/df)/dw by double backprop in float64."""
    tf = torch.tensor(f, requires_grad=True)
    w = torch.tensor(program.weights, requires_grad=True)
    value = evaluate_program(program, torch.tensor(y), tf, w.unbind(), torch)
    value = value + 0 * tf + 0 * w.sum()
    (gradient,) = torch.autograd.grad(value.sum(), tf, create_graph=True)
    total = (gradient * torch.tensor(u)).sum() + 0 * w.sum()
    (mixed,) = torch.autograd.grad(total, w)
    return value.detach().numpy(), gradient.detach().numpy(), mixed.numpy()


def close(actual: np.ndarray, expected: np.ndarray, size: float) -> None:
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-10 * size)


@settings(max_examples=150, deadline=None)
@given(trees(), st.integers(0, 2**31))
def test_kernels_equal_autograd(tree: Expression, seed: int) -> None:
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 2, 260).astype(float) + 0.013
    f = rng.uniform(-1.0, 1.0, 260)
    u = rng.normal(size=260)
    for program in (compile_weighted_tree(tree), compile_expression(tree)):
        # weights away from 1 keep ties and zeros (where one-sided derivatives differ) improbable
        program = program.with_loss_params(
            program.loss_params * rng.uniform(0.8, 1.2, int(program.trainable.sum()))
        )
        value, gradient, mixed = autograd(program, y, f, u)
        if not np.isfinite(np.concatenate([value, gradient, mixed])).all():
            continue
        packed = pack_programs([program, program], np.float64)
        v, g = loss_gradients(packed, y, f[None])
        m = mixed_gradients(packed, y, f[None], np.stack([u, u]))
        close(v[1], value, np.abs(value).max() + 1)
        close(g[1], gradient, np.abs(gradient).max() + 1)
        close(m[len(program) :], mixed, np.abs(mixed).max() + 1)


def test_the_derivatives_of_tanh_in_float32_keep_their_accuracy_where_it_saturates() -> None:
    """1 - tanh(f)^2 would lose all its digits there: with them, the meta-gradient of a loss that saturates."""
    f = np.linspace(-30.0, 30.0, 20_001).astype(np.float32)
    packed = pack_programs([compile_weighted_tree(call("tanh", F))], np.float32)
    _, gradient = loss_gradients(packed, np.zeros_like(f), f[None])
    exact = 1.0 / np.cosh(f.astype(np.float64)) ** 2
    np.testing.assert_allclose(gradient[0], exact, rtol=8e-7)
    for sample in (-12.0, -3.0, 0.5, 2.0, 9.0):
        at = np.array([sample], dtype=np.float32)
        mixed = mixed_gradients(packed, np.zeros_like(at), at[None], np.ones((1, 1), np.float32))
        h, slope = np.tanh(sample), 1.0 / np.cosh(sample) ** 2
        # of w1 tanh(w0 f): d/dw0 and d/dw1 of its derivative by f
        expected = [slope - 2.0 * h * slope * sample, slope]
        np.testing.assert_allclose(mixed, expected, rtol=2e-6)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(trees(), st.integers(1, 5)), min_size=1, max_size=4),
    st.sampled_from([1, 7, 100, 256, 300]),
    st.integers(0, 2**31),
)
def test_networks_of_one_loss_share_blocks(
    runs: list[tuple[Expression, int]], samples: int, seed: int
) -> None:
    """Networks of one loss are evaluated in one row of blocks: exactly what each of them gives alone."""
    rng = np.random.default_rng(seed)
    programs = []
    for tree, count in runs:
        program = compile_weighted_tree(tree)
        other = program.with_loss_params(1.5 * program.loss_params)  # differs in its weights alone
        programs += [*[program] * count, other]
    y = rng.uniform(0.1, 1.0, samples)
    f = rng.uniform(-1.0, 1.0, (len(programs), samples))
    value, gradient = loss_gradients(pack_programs(programs, np.float64), y, f)
    for p, program in enumerate(programs):
        alone = loss_gradients(pack_programs([program], np.float64), y, f[p : p + 1])
        np.testing.assert_array_equal(value[p], alone[0][0])
        np.testing.assert_array_equal(gradient[p], alone[1][0])


@pytest.mark.parametrize("name", list(OPERATORS))
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_operator_is_finite(name: str, dtype: type) -> None:
    points = np.array([0.0, -0.0, 1e-8, -1e-7, 1e-7, 0.5, -1.0, 1.0, 1e3, -1e6, 1e6], dtype=dtype)
    y, f = (grid.ravel() for grid in np.meshgrid(points, points))
    for args in ([F, Y], [Y, F], [F, F]):
        tree = call(name, *args[: OPERATORS[name].arity])
        packed = pack_programs([compile_expression(tree)], dtype)
        value, gradient = loss_gradients(packed, y, f[None])
        assert np.isfinite(value).all()
        assert np.isfinite(gradient).all()


def test_another_operator_table_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled code that numba has cached would not notice, and compute other operators."""
    moved = dict(reversed(OPERATORS.items()))
    monkeypatch.setattr("evoloss.expressions.operators.OPERATORS", moved)
    with pytest.raises(ExpressionError, match=r"kernel_forward\.py"):
        pack_programs([compile_expression(call("abs", F))])


def test_nan_never_becomes_finite() -> None:
    y = np.zeros(1)
    for name, operator in OPERATORS.items():
        packed = pack_programs(
            [compile_expression(call(name, *[F, Y][: operator.arity]))], np.float64
        )
        value, _ = loss_gradients(packed, y, np.full((1, 1), np.nan))
        assert np.isnan(value).all(), name


@pytest.mark.parametrize(("name", "ulps"), [("log", 1.5), ("tanh", 2.0)])
def test_elementary_functions_in_float32(name: str, ulps: float) -> None:
    """They are polynomials of our own there, which LLVM vectorises; float64 is the reference."""
    rng = np.random.default_rng(0)
    size = np.exp(rng.uniform(np.log(2e-7), np.log(1e6), 100_000))
    near = 1.0 + rng.uniform(-0.5, 1.0, 100_000)
    f = np.concatenate([size, -size, near, -near, [1.0, 1e38, 1.2e-7]]).astype(np.float32)
    packed = pack_programs([compile_expression(call(name, F))], np.float32)
    value, _ = loss_gradients(packed, np.zeros_like(f), f[None])
    exact = {"log": lambda x: np.log(np.abs(x)), "tanh": np.tanh}[name](f.astype(np.float64))
    assert (np.abs(value[0] - exact) / np.spacing(np.abs(exact).astype(np.float32))).max() <= ulps


@pytest.mark.parametrize("size", [1, 50, 255, 256, 257, 600])
def test_elements_that_do_not_fill_a_block(size: int) -> None:
    rng = np.random.default_rng(size)
    y, f, u = rng.uniform(0.1, 1.0, (3, size))
    program = compile_weighted_tree(call("log", call("mul", call("sub", F, Y), F)))
    value, gradient, mixed = autograd(program, y, f, u)
    packed = pack_programs([program], np.float64)
    v, g = loss_gradients(packed, y, f[None])
    close(v[0], value, np.abs(value).max())
    close(g[0], gradient, np.abs(gradient).max())
    close(mixed_gradients(packed, y, f[None], u[None]), mixed, np.abs(mixed).max())


def test_instructions_with_several_users() -> None:
    """Their adjoints add up: an argument of both sides, of one operator twice, and of another operator."""
    rng = np.random.default_rng(0)
    y, f, u = rng.uniform(0.5, 1.0, (3, 150))
    shared = call("tanh", F)
    tree = call("add", call("mul", shared, shared), call("aq", call("square", shared), Y))
    program = compile_expression(tree)
    assert len(program) == 7
    program = program.with_loss_params(program.loss_params * 1.3)
    weights = rng.uniform(0.5, 1.5, len(program))
    program = Program(program.ops, program.a, program.b, weights, program.trainable)
    _, gradient, mixed = autograd(program, y, f, u)
    packed = pack_programs([program], np.float64)
    close(loss_gradients(packed, y, f[None])[1][0], gradient, np.abs(gradient).max())
    close(mixed_gradients(packed, y, f[None], u[None]), mixed, np.abs(mixed).max())


def test_only_the_kernels_are_cached_on_disk() -> None:
    """Numba does not see when a function calls another file's: those must be compiled with their caller."""
    callees = [
        value
        for module in (kernel_rows, kernel_forward, kernel_reverse, kernels)
        for value in vars(module).values()
        if isinstance(value, Dispatcher)
    ]
    assert len(callees) > 20
    assert all(isinstance(callee._cache, NullCache) for callee in callees)
    for kernel in kernels.compile_kernels():
        (digest,) = (cell.cell_contents for cell in kernel.py_func.__closure__)
        assert isinstance(digest, int)
