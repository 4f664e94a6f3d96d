"""What to run first on a machine with a GPU: ``python -m benchmarks.gpu_checks --json gpu.json``.

1. *equality*: loss kernels, training and local search give the same on the GPU as on the CPU, in float64;
2. *paths*: how long one generation's training steps and meta-steps take on each path that can do them. The limits
   above which networks are not batched (`evoloss.engine.batched`) are estimates until these numbers replace them;
3. *searches*: whole searches under the paper's settings, LeNet-5 on mnist5k and the MLP on diabetes, by the clock;
4. *large network*: ResNet-18 on images of CIFAR's shape (random ones) under a learned loss, against a plain torch loop.

Exit status 1 if a target is missed. ``--quick`` only shows that everything runs; its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.candidates import draw_candidates
from benchmarks.machine import describe_machine, time_call
from benchmarks.resnet import make_image_task, make_resnet18
from benchmarks.search import read_paper_search, run_search
from benchmarks.timing import summarise
from benchmarks.workloads import make_workload
from evoloss.engine import Engine, LocalSearchSettings, TrainingSettings, choose_device
from evoloss.engine.batched import BatchedPath
from evoloss.engine.cuda_graphs import SWITCH
from evoloss.engine.engine import choose_path
from evoloss.engine.general import GeneralPath
from evoloss.engine.population_loss import PopulationLoss
from evoloss.engine.precision import set_torch_kernels
from evoloss.engine.streams import draw_batches
from evoloss.errors import EvolossError
from evoloss.expressions import Program, compile_weighted_tree, parse_expression
from evoloss.results import write_json

MODELS = ("softmax", "lenet5", "mlp")
SEARCHES = ("lenet5", "mlp")
SEARCH_SECONDS = 300.0
LARGE_SHARE = 0.7
"""Of a plain loop's throughput."""

FORMULAS = (
    "square(sub(y, f(x)))",
    "add(square(sub(y, f(x))), mul(tanh(f(x)), aq(sub(f(x), y), add(y, f(x)))))",
    "add(abs(sub(y, f(x))), min(square(sub(f(x), y)), log(add(1, square(f(x))))))",
)
"""Bounded below and not singular, so that two devices can agree."""

TOLERANCE = 1e-6
CPU = torch.device("cpu")


def compile_formulas() -> list[Program]:
    """Return the fixed losses, with weights away from 1 so that no two arguments of ``min`` are equal."""
    programs = [compile_weighted_tree(parse_expression(text)) for text in FORMULAS]
    rng = np.random.default_rng(0)
    return [
        program.with_loss_params(
            program.loss_params * rng.normal(1, 0.05, len(program.loss_params))
        )
        for program in programs
    ]


def compare_devices(device: torch.device, steps: int) -> dict[str, Any]:
    """Return the largest relative difference between GPU and CPU, by model: phi, and the task loss after training."""
    results = {}
    for name in MODELS:
        workload = make_workload(name)
        found = []
        for where in (CPU, device):
            settings = replace(workload.settings, precision="float64")
            engine = replace(workload, settings=settings).build_engine(where)
            search = LocalSearchSettings(steps, 1, 0.001)
            tuned = engine.local_search(compile_formulas(), search, 0)
            (evaluation,) = engine.train(engine.population_loss(tuned), 4 * steps, 0)
            weights = np.concatenate([program.weights for program in tuned])
            found.append((engine.path.name, weights, evaluation.task_loss))
        phi, task_loss = (
            float(np.abs(a / b - 1).max()) for a, b in zip(found[1][1:], found[0][1:], strict=True)
        )
        results[name] = {
            "path": found[1][0],
            "phi": phi if np.isfinite(phi) else None,
            "task_loss": task_loss if np.isfinite(task_loss) else None,
            "passed": phi < TOLERANCE and task_loss < TOLERANCE,
        }
    return results


@contextmanager
def graphs_switched(switch: str) -> Iterator[None]:
    """Set the switch of CUDA graphs for paths that are made inside, and restore it."""
    before = os.environ.get(SWITCH)
    os.environ[SWITCH] = switch
    try:
        yield
    finally:
        os.environ.pop(SWITCH)
        if before is not None:
            os.environ[SWITCH] = before


def train(programs: list[Program], steps: int, engine: Engine, stream: int) -> None:
    """Train the programs' networks."""
    engine.compute_fitness(programs, steps, stream)


def search(programs: list[Program], steps: int, engine: Engine, stream: int) -> None:
    """Run the programs' local search."""
    engine.local_search(programs, LocalSearchSettings(steps, 1, 0.001), stream)


def compare_phase(
    engines: dict[str, Engine], repeats: int, steps: int, run: Callable[[Engine, int], None]
) -> dict[str, Any]:
    """Return milliseconds a step by engine; they alternate, and a first round warms up."""
    times: dict[str, list[float]] = {label: [] for label in engines}
    for repeat in range(repeats + 1):
        for label, engine in engines.items():
            seconds, _ = time_call(engine.device, partial(run, engine, repeat))
            times[label] += [1e3 * seconds / steps] if repeat else []
    return {label: summarise(values) for label, values in times.items()}


