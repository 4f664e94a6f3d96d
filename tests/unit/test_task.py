"""Tasks: losses and metrics agree with torch, batched or not; noise touches train alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from evoloss.errors import ConfigError, DataError
from evoloss.tasks import Split, Task, load_task
from evoloss.tasks.datasets import prepare_dataset, save_dataset

NOISE = {"kind": "symmetric", "rate": 0.6}


def make_task(kind: str, num_outputs: int) -> Task:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 3, generator=generator)
    if kind == "regression":
        y = torch.randn(12, num_outputs, generator=generator)
    else:
        y = torch.randint(0, max(2, num_outputs), (12,), generator=generator)
    split = Split(x, y)
    metric, loss = ("mse", "mse") if kind == "regression" else ("error_rate", "cross_entropy")
    return Task("toy", kind, metric, loss, num_outputs, (3,), split, split, split)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("datasets")
    for name in ("diabetes", "surnames"):
        arrays, card = prepare_dataset(name, data_seed=0)
        save_dataset(arrays, card, folder / f"{name}.npz", folder / f"{name}.json")
    return {name: folder / f"{name}.npz" for name in ("diabetes", "surnames")}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("diabetes", ("regression", "mse", "mse", 1, (10,), None)),
        ("surnames", ("classification", "error_rate", "cross_entropy", 20, (16,), 72)),
    ],
)
def test_load_task(name: str, expected: tuple[Any, ...], paths: dict[str, Path]) -> None:
    task = load_task(name, paths[name], label_noise=None, data_seed=0)
    found = (
        task.kind, task.metric, task.task_loss, task.num_outputs, task.input_shape,
        task.vocabulary_size,
    )  # fmt: skip
    assert found == expected
    targets = task.encode_targets(task.validation.y)
    assert targets.shape == (len(task.validation), task.num_outputs)
    assert targets.dtype == torch.float32


def test_noise_touches_training_labels_alone(paths: dict[str, Path]) -> None:
    clean = load_task("t", paths["surnames"], label_noise=None, data_seed=0)
    noisy = load_task("t", paths["surnames"], label_noise=NOISE, data_seed=0)
    again = load_task("t", paths["surnames"], label_noise=NOISE, data_seed=0)
    other = load_task("t", paths["surnames"], label_noise=NOISE, data_seed=1)
    for part in ("validation", "test"):
        assert torch.equal(getattr(clean, part).y, getattr(noisy, part).y)
        assert torch.equal(getattr(clean, part).x, getattr(noisy, part).x)
    assert torch.equal(clean.train.x, noisy.train.x)
    changed = (clean.train.y != noisy.train.y).double().mean().item()
    assert changed == pytest.approx(0.6 * 19 / 20, abs=0.02)
    assert torch.equal(noisy.train.y, again.train.y)
    assert not torch.equal(noisy.train.y, other.train.y)


def test_noise_needs_classes(paths: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="'t': label_noise needs classes"):
        load_task("t", paths["diabetes"], label_noise=NOISE, data_seed=0)


def test_missing_dataset_is_reported(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        load_task("t", tmp_path / "none.npz", label_noise=None, data_seed=0)


def test_classification_agrees_with_torch() -> None:
    task = make_task("classification", 4)
    outputs, y = torch.randn(12, 4, generator=torch.Generator().manual_seed(1)), task.train.y
    assert torch.allclose(task.compute_task_loss(outputs, y), functional.cross_entropy(outputs, y))
    expected = (outputs.argmax(1) != y).float().mean()
    assert task.compute_metric(outputs, y).item() == pytest.approx(expected.item())
    assert torch.allclose(task.activate(outputs), outputs.softmax(-1))
    assert torch.equal(task.encode_targets(y).argmax(-1), y)
    assert task.encode_targets(y, torch.float64).dtype == torch.float64


def test_one_output_means_sigmoid() -> None:
    task = make_task("classification", 1)
    outputs, y = torch.randn(12, 1, generator=torch.Generator().manual_seed(1)), task.train.y
    expected = functional.binary_cross_entropy_with_logits(outputs[:, 0], y.float())
    assert torch.allclose(task.compute_task_loss(outputs, y), expected)
    error = ((task.activate(outputs)[:, 0] > 0.5).long() != y).float().mean()
    assert task.compute_metric(outputs, y).item() == pytest.approx(error.item())
    assert task.encode_targets(y).shape == (12, 1)


def test_regression_agrees_with_torch() -> None:
    task = make_task("regression", 2)
    outputs, y = torch.randn(12, 2, generator=torch.Generator().manual_seed(1)), task.train.y
    expected = functional.mse_loss(outputs, y)
    assert torch.allclose(task.compute_task_loss(outputs, y), expected)
    assert torch.allclose(task.compute_metric(outputs, y), expected)
    assert task.activate(outputs) is outputs
    assert task.encode_targets(y) is y


@pytest.mark.parametrize(
    ("kind", "num_outputs"), [("classification", 4), ("classification", 1), ("regression", 2)]
)
def test_a_population_is_scored_member_by_member(kind: str, num_outputs: int) -> None:
    task = make_task(kind, num_outputs)
    y = task.train.y
    outputs = torch.randn(2, 5, 12, num_outputs, generator=torch.Generator().manual_seed(1))
    for compute in (task.compute_task_loss, task.compute_metric):
        together = compute(outputs, y)
        assert together.shape == (2, 5)
        assert torch.allclose(compute(outputs, y.expand(2, 5, *y.shape)), together)
        assert torch.allclose(compute(outputs[1, 3], y), together[1, 3])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(("kind", "num_outputs"), [("classification", 4), ("regression", 1)])
def test_diverged_models_score_nan(kind: str, num_outputs: int, value: float) -> None:
    task = make_task(kind, num_outputs)
    outputs = torch.zeros(3, 12, num_outputs)
    outputs[1, 5, 0] = value
    score = task.compute_metric(outputs, task.train.y)
    assert score.isnan().tolist() == [False, True, False]


def test_metric_carries_no_gradient() -> None:
    task = make_task("regression", 1)
    outputs = torch.zeros(12, 1, requires_grad=True)
    assert not task.compute_metric(outputs, task.train.y).requires_grad
    assert task.compute_task_loss(outputs, task.train.y).requires_grad


@pytest.mark.parametrize(
    ("kind", "outputs", "targets"),
    [
        ("regression", (12, 1), (12,)),
        ("regression", (12,), (12, 1)),
        ("regression", (12, 2), (12, 1)),
        ("classification", (12, 4), (12, 1)),
        ("classification", (12, 3), (12,)),
        ("classification", (11, 4), (12,)),
    ],
)
def test_misfitting_shapes_are_refused(
    kind: str, outputs: tuple[int, ...], targets: tuple[int, ...]
) -> None:
    task = make_task(kind, 4 if kind == "classification" else 1)
    dtype = torch.int64 if kind == "classification" else torch.float32
    with pytest.raises(DataError, match="do not fit targets"):
        task.compute_task_loss(torch.zeros(outputs), torch.zeros(targets, dtype=dtype))


def test_to_converts_floating_data_alone() -> None:
    task = make_task("classification", 4).to("cpu", torch.float64)
    assert task.train.x.dtype == torch.float64
    assert task.train.y.dtype == torch.int64
    assert isinstance(task.name, str)
    assert np.isfinite(task.train.x.numpy()).all()
