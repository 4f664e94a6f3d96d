"""What would run, by dry runs: every rule, for every configuration that is shipped."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from evoloss.config_file import read_config
from snakemake_runner import PRESETS, ROOT, Snakemake

pytestmark = pytest.mark.workflow

RULES = {
    "prepare_dataset", "tune_learning_rate", "search_loss", "simplify_loss", "finetune_loss",
    "train_model", "aggregate_results", "plot_test_error", "plot_learning_curves",
    "plot_search_progress", "plot_filters", "plot_losses", "plot_formulas", "build_report", "all",
}  # fmt: skip


def read_plan(output: str) -> dict[str, int]:
    """Return the number of jobs of each rule from a dry run's table."""
    return {name: int(count) for name, count in re.findall(r"^([a-z_]+) +(\d+)$", output, re.M)}


@pytest.mark.parametrize("name", ["config.yaml", "tiny.yaml", "paper.yaml"])
def test_dry_run_plans_every_rule(snakemake: Snakemake, name: str) -> None:
    path = ROOT / name if name == "config.yaml" else PRESETS / name
    done = snakemake("-n", "--configfile", path)
    assert done.returncode == 0, done.stdout[-3000:]
    plan = read_plan(done.stdout)
    assert set(plan) - {"total"} == RULES
    config = read_config(path)
    models = sum(len(task["models"]) for task in config["tasks"].values())
    assert plan["search_loss"] == len(config["tasks"]) * 2 * len(config["search_seeds"])
    jobs = math.ceil(len(config["train_seeds"]) / config["train_seeds_per_job"])
    assert plan["train_model"] == models * len(config["methods"]) * jobs


def test_config_yaml_is_the_default(snakemake: Snakemake, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text((ROOT / "config.yaml").read_text())
    done = snakemake("-n")
    assert done.returncode == 0, done.stdout[-3000:]
    assert read_plan(done.stdout)["prepare_dataset"] == 3


def test_learning_rates_are_tuned_only_where_used(snakemake: Snakemake, tmp_path: Path) -> None:
    override = tmp_path / "override.yaml"
    override.write_text("methods: [baseline, gp_lfl]\n")
    done = snakemake("-n", "--configfile", PRESETS / "tiny.yaml", override)
    assert done.returncode == 0, done.stdout[-3000:]
    assert read_plan(done.stdout)["tune_learning_rate"] == 1  # the task with learning_rate: tuned


def test_own_csv_file_is_a_dataset(snakemake: Snakemake, tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text("a,b\n1,2\n")
    (tmp_path / "override.yaml").write_text(
        "datasets: {csv: {mine: {path: mine.csv, target: b, kind: regression}}}\n"
        "tasks: {diabetes: {dataset: mine}, mnist5k_noisy: null}\n"
    )
    done = snakemake("-n", "--configfile", PRESETS / "tiny.yaml", tmp_path / "override.yaml")
    assert done.returncode == 0, done.stdout[-3000:]
    assert "input: mine.csv" in done.stdout
    assert "mnist5k" not in done.stdout  # null takes the base file's task out


def test_rules_are_documented(snakemake: Snakemake) -> None:
    done = snakemake("--list-rules", "--configfile", PRESETS / "tiny.yaml")
    documented = re.findall(r"^([a-z_]+) \(.+\.\)$", done.stdout, re.M)
    assert set(documented) == RULES
