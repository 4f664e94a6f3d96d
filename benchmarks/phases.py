"""The three phases of a search, each by the engine and by the oracle, on the same models and batches.

``run_engine`` and ``run_oracle`` return what they computed and the seconds per candidate of the *whole* phase: a repeat
may run part of the steps, and the time of the steps (not of the final evaluation) is scaled to all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

import oracle
from benchmarks.candidates import MOVES, move_by_one_ulp
from benchmarks.machine import time_call
from benchmarks.workloads import Workload
from evoloss.engine import Engine, TrainingRun
from evoloss.engine.filters import run_rejection_protocol
from evoloss.engine.streams import draw_batches
from evoloss.expressions import Program

SHORT_WAY = 1e-3


class Phase(Protocol):
    """One phase of one workload."""

    name: str
    steps: int
    full_steps: int
    tolerance: float

    def run_engine(self, programs: Sequence[Program], stream: int) -> tuple[float, list[Any]]:
        """Return seconds per candidate and one result per program; ``stream`` names models and batches."""
        ...

    def run_oracle(self, programs: Sequence[Program], stream: int) -> tuple[float, list[Any]]:
        """Do the same by the oracle."""
        ...

    def compute_error(self, found: Any, expected: Any) -> float:
        """Return how far two results of one program are apart, to be compared with ``tolerance``."""
        ...


class LocalSearchPhase:
    """Adam on phi. A result is phi after the steps, and its distance from the start."""

    name = "local search"
    tolerance = 1e-2
    """Of the way that phi went: Adam divides by the gradient's size, rounding errors of small ones included."""

    def __init__(self, engine: Engine, workload: Workload, steps: int) -> None:
        assert workload.local_search is not None
        self.engine, self.steps = engine, steps
        self.full_steps = workload.local_search.meta_steps
        self.settings = replace(workload.local_search, meta_steps=steps)

    def run_engine(self, programs: Sequence[Program], stream: int) -> tuple[float, list[Any]]:
        """See `Phase`. The first call with a stream prepares what later generations share."""
        seconds, tuned = time_call(
            self.engine.device,
            lambda: self.engine.local_search(programs, self.settings, stream, "benchmark"),
        )
        return self._scale(seconds, programs), _list_ways(programs, tuned)

    def run_oracle(self, programs: Sequence[Program], stream: int) -> tuple[float, list[Any]]:
        """See `Phase`."""
        rate = self.settings.meta_learning_rate
        seconds, tuned = time_call(
            self.engine.device,
            lambda: [
                oracle.run_local_search(
                    self.engine.task, p, self.engine.settings, rate, self._meta_steps(stream)
                )
                for p in programs
            ],
        )
        return self._scale(seconds, programs), _list_ways(programs, tuned)

    def _scale(self, seconds: float, programs: Sequence[Program]) -> float:
        return seconds / len(programs) * self.full_steps / self.steps

    def _meta_steps(self, stream: int) -> Iterator[Any]:
        """Yield the meta-steps that `Engine.local_search` takes; models are built as the loop needs them."""
        engine, k, names = self.engine, self.settings.inner_steps, (stream, "benchmark")
        train, validation = engine.task.train, engine.task.validation
        size = engine.settings.batch_size
        inner = draw_batches(len(train.y), size, self.steps * k, *names, "inner batches")
        outer = draw_batches(len(validation.y), size, self.steps, *names, "outer batches")
        for step, rows in enumerate(outer):
            batches = [(train.x[r], train.y[r]) for r in inner[step * k : (step + 1) * k]]
            yield (
                engine.build_model(*names, step),
                batches,
                (validation.x[rows], validation.y[rows]),
            )

    def compute_error(self, found: Any, expected: Any) -> float:
        """See `Phase`."""
        return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def _list_ways(programs: Sequence[Program], tuned: Sequence[Program]) -> list[Any]:
    return [after.loss_params - p.loss_params for p, after in zip(programs, tuned, strict=True)]


class RejectionPhase:
    """The rejection protocol, always in full. A result is whether the loss is rejected."""

    name = "rejection"
    tolerance = 0.0

    def __init__(self, engine: Engine, workload: Workload) -> None:
        assert workload.rejection is not None
        self.engine, self.settings = engine, workload.rejection
        self.steps = self.full_steps = self.settings.steps

    def run_engine(self, programs: Sequence[Program], stream: int) -> tuple[float, list[Any]]:
        """See `Phase`."""
        seconds, result = time_call(
            self.engine.device,
            lambda: run_rejection_protocol(self.engine, programs, self.settings, stream),
        )
        return seconds / len(programs), list(result.rejected)

    def run_oracle(self, programs: Sequence[Program], stream: int) -> tuple[float, list[Any]]:
        """See `Phase`."""
        s, task = self.settings, self.engine.task
        x, y = task.train.x[: s.sample], task.train.y[: s.sample]

        def work() -> list[Any]:
            with torch.no_grad():
                start = self.engine.build_model(stream, "rejection")(x)
            return [
                oracle.is_rejected(task, start, y, p, s.steps, s.learning_rate) for p in programs
            ]

        seconds, rejected = time_call(self.engine.device, work)
        return seconds / len(programs), rejected

    def compute_error(self, found: Any, expected: Any) -> float:
        """See `Phase`."""
        return float(found != expected)


