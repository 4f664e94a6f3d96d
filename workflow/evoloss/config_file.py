"""Configuration files: read strictly, and what several of them mean together. Free of torch, as `evoloss.config` is."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from evoloss.errors import ConfigError


class _StrictLoader(yaml.SafeLoader):
    """A safe YAML loader that refuses a key given twice; YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: list[object] = []
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                line = key_node.start_mark.line + 1
                raise ConfigError(f"key {key!r} is given twice, the second time in line {line}")
            seen.append(key)
        return super().construct_mapping(node, deep)


def read_config(path: str | Path) -> dict[str, Any]:
    """Read a YAML file; raises `ConfigError` with the file and the line of the problem."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        config = _StrictLoader(text).get_single_data()
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{path} is not valid YAML{where}: {error.problem}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path} must be a mapping of keys to values, as config.yaml is")
    return config


def drop_tasks(config: dict[str, Any], files: Sequence[Mapping[str, Any]]) -> None:
    """Take those tasks out of the merged ``config`` that one of its ``files`` gave and a later one set to null.

    A task that is null from the start was rather forgotten: the schema refuses it.
    """
    given = {
        name
        for file in files
        if isinstance(file.get("tasks"), Mapping)
        for name, task in file["tasks"].items()
        if task is not None
    }
    tasks = config.get("tasks")
    if isinstance(tasks, dict):
        for name in given:
            if name in tasks and tasks[name] is None:
                del tasks[name]


def read_schema(path: str | Path) -> dict[str, Any]:
    """Read the JSON schema of the configuration."""
    schema: dict[str, Any] = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    return schema
