"""Racing replayed: what it changes in a search of the paper's size, for the price of one. ``--help`` has the options.

A search without racing is recorded: every local search, and every candidate's validation metric at the rungs. Then the
same search runs with racing, and takes its trainings from the record. That is exact where a training does not depend on
who trains beside it, as LeNet-5's and the large MLP's do not; what the search without racing did not need, if racing
makes it go another way, is run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import evoloss
from benchmarks.machine import find_origin
from benchmarks.racing import Row, add_budget_options, cut_down, run_search, start
from benchmarks.racing_workloads import WORKLOADS, RacingWorkload
from benchmarks.report import format_section, keep_section
from benchmarks.search import count_work
from evoloss.engine import Engine, LocalSearchSettings, TrainingRun
from evoloss.engine.population_loss import OutputLoss, PopulationLoss
from evoloss.engine.racing import RacingSettings
from evoloss.engine.training_run import Evaluation
from evoloss.errors import DataError
from evoloss.expressions import Program
from evoloss.results import read_json, write_json
from evoloss.search.gp_search import GPSearch
from evoloss.search.settings import SearchSettings

logger = logging.getLogger(__name__)

Record = dict[str, dict[str, Any]]
"""By loss: ``tuned``, its weights after the local search; ``metrics`` by step, None where training diverged.

