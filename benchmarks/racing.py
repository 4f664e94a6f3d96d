"""Racing on against off: what it does to the losses that a search finds. ``python -m benchmarks.racing --help``.

For every seed one search without racing, and one with it that goes on until it has had as many training steps and as
much time too. Steps tell what racing is worth where training is nearly all of the time, whatever the machine. Time is
processor time on one thread, because a shared machine's clock counts the others' work. A loss's test error is the mean
over trainings as long as the fitness's; differences are with racing minus without, of the same seed.
"""

from __future__ import annotations

import argparse
import logging
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from benchmarks.machine import describe_machine
from benchmarks.racing_workloads import RUNGS, WORKLOADS
from benchmarks.report import format_section, keep_section
from benchmarks.search import count_trainings
from benchmarks.tournaments import count_changed, list_tournaments
from evoloss.engine import Engine
from evoloss.engine.racing import RacingSettings
from evoloss.expressions import compile_expression, parse_expression
from evoloss.search.archive import Archive
from evoloss.search.gp_search import GPSearch
from evoloss.search.settings import SearchSettings

logger = logging.getLogger(__name__)

Row = dict[str, Any]
MOST_GENERATIONS = 4
"""A search with racing ends after so many times the generations of the one without, even with budget left by then."""

BUDGETS = {"equal_generations": "generation", "equal_steps": "steps", "equal_time": "cpu_seconds"}
"""What searches are compared at: the key of a history row that counts it."""


class _EnoughError(Exception):
    """Ends a search that has had its generations, its training steps and its time."""


def run_search(search: GPSearch, enough: Callable[[Row], bool] = lambda row: False) -> list[Row]:
    """Return the history; it ends once a row is ``enough``.

    Rows also have ``cpu_seconds`` and ``steps``, summed so far, ``tournaments``, which the generation's are, and
    ``waiting``, the keys of the losses that are stopped by then; their gradient twins do not count.
    """
    rows: list[Row] = []
    started = time.process_time()

    def keep(row: Row) -> None:
        steps = row["training_steps"] + (rows[-1]["steps"] if rows else 0)
        more = {"cpu_seconds": time.process_time() - started, "steps": steps}
        lists = {"tournaments": list_tournaments(search), "waiting": list_waiting(search.archive)}
        rows.append({**row, **more, **lists})
        if enough(rows[-1]):
            raise _EnoughError

    try:
        search.run(keep)
    except _EnoughError:
        logger.debug("enough after generation %d", rows[-1]["generation"])
    return rows


def list_waiting(archive: Archive) -> list[str]:
    """Return the keys of the losses that were not trained to the end, without their gradient twins."""
    return [k for k, record in archive.records.items() if record.spared and record.twin_of is None]


def find_true_fitness(
    engine: Engine, archive: Archive, num_steps: int, seed: int, num_networks: int = 1
) -> dict[str, float]:
    """Return by key what every loss's fitness is, or would be after the full training, which this runs."""
    waiting = list_waiting(archive)
    programs = [compile_expression(archive.records[key].expression) for key in waiting]
    trained = engine.compute_fitness(
        programs, num_steps, seed, "fitness", num_networks=num_networks
    )
    known = dict(zip(waiting, trained.tolist(), strict=True))
    return {
        key: known.get(archive.find_owner(key), record.fitness)
        for key, record in archive.records.items()
    }


def describe(
    engine: Engine,
    rows: Sequence[Row],
    num_steps: int,
    trainings: int,
    true_fitness: Mapping[str, float] = MappingProxyType({}),
) -> Row:
    """Return fitness and test error of the best loss after the last of ``rows``, and what it took to find.

    ``true_fitness`` is `find_true_fitness`'s. ``missed`` counts the losses that were stopped by then and are better
    than the best one, ``tournaments_changed`` the tournaments that would have had another winner.
    """
    best = rows[-1]
    tournaments = [t for row in rows for t in row["tournaments"]]
    trained = count_trainings(rows)
    errors = [float("nan")]
    if best["best_expression"]:
        loss = engine.population_loss(
            [compile_expression(parse_expression(best["best_expression"]))]
        )
        errors = [
            float(next(iter(engine.train(loss, num_steps, t, "test", splits=["test"]))).metric[0])
            for t in range(trainings)
        ]
    return {
        "generation": best["generation"],
        "cpu_seconds": best["cpu_seconds"],
        "fitness": best["best_fitness"],
        "test_error": statistics.fmean(errors),
        "complexity": best["best_complexity"],
        "candidates_trained": trained,
        "stopped": sum(row["stopped"] for row in rows),
        "missed": sum(true_fitness[key] < best["best_fitness"] for key in best["waiting"]),
        "tournaments": len(tournaments),
        "tournaments_changed": count_changed(tournaments, true_fitness),
        "share_of_steps_spared": 1 - sum(r["training_steps"] for r in rows) / (trained * num_steps)
        if trained
        else 0.0,
    }


def compare(
    engine: Engine, settings: SearchSettings, racing: RacingSettings, seed: int, trainings: int = 5
) -> dict[str, Row]:
    """Search without and with racing; return what each had found: ``off`` and, with racing, at equal `BUDGETS`."""
    generations, num_steps = settings.num_generations, settings.fitness_steps
    off = run_search(GPSearch(engine, replace(settings, racing=RacingSettings()), seed))
    budgets = {budget: off[-1][key] for budget, key in BUDGETS.items()}
    longer = replace(settings, racing=racing, num_generations=MOST_GENERATIONS * generations)
    search = GPSearch(engine, longer, seed)
    on = run_search(
        search, lambda row: all(row[key] >= budgets[budget] for budget, key in BUDGETS.items())
    )
    known = find_true_fitness(engine, search.archive, num_steps, seed, settings.num_networks)
    histories = {"off": off}
    for budget, key in BUDGETS.items():
        histories[budget] = [row for row in on if row[key] <= budgets[budget]] or on[:1]
    return {
        name: describe(engine, rows, num_steps, trainings, {} if name == "off" else known)
        for name, rows in histories.items()
    }


