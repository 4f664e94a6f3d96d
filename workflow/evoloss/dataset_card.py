"""Dataset cards: what a prepared dataset is made of, as JSON that is checked when it is read."""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema

from evoloss.errors import DataError

MAX_BYTES = 10_000_000


@cache
def _validator() -> Any:
    text = resources.files("evoloss").joinpath("dataset_card.schema.json").read_text("utf-8")
    return jsonschema.Draft202012Validator(json.loads(text))


def read_dataset_card(path: str | Path) -> dict[str, Any]:
    """Read and check a card; keys as in ``dataset_card.schema.json``.

    Raises
    ------
    DataError
        In one sentence: unreadable, too large, not JSON, or not a dataset card.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise DataError(f"dataset card {path} cannot be read: {error}") from error
    if len(raw) > MAX_BYTES:
        raise DataError(
            f"dataset card {path} is larger than {MAX_BYTES} bytes, so it is not a card"
        )
    try:
        card = json.loads(raw.decode("utf-8"))
        problem = jsonschema.exceptions.best_match(_validator().iter_errors(card))
    except (ValueError, RecursionError, OverflowError) as error:
        raise DataError(f"dataset card {path} is not JSON: {str(error)[:200]}") from error
    if problem is not None:
        place = ".".join(str(part) for part in problem.absolute_path) or "the top level"
        raise DataError(
            f"dataset card {path} is not valid at {place[:100]}: {problem.message[:200]}"
        )
    return dict(card)
