"""Safe points: where a long computation can be saved, and go on later with the same result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

SafePoint = Callable[[Callable[[], Any]], None]
"""Called at every safe point with a function that returns the progress made so far: plain values and tensors."""
