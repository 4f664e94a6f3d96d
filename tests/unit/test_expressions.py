"""Parser, text round trip and compiled programs."""

from __future__ import annotations

import numpy as np
import pytest
from expression_strategies import expressions
from hypothesis import given, settings
from hypothesis import strategies as st

from evoloss.errors import ExpressionError
from evoloss.expressions import (
    F,
    Y,
    call,
    compile_expression,
    compile_weighted_tree,
    constant,
    evaluate_program,
    format_text,
    parse_expression,
    program_to_expression,
)
from evoloss.expressions.expression import MAX_DEPTH
from evoloss.expressions.formatting import format_infix, format_latex

POINTS = np.random.default_rng(0).uniform(-3, 3, (2, 40))


def evaluate(expression, y=POINTS[0], f=POINTS[1], compiler=compile_expression):
    program = compiler(expression)
    with np.errstate(all="ignore"):
        return evaluate_program(program, y, f, program.weights.tolist(), np)


def interpret(node, y, f):
    """An independent reference: recursion over the tree with formulas written out by hand."""
    a, b = ([interpret(arg, y, f) for arg in node.args] + [None, None])[:2]
    rules = {
        "y": lambda: y,
        "f(x)": lambda: f,
        "constant": lambda: np.full_like(f, node.value),
        "add": lambda: a + b,
        "sub": lambda: a - b,
        "mul": lambda: a * b,
        "aq": lambda: a / np.sqrt(1 + b**2),
        "min": lambda: np.where(a < b, a, b),
        "max": lambda: np.where(a > b, a, b),
        "sign": lambda: (a > 0) * 1.0 - (a < 0) * 1.0,
        "square": lambda: a * a,
        "abs": lambda: np.where(a < 0, -a, a),
        "log": lambda: np.log(np.maximum(np.abs(a), 1e-7)),
        "sqrt": lambda: np.sqrt(np.maximum(np.abs(a), 1e-7)),
        "tanh": lambda: np.tanh(a),
    }
    with np.errstate(all="ignore"):
        return rules[node.symbol]()


def test_parses_the_documented_example():
    expected = call("abs", call("sub", call("mul", constant(0.71), Y), F))
    assert parse_expression(" abs( sub(mul(0.71,y),f ( x ) ))") == expected
    assert format_text(expected) == "abs(sub(mul(0.71, y), f(x)))"


@given(expressions())
def test_text_reads_back_exactly(expression):
    assert parse_expression(format_text(expression)) == expression


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_constants_keep_every_digit(value):
    assert parse_expression(format_text(constant(value))).value == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "ends too early at position 1"),
        ("add(y", "ends too early at position 6"),
        ("add(y, f(x)", "ends too early at position 12"),
        ("add(y, f(x)) y", "text after the end of the expression at position 14"),
        ("ad(y, f(x))", "did you mean 'add'"),
        ("add(y; f(x))", "unexpected character at position 6"),
        ("add(y)", "expected ',' at position 6"),
        ("abs(y, y)", r"expected '\)' at position 6"),
        ("x", "unknown name"),
        ("1e999", "not finite at position 1"),
        ("nan", "unknown name"),
        ("__import__('os')", "unknown name"),
        ("(y)", "expected an operator"),
    ],
)
def test_bad_text_is_refused_with_its_position(text, message):
    with pytest.raises(ExpressionError, match=message):
        parse_expression(text)


def test_size_and_depth_are_bounded():
    deep = "abs(" * (MAX_DEPTH + 5) + "y" + ")" * (MAX_DEPTH + 5)
    with pytest.raises(ExpressionError, match="deeper"):
        parse_expression(deep)
    with pytest.raises(ExpressionError, match="longer"):
        parse_expression("y" * 200_000)


@given(st.text(max_size=60) | st.text("adbsyfx(),0123456789.e-+ ", max_size=60))
def test_parser_gives_an_expression_or_its_own_error(text):
    try:
        expression = parse_expression(text)
    except ExpressionError:
        return
    assert parse_expression(format_text(expression)) == expression


