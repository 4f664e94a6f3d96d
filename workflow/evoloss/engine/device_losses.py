"""Losses on a GPU: the Triton kernels where Triton is installed (CUDA builds of torch bring it along)."""

from __future__ import annotations

import logging
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from evoloss.engine.kernels import PackedPrograms

if TYPE_CHECKING:
    from evoloss.engine.triton_kernels import DevicePrograms

logger = logging.getLogger(__name__)


@cache
def has_triton() -> bool:
    """Tell whether Triton can be imported; say so once if it cannot."""
    found = find_spec("triton") is not None
    if not found:
        logger.warning(
            "the package triton is missing: losses are differentiated by autograd, slower"
        )
    return found


def copy_programs(packed: PackedPrograms, device: torch.device) -> DevicePrograms | None:
    """Return the programs on ``device`` for the kernels; None where there are no kernels for it."""
    if device.type != "cuda" or not has_triton():
        return None
    # importing Triton takes about a second, and nothing else needs it
    from evoloss.engine.triton_kernels import DevicePrograms

    return DevicePrograms(packed, device)
