"""Numerical proof that a simplified loss is the original: same gradient, value up to a constant.

Both are evaluated in float64 by the same code that training uses (torch, autograd) on a dense grid
of the domain and on both sides of every edge of the original and the simplified formula: the places
where the argument of ``abs`` or ``sign`` changes sign, where ``min`` or ``max`` change sides, and
where ``log`` and ``sqrt`` reach their protection at +-1e-7.

Within rounding error of such an edge (`EDGE_ROUNDING` times the largest number met on the way to
the argument) two correct formulas may land on different sides, so those points are left out;
arguments that are zero for all f near the point are no edges, and are checked. Points where the
original itself is not finite are left out too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evoloss.errors import ExpressionError, describe_choices
from evoloss.expressions.expression import Expression, call, constant
from evoloss.expressions.operators import (
    LABEL_CODE,
    ONE_CODE,
    OPERATORS,
    PREDICTION,
    PREDICTION_CODE,
    PROTECTION,
)
from evoloss.expressions.program import (
    compile_expression,
    evaluate_program,
    program_instructions,
)

DOMAINS = ("classification", "regression")
EDGE_ROUNDING = 1e-13
TINY = 1e-6
"""Gradients (and values) smaller than this share of the typical one are compared absolutely."""

Array = NDArray[np.float64]
_EDGE_OPERATORS = ("abs", "sign", "log", "sqrt", "min", "max")
_OFFSETS = np.array([1e-9, 1e-8, 5e-8, 2e-7, 1e-6, 1e-4])
_SMALL = np.array([1e-8, 1e-7, 1e-6, 1e-3])
_BISECTIONS = 48


@dataclass(frozen=True)
class Report:
    """What `verify_equivalence` found.

    Attributes
    ----------
    verified : bool
    reason : str or None
        Why not, in words; ``no gradient`` if the original has none anywhere.
    max_relative_gradient_error, max_value_error : float
        Largest errors relative to the original (inf if the simplified one is not finite where the
        original is).
    num_points : int
        Points compared.
    """

    verified: bool
    reason: str | None
    max_relative_gradient_error: float
    max_value_error: float
    num_points: int


def domain_grid(domain: str) -> tuple[Array, Array]:
    """Return (labels, predictions): y in {0, 1}, f in [0, 1]; regression: mostly in [-5, 5].

    Raises
    ------
    ExpressionError
        For an unknown domain.
    """
    if domain not in DOMAINS:
        raise ExpressionError(f"unknown domain {describe_choices(domain, DOMAINS)}")
    if domain == "classification":
        ends = np.concatenate([_SMALL, 1.0 - _SMALL])
        return np.array([0.0, 1.0]), np.unique(np.concatenate([np.linspace(0, 1, 1001), ends]))
    small = np.concatenate([-_SMALL, [0.0], _SMALL])
    large = np.array([-1e3, -1e2, -20.0, 20.0, 1e2, 1e3])
    labels = np.concatenate([np.linspace(-5, 5, 21), [-1e-7, 1e-7, 0.123], large])
    # multiples of y reach the residual's zero exactly, as do the points near them
    around = (labels[:, None] + small[None, :]).ravel()
    return np.unique(labels), np.unique(np.concatenate([np.linspace(-5, 5, 201), large, around]))


def verify_equivalence(
    original: Expression,
    simplified: Expression,
    scale: float,
    domain: str,
    tolerance: float = 1e-6,
) -> Report:
    """Compare ``scale * simplified`` with ``original`` on the domain.

    Parameters
    ----------
    domain : {"classification", "regression"}
    tolerance : float
        Largest accepted relative error of the gradient d/df, and of the value up to one constant.
    """
    return Verifier(original, domain, tolerance).check(simplified, scale)


class Verifier:
    """Checks several simplified forms of one original, whose part of the work is done once."""

    def __init__(self, original: Expression, domain: str, tolerance: float = 1e-6) -> None:
        self.original = original
        self.labels, self.predictions = domain_grid(domain)
        self.tolerance = tolerance
        y, f = (side.ravel() for side in np.meshgrid(self.labels, self.predictions, indexing="ij"))
        self._grid = _Points(original, 1.0, y, f)
        self._edges = self._edge_points(original)

    @property
    def problem(self) -> str | None:
        """Why nothing can be proven: ``no gradient``, or not finite; None if all is well."""
        if self._grid.usable.mean() < 0.5:
            return "not finite on half of the domain"
        parts = (self._grid, self._edges)
        moves = any(bool(np.any(part.gradient[part.usable] != 0.0)) for part in parts)
        return None if moves else "no gradient"

    def check(self, simplified: Expression, scale: float) -> Report:
        """Compare one simplified form with the original."""
        own = self._edge_points(simplified)
        parts = (self._grid, self._edges, own)
        if self.problem is not None:
            return Report(False, self.problem, float("inf"), float("inf"), 0)
        usable = np.concatenate([part.usable for part in parts])
        gradient = np.concatenate([part.gradient for part in parts])[usable]
        value = np.concatenate([part.value for part in parts])[usable]
        y = np.concatenate([part.y for part in parts])
        f = np.concatenate([part.f for part in parts])
        other = _Points(simplified, scale, y, f, edges=False)
        gradient_error = _relative_error(gradient, other.gradient[usable], gradient)
        with np.errstate(all="ignore"):
            shift = value - other.value[usable]
            middle = float(np.median(shift))
            value_error = _relative_error(shift, np.full_like(shift, middle), value, abs(middle))
        reason = None
        if not gradient_error <= self.tolerance:
            reason = f"its gradient differs by {gradient_error:.1e} relative"
        elif not value_error <= self.tolerance:
            reason = f"its value differs by {value_error:.1e} relative, beyond a constant"
        return Report(reason is None, reason, gradient_error, value_error, int(usable.sum()))

    def _edge_points(self, expression: Expression) -> _Points:
        """Return points on both sides of every edge of ``expression``, for the original."""
        spans = self.predictions
        found: list[tuple[Array, Array]] = []
        for argument in edge_arguments(expression):
            ys, roots = _find_roots(argument, self.labels, spans)
            step = _OFFSETS[None, :] * np.maximum(1.0, np.abs(roots))[:, None]
            points = np.concatenate([roots[:, None] - step, roots[:, None] + step], axis=1)
            inside = (points >= spans[0]) & (points <= spans[-1])
            found.append((np.broadcast_to(ys[:, None], points.shape)[inside], points[inside]))
        y = np.concatenate([part[0] for part in found]) if found else np.empty(0)
        f = np.concatenate([part[1] for part in found]) if found else np.empty(0)
        return _Points(self.original, 1.0, y, f)


class _Points:
    """Value and gradient of ``scale * expression``; ``usable``: finite and not at an edge."""

    def __init__(
        self, expression: Expression, scale: float, y: Array, f: Array, edges: bool = True
    ) -> None:
        self.y, self.f = y, f
        value, gradient = evaluate_with_gradient(expression, y, f)
        with np.errstate(all="ignore"):
            self.value, self.gradient = scale * value, scale * gradient
        self.usable = np.isfinite(self.value) & np.isfinite(self.gradient)
        if edges and len(y):
            for argument in edge_arguments(expression):
                self.usable &= ~_at_edge(argument, y, f)


def evaluate_with_gradient(expression: Expression, y: Array, f: Array) -> tuple[Array, Array]:
    """Return value and d/df in float64 by torch's autograd; arrays of shape ``(points,)``."""
    import torch

    program = compile_expression(expression)
    label = torch.from_numpy(np.ascontiguousarray(y))
    prediction = torch.from_numpy(np.array(f)).requires_grad_()
    value = evaluate_program(program, label, prediction, program.weights.tolist(), torch)
    if not value.requires_grad:
        return value.numpy(), np.zeros_like(f)
    (gradient,) = torch.autograd.grad(value.sum(), prediction)
    return value.detach().numpy(), gradient.numpy()


