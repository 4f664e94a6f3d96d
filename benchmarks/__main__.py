"""The command line: ``python -m benchmarks --help``."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.accuracy import measure_local_searches, measure_meta_gradients
from benchmarks.machine import describe_machine, find_origin
from benchmarks.plot import draw_scaling
from benchmarks.point import Point, run_point
from benchmarks.racing_workloads import RUNGS
from benchmarks.report import ROW_BY_ROW, format_section, keep_section, update_readme
from benchmarks.scaling import WORKLOADS as SCALED
from benchmarks.scaling import Ranges, measure_scaling
from benchmarks.search import read_paper_search, run_search
from benchmarks.timing import TimingOptions, measure_workload
from benchmarks.workloads import WORKLOADS, make_workload
from benchmarks.xor import NUM_GENERATIONS, make_xor_search
from evoloss.engine import choose_device
from evoloss.engine.racing import RacingSettings
from evoloss.errors import EvolossError
from evoloss.results import read_json

HERE = Path(__file__).parent
XOR_SEARCH = "xor-search"
MEMORY_STEPS = 5

Measure = Callable[[argparse.Namespace, torch.device], Iterator[dict[str, Any]]]
"""Measures what the options ask for; yields results of one section, which are kept as they come."""


def at_least_one(text: str) -> int:
    """Return an option's integer; argparse tells the name where it is refused."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return value


def a_fraction(text: str) -> float:
    """Return an option's number above 0 and at most 1."""
    if not 0 < (value := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return value


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--workloads", nargs="+", choices=[*WORKLOADS, XOR_SEARCH], metavar="NAME",
        help=f"time these against the oracle: {', '.join(WORKLOADS)}; or {XOR_SEARCH} (default: all but the last, "
        "unless something else is asked for)",
    )  # fmt: skip
    parser.add_argument("--search", nargs="+", choices=["softmax", "lenet5", "mlp"], default=[],
                        metavar="NAME", help="run a whole search under the paper's settings")  # fmt: skip
    parser.add_argument("--racing", action="store_true", help="--search with races at "
                        f"{' and '.join(map(str, RUNGS))} of every training")  # fmt: skip
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="SEED",
                        help="of --search: one search for every name and seed (default: 0)")  # fmt: skip
    parser.add_argument("--scaling", action="store_true", help="cost and memory, with a figure")
    parser.add_argument("--accuracy", action="store_true", help="float32 against float64")
    parser.add_argument("--threads", type=at_least_one, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or auto (default: cpu)")
    parser.add_argument(
        "--repeats", type=at_least_one, default=5, help="alternating repeats (default: 5)"
    )
    parser.add_argument(
        "--population", type=at_least_one, help="candidates (default: the workload's own)"
    )
    parser.add_argument("--oracle-candidates", type=at_least_one, default=2,
                        help="candidates that the oracle runs too (default: 2)")  # fmt: skip
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--steps-fraction", type=a_fraction, default=0.1,
                        help="part of the steps that a repeat runs (default: 0.1)")  # fmt: skip
    amount.add_argument("--full", action="store_const", const=1.0, dest="steps_fraction",
                        help="all steps: slow")  # fmt: skip
    amount.add_argument("--quick", action="store_true",
                        help="few steps, candidates and repeats: does it run? (numbers mean little)")  # fmt: skip
    parser.add_argument(
        "--trees", type=at_least_one, default=100, help="regular trees of --accuracy"
    )
    parser.add_argument(
        "--phi-trees", type=at_least_one, default=5, help="of them through a whole local search"
    )
    parser.add_argument("--json", type=Path, help="add the results to this file")
    parser.add_argument("--update-readme", action="store_true",
                        help="write the tables of --json FILE into benchmarks/README.md")  # fmt: skip
    options = parser.parse_args(arguments)
    if options.update_readme and options.json is None:
        parser.error("--update-readme needs --json FILE")
    if options.quick:
        options.repeats, options.population, options.steps_fraction = 2, 4, 0.01
        options.trees, options.phi_trees = 3, 1
    asked = options.search or options.scaling or options.accuracy or options.update_readme
    if options.workloads is None:
        options.workloads = [] if asked else list(WORKLOADS)
    return options


