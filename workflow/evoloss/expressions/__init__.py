"""Loss expressions: one operator table, immutable trees, text form, compiled programs, simplification."""

from evoloss.expressions.expression import (
    Expression,
    F,
    Y,
    call,
    constant,
    format_text,
    parse_expression,
)
from evoloss.expressions.operators import OPERATORS, Operator
from evoloss.expressions.program import (
    Program,
    compile_expression,
    compile_weighted_tree,
    evaluate_program,
    program_to_expression,
)

__all__ = [
    "OPERATORS",
    "Expression",
    "F",
    "Operator",
    "Program",
    "Y",
    "call",
    "compile_expression",
    "compile_weighted_tree",
    "constant",
    "evaluate_program",
    "format_text",
    "parse_expression",
    "program_to_expression",
]
