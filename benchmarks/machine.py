"""Where and when a result was measured, and how fast that machine multiplies matrices."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from evoloss.engine.products import product
from evoloss.provenance import provenance, read_cpu_model

GEMM_SIZE = 1024


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Return processor, cores, threads, versions, commit and date (UTC)."""
    origin = provenance()
    return {
        "cpu": read_cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": origin["commit"],
        "uncommitted_changes": origin["dirty"],
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        "load_average": os.getloadavg()[0],
    }


def find_origin(machine: Mapping[str, Any]) -> dict[str, Any]:
    """Return what tells a row's origin in a section that keeps rows of several runs."""
    processor = machine["cpu"] if machine["device"] == "cpu" else machine["device"]
    return {
        "processor": processor,
        **{key: machine[key] for key in ("threads", "commit", "uncommitted_changes")},
    }


def time_call(device: torch.device, call: Callable[[], Any]) -> tuple[float, Any]:
    """Return seconds and result of ``call``; what it started on a GPU has ended."""
    _wait(device)
    started = time.perf_counter()
    result = call()
    _wait(device)
    return time.perf_counter() - started, result


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_gemm_peak(device: torch.device, repeats: int = 5) -> float:
    """Return the float32 matrix-product rate (FLOP/s) at 1024 x 1024: the best of ``repeats``, by torch or the engine.

    The engine's own is faster where torch's library leaves a part of the processor unused (`evoloss.engine.products`).
    """
    a = torch.rand(GEMM_SIZE, GEMM_SIZE, device=device)
    out = torch.empty_like(a)
    seconds = []
    for _ in range(repeats + 1):
        seconds.append(time_call(device, lambda: torch.mm(a, a, out=out))[0])
        seconds.append(time_call(device, lambda: product(a, a))[0])
    seconds = seconds[1:]
    return float(2 * GEMM_SIZE**3 / min(seconds[1:]))


def read_peak_memory() -> int:
    """Return the most memory this process has held so far, in bytes (resident set)."""
    status = Path("/proc/self/status")
    if status.is_file():
        # not ru_maxrss, which a child process inherits from its parent
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    import resource

    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
