"""One training of a population of networks: it advances, it is measured, and losers can leave it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from evoloss.engine.population_loss import OutputLoss
from evoloss.engine.streams import draw_batches

if TYPE_CHECKING:
    from evoloss.engine.engine import Engine


@dataclass(frozen=True)
class Evaluation:
    """Metrics of P networks on one split after ``step`` training steps; float64 arrays (P,), NaN where diverged."""

    step: int
    split: str
    metric: NDArray[np.float64]
    task_loss: NDArray[np.float64]


class TrainingRun:
    """Networks from the same parameters on the same batches, network p under loss p.

    ``stream`` names the random stream that the initial parameters and batches come from, so the first n steps are the
    same for every ``num_steps``.
    """

    def __init__(
        self, engine: Engine, loss: OutputLoss, num_steps: int, *stream: int | str
    ) -> None:
        self.engine = engine
        self.loss = loss
        self.step = 0
        self._batches = draw_batches(
            len(engine.task.train.y), engine.settings.batch_size, num_steps, *stream, "batches"
        ).to(engine.device)
        self._state = engine.path.start([engine.build_model(*stream)] * loss.size)

    def advance(self, step: int) -> None:
        """Train on until ``step`` steps are done in all."""
        train = self.engine.task.train
        self.engine.path.advance(
            self._state,
            self.loss,
            train.x,
            self.engine.encoded_targets["train"],
            self._batches[self.step : step],
        )
        self.step = step

    def keep(self, chosen: Sequence[int]) -> None:
        """Go on with the networks of these numbers alone; they are numbered anew, in this order."""
        self._state = self.engine.path.select(self._state, chosen)
        self.loss = self.loss.select(chosen)

    @torch.no_grad()
    def evaluate(self, split: str, num_rows: int | None = None) -> Evaluation:
        """Measure every network on the first ``num_rows`` of a split (default: all)."""
        task, data = self.engine.task, self.engine.splits[split]
        y = data.y[:num_rows]
        outputs = self.engine.path.outputs(self._state, data.x[:num_rows])
        bad = ~torch.isfinite(outputs).flatten(1).all(1).cpu().numpy()
        metric, task_loss = (
            np.where(bad, np.nan, measure(outputs, y).double().cpu().numpy())
            for measure in (task.compute_metric, task.compute_task_loss)
        )
        return Evaluation(self.step, split, metric, task_loss)
