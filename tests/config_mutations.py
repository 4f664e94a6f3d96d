"""Seeded mutations of a good configuration, of the kinds that people make."""

from __future__ import annotations

import copy
import random
from typing import Any

Path = tuple[Any, ...]

VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 10**9, 10**30, 0.0, -0.5, 0.5, 1.0, 1e-300, 1e300, float("nan"), float("inf"),
    "", "1e-3", "12", "tuned", "evomal", "diabetes", "surnames", "mlp", "gru", "cuda", "float64", "ä\u0000\n{x}",
    "x" * 300,
    [], [0], [0, 0], [1, "a"], [[]], ["mlp"], {}, {"kind": "symmetric", "rate": 0.5}, {"a": {"b": []}}, {1: 2},
]  # fmt: skip


def list_paths(node: Any, path: Path = ()) -> list[Path]:
    """Return the paths of all values below ``node``."""
    if isinstance(node, dict):
        items: Any = node.items()
    elif isinstance(node, list):
        items = enumerate(node)
    else:
        return []
    return [p for key, value in items for p in [(*path, key), *list_paths(value, (*path, key))]]


def get_value(node: Any, path: Path) -> Any:
    for key in path:
        node = node[key]
    return node


def misspell(word: str, generator: random.Random) -> str:
    place = generator.randrange(len(word) + 1)
    return generator.choice([word[:place] + "x" + word[place:], word[:place] + word[place + 1 :]])


def mutate_config(
    config: dict[str, Any], generator: random.Random
) -> tuple[dict[str, Any], set[str]]:
    """Return a copy with one to three changes, and the keys on the way to every changed place.

    A change: another value, a key removed, misspelt or moved, an entry twice, a number scaled.
    """
    mutant, touched = copy.deepcopy(config), set[str]()
    for _ in range(generator.choice([1, 1, 1, 2, 3])):
        paths = list_paths(mutant)
        if not paths:
            break
        path = generator.choice(paths)
        touched.update(str(key) for key in path)
        parent, key = get_value(mutant, path[:-1]), path[-1]
        kind = generator.choice(["value", "value", "remove", "misspell", "move", "twice", "scale"])
        if kind == "remove":
            del parent[key]
        elif kind == "misspell" and isinstance(key, str):
            word = misspell(key, generator)
            touched.add(word)
            parent[word] = parent.pop(key)
        elif kind == "move":
            parent[key] = copy.deepcopy(get_value(mutant, generator.choice(paths)))
        elif kind == "twice" and isinstance(parent, list):
            parent.append(copy.deepcopy(parent[key]))
        elif kind == "scale" and type(parent[key]) in (int, float):
            parent[key] *= generator.choice([0, -1, 2, 0.5, 1000])
        else:
            parent[key] = copy.deepcopy(generator.choice(VALUES))
    return mutant, touched
