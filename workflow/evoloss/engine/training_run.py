"""One training of a population of networks: it advances, it is measured, and losers can leave it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from evoloss.engine.memory import Chunk
from evoloss.engine.population_loss import OutputLoss
from evoloss.engine.precision import set_torch_kernels
from evoloss.engine.snapshot import restore_snapshot, take_snapshot
from evoloss.engine.streams import draw_batches

if TYPE_CHECKING:
    from evoloss.engine.engine import Engine

Result = TypeVar("Result")

STRIDE_SECONDS = 5.0
"""About so much time is between two safe points: what SIGTERM has to wait for."""
FIRST_STRIDE = 8
"""Training steps to the first safe point; doubled while they take less than half of `STRIDE_SECONDS`."""


@dataclass(frozen=True)
class Evaluation:
    """Means over the networks of each of P losses on one split after ``step`` training steps.

    ``metric`` and ``task_loss`` are float64 arrays (P,), NaN where a network diverged.
    """

    step: int
    split: str
    metric: NDArray[np.float64]
    task_loss: NDArray[np.float64]


@dataclass
class _Part:
    """Networks that are trained together, as far as ``step``."""

    loss: OutputLoss
    state: Any
    step: int = 0


class TrainingRun:
    """``num_networks`` networks for each of P losses, all on the same batches.

    ``stream`` names the random stream that the initial parameters and batches come from, so the first n steps are the
    same for every ``num_steps``. The networks of one loss differ in their initial parameters; network s of one loss
    starts as network s of every other does. Network 0 comes from ``stream`` itself, network s from
    ``(*stream, "network", s)``.

    Inside, network s of loss p has the number ``p * num_networks + s``. All of them form one part, or several where
    memory does not hold them: a part that fails is halved and trained again from the start (`evoloss.engine.memory`).
    """

    def __init__(
        self,
        engine: Engine,
        loss: OutputLoss,
        num_steps: int,
        *stream: int | str,
        num_networks: int = 1,
    ) -> None:
        self.engine = engine
        self.loss = loss
        self.step = 0
        self.num_networks = num_networks
        self._stream = stream
        self._stride = FIRST_STRIDE
        self._batches = draw_batches(
            len(engine.task.train.y), engine.settings.batch_size, num_steps, *stream, "batches"
        ).to(engine.device)
        numbers = range(loss.size * num_networks)
        self._parts: dict[Chunk, _Part | None] = dict.fromkeys(
            engine.training_chunks.split(numbers)
        )

    def advance(self, step: int, at_safe_point: Callable[[], None] | None = None) -> None:
        """Train on until ``step`` steps are done in all; ``at_safe_point`` is called every few seconds."""
        while self.step < step:
            started = time.monotonic()
            self.step = min(step, self.step + self._stride) if at_safe_point else step
            self._visit(lambda part: None)
            if at_safe_point is not None:
                at_safe_point()
                if time.monotonic() - started < STRIDE_SECONDS / 2:
                    self._stride *= 2

    def describe(self) -> dict[str, Any]:
        """Return the progress, to be saved at a safe point."""
        parts = [
            [list(networks), part.step, take_snapshot(part.state)]
            for networks, part in self._parts.items()
            if part is not None
        ]
        return {"step": self.step, "parts": parts}

    def restore(self, progress: Mapping[str, Any]) -> None:
        """Go on from what `describe` returned for the same losses."""
        self.step = progress["step"]
        self._parts = {}
        for numbers, step, snapshot in progress["parts"]:
            part = self._start(tuple(numbers))
            part.state = restore_snapshot(part.state, snapshot)
            part.step = step
            self._parts[tuple(numbers)] = part

    def keep(self, chosen: Sequence[int]) -> None:
        """Go on with the losses of these numbers alone; they are numbered anew, in this order."""
        count = self.num_networks
        kept = [p * count + s for p in chosen for s in range(count)]
        number = {old: new for new, old in enumerate(kept)}
        self.loss = self.loss.select(chosen)
        parts: dict[Chunk, _Part | None] = {}
        for networks, part in self._parts.items():
            local = [i for i, network in enumerate(networks) if network in number]
            if part is not None and local:
                part.state = self.engine.path.select(part.state, local)
                part.loss = part.loss.select(local)
            if local:
                parts[tuple(number[networks[i]] for i in local)] = part
        self._parts = parts

    @torch.no_grad()
    def evaluate(self, split: str, num_rows: int | None = None) -> Evaluation:
        """Measure every network on the first ``num_rows`` of a split (default: all)."""
        task, data = self.engine.task, self.engine.splits[split]
        x, y = data.x[:num_rows], data.y[:num_rows]

        def measure(part: _Part) -> NDArray[np.float64]:
            outputs = self.engine.path.outputs(part.state, x)
            bad = ~torch.isfinite(outputs).flatten(1).all(1)
            values = torch.stack(
                [task.compute_metric(outputs, y), task.compute_task_loss(outputs, y)]
            )
            return values.double().masked_fill(bad, torch.nan).cpu().numpy()

        values = np.empty((2, self.loss.size * self.num_networks))
        for networks, measured in self._visit(measure):
            values[:, list(networks)] = measured
        metric, task_loss = values.reshape(2, -1, self.num_networks).mean(-1)
        return Evaluation(self.step, split, metric, task_loss)

    def _visit(self, use: Callable[[_Part], Result]) -> list[tuple[Chunk, Result]]:
        """Bring every part to the current step and return what ``use`` makes of it."""
        engine = self.engine

        def work(networks: Chunk) -> Result:
            # taken out while it is worked on: nothing stays of a part that does not fit into memory
            part = self._parts.pop(networks, None) or self._start(networks)
            if part.step < self.step:
                batches = self._batches[part.step : self.step]
                targets = engine.encoded_targets["train"]
                engine.path.advance(part.state, part.loss, engine.task.train.x, targets, batches)
                part.step = self.step
            result = use(part)
            self._parts[networks] = part
            return result

        with set_torch_kernels(engine.settings.precision, engine.device):
            return engine.training_chunks.run(list(self._parts), work)

    def _start(self, networks: Chunk) -> _Part:
        count, build = self.num_networks, self.engine.build_model
        models = {
            s: build(*self._stream, "network", s) if s else build(*self._stream)
            for s in sorted({network % count for network in networks})
        }
        state = self.engine.path.start([models[network % count] for network in networks])
        return _Part(self.loss.select([network // count for network in networks]), state)
