"""Datasets: prepared once by their own seed, stored as plain arrays with a card."""

from __future__ import annotations

import hashlib
import math
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evoloss import __version__
from evoloss.errors import ConfigError, DataError, describe_choices
from evoloss.provenance import provenance
from evoloss.results import write_atomically, write_json
from evoloss.tasks.preparation import SPLITS, Prepared, encode_source, split_rows
from evoloss.tasks.sources import Source, load_diabetes, load_mnist5k
from evoloss.tasks.surnames import load_surnames

Arrays = dict[str, NDArray[Any]]

DEFAULT_SPLIT = (0.6, 0.2, 0.2)
KINDS = ("classification", "regression")
UNPACKED_BYTES = 2**30
UNPACKED_RATIO = 200
"""A file that unpacks to more than `UNPACKED_BYTES` and so many times its own size is refused as a trap."""


def _without_options(load: Callable[[str], Source]) -> Callable[[str, Mapping[str, Any]], Source]:
    def load_built_in(name: str, options: Mapping[str, Any]) -> Source:
        if options:
            raise ConfigError(
                f"dataset {name!r} takes no options, not {', '.join(map(repr, sorted(options)))}"
            )
        return load(name)

    return load_built_in


def _load_csv(name: str, options: Mapping[str, Any]) -> Source:
    # pandas is slow to import, and training jobs import this module only to read.
    from evoloss.tasks.csv_source import load_csv

    return load_csv(name, options)


DATASETS: dict[str, Callable[[str, Mapping[str, Any]], Source]] = {
    "diabetes": _without_options(load_diabetes),
    "mnist5k": _without_options(load_mnist5k),
    "surnames": _without_options(load_surnames),
    "csv": _load_csv,
}
"""Dataset name: loader ``(name, options) -> Source``."""


def prepare_dataset(
    name: str,
    *,
    data_seed: int,
    split: Sequence[float] = DEFAULT_SPLIT,
    options: Mapping[str, Any] | None = None,
) -> tuple[Arrays, dict[str, Any]]:
    """Load, split and scale a dataset.

    Parameters
    ----------
    name : str
        A name of `DATASETS`; any other name with a ``path`` among its options is a CSV dataset of
        that name.
    data_seed : int
        Seed of the splits.
    split : sequence of 3 floats
        Fractions of train, validation and test, which sum to 1.
    options : mapping, optional
        For a CSV dataset ``{path, target, kind}``.

    Returns
    -------
    arrays : dict
        ``x_*``, ``y_*``, ``rows_*`` for every split, and the scalars ``kind``, ``num_outputs``,
        ``vocabulary_size`` (0 where there is no text), so that the file is enough to build a
        task.
    card : dict
        What a reader wants to know: source, licence, sizes, class counts, checksum.

    Raises
    ------
    ConfigError
        If the name, an option or the split is refused.
    DataError
        If the data is missing or unusable.
    """
    given = dict(options or {})
    load = DATASETS.get(name)
    if load is None and "path" in given:
        load = _load_csv
    if load is None:
        raise ConfigError(f"unknown dataset {describe_choices(name, DATASETS)}")
    source = load(name, given)
    rows = split_rows(source, split, data_seed)
    prepared = encode_source(source, rows["train"])
    arrays: Arrays = {
        "kind": np.array(source.kind),
        "num_outputs": np.array(prepared.num_outputs, dtype=np.int64),
        "vocabulary_size": np.array(prepared.vocabulary_size or 0, dtype=np.int64),
    }
    for part in SPLITS:
        arrays[f"x_{part}"] = prepared.x[rows[part]]
        arrays[f"y_{part}"] = prepared.y[rows[part]]
        arrays[f"rows_{part}"] = rows[part]
    return arrays, _make_card(source, prepared, arrays, data_seed, split)


def _make_card(
    source: Source, prepared: Prepared, arrays: Arrays, data_seed: int, split: Sequence[float]
) -> dict[str, Any]:
    counts = {
        part: {
            class_name: int(np.count_nonzero(arrays[f"y_{part}"] == label))
            for label, class_name in enumerate(source.class_names)
        }
        for part in SPLITS
    }
    return {
        "name": source.name,
        "kind": source.kind,
        "source": source.source,
        "source_version": source.source_version,
        "licence": source.licence,
        "num_rows": len(source.y),
        "sizes": {part: len(arrays[f"rows_{part}"]) for part in SPLITS},
        "input_shape": list(prepared.x.shape[1:]),
        "num_outputs": prepared.num_outputs,
        "class_names": list(source.class_names),
        "class_counts": counts if source.class_names else None,
        "target_mean": prepared.target_mean,
        "target_scale": prepared.target_scale,
        "vocabulary_size": prepared.vocabulary_size,
        "data_seed": data_seed,
        "split": [float(fraction) for fraction in split],
        "checksum": compute_checksum(arrays),
        "version": __version__,
        "provenance": provenance({"data_seed": data_seed, "split": list(split)}),
    }