def test_wrong_calls_are_refused():
    with pytest.raises(ExpressionError, match="did you mean 'sqrt'"):
        call("sqrtt", Y)
    with pytest.raises(ExpressionError, match="takes 2"):
        call("add", Y)
    with pytest.raises(ExpressionError, match="finite"):
        constant(float("inf"))


@settings(max_examples=200)
@given(expressions())
def test_programs_compute_the_tree(expression):
    expected = interpret(expression, *POINTS)
    for compiler in (compile_expression, compile_weighted_tree):
        np.testing.assert_allclose(evaluate(expression, compiler=compiler), expected, rtol=1e-9)


@given(expressions())
def test_program_becomes_an_expression_of_the_same_values(expression):
    for compiler in (compile_expression, compile_weighted_tree):
        back = program_to_expression(compiler(expression))
        np.testing.assert_allclose(evaluate(back), evaluate(expression), rtol=1e-9)


def test_equal_subtrees_are_compiled_once():
    residual = call("sub", Y, F)
    program = compile_expression(call("mul", call("abs", residual), call("square", residual)))
    assert len(program) == 6
    assert program.loss_params.tolist() == [1.0]  # the overall scale alone


def test_weighted_tree_has_a_parameter_on_every_edge():
    tree = call("abs", call("sub", Y, F))
    program = compile_weighted_tree(tree)
    assert program.trainable.tolist() == [True, True, True, False]
    changed = program.with_loss_params(np.array([2.0, 3.0, 0.5]))
    expected = "abs(mul(0.5, sub(mul(2, y), mul(3, f(x)))))"
    assert format_text(program_to_expression(changed)) == expected


@pytest.mark.parametrize(
    ("text", "infix", "latex"),
    [
        ("abs(sub(mul(1.00702, y), f(x)))", "|1.007·y - f(x)|", r"\left|1.007 \, y - f(x)\right|"),
        ("sub(y, sub(f(x), y))", "y - f(x) + y", "y - f(x) + y"),
        ("sub(y, mul(2, sub(f(x), y)))", "y - 2·(f(x) - y)", r"y - 2 \, \left(f(x) - y\right)"),
        ("sub(1, -2)", "1 + 2", "1 + 2"),
        ("mul(-1, y)", "-y", "-y"),
        ("add(y, mul(-0.5, f(x)))", "y - 0.5·f(x)", r"y - 0.5 \, f(x)"),
        ("square(y)", "y²", "y^2"),
        ("square(1e-7)", "(1e-7)²", r"\left(1 \times 10^{-7}\right)^2"),
        ("aq(1, y)", "aq(1, y)", r"\frac{1}{\sqrt{1 + y^2}}"),
        ("square(-3)", "(-3)²", r"\left(-3\right)^2"),
        ("square(sub(y, f(x)))", "(y - f(x))²", r"\left(y - f(x)\right)^2"),
        ("mul(add(y, 1), mul(-3, y))", "-(y + 1)·3·y", r"-\left(y + 1\right) \, 3 \, y"),
        ("mul(1e-9, y)", "1e-9·y", r"1 \times 10^{-9} \, y"),
        ("mul(1, mul(1, 1))", "1", "1"),
        ("log(min(y, f(x)))", "log|min(y, f(x))|", None),
        ("aq(sub(y, 1), f(x))", "aq(y - 1, f(x))", None),
    ],
)
def test_formulas_read_well(text, infix, latex):
    expression = parse_expression(text)
    assert format_infix(expression) == infix
    if latex is not None:
        assert format_latex(expression) == latex


@given(expressions())
def test_formulas_of_all_expressions_are_balanced(expression):
    assert format_infix(expression).count("(") == format_infix(expression).count(")")
    latex = format_latex(expression)
    assert latex.count("{") == latex.count("}")
    assert latex.count(r"\left") == latex.count(r"\right")


def test_latex_is_readable_by_mathtext():
    from matplotlib.mathtext import MathTextParser

    text = (
        "add(aq(mul(-1e-7, y), sign(f(x))), tanh(sqrt(max(log(y), square(sub(min(y, f(x)), 2))))))"
    )
    MathTextParser("path").parse(f"${format_latex(parse_expression(text))}$")
