"""Tables and figures of what there is when jobs have failed."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest
from analysis_files import MISSING, make_outputs, make_results

from evoloss.analysis.aggregate import Results, aggregate_results, describe_results, write_results
from evoloss.analysis.figure_filters import draw_filters
from evoloss.analysis.figure_formulas import FIGURE_SETTINGS, draw_formulas
from evoloss.analysis.figure_learning_curves import draw_learning_curves
from evoloss.analysis.figure_losses import draw_losses
from evoloss.analysis.figure_search_progress import draw_search_progress
from evoloss.analysis.figure_test_error import draw_test_error
from evoloss.analysis.style import figure_style

LOST = {
    "a search, and the trainings that need it": (
        "(search_loss|simplify_loss|finetune_loss)/surnames/evomal/seed_1"
        "|train_model/surnames/.*/evomal"
    ),
    "a fine-tuning": "finetune_loss/diabetes/evomal/seed_0|train_model/diabetes/.*/evomal",
    "a method of a task": r"/mnist5k(/\w+)?/gp_lfl/",
    "the tuned baseline of a task": "tune_learning_rate/mnist5k/|mnist5k/lenet5/baseline_tuned",
    "all trainings of a task": "train_model/mnist5k_noisy/",
    "a task": "/diabetes[/.]",
    "every search": "(search|simplify|finetune)_loss/|train_model/.*/(gp_lfl|evomal)",
}
LOST_SEEDS = {
    "a training seed": r"train_model/.*/seeds_1\.parquet",
    "all but one training": (
        "(search|simplify|finetune)_loss/|train_model/(?!surnames/gru/evomal/seeds_0)"
    ),
}
SCORES = ["mean", "std", "std_runs", "train_seeds", "runs"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return make_results(tmp_path_factory.mktemp("results"), train_seeds=3)


def read_scores(results: Results) -> pd.DataFrame:
    frame = describe_results(results)["test_error"].frame
    return frame.set_index(["task", "model", "method"])[SCORES]


@pytest.fixture(scope="module")
def full_scores(inputs: dict[str, list[str]]) -> pd.DataFrame:
    return read_scores(aggregate_results(inputs))


@pytest.mark.parametrize("lost", [*LOST, *LOST_SEEDS])
def test_what_is_left_is_shown(
    lost: str, inputs: dict[str, list[str]], full_scores: pd.DataFrame, tmp_path: Path
) -> None:
    """Nothing crashes, and a method that has all its training seeds keeps its scores."""
    pattern = {**LOST, **LOST_SEEDS}[lost]
    left = {
        name: [path for path in paths if not re.search(pattern, path)]
        for name, paths in inputs.items()
    }
    assert sum(map(len, left.values())) < sum(map(len, inputs.values()))
    results = aggregate_results(left, MISSING)
    write_results(results, make_outputs(tmp_path))
    with figure_style(**FIGURE_SETTINGS):
        for figure in (
            draw_test_error(results.final, results.comparison),
            draw_learning_curves(results.runs),
            draw_search_progress(results.searches),
            draw_filters(results.searches),
            draw_losses(results.losses),
            draw_formulas(results.losses),
        ):
            figure.set_layout_engine("none")  # takes most of the time, and is tested elsewhere
            figure.draw_without_rendering()
    assert set(results.losses["status"]) <= {"ok", "failed"}
    if lost in LOST:
        scores = read_scores(results)
        pd.testing.assert_frame_equal(scores, full_scores.loc[scores.index])


def test_missing_jobs_are_listed(inputs: dict[str, list[str]], tmp_path: Path) -> None:
    outputs = make_outputs(tmp_path)
    write_results(aggregate_results(inputs, MISSING), outputs)
    frame = pd.read_csv(outputs["missing_csv"], dtype=str, keep_default_na=False)
    assert frame["stage"].tolist() == ["search_loss", "train_model"]
    assert frame["search_seed"].tolist() == ["1", ""]
    assert frame["status"].tolist() == ["failed", "not run"]
    assert frame["logs"].tolist() == ["results/logs/a.log"] * 2
    for name in ("test_error", "comparison", "losses", "searches"):
        assert "2 jobs have no result (1 failed)" in Path(outputs[f"{name}_md"]).read_text()


def test_nothing_missing_says_nothing(inputs: dict[str, list[str]], tmp_path: Path) -> None:
    outputs = make_outputs(tmp_path)
    write_results(aggregate_results(inputs), outputs)
    assert len(Path(outputs["missing_csv"]).read_text().splitlines()) == 1
    assert "Incomplete" not in Path(outputs["test_error_md"]).read_text()
