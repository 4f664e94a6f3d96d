"""The candidates that are measured: random valid trees of the search's own generator, of realistic size.

A tree is kept if it passes the rejection protocol and trains to finite outputs. Its size is as in searches under the
paper's settings, which begin at about 10 nodes and grow to about 45: as many candidates have 10-21 nodes as 22-33 and
34-45. Trees are generated half-and-half with heights 3 to 8; loss parameters start as in a search. All comes from one
seed.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from benchmarks.workloads import Workload, read_paper_section
from evoloss.engine import Engine
from evoloss.engine.filters import RejectionSettings, has_zero_gradient, run_rejection_protocol
from evoloss.errors import DataError
from evoloss.expressions import (
    Expression,
    Program,
    call,
    compile_weighted_tree,
    constant,
    program_to_expression,
)
from evoloss.search.individuals import Variation, VariationSettings, to_expression
from evoloss.seeding import derive_seed, global_random, numpy_generator

SIZES = ((10, 21), (22, 33), (34, 45))
"""Smallest and largest number of nodes of each group of candidates."""

TRIAL_STEPS = 20
ROUND = 32
"""Trees drawn at a time."""

PATIENCE = 100
"""Rounds after which the drawing gives up."""

MAX_DISTINCT = 48
"""A larger population repeats its candidates."""

MOVES = 3
"""Random moves by one float32 step after which a regular tree's result is still there: one may miss a kink by luck."""

REJECTION = RejectionSettings(100, 100, 0.01, 2)
INITIAL_DEVIATION = read_paper_section("local_search", "mnist5k")["initial_deviation"]


def draw_trees(
    count: int,
    *stream: int | str,
    nodes: tuple[int, int],
) -> list[Expression]:
    """Return ``count`` random trees with both y and f(x), a gradient, and ``nodes`` (smallest, largest) nodes."""
    variation = Variation(VariationSettings(4, 1.4, 0.7, 0.25, 0.05, 3, 8, 10))
    trees: list[Expression] = []
    with global_random(random.Random(derive_seed(*stream, "benchmark trees"))):
        while len(trees) < count:
            tree = to_expression(variation.initial_population(1)[0])
            if nodes[0] <= tree.complexity <= nodes[1] and not has_zero_gradient(tree):
                trees.append(tree)
    return trees


def compile_candidate(tree: Expression, *stream: int | str) -> Program:
    """Return the tree's program with loss parameters drawn around 1 as a local search draws them."""
    program = compile_weighted_tree(tree)
    noise = numpy_generator(*stream, "loss parameters", str(tree)).normal(
        0.0, INITIAL_DEVIATION, len(program.loss_params)
    )
    return program.with_loss_params(program.loss_params * (1.0 + noise))


def draw_candidates(
    engine: Engine,
    workload: Workload,
    count: int,
    seed: int,
    sizes: Sequence[tuple[int, int]] = SIZES,
) -> list[Program]:
    """Return ``count`` candidates that pass the rejection protocol and train, of all ``sizes`` in turn.

    At most `MAX_DISTINCT` of them differ.

    Raises
    ------
    DataError
        If hardly any tree does.
    """
    distinct = min(count, MAX_DISTINCT)
    shares = [len(range(i, distinct, len(sizes))) for i in range(len(sizes))]
    groups = [
        _draw_group(engine, workload, share, seed, nodes)
        for share, nodes in zip(shares, sizes, strict=True)
    ]
    chosen = [groups[i % len(groups)][i // len(groups)] for i in range(distinct)]
    return [chosen[i % distinct] for i in range(count)]


def _draw_group(
    engine: Engine, workload: Workload, count: int, seed: int, nodes: tuple[int, int]
) -> list[Program]:
    chosen: list[Program] = []
    for round_number in range(PATIENCE):
        if len(chosen) >= count:
            return chosen[:count]
        trees = draw_trees(ROUND, seed, workload.name, round_number, nodes=nodes)
        programs = [compile_candidate(tree, seed) for tree in trees]
        settings = workload.rejection or REJECTION
        result = run_rejection_protocol(engine, programs, settings, seed)
        programs = _without(programs, result.rejected)
        fitness = engine.compute_fitness(programs, TRIAL_STEPS, seed, "trial")
        chosen += _without(programs, ~np.isfinite(fitness))
    raise DataError(
        f"benchmark {workload.name!r}: only {len(chosen)} of {PATIENCE * ROUND} random trees with "
        f"{nodes[0]} to {nodes[1]} nodes train"
    )


def _without(programs: Sequence[Program], bad: Sequence[bool] | np.ndarray) -> list[Program]:
    return [program for program, is_bad in zip(programs, bad, strict=True) if not is_bad]


def negate(program: Program) -> Program:
    """Return a program of minus the loss, which the rejection protocol must reject."""
    return compile_weighted_tree(call("mul", constant(-1.0), program_to_expression(program)))


def move_by_one_ulp(program: Program, seed: int) -> Program:
    """Return the program with every loss parameter one float32 step away, up or down at random."""
    phi = program.loss_params.astype(np.float32)
    up = numpy_generator(seed, "ulp").random(len(phi)) < 0.5
    moved = np.nextafter(phi, np.where(up, np.inf, -np.inf).astype(np.float32))
    return program.with_loss_params(moved.astype(np.float64))
