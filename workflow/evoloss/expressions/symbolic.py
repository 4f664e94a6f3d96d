"""Loss expressions to SymPy and back.

``y`` and ``f`` are real symbols. The protected operators are opaque functions, so that SymPy's
rules for the true logarithm or root, which do not hold near 0, can never be applied to them; what
they do know (even in their argument, constants folded with the protected definition) is exact.
``aq(a, b)`` becomes ``a * quotient(b)``.

SymPy is slow to import (0.5 s), so it is imported on first use.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, reduce
from types import SimpleNamespace
from typing import Any

from evoloss.errors import ExpressionError
from evoloss.expressions.canonical import protected_log, protected_sqrt, quotient_factor
from evoloss.expressions.expression import Expression, F, Y, call, constant
from evoloss.expressions.operators import CONSTANT, LABEL, OPERATORS, PREDICTION


@cache
def sympy_namespace() -> SimpleNamespace:
    """Return what `Operator.sympy` receives: ``Abs sign tanh Min Max`` and ``aq plog psqrt``.

    Also the symbols ``y`` and ``f``, and ``quotient``, the opaque ``1 / sqrt(1 + b^2)`` that ``aq``
    is made of.
    """
    import sympy

    plog = _protected_function("plog", protected_log, {})
    psqrt = _protected_function("psqrt", protected_sqrt, {"is_positive": True})
    quotient = _protected_function("quotient", quotient_factor, {"is_positive": True})
    return SimpleNamespace(
        y=sympy.Symbol("y", real=True),
        f=sympy.Symbol("f", real=True),
        Abs=sympy.Abs,
        sign=sympy.sign,
        tanh=sympy.tanh,
        Min=sympy.Min,
        Max=sympy.Max,
        plog=plog,
        psqrt=psqrt,
        quotient=quotient,
        aq=lambda a, b: a * quotient(b),
    )


def _protected_function(
    name: str, fold: Callable[[float], float], assumptions: dict[str, bool]
) -> Any:
    """Return an opaque, real, even SymPy function of one argument that ``fold`` evaluates."""
    import sympy

    def evaluate(cls: Any, a: Any) -> Any:
        if a.is_number:
            return number_to_sympy(fold(float(a)))
        return cls(-a) if a.could_extract_minus_sign() else None

    members = {"nargs": 1, "is_real": True, "eval": classmethod(evaluate), **assumptions}
    return type(name, (sympy.Function,), members)


def number_to_sympy(value: float) -> Any:
    """Return an Integer for a whole number, else a Float of 53 bits, so that no digit is lost."""
    import sympy

    if value == int(value) and abs(value) < 2**53:
        return sympy.Integer(int(value))
    return sympy.Float(value, precision=53)


def to_sympy(expression: Expression) -> Any:
    """Return the SymPy form; SymPy's automatic evaluation applies."""
    space = sympy_namespace()
    if expression.symbol == CONSTANT:
        return number_to_sympy(expression.value)
    if expression.symbol == LABEL:
        return space.y
    if expression.symbol == PREDICTION:
        return space.f
    args = [to_sympy(arg) for arg in expression.args]
    return OPERATORS[expression.symbol].sympy(space, *args)


def from_sympy(form: Any) -> Expression:
    """Return the expression of a SymPy form.

    Raises
    ------
    ExpressionError
        If the form contains anything that is no operator of the table (a Piecewise, a division,
        ...).
    """
    space = sympy_namespace()
    if form == space.y:
        return Y
    if form == space.f:
        return F
    if form.is_Number and form.is_finite:
        return constant(float(form))
    if form.is_Add or form.is_Mul:
        name = "add" if form.is_Add else "mul"
        args = [from_sympy(arg) for arg in form.args]
        return reduce(lambda a, b: call(name, a, b), args)
    if form.is_Pow and form.exp.is_Integer and 2 <= int(form.exp) <= 64:
        return _power(from_sympy(form.base), int(form.exp))
    if form.func == space.quotient:
        return call("aq", constant(1.0), from_sympy(form.args[0]))
    for name, function in (("min", space.Min), ("max", space.Max)):
        if form.func == function:
            operator = name
            return reduce(lambda a, b: call(operator, a, b), [from_sympy(a) for a in form.args])
    unary = {
        space.Abs: "abs",
        space.sign: "sign",
        space.tanh: "tanh",
        space.plog: "log",
        space.psqrt: "sqrt",
    }
    if form.func in unary:
        return call(unary[form.func], from_sympy(form.args[0]))
    raise ExpressionError(f"SymPy form {str(form)[:100]!r} is no loss expression")


def _power(base: Expression, exponent: int) -> Expression:
    if exponent == 1:
        return base
    half = call("square", _power(base, exponent // 2))
    return call("mul", base, half) if exponent % 2 else half