def _relative_error(expected: Array, actual: Array, size: Array, floor: float = 0.0) -> float:
    """Return max |actual - expected| / max(|size|, floor, TINY * typical size); inf for NaN."""
    if not len(expected):
        return 0.0
    sizes = np.abs(size)
    typical = float(np.median(sizes[sizes > 0.0])) if np.any(sizes > 0.0) else 1.0
    with np.errstate(all="ignore"):
        error = np.abs(actual - expected) / np.maximum(sizes, max(floor, TINY * typical))
    worst = float(np.max(error))
    return worst if np.isfinite(worst) else float("inf")


def edge_arguments(expression: Expression) -> list[Expression]:
    """Return every sub-expression at whose zero in f an operator of ``expression`` has an edge."""
    found: dict[Expression, None] = {}
    for node in dict.fromkeys(expression.walk()):
        if node.symbol not in _EDGE_OPERATORS or not node.contains(PREDICTION):
            continue
        if node.symbol in ("min", "max"):
            found[call("sub", *node.args)] = None
        elif node.symbol in ("log", "sqrt"):
            for edge in (PROTECTION, -PROTECTION):
                found[call("sub", node.args[0], constant(edge))] = None
        else:
            found[node.args[0]] = None
    return list(found)


def _evaluate(expression: Expression, y: Array, f: Array) -> Array:
    program = compile_expression(expression)
    with np.errstate(all="ignore"):
        value: Any = evaluate_program(program, y, f, program.weights.tolist(), np)
    return np.asarray(value, dtype=np.float64)


