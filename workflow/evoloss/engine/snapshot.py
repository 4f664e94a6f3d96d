"""The state of a path as plain lists, dicts, numbers and tensors, for a checkpoint, and back.

Every path's state is made of dataclasses, lists and tensors, so that none needs code of its own for this.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from evoloss.errors import CheckpointError


def take_snapshot(value: Any) -> Any:
    """Return ``value`` made of dicts (of dataclasses' fields), lists, tensors and scalars; tensors are not copied."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: take_snapshot(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, list):
        return [take_snapshot(item) for item in value]
    return value


def restore_snapshot(current: Any, snapshot: Any) -> Any:
    """Return what `take_snapshot` made ``snapshot`` from, given a ``current`` object of the same structure.

    Dataclasses and tensors are filled in place; what ``current`` does not have yet (an optimiser's buffers, say) is
    taken over, on the device of ``current``'s own tensors.

    Raises
    ------
    CheckpointError
        If a tensor has another shape.
    """
    return _restore(current, snapshot, _find_device(current))


def _restore(current: Any, snapshot: Any, device: torch.device) -> Any:
    if is_dataclass(current) and not isinstance(current, type):
        for field in fields(current):
            value = _restore(getattr(current, field.name), snapshot[field.name], device)
            setattr(current, field.name, value)
        return current
    if isinstance(snapshot, list):
        known = list(current) if isinstance(current, list) else []
        known += [None] * (len(snapshot) - len(known))
        return [_restore(a, b, device) for a, b in zip(known, snapshot, strict=True)]
    if isinstance(snapshot, Tensor):
        if not isinstance(current, Tensor):
            return snapshot.to(device)
        if current.shape != snapshot.shape:
            raise CheckpointError(
                f"the checkpoint has a tensor {tuple(snapshot.shape)} where the network has "
                f"{tuple(current.shape)}"
            )
        return current.copy_(snapshot)
    return snapshot


def _find_device(value: Any) -> torch.device:
    """Return the device of the first tensor that is not a mere number, else the CPU."""
    if isinstance(value, Tensor) and value.dim() > 0:
        return value.device
    if is_dataclass(value) and not isinstance(value, type):
        value = [getattr(value, field.name) for field in fields(value)]
    if isinstance(value, list):
        devices = [_find_device(item) for item in value]
        return next((d for d in devices if d.type != "cpu"), torch.device("cpu"))
    return torch.device("cpu")
