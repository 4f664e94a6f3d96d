"""Loss expressions as immutable trees, their text form, and the parser of that form."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from evoloss.errors import ExpressionError, describe_choices
from evoloss.expressions.operators import CONSTANT, LABEL, OPERATORS, PREDICTION

MAX_NODES = 5_000
TEXT_PER_NODE = 20
MAX_DEPTH = 100


@dataclass(frozen=True)
class Expression:
    """A node of a loss expression: an operator with arguments, ``y``, ``f(x)``, or a constant.

    Expressions are values: equal trees compare and hash equal.
    """

    symbol: str
    args: tuple[Expression, ...] = ()
    value: float = 0.0

    @property
    def complexity(self) -> int:
        """Number of nodes."""
        return 1 + sum(arg.complexity for arg in self.args)

    @property
    def height(self) -> int:
        """Edges on the longest path from the root to a leaf."""
        return 1 + max(arg.height for arg in self.args) if self.args else 0

    def walk(self) -> Iterator[Expression]:
        """Yield every node, arguments before their operator (postorder)."""
        for arg in self.args:
            yield from arg.walk()
        yield self

    def contains(self, symbol: str) -> bool:
        """Tell whether ``symbol`` occurs anywhere in the tree."""
        return any(node.symbol == symbol for node in self.walk())

    def __str__(self) -> str:
        return format_text(self)


Y = Expression(LABEL)
F = Expression(PREDICTION)


def constant(value: float) -> Expression:
    """Return a constant; raises `ExpressionError` if it is not finite."""
    if not math.isfinite(value):
        raise ExpressionError(f"a constant must be finite, not {value!r}")
    return Expression(CONSTANT, (), float(value))


def call(name: str, *args: Expression) -> Expression:
    """Return operator ``name`` applied to ``args``; raises `ExpressionError` on a wrong name or arity."""
    operator = OPERATORS.get(name)
    if operator is None:
        raise ExpressionError(f"unknown operator {describe_choices(name, OPERATORS)}")
    if len(args) != operator.arity:
        raise ExpressionError(f"{name} takes {operator.arity} argument(s), not {len(args)}")
    return Expression(name, args)


def format_number(value: float) -> str:
    """Return the shortest text that reads back as the same float64; whole numbers without a point."""
    if value == int(value) and abs(value) < 1e15:
        return str(int(value))
    return repr(value)


def format_text(expression: Expression) -> str:
    """Return the text form, e.g. ``abs(sub(mul(0.71, y), f(x)))``; `parse_expression` reads it back."""
    if expression.symbol == CONSTANT:
        return format_number(expression.value)
    if not expression.args:
        return expression.symbol
    return f"{expression.symbol}({', '.join(format_text(arg) for arg in expression.args)})"


_TOKEN = re.compile(
    r"\s*(?:(?P<prediction>f\s*\(\s*x\s*\))|(?P<number>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)"
    r"|(?P<name>[A-Za-z_]\w*)|(?P<mark>[(),]))"
)


class _Parser:
    """Recursive descent over ``expression := number | y | f(x) | name '(' expression {',' expression} ')'``."""

    def __init__(self, text: str, max_nodes: int) -> None:
        self.text = text
        self.max_nodes = max_nodes
        self.position = 0
        self.nodes = 0

    def fail(self, message: str, position: int) -> ExpressionError:
        near = self.text[position : position + 20]
        where = f"near {near!r}" if near else "at the end"
        return ExpressionError(f"{message} at position {position + 1} ({where})")

    def next_token(self) -> tuple[str, str, int]:
        match = _TOKEN.match(self.text, self.position)
        if match is None:
            start = len(self.text) - len(self.text[self.position :].lstrip())
            what = (
                "expression ends too early" if start == len(self.text) else "unexpected character"
            )
            raise self.fail(what, start)
        self.position = match.end()
        kind = str(match.lastgroup)
        return kind, match.group(kind), match.start(kind)

    def expect(self, mark: str) -> None:
        kind, token, start = self.next_token()
        if kind != "mark" or token != mark:
            raise self.fail(f"expected {mark!r}", start)

    def expression(self, depth: int) -> Expression:
        self.nodes += 1
        kind, token, start = self.next_token()
        if self.nodes > self.max_nodes or depth > MAX_DEPTH:
            raise self.fail(
                f"expression larger than {self.max_nodes} nodes or deeper than {MAX_DEPTH}", start
            )
        if kind == "prediction":
            return F
        if kind == "number":
            value = float(token)
            if not math.isfinite(value):
                raise self.fail("constant is not finite", start)
            return constant(value)
        if kind == "mark":
            raise self.fail("expected an operator, 'y', 'f(x)' or a number", start)
        if token == LABEL:
            return Y
        operator = OPERATORS.get(token)
        if operator is None:
            known = describe_choices(token, [*OPERATORS, LABEL, PREDICTION])
            raise self.fail(f"unknown name {known},", start)
        self.expect("(")
        args = [self.expression(depth + 1)]
        for _ in range(operator.arity - 1):
            self.expect(",")
            args.append(self.expression(depth + 1))
        self.expect(")")
        return Expression(token, tuple(args))


def parse_expression(text: str, max_nodes: int = MAX_NODES) -> Expression:
    """Parse the text form of an expression. Runs no code; size (``max_nodes``) and depth are bounded.

    Raises
    ------
    ExpressionError
        With the position (1-based) of the first character that does not fit the grammar.
    """
    if len(text) > max_nodes * TEXT_PER_NODE:
        raise ExpressionError(
            f"expression text is longer than {max_nodes * TEXT_PER_NODE} characters"
        )
    parser = _Parser(text, max_nodes)
    expression = parser.expression(0)
    rest = text[parser.position :]
    if rest.strip():
        raise parser.fail("text after the end of the expression", len(text) - len(rest.lstrip()))
    return expression
