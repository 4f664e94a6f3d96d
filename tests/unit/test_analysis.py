"""Reading results, statistics and tables."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from analysis_files import DIVERGED, FAILED, MISSING, REASON, make_outputs, make_results
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from evoloss.analysis.aggregate import (
    Results,
    aggregate_results,
    describe_results,
    write_results,
)
from evoloss.analysis.final import average_searches, final_results, order_methods, summarise_methods
from evoloss.analysis.load import RUN_KEYS, identify, load_runs, load_searches, read_table
from evoloss.analysis.missing import load_missing
from evoloss.analysis.origin import describe_versions, load_origins, origin_table
from evoloss.analysis.statistics import compare_methods, paired_t_test
from evoloss.analysis.tables import EMPTY, Column, Table, format_cell, to_markdown
from evoloss.errors import DataError
from evoloss.results import read_json, write_json, write_parquet

INPUTS = (
    "datasets",
    "runs",
    "tuned",
    "searches",
    "histories",
    "simplified",
    "finetuned",
    "losses",
)
NUMBERS = st.lists(
    st.tuples(st.floats(-10, 10), st.floats(-10, 10)), min_size=2, max_size=12, unique=True
)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return aggregate_results(make_results(tmp_path_factory.mktemp("results")))


@pytest.fixture(scope="module")
def empty() -> Results:
    return aggregate_results({name: [] for name in INPUTS})


# --- the paired t-test ---


def test_paired_t_test_by_hand() -> None:
    a, b = [0.20, 0.22, 0.21, 0.25], [0.24, 0.23, 0.26, 0.27]
    differences = np.subtract(a, b)
    mean, error = differences.mean(), differences.std(ddof=1) / 2.0
    half = stats.t.ppf(0.975, 3) * error
    test = paired_t_test(a, b)
    assert test.difference == pytest.approx(mean)
    assert (test.ci_low, test.ci_high) == pytest.approx((mean - half, mean + half))
    assert test.p_value == pytest.approx(2 * stats.t.sf(abs(mean / error), 3))
    assert test.verdict == "lower"
    assert test.pairs == 4
    assert paired_t_test(b, a).verdict == "higher"


@settings(max_examples=60, deadline=None)
@given(NUMBERS)
def test_paired_t_test_is_antisymmetric_and_ignores_order(pairs: list[tuple[float, float]]) -> None:
    a, b = (list(side) for side in zip(*pairs, strict=True))
    forward, backward = paired_t_test(a, b), paired_t_test(b, a)
    shuffled = paired_t_test(a[::-1], b[::-1])
    assert forward.difference == pytest.approx(-backward.difference, abs=1e-12)
    assert forward.p_value == pytest.approx(backward.p_value, nan_ok=True)
    assert forward.p_value == pytest.approx(shuffled.p_value, nan_ok=True, rel=1e-6)
    if not math.isnan(forward.p_value):
        # the interval excludes zero exactly when the test says that there is a difference
        inside = forward.ci_low <= 0.0 <= forward.ci_high
        assert inside == (forward.p_value >= 0.05) or forward.p_value == pytest.approx(0.05)


def test_paired_t_test_leaves_out_what_is_not_finite() -> None:
    a, b = [1.0, 2.0, math.nan, 4.0, 5.0], [1.5, 2.1, 3.0, math.inf, 5.7]
    assert paired_t_test(a, b) == paired_t_test([1.0, 2.0, 5.0], [1.5, 2.1, 5.7])


@pytest.mark.parametrize(
    ("a", "b", "verdict", "note"),
    [
        ([], [], "not tested", "no pair"),
        ([math.nan], [1.0], "not tested", "no pair"),
        ([1.0], [2.0], "not tested", "too few"),
        ([1.0], [1.0], "not tested", "too few"),
        ([0.1, 0.3], [0.1, 0.3], "no difference at p<0.05", "identical"),
        ([0.1, 0.2, 0.3], [0.2, 0.3, 0.4], "not tested", "same difference"),
    ],
)
def test_paired_t_test_says_what_it_cannot_do(
    a: list[float], b: list[float], verdict: str, note: str
) -> None:
    test = paired_t_test(a, b)
    assert test.verdict == verdict
    assert note in test.note


# --- reading ---


def test_identify_reads_task_model_method_and_seed() -> None:
    run = identify("results/train_model/t/m/evomal/seeds_3-5.parquet")
    assert run == {"task": "t", "model": "m", "method": "evomal", "seed": None}
    loss = identify("/x/results/finetune_loss/t/gp_lfl/seed_12/loss.json")
    assert loss == {"task": "t", "model": None, "method": "gp_lfl", "seed": 12}
    with pytest.raises(DataError, match=r"loss\.json names no seed"):
        identify("results/loss.json")


def test_failed_search_gives_rows_with_its_reason(results: Results) -> None:
    task, method, seed = FAILED
    failed = results.runs[results.runs["status"] == "failed"]
    assert set(zip(failed["task"], failed["method"], failed["search_seed"], strict=True)) == {
        FAILED
    }
    assert set(failed["reason"]) == {REASON}
    final = results.final[results.final["status"] == "failed"]
    assert len(final) == 5
    assert set(final["metric"]) == {"error_rate"}
    assert final["test"].isna().all()
    loss = results.losses[(results.losses["task"] == task) & (results.losses["method"] == method)]
    assert list(loss["status"]) == ["ok", "failed", "ok"]
    assert loss["reason"].iloc[1] == REASON
    assert seed == 1


def test_final_has_one_row_per_run_at_its_last_step(results: Results) -> None:
    final = results.final
    assert not final.duplicated(RUN_KEYS).any()
    assert len(final) == 5 * 5 * (2 + 2 * 3)
    for row in final[final["status"] == "ok"].iloc[::17].to_dict("records"):
        runs = results.runs
        mine = np.logical_and.reduce(
            [
                runs[key].isna() if pd.isna(row[key]) else (runs[key] == row[key]).fillna(False)
                for key in RUN_KEYS
            ]
        )
        last = runs[mine & (runs["step"] == 400)].set_index("split")["value"]
        assert {split: row[split] for split in last.index} == last.to_dict()
    assert set(final.loc[final["model"] == "gru", "search_model"]) == {"char_cnn"}


def test_diverged_run_is_missing_and_counted(results: Results) -> None:
    diverged = results.final[results.final["status"] == "diverged"]
    assert [tuple(row) for row in diverged[RUN_KEYS].to_numpy()] == [DIVERGED]
    summary = summarise_methods(results.final).set_index(["task", "model", "method"])
    row = summary.loc[("surnames", "gru", "evomal")]
    assert (row["diverged"], row["runs"], row["train_seeds"]) == (1, 14, 5)
    assert np.isfinite(row["mean"])
    notes = results.comparison.set_index(["model", "method", "comparator"])["note"]
    assert notes["gru", "evomal", "baseline"] == "1 of 15 runs of evomal diverged"
    assert notes["gru", "gp_lfl", "baseline"] == ""


def test_losses_tell_where_they_come_from(results: Results) -> None:
    good = results.losses[results.losses["status"] == "ok"]
    assert (good["complexity_before"] == good["complexity_after"] + 6).all()
    assert (good["tree_complexity"] == 5).all()
    assert (
        good[["scale", "latex", "infix", "kind", "start_score", "best_score"]]
        .notna()
        .all(axis=None)
    )
    assert (good["learning_rate"] == 0.01).all()


def test_a_search_without_history_keeps_a_row(tmp_path: Path) -> None:
    inputs = make_results(tmp_path, train_seeds=1)
    searches = load_searches(inputs["searches"], [])
    assert len(searches) == len(inputs["searches"])
    assert searches["generation"].isna().all()


def test_all_searches_failed(tmp_path: Path) -> None:
    inputs = make_results(tmp_path, train_seeds=2)
    runs = load_runs(inputs["runs"])
    learned = runs["search_seed"].notna()
    runs = runs[~learned | (runs["step"] == 400)]
    gone = runs["search_seed"].notna()
    runs.loc[gone, ["status", "value"]] = ["failed", math.nan]
    final = final_results(runs, load_searches(inputs["searches"], inputs["histories"]))
    comparison = compare_methods(final)
    lost = comparison[comparison["method"].isin(["gp_lfl", "evomal"])]
    assert set(lost["verdict"]) == {"not tested"}
    assert lost["note"].str.startswith("no pair of results").all()


def test_a_failed_search_is_missing_from_every_seed_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "train_model/t/m/evomal/seeds_2-3.parquet"
    metadata = {"train_seeds": [2, 3], "missing": [{"search_seed": 1, "reason": REASON}]}
    write_parquet(path, {}, metadata)
    runs = load_runs([path])
    assert runs["train_seed"].tolist() == [2, 3]
    assert runs["status"].tolist() == ["failed"] * 2


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "train_model/t/m/baseline/seeds_0.parquet"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"not parquet")
    with pytest.raises(DataError, match=r"cannot read .*seeds_0\.parquet"):
        load_runs([path])


# --- statistics over results ---


def test_comparison_pairs_by_training_seed(results: Results) -> None:
    averaged = average_searches(results.final)
    for row in results.comparison.to_dict("records"):
        here = averaged[(averaged["task"] == row["task"]) & (averaged["model"] == row["model"])]
        a, b = (
            here[here["method"] == row[name]].set_index("train_seed")["test"].sort_index()
            for name in ("method", "comparator")
        )
        expected = stats.ttest_rel(a, b)
        assert row["p_value"] == pytest.approx(expected.pvalue)
        assert row["difference"] == pytest.approx(row["mean"] - row["comparator_mean"])
        assert row["difference"] == pytest.approx(a.mean() - b.mean())


def test_averaging_counts_a_training_seed_once(results: Results) -> None:
    one = results.final[
        (results.final["task"] == "diabetes")
        & (results.final["method"] == "evomal")
        & (results.final["train_seed"] == 2)
    ]
    averaged = average_searches(results.final).set_index(["task", "method", "train_seed"])
    assert len(one) == 3
    assert averaged.loc[("diabetes", "evomal", 2), "test"] == pytest.approx(one["test"].mean())


def test_one_training_seed_is_not_tested(tmp_path: Path) -> None:
    results = aggregate_results(make_results(tmp_path, train_seeds=1))
    assert set(results.comparison["verdict"]) == {"not tested"}
    assert summarise_methods(results.final)["std"].isna().all()


def test_comparison_without_tuned_baseline(results: Results) -> None:
    final = results.final[results.final["method"] != "baseline_tuned"]
    assert set(compare_methods(final)["comparator"]) == {"baseline"}


def test_method_order() -> None:
    names = ["zeta", "evomal", "alpha", "baseline_tuned", "evomal", "baseline"]
    assert order_methods(names) == ["baseline", "baseline_tuned", "evomal", "alpha", "zeta"]


# --- tables ---


def test_csv_and_markdown_agree(results: Results, tmp_path: Path) -> None:
    outputs = make_outputs(tmp_path)
    results = replace(results, missing=load_missing(MISSING))
    write_results(results, outputs)
    for name, table in describe_results(results).items():
        csv = pd.read_csv(outputs[f"{name}_csv"])
        text = Path(outputs[f"{name}_md"]).read_text(encoding="utf-8")
        lines = [line for line in text.splitlines() if line.startswith("|")]
        cells = [
            [cell.strip() for cell in line.replace(r"\|", "\0").strip("|").split("|")]
            for line in lines
        ]
        assert cells[0] == [column.heading for column in table.columns]
        assert list(csv.columns) == [column.name for column in table.columns]
        assert len(cells) == len(csv) + 2
        metric = table.frame["metric"] if "metric" in table.frame else [None] * len(csv)
        for row, shown, unit in zip(csv.to_dict("records"), cells[2:], metric, strict=True):
            for column, cell in zip(table.columns, shown, strict=True):
                expected = format_cell(row[column.name], column.kind, unit)
                if column.kind not in ("text", "code"):
                    assert cell == expected
                elif expected != EMPTY:
                    assert cell.replace("\0", r"\|").strip("`") == expected.strip("`")


def test_csv_keeps_every_digit(results: Results, tmp_path: Path) -> None:
    outputs = make_outputs(tmp_path)
    write_results(results, outputs)
    csv = pd.read_csv(outputs["test_error_csv"])
    expected = summarise_methods(results.final)["mean"]
    np.testing.assert_allclose(csv["mean"], expected, rtol=1e-15)
    text = Path(outputs["test_error_csv"]).read_text()
    assert all(repr(float(value)) in text for value in expected)


def test_parquet_round_trip(results: Results, tmp_path: Path) -> None:
    outputs = make_outputs(tmp_path)
    write_results(results, outputs)
    for name in ("runs", "final", "comparison", "losses", "searches"):
        table = read_table(outputs[name])
        original = getattr(results, name)
        # a missing text may come back as None or NaN
        assert (table.isna() == original.isna()).all(axis=None)
        plain = [frame.astype(object).where(frame.notna(), None) for frame in (table, original)]
        pd.testing.assert_frame_equal(*plain)
        if "search_seed" in table:
            assert table["search_seed"].dtype == "Int64"


def test_same_results_give_the_same_files(results: Results, tmp_path: Path) -> None:
    first, second = make_outputs(tmp_path / "a"), make_outputs(tmp_path / "b")
    write_results(results, first)
    write_results(results, second)
    for name in first:
        assert Path(first[name]).read_bytes() == Path(second[name]).read_bytes(), name


def test_nothing_at_all(empty: Results, tmp_path: Path) -> None:
    outputs = make_outputs(tmp_path)
    write_results(empty, outputs)
    assert "No results." in Path(outputs["test_error_md"]).read_text()
    assert read_table(outputs["final"]).empty


def test_notes_name_failures_divergence_and_the_edge_of_the_grid(results: Results) -> None:
    notes = "\n".join(describe_results(results)["test_error"].notes)
    assert f"mnist5k, gp_lfl, search seed 1 failed: {REASON}" in notes
    assert "surnames, gru, evomal: 1 of 15 runs diverged" in notes
    assert "mnist5k, lenet5 (1) ends its grid" in notes
    assert "versions" not in notes


def test_mixed_versions_are_told() -> None:
    frames = [pd.DataFrame({"version": ["0.1.0", None]}), pd.DataFrame({"version": ["0.2.0"]})]
    assert "0.1.0, 0.2.0" in describe_versions(frames)[0]
    assert describe_versions(frames[:1]) == []


@pytest.mark.parametrize(
    ("value", "kind", "metric", "text"),
    [
        (0.12345, "score", "error_rate", "12.35 %"),
        (0.12345, "score", "mse", "0.1235"),
        (-0.0123, "difference", "error_rate", "-1.23 pp"),
        (0.0123, "difference", "mse", "+0.0123"),
        (0.0004, "p", None, "< 0.001"),
        (0.0496, "p", None, "0.050"),
        (math.nan, "score", "mse", EMPTY),
        (None, "text", None, EMPTY),
        ("a | b\nc", "text", None, r"a \| b c"),
        (True, "text", None, "yes"),
        (3.0, "integer", None, "3"),
    ],
)
def test_format_cell(value: object, kind: str, metric: str | None, text: str) -> None:
    assert format_cell(value, kind, metric) == text


def test_markdown_of_a_table() -> None:
    frame = pd.DataFrame({"a": [0.5], "metric": ["error_rate"]})
    text = to_markdown(Table("Title", (Column("a", "A", "score"),), frame, ["Mind this."]))
    assert text.splitlines()[:3] == ["# Title", "", "> Mind this."]
    assert "50.00 %" in text


def test_origins_are_counted(tmp_path: Path) -> None:
    inputs = make_results(tmp_path, train_seeds=2)
    origins = load_origins(inputs)
    (row,) = origins.to_dict("records")
    assert row["files"] == sum(map(len, inputs.values()))
    assert (row["evoloss"], row["cpu"], row["cores"]) == ("0.1.0", "Some CPU", 2)
    assert row["packages"] == "numpy 2.4.6, torch 2.13.0"
    assert not origin_table(origins).notes

    path = inputs["tuned"][0]
    document = read_json(path)
    document["provenance"]["hardware"] |= {"gpu": "Some GPU", "cuda": "13.0"}
    write_json(path, document)
    origins = load_origins(inputs)
    assert origins["files"].tolist() == [row["files"] - 1, 1]
    assert origins["gpu"].fillna("none").tolist() == ["none", "Some GPU, CUDA 13.0"]
    assert "only approximately" in origin_table(origins).notes[0]
