"""Normal form of loss expressions without SymPy: archive key, first step to simplify.

Every sub-expression is held as ``coefficient * base``, the base named by a string (its key). Sums
and products are flattened and sorted, constants folded, and signs and factors pulled through the
operators where that is exact under protection (``log(c * a)`` is left alone: it is no sum near 0).
``aq(a, b)`` is the product ``a * q(b)`` with ``q(b) = 1 / sqrt(1 + b^2)``. Only rules that hold for
every real argument are used, and each also keeps the derivative that autograd assigns at a kink (so
``sign(a) * abs(a)`` does *not* become ``a``), except at ties of ``min`` and ``max``, where
autograd's halves depend on how the arguments are nested.

Equal keys mean equal functions, constants compared to 12 significant digits; unequal keys prove
nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from evoloss.errors import ExpressionError
from evoloss.expressions.expression import Expression, format_text
from evoloss.expressions.operators import CONSTANT, LABEL, PREDICTION, PROTECTION

Term = tuple[float, str]
"""Coefficient and key of a base."""

ONE: Term = (1.0, "1")
ZERO: Term = (0.0, "1")


def protected_log(value: float) -> float:
    """``log`` of the operator table, for one number."""
    return math.log(max(abs(value), PROTECTION))


def protected_sqrt(value: float) -> float:
    """``sqrt`` of the operator table, for one number."""
    return math.sqrt(max(abs(value), PROTECTION))


def quotient_factor(value: float) -> float:
    """``1 / sqrt(1 + value^2)``, the denominator of ``aq``."""
    return 1.0 / math.hypot(1.0, value)


_FOLD = {"log": protected_log, "sqrt": protected_sqrt, "q": quotient_factor, "tanh": math.tanh}
_OPPOSITE = {"min": "max", "max": "min"}
_LEAF_KEYS = {LABEL: "y", PREDICTION: "f"}


def format_term(coefficient: float, key: str) -> str:
    """Return the text of ``coefficient * key`` inside a longer key."""
    return key if coefficient == 1.0 else f"{coefficient:.12g}*{key}"


def _times(a: float, b: float) -> float:
    product = a * b
    if not math.isfinite(product) or (product == 0.0 and a != 0.0 and b != 0.0):
        raise OverflowError("a folded constant leaves the range of float64")
    return product


class Normaliser:
    """Turns expressions into terms; ``nodes`` tells how every key it met is made.

    ``nodes[key]`` is ``(kind, terms)``, the kind being ``mul``, ``add``, ``min``, ``max``, ``abs``,
    ``sign``, ``log``, ``sqrt``, ``tanh`` or ``q``; terms of ``mul``, ``abs`` and ``sign`` have
    coefficient 1. Leaves have no entry.

    Parameters
    ----------
    label_nonnegative : bool
        Whether ``y >= 0`` may be assumed (classification), so that ``abs(y)`` is ``y``.
    """

    def __init__(self, label_nonnegative: bool = False) -> None:
        self.label_nonnegative = label_nonnegative
        self.nodes: dict[str, tuple[str, tuple[Term, ...]]] = {}
        self._sums: dict[str, tuple[Term, ...]] = {}
        self._factors: dict[str, tuple[str, ...]] = {"1": ()}

    def visit(self, node: Expression) -> Term:
        """Return the term of ``node``.

        Raises
        ------
        OverflowError
            If a folded constant leaves the range of float64.
        ExpressionError
            For an operator without rules: guessing would call different losses the same.
        """
        symbol = node.symbol
        if symbol == CONSTANT:
            return (node.value, "1") if node.value != 0.0 else ZERO
        if not node.args:
            return 1.0, _LEAF_KEYS[symbol]
        a = self.visit(node.args[0])
        if len(node.args) == 1:
            return self.unary(symbol, a)
        b = self.visit(node.args[1])
        if symbol == "add":
            return self.sum((a, b))
        if symbol == "sub":
            return self.sum((a, (-b[0], b[1])))
        if symbol == "mul":
            return self.product((a, b))
        if symbol == "aq":
            return self.product((a, self.even("q", b)))
        if symbol in _OPPOSITE:
            return self.extremum(symbol, (a, b))
        raise ExpressionError(f"operator {symbol!r} has no rewriting rule")

    def unary(self, symbol: str, a: Term) -> Term:
        """Return the term of a one-argument operator applied to ``a``."""
        if symbol == "square":
            return self.product((a, a))
        if symbol == "abs":
            return self.absolute(a)
        if symbol == "sign":
            return self.sign(a)
        if symbol == "tanh":
            return self.tanh(a)
        if symbol in ("log", "sqrt"):
            return self.even(symbol, a)
        raise ExpressionError(f"operator {symbol!r} has no rewriting rule")

    def factors(self, key: str) -> tuple[str, ...]:
        """Return the factors of a base (itself, unless it is a product)."""
        return self._factors.get(key, (key,))

    def product(self, terms: Iterable[Term]) -> Term:
        """Return the product of terms."""
        coefficient = 1.0
        keys: list[str] = []
        for factor, key in terms:
            coefficient = _times(coefficient, factor)
            keys += self.factors(key)
        return (coefficient, self._product_key(keys)) if coefficient != 0.0 else ZERO

    def _product_key(self, keys: list[str]) -> str:
        if len(keys) > 1:
            keys = self._cancel(keys)
        if len(keys) < 2:
            return keys[0] if keys else "1"
        keys.sort()
        key = f"mul({','.join(keys)})"
        if key not in self.nodes:
            self.nodes[key] = ("mul", tuple([(1.0, part) for part in keys]))
            self._factors[key] = tuple(keys)
        return key

    def _cancel(self, keys: list[str]) -> list[str]:
        """Use ``|a| |a| = a a``, ``sign(a) a = |a|`` and ``sign(a)^3 = sign(a)``."""
        for key in {key for key in keys if key.startswith(("abs(", "sign("))}:
            inner = self.nodes[key][1][0][1]
            while key.startswith("abs(") and keys.count(key) > 1:
                keys.remove(key)
                keys.remove(key)
                keys += (inner, inner)
            while key.startswith("sign(") and keys.count(key) > 2:
                keys.remove(key)
                keys.remove(key)
            while key.startswith("sign(") and key in keys and inner in keys:
                keys.remove(key)
                keys.remove(inner)
                keys.append(self._atom("abs", inner))
                return self._cancel(keys)
        return keys

    def sum(self, terms: Iterable[Term]) -> Term:
        """Return the sum of terms."""
        total: dict[str, float] = {}
        for coefficient, key in terms:
            parts = self._sums.get(key)
            if parts is None:
                total[key] = total.get(key, 0.0) + coefficient
            else:
                for inner, inner_key in parts:
                    share = _times(coefficient, inner)
                    total[inner_key] = total.get(inner_key, 0.0) + share
        kept = sorted([(key, value) for key, value in total.items() if value != 0.0])
        if len(kept) < 2:
            return (kept[0][1], kept[0][0]) if kept else ZERO
        lead = total.get("f") or (kept[1][1] if kept[0][0] == "1" else kept[0][1])
        if not all(math.isfinite(value / lead) for _, value in kept):
            raise OverflowError("a folded constant leaves the range of float64")
        parts = tuple([(value / lead, key) for key, value in kept])
        key = f"add({','.join([format_term(*part) for part in parts])})"
        if key not in self._sums:
            self._sums[key] = parts
            self.nodes[key] = ("add", parts)
        return lead, key

    def _atom(self, kind: str, inner: str) -> str:
        key = f"{kind}({inner})"
        self.nodes[key] = (kind, ((1.0, inner),))
        return key

    def is_nonnegative(self, key: str) -> bool:
        """Tell whether a base is surely >= 0, and its derivative 0 wherever it is 0."""
        if key.startswith(("abs(", "sqrt(", "q(")) or key == "1":
            return True
        if key == "y":
            return self.label_nonnegative
        if key in self._sums:
            return all(value > 0.0 and self.is_nonnegative(part) for value, part in self._sums[key])
        factors = self._factors.get(key)
        return factors is not None and all(
            factors.count(part) % 2 == 0 or self.is_nonnegative(part) for part in set(factors)
        )

    def absolute(self, a: Term) -> Term:
        """Return ``|a|``: factor by factor."""
        keys: list[str] = []
        factors = self.factors(a[1])
        for key in dict.fromkeys(factors):
            count = factors.count(key)
            if key.startswith("sign("):
                keys += [key, key]
                continue
            keys += [key] * (count - count % 2)
            if count % 2:
                keys.append(key if self.is_nonnegative(key) else self._atom("abs", key))
        return abs(a[0]), self._product_key(keys)

    def sign(self, a: Term) -> Term:
        """Return ``sign(a)``: factor by factor."""
        if a[0] == 0.0:
            return ZERO
        keys: list[str] = []
        for key in self.factors(a[1]):
            if key.startswith(("sqrt(", "q(")):
                continue
            if key.startswith("sign("):
                keys.append(key)
            elif key.startswith(("abs(", "tanh(")):
                inner = self.factors(self.sign(self.nodes[key][1][0])[1])
                keys += inner * (2 if key.startswith("abs(") else 1)
            else:
                keys.append(self._atom("sign", key))
        return math.copysign(1.0, a[0]), self._product_key(keys)

    def tanh(self, a: Term) -> Term:
        """Return ``tanh(a)``, an odd function."""
        if a[1] == "1":
            return (math.tanh(a[0]), "1") if a[0] != 0.0 else ZERO
        return math.copysign(1.0, a[0]), self._function("tanh", (abs(a[0]), a[1]))

    def even(self, kind: str, a: Term) -> Term:
        """Return ``log``, ``sqrt`` or ``q`` of ``a``: even, so signs and ``abs`` inside vanish."""
        if a[1] == "1":
            value = _FOLD[kind](a[0])
            return (value, "1") if value != 0.0 else ZERO
        keys = [
            self.nodes[key][1][0][1] if key.startswith("abs(") else key
            for key in self.factors(a[1])
        ]
        return 1.0, self._function(kind, (abs(a[0]), self._product_key(keys)))

    def _function(self, kind: str, a: Term) -> str:
        key = f"{kind}({format_term(*a)})"
        self.nodes[key] = (kind, (a,))
        return key

    def extremum(self, kind: str, terms: Iterable[Term]) -> Term:
        """Return ``min`` or ``max`` of terms; ``min(-a, -b)`` is ``-max(a, b)``."""
        flat: dict[str, Term] = {}
        constants: list[float] = []
        for coefficient, key in terms:
            wanted = kind if coefficient > 0.0 else _OPPOSITE[kind]
            name, parts = self.nodes.get(key, ("", ()))
            for inner, inner_key in parts if name == wanted else ((1.0, key),):
                value = _times(coefficient, inner)
                if inner_key == "1":
                    constants.append(value)
                else:
                    flat[format_term(value, inner_key)] = (value, inner_key)
        if constants:
            bound = min(constants) if kind == "min" else max(constants)
            flat["1"] = (bound, "1")
        if len(flat) == 1:
            return next(iter(flat.values()))
        ordered = sorted(flat.values(), key=lambda part: (part[1] == "1", part[1], -part[0]))
        lead = ordered[0][0]
        name = kind if lead > 0.0 else _OPPOSITE[kind]
        parts = tuple([(value / lead, key) for value, key in ordered])
        if not all(math.isfinite(value) for value, _ in parts):
            raise OverflowError("a folded constant leaves the range of float64")
        key = f"{name}({','.join([format_term(*part) for part in parts])})"
        self.nodes[key] = (name, parts)
        return lead, key


def canonical_key(expression: Expression) -> str:
    """Return a string that only equal functions of (y, f(x)) share; cheap (tens of microseconds).

    Returns
    -------
    str
        E.g. ``-1*add(f,-1*y)`` for both ``sub(y, f(x))`` and ``add(y, mul(-1, f(x)))``. An
        expression whose folded constants overflow float64 gets its own text as the key.
    """
    try:
        coefficient, key = Normaliser().visit(expression)
    except OverflowError:
        return format_text(expression)
    return format_term(coefficient, key)
