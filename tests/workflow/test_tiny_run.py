"""The tiny preset, from the first rule to the report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from evoloss.config_file import read_config
from evoloss.results import read_json, read_parquet
from snakemake_runner import PRESETS, start_snakemake

pytestmark = pytest.mark.workflow

FIGURES = ("test_error", "learning_curves", "search_progress", "filters", "losses", "formulas")
TABLES = ("test_error", "comparison", "losses", "searches", "datasets", "origin", "missing")
NOTHING = "Nothing to be done"


def test_everything_is_there(tiny_run: Path) -> None:
    results = tiny_run / "results"
    wanted = [results / "report.html"]
    wanted += [results / f"figures/{name}.{ext}" for name in FIGURES for ext in ("svg", "png")]
    wanted += [results / f"tables/{name}.{ext}" for name in TABLES for ext in ("csv", "md")]
    missing = [str(path) for path in wanted if not path.is_file() or path.stat().st_size == 0]
    assert not missing


def test_report_begins_with_the_main_result(tiny_run: Path) -> None:
    page = (tiny_run / "results" / "report.html").read_text(encoding="utf-8")
    assert ".main-result svg" in page
    assert "This is the main result" in page
    assert "system-message" not in page  # what docutils puts where it cannot read a text


def test_report_entries_have_one_label(tiny_run: Path) -> None:
    """A second label that halves a category becomes a switch of Snakemake's page, which then shows nothing at all."""
    page = (tiny_run / "results" / "report.html").read_text(encoding="utf-8")
    start = page.index("var results = {") + len("var results = ")
    entries, _ = json.JSONDecoder().raw_decode(page, start)
    # nothing is missing in this run, so that table has no entry
    assert len(entries) == len(FIGURES) + len(TABLES) - 1
    labels = [entry["labels"] for entry in entries.values()]
    assert {key for one in labels for key in one} == {"content"}
    assert len({one["content"] for one in labels}) == len(entries)


def test_losses_and_trainings_are_whole(tiny_run: Path) -> None:
    config = read_config(PRESETS / "tiny.yaml")
    losses = sorted(tiny_run.glob("results/finetune_loss/*/*/seed_*/loss.json"))
    assert len(losses) == len(config["tasks"]) * 2 * len(config["search_seeds"])
    for path in losses:
        loss = read_json(path)
        assert loss["format"] == "evoloss-loss"
        assert loss["status"] in ("ok", "failed")
    for path in tiny_run.glob("results/train_model/**/*.parquet"):
        frame = read_parquet(path)
        assert set(frame["split"]) <= {"train", "validation", "test"}
        assert frame["step"].max() == config["train"]["steps"]


def test_every_job_left_a_log_and_a_benchmark(tiny_run: Path) -> None:
    results = tiny_run / "results"
    logs = {p.relative_to(results / "logs").with_suffix("") for p in results.glob("logs/**/*.log")}
    benchmarks = {
        p.relative_to(results / "benchmarks").with_suffix("")
        for p in results.glob("benchmarks/**/*.tsv")
    }
    assert logs == benchmarks
    assert len(logs) > 30


def test_a_search_writes_little(tiny_run: Path) -> None:
    """Per candidate so few bytes that a seed of the paper's searches stays below 20 MB; and no checkpoint is left."""
    tiny, paper = (read_config(PRESETS / name)["search"] for name in ("tiny.yaml", "paper.yaml"))
    candidates, wanted = (s["population_size"] * (s["num_generations"] + 1) for s in (tiny, paper))
    searches = sorted(tiny_run.glob("results/search_loss/*/*/seed_*"))
    assert len(searches) == 4
    for search in searches:
        name = str(search.relative_to(tiny_run / "results/search_loss"))
        files = [p for p in (tiny_run / "results").rglob("*") if p.is_file() and name in str(p)]
        # search, simplify, finetune; their logs and benchmarks
        assert len(files) == 2 + 1 + 2 + 3 + 3
        total = sum(path.stat().st_size for path in files)
        assert total / candidates * wanted < 20e6, f"{name}: {total} bytes"
    assert not list(tiny_run.rglob("*.checkpoint"))


def test_every_result_names_its_origin(tiny_run: Path) -> None:
    results = tiny_run / "results"
    documents = {path: read_json(path) for path in results.rglob("*.json")}
    for path in results.rglob("*.parquet"):
        documents[path] = read_parquet(path).attrs["metadata"]
    assert len(documents) > 30
    for path, document in documents.items():
        origin = document["provenance"]
        assert origin["hardware"]["cores"] == 1, path
        assert origin["hardware"]["cpu"], path
        assert origin["packages"]["torch"], path
        assert "config" in origin, path
    assert str(tiny_run) not in str(list(documents.values()))


def test_second_run_does_nothing(tiny_run: Path) -> None:
    done = start_snakemake(tiny_run, "--cores", 2, "--configfile", PRESETS / "tiny.yaml")
    assert done.returncode == 0
    assert NOTHING in done.stdout


def test_order_of_keys_and_comments_rerun_nothing(tiny_run: Path, tmp_path: Path) -> None:
    def reverse(value: object) -> object:
        if isinstance(value, dict):
            return {key: reverse(value[key]) for key in reversed(value)}
        return value

    path = tmp_path / "reordered.yaml"
    config = reverse(read_config(PRESETS / "tiny.yaml"))
    path.write_text("# another comment\n" + yaml.safe_dump(config, sort_keys=False))
    done = start_snakemake(tiny_run, "-n", "--configfile", path)
    assert done.returncode == 0
    assert NOTHING in done.stdout


@pytest.mark.parametrize(
    ("override", "reruns", "spares"),
    [
        ("local_search: {meta_steps: 3}", "search_loss", "tune_learning_rate"),
        ("simplify: {tolerance: 1.0e-5}", "simplify_loss", "search_loss"),
        ("finetune: {meta_steps: 3}", "finetune_loss", "simplify_loss"),
        ("train: {num_evaluations: 1}", "train_model", "finetune_loss"),
        ("train_seeds: [0, 1, 2]", "train_model", "finetune_loss"),
    ],
)
def test_a_key_reruns_only_what_depends_on_it(
    tiny_run: Path, tmp_path: Path, override: str, reruns: str, spares: str
) -> None:
    path = tmp_path / "override.yaml"
    path.write_text(override + "\n")
    done = start_snakemake(tiny_run, "-n", "--configfile", PRESETS / "tiny.yaml", path)
    assert done.returncode == 0, done.stdout[-3000:]
    assert f"\nrule {reruns}:" in done.stdout or f"localrule {reruns}:" in done.stdout
    assert f"rule {spares}:" not in done.stdout
    assert "rule prepare_dataset:" not in done.stdout


def test_results_do_not_depend_on_the_number_of_cores(tiny_run: Path, tmp_path: Path) -> None:
    """The same bytes from --cores 1 as from --cores 2, for a search and for a training under its loss."""
    targets = [
        "results/search_loss/mnist5k_noisy/evomal/seed_0/hall_of_fame.json",
        "results/finetune_loss/mnist5k_noisy/evomal/seed_0/loss.json",
        "results/train_model/mnist5k_noisy/linear/evomal/seeds_0-1.parquet",
        "results/train_model/diabetes/mlp/gp_lfl/seeds_0-1.parquet",
    ]
    done = start_snakemake(
        tmp_path, "--cores", 1, "--configfile", PRESETS / "tiny.yaml", "--", *targets
    )
    assert done.returncode == 0, done.stdout[-4000:]
    for target in targets:
        assert (tmp_path / target).read_bytes() == (tiny_run / target).read_bytes(), target