def compare_paths(
    device: torch.device, population: int, steps: int, repeats: int
) -> dict[str, Any]:
    """Return milliseconds of a training step and of a meta-step of the whole population, by model and path."""
    results: dict[str, Any] = {}
    meta_steps = max(1, steps // 10)
    for name in SEARCHES:
        workload = make_workload(name)
        engines: dict[str, Engine] = {"chosen": workload.build_engine(device)}
        for label, kind, switch in (
            ("batched", BatchedPath, "1"),
            ("batched, no graphs", BatchedPath, "0"),
            ("general", GeneralPath, "1"),
        ):
            engines[label] = workload.build_engine(device)
            with graphs_switched(switch):
                path = kind(engines[label].task, engines[label].build_model(0), workload.settings)
            engines[label].path = path
        programs = draw_candidates(engines["chosen"], workload, population, 0)
        results[name] = {
            "chosen": engines["chosen"].path.name,
            "training": compare_phase(engines, repeats, steps, partial(train, programs, steps)),
            "local search": compare_phase(
                engines, repeats, meta_steps, partial(search, programs, meta_steps)
            ),
        }
    return results


def time_searches(device: torch.device, quick: bool) -> dict[str, Any]:
    """Return the wall-clock of whole searches."""
    results = {}
    for name in SEARCHES:
        workload = make_workload(name)
        settings = read_paper_search(workload)
        if quick:
            settings = replace(
                settings,
                population_size=4,
                num_generations=1,
                fitness_steps=4,
                local_search=LocalSearchSettings(2, 1, 0.001),
            )
        result = run_search(workload.build_engine(device), settings, 0)
        results[name] = {**result, "passed": result["seconds"] <= SEARCH_SECONDS}
    return results


def measure_large_network(
    device: torch.device, width: int, batch_size: int, steps: int, repeats: int
) -> dict[str, Any]:
    """Return images a second of the engine under a learned loss and of a plain loop under cross-entropy."""
    task = make_image_task(device, rows=4 * batch_size)
    settings = TrainingSettings(batch_size, 0.01, momentum=0.9, nesterov=True, weight_decay=5e-4)
    model = make_resnet18(task, width).to(device)
    loss = PopulationLoss(task, compile_formulas()[:1], torch.float32)
    targets = task.encode_targets(task.train.y, torch.float32)
    batches = draw_batches(len(task.train), batch_size, steps, 0).to(device)
    path = choose_path(task, model, settings)
    state = path.start([model])
    plain = make_resnet18(task, width).to(device)
    sgd = torch.optim.SGD(
        plain.parameters(), 0.01, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True
    )

    def run_plain() -> None:
        for rows in batches:
            sgd.zero_grad()
            value = nn.functional.cross_entropy(plain(task.train.x[rows]), task.train.y[rows])
            torch.autograd.backward(value)
            sgd.step()

    size = sum(p.numel() for p in model.parameters())
    results: dict[str, Any] = {"path": path.name, "parameters": size}
    for precision in ("float32", "tf32"):
        rates: dict[str, list[float]] = {"engine": [], "plain": []}
        with set_torch_kernels(precision, device):
            for repeat in range(repeats + 1):
                seconds = {
                    "engine": time_call(
                        device,
                        lambda: path.advance(state, loss, task.train.x, targets, batches),
                    )[0],
                    "plain": time_call(device, run_plain)[0],
                }
                for who, spent in seconds.items():
                    rates[who] += [steps * batch_size / spent] if repeat else []
        share = summarise([a / b for a, b in zip(rates["engine"], rates["plain"], strict=True)])
        results[precision] = {
            "images_per_second": {who: summarise(values) for who, values in rates.items()},
            "share": share,
            "passed": share["median"] >= LARGE_SHARE,
        }
    return results


def find_failures(results: Any, place: str = "") -> list[str]:
    """Return where in the results ``passed`` is false."""
    if not isinstance(results, dict):
        return []
    here = [place.strip("/")] if results.get("passed") is False else []
    deeper = (find_failures(value, f"{place}/{key}") for key, value in results.items())
    return here + [failure for failures in deeper for failure in failures]


def main(arguments: Sequence[str]) -> int:
    """Run all checks; return 0, or 1 if a target is missed or nothing can run."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_checks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="cuda", help="cuda, or cpu together with --quick")
    parser.add_argument("--quick", action="store_true", help="does everything run?")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    quick = options.quick
    try:
        device = choose_device(options.device)
        results: dict[str, Any] = {"machine": describe_machine(device)}
        checks: dict[str, Callable[[], dict[str, Any]]] = {
            "equality": lambda: compare_devices(device, 2 if quick else 10),
            "large_network": lambda: (
                measure_large_network(device, 8, 8, 2, 1)
                if quick
                else measure_large_network(device, 64, 128, 30, 5)
            ),
            "paths": lambda: (
                compare_paths(device, 3, 4, 1) if quick else compare_paths(device, 25, 200, 5)
            ),
            "searches": lambda: time_searches(device, quick),
        }
        for name, check in checks.items():
            results[name] = check()
            print(f"{name}\n{json.dumps(results[name], indent=1)}", flush=True)
            if options.json is not None:
                write_json(options.json, results)
    except EvolossError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    failures = find_failures(results)
    print("all targets are met" if not failures else f"missed: {', '.join(failures)}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
