"""What strangers hand us: mutated configurations, loss files, dataset files and cards.

Each is either accepted or refused with our own error: no other exception, no hang, no memory beyond the file's worth,
and nothing in it is executed.
"""

from __future__ import annotations

import json
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from config_mutations import mutate_config
from evoloss import config as configuration
from evoloss import config_file
from evoloss.dataset_card import read_dataset_card
from evoloss.errors import ConfigError, DataError, LossFileError
from evoloss.expressions import parse_expression
from evoloss.losses.loss_file import read_loss, save_loss
from evoloss.tasks.datasets import prepare_dataset, read_dataset, save_dataset

ROOT = Path(__file__).parents[2]
SCHEMA = config_file.read_schema(ROOT / "workflow" / "schemas" / "config.schema.yaml")
GOOD = config_file.read_config(ROOT / "config.yaml")

thousand = settings(
    max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@thousand
@given(st.randoms(use_true_random=False))
def test_mutated_configurations(generator: random.Random) -> None:
    mutant, touched = mutate_config(GOOD, generator)
    try:
        configuration.validate_config(mutant, SCHEMA, "mine.yaml")
    except ConfigError as error:
        message = str(error)
    else:
        return
    assert message.startswith("mine.yaml: ")
    assert "\n" not in message
    assert len(message) < 1000
    assert any(name in message for name in touched), (message, touched)


@pytest.fixture(scope="module")
def loss_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("loss") / "loss.json"
    expression = parse_expression("add(mul(0.71, square(sub(y, f(x)))), tanh(aq(f(x), y)))")
    save_loss(path, kind="classification", expression=expression, scale=1.5, provenance={"a": [1]})
    return path.read_bytes()


@pytest.fixture(scope="module")
def dataset_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    directory = tmp_path_factory.mktemp("dataset")
    arrays, card = prepare_dataset("diabetes", data_seed=0)
    small = {name: array[:20] if array.shape else array for name, array in arrays.items()}
    save_dataset(small, card, directory / "d.npz", directory / "d.json")
    return (directory / "d.npz").read_bytes(), (directory / "d.json").read_bytes()


def mutate_bytes(good: bytes, generator: random.Random) -> bytes:
    data = bytearray(good)
    for _ in range(generator.choice([1, 1, 2, 5])):
        place = generator.randrange(len(data) + 1)
        kind = generator.choice(["change", "change", "cut", "insert", "repeat"])
        piece = bytes(generator.randrange(256) for _ in range(generator.choice([1, 2, 8])))
        if kind == "change":
            data[place : place + len(piece)] = piece
        elif kind == "cut":
            del data[place : place + generator.choice([1, 10, len(data)])]
        elif kind == "insert":
            data[place:place] = piece
        else:
            data[place:place] = data[place : place + generator.choice([1, 50, 1000])] * 3
    return bytes(data)


def mutate_json(good: bytes, generator: random.Random) -> bytes:
    """Change values and keys of a JSON object as of a configuration, or its text."""
    if generator.random() < 0.3:
        return mutate_bytes(good, generator)
    mutant, _ = mutate_config(json.loads(good), generator)
    text = json.dumps(mutant)
    if generator.random() < 0.1:
        text = text.replace("null", "[" * 50_000, 1)
    return text.encode()


@thousand
@given(st.randoms(use_true_random=False))
def test_mutated_loss_files(loss_file: bytes, tmp_path: Path, generator: random.Random) -> None:
    path = tmp_path / "loss.json"
    path.write_bytes(mutate_json(loss_file, generator))
    try:
        record = read_loss(path)
    except LossFileError as error:
        refusal = str(error)
    else:
        assert record["status"] in ("ok", "failed")
        return
    assert str(path) in refusal


FORMULAS = [
    "__import__('os')", "y.__class__", "add(", ")", "add(y)", "f(x)", "1e999", "(" * 5000, "add(" * 5000, "y" * 10**5,
    "lambda: y", "add(y, f(x)); y", "mul(-1e-400, f(x))", "nan", "square(f(x)" + ")" * 9, "\u0000", "\uff10",
]  # fmt: skip


@pytest.mark.parametrize("formula", FORMULAS, ids=range(len(FORMULAS)))
def test_formulas_run_nothing(loss_file: bytes, tmp_path: Path, formula: str) -> None:
    path = tmp_path / "loss.json"
    path.write_text(json.dumps(json.loads(loss_file) | {"expression": formula}))
    try:
        record = read_loss(path)
    except LossFileError:
        return
    assert "f(x)" in record["expression"]


@thousand
@given(st.randoms(use_true_random=False))
def test_mutated_dataset_files(
    dataset_files: tuple[bytes, bytes], tmp_path: Path, generator: random.Random
) -> None:
    path = tmp_path / "d.npz"
    path.write_bytes(mutate_bytes(dataset_files[0], generator))
    try:
        arrays = read_dataset(path)
    except DataError as error:
        refusal = str(error)
    else:
        assert arrays["x_train"].shape[1:] == (10,)
        return
    assert str(path) in refusal


def write_npz(path: Path, arrays: dict[str, Any], header: bytes | None = None) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, array, allow_pickle=True)
        if header is not None:
            length = len(header).to_bytes(2, "little")
            archive.writestr("x_train.npy", b"\x93NUMPY\x01\x00" + length + header)


@pytest.mark.parametrize(
    ("arrays", "header"),
    [
        ({"x_train": np.array([{"a": 1}], dtype=object)}, None),
        ({"kind": np.array("x")}, b"{'descr': '<f4', 'fortran_order': False, 'shape': (10000000000000,)}\n"),
        ({"kind": np.array("x")}, b"{'descr': '<f4', 'fortran_order': False, 'shape': (-5,)}\n"),
        ({"kind": np.array("x")}, b"{'descr': __import__('os').system('true'), 'shape': ()}\n"),
        ({"kind": np.array("x")}, b"(" * 60000),
        ({"x_train": np.zeros(2**27 + 1, dtype=np.float64)}, None),
    ],
    ids=["pickle", "huge shape", "negative shape", "code", "nested", "bomb"],
)  # fmt: skip
def test_hostile_dataset_files(
    tmp_path: Path, arrays: dict[str, Any], header: bytes | None
) -> None:
    path = tmp_path / "d.npz"
    write_npz(path, arrays, header)
    with pytest.raises(DataError, match="damaged or not a dataset"):
        read_dataset(path)


@thousand
@given(st.randoms(use_true_random=False))
def test_mutated_dataset_cards(
    dataset_files: tuple[bytes, bytes], tmp_path: Path, generator: random.Random
) -> None:
    path = tmp_path / "d.json"
    path.write_bytes(mutate_json(dataset_files[1], generator))
    try:
        card = read_dataset_card(path)
    except DataError as error:
        refusal = str(error)
    else:
        assert card["sizes"]["train"] >= 1
        return
    assert str(path) in refusal