def summarise(results: Sequence[dict[str, Row]]) -> dict[str, dict[str, Any]]:
    """Return differences to ``off`` (see `summarise_differences`), mean savings, sums of who was stopped."""
    summary: dict[str, dict[str, Any]] = {}
    for name in (name for name in results[0] if name != "off"):
        summary[name] = {
            key: summarise_differences([r[name][key] - r["off"][key] for r in results])
            for key in ("fitness", "test_error")
        }
        summary[name]["share_of_steps_spared"] = statistics.fmean(
            r[name]["share_of_steps_spared"] for r in results
        )
        summary[name]["time_ratio"] = statistics.fmean(
            r[name]["cpu_seconds"] / r["off"]["cpu_seconds"] for r in results
        )
        for key in ("stopped", "missed", "tournaments", "tournaments_changed"):
            summary[name][key] = sum(r[name][key] for r in results)
    return summary


def summarise_differences(values: Sequence[float]) -> dict[str, float | None]:
    """Return what the table shows of one difference per seed; negative is better.

    ``left_out`` counts those that are not finite: a search found no loss, or a test training diverged. What too few
    finite ones do not tell is None.
    """
    fine = [value for value in values if math.isfinite(value)]
    return {
        "mean": statistics.fmean(fine) if fine else None,
        "standard_error": statistics.stdev(fine) / len(fine) ** 0.5 if len(fine) > 1 else None,
        "median": statistics.median(fine) if fine else None,
        "min": min(fine, default=None),
        "max": max(fine, default=None),
        "better": sum(value < 0 for value in fine),
        "worse": sum(value > 0 for value in fine),
        "left_out": len(values) - len(fine),
    }


def replace_nan(row: Row) -> Row:
    """Return a row whose numbers that are not finite are None, as JSON has no others."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in row.items()
    }


def cut_down(settings: SearchSettings, options: argparse.Namespace) -> SearchSettings:
    """Return the search with the budgets that were given on the command line."""
    names = {"num_generations": options.generations, "fitness_steps": options.fitness_steps}
    given: dict[str, Any] = {name: value for name, value in names.items() if value is not None}
    local = settings.local_search
    if options.meta_steps == 0:
        given |= {"local_search": None, "initial_deviation": 0.0}
    elif options.meta_steps is not None and local is not None:
        given["local_search"] = replace(local, meta_steps=options.meta_steps)
    return replace(settings, **given)


def add_budget_options(parser: argparse.ArgumentParser) -> None:
    """Add what `cut_down` reads, the rungs, and the results' file."""
    parser.add_argument("--generations", type=int, help="instead of the workload's own number")
    parser.add_argument("--meta-steps", type=int, help="of the local search, likewise; 0: none")
    parser.add_argument("--fitness-steps", type=int, help="likewise")
    parser.add_argument("--rungs", type=float, nargs="+", default=RUNGS, help="above 0, below 1")
    parser.add_argument("--json", type=Path, help="add the results to this file")


def start(
    parser: argparse.ArgumentParser, options: argparse.Namespace
) -> tuple[RacingSettings, dict[str, Any]]:
    """Set logging and one thread; return what to race by and a description of the machine."""
    try:
        racing = RacingSettings(tuple(options.rungs))
    except ValueError as error:
        parser.error(f"--rungs: {error}")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    torch.set_num_threads(1)
    logging.getLogger("evoloss").setLevel(logging.WARNING)
    return racing, describe_machine(torch.device("cpu"))


def main(arguments: Sequence[str]) -> int:
    """Measure, print a table for every workload, and add it to the JSON file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.racing", description=__doc__)
    small = ["softmax-noisy", "small-mlp"]
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=small)
    parser.add_argument(
        "--num-seeds", type=int, default=6, help="searches of each kind (default: 6)"
    )
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--learning-rate", type=float, help="of the base models, likewise")
    add_budget_options(parser)
    options = parser.parse_args(arguments)
    if options.num_seeds < 2:
        parser.error(f"--num-seeds is {options.num_seeds}; a comparison needs at least 2")
    racing, machine = start(parser, options)
    for name in options.workloads:
        workload = WORKLOADS[name]()
        if options.learning_rate is not None:
            training = replace(workload.settings, learning_rate=options.learning_rate)
            workload = replace(workload, settings=training)
        engine, settings = workload.build_engine(), cut_down(workload.search, options)
        # compiles the kernels and starts the libraries, which the first search would pay for alone
        run_search(GPSearch(engine, replace(settings, num_generations=1), options.first_seed))
        seeds = []
        for seed in range(options.first_seed, options.first_seed + options.num_seeds):
            seeds.append(compare(engine, settings, racing, seed))
            logger.info("%s, seed %d: %s", name, seed, seeds[-1])
        search = asdict(replace(settings, racing=racing))
        found = {
            "search": search,
            "training": asdict(workload.settings),
            "summary": summarise(seeds),
            "seeds": [
                {budget: replace_nan(row) for budget, row in result.items()} for result in seeds
            ],
        }
        section = {"machine": machine, "results": {name: found}}
        sys.stdout.write(format_section("racing", section) + "\n\n")
        if options.json is not None:
            keep_section(options.json, "racing", section, merge=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
