"""The engine against plain autograd: training, meta-gradients, paths, filters."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional
from toy_tasks import make_toy_task

import oracle
from evoloss.engine import Engine, LocalSearchSettings, PopulationLoss, TaskLoss, TrainingSettings
from evoloss.engine.filters import RejectionSettings, has_zero_gradient, run_rejection_protocol
from evoloss.engine.general import GeneralPath
from evoloss.engine.linear import LinearPath, find_linear_layer
from evoloss.engine.streams import draw_batches
from evoloss.errors import ConfigError
from evoloss.expressions import Program, compile_weighted_tree, parse_expression
from evoloss.tasks import Split, Task

CPU = torch.device("cpu")
PLAIN = TrainingSettings(16, 0.05, precision="float64")
NESTEROV = replace(PLAIN, momentum=0.9, nesterov=True, weight_decay=5e-3)
HEAVY_BALL = replace(PLAIN, momentum=0.8)
# none of them is singular where the toy tasks evaluate it
FORMULAS = (
    "mul(-1, mul(y, log(f(x))))",
    "square(sub(y, f(x)))",
    "add(mul(square(sub(y, f(x))), tanh(f(x))), aq(sub(f(x), y), add(y, f(x))))",
)


def weighted(formula: str, seed: int = 1) -> Program:
    program = compile_weighted_tree(parse_expression(formula))
    noise = np.random.default_rng(seed).normal(0, 0.05, len(program.loss_params))
    return program.with_loss_params(program.loss_params * (1 + noise))


def make_task(model: str) -> Task:
    if model == "lenet5":
        return make_toy_task(input_shape=(1, 28, 28), rows=20)
    if model in ("char_cnn", "gru"):
        return make_toy_task(input_shape=(16,), vocabulary_size=12, rows=20)
    if model == "mlp":
        return make_toy_task("regression", num_outputs=1, rows=20)
    return make_toy_task()


@pytest.mark.parametrize(
    "settings", [PLAIN, HEAVY_BALL, NESTEROV], ids=["sgd", "heavy", "nesterov"]
)
@pytest.mark.parametrize("inner_steps", [1, 2, 3])
@pytest.mark.parametrize("model_name", ["linear", "mlp", "lenet5", "char_cnn", "gru"])
def test_meta_gradient_equals_double_backprop(
    model_name: str, inner_steps: int, settings: TrainingSettings
) -> None:
    task = make_task(model_name)
    engine = Engine(task, model_name, settings, CPU)
    programs = [weighted(formula) for formula in FORMULAS[model_name == "mlp" :]]
    loss = engine.population_loss(programs)
    rows = torch.arange(9).reshape(3, 3)
    inner = [engine.batch("train", rows[i]) for i in range(inner_steps)]
    outer = engine.batch("validation", torch.arange(4))
    model = engine.build_model(3)
    values, gradient = engine.meta_gradients(engine.prepare(model, inner, outer), loss)
    for p, program in enumerate(programs):
        value, expected = oracle.compute_meta_gradient(
            task, engine.build_model(3), program, settings,
            [(b.x, b.y) for b in inner], (outer.x, outer.y),
        )  # fmt: skip
        assert values[p] == pytest.approx(value, rel=1e-9)
        found = gradient[loss.offsets[p] : loss.offsets[p + 1]]
        error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
        assert error < 1e-8, (FORMULAS[p], error)


def test_meta_gradient_equals_finite_differences() -> None:
    task = make_toy_task("regression", num_outputs=2)
    engine = Engine(task, "linear", NESTEROV, CPU)
    program = weighted(FORMULAS[2])
    inner, outer = (
        engine.batch("train", torch.arange(16)),
        engine.batch("validation", torch.arange(9)),
    )

    def value(phi: np.ndarray) -> float:
        moved = program.with_loss_params(phi)
        model = engine.build_model(0)
        return float(
            engine.meta_gradients(
                engine.prepare(model, [inner], outer), engine.population_loss([moved])
            )[0][0]
        )

    loss = engine.population_loss([program])
    context = engine.prepare(engine.build_model(0), [inner], outer)
    _, gradient = engine.meta_gradients(context, loss)
    phi = program.loss_params
    for i, step in enumerate(np.eye(len(phi)) * 1e-6):
        slope = (value(phi + step) - value(phi - step)) / 2e-6
        assert slope == pytest.approx(gradient[program.trainable][i], rel=1e-5, abs=1e-9)


def test_meta_gradient_of_a_quadratic_in_closed_form() -> None:
    """One weight, f = theta x, M = w (y - f)^2, one sample: everything by hand."""
    x, y, xv, yv, rate = 1.5, 2.0, -0.5, 0.7, 0.05
    base = make_toy_task("regression", input_shape=(1,), num_outputs=1)

    def split(a: float, b: float) -> Split:
        return Split(
            torch.tensor([[a]], dtype=torch.float64), torch.tensor([[b]], dtype=torch.float64)
        )

    task = replace(base, train=split(x, y), validation=split(xv, yv))
    engine = Engine(task, "linear", replace(PLAIN, learning_rate=rate), CPU)
    program = compile_weighted_tree(parse_expression("square(sub(y, f(x)))"))
    model = engine.build_model(0)
    layer = find_linear_layer(model)
    assert layer is not None
    theta, bias = layer.weight.item(), layer.bias.item()
    error = theta * x + bias - y
    moved = [theta - rate * 2 * error * x, bias - rate * 2 * error]
    outer_error = moved[0] * xv + moved[1] - yv
    # the weight of the edge into `square` is w, and M = (w (y - f))^2: dM/dtheta = 2 w^2 error x
    expected = 2 * outer_error * (xv * (-rate * 4 * error * x) + (-rate * 4 * error))
    rows = torch.zeros(1, dtype=torch.int64)
    loss = engine.population_loss([program])
    context = engine.prepare(model, [engine.batch("train", rows)], engine.batch("validation", rows))
    _, gradient = engine.meta_gradients(context, loss)
    assert gradient[len(program) - 2] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    "settings", [PLAIN, HEAVY_BALL, NESTEROV], ids=["sgd", "heavy", "nesterov"]
)
@pytest.mark.parametrize("model_name", ["linear", "lenet5"])
def test_training_equals_torch_sgd(model_name: str, settings: TrainingSettings) -> None:
    task = make_task(model_name)
    engine = Engine(task, model_name, settings, CPU)
    programs = [weighted(formula) for formula in FORMULAS]
    found = list(engine.train(engine.population_loss(programs), 7, 5, splits=("test",)))[-1]
    batches = draw_batches(len(task.train.y), settings.batch_size, 7, 5, "batches")
    for p, program in enumerate(programs):
        model = engine.build_model(5)
        oracle.train(task, model, program, settings, batches)
        metric, task_loss = oracle.measure(task, model, (task.test.x, task.test.y))
        assert found.metric[p] == pytest.approx(metric)
        assert found.task_loss[p] == pytest.approx(task_loss, rel=1e-9)


@pytest.mark.parametrize("settings", [PLAIN, NESTEROV], ids=["sgd", "nesterov"])
def test_linear_path_equals_general_path(settings: TrainingSettings) -> None:
    task = make_toy_task()
    results = []
    for path in (LinearPath, GeneralPath):
        engine = Engine(task, "linear", settings, CPU)
        engine.path = path(engine.task, engine.build_model(0), settings)
        programs = [weighted(formula) for formula in FORMULAS]
        tuned = engine.local_search(programs, LocalSearchSettings(6, 1, 0.01), 2)
        evaluation = list(engine.train(engine.population_loss(tuned), 20, 1))[-1]
        results.append((np.concatenate([t.weights for t in tuned]), evaluation.task_loss))
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-9)
    np.testing.assert_allclose(results[0][1], results[1][1], rtol=1e-9)


@pytest.mark.parametrize(("kind", "outputs"), [("classification", 4), ("regression", 2)])
def test_task_loss_is_torchs_own(kind: str, outputs: int) -> None:
    task = make_toy_task(kind, num_outputs=outputs)
    z = torch.randn(2, 60, outputs, dtype=torch.float64, requires_grad=True)
    y = task.train.y
    own = TaskLoss(task, 2).output_gradients(z.detach(), task.encode_targets(y, torch.float64))
    measure = functional.mse_loss if kind == "regression" else functional.cross_entropy
    expected = torch.stack([torch.autograd.grad(measure(z[p], y), z)[0][p] for p in range(2)])
    torch.testing.assert_close(own, expected)


def test_candidates_do_not_depend_on_their_company() -> None:
    engine = Engine(make_task("lenet5"), "lenet5", PLAIN, CPU)
    programs = [weighted(formula) for formula in FORMULAS]
    together = engine.compute_fitness(programs, 3, 0)
    alone = [engine.compute_fitness([program], 3, 0)[0] for program in programs]
    assert together.tolist() == alone


def test_local_search_lowers_the_outer_objective() -> None:
    engine = Engine(make_toy_task(), "linear", replace(PLAIN, learning_rate=0.1), CPU)

    def search(program: Program, rate: float) -> tuple[Program, float]:
        outer: list[float] = []
        settings = LocalSearchSettings(200, 1, rate)
        (tuned,) = engine.local_search(
            [program], settings, 0, on_step=lambda step, values, _: outer.append(float(values[0]))
        )
        return tuned, float(np.mean(outer))

    start = weighted("square(sub(y, f(x)))")
    tuned, _ = search(start, 0.03)
    # a rate of (almost) zero measures the objective on the same initial weights and batches
    assert search(tuned, 1e-15)[1] < search(start, 1e-15)[1] - 0.01


@pytest.mark.parametrize("model", ["linear", "mlp"])
def test_divergence_ends_a_candidate_never_its_neighbours(model: str) -> None:
    task = make_toy_task("regression", num_outputs=1)
    engine = Engine(task, model, replace(PLAIN, learning_rate=1e3), CPU)
    bad = weighted("square(square(sub(f(x), y)))")
    good = weighted("mul(1e-9, sub(f(x), y))")
    fitness = engine.compute_fitness([bad, good], 30, 0)
    assert np.isnan(fitness[0])
    assert np.isfinite(fitness[1])


def test_batches_are_epochs_of_permutations() -> None:
    batches = draw_batches(50, 16, 7, 3, "batches")
    assert batches.shape == (7, 16)
    for epoch in (batches[0:3], batches[3:6]):
        assert len(set(epoch.flatten().tolist())) == 48
    assert torch.equal(batches, draw_batches(50, 16, 7, 3, "batches"))
    assert not torch.equal(batches, draw_batches(50, 16, 7, 4, "batches"))
    assert draw_batches(10, 16, 2, 0).shape == (2, 10)


REJECTION = RejectionSettings(steps=200, sample=40, learning_rate=0.05, gradient_digits=2)


@pytest.mark.parametrize(
    ("formula", "rejected"),
    [
        ("mul(-1, mul(y, log(f(x))))", False),
        ("square(sub(y, f(x)))", False),
        ("mul(y, log(f(x)))", True),
        ("mul(sub(y, y), f(x))", True),
        ("mul(1e200, mul(y, square(square(mul(1e200, f(x))))))", True),
    ],
)
def test_rejection_protocol(formula: str, rejected: bool) -> None:
    engine = Engine(make_toy_task(), "linear", PLAIN, CPU)
    programs = [compile_weighted_tree(parse_expression(formula))]
    result = run_rejection_protocol(engine, programs, REJECTION, 0)
    assert result.rejected.tolist() == [rejected]


def test_gradient_fingerprint_sees_equal_gradients_only() -> None:
    engine = Engine(make_toy_task(), "linear", PLAIN, CPU)
    formulas = ["square(sub(y, f(x)))", "square(sub(f(x), y))", "abs(sub(y, f(x)))"]
    programs = [compile_weighted_tree(parse_expression(formula)) for formula in formulas]
    keys = run_rejection_protocol(engine, programs, REJECTION, 0).gradient_keys
    assert keys[0] == keys[1] != keys[2]


def test_gradient_fingerprint_keeps_the_sign() -> None:
    """With one output the norm of the gradient of every |g(y) - f(x)| is 1; the losses are not the same."""
    engine = Engine(make_toy_task("regression", num_outputs=1), "linear", PLAIN, CPU)
    formulas = [
        "abs(sub(y, f(x)))",
        "abs(sub(add(y, y), f(x)))",
        "abs(sub(sub(y, 1), f(x)))",
        "sub(y, f(x))",
    ]
    programs = [compile_weighted_tree(parse_expression(formula)) for formula in formulas]
    keys = run_rejection_protocol(engine, programs, REJECTION, 0).gradient_keys
    assert len(set(keys)) == len(keys)


def test_a_lucky_start_rejects_no_good_loss() -> None:
    """Where the untrained network has no error on the sample, the task loss tells what improves."""
    task = make_toy_task(rows=60)
    engine = Engine(task, "linear", PLAIN, CPU)
    model = engine.build_model(0, "rejection")
    lucky = model(engine.task.train.x).argmax(1)
    task = replace(engine.task, train=Split(engine.task.train.x, lucky))
    engine = Engine(task, "linear", PLAIN, CPU)
    programs = [
        compile_weighted_tree(parse_expression(text))
        for text in ("square(sub(y, f(x)))", "mul(y, log(f(x)))")
    ]
    result = run_rejection_protocol(engine, programs, REJECTION, 0)
    assert result.rejected.tolist() == [False, True]


def test_structurally_zero_gradient() -> None:
    assert has_zero_gradient(parse_expression("add(y, sign(sub(f(x), y)))"))
    assert not has_zero_gradient(parse_expression("add(f(x), sign(sub(f(x), y)))"))


def test_unusable_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="nesterov needs"):
        TrainingSettings(8, 0.1, nesterov=True)
    with pytest.raises(ConfigError, match=r"precision.*float32"):
        TrainingSettings(8, 0.1, precision="float16")


def test_losses_of_outputs_with_gaps_in_memory() -> None:
    """As a model returns them whose last step is a view, e.g. ``h[:, -1]``."""
    task = make_toy_task("regression", num_outputs=1)
    loss = PopulationLoss(task, [weighted("square(sub(y, f(x)))", 0)], torch.float64)
    steps = torch.rand(8, 5, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    outputs, targets = steps[:, -1].unsqueeze(0), torch.zeros(8, 1, dtype=torch.float64)
    assert not outputs.flatten(1).is_contiguous()
    found = loss.output_gradients(outputs, targets)
    torch.testing.assert_close(found, loss.output_gradients(outputs.contiguous(), targets))


def test_autograd_fallback_equals_the_kernels() -> None:
    """What runs on a GPU, run here: the torch form of the population's derivatives."""
    task = make_toy_task()
    programs = [weighted(formula) for formula in FORMULAS]
    loss = PopulationLoss(task, programs, torch.float64)
    z = torch.randn(1, 60, 3, dtype=torch.float64)
    targets = task.encode_targets(task.train.y, torch.float64)
    direction = torch.randn(3, 60, 3, dtype=torch.float64)
    torch.testing.assert_close(
        loss.prediction_gradients_by_autograd(task.activate(z), targets),
        loss.prediction_gradients(task.activate(z), targets),
    )
    np.testing.assert_allclose(
        loss.weight_gradients_by_autograd(task.activate(z), targets, direction),
        loss.weight_gradients_by_kernel(task.activate(z), targets, direction),
        rtol=1e-10,
        atol=1e-12,
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("model_name", ["linear", "lenet5", "gru"])
def test_cuda_equals_cpu(model_name: str) -> None:
    results = []
    for device in (CPU, torch.device("cuda")):
        engine = Engine(make_task(model_name), model_name, NESTEROV, device)
        programs = [weighted(formula) for formula in FORMULAS]
        tuned = engine.local_search(programs, LocalSearchSettings(3, 1, 0.01), 0)
        tuned = engine.local_search(tuned, LocalSearchSettings(2, 2, 0.01), 0)
        rejection = run_rejection_protocol(engine, tuned, REJECTION, 0)
        evaluation = list(engine.train(engine.population_loss(tuned), 6, 0))[-1]
        weights = np.concatenate([program.weights for program in tuned])
        results.append((weights, rejection.rejected, evaluation.task_loss))
    for cpu, cuda in zip(*results, strict=True):
        np.testing.assert_allclose(cpu, cuda, rtol=1e-6)
