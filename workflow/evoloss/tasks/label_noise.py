"""Wrong labels on purpose: for training data only, to see which losses withstand them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evoloss.errors import ConfigError, describe_choices

Labels = NDArray[np.int64]


def _symmetric(labels: Labels, num_classes: int, generator: np.random.Generator) -> Labels:
    # Drawn from ALL classes, so one in num_classes keeps its label by chance.
    return generator.integers(0, num_classes, size=len(labels), dtype=np.int64)


def _pair_flip(labels: Labels, num_classes: int, generator: np.random.Generator) -> Labels:
    return (labels + 1) % num_classes


LABEL_NOISE: dict[str, Callable[[Labels, int, np.random.Generator], Labels]] = {
    "symmetric": _symmetric,
    "pair_flip": _pair_flip,
}
"""Kind of noise: function that gives the new labels of the rows chosen."""


def apply_label_noise(
    labels: Labels,
    num_classes: int,
    noise: Mapping[str, Any],
    generator: np.random.Generator,
) -> Labels:
    """Return a copy of ``labels`` with ``round(rate * rows)`` of them, at random, replaced.

    Parameters
    ----------
    labels : int64 array of shape (rows,)
        Class positions.
    num_classes : int
        Number of classes.
    noise : mapping
        ``kind``: ``symmetric`` (a label drawn uniformly from all classes) or ``pair_flip`` (the
        next class); ``rate``: fraction of the rows, in [0, 1).
    generator : numpy.random.Generator
        Source of the draws.

    Raises
    ------
    ConfigError
        If a key, the kind or the rate is refused.
    """
    kind, rate = check_label_noise(noise)
    noisy = labels.copy()
    chosen = generator.choice(len(labels), size=round(rate * len(labels)), replace=False)
    noisy[chosen] = LABEL_NOISE[kind](labels[chosen], num_classes, generator)
    return noisy


def check_label_noise(noise: Mapping[str, Any]) -> tuple[str, float]:
    """Return kind and rate of a ``label_noise`` section, or raise `ConfigError`."""
    for key in noise:
        if key not in ("kind", "rate"):
            raise ConfigError(f"label_noise: unknown key {describe_choices(key, ('kind', 'rate'))}")
    kind, rate = noise.get("kind"), noise.get("rate")
    if kind not in LABEL_NOISE:
        raise ConfigError(f"label_noise: unknown kind {describe_choices(kind, LABEL_NOISE)}")
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0.0 <= rate < 1.0:
        raise ConfigError(f"label_noise: rate must be a number in [0, 1), not {rate!r}")
    return str(kind), float(rate)
