"""The configuration: what is accepted, one sentence for what is not, and per-task overrides merged.

The shape (keys, types, ranges) is the JSON schema's business
(``workflow/schemas/config.schema.yaml``); this module turns its first complaint into a sentence and
checks what a schema cannot say. It imports neither torch nor Snakemake, because every job of a
workflow reads the configuration anew.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jsonschema

from evoloss.config_messages import describe_error, rank_error
from evoloss.errors import ConfigError, describe_choices

Config = Mapping[str, Any]

METHODS = ("baseline", "baseline_tuned", "gp_lfl", "evomal")
LEARNED_METHODS = ("gp_lfl", "evomal")
TASK_SECTIONS = ("training", "search", "local_search", "finetune", "train", "tune_learning_rate")
"""Sections whose keys a task may override in a subsection of the same name."""

DATASETS = {
    "diabetes": ("regression", "table"),
    "mnist5k": ("classification", "image"),
    "surnames": ("classification", "text"),
}
"""Built-in datasets: (kind of task, form of input)."""

MODELS = {
    "linear": ("table", "image"),
    "mlp": ("table", "image"),
    "lenet5": ("image",),
    "char_cnn": ("text",),
    "gru": ("text",),
}
"""Base models: the forms of input they take."""

LINEARISED_MODELS = ("linear", "mlp")
"""Models whose local search can be linearised."""


def validate_config(config: Config, schema: Mapping[str, Any], source: str = "config.yaml") -> None:
    """Refuse a configuration that no job could run with.

    Parameters
    ----------
    config
        The complete configuration, as read from YAML.
    schema
        The JSON schema, see `evoloss.config_file.read_schema`.
    source
        The name of the file or files, for the message.

    Raises
    ------
    ConfigError
        With one sentence that names the file, key, value and what is accepted.
    """
    try:
        _check_shape(config, schema)
        _check_top_level(config)
        for name in config["tasks"]:
            _check_task(config, name)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None


def merge_section(config: Config, task: str, section: str) -> dict[str, Any]:
    """Return a section's keys in sorted order, with the task's own values where it has any.

    The order is fixed because Snakemake compares parameters as text: else reordering keys would
    rerun a search.
    """
    own = config["tasks"][task].get(section, {}) if section in TASK_SECTIONS else {}
    merged: dict[str, Any] = sort_keys({**config[section], **own})
    return merged


def group_seeds(seeds: Sequence[int], size: int) -> dict[str, list[int]]:
    """Return the seeds in ascending order, ``size`` of them in a group; a group's name says which they are.

    >>> group_seeds([0, 1, 2, 4, 9, 5], 4)
    {'0-2_4': [0, 1, 2, 4], '5_9': [5, 9]}
    """
    ordered = sorted(seeds)
    groups = [ordered[i : i + size] for i in range(0, len(ordered), size)]
    return {_name_seeds(group): group for group in groups}


def _name_seeds(seeds: Sequence[int]) -> str:
    """Return ascending seeds as text, those in a row as a range."""
    ranges: list[list[int]] = []
    for seed in seeds:
        if ranges and seed == ranges[-1][-1] + 1:
            ranges[-1].append(seed)
        else:
            ranges.append([seed])
    return "_".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in ranges)


def sort_keys(value: Any) -> Any:
    """Return a copy of ``value`` made of plain dicts with sorted keys and plain lists."""
    if isinstance(value, Mapping):
        return {key: sort_keys(value[key]) for key in sorted(value)}
    if isinstance(value, (list, tuple)):
        return [sort_keys(item) for item in value]
    return value


def describe_dataset(config: Config, name: str) -> tuple[str, str]:
    """Return a dataset's kind of task and form of input; raises `ConfigError` if it is unknown."""
    tables = config["datasets"].get("csv", {})
    if name in tables:
        return str(tables[name]["kind"]), "table"
    if name not in DATASETS:
        raise ConfigError(
            f"unknown dataset {describe_choices(name, [*DATASETS, *tables])}, or the name of a CSV file in datasets.csv"
        )
    return DATASETS[name]


def uses_tuned_rate(config: Config, task: str) -> bool:
    """Whether the task's learned losses are searched and trained at the tuned learning rate."""
    return bool(merge_section(config, task, "search")["learning_rate"] == "tuned")


def _check_shape(config: Config, schema: Mapping[str, Any]) -> None:
    # JSON Schema calls 5.0 an integer, which no count of ours is
    strict = jsonschema.validators.extend(  # type: ignore[no-untyped-call]
        jsonschema.Draft202012Validator,
        type_checker=jsonschema.Draft202012Validator.TYPE_CHECKER.redefine("integer", _is_integer),
    )
    validator = strict(schema)
    errors = sorted(validator.iter_errors(config), key=rank_error)
    if errors:
        raise ConfigError(describe_error(errors[0], schema["$defs"]))
    _check_finite(config, "")