``of`` tells what search it is of.
"""


def find_key(program: Program) -> str:
    """Return what tells a program from all others, its weights to the last bit."""
    arrays = (program.ops, program.a, program.b, program.weights, program.trainable)
    return hashlib.sha256(b"|".join(a.tobytes() for a in arrays)).hexdigest()[:32]


class RecordedRun(TrainingRun):
    """A training whose validation metrics at the ``rungs``, and at no other step, come from a record.

    The losses that it lacks are trained first, to the end.
    """

    def __init__(
        self, engine: Engine, loss: PopulationLoss, record: Record, rungs: Sequence[int], *stream: int | str
    ) -> None:  # fmt: skip
        super().__init__(engine, loss, rungs[-1], *stream)
        self._metrics: dict[str, dict[str, float | None]] = record["metrics"]
        new = [p for p in loss.programs if find_key(p) not in self._metrics]
        if not new:
            return
        run = TrainingRun(engine, engine.population_loss(new), rungs[-1], *stream)
        found: dict[str, dict[str, float | None]] = {find_key(program): {} for program in new}
        for rung in rungs:
            run.advance(rung)
            for program, metric in zip(new, run.evaluate("validation").metric, strict=True):
                found[find_key(program)][str(rung)] = float(metric) if np.isfinite(metric) else None
        self._metrics |= found

    def advance(self, step: int, at_safe_point: Any = None) -> None:
        """Go to a step."""
        self.step = step

    def keep(self, chosen: Sequence[int]) -> None:
        """See `TrainingRun`."""
        self.loss = self.loss.select(chosen)

    def evaluate(self, split: str, num_rows: int | None = None) -> Evaluation:
        """Return the recorded metrics; there are no task losses."""
        assert (split, num_rows) == ("validation", None)
        assert isinstance(self.loss, PopulationLoss)
        known = [self._metrics[find_key(p)][str(self.step)] for p in self.loss.programs]
        metric = np.array([np.nan if value is None else value for value in known])
        return Evaluation(self.step, split, metric, np.full_like(metric, np.nan))


class RecordingEngine(Engine):
    """Looks in ``record`` before it runs a local search or trains under a loss, and adds what it runs."""

    def __init__(self, workload: RacingWorkload, record: Record, rungs: Sequence[int]) -> None:
        cpu = torch.device("cpu")
        super().__init__(
            workload.make_task(), workload.model, workload.settings, cpu, **workload.model_options
        )
        self._record, self._rungs = record, rungs

    def start_training(
        self, loss: OutputLoss, num_steps: int, *stream: int | str, num_networks: int = 1
    ) -> TrainingRun:
        """See `Engine`."""
        assert isinstance(loss, PopulationLoss)
        assert (num_steps, num_networks) == (self._rungs[-1], 1)
        return RecordedRun(self, loss, self._record, self._rungs, *stream)

    def local_search(
        self,
        programs: Sequence[Program],
        settings: LocalSearchSettings,
        *stream: int | str,
        **options: Any,
    ) -> list[Program]:
        """See `Engine`."""
        tuned = self._record["tuned"]
        if any(find_key(program) not in tuned for program in programs):
            # all of them, as a search would: who is beside a candidate may change its last digits
            found = super().local_search(programs, settings, *stream)
            ran = {find_key(p): q.weights.tolist() for p, q in zip(programs, found, strict=True)}
            tuned.update({key: weights for key, weights in ran.items() if key not in tuned})
        return [replace(p, weights=_read_weights(tuned[find_key(p)])) for p in programs]


def _read_weights(values: Sequence[float]) -> NDArray[np.float64]:
    return np.array(values, np.float64)


def load_record(
    file: Path | None, workload: RacingWorkload, settings: SearchSettings, rungs: Sequence[int]
) -> Record:
    """Return the record in ``file``, or an empty one.

    Raises
    ------
    DataError
        If it is of another search, other rungs or another version.
    """
    what = {
        "version": evoloss.__version__,
        "training": asdict(workload.settings),
        "search": asdict(replace(settings, racing=RacingSettings())),
        "rungs": list(rungs),
    }
    what = json.loads(json.dumps(what))
    if file is None or not file.exists():
        return {"of": what, "tuned": {}, "metrics": {}}
    record: Record = read_json(file)
    different = [key for key, value in what.items() if record["of"].get(key) != value]
    if different:
        raise DataError(
            f"{file} is of another {' and '.join(different)}; name another folder or delete it"
        )
    return record


def replay(
    workload: RacingWorkload,
    settings: SearchSettings,
    racing: RacingSettings,
    seed: int,
    file: Path | None = None,
) -> Row:
    """Search without racing, then with it; return what `summarise` does. ``file`` keeps the record."""
    rungs = racing.list_rungs(settings.fitness_steps)
    record = load_record(file, workload, settings, rungs)
    engine = RecordingEngine(workload, record, rungs)

    def keep(row: Row) -> bool:
        logger.info("generation %d: %s", row["generation"], row["best_fitness"])
        if file is not None:
            write_json(file, record)
        return False

    off = run_search(GPSearch(engine, replace(settings, racing=RacingSettings()), seed), keep)
    on = run_search(GPSearch(engine, replace(settings, racing=racing), seed), keep)
    return {"seed": seed, **summarise(off, on, settings)}


def summarise(off: Sequence[Row], on: Sequence[Row], settings: SearchSettings) -> dict[str, Any]:
    """Return fitness without and with racing, the generation that differs first (None: none), what racing spares.

    Local searches and trainings are those of the search without racing.
    """

    def list_entrants(row: Row) -> set[str]:
        return {key for tournament in row["tournaments"] for key, _ in tournament}

    parted = [
        a["generation"]
        for a, b in zip(off, on, strict=True)
        if list_entrants(a) != list_entrants(b)
    ]
    work, with_racing = (count_work(rows, settings) for rows in (off, on))
    steps = [w["training_steps"] for w in (work, with_racing)]
    return {
        "local_searches": work["local_searches"],
        "trainings": work["trainings"],
        "fitness": {"off": off[-1]["best_fitness"], "on": on[-1]["best_fitness"]},
        "parted": min(parted, default=None),
        "stopped": with_racing["stopped"],
        "share_of_steps_spared": 1 - steps[1] / steps[0] if steps[0] else 0.0,
        "cpu_seconds": off[-1]["cpu_seconds"],
    }


def main(arguments: Sequence[str]) -> int:
    """Replay every seed of every workload and print a table; results are added to the JSON file, seed by seed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.replay", description=__doc__)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=["lenet5", "mlp"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4], metavar="SEED")
    parser.add_argument(
        "--records", type=Path, help="a folder that keeps the records, for another replay"
    )
    add_budget_options(parser)
    options = parser.parse_args(arguments)
    racing, machine = start(parser, options)
    for name in options.workloads:
        workload = WORKLOADS[name]()
        settings = cut_down(workload.search, options)
        make_file = partial(_name_record, options.records, name)
        for seed in options.seeds:
            try:
                found = replay(workload, settings, racing, seed, make_file(seed))
            except DataError as error:
                sys.stderr.write(f"error: {error}\n")
                return 1
            size = f"{settings.population_size} x {settings.num_generations}"
            row = {"size": size, **find_origin(machine), **found}
            section = {"machine": machine, "results": {f"{name}, seed {seed}": row}}
            sys.stdout.write(format_section("replays", section) + "\n\n")
            if options.json is not None:
                keep_section(options.json, "replays", section, merge=True)
    return 0


def _name_record(folder: Path | None, name: str, seed: int) -> Path | None:
    return None if folder is None else folder / f"{name}_seed_{seed}.json"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
