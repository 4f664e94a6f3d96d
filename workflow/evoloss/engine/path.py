"""What the engine needs of a path: one way to train P networks and to differentiate through one training step.

A path handles a family of networks. Each fast path is one module that nothing else imports but the list in
`evoloss.engine.engine`; without it the general path does the same, slower.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from evoloss.engine.loss_params import LossParams
from evoloss.engine.population_loss import OutputLoss, PopulationLoss
from evoloss.engine.settings import TrainingSettings
from evoloss.engine.streams import Batch
from evoloss.tasks import Task


class Context(Protocol):
    """All of a meta-step that does not depend on the losses; shared by candidates and generations."""

    @property
    def nbytes(self) -> int:
        """Memory that keeping it takes, in bytes."""
        ...


CompiledMetaSteps = Callable[[Sequence[Any], PopulationLoss, LossParams], None]


class Path(Protocol):
    """One way to train a population; ``task`` and ``model`` are on the device and of the dtype they run in."""

    name: str

    @property
    def compiled_meta_steps(self) -> CompiledMetaSteps | None:
        """Takes one meta-step after the other, on the loss's weights and its loss parameters, in compiled calls.

        A thread then keeps no other waiting. None: local search asks for `meta_gradients`, which uses all threads.
        """
        ...

    def __init__(self, task: Task, model: nn.Module, settings: TrainingSettings) -> None: ...

    @classmethod
    def find_obstacle(cls, task: Task, model: nn.Module, settings: TrainingSettings) -> str | None:
        """Return why the path cannot handle this, as half a sentence for the log; None if it can."""
        ...

    def start(self, models: Sequence[nn.Module]) -> Any:
        """Return the state of ``len(models)`` networks with the models' parameters; entries may be one object."""
        ...

    def select(self, state: Any, keep: Sequence[int]) -> Any:
        """Return the state of the networks ``keep`` alone; ``state`` is not used any more."""
        ...

    def advance(
        self, state: Any, loss: OutputLoss, x: Tensor, targets: Tensor, batches: Tensor
    ) -> None:
        """Train every network in place on ``batches`` (steps, batch) of the rows of ``x`` and ``targets``.

        Network p trains under loss p. A network whose gradient is not finite may stop there.
        """
        ...

    def outputs(self, state: Any, x: Tensor) -> Tensor:
        """Return the networks' outputs (P, N, C); not finite for networks that have diverged."""
        ...

    def prepare(self, model: nn.Module, inner: Batch, outer: Batch) -> Any:
        """Return the `Context` of the meta-step from ``model`` over ``inner`` to ``outer``; it may keep ``model``."""
        ...

    def meta_gradients(
        self, context: Any, loss: PopulationLoss
    ) -> tuple[Tensor, NDArray[np.float64]]:
        """Return outer losses (P,) and their gradients by all instruction weights, shape ``(instructions,)``."""
        ...