def measure_workloads(
    options: argparse.Namespace, device: torch.device
) -> Iterator[dict[str, Any]]:
    """Yield the times of the chosen workloads."""
    timing = TimingOptions(
        options.repeats, options.steps_fraction, options.population, options.oracle_candidates
    )
    results = {}
    for name in options.workloads:
        if name != XOR_SEARCH:
            results[name] = measure_workload(make_workload(name), device, timing)
            population = results[name]["population"]
            point = Point(name, population, MEMORY_STEPS, options.threads, options.device)
            results[name]["peak_memory"] = run_point(point)["peak_memory"]
    yield results


def measure_searches(options: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    """Yield the wall-clock of the chosen whole searches, one after the other: they are long."""
    origin = find_origin(describe_machine(device))
    for name in options.search:
        workload = make_workload(name)
        engine = workload.build_engine(device)
        settings = read_paper_search(workload)
        if options.racing:
            settings = replace(settings, racing=RacingSettings(RUNGS))
            name = f"{name}, racing"
        for seed in options.seeds:
            yield {f"{name}, seed {seed}": {**origin, **run_search(engine, settings, seed)}}
    if XOR_SEARCH in options.workloads:
        workload = make_workload("xor")
        population = options.population or workload.population
        generations = 2 if options.quick else NUM_GENERATIONS
        engine = workload.build_engine(device)
        search = make_xor_search(population, generations)
        yield {XOR_SEARCH: {**origin, **run_search(engine, search, 0)}}


def measure_accuracy(options: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    """Yield the float32 errors of the paper's models."""
    steps = 5 if options.quick else None
    results = {}
    for name in ("softmax",) if options.quick else ("softmax", "lenet5", "mlp"):
        workload = make_workload(name)
        results[name] = {
            "meta_gradient": measure_meta_gradients(workload, device, options.trees),
            "phi": measure_local_searches(workload, device, options.phi_trees, steps),
        }
    yield results


def measure_all_scaling(
    options: argparse.Namespace, device: torch.device
) -> Iterator[dict[str, Any]]:
    """Yield the scaling of the small workloads, and draw it where the results are kept."""
    ranges = Ranges((4, 8), (2, 4), ((5, 8), (10, 16))) if options.quick else Ranges()
    base = Point(
        "", options.population or 25, 4 if options.quick else 20, options.threads, device.type
    )
    names = SCALED[:1] if options.quick else SCALED
    results = {
        name: measure_scaling(Point(**{**vars(base), "workload": name}), ranges) for name in names
    }
    if options.json is not None:
        folder = options.json.parent
        draw_scaling(results, folder / "scaling.svg", folder / "scaling.png")
    yield results


def main(arguments: Sequence[str]) -> int:
    """Measure what is asked for; return 0, or 1 after an error's one sentence."""
    options = parse_arguments(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    measures: dict[str, Measure | None] = {
        "workloads": measure_workloads if set(options.workloads) - {XOR_SEARCH} else None,
        "searches": measure_searches if options.search or XOR_SEARCH in options.workloads else None,
        "accuracy": measure_accuracy if options.accuracy else None,
        "scaling": measure_all_scaling if options.scaling else None,
    }
    try:
        torch.set_num_threads(options.threads)
        device = choose_device(options.device)
        for name, measure in measures.items():
            if measure is None:
                continue
            machine = describe_machine(device)
            for results in measure(options, device):
                section = {"machine": machine, "results": results}
                print(format_section(name, section), end="\n\n", flush=True)
                if options.json is not None:
                    keep_section(options.json, name, section, merge=name in ROW_BY_ROW)
        if options.update_readme:
            update_readme(HERE / "README.md", read_json(options.json))
    except EvolossError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
