"""Tasks: datasets with their splits, base models, task losses and metrics."""

from evoloss.tasks.models import MODELS, build_model
from evoloss.tasks.task import Split, Task, load_task

__all__ = ["MODELS", "Split", "Task", "build_model", "load_task"]
