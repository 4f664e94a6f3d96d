"""Jobs that fail under --keep-going: the report is built from what there is, and later in full."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest

from evoloss.config_file import read_config
from evoloss.results import read_json
from snakemake_runner import PRESETS, start_snakemake

pytestmark = pytest.mark.workflow

SEARCH = "diabetes/gp_lfl/seed_0"
AGAIN = ["--forcerun", f"results/search_loss/{SEARCH}/hall_of_fame.json"]
OPTIONS = ["--cores", 2, "--configfile", PRESETS / "tiny.yaml"]
VARYING = re.compile(
    r"results/(logs|benchmarks|checkpoints)/|/history\.parquet$|/searches\.\w+$|html$"
)


def read_results(directory: Path) -> dict[str, bytes]:
    """The files that are the same in every run: all but logs and what holds times."""
    files = {p.relative_to(directory).as_posix(): p for p in directory.glob("results/**/*.*")}
    return {name: p.read_bytes() for name, p in files.items() if not VARYING.search(name)}


def test_report_of_what_there_is(tiny_run: Path, tmp_path: Path) -> None:
    """A search is lost when it runs again; the earlier results of all that needs it must not be shown."""
    directory = tmp_path / "run"
    shutil.copytree(tiny_run, directory, symlinks=True)
    results = directory / "results"
    dataset = results / "prepare_dataset/diabetes.npz"
    good, written = dataset.read_bytes(), dataset.stat()
    dataset.write_bytes(good[:1000])
    os.utime(dataset, ns=(written.st_atime_ns, written.st_mtime_ns))
    before = (results / "report.html").read_bytes()

    without = start_snakemake(directory, *OPTIONS, *AGAIN)
    assert without.returncode == 1
    assert (results / "report.html").read_bytes() == before

    done = start_snakemake(directory, *OPTIONS, *AGAIN, "--keep-going")
    assert done.returncode == 1
    assert "report lack 5 jobs" in done.stdout, done.stdout[-3000:]
    missing = pd.read_csv(results / "tables/missing.csv", dtype=str, keep_default_na=False)
    assert missing["stage"].tolist() == [
        "search_loss", "simplify_loss", "finetune_loss", *["train_model"] * 2
    ]  # fmt: skip
    assert missing["status"].tolist() == ["failed"] + ["not run"] * 4
    log = f"results/logs/search_loss/{SEARCH}.log"
    assert set(missing["logs"]) == {log}
    assert "diabetes.npz is damaged" in (directory / log).read_text()
    test_error = pd.read_csv(results / "tables/test_error.csv")
    methods = test_error.groupby(["task", "model"])["method"].agg(set)
    assert "gp_lfl" not in methods["diabetes", "linear"] | methods["diabetes", "mlp"]
    assert "evomal" in methods["diabetes", "linear"] & methods["diabetes", "mlp"]
    assert "gp_lfl" in methods["mnist5k_noisy", "linear"]
    report = (results / "report.html").read_text(encoding="utf-8")
    assert "This report is incomplete" in report
    assert log in report
    assert "system-message" not in report  # what docutils puts where it cannot read a text

    dataset.write_bytes(good)
    os.utime(dataset, ns=(written.st_atime_ns, written.st_mtime_ns))
    done = start_snakemake(directory, *OPTIONS)
    assert done.returncode == 0, done.stdout[-3000:]
    assert read_results(directory) == read_results(tiny_run)
    assert f"The report is {results / 'report.html'}" in done.stdout
    assert "This report is incomplete" not in (results / "report.html").read_text(encoding="utf-8")


def test_jobs_get_a_copy_of_the_configuration(tiny_run: Path) -> None:
    (path,) = tiny_run.glob(".snakemake/evoloss/config_*.json")
    assert read_json(path) == read_config(PRESETS / "tiny.yaml")
