"""The searches that `benchmarks.racing` runs with and without racing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.search import read_paper_search
from benchmarks.workloads import DATA_SEED, load_dataset, make_workload
from evoloss.engine import Engine, LocalSearchSettings, TrainingSettings
from evoloss.engine.filters import RejectionSettings
from evoloss.search.individuals import VariationSettings
from evoloss.search.settings import SearchSettings
from evoloss.tasks import Task

RUNGS = (0.25, 0.5)
"""Where races stop candidates, if nothing else is asked for."""


@dataclass(frozen=True)
class RacingWorkload:
    """One model on one task, and the search for its losses without racing."""

    make_task: Callable[[], Task]
    model: str
    settings: TrainingSettings
    search: SearchSettings
    model_options: Mapping[str, Any] = field(default_factory=dict)

    def build_engine(self) -> Engine:
        """Return an engine on the CPU."""
        cpu = torch.device("cpu")
        return Engine(self.make_task(), self.model, self.settings, cpu, **self.model_options)


def make_small_search(fitness_steps: int) -> SearchSettings:
    """Return a search of seconds."""
    return SearchSettings(
        population_size=25,
        num_generations=12,
        fitness_steps=fitness_steps,
        variation=VariationSettings(4, 1.4, 0.70, 0.25, 0.05, 2, 4, 10),
        rejection=RejectionSettings(100, 100, 0.01, 2),
        local_search=LocalSearchSettings(20, 1, 0.01),
        initial_deviation=1e-3,
    )


def make_noisy_softmax() -> RacingWorkload:
    """Return softmax regression on digits of which 60 % of the training labels are random."""
    noise = {"kind": "symmetric", "rate": 0.6}
    return RacingWorkload(
        lambda: load_dataset("mnist5k", label_noise=noise, data_seed=DATA_SEED),
        "linear",
        TrainingSettings(64, 0.05),
        make_small_search(250),
    )


def make_small_mlp() -> RacingWorkload:
    """Return a 10-16-16-1 MLP on diabetes."""
    return RacingWorkload(
        lambda: load_dataset("diabetes"),
        "mlp",
        TrainingSettings(32, 0.01, 0.9, True, 5e-4),
        make_small_search(160),
        {"widths": (16, 16)},
    )


def make_paper_racing(name: str) -> RacingWorkload:
    """Return a workload of `benchmarks.workloads` with the search of the paper's preset."""
    w = make_workload(name)
    return RacingWorkload(w.make_task, w.model, w.settings, read_paper_search(w), w.model_options)


WORKLOADS: dict[str, Callable[[], RacingWorkload]] = {
    "softmax-noisy": make_noisy_softmax,
    "small-mlp": make_small_mlp,
    "lenet5": lambda: make_paper_racing("lenet5"),
    "mlp": lambda: make_paper_racing("mlp"),
}
"""Name on the command line: what is searched for. The last two take an hour a seed unless cut down by options."""