def _find_roots(argument: Expression, labels: Array, predictions: Array) -> tuple[Array, Array]:
    """Return (y, f) where ``argument`` changes sign along f, by bisection."""
    y = np.repeat(labels, len(predictions))
    f = np.tile(predictions, len(labels))
    signs = np.sign(_evaluate(argument, y, f)).reshape(len(labels), -1)
    row, column = np.nonzero(signs[:, :-1] != signs[:, 1:])
    ys, low, high = labels[row], predictions[column].copy(), predictions[column + 1].copy()
    left = signs[row, column]
    for _ in range(_BISECTIONS if len(ys) else 0):
        middle = 0.5 * (low + high)
        same = np.sign(_evaluate(argument, ys, middle)) == left
        low, high = np.where(same, middle, low), np.where(same, high, middle)
    return ys, high


def _at_edge(argument: Expression, y: Array, f: Array) -> NDArray[np.bool_]:
    """Tell where ``argument`` is zero within rounding, unless it is zero for every f around."""
    program = compile_expression(argument)
    operators = tuple(OPERATORS.values())
    leaves = {LABEL_CODE: y, PREDICTION_CODE: f, ONE_CODE: np.ones_like(f)}
    size = np.maximum(1.0, np.maximum(np.abs(y), np.abs(f)))
    values: list[Any] = []
    with np.errstate(all="ignore"):
        for (op, a, b), weight in zip(
            program_instructions(program), program.weights.tolist(), strict=True
        ):
            if op < len(operators):
                args = [values[place] for place in (a, b)[: operators[op].arity]]
                value = operators[op].evaluate(np, *args)
            else:
                value = leaves[op]
            values.append(weight * value)
            size = np.fmax(size, np.abs(values[-1]))
        near: NDArray[np.bool_] = np.abs(values[-1]) <= EDGE_ROUNDING * size
        if not near.any():
            return near
        step = 1e-9 * np.maximum(1.0, np.abs(f[near]))
        flat = np.ones(len(step), dtype=bool)
        for moved in (f[near] - step, f[near] + step):
            flat &= np.abs(_evaluate(argument, y[near], moved)) <= EDGE_ROUNDING * size[near]
    result: NDArray[np.bool_] = near.copy()
    result[near] = ~flat
    return result
