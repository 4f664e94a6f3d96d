"""Simplification of learned losses: the smallest of several forms that is proven equivalent.

A loss matters through its gradient, so an additive constant is dropped and the overall positive
scale, which acts as a learning rate, is pulled out as one factor. The normal form
(`evoloss.expressions.canonical`) does most of the work; SymPy offers expanded, factored and
collected forms of it. Constants keep all their digits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce
from math import isfinite
from typing import Any

from evoloss.errors import ExpressionError
from evoloss.expressions.canonical import Normaliser
from evoloss.expressions.expression import Expression, call, constant
from evoloss.expressions.operators import CONSTANT, PREDICTION
from evoloss.expressions.rebuild import Builder
from evoloss.expressions.symbolic import from_sympy, sympy_namespace, to_sympy
from evoloss.expressions.verify import Report, Verifier

MAX_SYMPY_NODES = 120
"""Larger expressions get the normal form alone: it bounds the time that SymPy takes."""

MAX_EXPANDED_TERMS = 48


@dataclass(frozen=True)
class Simplified:
    """Result of `simplify_expression`: ``original = scale * expression + constant``.

    Attributes
    ----------
    expression : Expression
        Canonical form without scale and additive constant; the original itself if
        ``kept_original``.
    scale : float
        Positive leading factor, 1 if ``kept_original``.
    complexity_before, complexity_after : int
        Nodes of the trees.
    complexity_shared : int
        Nodes after, equal subtrees counted once (the program evaluates them once).
    verified : bool
        Whether the result was checked against the original; False if the original was kept for want
        of a proof.
    reason : str or None
        Why the original was kept.
    max_relative_gradient_error, max_value_error : float
        Of the result (0 for a kept original).
    """

    expression: Expression
    scale: float
    complexity_before: int
    complexity_after: int
    complexity_shared: int
    verified: bool
    kept_original: bool
    reason: str | None
    max_relative_gradient_error: float
    max_value_error: float


def count_shared(expression: Expression) -> int:
    """Return the number of distinct subtrees."""
    return len(set(expression.walk()))


def simplify_expression(
    expression: Expression, kind: str = "classification", tolerance: float = 1e-6
) -> Simplified:
    """Return the smallest verified equivalent of a loss expression.

    Parameters
    ----------
    kind : {"classification", "regression"}
        Domain of the proof; for classification, labels are also taken to be >= 0.
    tolerance : float
        Largest relative error of the gradient.

    Raises
    ------
    ExpressionError
        For an unknown kind. A simplification that fails is no error: the original is kept and the
        reason told.
    """
    verifier = Verifier(expression, kind, tolerance)
    if verifier.problem is not None:
        return _keep(expression, False, verifier.problem)
    reasons: list[str] = []
    candidates = find_candidates(expression, kind == "classification", reasons)
    # stable: among equals the normal form, which comes first, wins
    ordered = sorted(candidates.items(), key=_preference)
    refused: Report | None = None
    for form, scale in ordered:
        if form.complexity > expression.complexity:
            return _keep(expression, True, "no smaller form was found")
        report = verifier.check(form, scale)
        if report.verified:
            return _accept(expression, form, scale, report)
        refused = refused or report
    if refused is not None:
        reasons.insert(0, f"the simplified form was refused: {refused.reason}")
    return _keep(expression, False, "; ".join(reasons) or "no simplified form was found")


def _preference(candidate: tuple[Expression, float]) -> tuple[int, int]:
    return candidate[0].complexity, count_shared(candidate[0])


def _accept(original: Expression, form: Expression, scale: float, report: Report) -> Simplified:
    return Simplified(
        expression=form,
        scale=scale,
        complexity_before=original.complexity,
        complexity_after=form.complexity,
        complexity_shared=count_shared(form),
        verified=True,
        kept_original=False,
        reason=None,
        max_relative_gradient_error=report.max_relative_gradient_error,
        max_value_error=report.max_value_error,
    )


def _keep(original: Expression, verified: bool, reason: str) -> Simplified:
    return Simplified(
        expression=original,
        scale=1.0,
        complexity_before=original.complexity,
        complexity_after=original.complexity,
        complexity_shared=count_shared(original),
        verified=verified,
        kept_original=True,
        reason=reason,
        max_relative_gradient_error=0.0,
        max_value_error=0.0,
    )


def find_candidates(
    expression: Expression, label_nonnegative: bool, reasons: list[str]
) -> dict[Expression, float]:
    """Return unproven equivalents with their scales; what went wrong is appended to ``reasons``."""
    found: dict[Expression, float] = {}

    def add(form: Expression, factor: float = 1.0) -> Expression:
        normaliser = Normaliser(label_nonnegative)
        scale, built = Builder(normaliser).build_root(*normaliser.visit(form))
        if built.contains(PREDICTION) and isfinite(scale) and scale > 0.0:
            found.setdefault(built, scale * factor)
        return built

    try:
        start = add(expression)
    except (OverflowError, ExpressionError) as error:
        reasons.append(f"no normal form: {error}")
        return found
    if not start.contains(PREDICTION):
        reasons.append("the normal form lost f(x)")
    elif start.complexity > MAX_SYMPY_NODES:
        reasons.append(f"more than {MAX_SYMPY_NODES} nodes, too large for SymPy")
    else:
        for name, form in _sympy_forms(start, reasons):
            try:
                add(from_sympy(form))
            except (ExpressionError, ArithmeticError) as error:
                reasons.append(f"SymPy's {name} form: {error}")
    if expression.complexity <= MAX_SYMPY_NODES:
        try:
            light, scale = _build_light_form(expression)
            add(light, scale)
        except Exception as error:  # SymPy's own errors are of every kind
            reasons.append(f"SymPy's light form: {type(error).__name__}: {error}")
        else:
            if light.contains(PREDICTION) and isfinite(scale) and scale > 0.0:
                found.setdefault(light, scale)
    return found


def tidy(node: Expression) -> Expression:
    """Write sums with ``sub`` instead of negative factors, and products with ``aq(1, b)`` as ``aq(a, b)``."""
    args = tuple(tidy(arg) for arg in node.args)
    if node.symbol == "add":
        terms = [_split_sign(term) for term in _summands(Expression("add", args))]
        plus = [term for sign, term in terms if sign > 0]
        minus = [term for sign, term in terms if sign < 0]
        if plus:
            total = reduce(lambda a, b: call("add", a, b), plus)
            return reduce(lambda a, b: call("sub", a, b), minus, total)
    if node.symbol == "mul":
        for first, second in (args, args[::-1]):
            if second.symbol == "aq" and second.args[0] == constant(1.0):
                return call("aq", first, second.args[1])
    return Expression(node.symbol, args, node.value)


def _summands(node: Expression) -> Iterator[Expression]:
    for arg in node.args:
        yield from _summands(arg) if arg.symbol == "add" else (arg,)


def _split_sign(term: Expression) -> tuple[int, Expression]:
    if term.symbol == "mul" and term.args[0].symbol == CONSTANT and term.args[0].value < 0:
        factor = -term.args[0].value
        rest = term.args[1]
        return -1, rest if factor == 1.0 else call("mul", constant(factor), rest)
    if term.symbol == CONSTANT and term.value < 0:
        return -1, constant(-term.value)
    return 1, term


def _build_light_form(expression: Expression) -> tuple[Expression, float]:
    """Return the form that SymPy builds unasked, without constant and scale: folded and flattened.

    All inner signs and factors stay in place, where the normal form moves them outwards, which can cost nodes.
    """
    _, rest = to_sympy(expression).as_coeff_Add()
    factor, core = rest.as_coeff_Mul()
    return tidy(from_sympy(core if factor > 0 else -core)), abs(float(factor))


def _sympy_forms(start: Expression, reasons: list[str]) -> Iterator[tuple[str, Any]]:
    """Yield SymPy's forms of ``start``; SymPy may raise anything, and then offers one form less."""
    import sympy

    space = sympy_namespace()
    made: dict[str, Any] = {}

    def attempt(name: str, make: Callable[[], Any]) -> Any:
        try:
            made[name] = make()
        except Exception as error:  # SymPy's own errors are of every kind
            reasons.append(f"SymPy's {name} form: {type(error).__name__}: {error}")
        return made.get(name)

    direct = attempt("direct", lambda: to_sympy(start))
    if direct is None:
        return
    attempt("factored", lambda: sympy.factor_terms(direct))
    if count_expanded_terms(start) <= MAX_EXPANDED_TERMS:
        expanded = attempt("expanded", lambda: sympy.expand(direct))
        if expanded is not None and expanded != direct:
            attempt("collected in f", lambda: sympy.collect(expanded, space.f))
            attempt("collected in y", lambda: sympy.collect(expanded, space.y))
            attempt("factored again", lambda: sympy.factor_terms(expanded))
    yield from made.items()


def count_expanded_terms(expression: Expression) -> int:
    """Return an upper bound of the terms of any sum in the expanded form."""
    worst = 1

    def visit(node: Expression) -> int:
        nonlocal worst
        counts = [min(visit(arg), 10_000) for arg in node.args]
        terms = 1
        if node.symbol in ("add", "sub"):
            terms = sum(counts)
        elif node.symbol == "mul":
            terms = counts[0] * counts[1]
        elif node.symbol == "square":
            terms = counts[0] * counts[0]
        elif node.symbol == "aq":
            terms = counts[0]
        worst = max(worst, terms)
        return terms

    visit(expression)
    return worst
