"""Base models: small networks that train well with plain SGD.

All are free of dropout and batch statistics, and twice differentiable on every device, because the
engine differentiates through their training. All can be transformed by `torch.func` (``vjp``,
``jvp``, ``vmap``), so that a population of them can also be trained as one batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from evoloss.errors import ModelError, describe_choices, take_first_line
from evoloss.tasks.preparation import PADDING_ID
from evoloss.tasks.task import Task

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh}
"""Hidden activations of `make_mlp`."""

SATURATION = 1e4
"""Input at which a sigmoid is exactly 1 and its gradient exactly 0, in every float type."""


def make_linear(task: Task) -> nn.Module:
    """Softmax or linear regression: one linear layer on the flattened input."""
    _require_numbers("linear", task)
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(task.input_shape), task.num_outputs))


def make_mlp(
    task: Task, widths: Sequence[int] = (1000, 1000), activation: str = "relu"
) -> nn.Module:
    """Fully connected network, by default ReLU and two hidden layers of 1000 (Raymond et al. 2023)."""
    _require_numbers("mlp", task)
    if activation not in ACTIVATIONS:
        raise ModelError(f"mlp: activation is {describe_choices(activation, ACTIVATIONS)}")
    layers: list[nn.Module] = [nn.Flatten()]
    num_inputs = math.prod(task.input_shape)
    for width in widths:
        layers += [nn.Linear(num_inputs, width), ACTIVATIONS[activation]()]
        num_inputs = width
    return nn.Sequential(*layers, nn.Linear(num_inputs, task.num_outputs))


def make_lenet5(task: Task) -> nn.Module:
    """LeNet-5 (LeCun et al. 1998) with tanh; padded, so that 28 x 28 inputs act as 32 x 32."""
    if task.vocabulary_size is not None or len(task.input_shape) != 3:
        raise ModelError(_describe_misfit("lenet5", "images (channels, height, width)", task))
    channels, height, width = task.input_shape
    rows, columns = ((size // 2 - 4) // 2 for size in (height, width))
    if rows < 1 or columns < 1:
        raise ModelError(_describe_misfit("lenet5", "images of at least 12 x 12 pixels", task))
    return nn.Sequential(
        nn.Conv2d(channels, 6, kernel_size=5, padding=2),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Conv2d(6, 16, kernel_size=5),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * rows * columns, 120),
        nn.Tanh(),
        nn.Linear(120, 84),
        nn.Tanh(),
        nn.Linear(84, task.num_outputs),
    )


class CharCNN(nn.Module):
    """Characters -> embedding -> convolution of width 3 -> maximum over time -> ReLU -> linear."""

    def __init__(
        self,
        vocabulary_size: int,
        num_outputs: int,
        embedding_size: int = 24,
        num_filters: int = 96,
    ) -> None:
        super().__init__()
        # No padding_idx: it zeroes a gradient in reverse mode alone, so jvp and vjp would disagree.
        self.embedding = nn.Embedding(vocabulary_size, embedding_size)
        self.convolution = nn.Conv1d(embedding_size, num_filters, kernel_size=3, padding=1)
        self.output = nn.Linear(num_filters, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (rows, num_outputs) of character ids (rows, length)."""
        features = self.convolution(self.embedding(x).transpose(-1, -2))
        # ReLU is monotone, so it may follow the maximum, where it has length times less to do.
        logits: Tensor = self.output(features.max(-1).values.relu())
        return logits


