"""A SLURM cluster of one node, copies of the project, and one eventful run that several tests look at."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from slurm_cluster import TARGET, Cluster, Events, Run, start_cluster_run, start_run

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("one-node-slurm.sh")


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Start the cluster, and stop it in the end whatever happened."""
    directory = tmp_path_factory.mktemp("cluster")
    try:
        up = subprocess.run(
            [SCRIPT, "up", directory], capture_output=True, text=True, check=False, timeout=600
        )
        if up.returncode == 3:
            pytest.skip(f"no SLURM here: {up.stderr.strip().splitlines()[-1]}")
        assert up.returncode == 0, up.stderr
        environment = {k: v for k, v in os.environ.items() if k != "SNAKEMAKE_PROFILE"}
        environment["SLURM_CONF"] = str(directory / "slurm.conf")
        environment["PATH"] = f"{directory / 'bin'}{os.pathsep}{os.environ['PATH']}"
        yield Cluster(directory, environment)
    finally:
        subprocess.run([SCRIPT, "down", directory], check=True, timeout=120)


def copy_project(target: Path) -> Path:
    """Copy what a run needs; without .git, so that the results' provenance does not depend on edits."""
    for name in ("workflow", "envs"):
        # with Numba's cache, but without files that somebody is just writing
        leave_out = shutil.ignore_patterns("*.pyc*", "*.tmp.*")
        shutil.copytree(ROOT / name, target / name, ignore=leave_out)
    for name in ("Snakefile", "config.yaml"):
        shutil.copy2(ROOT / name, target / name)
    config = yaml.safe_load((ROOT / "workflow/presets/tiny.yaml").read_text())
    config["tasks"] = {"diabetes": {"dataset": "diabetes", "models": ["linear"]}}
    config |= {"methods": ["baseline", "gp_lfl"], "search_seeds": [0, 1], "train_seeds": [0]}
    (target / "subset.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return target


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project that tests may edit, with the configuration subset.yaml."""
    return copy_project(tmp_path_factory.mktemp("edited") / "project")


@pytest.fixture(scope="session")
def local_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """A run of the same configuration without the cluster, from code that nobody edits; it may still be under way."""
    pristine = copy_project(tmp_path_factory.mktemp("pristine") / "project")
    options = ["--cores", "1", "--configfile", pristine / "subset.yaml", "--", TARGET]
    run = start_run(pristine, tmp_path_factory.mktemp("local"), dict(os.environ), *options)
    yield run
    run.process.kill()
    run.process.wait()


@pytest.fixture(scope="session")
def eventful_run(
    cluster: Cluster, project: Path, local_run: Run, tmp_path_factory: pytest.TempPathFactory
) -> Events:
    """A run whose code and configuration are edited while its jobs wait.

    One of its jobs is pre-empted, one cancelled, and one loses its process.
    """
    subset = project / "subset.yaml"
    configuration = subset.read_text()
    for partition in ("main", "scavenge"):
        cluster.set_partition(partition, "DOWN")
    run = start_cluster_run(
        cluster,
        project,
        tmp_path_factory.mktemp("eventful"),
        "--set-resources",
        "train_model:slurm_partition=scavenge",
        "--configfile",
        project / "subset.yaml",
        "--",
        TARGET,
    )
    try:
        cluster.wait_for_job(run, "search_loss", "PENDING", count=2)
        cluster.wait_for_job(run, "train_model", "PENDING")
        for path in (project / "Snakefile", *(project / "workflow").rglob("*.[ps][my]*")):
            if path.suffix in (".py", ".smk") or path.name == "Snakefile":
                path.write_text(path.read_text() + "\n# edited while jobs wait\n")
        edited = yaml.safe_load(configuration)
        edited["search"]["population_size"] += 1
        edited["train"]["steps"] += 1
        subset.write_text(yaml.safe_dump(edited))
        cluster.set_partition("scavenge", "UP")
        (training,) = cluster.wait_for_job(run, "train_model", "RUNNING")
        urgent = ["--partition", "gpu", "--exclusive", "--output", "/dev/null", "--wrap", "true"]
        cluster.call("sbatch", *urgent)  # of higher priority, and needs the whole node
        cluster.wait_for_job(run, "train_model", "PENDING")
        cluster.set_partition("main", "UP")
        first, second = cluster.wait_for_job(run, "search_loss", "RUNNING", count=2)
        cluster.call("scancel", first.number)
        cluster.kill_script(second, "search_loss.py")
        run.wait()
    finally:
        run.process.kill()
        subset.write_text(configuration)
        for partition in ("main", "scavenge"):
            cluster.set_partition(partition, "UP")
    return Events(run, first.number, second.number, training.number)


@pytest.fixture
def submit(cluster: Cluster) -> Iterator[Callable[..., Run]]:
    """Return a function that starts a run on the cluster; what still runs when the test ends is ended."""
    runs: list[Run] = []

    def start(*arguments: Any) -> Run:
        runs.append(start_cluster_run(cluster, *arguments))
        return runs[-1]

    yield start
    for run in runs:
        run.process.kill()
        run.process.wait()


@pytest.fixture
def gpu_project(tmp_path: Path) -> Path:
    """A copy with `device: cuda` and the profile's lines for GPUs in force, for the cluster's type of GPU."""
    target = copy_project(tmp_path / "project")
    subset = target / "subset.yaml"
    subset.write_text(subset.read_text().replace("device: cpu", "device: cuda"))
    profile = target / "workflow/profiles/slurm/config.yaml"
    text = profile.read_text()
    gpu_lines = re.findall(r"^#:(?:set-resources:| +\w+: \{slurm_partition: gpu).*$", text, re.M)
    assert len(gpu_lines) == 5, "the profile's lines for GPUs have changed"
    for line in gpu_lines:
        text = text.replace(line, line.removeprefix("#:").replace("a100", "fake"))
    profile.write_text(text)
    return target
