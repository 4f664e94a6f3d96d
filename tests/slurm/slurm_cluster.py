"""The one-node cluster as the tests see it: what SLURM itself says about jobs, and Snakemake runs that submit to it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
TARGET = "results/tables/test_error.csv"  # all stages but the figures
PATIENCE_S = 300  # for what takes seconds on an idle machine
POLL_S = 6  # between Snakemake's looks at the queue


@dataclass(frozen=True)
class Job:
    """A job as SLURM remembers it."""

    number: int
    state: str
    partition: str
    memory: str
    time_limit: str
    comment: str

    @property
    def rule(self) -> str:
        """Rule and wildcards, as the plugin writes them."""
        return self.comment.removeprefix("rule_")


@dataclass(frozen=True)
class Cluster:
    """A running cluster; ``environment`` leads SLURM's commands to it."""

    directory: Path
    environment: dict[str, str]

    def call(self, *command: object) -> str:
        """Run a command of SLURM's and return what it prints."""
        done = subprocess.run(
            [str(part) for part in command],
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def jobs(self, run: Run) -> list[Job]:
        """Every job of a run, finished ones too, in the order of submission."""
        lines = self.call("squeue", "-h", "-t", "all", "-o", "%i|%T|%P|%m|%l|%k|%Z").splitlines()
        rows = [line.split("|") for line in lines]
        mine = [Job(int(row[0]), *row[1:6]) for row in rows if row[6] == str(run.directory)]
        return sorted(mine, key=lambda job: job.number)

    def describe(self, number: int) -> dict[str, str]:
        """The fields of ``scontrol show job``."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.call("scontrol", "show", "job", number)))

    def set_partition(self, name: str, state: str) -> None:
        """UP, or DOWN: takes jobs and starts none."""
        self.call("scontrol", "update", f"PartitionName={name}", f"State={state}")

    def wait_for_job(self, run: Run, rule: str, state: str, count: int = 1) -> list[Job]:
        """Wait until ``count`` jobs whose rule and wildcards begin with ``rule`` are in a state."""

        def find() -> list[Job]:
            assert run.process.poll() is None, (
                f"ended before {rule} was {state}:\n{run.log[-3000:]}"
            )
            jobs = [j for j in self.jobs(run) if j.rule.startswith(rule) and j.state == state]
            return jobs if len(jobs) >= count else []

        return wait_for(find, f"{count} x {rule} {state}")

    def kill_script(self, job: Job, script: str) -> None:
        """SIGKILL the process in which a job's script runs, as the kernel does when memory is short."""

        def find() -> int | None:
            for entry in Path("/proc").glob("[0-9]*"):
                try:
                    owner = f"SLURM_JOB_ID={job.number}\0".encode()
                    if (
                        script.encode() in (entry / "cmdline").read_bytes()
                        and owner in (entry / "environ").read_bytes() + b"\0"
                    ):
                        return int(entry.name)
                except OSError:  # it has ended, or is not ours
                    continue
            return None

        os.kill(wait_for(find, f"{script} in job {job.number}"), signal.SIGKILL)


@dataclass(frozen=True)
class Run:
    """A Snakemake process and the directory of its results."""

    directory: Path
    process: subprocess.Popen[bytes]

    @property
    def log(self) -> str:
        """What Snakemake has printed."""
        return (self.directory / "snakemake.log").read_text()

    def wait(self) -> int:
        """Wait for the end; the exit status."""
        return self.process.wait(timeout=2 * PATIENCE_S)


@dataclass(frozen=True)
class Events:
    """A finished run on the cluster, and the numbers of the jobs to which something happened."""

    run: Run
    cancelled: int
    killed: int
    preempted: int


def start_run(
    project: Path, directory: Path, environment: dict[str, str], *arguments: object
) -> Run:
    """Start Snakemake in a copy of the project, with its results elsewhere."""
    directory.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "snakemake", "--directory", directory, *arguments]
    with (directory / "snakemake.log").open("wb") as log:
        process = subprocess.Popen(
            [str(part) for part in command],
            cwd=project,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    return Run(directory, process)


def start_cluster_run(cluster: Cluster, project: Path, directory: Path, *arguments: object) -> Run:
    """The same with the cluster profile, which looks at the queue more often than on a real cluster."""
    options = ["--profile", "workflow/profiles/slurm"]
    options += ["--slurm-init-seconds-before-status-checks", str(POLL_S), "--latency-wait", "10"]
    return start_run(project, directory, cluster.environment, *options, *arguments)


def wait_for(find: Callable[[], T | None], what: str) -> T:
    """Wait until a function returns something."""
    end = time.monotonic() + PATIENCE_S
    while not (found := find()):
        assert time.monotonic() < end, f"waited {PATIENCE_S} s for {what}"
        time.sleep(0.2)
    return found
