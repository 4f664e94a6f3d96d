"""A search's state as plain values for a checkpoint, and back."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from evoloss.engine.racing import FinishedTrainings
from evoloss.expressions import Expression, format_text, parse_expression
from evoloss.search.archive import Archive, Record

MAX_NODES = 10**7
"""No limit for what a search itself has made; a loss file's is far below."""


def parse_tree(text: str) -> Expression:
    """Return the expression that `format_text` wrote."""
    return parse_expression(text, MAX_NODES)


def describe_archive(archive: Archive, before: int) -> dict[str, Any]:
    """Return the archive as it was before generation ``before``, but with all finished trainings.

    A generation that is resumed evaluates its candidates again from what the checkpoint knows of them.
    """
    records = {k: r for k, r in archive.records.items() if r.generation < before}
    return {
        "records": [
            [
                key,
                format_text(record.tree),
                format_text(record.expression),
                record.complexity,
                record.status,
                record.fitness,
                record.generation,
                record.spared,
                record.best_case,
                record.twin_of,
            ]
            for key, record in records.items()
        ],
        "key_by_gradient": [
            [gradient.hex(), key]
            for gradient, key in archive.key_by_gradient.items()
            if key in records
        ],
        "finished": [[rung, list(scores)] for rung, scores in archive.finished.scores.items()],
    }


def restore_archive(state: Mapping[str, Any]) -> Archive:
    """Return the archive that `describe_archive` described."""
    records = {
        key: Record(parse_tree(tree), parse_tree(expression), *rest)
        for key, tree, expression, *rest in state["records"]
    }
    return Archive(
        records,
        {bytes.fromhex(gradient): key for gradient, key in state["key_by_gradient"]},
        FinishedTrainings({rung: list(scores) for rung, scores in state["finished"]}),
    )


def describe_random(generator: random.Random) -> list[Any]:
    """Return the state of Python's generator."""
    version, words, gauss = generator.getstate()
    return [version, list(words), gauss]


def restore_random(generator: random.Random, state: list[Any]) -> None:
    """Set the state that `describe_random` described."""
    version, words, gauss = state
    generator.setstate((version, tuple(words), gauss))
