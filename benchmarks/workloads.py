"""What is measured: models, data and settings. The paper's settings are read from ``workflow/presets/paper.yaml``."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.xor import BATCH_SIZE, NUM_NETWORKS, NUM_STEPS, POPULATION_SIZE, make_xor_task
from evoloss.engine import Engine, TrainingSettings
from evoloss.engine.filters import RejectionSettings
from evoloss.engine.local_search import LocalSearchSettings
from evoloss.stages.searching import build_search_settings
from evoloss.tasks import Task, load_task
from evoloss.tasks.datasets import prepare_dataset, save_dataset

PAPER = Path(__file__).parents[1] / "workflow" / "presets" / "paper.yaml"
DATA_SEED = 0


@dataclass(frozen=True)
class Workload:
    """One model on one task, and how much of each phase one candidate of a search gets.

    ``local_search`` and ``rejection`` are None where the published example has no such phase. ``population`` is the
    number of candidates of a generation.
    """

    name: str
    dataset: str
    model: str
    make_task: Callable[[], Task]
    settings: TrainingSettings
    local_search: LocalSearchSettings | None
    rejection: RejectionSettings | None
    fitness_steps: int
    population: int
    num_networks: int = 1
    model_options: Mapping[str, Any] = field(default_factory=dict)

    def build_engine(self, device: torch.device) -> Engine:
        """Return an engine with the data loaded."""
        return Engine(self.make_task(), self.model, self.settings, device, **self.model_options)


def load_dataset(name: str, **task_options: Any) -> Task:
    """Return a task on a built-in dataset, split as the default configuration splits it; options of `load_task`."""
    arrays, card = prepare_dataset(name, data_seed=DATA_SEED)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.npz"
        save_dataset(arrays, card, path, path.with_suffix(".json"))
        return load_task(name, path, **task_options)


def read_paper_section(section: str, task: str) -> dict[str, Any]:
    """Return a section of the paper's preset with the task's own values merged."""
    config = yaml.safe_load(PAPER.read_text(encoding="utf-8"))
    return {**config[section], **config["tasks"][task].get(section, {})}


def make_paper_workload(name: str, task: str, model: str) -> Workload:
    """Return ``model`` on a task of the paper's preset."""
    search = build_search_settings(
        read_paper_section("search", task), read_paper_section("local_search", task)
    )
    return Workload(
        name,
        task,
        model,
        lambda: load_dataset(task),
        TrainingSettings(**read_paper_section("training", task)),
        search.local_search,
        search.rejection,
        search.fitness_steps,
        search.population_size,
    )


def make_xor_workload(name: str) -> Workload:
    """Return the published example of another package, see `benchmarks.xor`."""
    return Workload(
        name,
        "xor",
        "mlp",
        make_xor_task,
        TrainingSettings(BATCH_SIZE, 0.01, optimizer="adam"),
        None,
        None,
        NUM_STEPS,
        POPULATION_SIZE,
        NUM_NETWORKS,
        {"widths": (16, 16), "activation": "tanh"},
    )


WORKLOADS: dict[str, Callable[[str], Workload]] = {
    "softmax": lambda name: make_paper_workload(name, "mnist5k", "linear"),
    "lenet5": lambda name: make_paper_workload(name, "mnist5k", "lenet5"),
    "mlp": lambda name: make_paper_workload(name, "diabetes", "mlp"),
    "xor": make_xor_workload,
}
"""Workload name: function of the name."""


def make_workload(name: str) -> Workload:
    """Return a workload of `WORKLOADS` by name."""
    return WORKLOADS[name](name)