class FitnessPhase:
    """Training and one evaluation on the validation split. A result is how far training moved the task loss there."""

    name = "fitness"
    tolerance = 1e-2
    """Of that way, or of `SHORT_WAY` where it is shorter: float32 cannot tell smaller differences of the loss."""

    def __init__(self, engine: Engine, workload: Workload, steps: int) -> None:
        self.engine, self.steps = engine, steps
        self.full_steps = workload.fitness_steps
        self.num_networks = workload.num_networks

    def run_engine(self, programs: Sequence[Program], stream: int) -> tuple[float, list[Any]]:
        """See `Phase`."""
        run = TrainingRun(
            self.engine,
            self.engine.population_loss(programs),
            self.steps,
            stream,
            num_networks=self.num_networks,
        )
        training, _ = time_call(self.engine.device, lambda: run.advance(self.steps))
        rest, evaluation = time_call(self.engine.device, lambda: run.evaluate("validation"))
        ways = evaluation.task_loss - self._measure_start(stream)
        return self._scale(training, rest, programs), ways.tolist()

    def _build_models(self, stream: int) -> Iterator[nn.Module]:
        """Yield the initial models that `TrainingRun` takes."""
        for network in range(self.num_networks):
            names = (stream, "network", network) if network else (stream,)
            yield self.engine.build_model(*names)

    def _measure_start(self, stream: int) -> float:
        task, validation = self.engine.task, self.engine.task.validation
        samples = (validation.x, validation.y)
        return float(
            np.mean([oracle.measure(task, m, samples)[1] for m in self._build_models(stream)])
        )

    def run_oracle(self, programs: Sequence[Program], stream: int) -> tuple[float, list[Any]]:
        """See `Phase`."""
        engine, device = self.engine, self.engine.device
        task, settings = engine.task, engine.settings
        batches = draw_batches(
            len(task.train.y), settings.batch_size, self.steps, stream, "batches"
        )
        batches = batches.to(device)
        samples = (task.validation.x, task.validation.y)
        start = self._measure_start(stream)
        training = rest = 0.0
        results = []
        for program in programs:
            losses = []
            for model in self._build_models(stream):
                train = partial(oracle.train, task, model, program, settings, batches)
                training += time_call(device, train)[0]
                seconds, (_, task_loss) = time_call(
                    device, partial(oracle.measure, task, model, samples)
                )
                rest += seconds
                losses.append(task_loss)
            results.append(float(np.mean(losses)) - start)
        return self._scale(training, rest, programs), results

    def _scale(self, training: float, rest: float, programs: Sequence[Program]) -> float:
        return (training * self.full_steps / self.steps + rest) / len(programs)

    def compute_error(self, found: Any, expected: Any) -> float:
        """See `Phase`."""
        error = abs(found - expected) / max(abs(expected), SHORT_WAY)
        return float(error) if np.isfinite(error) else np.inf


def make_phases(engine: Engine, workload: Workload, fraction: float) -> list[Phase]:
    """Return the workload's phases; local search and fitness take ``fraction`` of their steps, at least two."""

    def part(steps: int) -> int:
        return min(steps, max(2, round(fraction * steps)))

    phases: list[Phase] = []
    if workload.local_search is not None:
        steps = part(workload.local_search.meta_steps)
        phases.append(LocalSearchPhase(engine, workload, steps))
    if workload.rejection is not None:
        phases.append(RejectionPhase(engine, workload))
    phases.append(FitnessPhase(engine, workload, part(workload.fitness_steps)))
    return phases


def is_regular(phase: Phase, program: Program, streams: Sequence[int], sensitivity: float) -> bool:
    """Tell whether the engine's results are finite and stay when every loss parameter moves by one float32 step.

    Where they do not (log or sqrt of something that crosses 0), no two float32 programs agree.
    """
    moved = [move_by_one_ulp(program, seed) for seed in range(MOVES)]
    for stream in streams:
        _, (here, *there) = phase.run_engine([program, *moved], stream)
        if any(not phase.compute_error(t, here) <= sensitivity * phase.tolerance for t in there):
            return False
    return True
