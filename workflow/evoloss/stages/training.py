"""Meta-testing: train a model from scratch with finished losses, and score it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evoloss.engine import Engine, OutputLoss, TaskLoss
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


def train_model(
    stage: StageInput,
    method: str,
    loss_paths: Sequence[str | Path],
    search_seeds: Sequence[int],
    train: Mapping[str, Any],
    train_seed: int,
) -> tuple[dict[str, list[Any]], dict[str, Any]]:
    """Train with the task loss, or with the loss of every search seed at once; return a long table and its metadata.

    Initial weights and batches depend on ``train_seed`` alone, so every loss and method starts and continues alike. The
    table has the train and validation metrics along the way and the test metrics at the end; a diverged run has NaN.
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
    resume = None
    checkpoints = stage.open_checkpoints([method, search_seeds, train, train_seed], *loss_paths)
    if checkpoints is not None and (progress := checkpoints.load()) is not None:
        resume = progress["run"]
        rows = [tuple(row) for row in progress["rows"]]

    def reach_safe_point(describe_run: Callable[[], Any]) -> None:
        if checkpoints is not None:
            checkpoints.reach_safe_point(lambda: {"rows": rows, "run": describe_run()})

    for evaluation in (
        ()
        if loss is None
        else engine.train(
            loss,
            train["steps"],
            train_seed,
            "train",
            evaluate_at=[int(step) for step in steps],
            splits=("train", "validation", "test"),
            resume=resume,
            at_safe_point=reach_safe_point,
        )
    ):
        metrics = {engine.task.metric: evaluation.metric}
        if engine.task.task_loss != engine.task.metric:
            metrics[engine.task.task_loss] = evaluation.task_loss
        for name, values in metrics.items():
            rows.extend(
                (owner, evaluation.step, evaluation.split, name, float(value))
                for owner, value in zip(owners, values, strict=True)
            )
    for entry in missing:
        logger.warning("no loss from search seed %d: %s", entry["search_seed"], entry["reason"])
    names = ("search_seed", "step", "split", "metric", "value")
    columns: dict[str, list[Any]] = {name: [row[i] for row in rows] for i, name in enumerate(names)}
    fixed = {
        "task": engine.task.name,
        "model": engine.model_name,
        "method": method,
        "train_seed": train_seed,
    }
    columns |= {name: [value] * len(rows) for name, value in fixed.items()}
    metadata = {
        "missing": missing,
        "learning_rate": engine.settings.learning_rate,
        "provenance": stage.describe_provenance(
            {"task": stage.task, "training": stage.training, "train": train},
            train_seed=train_seed,
        ),
    }
    return columns, metadata
