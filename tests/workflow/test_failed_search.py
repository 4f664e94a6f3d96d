"""A search in which every candidate is rejected: recorded, and the workflow goes on to the report."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

import evoloss
from evoloss.config_file import read_config
from evoloss.errors import LossFileError
from evoloss.results import read_json, read_parquet
from snakemake_runner import PRESETS, start_snakemake

pytestmark = pytest.mark.workflow


def test_the_workflow_goes_on(tmp_path: Path) -> None:
    config = read_config(PRESETS / "tiny.yaml")
    config["methods"] = ["baseline", "gp_lfl"]
    config["train_seeds"] = [0]
    config["tasks"] = {"hopeless": {"dataset": "diabetes", "models": ["linear"]}}
    # predictions that hardly move improve no metric, so that the rejection protocol rejects everything
    config["search"]["rejection_learning_rate"] = 1.0e-300
    path = tmp_path / "hopeless.yaml"
    path.write_text(yaml.safe_dump(config))
    done = start_snakemake(tmp_path, "--cores", 2, "--configfile", path)
    assert done.returncode == 0, done.stdout[-4000:]

    results = tmp_path / "results"
    hall_of_fame = read_json(results / "search_loss/hopeless/gp_lfl/seed_0/hall_of_fame.json")
    assert hall_of_fame["status"] == "failed"
    assert "rejected" in hall_of_fame["reason"]
    log = (results / "logs/search_loss/hopeless/gp_lfl/seed_0.log").read_text()
    assert "search failed" in log
    with pytest.raises(LossFileError, match="holds no loss"):
        evoloss.load(results / "finetune_loss/hopeless/gp_lfl/seed_0/loss.json")
    frame = read_parquet(results / "train_model/hopeless/linear/gp_lfl/seeds_0.parquet")
    assert len(frame) == 0
    assert frame.attrs["metadata"]["missing"][0]["search_seed"] == 0
    assert "failed" in (results / "tables/searches.md").read_text()
    assert "hopeless" in (results / "report.html").read_text(encoding="utf-8")