def _is_integer(checker: object, value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_finite(value: object, path: str) -> None:
    """Refuse .nan and .inf, which pass every numeric bound of a schema."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{path} must be a finite number, not {value}")
    if isinstance(value, Mapping):
        for key, item in value.items():
            _check_finite(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            _check_finite(item, f"{path}[{index}]")


def _check_top_level(config: Config) -> None:
    for key in ("search_seeds", "train_seeds", "methods"):
        _check_unique(key, config[key])
    for method in config["methods"]:
        if method not in METHODS:
            raise ConfigError(f"unknown method in methods: {describe_choices(method, METHODS)}")
    split = config["datasets"]["split"]
    if not math.isclose(sum(split), 1.0, abs_tol=1e-9):
        raise ConfigError(f"datasets.split must sum to 1, but {split} sums to {sum(split):g}")
    for name, options in config["datasets"].get("csv", {}).items():
        if name in DATASETS:
            raise ConfigError(
                f"datasets.csv.{name} has the name of a built-in dataset; choose another name"
            )
        _check_csv(f"datasets.csv.{name}", Path(options["path"]), options["target"])


def _check_csv(where: str, path: Path, target: str) -> None:
    """Check that the file is there and has the target column; what else may be wrong with it, its first job tells."""
    if not path.is_file():
        raise ConfigError(f"{where}.path: there is no file {str(path.absolute())!r}")
    import pandas as pd  # only here: all that runs without a table of its own starts sooner

    try:
        header = list(map(str, pd.read_csv(path, nrows=0).columns))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{where}.path: {str(path)!r} cannot be read as CSV: {reason}") from error
    if target not in header:
        hint = " (columns are separated by commas)" if len(header) == 1 else ""
        raise ConfigError(
            f"{where}.target: {str(path)!r} has no column {describe_choices(target, header)}{hint}"
        )


def _check_unique(key: str, values: Sequence[object]) -> None:
    for value in values:
        if values.count(value) > 1:
            raise ConfigError(f"{key} lists {value!r} twice; each entry must be unique")


def _check_task(config: Config, name: str) -> None:
    task, where = config["tasks"][name], f"tasks.{name}"
    try:
        kind, form = describe_dataset(config, task["dataset"])
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    _check_unique(f"{where}.models", task["models"])
    suited = [model for model, forms in MODELS.items() if form in forms]
    for model in task["models"]:
        if model not in suited:
            problem = "unsuited" if model in MODELS else "unknown"
            raise ConfigError(
                f"{where}: {problem} model {describe_choices(model, suited)} (for dataset {task['dataset']!r}, {form})"
            )
    if "label_noise" in task and kind != "classification":
        raise ConfigError(
            f"{where}.label_noise needs a classification dataset, but {task['dataset']!r} is {kind}"
        )
    settings = {key: merge_section(config, name, key) for key in TASK_SECTIONS}
    _check_settings(settings, where)
    if settings["local_search"]["linearised"] and task["models"][0] not in LINEARISED_MODELS:
        raise ConfigError(
            f"for {where}, local_search.linearised: true needs a first model that has a linearised form "
            f"({' or '.join(LINEARISED_MODELS)}), not {task['models'][0]!r}"
        )
    if "evomal" in config["methods"] and settings["training"]["optimizer"] == "adam":
        raise ConfigError(
            f"for {where}, methods: evomal needs training.optimizer: sgd, because its local search "
            "differentiates through SGD steps; choose sgd or take evomal out of methods"
        )


def _check_settings(settings: Mapping[str, Mapping[str, Any]], where: str) -> None:
    """Check what spans several keys, on the sections as the task sees them."""
    training, search, train = settings["training"], settings["search"], settings["train"]
    tune, prefix = settings["tune_learning_rate"], f"for {where},"
    rates = [search[f"{name}_rate"] for name in ("crossover", "mutation", "elitism")]
    if sum(rates) > 1 + 1e-9:
        raise ConfigError(
            f"{prefix} search.crossover_rate + mutation_rate + elitism_rate must be at most 1, "
            f"but is {sum(rates):g}"
        )
    heights = [search[f"{name}_height"] for name in ("init_min", "init_max", "max")]
    if heights != sorted(heights):
        raise ConfigError(
            f"{prefix} search needs init_min_height <= init_max_height <= max_height, "
            f"but has {', '.join(map(str, heights))}"
        )
    if search["tournament_size"] > search["population_size"]:
        raise ConfigError(
            f"{prefix} search.tournament_size {search['tournament_size']} must be at most "
            f"population_size {search['population_size']}"
        )
    if training["optimizer"] == "adam" and training["momentum"] > 0:
        raise ConfigError(
            f"{prefix} training.optimizer: adam needs training.momentum: 0.0, "
            f"but is {training['momentum']}"
        )
    if settings["local_search"]["linearised"] and settings["local_search"]["inner_steps"] > 1:
        raise ConfigError(
            f"{prefix} local_search.linearised: true needs local_search.inner_steps: 1"
        )
    if settings["local_search"]["linearised"] and training["precision"] == "bf16":
        raise ConfigError(
            f"{prefix} local_search.linearised: true needs training.precision: float32, float64 or tf32, not bf16"
        )
    if training["nesterov"] and training["momentum"] == 0:
        raise ConfigError(
            f"{prefix} training.nesterov: true needs training.momentum greater than 0"
        )
    if train["num_evaluations"] > train["steps"]:
        raise ConfigError(
            f"{prefix} train.num_evaluations {train['num_evaluations']} must be at most "
            f"train.steps {train['steps']}"
        )
    if tune["minimum"] >= tune["maximum"]:
        raise ConfigError(
            f"{prefix} tune_learning_rate.minimum {tune['minimum']} must be less than "
            f"maximum {tune['maximum']}"
        )
