"""Where a result comes from: code, versions, hardware and settings, as every result file carries it."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from evoloss import __version__
from evoloss.results import digest

PACKAGES = (
    "torch", "numpy", "scipy", "numba", "deap", "sympy", "scikit-learn", "pandas", "pyarrow",
    "safetensors", "snakemake",
)  # fmt: skip

COMMIT_VARIABLE = "EVOLOSS_COMMIT"
"""Environment variable with `encode_commit`'s text, for jobs in a container: they may not see the repository."""


def _git(*words: str) -> str | None:
    """Run git where the code lives; None where there is no git or no repository."""
    try:
        done = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *words],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def describe_commit() -> dict[str, Any]:
    """Return ``commit`` (None outside a repository) and ``dirty``: uncommitted changes below workflow/."""
    if COMMIT_VARIABLE in os.environ:
        given = json.loads(os.environ[COMMIT_VARIABLE])
        return {"commit": given["commit"], "dirty": given["dirty"]}
    status = _git("status", "--porcelain", "--untracked-files=no", "--", "..")
    return {
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None if status is None else bool(status),
    }


def encode_commit() -> str:
    """Return `describe_commit` as text for `COMMIT_VARIABLE`."""
    return json.dumps(describe_commit(), sort_keys=True)


def read_cpu_model() -> str:
    """Return the processor's name as Linux gives it, else what Python knows."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def describe_hardware(cores: int = 1, device: str = "cpu") -> dict[str, Any]:
    """Return what computed a result: CPU model, number of CPU threads used, GPU and its CUDA version.

    Parameters
    ----------
    cores
        CPU threads that the job uses.
    device
        "cpu" or "cuda"; ``gpu`` and ``cuda`` are None without a GPU.
    """
    gpu = cuda = None
    if device == "cuda":
        import torch  # here: reading the Snakefile must not wait for it

        gpu, cuda = torch.cuda.get_device_name(), torch.version.cuda
    return {"cpu": read_cpu_model(), "cores": cores, "device": device, "gpu": gpu, "cuda": cuda}


def _read_version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None  # a package of the workflow alone, where only the library is installed


def read_package_versions() -> dict[str, str | None]:
    """Return the versions of `PACKAGES`, None where one is not installed."""
    return {name: _read_version(name) for name in PACKAGES}


def provenance(
    settings: Any = None, hardware: Mapping[str, Any] | None = None, **extra: Any
) -> dict[str, Any]:
    """Return what a reviewer needs to trace a result.

    It holds nothing that differs between two runs of one state of the code on one machine (no times, no paths, no
    host or job names), so result files can be compared byte by byte.

    Parameters
    ----------
    settings
        The sections of the configuration that the result depends on, kept whole and as a digest.
    hardware
        `describe_hardware` of the job; by default one CPU thread.
    extra
        Further entries: seeds, the provenance of what the result was made from.
    """
    return {
        "evoloss": __version__,
        **describe_commit(),
        "python": ".".join(map(str, sys.version_info[:3])),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": read_package_versions(),
        "hardware": dict(hardware or describe_hardware()),
        "config": settings,
        "config_digest": digest(settings),
        **extra,
    }
