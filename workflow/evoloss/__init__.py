"""evoloss: learn a loss function instead of choosing one.

The package root stays free of torch, because every Snakemake job parses the Snakefile, which imports it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.3.3"
__all__ = ["__version__", "load"]

if TYPE_CHECKING:
    from evoloss.losses.loss_file import load


def __getattr__(name: str) -> Any:
    if name == "load":
        from evoloss.losses.loss_file import load

        return load
    raise AttributeError(f"module 'evoloss' has no attribute {name!r}")
