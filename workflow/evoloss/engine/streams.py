"""Common random numbers: the batches of step s are the same for every candidate that draws from one stream.

They lower the variance between candidates, and let the engine share all that depends on data and initial weights alone.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from evoloss.seeding import numpy_generator


class Batch(NamedTuple):
    """Samples of one split: inputs, labels as stored, and labels encoded as float (B, outputs)."""

    x: Tensor
    y: Tensor
    targets: Tensor


def draw_batches(num_rows: int, batch_size: int, num_steps: int, *stream: int | str) -> Tensor:
    """Return row numbers of ``num_steps`` batches, int64 of shape ``(num_steps, min(batch_size, num_rows))``.

    Each epoch is a fresh permutation; a batch that does not fit into an epoch is left out, so batches have one size.
    ``stream`` names the random stream (`evoloss.seeding.numpy_generator`).
    """
    generator = numpy_generator(*stream)
    size = min(batch_size, num_rows)
    per_epoch = num_rows // size
    epochs = [
        generator.permutation(num_rows)[: per_epoch * size].reshape(per_epoch, size)
        for _ in range(math.ceil(num_steps / per_epoch))
    ]
    rows = torch.cat([torch.from_numpy(epoch) for epoch in epochs]) if epochs else torch.empty(0)
    return rows[:num_steps]
