"""Mutated configurations through Snakemake itself: planned, or refused with one sentence; nothing starts."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import yaml

from config_mutations import mutate_config
from evoloss.config_file import read_config
from snakemake_runner import PRESETS, Snakemake

pytestmark = pytest.mark.workflow


@pytest.mark.parametrize("seed", range(20))
def test_planned_or_refused(snakemake: Snakemake, tmp_path: Path, seed: int) -> None:
    mutant, touched = mutate_config(read_config(PRESETS / "tiny.yaml"), random.Random(seed))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(mutant, allow_unicode=True))
    done = snakemake("--dry-run", "--quiet")
    assert "Traceback" not in done.stdout
    assert not (tmp_path / "results").exists()
    if done.returncode == 0:
        return
    refusals = [line for line in done.stdout.splitlines() if "Error in the configuration" in line]
    assert len(refusals) == 1, done.stdout
    assert any(name in refusals[0] for name in touched), (refusals, touched)
