"""Simplify every loss of a hall of fame."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from evoloss.expressions import parse_expression
from evoloss.expressions.formatting import format_infix, format_latex
from evoloss.expressions.simplify import simplify_expression
from evoloss.provenance import provenance

logger = logging.getLogger(__name__)


def simplify_hall_of_fame(
    hall_of_fame: Mapping[str, Any], kind: str, tolerance: float
) -> dict[str, Any]:
    """Return the contents of simplify_loss's JSON: each entry's canonical form, scale, formula, proof and sizes.

    ``kind`` is classification or regression, ``tolerance`` the largest relative gradient error. A failed search stays
    failed, with its reason.
    """
    entries = []
    for entry in hall_of_fame["entries"]:
        result = simplify_expression(
            parse_expression(entry["expression"]), tolerance=tolerance, kind=kind
        )
        entries.append(
            {
                "original": entry["expression"],
                "simplified": str(result.expression),
                "scale": result.scale,
                "text": format_infix(result.expression),
                "latex": format_latex(result.expression),
                # with the weights of the local search as explicit constants; the GP tree alone is tree_complexity
                "complexity_before": result.complexity_before,
                "complexity_after": result.complexity_after,
                "complexity_shared": result.complexity_shared,
                "tree_complexity": entry["complexity"],
                "verified": result.verified,
                "kept_original": result.kept_original,
                "reason": result.reason,
                "max_relative_gradient_error": result.max_relative_gradient_error,
                "max_value_error": result.max_value_error,
                "fitness": entry["fitness"],
            }
        )
        logger.info(
            "fitness %.4g, %d -> %d nodes: %.4g * %s%s",
            entry["fitness"],
            result.complexity_before,
            result.complexity_after,
            result.scale,
            entries[-1]["text"],
            f" (original kept: {result.reason})" if result.kept_original else "",
        )
    return {
        **{
            name: hall_of_fame[name]
            for name in ("task", "model", "method", "search_seed", "status", "reason")
        },
        "entries": entries,
        "provenance": provenance({"tolerance": tolerance}, search=hall_of_fame["provenance"]),
    }
