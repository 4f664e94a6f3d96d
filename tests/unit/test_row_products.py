"""Products of weights and rows at offsets against plain sums, on vectors of every length that processors have."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from evoloss.engine.row_dots import (
    LENGTH,
    add_dot_products,
    make_blocks,
    make_dot_row,
)
from evoloss.engine.row_products import make_block_row, multiply_rows, scatter_rows

GUARD = 7.0
make_dot_row_once = functools.cache(make_dot_row)
"""Compiled for all lengths and numbers of rows at once."""
TOLERANCES = {"float32": 1e-5, "float64": 1e-13}


def draw(seed: int, rows: int, taps: int, length: int, dtype: str) -> tuple[np.ndarray, ...]:
    """Return weights (rows, taps), three source rows of two places each, and the tap offsets."""
    generator = np.random.default_rng(seed)
    weights = generator.normal(size=(rows, taps)).astype(dtype)
    source = generator.normal(size=taps * 5 + 3 * length).astype(dtype)
    return weights, source, generator.permutation(taps * 5)[:taps]


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 16, 17, 23])
@pytest.mark.parametrize("length", [1, 15, 64, 100, 211])
@pytest.mark.parametrize("has_bias", [False, True])
def test_rows_are_weighted_sums(rows: int, length: int, has_bias: bool, dtype: str) -> None:
    weights, source, taps = draw(rows + length, rows, 11, length, dtype)
    bias = np.arange(rows if has_bias else 0, dtype=dtype)
    starts, stride = np.array([0, 2 * length, length]), 3 * length + 5
    target = np.full(rows * stride, GUARD, dtype)
    targets = np.array([0, length, 2 * length])
    expected = target.copy()
    for start, out in zip(starts, targets, strict=True):
        read = np.stack([source[start + tap : start + tap + length] for tap in taps])
        for m in range(rows):
            row = expected[out + m * stride : out + m * stride + length]
            row[:] = weights[m] @ read + (bias[m] if has_bias else row)
    multiply_rows(weights, source, starts, taps, target, targets, stride, rows, length, bias)
    np.testing.assert_allclose(target, expected, atol=TOLERANCES[dtype])
    assert (target.reshape(rows, stride)[:, -5:] == GUARD).all()


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("num_bytes", "num_sums"), [(64, 24), (32, 12), (16, 24), (16, 12)])
@pytest.mark.parametrize("rows", [1, 6, 8])
def test_vectors_of_any_length(rows: int, num_bytes: int, num_sums: int, dtype: str) -> None:
    """Wherever the tests run; what the processor lacks LLVM makes of what it has."""
    multiply = make_block_row(rows, num_bytes, num_sums)
    weights, source, taps = draw(rows, 2 * rows, 9, 131, dtype)
    target = np.full(rows * 140, GUARD, dtype)
    bias = np.arange(2 * rows, dtype=dtype)
    multiply(weights, rows, 2, source, 3, taps[2:], target, 2, 140, 131, bias)
    read = np.stack([source[3 + tap : 3 + tap + 131] for tap in taps[2:]])
    found = target.reshape(rows, 140)
    expected = weights[rows:, 2:] @ read + bias[rows:, None]
    np.testing.assert_allclose(found[:, 2:133], expected, atol=TOLERANCES[dtype])
    assert (found[:, :2] == GUARD).all()
    assert (found[:, 133:] == GUARD).all()


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("num_bytes", "num_sums"), [(64, 24), (32, 12), (16, 24), (16, 12)])
@pytest.mark.parametrize("length", [1, 16, 100, LENGTH + 1])
@pytest.mark.parametrize("rows", [1, 6, 8, 10])
def test_dot_products_on_vectors_of_any_length(
    rows: int, length: int, num_bytes: int, num_sums: int, dtype: str
) -> None:
    """Of the last rows and taps too, where there are fewer than a block has."""
    dot_row = make_dot_row_once(num_bytes, num_sums)
    stride, count = length + 3, 9
    _, right, taps = draw(length, rows, count, length, dtype)
    left = np.full(rows * stride + 1, np.nan, dtype)
    left[1:].reshape(rows, stride)[:, :length] = draw(1, rows, length, 1, dtype)[0]
    out = make_blocks(rows + 12, count + 12, dtype=dtype)
    out += GUARD
    dot_row(out, left, 1, stride, rows, right, 3, taps, length)
    read = np.stack([right[3 + tap : 3 + tap + length] for tap in taps])
    expected = GUARD + left[1:].reshape(rows, stride)[:, :length] @ read.T
    tolerance = 10 * length**0.5 * TOLERANCES[dtype]
    np.testing.assert_allclose(out[:rows, :count], expected, atol=tolerance)
    assert (out[12:] == GUARD).all()
    assert (out[:, 12:] == GUARD).all()


@pytest.mark.parametrize("length", [37, LENGTH + 37])
def test_scattering_and_dot_products_are_its_transposes(length: int) -> None:
    """<W x, y> = <x, W^T y> = <W, y x^T>; scattered in two pieces, of which one leaves out a tap."""
    rows, shifts = 10, np.array([0, 37, 5])
    generator = np.random.default_rng(0)
    weights = generator.normal(size=(rows, shifts.size))
    x, y = generator.normal(size=length + 40), generator.normal(size=rows * length)
    starts, outs, keep = np.zeros(1, np.int64), np.zeros(1, np.int64), np.empty(0)
    products = np.zeros_like(y)
    multiply_rows(weights, x, starts, shifts, products, outs, length, rows, length, keep)
    scattered = np.zeros_like(x)
    transposed = np.ascontiguousarray(weights.T[:, None])
    places = np.arange(rows) * length
    halves = np.array([[0, rows, 0, 20], [0, rows, 20, length - 20]])
    scatter_rows(transposed, y, outs, places, scattered, starts, shifts, halves, 0, 1, keep)
    gradient = make_blocks(rows, shifts.size, dtype="float64")
    assert gradient.shape == (12, 12)
    add_dot_products(gradient, y, outs, length, rows, x, starts, shifts, length)
    expected = products @ y
    assert scattered @ x == pytest.approx(expected, rel=1e-12)
    found = (gradient[:rows, : shifts.size] * weights).sum()
    assert found == pytest.approx(expected, rel=1e-12)
    # without the last row's share in the second piece
    halves[1, 1] -= 1
    part = np.zeros_like(x)
    scatter_rows(transposed, y, outs, places, part, starts, shifts, halves, 0, 1, keep)
    left_out = sum(
        weights[-1, t] * y[places[-1] + 20 :] @ x[shift + 20 : shift + length]
        for t, shift in enumerate(shifts)
    )
    assert part @ x == pytest.approx(expected - left_out, rel=1e-12)


def test_what_is_not_finite_stays_in_its_row() -> None:
    weights = np.array([[1.0, np.nan], [1.0, 2.0], [np.inf, 1.0]])
    target = np.zeros(3 * 20)
    multiply_rows(
        weights, np.ones(30), np.zeros(1, np.int64), np.array([0, 4]),
        target, np.zeros(1, np.int64), 20, 3, 20, np.empty(0),
    )  # fmt: skip
    found = target.reshape(3, 20)
    assert np.isnan(found[0]).all()
    assert (found[1] == 3.0).all()
    assert np.isinf(found[2]).all()


COMPARE = """
import numpy as np
from evoloss.engine.row_products import multiply_rows, scatter_rows

