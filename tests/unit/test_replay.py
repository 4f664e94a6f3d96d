"""The replay of racing against searches that really run with it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import racing_workloads, replay
from benchmarks.racing import Row, run_search
from evoloss.engine import Engine
from evoloss.engine.racing import RacingSettings
from evoloss.results import SEARCH_COUNTS
from evoloss.search.gp_search import GPSearch
from evoloss.search.settings import SearchSettings

RACING = RacingSettings((0.25, 0.5))


@pytest.fixture
def one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute every candidate alone, as large networks are: then not a bit depends on who is beside it."""
    monkeypatch.setattr("evoloss.engine.dense.STACK_BYTES", 1)
    monkeypatch.setattr("evoloss.engine.dense_meta.CHUNK_BYTES", 1)


@pytest.fixture
def toy() -> racing_workloads.RacingWorkload:
    search = replace(racing_workloads.make_small_search(16), population_size=16, num_generations=8)
    workload = racing_workloads.make_small_mlp()
    return replace(workload, search=search, model_options={"widths": (8, 8)})


def without_times(rows: list[Row]) -> list[Row]:
    return [{k: v for k, v in row.items() if "seconds" not in k} for row in rows]


@pytest.mark.usefixtures("narrow_bounds", "one_by_one")
def test_a_replay_is_the_search_with_racing(
    toy: racing_workloads.RacingWorkload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    histories = []

    def keep(off: list[Row], on: list[Row], settings: SearchSettings) -> dict[str, object]:
        histories[:] = [off, on]
        return summarise(off, on, settings)

    summarise = replay.summarise
    monkeypatch.setattr(replay, "summarise", keep)
    file = tmp_path / "record.json"
    found = replay.replay(toy, toy.search, RACING, 2, file)
    engine = toy.build_engine()
    for rows, settings in zip(histories, (RacingSettings(), RACING), strict=True):
        expected = run_search(GPSearch(engine, replace(toy.search, racing=settings), 2))
        assert without_times(rows) == without_times(expected)
    off, on = histories
    assert found["stopped"] == sum(row["stopped"] for row in on) > 0
    assert found["fitness"] == {"off": off[-1]["best_fitness"], "on": on[-1]["best_fitness"]}
    assert 0.0 < found["share_of_steps_spared"] < 1.0
    assert found["trainings"] == sum(row["training_steps"] for row in off) / 16
    # so the second search needs what the first one did not
    assert found["parted"] is not None

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the record has everything")

    monkeypatch.setattr("evoloss.engine.training_run.TrainingRun.advance", refuse)
    monkeypatch.setattr("evoloss.engine.engine.run_local_search", refuse)
    again = replay.replay(toy, toy.search, RACING, 2, file)
    assert {**again, "cpu_seconds": 0} == {**found, "cpu_seconds": 0}


def test_searches_part_where_their_entrants_differ(toy: racing_workloads.RacingWorkload) -> None:
    def make(*keys: str) -> Row:
        row = dict.fromkeys(("candidates", *SEARCH_COUNTS), 1)
        row |= {
            "candidates": 9,
            "archive_hits": 2,
            "best_fitness": 0.5,
            "training_steps": 10,
            "cpu_seconds": 2.0,
        }
        return {**row, "tournaments": [tuple((key, 0.0) for key in keys)]}

    off = [{**make("a", "b"), "generation": 0}, {**make("a", "c"), "generation": 1}]
    on = [{**make("b", "a"), "generation": 0, "training_steps": 5}, {**off[1], "stopped": 0}]
    found = replay.summarise(off, on, toy.search)
    assert (found["parted"], found["stopped"], found["share_of_steps_spared"]) == (None, 1, 0.25)
    assert (found["local_searches"], found["trainings"]) == (12, 6)
    on[1] = {**on[1], **make("a", "d")}
    assert replay.summarise(off, on, toy.search)["parted"] == 1


def test_its_command_keeps_records_and_results(
    toy: racing_workloads.RacingWorkload,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("benchmarks.replay.WORKLOADS", {"toy": lambda: toy})
    path, records = tmp_path / "results.json", tmp_path / "records"
    command = ["--workloads", "toy", "--seeds", "3", "4", "--generations", "1", "--json", str(path)]
    assert replay.main([*command, "--records", str(records)]) == 0
    assert set(json.loads(path.read_text())["replays"]["results"]) == {"toy, seed 3", "toy, seed 4"}
    assert {file.name for file in records.iterdir()} == {"toy_seed_3.json", "toy_seed_4.json"}
    assert "| toy, seed 3 | 16 x 1 | " in capsys.readouterr().out
    assert replay.main([*command, "--records", str(records), "--rungs", "0.75"]) == 1
    error = capsys.readouterr().err
    assert f"{records / 'toy_seed_3.json'} is of another rungs; name another folder" in error
    with pytest.raises(SystemExit):
        replay.main(["--rungs", "1.5"])
    assert "--rungs: rungs are (1.5,)" in capsys.readouterr().err


def test_an_engine_without_a_record_runs_everything(toy: racing_workloads.RacingWorkload) -> None:
    record: replay.Record = {"tuned": {}, "metrics": {}}
    engine = replay.RecordingEngine(toy, record, [4, 8, 16])
    assert isinstance(engine, Engine)
    rows = run_search(GPSearch(engine, replace(toy.search, num_generations=0), 1))
    assert len(record["metrics"]) == rows[0]["evaluated"] + rows[0]["diverged"] > 0
    assert all(set(metrics) == {"4", "8", "16"} for metrics in record["metrics"].values())
    assert engine.device == torch.device("cpu")
