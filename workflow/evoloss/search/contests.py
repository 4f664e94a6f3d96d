"""What the fitness of a generation is asked for: who may still win, and between whom a race is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from evoloss.engine.racing import Contest, find_contenders
from evoloss.expressions import Expression, Program
from evoloss.search.archive import WORST, Archive


class Pending(NamedTuple):
    """A loss that passed the filters: its key in the archive, its GP tree, the loss, its gradient fingerprint."""

    key: str
    tree: Expression
    program: Program
    gradient_key: bytes


def find_asked(keys: Sequence[str], contests: Sequence[Contest], archive: Archive) -> set[str]:
    """Return the keys without a fitness, and of the losses that racing stopped those that may win a contest.

    ``contests`` are between individuals; ``keys`` are theirs.
    """
    number = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    known = [archive.records.get(key) for key in number]
    contenders = find_contenders(
        [contest.renumber([number[key] for key in keys]) for contest in contests],
        [-np.inf if r is None else r.best_case for r in known],
        [np.inf if r is None or r.spared else r.fitness for r in known],
    )
    return {
        key
        for key, record, may_win in zip(number, known, contenders, strict=True)
        if record is None or (record.spared and may_win)
    }


def enter_race(
    keys: Sequence[str],
    contests: Sequence[Contest],
    archive: Archive,
    pending: Sequence[Pending],
    twins: Sequence[Pending],
) -> tuple[list[Contest], list[float]]:
    """Return `run_race`'s contests and rivals for the losses in ``pending``.

    ``contests`` are between individuals, by tournament and for the elite; ``keys`` are theirs. To these comes the
    Pareto front. A loss also stands for its ``twins``, of equal gradients; what is neither is in the archive.
    """
    number = {loss.key: p for p, loss in enumerate(pending)}
    first = {loss.gradient_key: p for p, loss in enumerate(pending)}
    complexity = [loss.tree.complexity for loss in pending]
    rivals: list[float] = []

    def add_rival(fitness: float) -> int:
        rivals.append(fitness)
        return len(pending) + len(rivals) - 1

    for twin in twins:
        if twin.gradient_key in first:
            number[twin.key] = p = first[twin.gradient_key]
            complexity[p] = min(complexity[p], twin.tree.complexity)
        else:
            known = archive.records[archive.key_by_gradient[twin.gradient_key]]
            number[twin.key] = add_rival(known.fitness)
    for key in keys:
        if key not in number:
            number[key] = add_rival(archive.records[key].fitness)
    entered = [contest.renumber([number[key] for key in keys]) for contest in contests]
    front = archive.pareto_front()
    for p, size in enumerate(complexity):
        best = min((r.fitness for r in front if r.complexity <= size), default=WORST)
        entered.append(Contest(frozenset([p, add_rival(best)])))
    return entered, rivals
