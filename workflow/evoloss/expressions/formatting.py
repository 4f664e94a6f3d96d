"""Loss expressions for people: one line of text, and LaTeX that matplotlib's mathtext reads too.

Numbers are rounded for display only. Sums and products are written with their signs and brackets
resolved; every other operator fills its template of the operator table.
"""

from __future__ import annotations

from dataclasses import dataclass

from evoloss.expressions.expression import Expression
from evoloss.expressions.operators import CONSTANT, OPERATORS

SUM, PRODUCT, ATOM = 1, 2, 4


def format_infix(expression: Expression, digits: int = 4) -> str:
    """Return text such as ``|1.007·y - f(x)|``, constants rounded to ``digits`` digits."""
    return _Formatter(digits, latex=False).signed(expression)


def format_latex(expression: Expression, digits: int = 4) -> str:
    """Return LaTeX without dollar signs; constants rounded to ``digits`` significant digits."""
    return _Formatter(digits, latex=True).signed(expression)


@dataclass(frozen=True)
class _Formatter:
    digits: int
    latex: bool

    def number(self, value: float) -> str:
        text = f"{value:.{self.digits}g}"
        mantissa, _, exponent = text.partition("e")
        if not exponent:
            return text
        if self.latex:
            return rf"{mantissa} \times 10^{{{int(exponent)}}}"
        return f"{mantissa}e{int(exponent)}"

    def bracket(self, text: str) -> str:
        return rf"\left({text}\right)" if self.latex else f"({text})"

    def signed(self, node: Expression) -> str:
        """Format ``node`` where a leading minus needs no brackets."""
        text, _, negative = self.split(node)
        return f"-{text}" if negative else text

    def operand(self, node: Expression, precedence: int) -> str:
        """Format ``node``; bracketed if it binds less than ``precedence`` or has a minus."""
        text, own, negative = self.split(node)
        if negative:
            return self.bracket(f"-{text}")
        return self.bracket(text) if own < precedence else text

    def split(self, node: Expression) -> tuple[str, int, bool]:
        """Return (text without sign, precedence, whether a minus stands before it)."""
        if node.symbol == CONSTANT:
            text = self.number(abs(node.value))
            return text, PRODUCT if "times" in text else ATOM, node.value < 0.0
        if node.symbol in ("add", "sub"):
            return self.sum(node), SUM, False
        if node.symbol == "mul":
            return self.product(node)
        if not node.args:
            return node.symbol, ATOM, False
        operator = OPERATORS[node.symbol]
        template = operator.latex if self.latex else operator.infix
        texts = [self.signed(arg) for arg in node.args]
        text = template.format(*texts)
        for arg, body in zip(node.args, texts, strict=True):
            # the square of a name or a plain number needs no brackets
            if not arg.args and not body.startswith("-") and "e" not in body:
                squared = "^2" if self.latex else "²"
                text = text.replace(self.bracket(body) + squared, body + squared)
        return text, ATOM, False

    def sum(self, node: Expression) -> str:
        text = ""
        for term, minus in _sum_terms(node):
            body, own, negative = self.split(term)
            if own <= SUM:
                body = self.bracket(body)
            if text:
                text += f" - {body}" if minus != negative else f" + {body}"
            else:
                text = f"-{body}" if minus != negative else body
        return text

    def product(self, node: Expression) -> tuple[str, int, bool]:
        negative = False
        factors: list[tuple[str, int]] = []
        for factor in _product_factors(node):
            text, own, minus = self.split(factor)
            negative ^= minus
            if text != "1":
                factors.append((text, own))
        if len(factors) < 2:
            return (*factors[0], negative) if factors else ("1", ATOM, negative)
        template = OPERATORS["mul"].latex if self.latex else OPERATORS["mul"].infix
        texts = [self.bracket(body) if own < PRODUCT else body for body, own in factors]
        text = texts[0]
        for other in texts[1:]:
            text = template.format(text, other)
        return text, PRODUCT, negative


def _sum_terms(node: Expression) -> list[tuple[Expression, bool]]:
    """Return the terms of nested sums, left to right; True marks a subtracted one."""
    if node.symbol not in ("add", "sub"):
        return [(node, False)]
    left, right = node.args
    flip = node.symbol == "sub"
    return _sum_terms(left) + [(term, minus != flip) for term, minus in _sum_terms(right)]


def _product_factors(node: Expression) -> list[Expression]:
    """Return the factors of nested products, left to right."""
    if node.symbol != "mul":
        return [node]
    return _product_factors(node.args[0]) + _product_factors(node.args[1])
