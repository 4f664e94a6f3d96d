"""A task: data splits, task loss and metric, as the engine sees them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from evoloss.errors import ConfigError, DataError
from evoloss.seeding import numpy_generator
from evoloss.tasks.datasets import read_dataset
from evoloss.tasks.label_noise import apply_label_noise
from evoloss.tasks.preparation import SPLITS


@dataclass(frozen=True, eq=False)
class Split:
    """Inputs ``x`` (rows, ...) and targets ``y``: int64 (rows,) or float (rows, outputs)."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True, eq=False)
class Task:
    """Data and objective of one task.

    Attributes
    ----------
    name : str
        The task's name in the configuration.
    kind : str
        ``classification`` or ``regression``.
    metric : str
        ``error_rate`` (fraction in [0, 1]) or ``mse`` (of standardised targets).
    task_loss : str
        ``cross_entropy`` or ``mse``.
    num_outputs : int
        Outputs of a base model; one output and classes 0, 1 mean a sigmoid.
    input_shape : tuple of int
        Shape of one input.
    train, validation, test : Split
        Disjoint data.
    vocabulary_size : int or None
        Number of character ids (padding is 0, unknown 1); None unless the inputs are text.
    """

    name: str
    kind: str
    metric: str
    task_loss: str
    num_outputs: int
    input_shape: tuple[int, ...]
    train: Split
    validation: Split
    test: Split
    vocabulary_size: int | None = None

    def encode_targets(self, y: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return targets as float (..., rows, num_outputs): one-hot, or ``y`` for regression.

        ``dtype`` is the type of the result, by default float32 for classes and that of ``y`` for
        regression.
        """
        if self.kind == "regression":
            return y if dtype is None else y.to(dtype)
        if self.num_outputs == 1:
            return y.unsqueeze(-1).to(dtype or torch.float32)
        return functional.one_hot(y, self.num_outputs).to(dtype or torch.float32)

    def activate(self, outputs: Tensor) -> Tensor:
        """Return predictions f(x) of a model's outputs (..., rows, num_outputs).

        Softmax over the classes, sigmoid where there is one output, identity for regression.
        """
        if self.kind == "regression":
            return outputs
        return outputs.sigmoid() if self.num_outputs == 1 else outputs.softmax(-1)

    def compute_task_loss(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Return the task loss, averaged over rows (and outputs).

        Parameters
        ----------
        outputs : Tensor of shape (..., rows, num_outputs)
            Raw outputs (logits); leading dimensions are a population of models.
        y : Tensor of shape (..., rows) or (..., rows, num_outputs)
            Targets, with or without the leading dimensions.

        Returns
        -------
        Tensor of shape (...)
        """
        self._check_shapes(outputs, y)
        if self.task_loss == "mse":
            return (outputs - y).square().mean((-2, -1))
        if self.num_outputs == 1:
            logits = outputs.squeeze(-1)
            return (functional.softplus(logits) - logits * y.to(logits.dtype)).mean(-1)
        index = y.expand(outputs.shape[:-1]).unsqueeze(-1)
        return -outputs.log_softmax(-1).gather(-1, index).squeeze(-1).mean(-1)

    @torch.no_grad()
    def compute_metric(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Return the metric (lower is better), without gradient; shapes as in `compute_task_loss`.

        A model with an output that is not finite scores NaN: a diverged model has no error rate,
        and an arg max over NaN would invent one.
        """
        self._check_shapes(outputs, y)
        if self.metric == "mse":
            value = (outputs - y).square().mean((-2, -1))
        else:
            chosen = (
                (outputs.squeeze(-1) > 0).long() if self.num_outputs == 1 else outputs.argmax(-1)
            )
            value = (chosen != y).to(outputs.dtype).mean(-1)
        finite = outputs.isfinite().flatten(-2).all(-1)
        return torch.where(finite, value, torch.nan)

    def _check_shapes(self, outputs: Tensor, y: Tensor) -> None:
        # Broadcasting (rows, 1) against (rows,) would silently give a loss over all pairs of rows.
        dimensions = 2 if self.kind == "regression" else 1
        expected = outputs.shape[-2:][:dimensions]
        if outputs.shape[-1] != self.num_outputs or y.shape[-dimensions:] != expected:
            raise DataError(
                f"task {self.name!r}: outputs of shape {tuple(outputs.shape)} do not fit targets "
                f"of shape {tuple(y.shape)} with {self.num_outputs} outputs"
            )

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Task:
        """Return the task with its data on ``device``, its floating-point data as ``dtype``."""
        return replace(
            self,
            train=_move(self.train, device, dtype),
            validation=_move(self.validation, device, dtype),
            test=_move(self.test, device, dtype),
        )


def _move(split: Split, device: torch.device | str, dtype: torch.dtype | None) -> Split:
    def move(tensor: Tensor) -> Tensor:
        return tensor.to(device, dtype if tensor.is_floating_point() else None)

    return Split(move(split.x), move(split.y))


def load_task(
    name: str,
    dataset_path: str | Path,
    *,
    label_noise: Mapping[str, Any] | None = None,
    data_seed: int = 0,
) -> Task:
    """Build a task from a prepared dataset file.

    Parameters
    ----------
    name : str
        The task's name.
    dataset_path : path
        File written by `evoloss.tasks.datasets.save_dataset`.
    label_noise : mapping, optional
        ``{kind, rate}``, applied to the training labels alone, by a random stream of its own.
    data_seed : int
        Seed of that stream.

    Raises
    ------
    DataError
        If the file is missing, damaged or not a dataset.
    ConfigError
        If the label noise is refused.
    """
    arrays = read_dataset(dataset_path)
    kind = str(arrays["kind"])
    classes = kind == "classification"
    num_outputs = int(arrays["num_outputs"])
    if label_noise:
        if not classes:
            raise ConfigError(f"task {name!r}: label_noise needs classes, but its data is {kind}")
        generator = numpy_generator(data_seed, "label_noise")
        arrays["y_train"] = apply_label_noise(
            arrays["y_train"], max(2, num_outputs), label_noise, generator
        )
    splits = {
        part: Split(torch.from_numpy(arrays[f"x_{part}"]), torch.from_numpy(arrays[f"y_{part}"]))
        for part in SPLITS
    }
    return Task(
        name=name,
        kind=kind,
        metric="error_rate" if classes else "mse",
        task_loss="cross_entropy" if classes else "mse",
        num_outputs=num_outputs,
        input_shape=tuple(arrays["x_train"].shape[1:]),
        vocabulary_size=int(arrays["vocabulary_size"]) or None,
        **splits,
    )
