"""Expressions compiled to flat programs, the form in which losses are evaluated.

A program is a list of instructions, arguments first. Instruction i computes

    value[i] = weight[i] * operator[i](value[a[i]], value[b[i]])

so a constant c is ``one`` with weight c, and stage 2's "weight on every edge" (Raymond et al. 2023, section 3.2) is a
weight on every instruction but the last. Which weights are *loss parameters* (phi) is told by ``trainable``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evoloss.expressions.expression import Expression, F, Y, call, constant
from evoloss.expressions.operators import (
    CONSTANT,
    LABEL,
    LABEL_CODE,
    ONE_CODE,
    OPCODES,
    OPERATORS,
    PREDICTION,
    PREDICTION_CODE,
)

_BY_CODE = tuple(OPERATORS.values())

Instruction = tuple[int, int, int]
"""Opcode and the positions of its arguments."""


@dataclass(frozen=True, eq=False)
class Program:
    """A compiled loss expression of ``n`` instructions; arrays of shape ``(n,)``.

    Attributes
    ----------
    ops, a, b : int32
        Opcode and argument positions (0 where there is none).
    weights : float64
        Factor of every instruction; the last one is the loss's overall scale.
    trainable : bool
        Which weights are loss parameters (phi).
    """

    ops: NDArray[np.int32]
    a: NDArray[np.int32]
    b: NDArray[np.int32]
    weights: NDArray[np.float64]
    trainable: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.ops)

    @property
    def loss_params(self) -> NDArray[np.float64]:
        """phi: the trainable weights, in program order."""
        return self.weights[self.trainable]

    def with_loss_params(self, phi: NDArray[np.float64]) -> Program:
        """Return a copy whose trainable weights are ``phi``."""
        weights = self.weights.copy()
        weights[self.trainable] = phi
        return replace(self, weights=weights)


def _compile(expression: Expression, share: bool) -> Program:
    ops: list[int] = []
    a: list[int] = []
    b: list[int] = []
    weights: list[float] = []
    seen: dict[Expression, int] = {}

    def emit(op: int, first: int = 0, second: int = 0, weight: float = 1.0) -> int:
        ops.append(op)
        a.append(first)
        b.append(second)
        weights.append(weight)
        return len(ops) - 1

    def visit(node: Expression) -> int:
        if share and node.symbol != CONSTANT and node in seen:
            return seen[node]
        if node.symbol == LABEL:
            index = emit(LABEL_CODE)
        elif node.symbol == PREDICTION:
            index = emit(PREDICTION_CODE)
        elif node.symbol == CONSTANT:
            index = emit(ONE_CODE, weight=node.value)
        elif share and node.symbol == "mul" and node.args[0].symbol == CONSTANT:
            # "constant times expression" is a copy of that instruction with the constant in its weight
            target = visit(node.args[1])
            index = emit(ops[target], a[target], b[target], weights[target] * node.args[0].value)
        else:
            places = [visit(arg) for arg in node.args]
            index = emit(OPCODES[node.symbol], *places)
        seen[node] = index
        return index

    visit(expression)
    return _without_dead_code(
        Program(
            np.array(ops, dtype=np.int32),
            np.array(a, dtype=np.int32),
            np.array(b, dtype=np.int32),
            np.array(weights, dtype=np.float64),
            np.zeros(len(ops), dtype=np.bool_),
        )
    )


def _without_dead_code(program: Program) -> Program:
    """Drop instructions that the last one does not need."""
    arity = np.array([op.arity for op in _BY_CODE] + [0, 0, 0])
    alive = np.zeros(len(program), dtype=bool)
    alive[-1] = True
    for i in range(len(program) - 1, -1, -1):
        if alive[i] and arity[program.ops[i]] >= 1:
            alive[program.a[i]] = True
        if alive[i] and arity[program.ops[i]] == 2:
            alive[program.b[i]] = True
    place = np.cumsum(alive) - 1
    has_a = arity[program.ops] >= 1
    has_b = arity[program.ops] == 2
    return Program(
        program.ops[alive],
        np.where(has_a, place[program.a], 0)[alive].astype(np.int32),
        np.where(has_b, place[program.b], 0)[alive].astype(np.int32),
        program.weights[alive],
        program.trainable[alive],
    )


def compile_expression(expression: Expression) -> Program:
    """Compile with equal subtrees shared; every constant, every factor, and the scale are loss parameters.

    Constants are not shared: two that happen to be equal are two parameters.
    """
    program = _compile(expression, share=True)
    trainable = (program.weights != 1.0) | (program.ops == ONE_CODE)
    trainable[-1] = True
    return replace(program, trainable=trainable)


def compile_weighted_tree(expression: Expression) -> Program:
    """Compile a GP tree with a trainable weight on every edge (stage 2), all weights at their tree values."""
    program = _compile(expression, share=False)
    trainable = np.ones(len(program), dtype=np.bool_)
    trainable[-1] = False
    return replace(program, trainable=trainable)


def program_to_expression(program: Program) -> Expression:
    """Return the tree that a program computes, weights as explicit constant factors."""
    built: list[Expression] = []
    for op, a, b, weight in zip(program.ops, program.a, program.b, program.weights, strict=True):
        if op == ONE_CODE:
            built.append(constant(float(weight)))
            continue
        if op == LABEL_CODE:
            node = Y
        elif op == PREDICTION_CODE:
            node = F
        else:
            operator = _BY_CODE[op]
            node = call(operator.name, *[built[place] for place in (a, b)[: operator.arity]])
        built.append(node if weight == 1.0 else call("mul", constant(float(weight)), node))
    return built[-1]


def evaluate_program(program: Program, y: Any, f: Any, weights: Any, xp: Any) -> Any:
    """Evaluate element-wise.

    Parameters
    ----------
    y, f : array
        Label and prediction, one shape; torch tensors or NumPy arrays.
    weights : sequence
        One factor per instruction: floats, or scalars of the same namespace (then gradients flow to them).
    xp : module
        ``torch`` or ``numpy``.
    """
    return evaluate_instructions(program_instructions(program), y, f, weights, xp)


def program_instructions(program: Program) -> tuple[Instruction, ...]:
    """Return a program's (opcode, a, b) as plain integers, which ``torch.compile`` can unroll."""
    columns = (program.ops.tolist(), program.a.tolist(), program.b.tolist())
    return tuple(zip(*columns, strict=True))


def evaluate_instructions(
    instructions: Sequence[Instruction], y: Any, f: Any, weights: Any, xp: Any
) -> Any:
    """Evaluate `program_instructions`; parameters as in `evaluate_program`."""
    values: list[Any] = []
    for (op, a, b), weight in zip(instructions, weights, strict=True):
        if op == LABEL_CODE:
            value = y
        elif op == PREDICTION_CODE:
            value = f
        elif op == ONE_CODE:
            value = xp.ones_like(f)
        else:
            operator = _BY_CODE[op]
            args = [values[place] for place in (a, b)[: operator.arity]]
            value = operator.evaluate(xp, *args)
        values.append(value if isinstance(weight, float) and weight == 1.0 else weight * value)
    return values[-1]
