"""The state of a path as plain lists, dicts, numbers and tensors, for a checkpoint, and back.

Every path's state is made of dataclasses, lists, tensors and arrays, so that none needs code of its own for this.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


def take_snapshot(value: Any) -> Any:
    """Return ``value`` made of dicts (of dataclasses' fields), lists, tensors and scalars; tensors are not copied."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: take_snapshot(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, list | tuple):
        return [take_snapshot(item) for item in value]
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    return value


def restore_snapshot(current: Any, snapshot: Any) -> Any:
    """Return what `take_snapshot` made ``snapshot`` from, given a ``current`` object of the same structure.

    Dataclasses, and tensors and arrays of the same shape, are filled in place; what ``current`` does not have yet (an
    optimiser's buffers, say) is taken over, on the device of ``current``'s own tensors.
    """
    return _restore(current, snapshot, _find_device(current))


def _restore(current: Any, snapshot: Any, device: torch.device) -> Any:
    if is_dataclass(current) and not isinstance(current, type):
        for field in fields(current):
            value = _restore(getattr(current, field.name), snapshot[field.name], device)
            # a frozen part is filled in place
            if value is not getattr(current, field.name):
                setattr(current, field.name, value)
        return current
    if isinstance(snapshot, list):
        known = list(current) if isinstance(current, list | tuple) else []
        known += [None] * (len(snapshot) - len(known))
        items = [_restore(a, b, device) for a, b in zip(known, snapshot, strict=False)]
        return tuple(items) if isinstance(current, tuple) else items
    if isinstance(snapshot, Tensor):
        if isinstance(current, np.ndarray):
            return snapshot.numpy()
        if isinstance(current, Tensor) and current.shape == snapshot.shape:
            return current.copy_(snapshot)
        return snapshot.to(device)
    return snapshot


def _find_device(value: Any) -> torch.device:
    """Return the device of the first tensor that is not a mere number, else the CPU."""
    if isinstance(value, Tensor) and value.dim() > 0:
        return value.device
    if is_dataclass(value) and not isinstance(value, type):
        value = [getattr(value, field.name) for field in fields(value)]
    if isinstance(value, list | tuple):
        devices = [_find_device(item) for item in value]
        return next((d for d in devices if d.type != "cpu"), torch.device("cpu"))
    return torch.device("cpu")
