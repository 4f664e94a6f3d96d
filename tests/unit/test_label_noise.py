"""Label noise: the rate is right, the draws are seeded, bad settings are refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evoloss.errors import ConfigError
from evoloss.tasks.label_noise import LABEL_NOISE, apply_label_noise


def noisy(labels: np.ndarray, num_classes: int, seed: int = 0, **noise: Any) -> np.ndarray:
    return apply_label_noise(labels, num_classes, noise, np.random.default_rng(seed))


def test_symmetric_noise_draws_from_all_classes() -> None:
    labels = np.repeat(np.arange(10), 2000)
    result = noisy(labels, 10, kind="symmetric", rate=0.6)
    changed = result != labels
    # 60 % are redrawn and one in ten of those draws the label it had.
    assert changed.mean() == pytest.approx(0.54, abs=0.01)
    drawn = np.bincount(result[labels == 3], minlength=10) / 2000
    assert drawn[3] == pytest.approx(0.46, abs=0.04)
    assert np.allclose(np.delete(drawn, 3), 0.06, atol=0.02)


def test_pair_flip_moves_to_the_next_class() -> None:
    labels = np.repeat(np.arange(4), 100)
    result = noisy(labels, 4, kind="pair_flip", rate=0.25)
    changed = result != labels
    assert changed.sum() == 100
    assert np.array_equal(result[changed], (labels[changed] + 1) % 4)


@given(
    kind=st.sampled_from(sorted(LABEL_NOISE)),
    rate=st.floats(0.0, 1.0, exclude_max=True),
    num_classes=st.integers(2, 20),
    num_rows=st.integers(1, 200),
    seed=st.integers(0, 2**32),
)
def test_noise_keeps_labels_valid(
    kind: str, rate: float, num_classes: int, num_rows: int, seed: int
) -> None:
    labels = np.arange(num_rows, dtype=np.int64) % num_classes
    before = labels.copy()
    result = noisy(labels, num_classes, seed, kind=kind, rate=rate)
    assert np.array_equal(labels, before)
    assert result.dtype == np.int64
    assert result.min() >= 0
    assert result.max() < num_classes
    assert (result != labels).sum() <= round(rate * num_rows)
    assert np.array_equal(result, noisy(labels, num_classes, seed, kind=kind, rate=rate))


@pytest.mark.parametrize(
    ("noise", "words"),
    [
        ({"kind": "symetric", "rate": 0.5}, "did you mean 'symmetric'"),
        ({"rate": 0.5}, "unknown kind 'None'"),
        ({"kind": "symmetric"}, "rate must be a number"),
        ({"kind": "symmetric", "rate": 1.0}, r"\[0, 1\), not 1.0"),
        ({"kind": "symmetric", "rate": -0.1}, "not -0.1"),
        ({"kind": "symmetric", "rate": "0.5"}, "not '0.5'"),
        ({"kind": "symmetric", "rate": float("nan")}, "not nan"),
        ({"kind": "symmetric", "rate": True}, "not True"),
        ({"kind": "symmetric", "rate": 0.5, "ratio": 1}, "unknown key 'ratio'"),
    ],
)
def test_bad_noise_is_refused(noise: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        noisy(np.zeros(4, np.int64), 2, **noise)
