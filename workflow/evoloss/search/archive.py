"""What a search remembers: every loss it has seen, rejected ones too."""

from __future__ import annotations

from dataclasses import dataclass, field

from evoloss.engine.racing import FinishedTrainings
from evoloss.expressions import Expression

WORST = float("inf")


@dataclass(frozen=True)
class Record:
    """The outcome for one loss: ``fitness`` (lower is better, `WORST` if it was rejected or diverged).

    ``status`` is how it came: evaluated, stopped (by racing), rejected, zero_gradient, gradient_hits (an equal loss's
    fitness), diverged. ``expression`` is the loss with its tuned weights as constants, ``complexity`` the node count of
    its GP ``tree``. ``spared`` are the training steps that racing spared it; unless 0, its fitness is predicted, and
    ``best_case`` is what it may be at best.
    """

    tree: Expression
    expression: Expression
    complexity: int
    status: str
    fitness: float
    generation: int
    spared: int = 0
    best_case: float = WORST


@dataclass
class Archive:
    """Records by canonical key (symbolic equivalence), keys by gradient fingerprint (gradient equivalence).

    ``finished`` are the trainings that racing predicts others from.
    """

    records: dict[str, Record] = field(default_factory=dict)
    key_by_gradient: dict[bytes, str] = field(default_factory=dict)
    finished: FinishedTrainings = field(default_factory=FinishedTrainings)

    def pareto_front(self) -> list[Record]:
        """Return the accepted records that no other one beats in both fitness and complexity, best fitness first.

        Stopped losses are left out: their fitness is predicted.
        Ties in both are broken by generation and text, so the front does not depend on the order of insertion.
        """
        accepted = sorted(
            (r for r in self.records.values() if r.fitness < WORST and not r.spared),
            key=lambda r: (r.fitness, r.complexity, r.generation, str(r.tree)),
        )
        front: list[Record] = []
        for record in accepted:
            if not front or record.complexity < front[-1].complexity:
                front.append(record)
        return front