class GRU(nn.Module):
    """Characters -> embedding -> GRU (Cho et al. 2014) -> state after the last character -> linear.

    The recurrence is written out: cuDNN's, which `torch.nn.GRU` uses, is not twice differentiable,
    and `torch.nn.GRU` is no faster here on a CPU.
    """

    def __init__(
        self, vocabulary_size: int, num_outputs: int, embedding_size: int = 24, num_hidden: int = 64
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary_size, embedding_size)
        self.input_gates = nn.Linear(embedding_size, 2 * num_hidden)
        self.input_candidate = nn.Linear(embedding_size, num_hidden)
        self.hidden_gates = nn.Linear(num_hidden, 2 * num_hidden, bias=False)
        self.hidden_candidate = nn.Linear(num_hidden, num_hidden)
        self.output = nn.Linear(num_hidden, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (rows, num_outputs) of character ids (rows, length)."""
        embedded = self.embedding(x)
        reset_inputs, update_inputs = self.input_gates(embedded).chunk(2, -1)
        # Padding saturates the update gate at exactly 1, which hands the state on unchanged: the
        # state after the last column is that after the last character.
        is_padding = (x == PADDING_ID).unsqueeze(-1).to(update_inputs.dtype)
        update_inputs = update_inputs + SATURATION * is_padding
        gates = torch.cat((reset_inputs, update_inputs), -1).unbind(-2)
        candidates = self.input_candidate(embedded).unbind(-2)
        hidden = torch.zeros_like(candidates[0])
        for gate, candidate in zip(gates, candidates, strict=True):
            reset, update = torch.sigmoid(gate + self.hidden_gates(hidden)).chunk(2, -1)
            proposal = torch.tanh(torch.addcmul(candidate, reset, self.hidden_candidate(hidden)))
            hidden = torch.lerp(proposal, hidden, update)
        logits: Tensor = self.output(hidden)
        return logits


def make_char_cnn(task: Task, **sizes: int) -> nn.Module:
    """Character-level CNN, see `CharCNN`."""
    return CharCNN(_require_text("char_cnn", task), task.num_outputs, **sizes)


def make_gru(task: Task, **sizes: int) -> nn.Module:
    """Character-level GRU, see `GRU`."""
    return GRU(_require_text("gru", task), task.num_outputs, **sizes)


MODELS: dict[str, Callable[..., nn.Module]] = {
    "linear": make_linear,
    "mlp": make_mlp,
    "lenet5": make_lenet5,
    "char_cnn": make_char_cnn,
    "gru": make_gru,
}
"""Model name: function ``(task, **options) -> nn.Module``."""


def build_model(model_name: str, task: Task, seed: int, **options: Any) -> nn.Module:
    """Return a freshly initialised base model for ``task``, in float32 on the CPU.

    The same seed gives the same weights; the global random state is left as it was.

    Parameters
    ----------
    model_name : str
        A name of `MODELS`.
    task : Task
        Gives the shapes of inputs and outputs.
    seed : int
        Seed of the initial weights, at most 63 bits.
    **options
        Form of the model: ``widths`` and ``activation`` (mlp), ``embedding_size`` and ``num_filters`` or
        ``num_hidden`` (text models).

    Raises
    ------
    ModelError
        If the model is unknown, does not suit the task's inputs, or its builder fails.
    """
    make = MODELS.get(model_name)
    if make is None:
        raise ModelError(
            f"task {task.name!r}: unknown model {describe_choices(model_name, MODELS)}"
        )
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would also seed the GPUs, which fork_rng is told to leave alone.
        torch.default_generator.manual_seed(seed)
        try:
            model = make(task, **options)
        except ModelError:
            raise
        except Exception as error:  # whatever a builder of the user's own raises
            raise ModelError(
                f"task {task.name!r}: model {model_name!r} cannot be built: {type(error).__name__}: "
                f"{take_first_line(error)}"
            ) from error
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"task {task.name!r}: model {model_name!r} cannot be built: its builder returns no torch.nn.Module, but "
            f"{type(model).__name__}"
        )
    return model


def _require_numbers(model_name: str, task: Task) -> None:
    if task.vocabulary_size is not None:
        raise ModelError(_describe_misfit(model_name, "numeric inputs", task))


def _require_text(model_name: str, task: Task) -> int:
    if task.vocabulary_size is None:
        raise ModelError(_describe_misfit(model_name, "text (character ids)", task))
    return task.vocabulary_size


def _describe_misfit(model_name: str, needs: str, task: Task) -> str:
    what = "text" if task.vocabulary_size is not None else "numeric"
    return (
        f"model {model_name!r} needs {needs}, but task {task.name!r} has {what} inputs of shape "
        f"{task.input_shape}"
    )
