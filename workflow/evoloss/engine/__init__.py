"""The hot path: a population of base models trained at once, unrolled differentiation, filters."""

from evoloss.engine.engine import Engine, Evaluation, LocalSearchSettings
from evoloss.engine.population_loss import OutputLoss, PopulationLoss, TaskLoss
from evoloss.engine.settings import TrainingSettings, choose_device

__all__ = [
    "Engine",
    "Evaluation",
    "LocalSearchSettings",
    "OutputLoss",
    "PopulationLoss",
    "TaskLoss",
    "TrainingSettings",
    "choose_device",
]
