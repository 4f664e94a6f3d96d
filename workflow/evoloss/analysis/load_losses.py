"""The learned losses of all searches as one table, from hall of fame to loss file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from evoloss.analysis.load import Paths, commit_of, identify, join_frames, version_of
from evoloss.results import read_json

LOSS_COLUMNS = [
    "task",
    "method",
    "search_seed",
    "status",
    "reason",
    "kind",
    "expression",
    "scale",
    "infix",
    "latex",
    "tree_complexity",
    "complexity_before",
    "complexity_after",
    "verified",
    "simplify_reason",
    "start_score",
    "best_score",
    "learning_rate",
    "version",
    "commit",
]


def load_losses(
    losses: Paths, finetuned: Paths, simplified: Paths, searches: Paths
) -> pd.DataFrame:
    """Read the loss files with what led to them: one row per task, method and search seed that has a loss file.

    Parameters
    ----------
    losses, finetuned, simplified, searches : paths
        The ``loss.json``, ``finetune.json``, simplify and ``hall_of_fame.json`` files, in any
        order.
    """
    tables = {
        name: {_search(path): read_json(path) for path in map(str, paths)}
        for name, paths in (
            ("loss", losses),
            ("finetune", finetuned),
            ("simplify", simplified),
            ("search", searches),
        )
    }
    rows = [
        _row(key, {name: table.get(key) or {} for name, table in tables.items()})
        for key in sorted(tables["loss"])
    ]
    return join_frames([pd.DataFrame(rows)], LOSS_COLUMNS)


def _search(path: str | Path) -> tuple[str, str, int]:
    known = identify(path)
    return str(known["task"]), str(known["method"]), int(known["seed"])


def _row(key: tuple[str, str, int], documents: dict[str, dict[str, Any]]) -> dict[str, Any]:
    loss, finetune, search = (documents[name] for name in ("loss", "finetune", "search"))
    status = loss.get("status", "failed" if not loss.get("expression") else "ok")
    reasons = (document.get("reason") for document in (loss, finetune, search))
    entry = _simplified_entry(documents["simplify"], finetune)
    return {
        "task": key[0],
        "method": key[1],
        "search_seed": key[2],
        "status": status,
        "reason": next((reason for reason in reasons if reason), None),
        "kind": loss.get("kind"),
        "expression": loss.get("expression"),
        "scale": loss.get("scale"),
        "infix": loss.get("text"),
        "latex": loss.get("latex"),
        "tree_complexity": entry.get("tree_complexity"),
        "complexity_before": entry.get("complexity_before"),
        "complexity_after": loss.get("complexity", entry.get("complexity_after")),
        "verified": entry.get("verified"),
        "simplify_reason": entry.get("reason"),
        "start_score": finetune.get("start_score"),
        "best_score": finetune.get("best_score"),
        "learning_rate": search.get("learning_rate"),
        "version": version_of(loss),
        "commit": commit_of(loss),
    }


def _simplified_entry(simplify: dict[str, Any], finetune: dict[str, Any]) -> dict[str, Any]:
    """Find the simplified loss that was chosen; without a match nothing is claimed."""
    index, candidates = finetune.get("selected"), finetune.get("candidates") or []
    if not isinstance(index, int) or index >= len(candidates):
        return {}
    start = candidates[index].get("expression")
    same = (entry for entry in simplify.get("entries") or [] if entry.get("simplified") == start)
    return dict(next(same, {}))
