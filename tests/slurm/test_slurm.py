"""The cluster profile on a real SLURM: what runs where, what becomes of lost jobs, and the same results as locally."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from slurm_cluster import TARGET, Cluster, Events, Run

pytestmark = pytest.mark.slurm

TUNED_RATE = "results/tune_learning_rate/diabetes/linear.json"
HALL_OF_FAME = "results/search_loss/diabetes/gp_lfl/seed_{}/hall_of_fame.json"


def list_results(directory: Path) -> set[str]:
    """The files that are the same in every run: all but logs and what holds times."""
    results = directory / "results"
    paths = {str(p.relative_to(directory)) for p in results.rglob("*") if p.is_file()}
    varying = re.compile(r"results/(logs|benchmarks)/|/history\.parquet$|/searches\.\w+$")
    return {path for path in paths if not varying.search(path)}


def dry_run(project: Path, directory: Path, *options: object) -> str:
    command: list[object] = [sys.executable, "-m", "snakemake", "-n", "--directory", directory]
    command += ["--configfile", project / "subset.yaml", *options, "--", TARGET]
    done = subprocess.run(
        [str(part) for part in command], cwd=project, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def list_rules(plan: str) -> set[str]:
    """The rules that a dry run's table names."""
    return set(re.findall(r"^([a-z_]+) +\d+$", plan, re.M)) - {"total"}


def test_eventful_run_ends_well(eventful_run: Events) -> None:
    assert eventful_run.run.process.returncode == 0, eventful_run.run.log[-6000:]


def test_results_are_the_local_runs(eventful_run: Events, local_run: Run) -> None:
    assert local_run.wait() == 0, local_run.log[-4000:]
    paths = list_results(local_run.directory)
    assert paths == list_results(eventful_run.run.directory)
    assert len(paths) > 15
    for path in sorted(paths):
        expected = (local_run.directory / path).read_bytes()
        assert (eventful_run.run.directory / path).read_bytes() == expected, path


def test_heavy_rules_ran_on_the_cluster(cluster: Cluster, eventful_run: Events) -> None:
    """By SLURM's own record; editing code while they waited made no stage run twice."""
    done = [job.rule for job in cluster.jobs(eventful_run.run) if job.state == "COMPLETED"]
    assert sorted(done) == [
        "finish_loss_finetune_loss_simplify_loss",
        "finish_loss_finetune_loss_simplify_loss",
        "search_loss_wildcards_diabetes_gp_lfl_0",
        "search_loss_wildcards_diabetes_gp_lfl_1",
        "train_model_wildcards_diabetes_linear_baseline_0",
        "train_model_wildcards_diabetes_linear_gp_lfl_0",
    ]
    local = set(re.findall(r"^localrule (\w+):", eventful_run.run.log, re.M))
    assert local == {"prepare_dataset", "aggregate_results"}


def test_lost_jobs_are_submitted_again(cluster: Cluster, eventful_run: Events) -> None:
    """With more memory and time; all others were submitted once."""
    jobs = {job.number: job for job in cluster.jobs(eventful_run.run)}
    cancelled, killed = jobs[eventful_run.cancelled], jobs[eventful_run.killed]
    assert (cancelled.state, killed.state) == ("CANCELLED", "FAILED")
    assert len(jobs) == 6 + 2
    for lost in (cancelled, killed):
        (again,) = [j for j in jobs.values() if j.rule == lost.rule and j.number > lost.number]
        assert (lost.memory, lost.time_limit) == ("2000M", "1-00:00:00")
        assert (again.memory, again.time_limit) == ("4000M", "2-00:00:00")


def test_preempted_job_runs_again_as_the_same_job(cluster: Cluster, eventful_run: Events) -> None:
    job = cluster.describe(eventful_run.preempted)
    assert (job["JobState"], job["Restarts"], job["Partition"]) == ("COMPLETED", "1", "scavenge")


def test_edited_code_repeats_no_search(eventful_run: Events, project: Path) -> None:
    """The tables follow the code of the analysis; without the profile all edited stages would run again."""
    directory = eventful_run.run.directory
    plan = dry_run(project, directory, "--profile", "workflow/profiles/slurm")
    assert list_rules(plan) == {"aggregate_results"}
    assert list_rules(dry_run(project, directory)) > {"search_loss", "finetune_loss", "train_model"}


def test_failed_seed_loses_no_other(
    cluster: Cluster,
    submit: Callable[..., Run],
    project: Path,
    local_run: Run,
    tmp_path: Path,
) -> None:
    """Two searches share the GPU; one is lost for good, the other is kept; the next run makes what is missing."""
    options: list[object] = [
        "--set-resources",
        "search_loss:gres=shard:1",
        "search_loss:slurm_partition=gpu",
    ]
    options += ["--configfile", project / "subset.yaml", "--"]
    options += [HALL_OF_FAME.format(seed) for seed in (0, 1)]
    run = submit(project, tmp_path, "--retries", "0", *options)
    jobs = cluster.wait_for_job(run, "search_loss", "RUNNING", count=2)
    for job in jobs:
        assert cluster.describe(job.number)["TresPerNode"] == "gres:shard:1"
    (lost,) = [job for job in jobs if job.rule.endswith("_0")]
    cluster.call("scancel", lost.number)
    assert run.wait() == 1
    assert not (tmp_path / HALL_OF_FAME.format(0)).exists()
    assert (tmp_path / HALL_OF_FAME.format(1)).exists()

    again = submit(project, tmp_path, *options)
    assert again.wait() == 0, again.log[-4000:]
    assert [job.rule for job in cluster.jobs(again)].count(lost.rule) == 2
    assert len(cluster.jobs(again)) == 3
    assert local_run.wait() == 0, local_run.log[-4000:]
    for path in (HALL_OF_FAME.format(0), HALL_OF_FAME.format(1)):
        assert (tmp_path / path).read_bytes() == (local_run.directory / path).read_bytes()


def test_cuda_asks_for_a_gpu(
    cluster: Cluster, submit: Callable[..., Run], gpu_project: Path, tmp_path: Path
) -> None:
    """In the partition and of the type that the profile says; and an interrupt leaves no job behind."""
    plan = dry_run(gpu_project, tmp_path / "run", "--profile", "workflow/profiles/slurm")
    asked, rule = set(), ""
    for line in plan.splitlines():
        if found := re.match(r" *(?:local)?rule (\w+):$", line):
            rule = found[1]
        elif re.search(r"resources:.* gpu=1\b", line):
            asked.add(rule)
    assert asked == {"search_loss", "finetune_loss", "train_model"}

    cluster.set_partition("gpu", "DOWN")
    options = ["--configfile", gpu_project / "subset.yaml", "--", TUNED_RATE]
    run = submit(gpu_project, tmp_path / "run", *options)
    try:
        (job,) = cluster.wait_for_job(run, "tune_learning_rate", "PENDING")
        assert job.partition == "gpu"
        assert cluster.describe(job.number)["TresPerJob"] == "gres:gpu:fake:1"
        run.process.send_signal(signal.SIGINT)
        assert run.wait() == 1
        assert [job.state for job in cluster.jobs(run)] == ["CANCELLED"]
    finally:
        cluster.set_partition("gpu", "UP")
