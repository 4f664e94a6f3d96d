"""What a search remembers: every loss it has seen, rejected ones too."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from evoloss.engine.racing import FinishedTrainings
from evoloss.expressions import Expression

WORST = float("inf")


@dataclass(frozen=True)
class Record:
    """The outcome for one loss: ``fitness`` (lower is better, `WORST` if it was rejected or diverged).

    ``status`` is how it came: evaluated, stopped (by racing), rejected, zero_gradient, gradient_hits (an equal loss's
    fitness), diverged. ``expression`` is the loss with its tuned weights as constants, ``complexity`` the node count of
    its GP ``tree``. ``spared`` are the training steps that racing spared it; unless 0, its fitness is predicted, and
    ``best_case`` is what it may be at best. ``twin_of`` is the key of the loss of equal gradients that was trained in
    its place.
    """

    tree: Expression
    expression: Expression
    complexity: int
    status: str
    fitness: float
    generation: int
    spared: int = 0
    best_case: float = -WORST
    twin_of: str | None = None


@dataclass
class Archive:
    """Records by canonical key (symbolic equivalence), keys by gradient fingerprint (gradient equivalence).

    ``key_by_gradient`` has losses that were trained, to the end or until they were stopped. ``finished`` are the
    trainings that racing predicts others from.
    """

    records: dict[str, Record] = field(default_factory=dict)
    key_by_gradient: dict[bytes, str] = field(default_factory=dict)
    finished: FinishedTrainings = field(default_factory=FinishedTrainings)

    def find_owner(self, key: str) -> str:
        """Return the key of the loss whose training gives this one its fitness, perhaps its own."""
        record = self.records.get(key)
        return key if record is None or record.twin_of is None else record.twin_of

    def find_gradient_key(self, owner: str) -> bytes | None:
        """Return the gradient fingerprint that ``key_by_gradient`` has a loss under."""
        return next((g for g, key in self.key_by_gradient.items() if key == owner), None)

    def forget_gradient(self, owner: str) -> None:
        """Let no other loss have this one's fitness."""
        gradient_key = self.find_gradient_key(owner)
        if gradient_key is not None:
            del self.key_by_gradient[gradient_key]

    def list_twins(self) -> dict[str, list[str]]:
        """Return the keys of all losses that have another one's fitness, by that one's key."""
        twins: dict[str, list[str]] = {}
        for key, record in self.records.items():
            if record.twin_of is not None:
                twins.setdefault(record.twin_of, []).append(key)
        return twins

    def share_fitness(self, owner: str, twins: Iterable[str]) -> None:
        """Make losses of equal gradients another one's twins, with its fitness if that is known already."""
        known = self.records.get(owner)
        for twin in twins:
            record = replace(self.records[twin], twin_of=owner)
            if known is not None:
                record = replace(
                    record, fitness=known.fitness, spared=known.spared, best_case=known.best_case
                )
            self.records[twin] = record

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
