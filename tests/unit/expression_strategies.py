"""Hypothesis strategies and seeded generators of loss expressions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import strategies as st

from evoloss.expressions import (
    OPERATORS,
    Expression,
    F,
    Y,
    call,
    compile_weighted_tree,
    constant,
    program_to_expression,
)

finite = st.floats(-1e6, 1e6, allow_nan=False, allow_subnormal=False)
leaves = st.one_of(
    st.sampled_from([Y, F, Y, F, constant(1.0), constant(-1.0)]),
    st.floats(-3, 3, allow_subnormal=False).map(constant),
)


def _grow(children: st.SearchStrategy[Expression]) -> st.SearchStrategy[Expression]:
    def apply(name: str) -> st.SearchStrategy[Expression]:
        args = [children] * OPERATORS[name].arity
        return st.tuples(*args).map(lambda parts: call(name, *parts))

    return st.sampled_from(list(OPERATORS)).flatmap(apply)


def expressions(max_leaves: int = 12) -> st.SearchStrategy[Expression]:
    """Expressions over the whole operator table, constants in [-3, 3]."""
    return st.recursive(leaves, _grow, max_leaves=max_leaves)


def draw_tree(rng: np.random.Generator, height: int) -> Expression:
    """A GP tree as the search grows them: terminals y, f(x), 1 and -1."""
    if height == 0 or rng.random() < 0.12:
        return (Y, F, Y, F, constant(1.0), constant(-1.0))[rng.integers(6)]
    name = list(OPERATORS)[rng.integers(len(OPERATORS))]
    return call(name, *[draw_tree(rng, height - 1) for _ in range(OPERATORS[name].arity)])


def draw_loss(rng: np.random.Generator, deviation: float = 0.0) -> Expression:
    """A GP tree of 5-40 nodes with y and f(x); every edge weighted if ``deviation`` is not 0."""
    while True:
        tree = draw_tree(rng, int(rng.integers(2, 7)))
        if 5 <= tree.complexity <= 40 and tree.contains("y") and tree.contains("f(x)"):
            break
    if deviation == 0.0:
        return tree
    program = compile_weighted_tree(tree)
    factors = np.where(program.trainable, rng.normal(1.0, deviation, len(program)), 1.0)
    return program_to_expression(replace(program, weights=program.weights * factors))
