"""The hot path: a population of base models trained at once, unrolled differentiation, filters."""

from evoloss.engine.engine import Engine
from evoloss.engine.local_search import LocalSearchSettings
from evoloss.engine.population_loss import OutputLoss, PopulationLoss, TaskLoss
from evoloss.engine.settings import TrainingSettings, choose_device
from evoloss.engine.training_run import Evaluation, TrainingRun

__all__ = [
    "Engine",
    "Evaluation",
    "LocalSearchSettings",
    "OutputLoss",
    "PopulationLoss",
    "TaskLoss",
    "TrainingRun",
    "TrainingSettings",
    "choose_device",
]
