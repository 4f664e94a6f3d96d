"""The parts of the GPU checks that need no GPU."""

from __future__ import annotations

import torch

from benchmarks.gpu_checks import compile_formulas, find_failures, measure_large_network
from benchmarks.resnet import make_image_task, make_resnet18
from evoloss.engine import Engine, TrainingSettings
from evoloss.engine.batched import MAX_ACTIVATIONS, MAX_PARAMETERS, BatchedPath, count_activations
from evoloss.engine.general import GeneralPath

CPU = torch.device("cpu")


def test_resnet18_is_beyond_the_limits_of_batching() -> None:
    task = make_image_task(CPU, rows=4)
    model = make_resnet18(task)
    size = sum(p.numel() for p in model.parameters())
    assert 11.1e6 < size < 11.3e6  # 11.17 million, He et al. 2016 with 10 classes
    assert size > MAX_PARAMETERS
    assert count_activations(model, task.train.x, 128) > MAX_ACTIVATIONS


def test_large_network_is_measured() -> None:
    results = measure_large_network(CPU, width=8, batch_size=4, steps=1, repeats=1)
    assert results["path"] == "general"
    for precision in ("float32", "tf32"):
        rates = results[precision]["images_per_second"]
        share = rates["engine"]["median"] / rates["plain"]["median"]
        assert results[precision]["share"]["median"] == share


def test_batched_path_trains_a_small_resnet_as_the_general_path_does() -> None:
    task = make_image_task(CPU, rows=8).to(CPU, torch.float64)
    settings = TrainingSettings(4, 0.05, momentum=0.9, nesterov=True, precision="float64")
    model = make_resnet18(task, width=8).double()
    loss = Engine(task, "linear", settings, CPU).population_loss(compile_formulas())
    targets = task.encode_targets(task.train.y, torch.float64)
    outputs = []
    for path in (BatchedPath(task, model, settings), GeneralPath(task, model, settings)):
        state = path.start([model] * loss.size)
        path.advance(state, loss, task.train.x, targets, torch.tensor([[0, 1, 2], [3, 4, 5]]))
        outputs.append(path.outputs(state, task.test.x))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-8, atol=1e-8)


def test_missed_targets_are_found_wherever_they_are() -> None:
    results = {"a": {"passed": True, "b": {"passed": False}}, "c": {"passed": False}, "d": 1}
    assert find_failures(results) == ["a/b", "c"]
