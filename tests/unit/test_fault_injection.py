"""A search that is killed at any moment and started again gives the result of an undisturbed one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
TRIALS = 50


def test_killed_fifty_times_fifty_identical_results(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(HERE / "fault_injection.py"), str(tmp_path), str(TRIALS)],
        env=os.environ | {"PYTHONPATH": str(HERE.parents[1] / "workflow"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    undisturbed, *trials = [line.split() for line in done.stdout.splitlines()]
    assert len(trials) == TRIALS
    assert [trial[-1] for trial in trials] == [undisturbed[-1]] * TRIALS
    assert sum(int(inside) for _, _, inside, _ in trials) >= 10
    assert not (tmp_path / "checkpoints").exists()
