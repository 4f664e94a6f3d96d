"""The configuration's checks, without Snakemake."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evoloss import config as settings
from evoloss import config_file
from evoloss.errors import ConfigError

ROOT = Path(__file__).parents[2]
SCHEMA = config_file.read_schema(ROOT / "workflow" / "schemas" / "config.schema.yaml")
SHIPPED = [ROOT / "config.yaml", *sorted((ROOT / "workflow" / "presets").glob("*.yaml"))]


@pytest.fixture
def config() -> dict[str, Any]:
    return config_file.read_config(ROOT / "config.yaml")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configurations_are_valid(path: Path) -> None:
    settings.validate_config(config_file.read_config(path), SCHEMA, path.name)


def test_every_level_of_the_schema_refuses_unknown_keys() -> None:
    def find_open(schema: Any, path: str) -> list[str]:
        if not isinstance(schema, dict):
            return []
        found = [path] if "properties" in schema and "additionalProperties" not in schema else []
        return found + [p for key, part in schema.items() for p in find_open(part, f"{path}/{key}")]

    assert find_open(SCHEMA, "") == []


def set_value(config: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split("/")
    for key in parents:
        config = config.setdefault(key, {})
    config[last] = value


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        ("serach", {}, "unknown key: 'serach' (did you mean 'search'?)"),
        ("tasks/diabetes/model", "mlp", "unknown key in tasks.diabetes: 'model'"),
        ("tasks/diabetes/search", {"max_hight": 3}, "did you mean 'max_height'?"),
        ("tasks/my-task", {"dataset": "diabetes", "models": ["mlp"]}, "must start with a letter"),
        ("tasks/diabetes", None, "tasks.diabetes must be a mapping of keys to values, not empty"),
        (
            "search/max_height",
            "10",
            "search.max_height must be an integer (at least 1, at most 40), not the",
        ),
        ("search/max_height", True, "not true"),
        ("search/init_min_height", 13, "search.init_min_height must be an integer (at least 1, at"),
        ("search/fitness_steps", 10**9, "at most 10000000"),
        ("search/population_size", 10**9, "at most 1000000"),
        ("tune_learning_rate/num_points", 10**9, "at most 1000"),
        ("training/learning_rate", "1e-3", "YAML needs a dot to see a number: write 1.0e-3"),
        ("training/learning_rate", float("nan"), "training.learning_rate must be a finite number"),
        ("training/learning_rate", float("inf"), "training.learning_rate must be a finite number"),
        ("training/learning_rate", 0, "greater than 0"),
        ("training/momentum", 1.0, "less than 1"),
        ("device", "gpu", "device has unknown value 'gpu' (did you mean 'cpu'?)"),
        ("train_seeds", [0, 1, 0], "train_seeds lists 0 twice"),
        ("train_seeds_per_job", 0, "train_seeds_per_job"),
        ("train_seeds_per_job", 5.0, "train_seeds_per_job must be"),
        ("train_seeds", [0, 1.0], "train_seeds[1] must be"),
        ("search_seeds", [], "search_seeds must be a list"),
        ("methods", ["evomall"], "unknown method in methods: 'evomall' (did you mean 'evomal'?)"),
        ("tasks/diabetes/dataset", "iris", "tasks.diabetes: unknown dataset 'iris'; accepted:"),
        ("tasks/diabetes/models", ["resnet"], "unknown model 'resnet'; accepted: linear, mlp (for"),
        (
            "tasks/diabetes/models",
            ["gru"],
            "unsuited model 'gru'; accepted: linear, mlp (for dataset 'diabetes', table)",
        ),
        ("tasks/diabetes/models", ["mlp", "mlp"], "tasks.diabetes.models lists 'mlp' twice"),
        ("tasks/diabetes/label_noise", {"kind": "symmetric", "rate": 0.5}, "needs a classific"),
        ("tasks/mnist5k/label_noise", {"kind": "symmetric", "rate": 1}, "less than 1"),
        ("datasets/split", [0.5, 0.2, 0.2], "[0.5, 0.2, 0.2] sums to 0.9"),
        ("datasets/split", [0.5, 0.5], "datasets.split must be a list (entries: 3)"),
        ("search/elitism_rate", 0.2, "elitism_rate must be at most 1, but is 1.15"),
        ("search/init_min_height", 5, "init_min_height <= init_max_height <= max_height"),
        ("search/tournament_size", 99, "tournament_size 99 must be at most population_size"),
        ("training/nesterov", True, "training.nesterov: true needs training.momentum"),
        ("training/optimizer", "adamw", "training.optimizer has unknown value 'adamw' (did you"),
        (
            "tasks/mnist5k/training/optimizer",
            "adam",
            "for tasks.mnist5k, methods: evomal needs training.optimizer: sgd",
        ),
        ("tasks/diabetes/training/optimizer", "adam", "adam needs training.momentum: 0.0, but is"),
        ("train/num_evaluations", 10**6, "must be at most train.steps"),
        ("tune_learning_rate/minimum", 99.0, "must be less than maximum"),
    ],
)
def test_refused_with_a_sentence(
    config: dict[str, Any], path: str, value: Any, sentence: str
) -> None:
    set_value(config, path, value)
    with pytest.raises(ConfigError) as caught:
        settings.validate_config(config, SCHEMA, "my.yaml")
    assert str(caught.value).startswith("my.yaml: ")
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bfloat16_has_no_linearised_form(config: dict[str, Any]) -> None:
    config["tasks"] = {"diabetes": config["tasks"]["diabetes"]}
    config["local_search"]["linearised"], config["training"]["precision"] = True, "tf32"
    settings.validate_config(config, SCHEMA, "my.yaml")
    config["training"]["precision"] = "bf16"
    with pytest.raises(
        ConfigError, match=r"linearised: true needs training\.precision: float32, fl"
    ):
        settings.validate_config(config, SCHEMA, "my.yaml")


def test_every_key_is_required(config: dict[str, Any]) -> None:
    for section in config:
        incomplete = {key: value for key, value in config.items() if key != section}
        with pytest.raises(ConfigError, match=f"key '{section}' is missing"):
            settings.validate_config(incomplete, SCHEMA)
    del config["device"], config["search"]["population_size"]
    with pytest.raises(ConfigError, match="'device' is missing; it must be one of auto, cpu, cuda"):
        settings.validate_config(config, SCHEMA)
    config["device"] = "cpu"
    with pytest.raises(ConfigError, match="population_size' is missing; it must be an int"):
        settings.validate_config(config, SCHEMA)


def test_own_csv_dataset(config: dict[str, Any], tmp_path: Path) -> None:
    options = {"path": str(tmp_path / "my.csv"), "target": "t", "kind": "regression"}
    config["datasets"]["csv"] = {"my_data": options}
    config["tasks"]["diabetes"]["dataset"] = "my_data"
    with pytest.raises(ConfigError, match=r"datasets\.csv\.my_data\.path: there is no file"):
        settings.validate_config(config, SCHEMA)
    for text, message in (
        ("", "path: .* cannot be read as CSV: No columns"),
        ("price,T\n1,2\n", "target: .*no column 't'"),
        ("price;t\n1;2\n", "target: .*no column 't'.*: price;t .*separated by commas"),
    ):
        (tmp_path / "my.csv").write_text(text)
        with pytest.raises(ConfigError, match=rf"datasets\.csv\.my_data\.{message}"):
            settings.validate_config(config, SCHEMA)
    (tmp_path / "my.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"my_data\.path: .* cannot be read as CSV: 'utf-8'"):
        settings.validate_config(config, SCHEMA)
    (tmp_path / "my.csv").write_text("\ufeffa,t\n1,1\n", encoding="utf-8")
    settings.validate_config(config, SCHEMA)
    assert settings.describe_dataset(config, "my_data") == ("regression", "table")


def test_a_task_overrides_single_keys(config: dict[str, Any]) -> None:
    merged = settings.merge_section(config, "diabetes", "training")
    assert merged["momentum"] == config["tasks"]["diabetes"]["training"]["momentum"]
    assert merged["precision"] == config["training"]["precision"]
    assert list(merged) == sorted(merged)
    assert settings.merge_section(config, "mnist5k", "training")["momentum"] == 0.0
    config["tasks"]["mnist5k"]["search"] = {"learning_rate": "base"}
    assert settings.uses_tuned_rate(config, "mnist5k_noisy")
    assert not settings.uses_tuned_rate(config, "mnist5k")


@pytest.mark.parametrize(
    ("files", "merged", "left"),
    [
        ([{"tasks": {"a": 1, "b": 1}}, {"tasks": {"a": None}}], {"a": None, "b": 1}, {"b": 1}),
        ([{"tasks": {"a": 1}}, {"tasks": {"a": None}}, {"tasks": {"a": 2}}], {"a": 2}, {"a": 2}),
        (
            [{"tasks": {"a": 1}}, {"tasks": {"a": None}}],
            {"a": 3},
            {"a": 3},
        ),  # --config gave it again
        ([{"tasks": {"a": None}}], {"a": None}, {"a": None}),
        ([{"tasks": {"a": 1}}, {"tasks": {"b": None}}], {"a": 1, "b": None}, {"a": 1, "b": None}),
        ([{"tasks": {"a": 1}}, {"tasks": 3}], 3, 3),
        ([{}], {}, {}),
    ],
)
def test_a_later_file_drops_tasks_of_earlier_ones(
    files: list[dict[str, Any]], merged: Any, left: Any
) -> None:
    config = {"tasks": merged}
    config_file.drop_tasks(config, files)
    assert config == {"tasks": left}


def test_adam_is_accepted_without_evomal(config: dict[str, Any]) -> None:
    config["methods"] = ["baseline", "gp_lfl"]
    config["tasks"]["mnist5k"]["training"]["optimizer"] = "adam"
    settings.validate_config(config, SCHEMA)


def test_order_of_keys_changes_no_parameter(config: dict[str, Any]) -> None:
    reordered = copy.deepcopy(config)
    reordered["search"] = dict(reversed(reordered["search"].items()))
    first = settings.merge_section(config, "mnist5k", "search")
    assert repr(settings.merge_section(reordered, "mnist5k", "search")) == repr(first)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a: 1\nb: [1\n", "is not valid YAML in line 3"),
        ("a: 1\n\tb: 2\n", "is not valid YAML in line 2"),
        ("a: {b: 1, b: 2}\n", "key 'b' is given twice, the second time in line 1"),
        ("- a\n", "must be a mapping"),
        ("", "must be a mapping"),
        ("a: \x00\n", "is not valid YAML"),
    ],
)
def test_unreadable_files_are_named(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        config_file.read_config(path)
    assert "bad.yaml" in str(caught.value)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml cannot be read"):
        config_file.read_config(tmp_path / "none.yaml")


def test_names_agree_with_the_registries() -> None:
    datasets = pytest.importorskip("evoloss.tasks.datasets")
    models = pytest.importorskip("evoloss.tasks.models")
    assert set(datasets.DATASETS) - {"csv"} == set(settings.DATASETS)
    assert set(models.MODELS) == set(settings.MODELS)


@given(
    seeds=st.lists(
        st.integers(0, 60) | st.integers(0, 2**31 - 1), min_size=1, max_size=30, unique=True
    ),
    size=st.integers(1, 16),
)
def test_every_training_seed_is_in_one_group(seeds: list[int], size: int) -> None:
    groups = settings.group_seeds(seeds, size)
    assert [seed for group in groups.values() for seed in group] == sorted(seeds)
    assert max(map(len, groups.values())) <= size
    assert len(groups) == math.ceil(len(seeds) / size)
    for name, group in groups.items():
        ranges = [(part.split("-")[0], part.split("-")[-1]) for part in name.split("_")]
        assert [n for a, b in ranges for n in range(int(a), int(b) + 1)] == group
