"""What a search remembers: every loss it has seen, rejected ones too."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from evoloss.engine.racing import FinishedTrainings
from evoloss.expressions import Expression

WORST = float("inf")


@dataclass(frozen=True)
class Record:
    """The outcome for one loss: ``fitness`` (lower is better, `WORST` if it was rejected or diverged).

    ``status`` is how it came: evaluated, stopped (by racing), rejected, zero_gradient, gradient_hits (an equal loss's
    fitness), diverged. ``expression`` is the loss with its tuned weights as constants, ``complexity`` the node count of
    its GP ``tree``. ``spared`` are the training steps that it was spared; unless 0, its fitness is predicted, and
    ``best_case`` is what it may be at best. ``twin_of`` is the key of the loss of equal gradients that was trained in
    its place. One that is to take the place of a loss that diverged was spared all steps, and `WORST` is predicted.
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

    ``key_by_gradient`` has losses that were trained, to the end or until they were stopped, or are to be trained.
    ``finished`` are the trainings that racing predicts others from.
    """

    records: dict[str, Record] = field(default_factory=dict)
    key_by_gradient: dict[bytes, str] = field(default_factory=dict)
    finished: FinishedTrainings = field(default_factory=FinishedTrainings)

    def find_owner(self, key: str) -> str:
        """Return the key of the loss whose training gives this one its fitness, perhaps its own."""
        record = self.records.get(key)
        return key if record is None or record.twin_of is None else record.twin_of

    def find_gradient_key(self, owner: str) -> bytes:
        """Return the gradient fingerprint that ``key_by_gradient`` has a loss under."""
        return next(g for g, key in self.key_by_gradient.items() if key == owner)

    def pass_on(self, gradient_key: bytes, twins: Sequence[str], num_steps: int) -> None:
        """Let the first of ``twins`` take the place of a loss that diverged, for the others and for those to come.

        It is to be trained for ``num_steps``, where it matters: with another formula training may well end.
        """
        self.key_by_gradient.pop(gradient_key, None)
        if not twins:
            return
        heir, *others = twins
        self.key_by_gradient[gradient_key] = heir
        self.records[heir] = replace(
            self.records[heir], twin_of=None, fitness=WORST, spared=num_steps, best_case=-WORST
        )
        self.share_fitness(heir, others)

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
