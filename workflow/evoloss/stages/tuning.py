"""The honest comparator: the standard loss with its learning rate tuned on validation data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from evoloss.engine import Engine, TaskLoss
from evoloss.stages.setup import StageInput


def tune_learning_rate(
    stage: StageInput, tune: Mapping[str, Any], num_steps: int
) -> dict[str, Any]:
    """Train with the task loss at every learning rate of a geometric grid; the lowest mean validation metric wins.

    ``tune`` holds minimum, maximum, num_points and num_seeds. A learning rate that diverges for a seed is out; if all
    are, ``best_learning_rate`` is None. The tuning seeds are not the training seeds.
    """
    engine = stage.build_engine()
    grid: list[dict[str, Any]] = []
    for rate in np.geomspace(tune["minimum"], tune["maximum"], tune["num_points"]):
        # rounded, so that the grid reads 0.001, 0.00316, 0.01 and one value has one text
        rate = float(f"{rate:.3g}")
        trainer = Engine(
            engine.task,
            engine.model_name,
            replace(engine.settings, learning_rate=rate),
            engine.device,
        )
        scores = [
            next(iter(trainer.train(TaskLoss(trainer.task), num_steps, seed, "tuning")))
            for seed in range(tune["num_seeds"])
        ]
        values = [float(score.metric[0]) for score in scores]
        mean = float(np.mean(values))
        grid.append(
            {
                "learning_rate": rate,
                "validation_metric": mean if np.isfinite(mean) else None,
                "per_seed": [value if np.isfinite(value) else None for value in values],
            }
        )
    done = [point for point in grid if point["validation_metric"] is not None]
    best = (
        min(done, key=lambda point: point["validation_metric"])["learning_rate"] if done else None
    )
    return {
        "task": engine.task.name,
        "model": engine.model_name,
        "method": "baseline_tuned",
        "metric": engine.task.metric,
        "best_learning_rate": best,
        "grid": grid,
        "provenance": stage.describe_provenance(
            {"task": stage.task, "training": stage.training, "tune": tune, "steps": num_steps},
        ),
    }
