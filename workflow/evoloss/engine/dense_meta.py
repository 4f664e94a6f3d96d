"""One-step meta-gradients of dense networks: exact, and by low rank, so that no stepped weight is ever formed.

With X_l the values of layer l on the inner batch at the initial parameters and R_l = -rate * dM/dZ_l, one SGD step adds
R_l^T X_{l-1} to the weights of layer l: at most the batch's rank. So on the outer batch, with values H,

    Z_l = H_{l-1} W_l^T + b_l + K R_l,   K = H_{l-1} X_{l-1}^T + 1,   and backwards   G_l W_l + (G_l R_l^T) X_{l-1},

W and b shrunk by the weight decay: the only large products left are with the shared W_l and X_{l-1}. The Jacobian of
the inner outputs by Z_l, J_l (B, C, out), is shared too: R_l is u J_l, and J g is the sum over layers of J_l . K^T G_l.
Where it is cheaper (few inputs or outputs) a layer's stepped weights are formed after all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from evoloss.engine.dense_layers import (
    activate,
    activate_backward,
    affine,
    affine_one,
    compute_jacobians,
    forward_values,
    read_layers,
)
from evoloss.engine.dense_masked import MaskedGradient, is_masked
from evoloss.engine.population_loss import PopulationLoss, TaskLoss
from evoloss.engine.products import product, stacked_product
from evoloss.engine.settings import TrainingSettings
from evoloss.engine.sparse_products import SparseRows, skipping_pays
from evoloss.engine.streams import Batch
from evoloss.engine.threads import map_on_threads
from evoloss.engine.tiles import Tiles, as_matrix, as_tiles, make_tiles
from evoloss.tasks import Task

CHUNK_BYTES = 2**21
"""The values of a chunk of candidates take about as much, or it is one candidate."""


@dataclass(frozen=True)
class SharedLayer:
    """What all candidates share of a layer.

    ``weight`` (out, in) and ``bias`` (out,) are the initial ones, ``shrink`` is what the weight decay leaves of them.
    ``inputs`` are X (B, in), ``jacobian`` is J (B, C, out). ``low_rank`` tells whether the step of a layer above
    another one is kept so, ``skips_zeros`` whether its product then leaves out those of the ReLU below. That with its
    inputs does if these are many, ``tiled_inputs`` has them again. The weight is in tiles if products of masks read it.
    ``outer`` of the first layer: inputs (V, in), or Z without the step (V, out) and K (V, B).
    """

    activation: str
    weight: Tensor | Tiles
    bias: Tensor | None
    shrink: float
    inputs: Tensor
    jacobian: Tensor
    low_rank: bool = False
    skips_zeros: bool = False
    tiled_inputs: Tiles | None = None
    outer: tuple[Tensor, ...] = ()

    def meet(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Return Z (k, V, out) at the initial parameters and K (k, V, B) for the inputs h (k, V, in)."""
        rows = h.flatten(0, 1)
        sparse = SparseRows.find(rows) if self.skips_zeros else None
        z = _multiply(rows, sparse, self.weight, self.bias)
        tiled = self.tiled_inputs
        gram = _multiply(rows, sparse if tiled else None, tiled or self.inputs)
        if self.bias is not None:
            gram += 1.0
        return z.view(*h.shape[:2], -1), gram.view(*h.shape[:2], -1)


def _multiply(
    rows: Tensor, sparse: SparseRows | None, weight: Tensor | Tiles, bias: Tensor | None = None
) -> Tensor:
    """Return rows W^T + b, by the rows without their zeros if they are given so, too."""
    if sparse:
        return sparse.multiply(weight, bias)
    return product(rows, as_matrix(weight).t(), bias)


@dataclass(frozen=True)
class DenseContext:
    """A meta-step: ``inner_outputs`` (1, B, C), the shared parts of all layers, targets.

    ``chunk`` candidates are computed together.
    """

    chunk: int
    inner_outputs: Tensor
    layers: tuple[SharedLayer, ...]
    inner_targets: Tensor
    outer_targets: Tensor
    outer_y: Tensor

    @property
    def nbytes(self) -> int:
        """See `evoloss.engine.path.Context`."""
        tensors = [self.inner_outputs, self.inner_targets, self.outer_targets, self.outer_y]
        for layer in self.layers:
            tensors += [layer.inputs, layer.jacobian, *layer.outer]
            tiled = (layer.weight, layer.tiled_inputs)
            tensors += [as_tiles(matrix).values for matrix in tiled if matrix is not None]
        return sum(tensor.nbytes for tensor in tensors)


