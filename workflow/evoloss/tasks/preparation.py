"""Splitting first, then scaling: whatever is fitted is fitted on the training rows alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evoloss.errors import ConfigError, DataError
from evoloss.seeding import derive_seed
from evoloss.tasks.sources import Source
from evoloss.tasks.surnames import MAX_CHARACTERS

SPLITS = ("train", "validation", "test")
PADDING_ID = 0
UNKNOWN_ID = 1


@dataclass(frozen=True, eq=False)
class Prepared:
    """Encoded inputs and targets of ALL rows, scaled with the statistics of the training rows.

    ``x`` is float32 ``(rows, ...)`` or int64 ``(rows, 16)`` for text; ``y`` int64 ``(rows,)`` or
    float32 ``(rows, 1)``.
    """

    x: NDArray[Any]
    y: NDArray[Any]
    num_outputs: int
    vocabulary_size: int | None
    target_mean: float | None
    target_scale: float | None


def split_rows(
    source: Source, fractions: Sequence[float], data_seed: int
) -> dict[str, NDArray[np.int64]]:
    """Return disjoint row numbers for train, validation and test, each in random order.

    The order matters: the rejection protocol and the points of a learning curve take the first
    rows of a split as its sample, and sources are sorted by class. Classes are split one by one (a
    stratified split that keeps even the smallest class in every split).

    Raises
    ------
    ConfigError
        If ``fractions`` are not three positive numbers that sum to 1.
    DataError
        If a class (or a regression dataset) has fewer than 3 rows.
    """
    from sklearn.model_selection import train_test_split

    check_fractions(fractions)
    labels = source.y if source.kind == "classification" else np.zeros(len(source.y), np.int64)
    # The legacy generator is what scikit-learn takes; one instance serves all classes in turn.
    generator = np.random.RandomState(derive_seed(data_seed, "split", source.name) % 2**32)
    parts: dict[str, list[NDArray[np.int64]]] = {name: [] for name in SPLITS}
    for label in range(int(labels.max()) + 1):
        rows = np.flatnonzero(labels == label)
        if len(rows) < len(SPLITS):
            raise DataError(_describe_small_class(source, label, len(rows)))
        num_validation = max(1, round(len(rows) * fractions[1]))
        num_test = max(1, round(len(rows) * fractions[2]))
        # A tiny class with a large share of held-out rows still keeps one row for training.
        num_validation = min(num_validation, len(rows) - 2)
        num_test = min(num_test, len(rows) - num_validation - 1)
        rest, test = train_test_split(rows, test_size=num_test, random_state=generator)
        train, validation = train_test_split(rest, test_size=num_validation, random_state=generator)
        for name, part in zip(SPLITS, (train, validation, test), strict=True):
            parts[name].append(part)
    return {
        name: generator.permutation(np.concatenate(part)).astype(np.int64)
        for name, part in parts.items()
    }


def _describe_small_class(source: Source, label: int, count: int) -> str:
    if source.kind != "classification":
        return (
            f"dataset {source.name!r} has {count} rows; at least 3 are needed, one for each split"
        )
    return (
        f"dataset {source.name!r}: class {source.class_names[label]!r} has {count} "
        f"{'sample' if count == 1 else 'samples'}; at least 3 are needed, one for each of train, "
        "validation and test"
    )


def check_fractions(fractions: Sequence[float]) -> None:
    """Raise `ConfigError` unless ``fractions`` are three positive numbers that sum to 1."""
    good = (
        isinstance(fractions, Sequence)
        and len(fractions) == len(SPLITS)
        and all(isinstance(f, int | float) and f > 0 for f in fractions)
        and abs(sum(fractions) - 1.0) < 1e-6
    )
    if not good:
        raise ConfigError(
            "datasets: split must be three positive fractions (train, validation, test) that sum "
            f"to 1, not {fractions!r}"
        )


def encode_source(source: Source, train_rows: NDArray[np.int64]) -> Prepared:
    """Return every row of ``source`` as numbers; statistics and vocabulary are those of train."""
    encode = _ENCODERS[source.encoding]
    x, vocabulary_size = encode(source.x, train_rows)
    if source.kind == "classification":
        return Prepared(x, source.y, len(source.class_names), vocabulary_size, None, None)
    y, mean, scale = _standardise_target(source, train_rows)
    return Prepared(x, y, 1, vocabulary_size, mean, scale)


def _standardise_target(
    source: Source, train_rows: NDArray[np.int64]
) -> tuple[NDArray[np.float32], float, float]:
    train = source.y[train_rows]
    mean, scale = float(train.mean()), float(train.std())
    if not scale > 0.0:
        raise DataError(
            f"dataset {source.name!r}: the target is {mean:g} in every training row, so there is "
            "nothing to learn"
        )
    return ((source.y - mean) / scale).astype(np.float32)[:, None], mean, scale


def _encode_columns(
    x: NDArray[Any], train_rows: NDArray[np.int64]
) -> tuple[NDArray[np.float32], None]:
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(x[train_rows])
    return np.asarray(scaler.transform(x), dtype=np.float32), None


def _encode_image(
    x: NDArray[Any], train_rows: NDArray[np.int64]
) -> tuple[NDArray[np.float32], None]:
    mean, scale = x[train_rows].mean(), x[train_rows].std()
    return ((x - mean) / (scale or 1.0)).astype(np.float32), None


def _encode_text(x: NDArray[Any], train_rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], int]:
    letters = sorted(set("".join(x[train_rows])))
    ids: Mapping[str, int] = {letter: UNKNOWN_ID + 1 + i for i, letter in enumerate(letters)}
    encoded = np.full((len(x), MAX_CHARACTERS), PADDING_ID, dtype=np.int64)
    for row, text in enumerate(x):
        codes = [ids.get(letter, UNKNOWN_ID) for letter in text[:MAX_CHARACTERS]]
        encoded[row, : len(codes)] = codes
    return encoded, len(letters) + 2


def _encode_table(x: Any, train_rows: NDArray[np.int64]) -> tuple[NDArray[np.float32], None]:
    """Standardise numeric columns, one-hot the others (all zeros if unseen in training)."""
    import pandas as pd

    numeric = [c for c in x.columns if pd.api.types.is_numeric_dtype(x[c])]
    blocks: list[NDArray[np.float32]] = []
    if numeric:
        blocks.append(_encode_columns(x[numeric].to_numpy(dtype=np.float64), train_rows)[0])
    for column in x.columns:
        if column not in numeric:
            values = x[column].astype(str).to_numpy(dtype=np.str_)
            categories = np.unique(values[train_rows])
            blocks.append((values[:, None] == categories[None, :]).astype(np.float32))
    return np.concatenate(blocks, axis=1), None


_ENCODERS: dict[str, Callable[[Any, NDArray[np.int64]], tuple[NDArray[Any], int | None]]] = {
    "columns": _encode_columns,
    "image": _encode_image,
    "text": _encode_text,
    "table": _encode_table,
}
