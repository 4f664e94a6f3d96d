"""How exact float32 is: the engine in float32 against double backprop in float64, on trees that are not singular.

On a singular tree (log or sqrt of something that crosses 0, a kink at a sample) no two float32 programs agree. It is
regular if its result is finite, not zero, and moves by at most `SENSITIVITY` (relative) when every loss parameter and,
for the meta-gradient, every parameter of the initial model moves by one float32 step up or down, `MOVES` times at
random: a single move may leave a sample on its side of a kink by luck. For the meta-gradient the oracle itself, in
float32, is asked; for phi after a local search, which takes the oracle minutes, the engine in float32.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

import oracle
from benchmarks.candidates import MOVES, SIZES, compile_candidate, draw_trees, move_by_one_ulp
from benchmarks.phases import LocalSearchPhase
from benchmarks.workloads import Workload
from evoloss.engine import Engine
from evoloss.errors import DataError
from evoloss.expressions import Program
from evoloss.seeding import derive_seed, numpy_generator

logger = logging.getLogger(__name__)

SENSITIVITY = 1e-5
PATIENCE = 20
"""Trees drawn per regular tree before the drawing gives up."""


def relative_error(found: NDArray[np.float64], expected: NDArray[np.float64]) -> float:
    """Return |found - expected| / |expected|; infinite where that is not a number."""
    with np.errstate(all="ignore"):
        error = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
    return error if np.isfinite(error) else np.inf


def is_regular(here: NDArray[np.float64], moved: Iterable[NDArray[np.float64]]) -> bool:
    """Tell whether none of the results for inputs nearby is far from the result ``here``."""
    return all(relative_error(there, here) <= SENSITIVITY for there in moved)


def iterate_programs(workload: Workload, seed: int) -> Iterator[tuple[int, Program]]:
    """Yield numbered random programs of all sizes, loss parameters rounded to float32."""
    number = 0
    while True:
        for nodes in SIZES:
            (tree,) = draw_trees(1, seed, workload.name, "accuracy", number, nodes=nodes)
            program = compile_candidate(tree, seed)
            phi = program.loss_params.astype(np.float32).astype(np.float64)
            yield number, program.with_loss_params(phi)
            number += 1


def build_engines(workload: Workload, device: torch.device) -> tuple[Engine, Engine]:
    """Return the workload's engine in float32 and in float64; their models start from the same parameters."""
    double = replace(workload, settings=replace(workload.settings, precision="float64"))
    return workload.build_engine(device), double.build_engine(device)


def measure_meta_gradients(
    workload: Workload, device: torch.device, count: int, seed: int = 0
) -> dict[str, Any]:
    """Return the errors of one-step meta-gradients on ``count`` regular trees, each with its own model and batches.

    ``oracle_float32`` is the yardstick: what plain double backprop in float32 loses.

    Raises
    ------
    DataError
        If regular trees are too rare.
    """
    single, double = build_engines(workload, device)
    errors: list[float] = []
    plain: list[float] = []
    left_out = 0
    for number, program in iterate_programs(workload, seed):
        if len(errors) == count:
            break
        if number > PATIENCE * count:
            raise DataError(f"{workload.name}: only {len(errors)} of {number} trees are regular")
        expected = _differentiate(double, program, double.build_model(seed, number), seed, number)
        here = _differentiate(single, program, single.build_model(seed, number), seed, number)
        moved = (
            _differentiate_nearby(single, program, move, seed, number) for move in range(MOVES)
        )
        if not np.isfinite(expected).all() or not is_regular(here, moved):
            left_out += 1
            continue
        errors.append(relative_error(_ask_engine(single, program, seed, number), expected))
        plain.append(relative_error(here, expected))
    return {
        "trees": count,
        "left_out": left_out,
        "path": single.path.name,
        "engine_float32": {"median": float(np.median(errors)), "max": max(errors)},
        "oracle_float32": {"median": float(np.median(plain)), "max": max(plain)},
    }


def _draw_rows(engine: Engine, split: str, *stream: int | str) -> torch.Tensor:
    rows = len(engine.splits[split])
    size = min(engine.settings.batch_size, rows)
    return torch.from_numpy(numpy_generator(*stream, split).permutation(rows)[:size])


@torch.no_grad()
def move_model_by_one_ulp(model: nn.Module, seed: int) -> nn.Module:
    """Move every parameter one step of its type, up or down at random, in place; return the model."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        up = torch.rand(p.shape, generator=generator).to(p.device) < 0.5
        p.copy_(torch.nextafter(p, torch.where(up, torch.inf, -torch.inf).to(p.dtype)))
    return model


def _differentiate(
    engine: Engine, program: Program, model: nn.Module, *stream: int | str
) -> NDArray[np.float64]:
    inner, outer = (
        engine.batch(split, _draw_rows(engine, split, *stream)) for split in ("train", "validation")
    )
    _, gradient = oracle.compute_meta_gradient(
        engine.task,
        model,
        program,
        engine.settings,
        [(inner.x, inner.y)],
        (outer.x, outer.y),
    )
    return gradient[program.trainable]


def _differentiate_nearby(
    engine: Engine, program: Program, move: int, *stream: int | str
) -> NDArray[np.float64]:
    """Do what `_differentiate` does for loss parameters and a model that have moved by one float32 step."""
    seed = derive_seed(*stream, "move", move)
    model = move_model_by_one_ulp(engine.build_model(*stream), seed)
    return _differentiate(engine, move_by_one_ulp(program, seed), model, *stream)


def _ask_engine(engine: Engine, program: Program, *stream: int | str) -> NDArray[np.float64]:
    inner, outer = (
        engine.batch(split, _draw_rows(engine, split, *stream)) for split in ("train", "validation")
    )
    context = engine.prepare(engine.build_model(*stream), [inner], outer)
    _, gradient = engine.meta_gradients(context, engine.population_loss([program]))
    return gradient[program.trainable]


def _tune(phase: LocalSearchPhase, programs: Sequence[Program]) -> list[NDArray[np.float64]]:
    """Return the engine's phi after the local search of every program."""
    ways = phase.run_engine(programs, 0)[1]
    return [program.loss_params + way for program, way in zip(programs, ways, strict=True)]


def measure_local_searches(
    workload: Workload, device: torch.device, count: int, meta_steps: int | None = None
) -> dict[str, Any]:
    """Return the errors of phi after a whole local search (or ``meta_steps`` of it) on ``count`` regular trees."""
    assert workload.local_search is not None
    steps = meta_steps or workload.local_search.meta_steps
    single, double = (
        LocalSearchPhase(engine, workload, steps) for engine in build_engines(workload, device)
    )
    errors: list[float] = []
    left_out = 0
    for number, program in iterate_programs(workload, 1):
        if len(errors) == count:
            break
        if number > PATIENCE * count:
            raise DataError(f"{workload.name}: only {len(errors)} of {number} trees are regular")
        here, *moved = _tune(
            single,
            [program, *(move_by_one_ulp(program, derive_seed(number, i)) for i in range(MOVES))],
        )
        if not is_regular(here, moved):
            left_out += 1
            continue
        expected = program.loss_params + double.run_oracle([program], 0)[1][0]
        errors.append(relative_error(here, expected))
        logger.info(
            "%s: phi of tree %d after %d steps: %.2g", workload.name, number, steps, errors[-1]
        )
    return {
        "trees": count,
        "left_out": left_out,
        "meta_steps": steps,
        "engine_float32": {"median": float(np.median(errors)), "max": max(errors)},
    }
