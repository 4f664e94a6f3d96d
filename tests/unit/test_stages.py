"""The stages on a small prepared dataset: tuning, search, simplification, fine-tuning, final training."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from evoloss.checkpoint import Checkpoints
from evoloss.errors import DataError
from evoloss.expressions import compile_expression, parse_expression
from evoloss.losses.loss_file import load, save_loss
from evoloss.results import write_json
from evoloss.stages.finetuning import finetune_loss, split_scale
from evoloss.stages.searching import search_loss
from evoloss.stages.setup import StageInput
from evoloss.stages.simplifying import simplify_hall_of_fame
from evoloss.stages.training import train_model
from evoloss.stages.tuning import tune_learning_rate
from evoloss.tasks.datasets import prepare_dataset, save_dataset

ROOT = Path(__file__).parents[2]

FINETUNE = {
    "num_candidates": 2, "meta_steps": 6, "inner_steps": 2, "meta_learning_rate": 0.05,
    "evaluate_every": 2, "selection_seeds": 2,
}  # fmt: skip
TUNE = {"minimum": 0.001, "maximum": 1.0, "num_points": 4, "num_seeds": 2}


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> StageInput:
    folder = tmp_path_factory.mktemp("diabetes")
    arrays, card = prepare_dataset("diabetes", data_seed=0)
    save_dataset(arrays, card, folder / "diabetes.npz", folder / "diabetes.json")
    task = {
        "name": "diabetes", "dataset": "diabetes", "kind": "regression", "model": "linear",
        "label_noise": None, "data_seed": 0,
    }  # fmt: skip
    training = {"batch_size": 32, "learning_rate": 0.01, "precision": "float64"}
    return StageInput(task, training, str(folder / "diabetes.npz"), "cpu", 1)


def simplified(*formulas: str) -> dict[str, Any]:
    hall_of_fame = {
        "task": "diabetes", "model": "linear", "method": "evomal", "search_seed": 0,
        "status": "ok" if formulas else "failed", "reason": None if formulas else "all rejected",
        "provenance": {},
        "entries": [
            {"expression": text, "fitness": 0.5 + i, "complexity": 5} for i, text in enumerate(formulas)
        ],
    }  # fmt: skip
    return simplify_hall_of_fame(hall_of_fame, "regression", 1e-6)


def test_tuning_takes_the_best_of_the_grid(stage: StageInput) -> None:
    result = tune_learning_rate(stage, TUNE, 60)
    rates = [point["learning_rate"] for point in result["grid"]]
    assert rates == [0.001, 0.01, 0.1, 1.0]
    scores = {p["learning_rate"]: p["validation_metric"] for p in result["grid"]}
    done = {rate: score for rate, score in scores.items() if score is not None}
    assert result["best_learning_rate"] == min(done, key=done.__getitem__)
    for point in result["grid"]:
        if point["validation_metric"] is not None:
            assert point["validation_metric"] == pytest.approx(np.mean(point["per_seed"]))


@pytest.mark.parametrize(
    ("rate", "sentence"),
    [
        (
            1e300,
            r" diverged in training.*; a smaller training.learning_rate \(base\) or tune_learning_rate",
        ),
        (0.0, r"\d rejected, as predictions .*\); a larger search.population_size or another seed"),
    ],
)
def test_a_failed_search_says_why(stage: StageInput, rate: float, sentence: str) -> None:
    """At an absurd learning rate all training diverges; where predictions never move, everything is rejected."""
    search = yaml.safe_load((ROOT / "workflow" / "presets" / "tiny.yaml").read_text())["search"]
    if rate:
        stage = replace(stage, training={**stage.training, "learning_rate": rate})
    else:
        search["rejection_learning_rate"] = 1e-300
    found, _ = search_loss(stage, "gp_lfl", search, {}, 0)
    assert (found["status"], found["entries"]) == ("failed", [])
    assert re.search(rf"none of the 8 candidates became a loss \(.*{sentence}", found["reason"])


def test_a_diverged_tuning_is_told(stage: StageInput, tmp_path: Path) -> None:
    result = tune_learning_rate(stage, TUNE | {"minimum": 1e6, "maximum": 1e9}, 200)
    assert result["best_learning_rate"] is None
    write_json(tmp_path / "tuned.json", result)
    with pytest.raises(DataError, match="diverged at every one tried; lower tune_l"):
        _ = replace(stage, tuned_path=str(tmp_path / "tuned.json")).settings


def test_finetuning_chooses_and_never_gets_worse(stage: StageInput) -> None:
    losses = simplified("mul(0.001, sub(f(x), y))", "mul(0.2, square(sub(mul(0.9, y), f(x))))")
    result = finetune_loss(stage, losses, "evomal", FINETUNE, 40, 0)
    report = result.report
    scores = [candidate["score"] for candidate in report["candidates"]]
    assert report["selected"] == int(np.argmin(scores)) == 1
    assert report["start_score"] == min(scores)
    assert report["best_score"] <= report["start_score"]
    assert [entry["meta_step"] for entry in report["trace"]] == list(range(7))
    scored = [entry["score"] for entry in report["trace"] if entry["score"] is not None]
    assert len(scored) == 1 + 3
    assert report["best_score"] == min(scored)
    assert report["best_score"] < report["start_score"], "the constants can be improved here"


def test_gp_lfl_only_chooses(stage: StageInput) -> None:
    losses = simplified("mul(0.5, square(sub(y, f(x))))")
    choice = {name: FINETUNE[name] for name in ("num_candidates", "selection_seeds")}
    result = finetune_loss(stage, losses, "gp_lfl", choice, 40, 0)
    assert result.scale == pytest.approx(0.5)
    assert str(result.expression) == "square(sub(y, f(x)))"
    assert result.report["trace"] == []


def test_every_constant_is_a_loss_parameter() -> None:
    program = compile_expression(
        parse_expression("add(square(sub(f(x), 1)), mul(0.5, abs(sub(y, 1))))")
    )
    assert len(program.loss_params) == 4  # 1 and 1 apart, 0.5, and the scale


@pytest.mark.parametrize("text", ["mul(-2.5, abs(sub(y, f(x))))", "square(sub(mul(0.3, y), f(x)))"])
def test_split_scale_keeps_the_loss(text: str) -> None:
    program = compile_expression(parse_expression(text))
    expression, scale = split_scale(program)
    again = compile_expression(expression)
    assert scale > 0
    assert again.weights[-1] * scale == program.weights[-1]


def test_failed_searches_stay_failed_and_the_others_go_on(
    stage: StageInput, tmp_path: Path
) -> None:
    failed = finetune_loss(stage, simplified(), "evomal", FINETUNE, 40, 0)
    assert failed.expression is None
    paths = [tmp_path / "failed.json", tmp_path / "good.json"]
    save_loss(paths[0], kind="regression", expression=None, reason=failed.report["reason"])
    good = parse_expression("square(sub(y, f(x)))")
    save_loss(paths[1], kind="regression", expression=good, scale=0.5)
    assert load(paths[1]).scale == 0.5
    train = {"steps": 30, "num_evaluations": 3}
    columns, metadata = train_model(stage, "evomal", paths, [0, 1], train, [0])
    assert set(columns["search_seed"]) == {1}
    assert metadata["missing"] == [{"search_seed": 0, "reason": "all rejected"}]
    assert sorted({*columns["step"]}) == [0, 10, 20, 30]
    tests = [
        s for s, split in zip(columns["step"], columns["split"], strict=True) if split == "test"
    ]
    assert tests == [30]


def test_the_standard_loss_trains_as_its_formula(stage: StageInput, tmp_path: Path) -> None:
    """Same weights, same batches: squared error as a learned loss gives the baseline's numbers."""
    path = tmp_path / "mse.json"
    save_loss(path, kind="regression", expression=parse_expression("square(sub(y, f(x)))"))
    train = {"steps": 50, "num_evaluations": 2}
    learned, _ = train_model(stage, "evomal", [path], [0], train, [3])
    baseline, _ = train_model(stage, "baseline", [], [], train, [3])
    assert learned["value"] == pytest.approx(baseline["value"], rel=1e-12)


