"""The Triton kernels agree with the compiled CPU kernels: on a GPU, or else through Triton's interpreter."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from expression_strategies import draw_loss
from numpy.typing import NDArray

from evoloss.engine.kernels import PackedPrograms, loss_gradients, mixed_gradients, pack_programs
from evoloss.expressions import OPERATORS, F, Y, call, compile_expression, compile_weighted_tree
from evoloss.expressions.program import Program

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
pytest.importorskip("triton", reason="Triton is not installed (it comes with CUDA builds of torch)")

from evoloss.engine.triton_kernels import BLOCK, DevicePrograms  # noqa: E402

TREES = 200 if DEVICE.type == "cuda" else 30
"""The interpreter takes about a second a tree."""

Array = NDArray[Any]
Pair = tuple[Array, Array]


def draw_programs(count: int) -> list[Program]:
    """Half of them with a weight on every edge, half with shared subtrees."""
    rng = np.random.default_rng(0)
    programs = [
        (compile_weighted_tree if i % 2 else compile_expression)(draw_loss(rng, 0.1 * (i % 4 == 0)))
        for i in range(count)
    ]
    # weights away from 1 keep ties and zeros, where one-sided derivatives differ, improbable
    return [
        program.with_loss_params(
            program.loss_params * rng.normal(1.0, 0.05, len(program.loss_params))
        )
        for program in programs
    ]


def draw_elements(size: int, count: int, dtype: type) -> tuple[Array, Array, Array]:
    """Labels (N,), predictions (P, N) and directions (P, N)."""
    rng = np.random.default_rng(1)
    y = rng.integers(0, 2, count)
    f, u = rng.uniform(size=(size, count)), rng.normal(size=(size, count))
    return y.astype(dtype), f.astype(dtype), u.astype(dtype)


def on_device(packed: PackedPrograms, *arrays: Array) -> Pair:
    """Gradients by f, and mixed gradients."""
    y, f, u = (torch.from_numpy(array).to(DEVICE) for array in arrays)
    programs = DevicePrograms(packed, DEVICE)
    results = programs.loss_gradients(y, f), programs.mixed_gradients(y, f, u)
    return results[0].cpu().numpy(), results[1].cpu().numpy()


def on_cpu(packed: PackedPrograms, *arrays: Array) -> Pair:
    y, f, u = arrays
    return loss_gradients(packed, y, f)[1], mixed_gradients(packed, y, f, u)


def relative_errors(
    actual: Pair, expected: Pair, offsets: NDArray[np.int64]
) -> NDArray[np.floating]:
    """Largest error of every program's gradient and mixed gradient, relative to the largest entry, (P, 2)."""

    def worst(found: Iterable[Array], wanted: Iterable[Array]) -> list[float]:
        pairs = zip(found, wanted, strict=True)
        return [np.abs(a - b).max() / (np.abs(b).max() or 1.0) for a, b in pairs]

    mixed = (np.split(part[1], offsets[1:-1]) for part in (actual, expected))
    return np.array([worst(actual[0], expected[0]), worst(*mixed)]).T


def test_random_trees() -> None:
    programs = draw_programs(TREES)
    exact = draw_elements(TREES, 60, np.float64)
    packed = pack_programs(programs, np.float64)
    reference = on_cpu(packed, *exact)
    assert relative_errors(on_device(packed, *exact), reference, packed.offsets).max() < 1e-11

    single = pack_programs(programs, np.float32)
    arrays = draw_elements(TREES, 60, np.float32)
    cpu, device = on_cpu(single, *arrays), on_device(single, *arrays)
    own = relative_errors(cpu, reference, packed.offsets)
    # rounding moves some trees by more than 1e-6: there the CPU's float32 is as far from float64
    allowed = np.maximum(1e-6, 8 * own)
    assert (relative_errors(device, cpu, packed.offsets) <= allowed).all()
    assert np.mean(allowed <= 1e-6) > 0.5


def test_shared_predictions_and_several_blocks() -> None:
    packed = pack_programs(draw_programs(4), np.float64)
    y, f, u = draw_elements(4, 2 * BLOCK + 7, np.float64)
    shared = on_device(packed, y, f[:1], u)
    expected = on_cpu(packed, y, f[:1], u)
    assert relative_errors(shared, expected, packed.offsets).max() < 1e-11


def test_new_weights() -> None:
    packed = pack_programs(draw_programs(3), np.float32)
    y, f, u = draw_elements(3, 20, np.float32)
    programs = DevicePrograms(packed, DEVICE)
    packed.weights[:] *= np.float32(1.25)
    programs.set_weights(packed.weights)
    found = programs.mixed_gradients(*(torch.from_numpy(a).to(DEVICE) for a in (y, f, u)))
    expected = mixed_gradients(packed, y, f, u)
    np.testing.assert_allclose(found.cpu().numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_ties_protection_and_nan(dtype: type) -> None:
    """At kinks, around the protected zero and at NaN the same one-sided derivative is taken."""
    points = np.array([0, -0.0, 1e-8, -1e-7, 1e-7, 0.5, -1, 1e-3, 2, np.nan], dtype=dtype)
    y, f = (grid.ravel() for grid in np.meshgrid(points, points))
    arguments = ([F, Y], [Y, F], [F, F])
    trees = [call(n, *args[: op.arity]) for n, op in OPERATORS.items() for args in arguments]
    # an operator on top, so that second derivatives count
    packed = pack_programs([compile_weighted_tree(call("square", tree)) for tree in trees], dtype)
    ones = np.ones((len(trees), len(f)), dtype)
    finite = ~np.isnan(y) & ~np.isnan(f)
    tolerance = 1e-5 if dtype is np.float32 else 1e-13
    gradient, _ = on_device(packed, y, f[None], ones)
    expected, _ = on_cpu(packed, y, f[None], ones)
    np.testing.assert_allclose(gradient, expected, rtol=tolerance)
    arrays = y[finite], f[None, finite], ones[:, finite]
    errors = relative_errors(on_device(packed, *arrays), on_cpu(packed, *arrays), packed.offsets)
    # another kink's derivative would be an error of order one; the sums' terms cancel
    assert errors.max() < 100 * tolerance


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_tanh_from_tiny_to_saturated(dtype: type) -> None:
    """It is made of exp and log; with one element d2 (f tanh(f)) / (df dw) = tanh(f) + f (1 - tanh(f)^2)."""
    points = [1e-9, -1e-5, 1e-3, 0.3, -2, 8, -25, 1e6]
    tree = compile_weighted_tree(call("mul", F, call("tanh", F)))
    packed = pack_programs([tree] * len(points), dtype)
    f = np.array(points, dtype=dtype)[:, None]
    _, mixed = on_device(packed, np.zeros(1, dtype), f, np.ones_like(f))
    found = np.array([weights[-1] for weights in np.split(mixed, packed.offsets[1:-1])])
    expected = np.tanh(points) + points * (1 - np.tanh(points) ** 2)
    tolerance = 5e-6 if dtype is np.float32 else 1e-12
    np.testing.assert_allclose(found, expected, rtol=tolerance)
