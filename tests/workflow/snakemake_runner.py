"""Snakemake as a user starts it, in a directory of the test's own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
PRESETS = ROOT / "workflow" / "presets"

Snakemake = Callable[..., subprocess.CompletedProcess[str]]


def start_snakemake(directory: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the root Snakefile with ``--directory``; the output of both streams is in ``stdout``."""
    environment = {k: v for k, v in os.environ.items() if k != "SNAKEMAKE_PROFILE"}
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile")]
    command += ["--directory", str(directory), *map(str, arguments)]
    return subprocess.run(
        command,
        cwd=directory,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
