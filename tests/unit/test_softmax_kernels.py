"""The compiled softmax kernels against torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from evoloss.engine.softmax_kernels import cross_entropy, multiply_by_jacobian


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("scale", [0.1, 3.0, 200.0])
def test_cross_entropy_equals_torch(dtype: type, scale: float) -> None:
    generator = np.random.default_rng(0)
    z = (scale * generator.standard_normal((3, 7, 33))).astype(dtype)
    y = generator.integers(0, 7, 33)
    values, gradient = cross_entropy(z, np.eye(7, dtype=dtype)[:, y])
    logits = torch.from_numpy(z).double().requires_grad_()
    expected = functional.cross_entropy(
        logits, torch.from_numpy(y).expand(3, -1), reduction="none"
    ).mean(-1)
    expected.sum().backward()
    assert values.dtype == gradient.dtype == dtype
    tolerance = 1e-6 if dtype == np.float32 else 1e-13
    np.testing.assert_allclose(values, expected.detach().numpy(), rtol=tolerance)
    assert logits.grad is not None
    np.testing.assert_allclose(gradient, logits.grad.numpy(), atol=tolerance / 33)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_logit_that_is_not_finite_is_never_hidden(bad: float) -> None:
    z = np.zeros((2, 3, 20), dtype=np.float32)
    z[1, 1, 5] = bad
    values, gradient = cross_entropy(z, np.eye(3, dtype=np.float32)[:, np.ones(20, dtype=int)])
    assert np.isfinite(values[0])
    assert np.isfinite(gradient[0]).all()
    assert not np.isfinite(values[1])


def test_another_class_may_be_impossible() -> None:
    z = np.zeros((1, 3, 20), dtype=np.float32)
    z[0, 2, 5] = -np.inf
    y = np.ones(20, dtype=int)
    values, gradient = cross_entropy(z, np.eye(3, dtype=np.float32)[:, y])
    logits = torch.from_numpy(z[0].T.copy()).requires_grad_()
    expected = functional.cross_entropy(logits, torch.from_numpy(y))
    expected.backward()
    assert values[0] == pytest.approx(expected.item(), rel=1e-6)
    assert logits.grad is not None
    np.testing.assert_allclose(gradient[0], logits.grad.numpy().T, atol=1e-8)


@pytest.mark.parametrize("shared", [True, False])
def test_jacobian_equals_autograd(shared: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(3, 5, 11, generator=generator, dtype=torch.float64)
    logits = torch.randn(1 if shared else 3, 5, 11, generator=generator, dtype=torch.float64)
    p, pull_back = torch.func.vjp(lambda z: z.softmax(-2), logits.expand(3, -1, -1))
    found = multiply_by_jacobian(p[: len(logits)].contiguous().numpy(), u.numpy(), 0.5)
    np.testing.assert_allclose(found, 0.5 * pull_back(u)[0].numpy(), atol=1e-15)
