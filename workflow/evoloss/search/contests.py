"""Who meets whom in the races of a generation, and what for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from evoloss.engine.racing import Contest, find_contenders
from evoloss.expressions import Expression, Program
from evoloss.search.archive import WORST, Archive


class Pending(NamedTuple):
    """A loss to train with: its key in the archive, its GP tree, the loss, its gradient fingerprint."""

    key: str
    tree: Expression
    program: Program
    gradient_key: bytes


@dataclass(frozen=True)
class LineUp:
    """``keys`` of those that meet, the ones in the race first; ``contests`` and ``rivals`` as `run_race` takes them.

    Contests are by the numbers of ``keys``; numbers after these stand for the Pareto front, once for everyone whose
    training has not ended.
    """

    keys: list[str]
    contests: list[Contest]
    rivals: list[float]


def line_up(
    racing: Sequence[Pending],
    owners: Sequence[str],
    contests: Sequence[Contest],
    archive: Archive,
) -> LineUp:
    """Return who meets whom in a race of some losses.

    ``contests`` are between individuals, by tournament and for the elite; ``owners`` are the keys of the losses whose
    training gives them their fitness. These are in ``racing`` or in the archive. To the contests comes the Pareto
    front, for which a loss also stands for its twins, of equal gradients: the simplest of them counts. A loss that was
    stopped is no rival, as its fitness is not known.
    """
    entering = {loss.key: loss.tree.complexity for loss in racing}
    keys = list(dict.fromkeys([*entering, *owners]))
    number = {key: i for i, key in enumerate(keys)}
    numbers = [number[owner] for owner in owners]
    entered = [contest.renumber(numbers) for contest in contests]
    known = [archive.records[key] for key in keys[len(racing) :]]
    rivals = [WORST if record.spared else record.fitness for record in known]
    front, twins = archive.pareto_front(), archive.list_twins()
    for i, key in enumerate(keys):
        if key not in entering and not archive.records[key].spared:
            continue
        size = entering[key] if key in entering else archive.records[key].complexity
        size = min([size, *(archive.records[twin].complexity for twin in twins.get(key, ()))])
        entered.append(Contest(frozenset([i, len(racing) + len(rivals)])))
        rivals.append(min((r.fitness for r in front if r.complexity <= size), default=WORST))
    return LineUp(keys, entered, rivals)


def find_reopened(
    owners: Sequence[str], contests: Sequence[Contest], archive: Archive
) -> list[str]:
    """Return the losses that were stopped, or not trained yet, and by what is known now may win a contest after all.

    ``owners`` and ``contests`` as `line_up` takes them; everyone is in the archive.
    """
    stopped = {owner for owner in owners if archive.records[owner].spared}
    if not stopped:
        return []
    lined = line_up((), owners, contests, archive)
    best_case = np.array(lined.rivals)
    for i, key in enumerate(lined.keys):
        if key in stopped:
            best_case[i] = archive.records[key].best_case
    contenders = find_contenders(lined.contests, best_case, lined.rivals)
    return [key for i, key in enumerate(lined.keys) if key in stopped and contenders[i]]
