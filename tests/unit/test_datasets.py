"""Datasets: one conformance test for every source, what is fitted on what, and bad input."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evoloss.errors import ConfigError, DataError, EvolossError
from evoloss.tasks import datasets as datasets_module
from evoloss.tasks.datasets import (
    DATASETS,
    compute_checksum,
    prepare_dataset,
    read_dataset,
    save_dataset,
)
from evoloss.tasks.preparation import SPLITS, UNKNOWN_ID, encode_source, split_rows
from evoloss.tasks.sources import Source, load_diabetes
from evoloss.tasks.surnames import SURNAME_LISTS, load_surnames, normalise_name, read_surnames

SPLIT = (0.6, 0.2, 0.2)
CSV_OPTIONS = {"target": "species", "kind": "classification"}


def write_csv(path: Path, num_rows: int = 60) -> Path:
    """Write a table with two numeric columns, one category and a target of three classes."""
    generator = np.random.default_rng(0)
    lines = ["length,width,colour,species"]
    for row in range(num_rows):
        length, width = generator.normal(5.0, 2.0), generator.integers(0, 9)
        lines.append(f"{length:.3f},{width},{'red' if row % 4 else 'blue'},{'abc'[row % 3]}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Any]]:
    """Every registered dataset, prepared once with data seed 0."""
    table = write_csv(tmp_path_factory.mktemp("csv") / "flowers.csv")
    options = {"csv": {"path": str(table), **CSV_OPTIONS}}
    return {
        name: prepare_dataset(name, data_seed=0, split=SPLIT, options=options.get(name))
        for name in DATASETS
    }


@pytest.mark.parametrize("name", sorted(DATASETS))
def test_conformance(name: str, prepared: dict[str, tuple[Any, Any]], tmp_path: Path) -> None:
    """Splits are disjoint, complete, stratified, typed as promised; the file reads back equal."""
    arrays, card = prepared[name]
    rows = np.concatenate([arrays[f"rows_{part}"] for part in SPLITS])
    assert sorted(rows) == list(range(card["num_rows"]))
    assert card["name"] == name
    assert card["checksum"] == compute_checksum(arrays)
    assert json.loads(json.dumps(card)) == card
    for key in ("source", "source_version", "licence", "version"):
        assert card[key]
    for part, fraction in zip(SPLITS, SPLIT, strict=True):
        x, y = arrays[f"x_{part}"], arrays[f"y_{part}"]
        assert card["sizes"][part] == len(x) == len(y)
        assert len(x) == pytest.approx(fraction * card["num_rows"], abs=max(2, card["num_outputs"]))
        assert list(x.shape[1:]) == card["input_shape"]
        assert x.dtype == (np.int64 if card["vocabulary_size"] else np.float32)
        if card["kind"] == "classification":
            counts = card["class_counts"][part]
            assert list(counts) == card["class_names"]
            assert sum(counts.values()) == len(y)
            for class_name, count in counts.items():
                total = sum(card["class_counts"][p][class_name] for p in SPLITS)
                assert count >= 1
                assert count == pytest.approx(fraction * total, abs=1.1)
        else:
            assert y.shape == (len(x), 1)
            assert y.dtype == np.float32
    save_dataset(arrays, card, tmp_path / "d.npz", tmp_path / "d.json")
    again = read_dataset(tmp_path / "d.npz")
    assert compute_checksum(again) == card["checksum"]
    assert json.loads((tmp_path / "d.json").read_text()) == card


@pytest.mark.parametrize("name", ["diabetes", "surnames"])
def test_same_seed_same_arrays(
    name: str, prepared: dict[str, tuple[Any, Any]], tmp_path: Path
) -> None:
    """The data seed alone decides the splits, and equal arrays make equal files."""
    arrays, card = prepared[name]
    again, card_again = prepare_dataset(name, data_seed=0, split=SPLIT)
    other, card_other = prepare_dataset(name, data_seed=1, split=SPLIT)
    assert card_again == card
    assert card_other["checksum"] != card["checksum"]
    assert not np.array_equal(other["rows_test"], arrays["rows_test"])
    save_dataset(arrays, card, tmp_path / "a.npz", tmp_path / "a.json")
    save_dataset(again, card_again, tmp_path / "b.npz", tmp_path / "b.json")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_diabetes_is_scaled_with_train_statistics(prepared: dict[str, tuple[Any, Any]]) -> None:
    """Train has mean 0 and deviation 1; the other splits are transformed in the same way."""
    arrays, card = prepared["diabetes"]
    source = load_diabetes("diabetes")
    assert np.allclose(arrays["x_train"].mean(0), 0.0, atol=1e-5)
    assert np.allclose(arrays["x_train"].std(0), 1.0, atol=1e-5)
    assert arrays["y_train"].mean() == pytest.approx(0.0, abs=1e-5)
    train, test = source.x[arrays["rows_train"]], source.x[arrays["rows_test"]]
    assert np.allclose(arrays["x_test"], (test - train.mean(0)) / train.std(0), atol=1e-5)
    restored = arrays["y_test"][:, 0] * card["target_scale"] + card["target_mean"]
    assert np.allclose(restored, source.y[arrays["rows_test"]], atol=1e-3)
    assert abs(arrays["x_test"].mean(0)).max() > 1e-3


def test_changing_heldout_rows_changes_nothing_in_train(
    prepared: dict[str, tuple[Any, Any]],
) -> None:
    """No statistic is fitted on validation or test rows."""
    source = load_diabetes("diabetes")
    rows = split_rows(source, SPLIT, 0)
    before = encode_source(source, rows["train"]).x[rows["train"]]
    source.x[rows["validation"]] += 100.0
    source.x[rows["test"]] *= -3.0
    assert np.array_equal(encode_source(source, rows["train"]).x[rows["train"]], before)


def test_mnist5k_has_one_mean_and_deviation(prepared: dict[str, tuple[Any, Any]]) -> None:
    arrays, card = prepared["mnist5k"]
    assert card["num_rows"] == 5000
    assert arrays["x_train"].shape == (3000, 1, 28, 28)
    assert arrays["x_train"].mean() == pytest.approx(0.0, abs=1e-4)
    assert arrays["x_train"].std() == pytest.approx(1.0, abs=1e-4)
    assert arrays["x_train"].min() == arrays["x_test"].min()


def test_surnames_vocabulary_is_that_of_train(prepared: dict[str, tuple[Any, Any]]) -> None:
    arrays, card = prepared["surnames"]
    assert len(card["class_names"]) == 20
    assert 14_000 < card["num_rows"] < 17_000
    assert card["source_version"].startswith("Faker ")
    used = np.unique(arrays["x_train"])
    assert list(used) == [0, *range(2, card["vocabulary_size"])]
    source = load_surnames("surnames")
    lengths = (arrays["x_test"] > 0).sum(1)
    assert [len(name) for name in source.x[arrays["rows_test"]]] == list(lengths)


def test_unseen_characters_are_unknown() -> None:
    source = Source(
        "names", "classification", "text", np.array(["ab", "bc", "xb"]), np.zeros(3, np.int64),
        ("a",), "", "", "",
    )  # fmt: skip
    encoded = encode_source(source, np.array([0, 1]))
    assert encoded.vocabulary_size == 5
    assert list(encoded.x[2, :3]) == [UNKNOWN_ID, 3, 0]


def test_surnames_belong_to_one_language() -> None:
    """No name stands twice, shared names are dropped, and the order is fixed."""
    source = load_surnames("surnames")
    assert len(set(source.x)) == len(source.x)
    assert set(source.class_names) == set(SURNAME_LISTS)
    shared = read_surnames("Spanish") & read_surnames("Italian")
    assert shared
    assert not shared & set(source.x)
    assert all(name == normalise_name(name) for name in source.x)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("Mu\u0308ller", "müller"),
        ("\u0130smay\u0131lov", "ismay\u0131lov"),
        (" O\u2019  Neill ", "o' neill"),
        ("Abcdefghijklmno Pqr", "abcdefghijklmno"),
    ],
)
def test_normalise_name(raw: str, expected: str) -> None:
    assert normalise_name(raw) == expected


def test_csv_encodes_numbers_and_categories(
    prepared: dict[str, tuple[Any, Any]], tmp_path: Path
) -> None:
    arrays, card = prepared["csv"]
    assert card["class_names"] == ["a", "b", "c"]
    assert card["input_shape"] == [4]
    assert np.allclose(arrays["x_train"][:, :2].mean(0), 0.0, atol=1e-5)
    assert set(np.unique(arrays["x_train"][:, 2:])) == {0.0, 1.0}
    path = write_csv(tmp_path / "t.csv")
    regression = {"path": str(path), "target": "length", "kind": "regression"}
    arrays, card = prepare_dataset("my_data", data_seed=3, split=SPLIT, options=regression)
    assert card["name"] == "my_data"
    assert card["class_counts"] is None
    assert arrays["y_train"].std() == pytest.approx(1.0, abs=1e-4)


def test_csv_category_unseen_in_training_is_all_zeros(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("c,y\n" + "".join(f"k{i},{i}\n" for i in range(20)))
    options = {"path": str(path), "target": "y", "kind": "regression"}
    arrays, card = prepare_dataset("csv", data_seed=0, split=SPLIT, options=options)
    assert card["input_shape"] == [12]
    assert arrays["x_train"].sum() == 12
    assert not arrays["x_test"].any()


@pytest.mark.parametrize(
    ("text", "options", "error", "words"),
    [
        (None, {}, DataError, ["does not exist"]),
        ("", {}, DataError, ["cannot be read"]),
        ("a,species\n", {}, DataError, ["no rows"]),
        ("a,specie\n1,x\n2,y\n", {}, DataError, ["'species'", "did you mean 'specie'"]),
        ("a,species\n1,x\n,x\n3,\n", {}, DataError, ["'a' (1 row)", "'species' (1 row)"]),
        ("a,species\n1,x\ninf,x\n3,x\n", {}, DataError, ["'a' (1 row)"]),
        ("a,species\n" + "1,x\n2,y\n" * 9 + "N/A,x\n", {}, DataError, ["'a' (1 row)"]),
        ("a,species\n" + "1,1\n2,2\n3,NA\n" * 9, {}, DataError, ["'species' (9 rows)"]),
        ("a,species\n" + "".join(f"{i / 8},x\n{i},y\nlow,x\n" for i in range(15)), {}, DataError, ["row 3", "14 more"]),
        ("a,species\n1,2,x\n2,3,y\n", {}, DataError, ["cannot be read as CSV", "Length of header"]),
        ("a,species\n" + "".join(f"1,{i / 8}\n" for i in range(40)), {}, DataError, ["40", "kind: regression"]),
        ("a,species\n" + "".join(f"u{i},x\nu{i},y\n" for i in range(40)) + "v,x\n", {}, DataError, ["41 distinct"]),
        ("species\nx\ny\n", {}, DataError, ["no column besides"]),
        ("a,species\n1,x\n2,x\n", {}, DataError, ["one class"]),
        ("a,species\n" + "1,x\n" * 5 + "2,rare\n", {}, DataError, ["'rare'", "1 sample;", "mine"]),
        ("a,species\n" + "1,x\n" * 5 + "2,r\n" * 2, {}, DataError, ["'r'", "2 samples;"]),
        ("a,species\n1,x\n2,y\n3,z\n", {"kind": "regression"}, DataError, ["not numeric"]),
        ("a,species\n1,2\n2,2\n3,2\n", {"kind": "regression"}, DataError, ["nothing to learn"]),
        ("a,species\n1,2\n2,3\n", {"kind": "regression"}, DataError, ["2 rows"]),
        ("a,b\n1,2\n", {"kind": "clasification"}, ConfigError, ["did you mean 'classification'"]),
        ("a,b\n1,2\n", {"targt": "b"}, ConfigError, ["did you mean 'target'"]),
        ("a,b\n1,2\n", {"target": 3}, ConfigError, ["'target'", "3"]),
    ],
)  # fmt: skip
def test_bad_csv_is_one_clear_sentence(
    text: str | None,
    options: dict[str, Any],
    error: type[EvolossError],
    words: list[str],
    tmp_path: Path,
) -> None:
    path = tmp_path / "mine.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(error) as caught:
        prepare_dataset(
            "mine", data_seed=0, split=SPLIT, options={"path": str(path), **CSV_OPTIONS, **options}
        )
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_csv_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_bytes(b"\xff\xfe\x00\x81,\x00")
    with pytest.raises(DataError, match=r"mine\.csv"):
        prepare_dataset("csv", data_seed=0, split=SPLIT, options={"path": path, **CSV_OPTIONS})


def test_csv_categories_may_have_any_name(tmp_path: Path) -> None:
    """pandas would take None and NA for missing values."""
    path = tmp_path / "mine.csv"
    path.write_text("a,species\n" + "None,None\n3+,mild\n2,None\n1,mild\n" * 10)
    options = {"path": path, **CSV_OPTIONS}
    _, card = prepare_dataset("csv", data_seed=0, split=SPLIT, options=options)
    assert card["class_names"] == ["None", "mild"]
    assert card["input_shape"] == [4]


def test_csv_numbers_of_any_size_are_numbers(tmp_path: Path) -> None:
    """pandas takes 10^20 for a text, and 0.0 to 29.0 stand for classes too."""
    path = tmp_path / "mine.csv"
    rows = "".join(f"{10**20 + i},{i % 30}.0\n" for i in range(300))
    path.write_text("a,species\n" + rows)
    options = {"path": path, **CSV_OPTIONS}
    _, card = prepare_dataset("csv", data_seed=0, split=SPLIT, options=options)
    assert card["input_shape"] == [1]
    assert len(card["class_names"]) == 30


def test_csv_identifier_column_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text("id,species\n" + "".join(f"u{i},{i % 2}\n" for i in range(1500)))
    with pytest.raises(DataError, match="'id' is not numeric and has 1500 distinct"):
        prepare_dataset("csv", data_seed=0, split=SPLIT, options={"path": path, **CSV_OPTIONS})


def test_unknown_dataset_gets_a_suggestion() -> None:
    with pytest.raises(ConfigError, match=r"'diabetis' \(did you mean 'diabetes'\?\)"):
        prepare_dataset("diabetis", data_seed=0, split=SPLIT)


def test_built_in_dataset_takes_no_options() -> None:
    with pytest.raises(ConfigError, match="takes no options, not 'path'"):
        prepare_dataset("diabetes", data_seed=0, split=SPLIT, options={"path": "x.csv"})


@pytest.mark.parametrize("split", [(0.6, 0.4), (0.5, 0.2, 0.2), (1.0, 0.0, 0.0), (0.8, 0.4, -0.2)])
def test_bad_split_is_refused(split: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="sum to 1"):
        prepare_dataset("diabetes", data_seed=0, split=split)


@pytest.mark.parametrize("split", [(0.6, 0.2, 0.2), (0.02, 0.49, 0.49), (0.98, 0.01, 0.01)])
@pytest.mark.parametrize("count", [3, 4, 7])
def test_smallest_class_is_in_every_split(split: tuple[float, ...], count: int) -> None:
    y = np.array([0] * 50 + [1] * count)
    source = Source("s", "classification", "columns", y[:, None], y, ("a", "b"), "", "", "")
    rows = split_rows(source, split, 0)
    assert all(set(y[part]) == {0, 1} for part in rows.values())
    assert sorted(np.concatenate(list(rows.values()))) == list(range(len(y)))


def test_missing_surname_list_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SURNAME_LISTS, "Polish", ("pl_PL", ("surnames",)))
    with pytest.raises(DataError, match="no surname list for Polish"):
        load_surnames("surnames")


def test_read_refuses_what_is_not_a_dataset(
    prepared: dict[str, tuple[Any, Any]], tmp_path: Path
) -> None:
    """Missing, truncated, foreign, pickled and inconsistent files are one clear error each."""
    arrays, card = prepared["diabetes"]
    good = tmp_path / "good.npz"
    save_dataset(arrays, card, good, tmp_path / "good.json")
    with pytest.raises(DataError, match="does not exist"):
        read_dataset(tmp_path / "none.npz")
    content = good.read_bytes()
    bad = tmp_path / "bad.npz"
    for data in (b"", b"hello", content[:-200], content[: len(content) // 2]):
        bad.write_bytes(data)
        with pytest.raises(DataError, match=r"bad\.npz is damaged or not a dataset"):
            read_dataset(bad)
    with bad.open("wb") as stream:
        np.savez(stream, **{**arrays, "kind": np.array([{}], dtype=object)})
    with pytest.raises(DataError, match="damaged or not a dataset"):
        read_dataset(bad)
    with zipfile.ZipFile(bad, "w") as archive:
        archive.writestr("kind.npy", b"no array")
    with pytest.raises(DataError, match="damaged or not a dataset"):
        read_dataset(bad)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x_test": None}, "lacks the array 'x_test'"),
        ({"kind": np.array("ranking")}, "'ranking'"),
        ({"num_outputs": np.array(1.5)}, "'num_outputs' is not an integer"),
        ({"x_train": np.zeros((3, 10), np.float32)}, "'x_train' has the shape"),
        ({"y_test": np.full((88, 1), np.nan, np.float32)}, "not finite"),
        ({"x_test": np.zeros((88, 10))}, "float64"),
        ({"x_test": np.zeros((88, 4), np.float32)}, "'x_test' has the shape"),
        ({"rows_test": np.arange(88)}, "share rows"),
    ],
)
def test_inconsistent_arrays_are_refused(
    change: dict[str, Any], words: str, prepared: dict[str, tuple[Any, Any]], tmp_path: Path
) -> None:
    arrays = {**prepared["diabetes"][0], **change}
    path = tmp_path / "d.npz"
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    with pytest.raises(DataError, match=words):
        read_dataset(path)


def test_damaged_bytes_never_escape_as_another_error(
    prepared: dict[str, tuple[Any, Any]], tmp_path: Path
) -> None:
    """Random single-byte damage either still reads as checked data or is a `DataError`."""
    arrays, card = prepared["diabetes"]
    save_dataset(arrays, card, tmp_path / "d.npz", tmp_path / "d.json")
    content = bytearray((tmp_path / "d.npz").read_bytes())
    generator = np.random.default_rng(0)
    path = tmp_path / "e.npz"
    refused = 0
    for position in generator.integers(0, len(content), size=300):
        damaged = bytearray(content)
        damaged[position] ^= int(generator.integers(1, 256))
        path.write_bytes(damaged)
        try:
            read_dataset(path)
        except DataError:
            refused += 1
    assert refused > 200


def test_registry_names() -> None:
    assert set(datasets_module.DATASETS) == {"diabetes", "mnist5k", "surnames", "csv"}


def test_the_first_rows_of_a_split_are_a_sample_of_it(prepared: dict[str, Any]) -> None:
    """Sources are sorted by class; the rejection protocol and learning curves take the first rows."""
    for name in ("mnist5k", "surnames"):
        arrays, card = prepared[name]
        for split in SPLITS:
            y = arrays[f"y_{split}"]
            share = np.bincount(y, minlength=card["num_outputs"]) / len(y)
            first = np.bincount(y[:500], minlength=card["num_outputs"]) / 500
            # five standard deviations of a share of 500 draws
            assert np.abs(first - share).max() < 5 * np.sqrt(share.max() / 500)