def test_training_seeds_of_one_job_are_those_of_several(stage: StageInput) -> None:
    train = {"steps": 20, "num_evaluations": 1}
    together, metadata = train_model(stage, "baseline", [], [], train, [4, 7])
    alone = [train_model(stage, "baseline", [], [], train, [seed])[0] for seed in (4, 7)]
    assert metadata["train_seeds"] == [4, 7]
    assert together == {name: alone[0][name] + alone[1][name] for name in together}


class _KilledError(Exception):
    pass


def test_a_stopped_training_of_several_seeds_goes_on_exactly(
    stage: StageInput, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed right after its first checkpoint, its second, ...: some are of the first seed, some of the second."""
    train = {"steps": 60, "num_evaluations": 3}
    expected, _ = train_model(stage, "baseline", [], [], train, [0, 1])
    save = Checkpoints.save
    seeds = set()
    for last in itertools.count(1):
        saved = 0

        def save_and_die(self: Checkpoints, state: Any, last: int = last) -> None:
            nonlocal saved
            save(self, state)
            saved += 1
            if saved == last:
                seeds.add(state["train_seed"])
                raise _KilledError

        eager = replace(
            stage, checkpoint_directory=str(tmp_path / str(last)), checkpoint_seconds=0.0
        )
        monkeypatch.setattr(Checkpoints, "save", save_and_die)
        try:
            train_model(eager, "baseline", [], [], train, [0, 1])
        except _KilledError:
            monkeypatch.setattr(Checkpoints, "save", save)
            assert train_model(eager, "baseline", [], [], train, [0, 1])[0] == expected
        else:
            break
    assert seeds == {0, 1}


def test_a_checkpoint_of_other_seeds_is_not_used(stage: StageInput, tmp_path: Path) -> None:
    train = {"steps": 60, "num_evaluations": 3}
    eager = replace(stage, checkpoint_directory=str(tmp_path / "same"), checkpoint_seconds=0.0)
    train_model(eager, "baseline", [], [], train, [0, 1, 4])
    assert list((tmp_path / "same").iterdir())
    expected = train_model(stage, "baseline", [], [], train, [0, 4])
    assert train_model(eager, "baseline", [], [], train, [0, 4])[0] == expected[0]
