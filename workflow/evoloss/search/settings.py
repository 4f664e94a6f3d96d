"""What a search is told."""

from __future__ import annotations

from dataclasses import dataclass, field

from evoloss.engine import LocalSearchSettings
from evoloss.engine.filters import RejectionSettings
from evoloss.engine.racing import RacingSettings
from evoloss.search.individuals import VariationSettings


@dataclass(frozen=True)
class SearchSettings:
    """Settings of one search; ``local_search`` is None for gp_lfl. See method.md's table for the paper's values."""

    population_size: int
    num_generations: int
    fitness_steps: int
    variation: VariationSettings
    rejection: RejectionSettings
    local_search: LocalSearchSettings | None
    initial_deviation: float
    num_networks: int = 1
    racing: RacingSettings = field(default_factory=RacingSettings)
