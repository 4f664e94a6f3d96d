"""The ONE operator table: every other form of an operator (text, torch, SymPy, LaTeX, kernel) starts here.

Primitives of Raymond et al. (TPAMI 2023, arXiv 2209.08907), in their protected forms. All are total: for arguments
in [-1e6, 1e6] value and gradient are finite, and a finite argument never gives NaN.

``evaluate`` receives an array namespace (``torch`` or ``numpy``) and the arguments, ``sympy`` a namespace with SymPy's
functions and the opaque protected ones (`evoloss.expressions.symbolic`). The hand-written first and second derivatives
stand in `evoloss.engine.kernels`; a conformance test compares all forms of every operator.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

PROTECTION = 1e-7
"""Smallest magnitude that ``log`` and ``sqrt`` see; below it they are constant."""

LABEL = "y"
PREDICTION = "f(x)"
CONSTANT = "constant"


@dataclass(frozen=True)
class Operator:
    """One primitive: its name, arity and forms.

    ``latex`` and ``infix`` are ``str.format`` templates of the already formatted arguments; ``precedence`` tells when
    an argument needs brackets (1 sum, 2 product, 4 atom).
    """

    name: str
    arity: int
    evaluate: Callable[..., Any]
    sympy: Callable[..., Any]
    latex: str
    infix: str
    precedence: int = 4
    commutative: bool = False


def _log(xp: Any, a: Any) -> Any:
    return xp.log(xp.clip(xp.abs(a), PROTECTION, None))


def _sqrt(xp: Any, a: Any) -> Any:
    return xp.sqrt(xp.clip(xp.abs(a), PROTECTION, None))


def _aq(xp: Any, a: Any, b: Any) -> Any:
    return a / xp.sqrt(1.0 + b * b)


_TABLE = (
    Operator(
        "add", 2, lambda xp, a, b: a + b, lambda sp, a, b: a + b, "{0} + {1}", "{0} + {1}", 1, True
    ),
    Operator("sub", 2, lambda xp, a, b: a - b, lambda sp, a, b: a - b, "{0} - {1}", "{0} - {1}", 1),
    Operator(
        "mul", 2, lambda xp, a, b: a * b, lambda sp, a, b: a * b, r"{0} \, {1}", "{0}·{1}", 2, True
    ),
    Operator(
        "aq",
        2,
        _aq,
        lambda sp, a, b: sp.aq(a, b),
        r"\frac{{{0}}}{{\sqrt{{1 + \left({1}\right)^2}}}}",
        "aq({0}, {1})",
    ),
    Operator(
        "min",
        2,
        lambda xp, a, b: xp.minimum(a, b),
        lambda sp, a, b: sp.Min(a, b),
        r"\min\left({0}, {1}\right)",
        "min({0}, {1})",
        commutative=True,
    ),
    Operator(
        "max",
        2,
        lambda xp, a, b: xp.maximum(a, b),
        lambda sp, a, b: sp.Max(a, b),
        r"\max\left({0}, {1}\right)",
        "max({0}, {1})",
        commutative=True,
    ),
    Operator(
        "sign",
        1,
        lambda xp, a: xp.sign(a),
        lambda sp, a: sp.sign(a),
        r"\operatorname{{sign}}\left({0}\right)",
        "sign({0})",
    ),
    Operator(
        "square",
        1,
        lambda xp, a: a * a,
        lambda sp, a: a**2,
        r"\left({0}\right)^2",
        "({0})²",
    ),
    Operator(
        "abs", 1, lambda xp, a: xp.abs(a), lambda sp, a: sp.Abs(a), r"\left|{0}\right|", "|{0}|"
    ),
    Operator(
        "log",
        1,
        _log,
        lambda sp, a: sp.plog(a),
        r"\log\left|{0}\right|",
        "log|{0}|",
    ),
    Operator(
        "sqrt",
        1,
        _sqrt,
        lambda sp, a: sp.psqrt(a),
        r"\sqrt{{\left|{0}\right|}}",
        "sqrt|{0}|",
    ),
    Operator(
        "tanh",
        1,
        lambda xp, a: xp.tanh(a),
        lambda sp, a: sp.tanh(a),
        r"\tanh\left({0}\right)",
        "tanh({0})",
    ),
)

OPERATORS: dict[str, Operator] = {operator.name: operator for operator in _TABLE}
"""Operators by name. The position in this dict is the opcode of the kernels."""

OPCODES: dict[str, int] = {name: code for code, name in enumerate(OPERATORS)}
"""Opcode of every operator; the terminals follow: `LABEL_CODE`, `PREDICTION_CODE`, `ONE_CODE`."""

LABEL_CODE = len(OPERATORS)
PREDICTION_CODE = LABEL_CODE + 1
ONE_CODE = LABEL_CODE + 2
