"""Filters that spare work: structurally zero gradients, the rejection protocol, gradient equivalence.

Raymond et al. (TPAMI 2023, section 3.1.3). In EvoMAL the rejection protocol comes after the local search: a
quarter of the candidates that it would reject before are good after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from evoloss.engine.engine import Engine
from evoloss.engine.optimizer import OptimizerState, update_parameters
from evoloss.engine.precision import set_torch_kernels
from evoloss.engine.settings import TrainingSettings
from evoloss.expressions import Expression, Program
from evoloss.expressions.operators import PREDICTION


@dataclass(frozen=True)
class RejectionSettings:
    """Adam ``steps`` of ``learning_rate`` on the predictions of ``sample`` training rows."""

    steps: int
    sample: int
    learning_rate: float
    gradient_digits: int


@dataclass(frozen=True)
class RejectionResult:
    """What the protocol found: ``rejected`` (P,) and each candidate's gradient fingerprint."""

    rejected: NDArray[np.bool_]
    gradient_keys: list[bytes]


def has_zero_gradient(expression: Expression) -> bool:
    """Tell whether dM/df is zero by structure: every f(x) stands under ``sign``. Safe to reject without any run."""
    if expression.symbol == "sign":
        return True
    if expression.symbol == PREDICTION:
        return False
    return all(has_zero_gradient(arg) for arg in expression.args)


def _fingerprint(gradient: NDArray[np.float64], digits: int) -> bytes:
    """Round every sample's gradient (samples, outputs) to ``digits`` significant digits of its norm.

    The paper compares the norms alone; they lose the sign, so that with one output very different losses look alike
    (all |g(y) - f(x)|, for instance, whose norm is 1 everywhere).
    """
    norms = np.sqrt((gradient**2).sum(-1, keepdims=True))
    with np.errstate(divide="ignore", invalid="ignore"):
        exponent = np.floor(np.log10(norms))
    exponent[~np.isfinite(exponent)] = 0.0
    scale = 10.0 ** (exponent - digits + 1)
    return bytes(
        np.round(gradient / scale).astype(np.int64).tobytes() + exponent.astype(np.int64).tobytes()
    )


def run_rejection_protocol(
    engine: Engine, programs: Sequence[Program], settings: RejectionSettings, *stream: int | str
) -> RejectionResult:
    """Optimise predictions directly under every loss; reject a loss that does not improve the metric.

    The predictions start as an untrained network's outputs on ``sample`` training rows (all if there are fewer).
    A metric or gradient that is not finite rejects: NaN improves nothing. The fingerprint is taken at the optimised
    predictions.
    """
    if not programs:
        return RejectionResult(np.zeros(0, dtype=bool), [])
    task = engine.task
    rows = torch.arange(min(settings.sample, len(task.train.y)))
    batch = engine.batch("train", rows)
    with torch.no_grad(), set_torch_kernels(engine.settings.precision, engine.device):
        start = engine.build_model(*stream, "rejection")(batch.x)
    loss = engine.population_loss(programs)
    # with the outputs before the samples: the losses are fastest there
    outputs = start.t().repeat(loss.size, 1, 1)
    rule = TrainingSettings(len(rows), settings.learning_rate, optimizer="adam")
    moments = OptimizerState()
    before = task.compute_metric(start, batch.y).item()
    # a sample that the untrained network gets right by luck cannot improve in the metric; then the task loss must
    measure = task.compute_metric if before > 0 else task.compute_task_loss
    before = measure(start, batch.y).item()
    for _ in range(settings.steps):
        # the sum over samples: Adam's step must not vanish in its epsilon because the batch is large
        step = loss.output_gradients(outputs.mT, batch.targets).mul_(len(rows))
        update_parameters(rule, [outputs], [step.mT], moments)
    outputs = outputs.mT.contiguous()
    after = measure(outputs, batch.y).double().cpu().numpy()
    gradient = loss.output_gradients(outputs, batch.targets).double().cpu().numpy()
    finite = np.isfinite(gradient).all((1, 2)) & np.isfinite(outputs.cpu().numpy()).all((1, 2))
    rejected = ~(finite & (after < before))
    keys = [
        _fingerprint(g, settings.gradient_digits) if ok else b""
        for g, ok in zip(gradient, finite, strict=True)
    ]
    return RejectionResult(rejected, keys)
