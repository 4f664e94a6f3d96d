"""The losses of a population, evaluated together: their gradient by the network's outputs.

The network is never traced together with the loss: a loss gives the gradient by the outputs (logits), and the network
propagates it. So the same code serves every network and every loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evoloss.engine.device_losses import copy_programs
from evoloss.engine.kernels import loss_gradients, mixed_gradients, pack_programs
from evoloss.engine.softmax_kernels import cross_entropy, multiply_by_jacobian
from evoloss.expressions import Program, evaluate_program
from evoloss.tasks import Task

if TYPE_CHECKING:
    from evoloss.engine.triton_kernels import DevicePrograms


class OutputLoss(Protocol):
    """What a training loop needs of P losses."""

    size: int

    def output_gradients(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return d loss_p / d outputs; ``outputs`` (P, B, C), ``targets`` encoded (B, C) -> (P, B, C).

        The result has the memory order of ``outputs``; fastest is that of a contiguous (P, C, B), transposed.
        """
        ...

    def select(self, keep: Sequence[int]) -> OutputLoss:
        """Return the losses with the given numbers."""
        ...


def has_classes_first(outputs: Tensor) -> bool:
    """Tell whether (..., B, C) is the transpose of a contiguous (..., C, B), along which softmax is fast."""
    return not outputs.is_contiguous() and outputs.mT.is_contiguous()


def activate(task: Task, outputs: Tensor) -> Tensor:
    """Return `Task.activate` of ``outputs`` (..., B, C), in their memory order."""
    if task.kind == "classification" and task.num_outputs > 1 and has_classes_first(outputs):
        return outputs.mT.softmax(-2).mT
    return task.activate(outputs)


