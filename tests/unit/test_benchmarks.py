"""The benchmarks run, refuse to report what disagrees, and count what they say they count."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from toy_tasks import make_toy_task

from benchmarks import racing, racing_workloads, report
from benchmarks.__main__ import main
from benchmarks.accuracy import measure_local_searches, measure_meta_gradients
from benchmarks.candidates import SIZES, draw_candidates, move_by_one_ulp, negate
from benchmarks.flops import count_meta_step, count_training_step, read_layers
from benchmarks.phases import FitnessPhase, make_phases
from benchmarks.plot import draw_scaling
from benchmarks.point import Point, PointError, measure_point, run_point
from benchmarks.scaling import Ranges, fit_slope, measure_scaling
from benchmarks.search import count_work, read_paper_search, run_search
from benchmarks.timing import DisagreementError, TimingOptions, measure_workload
from benchmarks.tournaments import count_changed
from benchmarks.workloads import WORKLOADS, Workload, make_workload
from benchmarks.xor import OPERATORS, make_xor_search, make_xor_task
from evoloss.errors import DataError, ModelError
from evoloss.expressions import parse_expression
from evoloss.results import SEARCH_COUNTS
from evoloss.search.gp_search import GPSearch
from evoloss.search.individuals import build_primitive_set

CPU = torch.device("cpu")
SMALL = TimingOptions(repeats=2, fraction=0.02, population=3, oracle_candidates=1)


def make_toy_workload(model: str = "linear") -> Workload:
    """The settings of a workload on a task that needs no data."""
    name = {"linear": "softmax"}.get(model, model)
    shape = (1, 28, 28) if model == "lenet5" else (6,)
    kind, outputs = ("regression", 1) if model == "mlp" else ("classification", 3)
    return replace(
        make_workload(name),
        model_options={"widths": (60, 50)} if model == "mlp" else {},
        make_task=lambda: make_toy_task(kind, input_shape=shape, num_outputs=outputs, rows=40),
    )


def test_quick_benchmark_writes_what_it_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "results.json"
    assert main(["--quick", "--workloads", "xor", "--json", str(path)]) == 0
    assert "Engine against sequential autograd" in capsys.readouterr().out
    section = json.loads(path.read_text())["workloads"]
    assert {"cpu", "cores", "threads", "torch", "date", "commit"} <= set(section["machine"])
    workload = section["results"]["xor"]
    assert workload["networks"] == 4
    assert 0 < workload["peak_memory"] < 2 * 2**30
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.update_readme(readme, json.loads(path.read_text()))
    text = readme.read_text()
    assert f"| xor | fitness | {workload['path']} | 2 of 150 |" in text
    assert "old" not in text
    assert text.startswith("before")
    assert text.endswith("after\n")


@pytest.mark.parametrize("model", ["linear", "mlp"])
def test_every_phase_is_timed_and_agrees(model: str) -> None:
    workload = measure_workload(make_toy_workload(model), CPU, SMALL)
    assert set(workload["phases"]) == {"local search", "rejection", "fitness"}
    for name, phase in workload["phases"].items():
        assert phase["agreement"]["compared"] == 2 * phase["agreement"]["candidates"] > 0
        assert phase["agreement"]["largest_error"] <= phase["agreement"]["tolerance"]
        assert phase["steps_run"] == (
            phase["steps"] if name == "rejection" else phase["steps"] // 50
        )
        assert len(phase["speedup"]["values"]) == 2
        seconds = (
            phase[f"{who}_seconds_per_candidate"]["values"][0] for who in ("oracle", "engine")
        )
        assert phase["speedup"]["values"][0] == pytest.approx(next(seconds) / next(seconds))
    assert "| x | local search |" in report.format_timing({"x": workload})


def test_disagreement_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """An oracle that trains at another rate: the times must not come out."""
    original = FitnessPhase.run_oracle

    def run_wrongly(self: FitnessPhase, programs: list, stream: int) -> tuple[float, list]:
        settings = self.engine.settings
        self.engine.settings = replace(settings, learning_rate=settings.learning_rate * 1.1)
        try:
            return original(self, programs, stream)
        finally:
            self.engine.settings = settings

    monkeypatch.setattr(FitnessPhase, "run_oracle", run_wrongly)
    with pytest.raises(DisagreementError, match="softmax, fitness: engine and oracle differ"):
        measure_workload(make_toy_workload(), CPU, SMALL)


@pytest.mark.parametrize("name", WORKLOADS)
def test_workloads_are_the_papers(name: str) -> None:
    workload = make_workload(name)
    if name == "xor":
        assert (workload.fitness_steps, workload.population, workload.num_networks) == (150, 500, 4)
        assert workload.settings.optimizer == "adam"
        return
    assert workload.local_search is not None
    assert workload.rejection is not None
    assert (workload.local_search.meta_steps, workload.fitness_steps) == (250, 500)
    assert workload.rejection.steps == (1000 if name == "mlp" else 100)
    assert workload.settings.batch_size == 128
    assert workload.settings.nesterov == (name == "mlp")


def test_candidates_have_the_stated_sizes_and_repeat_from_the_seed() -> None:
    workload = make_workload("xor")
    engine = workload.build_engine(CPU)
    programs = draw_candidates(engine, workload, 6, 0)
    for i, program in enumerate(programs):
        smallest, largest = SIZES[i % len(SIZES)]
        assert smallest <= len(program) <= largest
    again = draw_candidates(engine, workload, 6, 0)
    for a, b in zip(programs, again, strict=True):
        np.testing.assert_array_equal(a.weights, b.weights)
    moved = move_by_one_ulp(programs[0], 0).loss_params
    change = np.abs(moved / programs[0].loss_params - 1)
    assert (change > 0).all()
    assert change.max() < 2e-7
    phase = make_phases(engine, workload, 0.02)[-1]
    _, (loss, turned) = phase.run_engine([programs[0], negate(programs[0])], 0)
    assert loss != turned


def test_floating_point_operations() -> None:
    """A dense network by hand: 3 -> 4 -> 2, batches of 5 and 7."""
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    layers = read_layers(model, torch.zeros(1, 3))
    assert [layer.multiply_adds for layer in layers] == [12, 8]
    assert count_training_step(layers, 5) == 2 * 5 * (2 * 12 + 3 * 8)
    # low rank is cheaper in the first layer (560 < 576), the direct form in the second (656 < 1364)
    assert count_meta_step(layers, 5, 7) == 4 * 7 * 5 * 4 + (8 * 5 + 6 * 7) * 8
    (conv,) = read_layers(nn.Conv2d(1, 6, 5, padding=2), torch.zeros(1, 1, 28, 28))
    assert conv.multiply_adds == 25 * 6 * 28 * 28
    wide = read_layers(nn.Linear(1000, 10), torch.zeros(1, 1000))
    assert count_meta_step(wide, 128, 128) == 4 * 128 * 128 * 10


@pytest.mark.parametrize("model", ["linear", "lenet5", "mlp"])
def test_accuracy_of_float32(model: str) -> None:
    """Ten regular trees on little data; `python -m benchmarks --accuracy` takes a hundred on the real data."""
    found = measure_meta_gradients(make_toy_workload(model), CPU, 10)
    assert found["engine_float32"]["max"] < 1e-4
    assert found["engine_float32"]["median"] < 1e-6


def test_accuracy_of_phi() -> None:
    found = measure_local_searches(make_toy_workload(), CPU, 2, meta_steps=20)
    assert found["engine_float32"]["max"] < 1e-4


def test_scaling_is_measured_point_by_point(tmp_path: Path) -> None:
    base = Point("xor", population=4, steps=2, threads=1)
    ranges = Ranges(population=(3, 6), steps=(2, 4), nodes=((5, 8), (20, 30)))
    found = measure_scaling(base, ranges, measure_point)
    assert found["population"]["values"] == [3, 6]
    assert found["nodes"]["values"][1] > found["nodes"]["values"][0]
    for line in found.values():
        assert len(line["peak_memory"]) == 2
        assert set(line["seconds"]) == set(line["slope_seconds"]) == {"fitness"}
    assert "| xor | steps | 2 to 4 |" in report.format_scaling({"xor": found})
    draw_scaling({"xor": found}, tmp_path / "scaling.svg", tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").stat().st_size > 10_000


def test_a_failed_point_says_why() -> None:
    with pytest.raises(PointError, match=r"with 3 candidates failed: .*device is 'tpu'"):
        run_point(Point("xor", population=3, steps=2, threads=1, device="tpu"))


def test_slope_of_a_power_law() -> None:
    assert fit_slope([1, 10, 100], [3, 300, 30000]) == pytest.approx(2.0)


def test_xor_points_and_search() -> None:
    task = make_xor_task()
    x = task.train.x.numpy()
    assert (task.train.y.numpy() == ((x[:, 0] > 0.5) != (x[:, 1] > 0.5))).all()
    assert 0.4 < float(task.train.y.float().mean()) < 0.6
    assert not torch.equal(task.train.x[:500], task.validation.x)
    found = run_search(make_workload("xor").build_engine(CPU), make_xor_search(8, 2), 0)
    assert found["seconds"] > 0
    if found["best_expression"] is not None:
        used = {node.symbol for node in parse_expression(found["best_expression"]).walk()}
        assert used <= {*OPERATORS, "y", "f(x)", "constant"}


def test_primitives_can_be_restricted() -> None:
    names = {p.name for p in build_primitive_set(OPERATORS).primitives[object]}
    assert names == set(OPERATORS)


@pytest.mark.usefixtures("narrow_bounds")
def test_whole_search_by_the_clock(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    workload = make_toy_workload("mlp")
    settings = read_paper_search(workload)
    assert (settings.population_size, settings.num_generations) == (25, 50)
    assert settings.local_search is not None
    small = replace(
        settings,
        population_size=24,
        num_generations=8,
        fitness_steps=16,
        local_search=replace(settings.local_search, meta_steps=2),
    )
    monkeypatch.setattr("benchmarks.__main__.make_workload", lambda name: workload)
    monkeypatch.setattr("benchmarks.__main__.read_paper_search", lambda workload: small)
    path = tmp_path / "results.json"
    for seeds in (["1"], ["2", "3"]):
        command = ["--search", "softmax", "--racing", "--seeds", *seeds, "--json", str(path)]
        assert main(command) == 0
    assert "| softmax, racing, seed 3 | 24 x 8 | " in capsys.readouterr().out
    results = json.loads(path.read_text())["searches"]["results"]
    assert list(results) == [f"softmax, racing, seed {seed}" for seed in (1, 2, 3)]
    assert [found["seed"] for found in results.values()] == [1, 2, 3]
    for found in results.values():
        assert found["candidates"] == 9 * 24
        assert sum(found["seconds_by_phase"].values()) <= found["seconds"]
        assert found["local_searches"] > found["trainings"] > 0
    assert sum(found["stopped"] for found in results.values()) > 0


def test_a_search_is_kept_before_the_next_one_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def search_once(engine: object, settings: object, seed: int) -> dict[str, object]:
        if seed == 2:
            raise KeyboardInterrupt
        return found

    search = make_xor_search(8, 1)
    found = run_search(make_workload("xor").build_engine(CPU), search, 1)
    monkeypatch.setattr("benchmarks.__main__.run_search", search_once)
    path = tmp_path / "results.json"
    with pytest.raises(KeyboardInterrupt):
        main(["--search", "softmax", "--seeds", "1", "2", "--json", str(path)])
    assert list(json.loads(path.read_text())["searches"]["results"]) == ["softmax, seed 1"]


def test_a_search_without_local_search_counts_none(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    assert main(["--quick", "--workloads", "xor-search", "--json", str(path)]) == 0
    (row,) = json.loads(path.read_text())["searches"]["results"].values()
    assert row["candidates"] == 8
    assert row["local_searches"] == 0


def test_work_is_counted_by_what_became_of_the_candidates() -> None:
    row = {**dict.fromkeys(SEARCH_COUNTS, 0), "training_steps": 100}
    rows = [
        {**row, "candidates": 25, "archive_hits": 3, "zero_gradient": 2, "rejected": 12, "evaluated": 8},
        {**row, "candidates": 25, "rejected": 8, "gradient_hits": 4, "evaluated": 5, "diverged": 1, "stopped": 7},
    ]  # fmt: skip
    search = read_paper_search(make_workload("softmax"))
    expected = {"local_searches": 45, "trainings": 21, "stopped": 7, "training_steps": 200}
    assert count_work(rows, search) == expected
    assert count_work(rows, replace(search, local_search=None)) == {**expected, "local_searches": 0}


def test_the_readme_shows_what_was_measured(tmp_path: Path) -> None:
    folder = Path(report.__file__).parent
    readme = tmp_path / "README.md"
    readme.write_text((folder / "README.md").read_text())
    report.update_readme(readme, json.loads((folder / "results.json").read_text()))
    assert readme.read_text() == (folder / "README.md").read_text()


@pytest.mark.usefixtures("narrow_bounds")
def test_racing_is_compared_with_the_same_search_without(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    workload = make_toy_workload("mlp")
    search = replace(racing_workloads.make_small_search(1), population_size=16)
    toy = racing_workloads.RacingWorkload(
        workload.make_task, "mlp", workload.settings, search, {"widths": (8, 8)}
    )
    monkeypatch.setattr("benchmarks.racing.WORKLOADS", {"toy": lambda: toy, "other": lambda: toy})
    path = tmp_path / "results.json"
    path.write_text('{"kept": 1}')
    budget = ["--generations", "8", "--meta-steps", "2", "--fitness-steps", "8", "--num-seeds", "2"]
    budget += ["--learning-rate", "0.1"]
    for name in ("toy", "other"):
        assert racing.main(["--workloads", name, *budget, "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert found["kept"] == 1
    assert set(found["racing"]["results"]) == {"toy", "other"}
    toy_result = found["racing"]["results"]["toy"]
    assert toy_result["search"]["fitness_steps"] == 8
    assert toy_result["search"]["local_search"]["meta_steps"] == 2
    for seed in toy_result["seeds"]:
        assert seed["off"]["share_of_steps_spared"] == 0.0
        assert seed["off"]["generation"] == seed["equal_generations"]["generation"] == 8
    # the first generation is not raced, and few candidates may leave nobody to stop
    spared = [s["equal_generations"]["share_of_steps_spared"] for s in toy_result["seeds"]]
    assert 0.0 < max(spared) < 1.0
    difference = [
        s["equal_generations"]["fitness"] - s["off"]["fitness"] for s in toy_result["seeds"]
    ]
    summary = toy_result["summary"]["equal_generations"]["fitness"]
    assert summary["mean"] == summary["median"] == np.mean(difference)
    assert summary["standard_error"] == pytest.approx(abs(difference[0] - difference[1]) / 2)
    assert summary["better"] == sum(d < 0 for d in difference)
    assert set(toy_result["summary"]) == {"equal_generations", "equal_steps", "equal_time"}
    for seed in toy_result["seeds"]:
        steps = [
            (1 - seed[name]["share_of_steps_spared"]) * 8 * seed[name]["candidates_trained"]
            for name in ("off", "equal_steps")
        ]
        assert steps[1] <= steps[0]
        assert seed["equal_steps"]["generation"] >= 8
        assert seed["off"]["stopped"] == 0
        assert seed["equal_time"]["missed"] <= seed["equal_time"]["stopped"]
    assert toy_result["summary"]["equal_generations"]["stopped"] > 0
    printed = capsys.readouterr().out
    assert "| toy | 16 x 8 | 2 + 8 | 0.1 | 2 | equal steps | " in printed
    with pytest.raises(SystemExit):
        racing.main(["--num-seeds", "1"])
    assert "--num-seeds is 1; a comparison needs at least 2" in capsys.readouterr().err


def test_stopped_losses_are_trained_to_the_end_as_the_search_does() -> None:
    workload = make_toy_workload("mlp")
    settings = replace(racing_workloads.make_small_search(8), num_generations=2, population_size=8)
    engine = workload.build_engine(CPU)
    search = GPSearch(engine, settings, 1)
    rows = racing.run_search(search)
    records = search.archive.records
    trained = {k: r for k, r in records.items() if r.status == "evaluated"}
    expected = {key: record.fitness for key, record in records.items()}
    assert racing.list_waiting(search.archive) == []
    assert racing.find_true_fitness(engine, search.archive, 8, 1) == expected
    first = next(iter(trained))
    records["twin"] = replace(trained[first], status="gradient_hits", twin_of=first)
    for key, record in records.items():
        if key in trained or key == "twin":
            records[key] = replace(record, status="stopped", spared=4, fitness=-9.0)
    assert racing.list_waiting(search.archive) == list(trained)
    found = racing.find_true_fitness(engine, search.archive, 8, 1)
    assert found == pytest.approx({**expected, "twin": expected[first]}, rel=1e-5)
    # stopped by then, or stopped later, or not at all
    best = rows[-1]["best_fitness"]
    rows[-1]["waiting"] = ["a", "b"]
    row = racing.describe(engine, rows, 8, 1, {"a": best - 1, "b": best, "c": best - 1})
    assert (row["stopped"], row["missed"]) == (0, 1)
    assert row["tournaments_changed"] == 0 < row["tournaments"]


def test_a_comparison_counts_tournaments_by_the_true_fitness() -> None:
    """Of losses that were stopped when they met others, and have been trained to the end since."""
    settings = replace(racing_workloads.make_small_search(8), num_generations=2, population_size=8)
    engine = make_toy_workload("mlp").build_engine(CPU)
    search = GPSearch(engine, settings, 1)
    rows = racing.run_search(search)
    records = search.archive.records
    first, second = [key for key, record in records.items() if record.status == "evaluated"][:2]
    expected = 0
    for tournament in (t for row in rows for t in row["tournaments"]):
        winner = min(tournament, key=lambda entrant: entrant[1])[0]
        keys = {key for key, _ in tournament}
        expected += winner != (second if second in keys else first if first in keys else winner)
    known = {key: record.fitness for key, record in records.items()} | {first: -1.0, second: -2.0}
    found = racing.describe(engine, rows, 8, 1, known)
    assert found["tournaments_changed"] == expected > 0


def test_tournaments_that_full_trainings_would_decide_otherwise_are_counted() -> None:
    settings = replace(racing_workloads.make_small_search(8), population_size=8)
    search = GPSearch(make_toy_workload("mlp").build_engine(CPU), settings, 1)
    (row,) = racing.run_search(search, lambda row: True)
    tournaments = row["tournaments"]
    plan = [t for c in search.plan_children() for p in c.parents for t in p.tournaments]
    assert [len(tournament) for tournament in tournaments] == [4] * len(plan)
    winners = [min(tournament, key=lambda entrant: entrant[1])[0] for tournament in tournaments]
    assert count_changed(tournaments, {}) == 0
    often = max(winners, key=winners.count)
    others_finish = [
        any(key != often and np.isfinite(fitness) for key, fitness in tournament)
        for tournament in tournaments
    ]
    expected = sum(w == often and o for w, o in zip(winners, others_finish, strict=True))
    assert count_changed(tournaments, {often: float("nan")}) == expected > 0
    loser = next(key for t in tournaments for key, _ in t if key not in winners)
    present = sum(any(key == loser for key, _ in tournament) for tournament in tournaments)
    assert count_changed(tournaments, {loser: -1.0}) == present > 0
    a, b = tournaments[0][0], ("b", tournaments[0][0][1])
    assert count_changed([(a, b)], {}) == 0  # equals


def test_differences_that_are_not_finite_are_left_out() -> None:
    summary = racing.summarise_differences([float("nan"), -1.0, float("inf"), 0.0, 4.0])
    assert summary["left_out"] == 2
    assert summary["mean"] == 1.0
    assert summary["standard_error"] == pytest.approx(np.std([-1, 0, 4], ddof=1) / 3**0.5)
    assert report.format_difference(summary) == "+1.0000 ± 1.5275, +0.0000; 1 : 1; 2 left out"
    lost = racing.summarise_differences([float("nan")] * 2)
    assert report.format_difference(lost) == "? ± ?, ?; 0 : 0; 2 left out"
    assert racing.replace_nan({"a": float("inf"), "b": 1}) == {"a": None, "b": 1}


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ModelError, match=r"activation is 'selu'.*relu, tanh"):
        replace(make_workload("xor"), model_options={"activation": "selu"}).build_engine(CPU)
    (tmp_path / "README.md").write_text("no marks")
    with pytest.raises(DataError, match="lacks the marks"):
        report.update_readme(tmp_path / "README.md", {})
    with pytest.raises(SystemExit):
        main(["--update-readme"])
    for option, value in (("--threads", "0"), ("--steps-fraction", "2"), ("--steps-fraction", "0")):
        with pytest.raises(SystemExit):
            main([option, value])
        assert f"argument {option}: {value} is " in capsys.readouterr().err
    assert main(["--device", "tpu"]) == 1
    assert "error: device is 'tpu'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(2065.9, "34.4 min"), (27.2, "27.2 s"), (0.0054, "5.4 ms"), (2e-6, "2 µs"), (5e-8, "50 ns")],
)
def test_seconds_have_a_readable_unit(seconds: float, text: str) -> None:
    assert report.format_seconds(seconds) == text
