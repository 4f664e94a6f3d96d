"""Snakemake in an empty directory, and one whole tiny run that several tests look at."""

from __future__ import annotations

from pathlib import Path

import pytest

from snakemake_runner import PRESETS, Snakemake, start_snakemake


@pytest.fixture
def snakemake(tmp_path: Path) -> Snakemake:
    """Return a function that runs Snakemake in an empty directory."""
    return lambda *arguments: start_snakemake(tmp_path, *arguments)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory in which the tiny preset ran from the first rule to the report."""
    directory = tmp_path_factory.mktemp("tiny")
    done = start_snakemake(
        directory, "--cores", 2, "--show-failed-logs", "--configfile", PRESETS / "tiny.yaml"
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return directory
