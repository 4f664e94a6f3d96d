"""The Jacobian of a network's outputs by its convolutions' parameters, for every sample: local search's shared part.

All candidates of a meta-step share the initial parameters and the inner batch, so they share this Jacobian too: their
inner steps, J^T u, and tangents, J g, are then matrix products over few parameters instead of passes through the
images. It costs about as much as two passes for every output, and is worth it for about as many candidates.

A convolution's part takes two steps: the mean pooling behind it makes the upstream gradient one number for a window, so
the products of slopes and pixels are first summed over every window, and these are the same for all outputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
"""A Jacobian that takes more is not worth its memory."""


@dataclass(frozen=True)
class Jacobian:
    """``padded`` (outputs, parameters, samples and more) by the parameters of the first layers, one after the other."""

    padded: Tensor
    num_samples: int

    def pull_back(self, upstream: Tensor) -> Tensor:
        """Return the gradients (P, parameters), given those by the outputs (P, outputs, samples)."""
        gradients = upstream.new_zeros(len(upstream), self.padded.shape[1])
        for own, values in zip(upstream.unbind(1), self.padded, strict=True):
            gradients.addmm_(own, values[:, : self.num_samples].t())
        return gradients

    def push_forward(self, directions: Tensor) -> Tensor:
        """Return the outputs' derivatives (P, outputs, samples) along ``directions`` (P, parameters)."""
        moved = [directions @ values for values in self.padded]
        return torch.stack(moved, 1)[..., : self.num_samples]

    def split(self, row: Array, params: Sequence[Array]) -> list[Array]:
        """Return one of `pull_back`'s rows as gradients of the shapes of ``params``, weights and biases."""
        found, first = [], 0
        for weight, bias in _pair_biases(params):
            count = weight.size + (0 if bias is None else bias.size)
            block = row[first : first + count].reshape(len(weight), -1)
            first += count
            num_taps = weight[0].size
            found.append(block[:, :num_taps].reshape(weight.shape).copy())
            if bias is not None:
                found.append(block[:, num_taps].copy())
        return found

    @staticmethod
    def join(params: Sequence[Array]) -> Array:
        """Return weights and biases, or their gradients, as a row for `push_forward`."""
        blocks = []
        for weight, bias in _pair_biases(params):
            block = weight.reshape(len(weight), -1)
            blocks.append(block if bias is None else np.hstack([block, bias[:, None]]))
        return np.concatenate([block.ravel() for block in blocks])


class BodyPasses:
    """Inner steps and tangents of the ``params`` that a Jacobian is by, for all candidates; without one, of none.

    ``upstream`` (P, outputs, samples) are the candidates' gradients by the outputs.
    """

    def __init__(self, jacobian: Jacobian | None, params: Sequence[Array], upstream: Array) -> None:
        self._jacobian = jacobian
        self._params = params
        self.count = 0
        if jacobian is not None:
            self.count = len(params)
            self._gradients = jacobian.pull_back(torch.from_numpy(upstream)).numpy()
            self._directions = np.empty_like(self._gradients)

    def take_gradients(self, p: int) -> list[Array]:
        """Return a candidate's gradients by ``params``."""
        return self._jacobian.split(self._gradients[p], self._params) if self._jacobian else []

    def set_direction(self, p: int, direction: Sequence[Array]) -> None:
        """Take a candidate's direction in ``params``, for `add_tangents`."""
        if self._jacobian is not None:
            self._directions[p] = self._jacobian.join(direction)

    def add_tangents(self, tangents: Array) -> None:
        """Add the outputs' derivatives along the candidates' directions to (P, outputs, samples)."""
        if self._jacobian is not None:
            tangents += self._jacobian.push_forward(torch.from_numpy(self._directions)).numpy()


def _pair_biases(params: Sequence[Array]) -> list[tuple[Array, Array | None]]:
    pairs: list[tuple[Array, Array | None]] = []
    for array in params:
        if array.ndim == 1:
            pairs[-1] = (pairs[-1][0], array)
        else:
            pairs.append((array, None))
    return pairs


def is_worthwhile(params: Sequence[Array], outputs: Array, size: int) -> bool:
    """Tell whether ``size`` candidates take less time by the Jacobian than by passes of their own.

    ``params`` are those that it is by, ``outputs`` the network's, (outputs, samples).
    """
    num_bytes = outputs.nbytes * sum(p.size for p in params)
    return 0 < num_bytes <= MAX_BYTES and 3 * size >= 2 * len(outputs)


def compute_jacobian(
    network: Network,
    lend: Callable[[], Network],
    params: Sequence[Array],
    activations: Sequence[Array],
    kept: Jacobian | None = None,
) -> Jacobian:
    """Return the Jacobian at ``params``, where ``activations`` are ``network``'s.

    ``lend`` gives every thread a network like that one. The result overwrites ``kept``, one of the same network,
    because new memory is slow.
    """
    outputs = activations[-1]
    num_outputs, batch = outputs.shape

    def pull(network: Network, output: int) -> list[Array]:
        return network.pull_back_outputs(params, activations, output)

    upstreams = zip(*map_on_threads(lend, pull, range(num_outputs)), strict=True)
    if kept is None:
        lanes = find_registers()[0] // outputs.itemsize
        count = sum(p.size for p in params[: network.count_body_params()])
        kept = Jacobian(
            torch.empty(
                num_outputs, count, batch + -batch % lanes, dtype=torch.from_numpy(outputs).dtype
            ),
            batch,
        )
    values, first = kept.padded.numpy(), 0
    for upstream, (layer, x, y) in zip(upstreams, network.list_body(activations), strict=True):
        room = JacobianRoom(layer, num_outputs, outputs.dtype)
        stacked = np.stack(upstream).reshape(num_outputs, len(y), -1, batch)
        first = write_layer(values, first, stacked, layer, x, y, room)
    return kept


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
) -> int:
    """Write one layer's part of the Jacobian and return where the next one begins.

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
        out.reshape(-1), first, out.shape[1], out.shape[2], upstream,
        x.reshape(-1), y.reshape(-1), layer.kind,
        room.lanes, room.x_taps, room.slope_places, room.x_places, room.slope_starts, room.x_starts,
        room.upstream_places, room.window_places, room.window_taps,
        room.x, room.y, room.slopes, room.upstream, room.windows,
    )  # fmt: skip
    return first + len(y) * room.num_taps


@functools.cache
def _compile() -> Callable[..., None]:
    digest = digest_sources(convolution_activations, kernel_rows, lane_sums, row_vectors)

    @product_kernel
    def write_jacobian(  # type: ignore[no-untyped-def]
        out, first, num_params, samples, upstream, x, y, kind,
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
        for v in range(0, batch, lanes):
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
