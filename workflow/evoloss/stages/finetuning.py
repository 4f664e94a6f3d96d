"""Fine-tune a simplified formula's constants, and choose the loss that a search takes home."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evoloss.engine import Engine, LocalSearchSettings
from evoloss.expressions import (
    Expression,
    Program,
    call,
    compile_expression,
    constant,
    format_text,
    parse_expression,
    program_to_expression,
)
from evoloss.stages.setup import StageInput

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FinetunedLoss:
    """The chosen loss, ``scale * expression``, and how it was found; ``expression`` is None for a failed search."""

    expression: Expression | None
    scale: float
    report: dict[str, Any]


def score_programs(
    engine: Engine, programs: list[Program], num_steps: int, num_seeds: int, *stream: int | str
) -> NDArray[np.float64]:
    """Return each loss's mean validation metric after full trainings with ``num_seeds`` seeds; inf if one diverged."""
    if not programs:
        return np.empty(0)
    scores = [
        engine.compute_fitness(programs, num_steps, *stream, seed, "selection")
        for seed in range(num_seeds)
    ]
    mean = np.mean(scores, axis=0)
    return np.where(np.isfinite(mean), mean, np.inf)


def split_scale(program: Program) -> tuple[Expression, float]:
    """Return a program's expression without its last weight's magnitude, and that magnitude as the scale."""
    last = float(program.weights[-1])
    if last == 0.0:
        return program_to_expression(program), 1.0
    weights = program.weights.copy()
    weights[-1] = np.sign(last)
    bare = Program(program.ops, program.a, program.b, weights, program.trainable)
    return program_to_expression(bare), abs(last)


def finetune_loss(
    stage: StageInput,
    simplified: Mapping[str, Any],
    method: str,
    finetune: Mapping[str, Any],
    num_train_steps: int,
    search_seed: int,
) -> FinetunedLoss:
    """Score a search's best simplified losses on validation data and, for evomal, optimise the winner's constants.

    The score is the validation metric after the full training budget, averaged over ``selection_seeds`` seeds that no
    final training uses. The constants and the scale are optimised by unrolled differentiation; every
    ``evaluate_every`` meta-steps the current ones are scored, and the best are kept: never worse than the start.
    """
    report = {
        name: simplified[name] for name in ("task", "method", "search_seed", "status", "reason")
    }
    report["provenance"] = stage.describe_provenance(
        {
            "task": stage.task,
            "training": stage.training,
            "finetune": finetune,
            "steps": num_train_steps,
        },
        search=simplified["provenance"].get("search"),
    )
    report |= {"selected": None, "start_score": None, "best_score": None}
    report |= {"candidates": [], "trace": []}
    if simplified["status"] != "ok":
        return FinetunedLoss(None, 1.0, report)
    engine = stage.build_engine()
    entries = sorted(simplified["entries"], key=lambda entry: entry["fitness"])
    entries = entries[: finetune["num_candidates"]]
    programs = [_compile_entry(entry) for entry in entries]
    seeds, stream = finetune["selection_seeds"], (search_seed, "finetune")
    scores = score_programs(engine, programs, num_train_steps, seeds, *stream)
    report["candidates"] = [
        {"expression": entry["simplified"], "scale": entry["scale"], "score": _finite(score)}
        for entry, score in zip(entries, scores, strict=True)
    ]
    if not np.isfinite(scores).any():
        report["status"] = "failed"
        report["reason"] = "training diverged for every loss of the search at the full budget"
        return FinetunedLoss(None, 1.0, report)
    order = [(scores[i], entries[i]["complexity_after"], i) for i in range(len(entries))]
    selected = min(order)[2]
    best, best_score = programs[selected], float(scores[selected])
    report |= {"selected": selected, "start_score": best_score}
    if method == "evomal":
        best, best_score, report["trace"] = _optimise(
            engine, best, best_score, finetune, num_train_steps, stream
        )
    report["best_score"] = best_score
    logger.info("score %.4g -> %.4g", report["start_score"], best_score)
    expression, scale = split_scale(best)
    return FinetunedLoss(expression, scale, report)


def _compile_entry(entry: Mapping[str, Any]) -> Program:
    expression = parse_expression(entry["simplified"])
    return compile_expression(call("mul", constant(entry["scale"]), expression))


def _optimise(
    engine: Engine,
    start: Program,
    start_score: float,
    finetune: Mapping[str, Any],
    num_train_steps: int,
    stream: tuple[int | str, ...],
) -> tuple[Program, float, list[dict[str, Any]]]:
    """Run the unrolled differentiation, score its snapshots as one population, return the best and the trace."""
    snapshots: dict[int, Program] = {}
    outer: dict[int, float] = {}

    def keep(step: int, values: NDArray[np.float64], programs: list[Program]) -> None:
        outer[step] = float(values[0])
        if step % finetune["evaluate_every"] == 0 or step == finetune["meta_steps"]:
            snapshots[step] = programs[0]

    settings = LocalSearchSettings(
        finetune["meta_steps"], finetune["inner_steps"], finetune["meta_learning_rate"]
    )
    engine.local_search([start], settings, *stream, "constants", on_step=keep)
    scores = score_programs(
        engine, list(snapshots.values()), num_train_steps, finetune["selection_seeds"], *stream
    )
    trace = [{"meta_step": 0, "outer_loss": None, "score": _finite(start_score)}]
    best, best_score = start, start_score
    by_step = dict(zip(snapshots, scores, strict=True))
    for step, value in outer.items():
        score = by_step.get(step)
        trace.append(
            {
                "meta_step": step,
                "outer_loss": _finite(value),
                "score": None if score is None else _finite(score),
            }
        )
        if score is not None and score < best_score:
            best, best_score = snapshots[step], float(score)
    logger.info("%d meta-steps of %s", finetune["meta_steps"], format_text(split_scale(best)[0]))
    return best, best_score, trace


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