def compute_checksum(arrays: Mapping[str, NDArray[Any]]) -> str:
    """Return the SHA-256 (hex) of the arrays: names (sorted), types, shapes and bytes."""
    state = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        state.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        state.update(array.tobytes())
    return state.hexdigest()


def save_dataset(
    arrays: Mapping[str, NDArray[Any]],
    card: Mapping[str, Any],
    npz_path: str | Path,
    card_path: str | Path,
) -> None:
    """Write arrays (compressed npz, no pickle) and card (JSON), each whole or not at all."""

    def write(path: Path) -> None:
        # An open file keeps NumPy from appending ".npz" to the temporary name.
        with path.open("wb") as stream:
            np.savez_compressed(stream, allow_pickle=False, **arrays)

    write_atomically(npz_path, write)
    write_json(card_path, dict(card))


def read_dataset(npz_path: str | Path) -> Arrays:
    """Read and check a file written by `save_dataset`; nothing in it is executed.

    Raises
    ------
    DataError
        If the file is missing, damaged, or not a dataset.
    """
    path = Path(npz_path)
    if not path.is_file():
        raise DataError(f"dataset file {path} does not exist; prepare the dataset first")
    try:
        _check_sizes(path)
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (
        MemoryError,
        OSError,
        ValueError,
        EOFError,
        KeyError,
        AttributeError,
        NotImplementedError,
        RuntimeError,
        SyntaxError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"dataset file {path} is damaged or not a dataset: {reason}") from error
    problem = _find_problem(arrays)
    if problem:
        raise DataError(f"dataset file {path} is damaged or not a dataset: {problem}")
    return arrays


def _check_sizes(path: Path) -> None:
    """Refuse an archive that would unpack to far more than it is; raises `ValueError`, or what zipfile raises."""
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            with archive.open(member) as stream:
                version = np.lib.format.read_magic(stream)
                read = (
                    np.lib.format.read_array_header_1_0
                    if version == (1, 0)
                    else np.lib.format.read_array_header_2_0
                )
                shape, _, dtype = read(stream)
            if math.prod(shape) * dtype.itemsize > member.file_size:
                raise ValueError(f"{member.filename} is shorter than its shape {shape}")
        total = sum(member.file_size for member in archive.infolist())
    if total > max(UNPACKED_BYTES, UNPACKED_RATIO * path.stat().st_size):
        raise ValueError(f"it would unpack to {total} bytes")


def _find_problem(arrays: Arrays) -> str | None:
    """Return what is wrong with the arrays of a dataset file, or None."""
    names = {f"{kind}_{part}" for kind in ("x", "y", "rows") for part in SPLITS}
    missing = sorted((names | {"kind", "num_outputs", "vocabulary_size"}) - set(arrays))
    if missing:
        return f"it lacks the array {missing[0]!r}"
    if str(arrays["kind"]) not in KINDS:
        return f"its kind is {str(arrays['kind'])!r}, not one of {', '.join(KINDS)}"
    for scalar in ("num_outputs", "vocabulary_size"):
        if arrays[scalar].shape != () or arrays[scalar].dtype != np.int64:
            return f"{scalar!r} is not an integer"
    for part in SPLITS:
        problem = _find_split_problem(arrays, part)
        if problem:
            return problem
    rows = np.concatenate([arrays[f"rows_{part}"] for part in SPLITS])
    if len(np.unique(rows)) != len(rows):
        return "its splits share rows"
    return None


def _find_split_problem(arrays: Arrays, part: str) -> str | None:
    x, y, rows = (arrays[f"{kind}_{part}"] for kind in ("x", "y", "rows"))
    classes = str(arrays["kind"]) == "classification"
    expected = {
        f"x_{part}": (x, np.int64 if arrays["vocabulary_size"] else np.float32),
        f"y_{part}": (y, np.int64 if classes else np.float32),
        f"rows_{part}": (rows, np.int64),
    }
    for name, (array, dtype) in expected.items():
        if array.dtype != dtype:
            return f"{name!r} has the type {array.dtype}, not {np.dtype(dtype)}"
        if array.ndim == 0 or len(array) != len(rows) or len(array) == 0:
            return f"{name!r} has the shape {array.shape} for {rows.size} rows"
        if not np.isfinite(array).all():
            return f"{name!r} holds values that are not finite"
    if x.ndim < 2 or x.shape[1:] != arrays["x_train"].shape[1:]:
        return f"'x_{part}' has the shape {x.shape}"
    if y.shape != ((len(rows),) if classes else (len(rows), int(arrays["num_outputs"]))):
        return f"'y_{part}' has the shape {y.shape}"
    if classes and not (y.min() >= 0 and y.max() < max(2, int(arrays["num_outputs"]))):
        return f"'y_{part}' holds classes outside 0..{int(arrays['num_outputs']) - 1}"
    if arrays["vocabulary_size"] and not (x.min() >= 0 and x.max() < arrays["vocabulary_size"]):
        return f"'x_{part}' holds characters outside the vocabulary"
    return None