@torch.no_grad()
def prepare_dense(
    model: nn.Module, inner: Batch, outer: Batch, settings: TrainingSettings
) -> DenseContext:
    """Return the meta-step from ``model`` over ``inner`` to ``outer``."""
    layers = read_layers(model)
    assert not isinstance(layers, str)
    params = [layer.params for layer in layers]
    kinds = [layer.activation for layer in layers]
    values = forward_values(params, kinds, inner.x.flatten(1))
    jacobians = compute_jacobians([weight for weight, *_ in params], kinds, values)
    shrink = 1.0 - settings.first_step_rate * settings.weight_decay
    chunk = _find_chunk([len(weight) for weight, *_ in params], len(inner.x), outer)
    shared = []
    for i, (weight, *bias) in enumerate(params):
        layer = SharedLayer(
            kinds[i], weight, bias[0] if bias else None, shrink, values[i], jacobians[i]
        )
        if i == 0:
            shared.append(_share_first_layer(layer, outer.x.flatten(1)))
        else:
            # the masks of several candidates are not multiplied together
            reads_masks = chunk == 1 and i == len(params) - 2
            shared.append(_share_layer(layer, kinds[i - 1], reads_masks, len(outer.x)))
    outputs = values[-1].unsqueeze(0)
    return DenseContext(chunk, outputs, tuple(shared), inner.targets, outer.targets, outer.y)


