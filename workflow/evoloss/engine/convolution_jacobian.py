"""The Jacobian of a network's outputs by its convolutions' parameters, for every sample: local search's shared part.

All candidates of a meta-step share the initial parameters and the inner batch, so they share this Jacobian too: their
inner steps, J^T u, and tangents, J g, are then matrix products over few parameters instead of passes through the
images. It costs about as much as two passes for every output.

A convolution's part takes two steps: the mean pooling behind it makes the upstream gradient one number for a window, so
the products of slopes and pixels are first summed over every window, and these are the same for all outputs.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evoloss.engine import (
    convolution_activations,
    kernel_rows,
    lane_sums,
    row_vectors,
)
from evoloss.engine.convolution_activations import slope_row
from evoloss.engine.convolution_layers import Array, PooledConvolution
from evoloss.engine.convolution_network import Network
from evoloss.engine.kernel_rows import digest_sources
from evoloss.engine.lane_sums import pack_lanes, write_lane_sums
from evoloss.engine.row_vectors import find_registers, product_kernel
from evoloss.engine.threads import map_on_threads

MAX_BYTES = 2**26
"""A Jacobian that takes more, with what it is made from, is not worth its memory."""


def find_body(network: Network, outputs: Array, size: int) -> list[PooledConvolution]:
    """Return the layers by whose Jacobian ``size`` candidates take less time than by passes of their own, if any.

    ``outputs`` are the network's, (outputs, samples).
    """
    num_outputs, batch = outputs.shape
    params = sum(layer.num_params for layer in network.body)
    pooled = sum(math.prod(layer.shape) for layer in network.body)
    num_bytes = (params + pooled) * num_outputs * _pad(batch, outputs.dtype) * outputs.itemsize
    # measured with ten outputs on an AMD EPYC: it costs what six or seven candidates' passes do
    return network.body if 3 * size >= 2 * num_outputs and num_bytes <= MAX_BYTES else []


def _pad(batch: int, dtype: np.dtype[Any]) -> int:
    """Return the number of samples in whole vectors."""
    return batch + -batch % (find_registers()[0] // dtype.itemsize)


class Jacobian:
    """Of networks' outputs by the parameters of ``layers``, one after the other; ``num_arrays`` are the parameters'.

    ``outputs`` are as many as the networks', (outputs, samples). Every `update` overwrites the one before, as new
    memory is slow. Without layers all that it returns is empty or zero.
    """

    def __init__(self, layers: Sequence[PooledConvolution], outputs: Array) -> None:
        num_outputs, self._batch = outputs.shape
        self._layers = layers
        self._dtype = outputs.dtype
        self.num_arrays = sum(1 + layer.has_bias for layer in layers)
        count = sum(layer.num_params for layer in layers)
        values = np.empty((num_outputs, count, _pad(self._batch, self._dtype)), self._dtype)
        self._values = torch.from_numpy(values)
        self._upstreams = [
            np.empty((num_outputs, layer.shape[0], math.prod(layer.shape[1:]), self._batch), self._dtype)
            for layer in layers
        ]  # fmt: skip
        self._rooms: list[list[JacobianRoom]] = [[] for _ in layers]

    def update(
        self,
        network: Network,
        lend: Callable[[], Network],
        params: Sequence[Array],
        activations: Sequence[Array],
    ) -> None:
        """Compute it at ``params`` for ``activations`` of such a ``network``; ``lend`` gives every thread its own."""

        def pull(network: Network, output: int) -> None:
            network.pull_back_output(params, activations, output, self._upstreams)

        map_on_threads(lend, pull, range(len(self._values)))
        first = 0
        walk = network.list_body(activations)
        for upstream, rooms, (layer, x, y) in zip(self._upstreams, self._rooms, walk, strict=True):
            self._write(first, upstream, rooms, layer, x, y)
            first += layer.num_params

    def _write(
        self,
        first: int,
        upstream: Array,
        rooms: list[JacobianRoom],
        layer: PooledConvolution,
        x: Array,
        y: Array,
    ) -> None:
        """Write one layer's part, its parameters from ``first`` on; threads share the samples, by whole vectors."""
        count = torch.get_num_threads()
        while len(rooms) < count:
            rooms.append(JacobianRoom(layer, len(upstream), self._dtype))
        lanes = rooms[0].lanes
        edges = [self._values.shape[2] // lanes * i // count * lanes for i in range(count + 1)]
        shares = list(itertools.pairwise(edges))

        def work(room: JacobianRoom, share: tuple[int, int]) -> None:
            write_layer(self._values.numpy(), first, upstream, layer, x, y, room, share)

        map_on_threads(list(rooms).pop, work, shares)

    def pull_back(self, upstream: Tensor) -> Tensor:
        """Return the gradients (P, parameters), given those by the outputs (P, outputs, samples)."""
        gradients = upstream.new_zeros(len(upstream), self._values.shape[1])
        for own, values in zip(upstream.unbind(1), self._values, strict=True):
            gradients.addmm_(own, values[:, : self._batch].t())
        return gradients

    def push_forward(self, directions: Tensor) -> Tensor:
        """Return the outputs' derivatives (P, outputs, samples) along ``directions`` (P, parameters)."""
        moved = [directions @ values for values in self._values]
        return torch.stack(moved, 1)[..., : self._batch]

    def split(self, row: Array, params: Sequence[Array]) -> list[Array]:
        """Return one of `pull_back`'s rows as gradients by the layers' weights and biases, shaped like ``params``."""
        found: list[Array] = []
        left, first = list(params), 0
        for layer in self._layers:
            block = row[first : first + layer.num_params].reshape(layer.shape[0], -1)
            first += layer.num_params
            weight = left.pop(0)
            found.append(block[:, : weight[0].size].reshape(weight.shape).copy())
            if layer.has_bias:
                left.pop(0)
                found.append(block[:, -1].copy())
        return found

    def join(self, params: Sequence[Array]) -> Array:
        """Return weights and biases, or their gradients, as a row for `push_forward`."""
        left = list(params)
        row = np.empty(self._values.shape[1], self._dtype)
        first = 0
        for layer in self._layers:
            block = row[first : first + layer.num_params].reshape(layer.shape[0], -1)
            first += layer.num_params
            weight = left.pop(0)
            block[:, : weight[0].size] = weight.reshape(len(weight), -1)
            if layer.has_bias:
                block[:, -1] = left.pop(0)
        return row


class JacobianRoom:
    """Work space of `write_jacobian` for one layer, and where its pixels and windows lie; for one thread."""

    def __init__(self, layer: PooledConvolution, num_outputs: int, dtype: np.dtype[Any]) -> None:
        self.lanes = lanes = find_registers()[0] // dtype.itemsize
        g = layer.geometry
        self.num_taps = len(g.taps) + layer.has_bias
        # behind the channels there is an image of ones, which a bias weighs
        ones = [g.channels * g.pixels] if layer.has_bias else []
        self.x_taps = np.array([*g.taps, *ones], np.int64) * lanes
        window_rows, window_columns, _ = layer.window
        y, x = np.arange(window_rows)[:, None], np.arange(window_columns)
        self.slope_places = (y * g.out_width + x).ravel() * lanes
        self.x_places = (y * g.row_step + x).ravel() * lanes
        rows, columns = layer.shape[1:]
        i, j = np.arange(rows)[:, None] * window_rows, np.arange(columns) * window_columns
        self.slope_starts = (i * g.out_width + j).ravel() * lanes
        self.x_starts = (i * g.row_step + j).ravel() * lanes
        windows = np.arange(rows * columns)
        self.upstream_places = windows * lanes
        self.window_places = windows * self.num_taps * lanes
        self.window_taps = np.arange(self.num_taps) * lanes
        self.x = np.ones((g.channels + 1) * g.pixels * lanes, dtype)
        self.y = np.empty(g.out_height * g.out_width * lanes, dtype)
        self.slopes = np.empty_like(self.y)
        self.upstream = np.empty(num_outputs * len(windows) * lanes, dtype)
        self.windows = np.empty(len(windows) * self.num_taps * lanes, dtype)


def write_layer(
    out: Array,
    first: int,
    upstream: Array,
    layer: PooledConvolution,
    x: Array,
    y: Array,
    room: JacobianRoom,
    samples: tuple[int, int],
) -> None:
    """Write one layer's part of the Jacobian, for the samples from the first to the end: whole vectors.

    Parameters
    ----------
    out : (outputs, parameters, samples), samples in whole vectors
    first : int
        The layer's first parameter. Every output channel's bias follows its weights.
    upstream : (outputs, channels, windows, samples)
        The outputs' gradients by the pooling's output.
    x, y
        The layer's input, and its activation's output.
    """
    _compile()(
        out.reshape(-1), first, out.shape[1], out.shape[2], upstream, *samples,
        x.reshape(-1), y.reshape(-1), layer.kind,
        room.lanes, room.x_taps, room.slope_places, room.x_places, room.slope_starts, room.x_starts,
        room.upstream_places, room.window_places, room.window_taps,
        room.x, room.y, room.slopes, room.upstream, room.windows,
    )  # fmt: skip


@functools.cache
def _compile() -> Callable[..., None]:
    digest = digest_sources(convolution_activations, kernel_rows, lane_sums, row_vectors)

    @product_kernel
    def write_jacobian(  # type: ignore[no-untyped-def]
        out, first, num_params, samples, upstream, first_sample, end_sample, x, y, kind,
        lanes, x_taps, slope_places, x_places, slope_starts, x_starts,
        upstream_places, window_places, window_taps,
        lane_x, lane_y, slopes, lane_upstream, windows,
    ):  # fmt: skip
        """Do what `write_layer` says, one vector of samples after the other."""
        _ = digest
        outputs, channels, num_windows, batch = upstream.shape
        num_taps = x_taps.size
        num_pixels, num_slopes = x.size // batch, slopes.size // lanes
        factor, one = y.dtype.type(1.0 / slope_places.size), y.dtype.type(1)
        for v in range(first_sample, min(end_sample, batch), lanes):
            rest = batch - v
            pack_lanes(lane_x, 0, x, v, batch, num_pixels, rest)
            for m in range(channels):
                pack_lanes(lane_y, 0, y, m * num_slopes * batch + v, batch, num_slopes, rest)
                for e in range(slopes.size):
                    slopes[e] = one
                slope_row(slopes, lane_y, kind, factor)
                for w in range(num_windows):
                    write_lane_sums(
                        windows, w * num_taps * lanes, 0, lanes,
                        slopes, slope_starts[w], 0, slope_places, 1,
                        lane_x, x_starts[w], x_taps, x_places,
                    )  # fmt: skip
                for o in range(outputs):
                    place, own = o * num_windows * lanes, upstream[o, m].reshape(-1)
                    pack_lanes(lane_upstream, place, own, v, batch, num_windows, rest)
                write_lane_sums(
                    out, (first + m * num_taps) * samples + v, num_params * samples, samples,
                    lane_upstream, 0, num_windows * lanes, upstream_places, outputs,
                    windows, 0, window_taps, window_places,
                )  # fmt: skip

    return write_jacobian
