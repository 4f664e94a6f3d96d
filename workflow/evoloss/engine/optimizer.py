"""The base models' optimiser: torch's own update rules on plain lists of tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from evoloss.engine.settings import TrainingSettings


@dataclass
class OptimizerState:
    """What an optimiser remembers of one list of parameters: SGD its momentum, Adam two moments and the step."""

    first: list[Tensor | None] = field(default_factory=list)
    second: list[Tensor] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)

    def apply(self, function: Callable[[Tensor], Tensor]) -> OptimizerState:
        """Return the state with ``function`` applied to every momentum and moment, e.g. to keep some networks.

        The steps are counted apart from now on.
        """
        return OptimizerState(
            [None if tensor is None else function(tensor) for tensor in self.first],
            [function(tensor) for tensor in self.second],
            [step.clone() for step in self.steps],
        )


@torch.no_grad()
def update_parameters(
    settings: TrainingSettings,
    params: list[Tensor],
    gradients: list[Tensor],
    state: OptimizerState,
) -> None:
    """Take one step in place; a network's own or P stacked networks' tensors alike, as both rules are element-wise.

    ``gradients`` are used up. The rules are those of `torch.optim.SGD` and `torch.optim.Adam` (fused: one pass over
    memory).
    """
    # the fused kernels walk through memory and do not look at strides
    gradients = [
        g if g.stride() == p.stride() else torch.empty_like(p).copy_(g)
        for p, g in zip(params, gradients, strict=True)
    ]
    if settings.optimizer == "adam":
        if not state.first:
            state.first = [torch.zeros_like(p) for p in params]
            state.second = [torch.zeros_like(p) for p in params]
            state.steps = [torch.zeros((), device=p.device) for p in params]
        adam(
            params,
            gradients,
            state.first,  # type: ignore[arg-type]
            state.second,
            [],
            state.steps,
            fused=True,
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            eps=1e-8,
            maximize=False,
        )
        return
    if not state.first:
        state.first = [None] * len(params)
    sgd(
        params,
        gradients,
        state.first,
        fused=True,
        weight_decay=settings.weight_decay,
        momentum=settings.momentum,
        lr=settings.learning_rate,
        dampening=0.0,
        nesterov=settings.nesterov,
        maximize=False,
    )