def _find_chunk(units: Sequence[int], num_inner: int, outer: Batch) -> int:
    """Return how many candidates are computed together, of layers of so many units."""
    width = sum(2 * count + num_inner for count in units)
    return max(1, CHUNK_BYTES // (len(outer.targets) * width * outer.targets.element_size()))


def _share_first_layer(layer: SharedLayer, outer_x: Tensor) -> SharedLayer:
    """Return the layer with what is shared of its outer inputs (V, in)."""
    num_outer, n_in, size = *outer_x.shape, len(layer.inputs)
    if num_outer * size >= n_in * (num_outer + size):
        return replace(layer, outer=(outer_x,))
    z, gram = (part.squeeze(0) for part in layer.meet(outer_x.unsqueeze(0)))
    return replace(layer, outer=(z * layer.shrink, gram))


def _share_layer(layer: SharedLayer, below: str, reads_masks: bool, num_outer: int) -> SharedLayer:
    """Return a layer above one with the activation ``below`` in its cheaper form for so many outer rows.

    ``reads_masks``: it is right below the output, and candidates come one by one.
    """
    (size, n_in), (_, num_outputs, n_out) = layer.inputs.shape, layer.jacobian.shape
    # multiplications, in units of the number of outer rows
    formed = n_in * n_out * (3 + 2 * size / num_outer)
    if 2 * n_in * n_out + size * (2 * n_in + 3 * n_out) >= formed:
        return layer
    layer = replace(layer, low_rank=True)
    if below != "relu" or not skipping_pays(num_outer, n_in, n_out):
        return layer
    layer = replace(layer, skips_zeros=True)
    if skipping_pays(num_outer, n_in, size):
        layer = replace(layer, tiled_inputs=make_tiles(layer.inputs))
    if reads_masks and is_masked(layer.activation, num_outputs, num_outer, n_out, n_in):
        layer = replace(layer, weight=make_tiles(as_matrix(layer.weight)))
    return layer


class _Step:
    """R = u J of one layer for k candidates, u (k, B, C): with one output R is not formed, u scales what it meets."""

    def __init__(self, jacobian: Tensor, u: Tensor) -> None:
        self.jacobian = jacobian
        self.u = u
        self.single = jacobian.shape[1] == 1
        if not self.single:
            self.rows = torch.bmm(u.transpose(0, 1), jacobian).transpose(0, 1)

    def mix(self, k: Tensor) -> Tensor:
        """Return K R, (k or 1, V, B) -> (k, V, out)."""
        if self.single:
            return stacked_product(k * self.u.mT, self.jacobian.transpose(0, 1))
        return stacked_product(k, self.rows)

    def weight_step(self, inputs: Tensor) -> Tensor:
        """Return R^T X, (B, in) -> (k, out, in)."""
        if self.single:
            return stacked_product((self.u * inputs).mT, self.jacobian.transpose(0, 1)).mT
        return stacked_product(self.rows.mT, inputs.unsqueeze(0))

    def bias_step(self) -> Tensor:
        """Return the sum of R over the batch, (k, out)."""
        if self.single:
            return torch.mm(self.u.squeeze(-1), self.jacobian.squeeze(1))
        return self.rows.sum(1)

    def contract(self, tangents: Tensor) -> Tensor:
        """Return J . T, the outputs' change (k, B, C) when Z changes by T (k, B, out)."""
        if self.single:
            return (tangents * self.jacobian.squeeze(1)).sum(-1, keepdim=True)
        return torch.bmm(self.jacobian, tangents.permute(1, 2, 0)).permute(2, 0, 1)

    def correlate(self, upstream: Tensor, k: Tensor, activation: str) -> tuple[Tensor, Tensor]:
        """Return G R^T (k, V, B) and J . K^T G (k, B, C) for G (k, V, out) and K (k or 1, V, B).

        G is 0 where a ReLU's values are.
        """
        if self.single:
            rows, jacobian = upstream.flatten(0, 1), self.jacobian.squeeze(1)
            shared = affine_one(rows, jacobian, None, activation).view(*upstream.shape[:2], -1)
            return shared * self.u.mT, (shared * k).sum(1).unsqueeze(-1)
        tangents = stacked_product(k.mT.expand(len(upstream), -1, -1), upstream)
        return stacked_product(upstream, self.rows.mT), self.contract(tangents)


def _step_through(
    layers: Sequence[SharedLayer], task: Task, context: DenseContext, u: Tensor
) -> tuple[Tensor, Tensor]:
    """Return outer losses (k,) and J g (k, B, C) for ``u`` = -rate * dM/d outputs (k, B, C)."""
    steps = [_Step(layer.jacobian, u) for layer in layers]
    values: list[Tensor] = []
    grams: list[Tensor] = []
    weights: list[Tensor] = []
    for layer, step in zip(layers, steps, strict=True):
        h = values[-1] if values else layer.outer[0].unsqueeze(0)
        if len(layer.outer) == 2:
            base, gram = layer.outer
            grams.append(gram.unsqueeze(0))
            z = step.mix(grams[-1]).add_(base)
        elif layer.low_rank:
            z, gram = layer.meet(h)
            grams.append(gram)
            z = step.mix(gram).add_(z, alpha=layer.shrink)
        else:
            grams.append(h)
            initial = as_matrix(layer.weight)
            weights.append(step.weight_step(layer.inputs).add_(initial, alpha=layer.shrink))
            bias = layer.bias
            if bias is not None:
                bias = step.bias_step().add_(bias, alpha=layer.shrink)
            z = affine(h, weights[-1], bias)
        values.append(activate(layer.activation, z))
    losses = task.compute_task_loss(values[-1], context.outer_y)
    upstream = TaskLoss(task).output_gradients(values[-1], context.outer_targets)
    direction = torch.zeros_like(u)
    masked: MaskedGradient | None = None
    for i in reversed(range(len(layers))):
        layer, step = layers[i], steps[i]
        upstream = activate_backward(layer.activation, upstream, values[i])
        if len(layer.outer) == 2 or layer.low_rank:
            residual, change = step.correlate(upstream, grams[i], layer.activation)
            direction += change
            if layer.low_rank:
                if masked:
                    upstream = masked.by_inputs(layer.weight)
                else:
                    upstream = stacked_product(upstream, as_matrix(layer.weight).unsqueeze(0))
                by_step = stacked_product(residual, layer.inputs.unsqueeze(0))
                upstream = by_step.add_(upstream, alpha=layer.shrink)
            masked = None
            continue
        gradient = stacked_product(upstream.mT, grams[i])
        tangents = stacked_product(layer.inputs.unsqueeze(0), gradient.mT)
        if layer.bias is not None:
            tangents = tangents + upstream.sum(1, keepdim=True)
        direction += step.contract(tangents)
        if i:
            weight, below = weights.pop(), layers[i - 1]
            masked = MaskedGradient.find(
                below.activation, upstream, weight, values[i - 1], below.inputs.shape[1]
            )
            upstream = stacked_product(upstream, weight)
    return losses, direction


@torch.no_grad()
def dense_meta_gradients(
    task: Task, settings: TrainingSettings, context: DenseContext, loss: PopulationLoss
) -> tuple[Tensor, NDArray[np.float64]]:
    """Return outer losses (P,) and their gradients by all instruction weights (instructions,)."""
    rate = settings.first_step_rate
    u = loss.output_gradients(context.inner_outputs, context.inner_targets) * -rate

    def work(_: None, part: Tensor) -> tuple[Tensor, Tensor]:
        return _step_through(context.layers, task, context, part)

    parts = map_on_threads(lambda: None, work, torch.split(u, context.chunk))
    values, directions = (torch.cat(list(some)) for some in zip(*parts, strict=True))
    gradient = loss.weight_gradients(context.inner_outputs, context.inner_targets, directions)
    return values, -rate * gradient
