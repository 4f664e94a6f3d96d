"""From configuration sections to an engine; shared by all stages."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from evoloss.checkpoint import Checkpoints, compute_identity
from evoloss.engine import Engine, TrainingSettings, choose_device
from evoloss.errors import DataError
from evoloss.provenance import describe_hardware, provenance
from evoloss.results import read_json
from evoloss.tasks import load_task


@dataclass(frozen=True)
class StageInput:
    """What every compute rule gets.

    Attributes
    ----------
    task : mapping
        name, dataset, kind, model, label_noise, data_seed.
    training : mapping
        The configuration's training section, the task's own values merged.
    dataset_path : str
        The prepared dataset.
    device : str
        auto, cpu or cuda.
    threads : int
        CPU threads; part of what makes results reproducible, because sums depend on it.
    tuned_path : str or None
        Result of tune_learning_rate, whose learning rate replaces ``training.learning_rate``.
    checkpoint_directory : str or None
        Where a long job's checkpoints live until it is done; None for a rule without.
    checkpoint_seconds : float
        A job that is killed loses at most so much of its work, and the step it was at.
    """

    task: Mapping[str, Any]
    training: Mapping[str, Any]
    dataset_path: str
    device: str
    threads: int
    tuned_path: str | None = None
    checkpoint_directory: str | None = None
    checkpoint_seconds: float = 120.0

    @property
    def settings(self) -> TrainingSettings:
        """The inner training's settings, with the tuned learning rate if there is one."""
        settings = TrainingSettings(**self.training)
        if self.tuned_path is None:
            return settings
        return replace(settings, learning_rate=read_tuned_rate(self.tuned_path))

    def build_engine(self) -> Engine:
        """Load the data and return the engine; sets torch's number of CPU threads."""
        torch.set_num_threads(self.threads)
        device = choose_device(self.device)
        if device.type == "cuda":
            # the same seed on the same card gives the same result; an operation that cannot promise it warns
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True, warn_only=True)
        task = load_task(
            self.task["name"],
            self.dataset_path,
            label_noise=self.task["label_noise"],
            data_seed=self.task["data_seed"],
        )
        return Engine(task, self.task["model"], self.settings, device)

    @classmethod
    def from_snakemake(cls, snakemake: Any) -> StageInput:
        """Unpack the object that Snakemake gives to a script."""
        tuned = snakemake.input.get("tuned")
        return cls(
            task=snakemake.params.task,
            training=snakemake.params.training,
            dataset_path=str(snakemake.input.dataset),
            device=snakemake.params.device,
            threads=snakemake.threads,
            tuned_path=str(tuned) if tuned else None,
            checkpoint_directory=snakemake.params.get("checkpoints"),
        )

    def describe_provenance(self, settings: Any, **extra: Any) -> dict[str, Any]:
        """Return the result's `provenance`, with the device and the threads of this job."""
        hardware = describe_hardware(self.threads, choose_device(self.device).type)
        return provenance(settings, hardware, **extra)

    def open_checkpoints(self, content: Any, *files: str | Path) -> Checkpoints | None:
        """Return the job's checkpoints, tied to all it computes from: this, ``content`` and ``files``."""
        if self.checkpoint_directory is None:
            return None
        where = [choose_device(self.device).type, self.threads]
        inputs = [self.dataset_path, *([self.tuned_path] if self.tuned_path else []), *files]
        identity = compute_identity([self.task, self.training, where, content], *inputs)
        return Checkpoints(self.checkpoint_directory, identity, self.checkpoint_seconds)

    def remove_checkpoints(self) -> None:
        """Delete the job's checkpoints, once its results are written."""
        if self.checkpoint_directory is not None:
            shutil.rmtree(self.checkpoint_directory, ignore_errors=True)


def read_tuned_rate(path: str | Path) -> float:
    """Return the best learning rate of a tune_learning_rate result; raises `DataError` if it holds none."""
    rate = read_json(path).get("best_learning_rate")
    if not isinstance(rate, float | int):
        raise DataError(
            f"{path} holds no best_learning_rate: training diverged at every one tried; lower "
            "tune_learning_rate.minimum"
        )
    return float(rate)
