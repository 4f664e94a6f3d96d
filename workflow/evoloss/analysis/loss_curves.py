"""Losses as curves: value and gradient over the prediction, scaled so that shapes compare."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evoloss.expressions import compile_expression, evaluate_program, parse_expression

Array = NDArray[np.float64]
ElementLoss = Callable[[Array, Array], Array]

_STEP = 1e-6
_FLAT = 1e-9
"""A mean slope below this counts as no gradient at all."""


@dataclass(frozen=True)
class Domain:
    """Where losses of one kind are drawn: labels, a range of f(x) or of the residual f(x) - y."""

    labels: tuple[float, ...]
    low: float
    high: float
    residual: bool

    def predictions(self, label: float, points: int) -> tuple[Array, Array]:
        """Return (axis values, f(x)); the axis is f(x) itself, or the residual f(x) - y."""
        # an odd offset keeps grid points off round numbers, where edges of sign or abs tend to lie
        axis = np.linspace(self.low, self.high, points) + 0.137 * (self.high - self.low) / points
        axis = axis[axis < self.high]
        return axis, axis + label if self.residual else axis


DOMAINS = {
    "classification": Domain((1.0, 0.0), 0.005, 0.995, residual=False),
    "regression": Domain((-1.0, 0.0, 1.0), -3.0, 3.0, residual=True),
}


@dataclass(frozen=True)
class Curve:
    """A loss at one label: arrays of shape ``(points,)``; ``value`` is shifted to minimum 0."""

    label: float
    axis: Array
    value: Array
    gradient: Array


def element_loss(expression: str) -> ElementLoss:
    """Return the expression as a NumPy function of (y, f(x)).

    Raises
    ------
    ExpressionError
        The text is not a loss expression.
    """
    program = compile_expression(parse_expression(expression))
    weights = [float(weight) for weight in program.weights]

    def evaluate(y: Array, f: Array) -> Array:
        with np.errstate(all="ignore"):
            return np.asarray(evaluate_program(program, y, f, weights, np), dtype=np.float64)

    return evaluate


def standard_loss(kind: str) -> tuple[str, ElementLoss]:
    """Return name and element form of the task loss: -y log f(x), or the squared error."""
    if kind == "classification":
        return "cross-entropy", lambda y, f: -y * np.log(f)
    return "squared error", lambda y, f: (f - y) ** 2


def differentiate(loss: ElementLoss, y: Array, f: Array) -> Array:
    """Return d loss / d f(x) by one-sided differences, the smaller in magnitude of the two sides.

    Away from edges both sides agree to about 1e-6 relative. At a jump (``sign``) one side sees the
    jump and the other the slope beside it, which is also what automatic differentiation reports; so
    jumps give no spike, but for a point exactly on one, which the grid of `Domain` avoids.
    """
    here, above, below = loss(y, f), loss(y, f + _STEP), loss(y, f - _STEP)
    right, left = (above - here) / _STEP, (here - below) / _STEP
    return np.where(np.abs(right) < np.abs(left), right, left)


def trace_loss(loss: ElementLoss, domain: Domain, points: int = 600) -> list[Curve] | None:
    """Return a curve per label of ``domain``, all divided by one factor; None without any slope.

    The factor makes the mean magnitude of the slope over all labels and drawn predictions 1, so a
    loss and any positive multiple of it (which act like another learning rate) give the same
    curves. What a loss adds for a label whatever the prediction has no gradient; the shift to
    minimum 0 removes it.
    """
    curves = []
    for label in domain.labels:
        axis, f = domain.predictions(label, points)
        y = np.full_like(f, label)
        value, gradient = loss(y, f), differentiate(loss, y, f)
        if not np.all(np.isfinite(value)):
            return None
        curves.append(Curve(label, axis, value - value.min(), gradient))
    slope = float(np.mean([np.mean(np.abs(curve.gradient)) for curve in curves]))
    if not np.isfinite(slope) or slope < _FLAT:
        return None
    return [Curve(c.label, c.axis, c.value / slope, c.gradient / slope) for c in curves]


def view_limits(curves: Sequence[Array], *, trim: float = 0.03) -> tuple[float, float]:
    """Return axis limits that hold the bulk of all curves: a share of ``trim`` may leave per side.

    Every curve counts by its own quantiles, so a single steep one does not flatten the rest.
    """
    bounds = [np.quantile(curve, [trim, 1.0 - trim]) for curve in curves if len(curve)]
    if not bounds:
        return -1.0, 1.0
    lows, highs = np.array(bounds).T
    low, high = float(np.min(lows)), float(np.max(highs))
    if len(bounds) > 3:
        # with many curves, the widest tenth may leave too
        low, high = float(np.quantile(lows, 0.1)), float(np.quantile(highs, 0.9))
    margin = 0.08 * (high - low) or 1.0
    return low - margin, high + margin
