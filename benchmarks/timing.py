"""Engine against oracle: alternating repeats in one run, ratios with their spread, and a check that both agree."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.candidates import draw_candidates, negate
from benchmarks.flops import count_meta_step, count_training_step, read_layers
from benchmarks.machine import measure_gemm_peak, time_call
from benchmarks.phases import Phase, is_regular, make_phases
from benchmarks.workloads import Workload
from evoloss.engine import Engine
from evoloss.errors import EvolossError
from evoloss.expressions import Program

logger = logging.getLogger(__name__)

SENSITIVITY = 0.1
"""A candidate is compared if one float32 step of phi moves its result by at most this part of the tolerance."""


class DisagreementError(EvolossError):
    """Engine and oracle do not compute the same: their times mean nothing."""


@dataclass(frozen=True)
class TimingOptions:
    """``population`` None: the workload's own; ``oracle_candidates`` of it also go through the oracle."""

    repeats: int
    fraction: float
    population: int | None
    oracle_candidates: int
    seed: int = 0


def summarise(values: Sequence[float]) -> dict[str, Any]:
    """Return median, least and greatest of ``values``, and the values themselves."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "values": list(values),
    }


def measure_workload(
    workload: Workload, device: torch.device, options: TimingOptions
) -> dict[str, Any]:
    """Return times, ratios and agreement of every phase of a workload.

    Raises
    ------
    DisagreementError
        If engine and oracle disagree by more than the phase's tolerance.
    """
    engine = workload.build_engine(device)
    count = options.population or workload.population
    programs = draw_candidates(engine, workload, count, options.seed)
    sizes = [len(program) for program in programs]
    phases = make_phases(engine, workload, options.fraction)
    return {
        "path": engine.path.name,
        "model": workload.model,
        "task": engine.task.name,
        "population": count,
        "networks": workload.num_networks,
        "nodes": {**summarise(sizes), "values": None},
        "phases": {
            phase.name: _measure_phase(engine, workload, phase, programs, options)
            for phase in phases
        },
    }


def _measure_phase(
    engine: Engine,
    workload: Workload,
    phase: Phase,
    programs: list[Program],
    options: TimingOptions,
) -> dict[str, Any]:
    if phase.name == "rejection":  # every other loss is turned round: there must be some to reject
        programs = [negate(p) if i % 2 else p for i, p in enumerate(programs)]
    warm_up, _ = time_call(engine.device, lambda: phase.run_engine(programs[:1], 0))
    streams = range(1, options.repeats + 1)
    chosen = _choose_regular(phase, programs, streams, options.oracle_candidates)
    phase.run_oracle([programs[chosen[0]]], 0)
    first, later, plain, peaks, errors = [], [], [], [], []
    for repeat in streams:
        logger.info("%s, %s: repeat %d of %d", workload.name, phase.name, repeat, options.repeats)
        if repeat % 2:
            plain.append(phase.run_oracle([programs[i] for i in chosen], repeat))
        seconds, results = phase.run_engine(programs, repeat)
        first.append(seconds)
        later.append(phase.run_engine(programs, repeat)[0])
        if not repeat % 2:
            plain.append(phase.run_oracle([programs[i] for i in chosen], repeat))
        peaks.append(measure_gemm_peak(engine.device))
        errors += [
            phase.compute_error(results[i], expected)
            for i, expected in zip(chosen, plain[-1][1], strict=True)
        ]
    _check_agreement(workload, phase, errors)
    flops = _count_flops(engine, workload, phase)
    oracle_seconds = [seconds for seconds, _ in plain]
    return {
        "steps_run": phase.steps,
        "steps": phase.full_steps,
        "warm_up_seconds": warm_up,
        "engine_seconds_per_candidate": summarise(later),
        "engine_seconds_per_candidate_first_generation": summarise(first),
        "oracle_seconds_per_candidate": summarise(oracle_seconds),
        "speedup": summarise([o / e for o, e in zip(oracle_seconds, later, strict=True)]),
        "flop_per_candidate": flops,
        "gemm_share": summarise([flops / e / peak for e, peak in zip(later, peaks, strict=True)])
        if flops
        else None,
        "gemm_peak_flop_per_second": summarise(peaks),
        "agreement": {
            "compared": len(errors),
            "candidates": len(chosen),
            "largest_error": max(errors),
            "tolerance": phase.tolerance,
        },
    }


def _choose_regular(
    phase: Phase, programs: Sequence[Program], streams: Sequence[int], count: int
) -> list[int]:
    """Return the numbers of the first ``count`` candidates that rounding errors do not move."""
    chosen: list[int] = []
    for number, program in enumerate(programs):
        if len(chosen) < count and is_regular(phase, program, streams, SENSITIVITY):
            chosen.append(number)
    if not chosen:
        raise DisagreementError(
            f"{phase.name}: a rounding error moves the result of every one of {len(programs)} candidates"
        )
    return chosen


def _check_agreement(workload: Workload, phase: Phase, errors: Sequence[float]) -> None:
    if not max(errors) <= phase.tolerance:
        raise DisagreementError(
            f"{workload.name}, {phase.name}: engine and oracle differ by {max(errors):.2g}, more than "
            f"{phase.tolerance:g}, so their times are not reported"
        )


def _count_flops(engine: Engine, workload: Workload, phase: Phase) -> int | None:
    task, size = engine.task, engine.settings.batch_size
    layers = read_layers(engine.build_model(0), task.train.x[:1])
    if phase.name == "fitness":
        batch = min(size, len(task.train))
        return count_training_step(layers, batch) * phase.full_steps * workload.num_networks
    if phase.name == "local search":
        inner, outer = (min(size, len(split)) for split in (task.train, task.validation))
        return count_meta_step(layers, inner, outer) * phase.full_steps
    return None
