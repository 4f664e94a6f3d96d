"""Racing: who goes on, what a stopped candidate's score is, and what a search makes of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_tasks import make_toy_task

from benchmarks.racing import compare, summarise
from evoloss.engine import Engine, TrainingSettings
from evoloss.engine.filters import RejectionSettings
from evoloss.engine.racing import RaceResult, RacingSettings, RungScores, run_race
from evoloss.expressions import Program, compile_weighted_tree, parse_expression
from evoloss.search.gp_search import GPSearch
from evoloss.search.individuals import VariationSettings
from evoloss.search.settings import SearchSettings

HALVING = RacingSettings(2, 0.25)
NUM_STEPS = 16
FORMULAS = [
    "square(sub(y, f(x)))",
    "abs(sub(y, f(x)))",
    "mul(-1, mul(y, log(f(x))))",
    "mul(y, log(f(x)))",  # trains the wrong way
    "mul(f(x), sub(f(x), y))",
    "tanh(sub(f(x), y))",
    "add(sqrt(f(x)), square(sub(y, f(x))))",
]
DIVERGING = "mul(1e300, mul(1e300, square(sub(y, f(x)))))"


def make_engine(model_name: str = "linear") -> Engine:
    settings = TrainingSettings(16, 0.1 if model_name == "linear" else 1.0, precision="float64")
    options = {"widths": (8,)} if model_name == "mlp" else {}
    return Engine(make_toy_task(), model_name, settings, torch.device("cpu"), **options)


def compile_all(formulas: Sequence[str]) -> list[Program]:
    return [compile_weighted_tree(parse_expression(formula)) for formula in formulas]


def know_ends(
    reached: Sequence[float] = (), at_rung: float = -1.0, end: float = -1.0
) -> RungScores:
    """Return what a search knows after four trainings to the end that were at ``at_rung`` at every rung."""
    rungs = HALVING.list_rungs(NUM_STEPS)
    finished = {rung: [at_rung] * 4 for rung in rungs[:-1]} | {rungs[-1]: [end] * 4}
    return RungScores({rungs[0]: list(reached)} if reached else {}, finished)


def race(
    engine: Engine,
    formulas: Sequence[str],
    settings: RacingSettings = HALVING,
    rung_scores: RungScores | None = None,
) -> RaceResult:
    """Run a race; if not told otherwise, of a search that has seen fast starters win, whom none here can match."""
    scores = know_ends() if rung_scores is None else rung_scores
    return run_race(engine, compile_all(formulas), NUM_STEPS, settings, scores, 0, "fitness")


@pytest.mark.parametrize(
    ("settings", "rungs"),
    [
        (RacingSettings(1, 0.25), [100]),
        (RacingSettings(2, 0.25), [25, 50, 100]),
        (RacingSettings(3, 0.1), [10, 30, 90, 100]),
        (RacingSettings(2, 0.5), [50, 100]),
        (RacingSettings(2, 0.999), [100]),
    ],
)
def test_rungs(settings: RacingSettings, rungs: list[int]) -> None:
    assert settings.list_rungs(100) == rungs


def test_short_trainings_have_rungs_too() -> None:
    assert RacingSettings(2, 0.25).list_rungs(1) == [1]
    assert RacingSettings(2, 0.01).list_rungs(3) == [1, 2, 3]


@pytest.mark.parametrize("model_name", ["linear", "mlp"])
def test_without_reduction_it_is_the_plain_fitness(model_name: str) -> None:
    engine = make_engine(model_name)
    scores = RungScores()
    result = race(engine, FORMULAS, RacingSettings(1, 0.25), scores)
    plain = engine.compute_fitness(compile_all(FORMULAS), NUM_STEPS, 0, "fitness")
    np.testing.assert_array_equal(result.fitness, plain)
    assert set(result.steps.tolist()) == {NUM_STEPS}
    assert scores == RungScores()


@pytest.mark.parametrize("model_name", ["linear", "mlp"])
def test_every_score_is_that_of_plain_training_up_to_its_step(model_name: str) -> None:
    engine, known = make_engine(model_name), know_ends()
    result = race(engine, FORMULAS, rung_scores=known)
    rungs = HALVING.list_rungs(NUM_STEPS)
    loss = engine.population_loss(compile_all(FORMULAS))
    curve = {
        e.step: e.metric for e in engine.train(loss, NUM_STEPS, 0, "fitness", evaluate_at=rungs)
    }
    expected = [
        known.predict_end(step, NUM_STEPS, curve[step][p]) if step < NUM_STEPS else curve[step][p]
        for p, step in enumerate(result.steps.tolist())
    ]
    np.testing.assert_allclose(result.fitness, expected, rtol=1e-12)
    # the race as its definition says it
    running = list(range(len(FORMULAS)))
    for rung in rungs[:-1]:
        cut = sorted(curve[rung][running])[(len(running) + 1) // 2 - 1]
        stopped = [p for p in running if curve[rung][p] > cut]
        assert [p for p in range(len(FORMULAS)) if result.steps[p] == rung] == stopped
        running = [p for p in running if p not in stopped]
        if len(running) < 3:
            break
    assert set(result.steps.tolist()) > {NUM_STEPS}


@settings(max_examples=15, deadline=None)
@given(st.permutations(range(len(FORMULAS))))
def test_the_order_of_candidates_does_not_matter(order: list[int]) -> None:
    engine = make_engine()
    straight, turned = race(engine, FORMULAS), race(engine, [FORMULAS[p] for p in order])
    np.testing.assert_array_equal(straight.steps[order], turned.steps)
    np.testing.assert_allclose(straight.fitness[order], turned.fitness, rtol=1e-12)


def test_equal_scores_share_their_fate() -> None:
    result = race(make_engine(), [FORMULAS[0]] * 5)
    assert set(result.steps.tolist()) == {NUM_STEPS}


def test_two_candidates_are_too_few_to_stop_one() -> None:
    result = race(make_engine(), [FORMULAS[0], FORMULAS[3]])
    assert result.steps.tolist() == [NUM_STEPS] * 2


def test_former_candidates_count() -> None:
    """One candidate alone is stopped by three better ones of earlier races, and goes on after three worse ones."""
    first = HALVING.list_rungs(NUM_STEPS)[0]
    better = know_ends([-1.0, -1.0, -1.0])
    assert race(make_engine(), FORMULAS[:1], rung_scores=better).steps.tolist() == [first]
    worse = know_ends([9.0, 9.0, 9.0])
    assert race(make_engine(), FORMULAS[:1], rung_scores=worse).steps.tolist() == [NUM_STEPS]
    assert [len(scores) for scores in worse.reached.values()] == [4, 1]


def test_the_first_race_stops_nobody_and_the_next_knows_its_ends() -> None:
    engine, scores = make_engine(), RungScores()
    first = race(engine, FORMULAS, rung_scores=scores)
    assert set(first.steps.tolist()) == {NUM_STEPS}
    np.testing.assert_array_equal(scores.finished[NUM_STEPS], first.fitness)
    assert [len(ends) for ends in scores.finished.values()] == [len(FORMULAS)] * 3
    rung = HALVING.list_rungs(NUM_STEPS)[0]
    assert scores.finished[rung] == scores.reached[rung]
    assert set(race(engine, FORMULAS, rung_scores=scores).steps.tolist()) > {NUM_STEPS}


def test_who_starts_as_slowly_as_a_winner_did_goes_on() -> None:
    """As on a plateau, where half of the losses would be stopped for what is noise yet."""
    slow = know_ends([-1.0, -1.0, -1.0], at_rung=9.0)
    assert race(make_engine(), FORMULAS[:1], rung_scores=slow).steps.tolist() == [NUM_STEPS]
    rung = HALVING.list_rungs(NUM_STEPS)[0]
    scores = RungScores(
        {rung: [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]},
        # the best quarter of the ends, 0.0 and 1.0, were at 0.7 and 0.2 here
        {rung: [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8], NUM_STEPS: [2, 1, 3, 4, 5, 6, 0, 7]},
    )
    assert scores.find_threshold(rung, NUM_STEPS, 2) == 0.7
    scores.finished[NUM_STEPS] = [0, 1, 2, 3, 4, 5, 6, 7]
    assert scores.find_threshold(rung, NUM_STEPS, 2) == 0.4
    assert scores.find_threshold(rung, NUM_STEPS, 8) == 0.2


@pytest.mark.parametrize("model_name", ["linear", "mlp"])
def test_a_diverged_candidate_leaves_at_the_first_rung(model_name: str) -> None:
    engine = make_engine(model_name)
    alone, beside = race(engine, FORMULAS), race(engine, [DIVERGING, *FORMULAS])
    first = HALVING.list_rungs(NUM_STEPS)[0]
    assert np.isnan(beside.fitness[0])
    assert beside.steps[0] == first
    np.testing.assert_allclose(beside.fitness[1:], alone.fitness, rtol=1e-12)
    np.testing.assert_array_equal(beside.steps[1:], alone.steps)


def test_a_race_that_all_leave_ends() -> None:
    result = race(make_engine(), [DIVERGING, DIVERGING])
    assert np.isnan(result.fitness).all()
    assert set(result.steps.tolist()) == set(HALVING.list_rungs(NUM_STEPS)[:1])
    assert race(make_engine(), []).steps.shape == (0,)


def make_search(racing: RacingSettings, seed: int = 0) -> GPSearch:
    settings = SearchSettings(
        population_size=20,
        num_generations=4,
        fitness_steps=NUM_STEPS,
        variation=VariationSettings(4, 1.4, 0.70, 0.25, 0.05, 2, 4, 10),
        rejection=RejectionSettings(40, 40, 0.05, 2),
        local_search=None,
        initial_deviation=0.0,
        racing=racing,
    )
    return GPSearch(make_engine(), settings, seed)


@pytest.mark.parametrize(
    ("score", "expected"),
    [
        (0.8, 0.4),  # half as large, as the one in the middle
        (0.6, 0.3),
        (0.2, math.nextafter(0.15, 1.0)),  # not as good as the best
        (0.0, math.nextafter(0.15, 1.0)),
    ],
)
def test_a_stopped_candidate_is_expected_to_go_on_as_others_did(
    score: float, expected: float
) -> None:
    known = RungScores({}, {4: [0.6, 0.5, 0.9, 0.0], NUM_STEPS: [0.15, 0.25, 0.81, 0.7]})
    assert known.predict_end(4, NUM_STEPS, score) == expected


def test_a_prediction_follows_those_with_similar_scores() -> None:
    """The good ones halve, the bad ones stay as they are; nine of the bad ones are as near as each other."""
    good, bad = [(0.1 + 0.001 * i) for i in range(20)], [0.9] * 12
    ends = [0.5 * at for at in good] + bad
    known = RungScores({}, {4: good + bad, NUM_STEPS: ends})
    assert known.predict_end(4, NUM_STEPS, 0.8) == 0.8
    assert known.predict_end(4, NUM_STEPS, 0.13) == pytest.approx(0.065)
    turned = RungScores({}, {4: (good + bad)[::-1], NUM_STEPS: ends[::-1]})
    for score in (0.11, 0.3, 0.5, 0.7):
        assert known.predict_end(4, NUM_STEPS, score) == turned.predict_end(4, NUM_STEPS, score)


def test_perfect_scores_predict_nothing() -> None:
    known = RungScores({}, {4: [0.0, 0.0], NUM_STEPS: [0.1, 0.2]})
    assert known.predict_end(4, NUM_STEPS, 0.3) == 0.3


def test_a_race_predicts_whom_it_stops() -> None:
    """And where all changed alike, the better of two that stop at one rung stays the better."""
    engine = make_engine()
    equal, halved = know_ends(at_rung=1e-3, end=1e-3), know_ends(at_rung=1e-3, end=5e-4)
    for known in (equal, halved):
        for ends in known.finished.values():
            ends *= 10  # more than this race adds
    raw, half = (race(engine, FORMULAS, rung_scores=known) for known in (equal, halved))
    stopped = half.steps < NUM_STEPS
    assert stopped.sum() > 2
    np.testing.assert_array_equal(raw.steps, half.steps)
    np.testing.assert_array_equal(raw.fitness[~stopped], half.fitness[~stopped])
    np.testing.assert_allclose(half.fitness[stopped], 0.5 * raw.fitness[stopped], rtol=1e-12)


def test_a_search_has_no_stopped_loss_among_its_best() -> None:
    search = make_search(HALVING, seed=4)
    result = search.run()
    records = search.archive.records.values()
    found = {s: [r.fitness for r in records if r.status == s] for s in ("evaluated", "stopped")}
    assert min(found["evaluated"]) < min(found["stopped"])
    stopped = replace(result.front[-1], complexity=1, fitness=min(found["stopped"]), spared=8)
    search.archive.records["small and promising"] = stopped
    assert search.archive.pareto_front() == result.front
    assert all(record.spared == 0 for record in result.front)
    assert result.history[-1]["best_fitness"] == min(found["evaluated"])


def test_a_search_counts_what_racing_spares() -> None:
    search = make_search(HALVING)
    history = search.run().history
    records = search.archive.records.values()
    runs = [r for r in records if r.status in ("evaluated", "stopped")]
    assert sum(row["stopped"] for row in history) == sum(r.spared > 0 for r in runs) > 0
    assert sum(row["diverged"] for row in history) == 0
    spent = sum(row["training_steps"] for row in history)
    assert spent == sum(NUM_STEPS - r.spared for r in runs) < NUM_STEPS * len(runs)
    fates = ("evaluated", "stopped", "diverged", "archive_hits", "zero_gradient", "rejected")
    for row in history:
        assert sum(row[name] for name in fates) + row["gradient_hits"] == row["candidates"]


def test_a_gradient_twin_of_a_stopped_loss_is_no_better() -> None:
    search = make_search(HALVING)
    search.archive.rung_scores = know_ends([-1.0, -1.0, -1.0])
    first = parse_expression("square(sub(y, f(x)))")
    twin = parse_expression("add(y, square(sub(y, f(x))))")
    search.evaluation._evaluate_fresh({"first": first, "twin": twin})
    records = search.archive.records
    assert [records[key].status for key in ("first", "twin")] == ["stopped", "gradient_hits"]
    assert records["twin"].fitness == records["first"].fitness
    assert search.archive.pareto_front() == []


def test_the_same_seed_gives_the_same_race() -> None:
    def run(seed: int) -> list[tuple[str, float]]:
        return [(str(r.tree), r.fitness) for r in make_search(HALVING, seed).run().front]

    assert run(1) == run(1)


def test_the_benchmark_compares_at_equal_budgets() -> None:
    settings = make_search(HALVING).settings
    results = [compare(make_engine(), settings, HALVING, seed, trainings=1) for seed in (0, 1)]
    for result in results:
        assert result["off"]["share_of_steps_spared"] == 0.0
        assert result["off"]["generation"] == settings.num_generations
        assert result["equal_generations"]["generation"] == settings.num_generations
        assert 0.0 < result["equal_generations"]["share_of_steps_spared"] < 1.0
        assert result["equal_time"]["cpu_seconds"] <= result["off"]["cpu_seconds"]
        on, off = result["equal_steps"], result["off"]
        spared = 1.0 - on["share_of_steps_spared"]
        assert spared * on["candidates_trained"] <= off["candidates_trained"] + 1e-9
        assert on["generation"] >= settings.num_generations
    spread = summarise(results)["equal_generations"]["fitness"]
    assert spread["min"] <= spread["mean"] <= spread["max"]
