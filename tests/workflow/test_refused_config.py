"""A configuration that cannot work is refused before any job, with one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from snakemake_runner import PRESETS, Snakemake

pytestmark = pytest.mark.workflow


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("search: {populaton_size: 3}", "did you mean 'population_size'?"),
        ("tasks: {diabetes: {dataset: diabetis}}", "did you mean 'diabetes'?"),
        ("tasks: {diabetes: {models: [mpl]}}", "did you mean 'mlp'?"),
        ("methods: [evomall]", "did you mean 'evomal'?"),
        (
            "train: {steps: many}",
            "train.steps must be an integer (at least 1, at most 10000000), not the text 'many'",
        ),
        ("data_seed: 1\ndata_seed: 2", "key 'data_seed' is given twice"),
    ],
)
def test_refused_with_one_sentence(
    snakemake: Snakemake, tmp_path: Path, override: str, sentence: str
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(override + "\n")
    done = snakemake("--cores", 1, "--configfile", PRESETS / "tiny.yaml", path)
    assert done.returncode == 1
    refusal = [line for line in done.stdout.splitlines() if "Error in the configuration" in line]
    assert len(refusal) == 1, done.stdout
    assert "mine.yaml" in refusal[0]
    assert sentence in refusal[0]
    assert "Traceback" not in done.stdout
    assert ".smk" not in done.stdout
    assert not (tmp_path / "results").exists()


def test_invalid_yaml_is_refused(snakemake: Snakemake, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("tasks: [1\n")
    done = snakemake("--cores", 1)
    assert done.returncode == 1
    assert "not valid JSON or YAML" in done.stdout
    assert "Traceback" not in done.stdout
