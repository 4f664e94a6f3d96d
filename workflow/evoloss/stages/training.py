"""Meta-testing: train a model from scratch with finished losses, and score it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from evoloss.engine import Engine, Evaluation, OutputLoss, TaskLoss
from evoloss.expressions import call, compile_expression, constant, parse_expression
from evoloss.losses.loss_file import read_loss
from evoloss.stages.setup import StageInput

logger = logging.getLogger(__name__)


def _read_losses(
    engine: Engine, paths: Sequence[str | Path], search_seeds: Sequence[int]
) -> tuple[OutputLoss | None, list[int], list[dict[str, Any]]]:
    """Return the population of the losses that exist, their search seeds, and the missing ones with reasons."""
    programs, present, missing = [], [], []
    for path, seed in zip(paths, search_seeds, strict=True):
        record = read_loss(path)
        if record["status"] != "ok":
            missing.append({"search_seed": seed, "reason": record["reason"]})
            continue
        expression = parse_expression(record["expression"])
        programs.append(compile_expression(call("mul", constant(record["scale"]), expression)))
        present.append(seed)
    return (engine.population_loss(programs) if programs else None), present, missing


def _list_rows(
    engine: Engine, owners: Sequence[int | None], train_seed: int, evaluation: Evaluation
) -> list[tuple[Any, ...]]:
    """Return a row per metric and loss, ``owners`` naming the losses' search seeds."""
    metrics = {engine.task.metric: evaluation.metric}
    if engine.task.task_loss != engine.task.metric:
        metrics[engine.task.task_loss] = evaluation.task_loss
    return [
        (owner, train_seed, evaluation.step, evaluation.split, name, float(value))
        for name, values in metrics.items()
        for owner, value in zip(owners, values, strict=True)
    ]


def train_model(
    stage: StageInput,
    method: str,
    loss_paths: Sequence[str | Path],
    search_seeds: Sequence[int],
    train: Mapping[str, Any],
    train_seeds: Sequence[int],
) -> tuple[dict[str, list[Any]], dict[str, Any]]:
    """Train with the task loss, or with the loss of every search seed at once; return a long table and its metadata.

    One training seed comes after the other. Initial weights and batches depend on it alone, so every loss and method
    starts and continues alike. The table has the train and validation metrics along the way and the test metrics at the
    end; a diverged run has NaN.
    """
    engine = stage.build_engine()
    loss: OutputLoss | None = TaskLoss(engine.task)
    owners: list[int | None] = [None]
    missing: list[dict[str, Any]] = []
    if loss_paths:
        loss, present, missing = _read_losses(engine, loss_paths, search_seeds)
        owners = list(present)
    steps = np.unique(np.linspace(0, train["steps"], train["num_evaluations"] + 1).round())
    rows: list[tuple[Any, ...]] = []
    progress: dict[str, Any] = {}
    checkpoints = stage.open_checkpoints([method, search_seeds, train, train_seeds], *loss_paths)
    if checkpoints is not None:
        progress = checkpoints.load() or {}
        rows = [tuple(row) for row in progress.get("rows", [])]

    def reach_safe_point(train_seed: int, describe_run: Callable[[], Any]) -> None:
        if checkpoints is not None:
            checkpoints.reach_safe_point(
                lambda: {"rows": rows, "train_seed": train_seed, "run": describe_run()}
            )

    if loss is not None:
        first = train_seeds.index(progress["train_seed"]) if progress else 0
        for train_seed in train_seeds[first:]:
            for evaluation in engine.train(
                loss,
                train["steps"],
                train_seed,
                "train",
                evaluate_at=[int(step) for step in steps],
                splits=("train", "validation", "test"),
                resume=progress.pop("run", None),
                at_safe_point=partial(reach_safe_point, train_seed),
            ):
                rows += _list_rows(engine, owners, train_seed, evaluation)
    for entry in missing:
        logger.warning("no loss from search seed %d: %s", entry["search_seed"], entry["reason"])
    names = ("search_seed", "train_seed", "step", "split", "metric", "value")
    columns: dict[str, list[Any]] = {name: [row[i] for row in rows] for i, name in enumerate(names)}
    fixed = {"task": engine.task.name, "model": engine.model_name, "method": method}
    columns |= {name: [value] * len(rows) for name, value in fixed.items()}
    metadata = {
        "train_seeds": list(train_seeds),
        "missing": missing,
        "learning_rate": engine.settings.learning_rate,
        "provenance": stage.describe_provenance(
            {"task": stage.task, "training": stage.training, "train": train},
            train_seeds=list(train_seeds),
        ),
    }
    return columns, metadata
