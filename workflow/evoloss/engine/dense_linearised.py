"""The tangent kernel of dense networks, layer by layer from Gram matrices; see `evoloss.engine.linearised`."""

from __future__ import annotations

import torch
from torch import nn

from evoloss.engine.dense_layers import compute_jacobians, forward_values, read_layers
from evoloss.engine.linearised import LinearisedContext
from evoloss.engine.products import product
from evoloss.engine.settings import TrainingSettings
from evoloss.engine.streams import Batch
from evoloss.errors import ConfigError

MAX_KERNEL_BYTES = 2**28


@torch.no_grad()
def linearise_dense(
    model: nn.Module, inner: Batch, outer: Batch, settings: TrainingSettings
) -> LinearisedContext:
    """Return the meta-step from ``model`` over ``inner`` to ``outer``, linear in the step.

    The weight decay is exact: the outer outputs and their Jacobian are those of the decayed parameters. A layer's part
    of the kernel is J_outer J_inner^T times the Gram matrix of its inputs (plus one for the bias).

    Raises
    ------
    ConfigError
        If the kernel, (outer rows * outputs) x (inner rows * outputs), takes more than 256 MiB.
    """
    size, rows, num_outputs = len(inner.x), len(outer.x), inner.targets.shape[1]
    if size * rows * num_outputs**2 * inner.targets.element_size() > MAX_KERNEL_BYTES:
        raise ConfigError(
            f"local_search.linearised: the kernel of {num_outputs} outputs and batches of {size} and {rows} rows takes "
            f"more than {MAX_KERNEL_BYTES >> 20} MiB; lower training.batch_size, or set linearised: false"
        )
    layers = read_layers(model)
    assert not isinstance(layers, str)
    kinds = [layer.activation for layer in layers]
    params = [layer.params for layer in layers]
    shrink = 1.0 - settings.first_step_rate * settings.weight_decay
    decayed = [[p * shrink for p in pair] for pair in params]
    inner_values = forward_values(params, kinds, inner.x.flatten(1))
    outer_values = forward_values(decayed, kinds, outer.x.flatten(1))
    inner_jacobians = compute_jacobians([weight for weight, *_ in params], kinds, inner_values)
    outer_jacobians = compute_jacobians([weight for weight, *_ in decayed], kinds, outer_values)
    kernel = inner.targets.new_zeros(rows, num_outputs, size, num_outputs)
    for i, (_, *bias) in enumerate(params):
        gram = product(outer_values[i], inner_values[i].t()) + float(len(bias))
        tangents = product(outer_jacobians[i].flatten(0, 1), inner_jacobians[i].flatten(0, 1).t())
        kernel += tangents.view_as(kernel) * gram[:, None, :, None]
    return LinearisedContext(
        inner_values[-1].unsqueeze(0),
        outer_values[-1],
        kernel.flatten(2).flatten(0, 1),
        inner.targets,
        outer.targets,
        outer.y,
    )
