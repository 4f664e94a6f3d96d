"""The loss parameters of a population during a local search, and Adam's steps on them, compiled with numba.

Kingma and Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015, algorithm 1, in float64 and with the numbers of
`torch.optim.Adam`. Compiled, so that a compiled meta-step can take the step too; a call of torch's own costs as much as
the meta-gradient of a linear classifier.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from evoloss.engine import kernel_rows
from evoloss.engine.kernel_rows import digest_sources, kernel, sweep
from evoloss.expressions import Program

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


@sweep
def sweep_adam(lo, hi, gradient, trainable, weights, first, second, rate, root):  # type: ignore[no-untyped-def]
    """Take the step of the candidate ``lo:hi``; return False and do nothing if its gradient is not finite.

    ``rate`` and ``root`` are the learning rate and the square root of the second moment's correction for bias, as
    `LossParams.next_step` returns them.
    """
    for k in range(lo, hi):
        if trainable[k] and not np.isfinite(gradient[k]):
            return False
    for k in range(lo, hi):
        if trainable[k]:
            g = gradient[k]
            first[k] += (1.0 - BETA1) * (g - first[k])
            second[k] = BETA2 * second[k] + (1.0 - BETA2) * g * g
            weights[k] -= rate * first[k] / (math.sqrt(second[k]) / root + EPSILON)
    return True


@functools.cache
def _compile() -> Callable[..., None]:
    digest = digest_sources(kernel_rows)

    @kernel
    def update(offsets, alive, gradient, trainable, weights, first, second, rate, root):  # type: ignore[no-untyped-def]
        _ = digest
        for p in range(alive.size):
            if alive[p]:
                alive[p] = sweep_adam(
                    offsets[p], offsets[p + 1], gradient, trainable, weights, first, second, rate, root
                )  # fmt: skip

    return update


class LossParams:
    """Instruction weights of P programs end to end, of which the trainable ones are their loss parameters phi.

    ``weights`` and Adam's moments ``first`` and ``second`` are float64 arrays ``(instructions,)``; ``alive`` (P,) tells
    which candidates have had finite gradients only: the others stay where they are.
    """

    def __init__(self, programs: Sequence[Program], learning_rate: float) -> None:
        self.learning_rate = learning_rate
        self.weights = np.concatenate([program.weights for program in programs], dtype=np.float64)
        self.trainable = np.concatenate([program.trainable for program in programs])
        lengths = [len(program) for program in programs]
        self.offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        self.alive = np.ones(len(programs), dtype=bool)
        self.first, self.second = np.zeros((2, len(self.weights)))
        self.num_steps = 0

    def next_step(self) -> tuple[float, float]:
        """Count one step; return what `sweep_adam` takes for it, ``rate`` and ``root``."""
        self.num_steps += 1
        rate = self.learning_rate / (1.0 - BETA1**self.num_steps)
        return rate, math.sqrt(1.0 - BETA2**self.num_steps)

    @property
    def arrays(self) -> tuple[NDArray[Any], ...]:
        """What `sweep_adam` reads and writes, from ``trainable`` to ``second``."""
        return self.trainable, self.weights, self.first, self.second

    def update(self, gradient: NDArray[np.float64]) -> None:
        """Take one step along ``gradient`` (instructions,); a candidate whose own is not finite ends here."""
        _compile()(self.offsets, self.alive, gradient, *self.arrays, *self.next_step())

    def describe(self) -> dict[str, Any]:
        """Return all that `restore` needs, in arrays of its own."""
        arrays = {"weights": self.weights, "exp_avg": self.first, "exp_avg_sq": self.second}
        tensors = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
        return {"alive": self.alive.tolist(), "num_steps": self.num_steps, **tensors}

    def restore(self, progress: dict[str, Any], first_program: int, first_weight: int) -> None:
        """Go on from what `describe` returned, for these programs or more of them; these start there."""
        p, k = len(self.alive), len(self.weights)
        self.alive[:] = progress["alive"][first_program : first_program + p]
        self.num_steps = progress["num_steps"]
        own = slice(first_weight, first_weight + k)
        self.weights[:], self.first[:], self.second[:] = (
            progress[name][own].numpy() for name in ("weights", "exp_avg", "exp_avg_sq")
        )


def join_progress(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what `LossParams.describe` of all the parts' programs together would."""
    names = ("weights", "exp_avg", "exp_avg_sq")
    return {
        "alive": [one for part in parts for one in part["alive"]],
        "num_steps": parts[0]["num_steps"],
        **{name: torch.cat([part[name] for part in parts]) for name in names},
    }
