"""Settings of the inner training (how a base model is trained) and the device it runs on."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from evoloss.errors import ConfigError, describe_choices

OPTIMIZERS = ("sgd", "adam")
DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "tf32": torch.float32,
    "bf16": torch.float32,
}
"""Precision: type of data, parameters and losses. See `evoloss.engine.precision` for what else tf32 and bf16 change."""


@dataclass(frozen=True)
class TrainingSettings:
    """How a base model is trained: SGD or Adam, as `torch.optim` defines them.

    ``optimizer`` sgd or adam (which takes no momentum), ``learning_rate`` > 0, ``momentum`` in [0, 1), ``weight_decay``
    >= 0 (added to the gradient), ``nesterov`` needs momentum, ``batch_size`` in samples (the whole training set if that
    is smaller), ``precision`` float32, float64, tf32 (float32 whose products on a GPU are TF32) or
    bf16 (the model's layers in bfloat16, the rest in float32).
    """

    batch_size: int
    learning_rate: float
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    precision: str = "float32"
    optimizer: str = "sgd"

    def __post_init__(self) -> None:
        if self.precision not in DTYPES:
            raise ConfigError(f"training.precision is {describe_choices(self.precision, DTYPES)}")
        if self.optimizer not in OPTIMIZERS:
            raise ConfigError(
                f"training.optimizer is {describe_choices(self.optimizer, OPTIMIZERS)}"
            )
        if self.optimizer == "adam" and self.momentum:
            raise ConfigError("training.momentum needs training.optimizer: sgd")
        if self.nesterov and not self.momentum > 0:
            raise ConfigError("training.nesterov needs training.momentum > 0")

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point type of data, parameters and losses."""
        return DTYPES[self.precision]

    @property
    def first_step_rate(self) -> float:
        """What multiplies the gradient in the first SGD step: Nesterov adds ``momentum`` times the fresh buffer."""
        return self.learning_rate * (1.0 + self.momentum if self.nesterov else 1.0)


def choose_device(name: str) -> torch.device:
    """Return the device for ``auto`` (a GPU when there is one), ``cpu`` or ``cuda``.

    Raises
    ------
    ConfigError
        For another name, or ``cuda`` where there is no usable GPU.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device is {describe_choices(name, ['auto', 'cpu', 'cuda'])}")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is 'cuda', but torch finds no GPU; use 'auto' or 'cpu'")
    return torch.device(name)
