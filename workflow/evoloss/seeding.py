"""Independent, named random streams: one seed never serves two purposes."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np


def derive_seed(*parts: int | str) -> int:
    """Return a 63-bit seed for the stream named by ``parts``, e.g. ``derive_seed(3, "batches")``."""
    text = "\x1f".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def numpy_generator(*parts: int | str) -> np.random.Generator:
    """Return the NumPy generator of the stream named by ``parts``."""
    return np.random.default_rng(derive_seed(*parts))


@contextmanager
def global_random(generator: random.Random) -> Iterator[None]:
    """Lend ``generator`` to code that draws from Python's global ``random`` (DEAP does), then restore the latter."""
    outside = random.getstate()
    random.setstate(generator.getstate())
    try:
        yield
    finally:
        generator.setstate(random.getstate())
        random.setstate(outside)