generator = np.random.default_rng(0)
weights, source = generator.normal(size=(13, 3)), generator.normal(size=50)
start, taps, keep = np.zeros(1, np.int64), np.array([0, 5, 9]), np.empty(0)
expected = sum(weights[:, t, None] * source[tap : tap + 20] for t, tap in enumerate(taps))

def multiply():
    found = np.zeros(13 * 20)
    multiply_rows(weights, source, start, taps, found, start, 20, 13, 20, keep)
    np.testing.assert_allclose(found.reshape(13, 20), expected)

def scatter():
    found = np.zeros(13 * 20)
    pieces = np.array([[0, 3, 0, 20]])
    scatter_rows(weights[None], source, start, taps, found, start, start, pieces, 20, 13, keep)
    np.testing.assert_allclose(found.reshape(13, 20), expected)

"""


def test_code_that_several_processes_compiled_goes_together(tmp_path: Path) -> None:
    """As jobs that run at once do: each finds in the cache what another one was first to compile."""
    environment = {
        **os.environ,
        "NUMBA_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(sys.path),
        "PYTHONHASHSEED": "0",  # part of the names in compiled code
    }
    for calls in ("multiply()", "scatter()", "multiply(), scatter()"):
        subprocess.run([sys.executable, "-c", COMPARE + calls], env=environment, check=True)