class TaskLoss:
    """The task loss itself (cross-entropy or MSE), exactly as `torch.nn.functional` defines it."""

    def __init__(self, task: Task, size: int = 1) -> None:
        self.task = task
        self.size = size

    def output_gradients(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """See `OutputLoss`. For softmax and sigmoid alike the gradient of the log-loss is (f - y) / batch."""
        return self._scale(activate(self.task, outputs) - targets)

    def _scale(self, difference: Tensor) -> Tensor:
        rows, columns = difference.shape[-2:]
        return difference.mul_(2.0 / (rows * columns) if self.task.task_loss == "mse" else 1 / rows)

    def values_and_gradients(
        self, outputs: Tensor, targets: Tensor, y: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the losses (P,) and `output_gradients`; ``y`` are the labels as `Task.compute_task_loss` takes them.

        Cross-entropy of ``outputs`` with classes first takes one softmax for both.
        """
        if (
            self.task.task_loss == "mse"
            or self.task.num_outputs == 1
            or not has_classes_first(outputs)
        ):
            return self.task.compute_task_loss(outputs, y), self.output_gradients(outputs, targets)
        if outputs.device.type == "cpu":
            found = cross_entropy(outputs.mT.numpy(), targets.t().contiguous().numpy())
            return torch.from_numpy(found[0]), torch.from_numpy(found[1]).mT
        log_p = outputs.mT.log_softmax(-2)
        chosen = log_p.gather(-2, y.expand(len(outputs), 1, -1))
        return -chosen.flatten(1).mean(-1), self._scale(log_p.exp_().mT - targets)

    def select(self, keep: Sequence[int]) -> TaskLoss:
        """See `OutputLoss`."""
        return TaskLoss(self.task, len(keep))


def activation_backward(
    task: Task, predictions: Tensor, upstream: Tensor, factor: float = 1.0
) -> Tensor:
    """Return ``factor * upstream`` times the activation's Jacobian at ``predictions``; it is symmetric.

    ``upstream`` (P, B, C), ``predictions`` (P or 1, B, C) -> (P, B, C).
    """
    if task.kind == "regression":
        return upstream * factor
    if task.num_outputs == 1:
        return upstream * (factor * predictions * (1.0 - predictions))
    if (
        predictions.device.type == "cpu"
        and has_classes_first(predictions)
        and upstream.mT.is_contiguous()
    ):
        found = multiply_by_jacobian(predictions.mT.numpy(), upstream.mT.numpy(), factor)
        return torch.from_numpy(found).mT
    weighted = upstream * predictions * factor
    return weighted.addcmul_(predictions, weighted.sum(-1, keepdim=True), value=-1.0)


class PopulationLoss:
    """P learned losses M_p(y, f(x)): element losses summed over classes, averaged over the batch.

    Regression averages over all elements, which is the same for one output.
    """

    def __init__(self, task: Task, programs: Sequence[Program], dtype: torch.dtype) -> None:
        self.task = task
        self.programs = list(programs)
        self.size = len(self.programs)
        self.dtype = dtype
        numpy_dtype = np.float32 if dtype == torch.float32 else np.float64
        self.packed = pack_programs(self.programs, numpy_dtype)
        self._on_device: DevicePrograms | None = None

    def select(self, keep: Sequence[int]) -> PopulationLoss:
        """See `OutputLoss`."""
        chosen = PopulationLoss(self.task, [self.programs[p] for p in keep], self.dtype)
        spans = [slice(self.offsets[p], self.offsets[p + 1]) for p in keep]
        chosen.set_weights(np.concatenate([self.packed.weights[span] for span in spans]))
        return chosen

    def set_weights(self, weights: NDArray[np.float64]) -> None:
        """Replace all instruction weights, end to end, shape ``(instructions,)``."""
        with np.errstate(over="ignore"):  # as in `pack_programs`
            self.packed.weights[:] = weights
        if self._on_device is not None:
            self._on_device.set_weights(self.packed.weights)

    def split_weights(self) -> list[NDArray[Any]]:
        """Return every program's current instruction weights."""
        return np.split(self.packed.weights, self.offsets[1:-1])

    @property
    def offsets(self) -> NDArray[np.int64]:
        """Program p's instructions are ``offsets[p]:offsets[p + 1]`` of the weights."""
        return self.packed.offsets

    def _device_programs(self, device: torch.device) -> DevicePrograms | None:
        if self._on_device is None:
            self._on_device = copy_programs(self.packed, device)
        return self._on_device

    def _mean_factor(self, targets: Tensor) -> float:
        return 1.0 / (targets.numel() if self.task.kind == "regression" else targets.shape[0])

    def prediction_gradients(self, predictions: Tensor, targets: Tensor) -> Tensor:
        """Return dM_p/df element-wise; ``predictions`` (P or 1, B, C), ``targets`` (B, C) -> (P, B, C)."""
        if predictions.device.type != "cpu":
            programs = self._device_programs(predictions.device)
            if programs is None:
                return self.prediction_gradients_by_autograd(predictions, targets)
            flat = predictions.detach().flatten(1)
            return programs.loss_gradients(targets.flatten(), flat).view(-1, *targets.shape)
        predictions = predictions.detach()
        classes_first = has_classes_first(predictions)
        if classes_first:
            predictions, targets = predictions.mT, targets.mT
        _, gradient = loss_gradients(
            self.packed, targets.reshape(-1).numpy(), predictions.flatten(1).numpy()
        )
        result = torch.from_numpy(gradient).view(self.size, *targets.shape)
        return result.mT if classes_first else result

    def prediction_gradients_by_autograd(self, predictions: Tensor, targets: Tensor) -> Tensor:
        """Do the same by autograd, for devices that the kernels do not reach."""
        f = predictions.detach().expand(self.size, *targets.shape).clone().requires_grad_()
        total = self._sum_values(targets, f, self._factors())
        return torch.autograd.grad(total, f, allow_unused=True, materialize_grads=True)[0]

    def output_gradients(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """See `OutputLoss`."""
        return self.output_gradients_at(activate(self.task, outputs.detach()), targets)

    def output_gradients_at(self, predictions: Tensor, targets: Tensor) -> Tensor:
        """Do the same for outputs whose `activate` is known: ``predictions`` (P or 1, B, C)."""
        gradient = self.prediction_gradients(predictions, targets)
        return activation_backward(self.task, predictions, gradient, self._mean_factor(targets))

    def weight_gradients(
        self, outputs: Tensor, targets: Tensor, direction: Tensor
    ) -> NDArray[np.float64]:
        """Return d < direction_p, d M_p / d outputs > / d weights, shape ``(instructions,)``.

        ``outputs`` (P or 1, B, C), ``targets`` (B, C), ``direction`` (P, B, C), e.g. the Jacobian-vector product J g.
        """
        return self.weight_gradients_at(activate(self.task, outputs.detach()), targets, direction)

    def weight_gradients_at(
        self, predictions: Tensor, targets: Tensor, direction: Tensor
    ) -> NDArray[np.float64]:
        """Do the same for outputs whose `activate` is known: ``predictions`` (P or 1, B, C)."""
        factor = self._mean_factor(targets)
        u = activation_backward(self.task, predictions, direction, factor)
        if predictions.device.type == "cpu":
            return self.weight_gradients_by_kernel(predictions, targets, u)
        programs = self._device_programs(predictions.device)
        if programs is None:
            return self.weight_gradients_by_autograd(predictions, targets, u)
        gradient = programs.mixed_gradients(
            targets.flatten(), predictions.flatten(1), u.detach().flatten(1)
        )
        return np.asarray(gradient.double().cpu().numpy())

    def weight_gradients_by_kernel(
        self, predictions: Tensor, targets: Tensor, u: Tensor
    ) -> NDArray[np.float64]:
        """Return d < u_p, dM_p/df > / d weights, shape ``(instructions,)``; shapes as in `weight_gradients`."""
        if has_classes_first(predictions):
            predictions, targets, u = predictions.mT, targets.mT, u.mT
        return mixed_gradients(
            self.packed,
            targets.reshape(-1).numpy(),
            predictions.flatten(1).numpy(),
            u.flatten(1).numpy(),
        )

    def weight_gradients_by_autograd(
        self, predictions: Tensor, targets: Tensor, u: Tensor
    ) -> NDArray[np.float64]:
        """Do the same by autograd, for devices that the kernels do not reach."""
        f = predictions.expand(u.shape).clone().requires_grad_()
        weights = torch.tensor(
            self.packed.weights, device=f.device, dtype=f.dtype, requires_grad=True
        )
        total = self._sum_values(targets, f, weights.unbind())
        (gradient,) = torch.autograd.grad(
            total, f, create_graph=True, allow_unused=True, materialize_grads=True
        )
        inner = (gradient * u).sum()
        if not inner.requires_grad:
            return np.zeros(len(weights))
        (result,) = torch.autograd.grad(inner, weights, allow_unused=True, materialize_grads=True)
        return np.asarray(result.double().cpu().numpy())

    def _factors(self) -> list[float]:
        return [float(weight) for weight in self.packed.weights]

    def _sum_values(self, targets: Tensor, f: Tensor, factors: Sequence[Any]) -> Tensor:
        """Return the sum of all losses' element values; ``factors`` one per instruction of all programs."""
        total = torch.zeros((), device=f.device, dtype=f.dtype)
        for p, program in enumerate(self.programs):
            own = factors[self.offsets[p] : self.offsets[p + 1]]
            values = torch.as_tensor(evaluate_program(program, targets, f[p], own, torch))
            total = total + values.sum()
        return total if total.requires_grad else total + 0.0 * f.sum()
