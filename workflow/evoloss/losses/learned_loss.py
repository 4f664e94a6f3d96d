"""A learned loss as a ``torch.nn.Module``, called like the losses of ``torch.nn``."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from evoloss.errors import ExpressionError, describe_choices
from evoloss.expressions.expression import Expression, parse_expression
from evoloss.expressions.formatting import format_infix
from evoloss.expressions.program import (
    compile_expression,
    evaluate_instructions,
    program_instructions,
)

KINDS = ("classification", "regression")
REDUCTIONS = ("mean", "sum", "none")


class LearnedLoss(nn.Module):
    """``loss(input, target)`` for a loss expression M(y, f(x)).

    Classification, input of shape ``(batch, classes)`` or ``(batch, classes, d1, ...)``: ``input``
    holds logits, f(x) = softmax(input), y = one-hot target; element losses are summed over classes
    and reduced over the rest. The target holds class indices ``(batch, d1, ...)`` or probabilities
    of input's shape, as for `torch.nn.CrossEntropyLoss`. With one output, ``(batch,)`` or ``(batch,
    1, ...)``: f(x) = sigmoid(input), and target is 0/1 (or a probability) of input's shape, as for
    `torch.nn.BCEWithLogitsLoss`.

    Regression: f(x) = input, y = target, one shape; reduced over all elements, as for
    `torch.nn.MSELoss`.

    The module has no parameters or buffers: dtype and device follow the input. float16 and bfloat16
    input is evaluated (and the loss returned) in float32. NaN in gives NaN out.

    Parameters
    ----------
    expression : Expression or str
        The formula, or its text form.
    scale : float
        Positive or negative leading factor: loss = scale * reduce(expression).
    kind : {"classification", "regression"}
    reduction : {"mean", "sum", "none"}
        ``none`` gives ``(batch, d1, ...)`` for classification, input's shape otherwise.

    Raises
    ------
    ExpressionError
        If the text is no expression, or ``scale`` is not finite.
    ValueError
        For an unknown kind or reduction; when called, for shapes that do not fit.
    TypeError
        When called, for an input that is not floating point, or a target of the wrong dtype.
    """

    def __init__(
        self,
        expression: Expression | str,
        scale: float = 1.0,
        kind: str = "classification",
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"unknown kind of loss {describe_choices(kind, KINDS)}")
        if reduction not in REDUCTIONS:
            raise ValueError(f"unknown reduction {describe_choices(reduction, REDUCTIONS)}")
        if not math.isfinite(scale):
            raise ExpressionError(f"the scale of a loss must be finite, not {scale!r}")
        self.expression = (
            parse_expression(expression) if isinstance(expression, str) else expression
        )
        self.scale = float(scale)
        self.kind = kind
        self.reduction = reduction
        program = compile_expression(self.expression)
        self._instructions = program_instructions(program)
        self._weights: tuple[float, ...] = tuple(program.weights.tolist())

    def extra_repr(self) -> str:
        """Return the formula, for ``repr``."""
        formula = format_infix(self.expression)
        return f"{self.scale:.4g} · {formula}, kind={self.kind!r}, reduction={self.reduction!r}"

    def forward(self, input: Tensor, target: Tensor) -> Tensor:  # noqa: A002 (torch.nn's name)
        """Return the loss of ``input`` against ``target``; shapes as told by the class."""
        if not input.is_floating_point():
            raise TypeError(f"input of a LearnedLoss must be floating point, not {input.dtype}")
        half = input.dtype in (torch.float16, torch.bfloat16)
        outputs = input.float() if half else input
        if self.kind == "regression":
            elements = self._evaluate(self._real_target(outputs, target), outputs)
        elif outputs.dim() == 0:
            raise ValueError("input of a classification loss needs a batch dimension, got a scalar")
        elif outputs.dim() == 1 or outputs.shape[1] == 1:
            elements = self._evaluate(self._real_target(outputs, target), torch.sigmoid(outputs))
        else:
            y = self._class_target(outputs, target)
            elements = self._evaluate(y, torch.softmax(outputs, 1)).sum(1)
        if self.reduction == "none":
            return elements
        return elements.mean() if self.reduction == "mean" else elements.sum()

    def _evaluate(self, y: Tensor, f: Tensor) -> Tensor:
        value: Tensor = evaluate_instructions(self._instructions, y, f, self._weights, torch)
        return self.scale * value

    def _real_target(self, outputs: Tensor, target: Tensor) -> Tensor:
        if target.shape != outputs.shape:
            raise ValueError(
                f"target of shape {tuple(target.shape)} does not fit input of shape "
                f"{tuple(outputs.shape)}: a loss with one value per element needs equal shapes"
            )
        if target.is_complex():
            raise TypeError(f"target of a LearnedLoss must be real, not {target.dtype}")
        return target.to(outputs.dtype)

    def _class_target(self, outputs: Tensor, target: Tensor) -> Tensor:
        if target.is_floating_point():
            if target.shape != outputs.shape:
                raise ValueError(
                    f"target of shape {tuple(target.shape)} does not fit logits of shape "
                    f"{tuple(outputs.shape)}: a floating point target holds probabilities, one "
                    "per logit (class indices must be integers)"
                )
            return target.to(outputs.dtype)
        if target.dtype == torch.bool or target.is_complex():
            raise TypeError(f"target must hold class indices or probabilities, not {target.dtype}")
        expected = outputs.shape[:1] + outputs.shape[2:]
        if target.shape != expected:
            raise ValueError(
                f"target of shape {tuple(target.shape)} does not fit logits of shape "
                f"{tuple(outputs.shape)}: class indices need shape {tuple(expected)}"
            )
        # scatter refuses an index outside the classes, unlike a comparison with arange
        return torch.zeros_like(outputs).scatter(1, target.long().unsqueeze(1), 1.0)
