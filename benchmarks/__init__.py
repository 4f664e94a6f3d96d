"""Benchmarks of evoloss against a plain sequential implementation: ``python -m benchmarks`` from the root."""

import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]
# the package and the oracle are used from the clone, as Snakemake and pytest do
sys.path[:0] = [str(_ROOT / "workflow"), str(_ROOT / "tests")]
