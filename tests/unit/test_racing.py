"""Racing: who goes on, what is expected of a stopped candidate, and what a search makes of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import ANY

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_tasks import make_toy_task

from benchmarks.racing import compare, find_true_fitness, list_waiting, summarise
from evoloss.engine import Engine, LocalSearchSettings, TrainingSettings
from evoloss.engine.filters import RejectionSettings
from evoloss.engine.racing import (
    Contest,
    FinishedTrainings,
    RaceResult,
    RacingSettings,
    find_contenders,
    run_race,
)
from evoloss.expressions import Program, compile_weighted_tree, parse_expression
from evoloss.expressions.canonical import canonical_key
from evoloss.search.archive import Record
from evoloss.search.gp_search import GPSearch
from evoloss.search.individuals import VariationSettings, to_expression
from evoloss.search.selection import list_contests
from evoloss.search.settings import SearchSettings

pytestmark = pytest.mark.usefixtures("narrow_bounds")
NEIGHBOURS, MARGIN = 3, 0.2
"""What ``narrow_bounds`` sets."""
RACING = RacingSettings((0.25, 0.5))
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


def make_engine(model_name: str = "linear", kind: str = "classification") -> Engine:
    settings = TrainingSettings(16, 0.1 if model_name == "linear" else 1.0, precision="float64")
    options = {"widths": (8,)} if model_name == "mlp" else {}
    task = make_toy_task(kind, num_outputs=1) if kind == "regression" else make_toy_task()
    return Engine(task, model_name, settings, torch.device("cpu"), **options)


def compile_all(formulas: Sequence[str]) -> list[Program]:
    return [compile_weighted_tree(parse_expression(formula)) for formula in formulas]


def know_ends(at_rung: float = 1e-3, end: float = 1e-3, count: int = 40) -> FinishedTrainings:
    """Return what a search knows after trainings to the end that were at ``at_rung`` at every rung."""
    *rungs, last = RACING.list_rungs(NUM_STEPS)
    return FinishedTrainings({rung: [at_rung] * count for rung in rungs} | {last: [end] * count})


def race(
    engine: Engine,
    formulas: Sequence[str],
    settings: RacingSettings = RACING,
    finished: FinishedTrainings | None = None,
    contests: Sequence[Contest] | None = None,
    rivals: Sequence[float] = (),
) -> RaceResult:
    """Run a race; if not told otherwise, for the best place of all where trainings end as they were at the rungs."""
    known = know_ends() if finished is None else finished
    all_of_them = [Contest(frozenset(range(len(formulas) + len(rivals))))]
    return run_race(
        engine,
        compile_all(formulas),
        NUM_STEPS,
        settings,
        known,
        all_of_them if contests is None else contests,
        rivals,
        0,
        "fitness",
    )


def measure_curve(engine: Engine, formulas: Sequence[str]) -> dict[int, np.ndarray]:
    """Return the scores of plain training at every rung and at the end."""
    loss = engine.population_loss(compile_all(formulas))
    rungs = RACING.list_rungs(NUM_STEPS)
    run = engine.train(loss, NUM_STEPS, 0, "fitness", evaluate_at=rungs)
    return {evaluation.step: evaluation.metric for evaluation in run}


@pytest.mark.parametrize(
    ("rungs", "steps"),
    [
        ((), [100]),
        ((0.25, 0.5), [25, 50, 100]),
        ((0.5, 0.25), [25, 50, 100]),
        ((0.999,), [100]),
        ((0.001, 0.002), [1, 100]),
    ],
)
def test_rungs(rungs: tuple[float, ...], steps: list[int]) -> None:
    assert RacingSettings(rungs).list_rungs(100) == steps


def test_short_trainings_have_rungs_too() -> None:
    assert RACING.list_rungs(1) == [1]
    assert RacingSettings((0.01, 0.5)).list_rungs(3) == [1, 2, 3]


Bounds = list[tuple[float, float, float]]
BOUNDS = st.lists(
    st.tuples(*[st.floats(0, 1).map(lambda value: round(value, 1))] * 3), min_size=1, max_size=9
)


@given(BOUNDS, st.data())
def test_who_is_no_contender_changes_no_contest(cases: Bounds, data: st.DataObject) -> None:
    """Whatever fitness between the bounds it turns out to have; and whoever may matter is a contender."""
    best, values, worst = np.sort(np.array(cases), axis=1).T
    numbers = st.frozensets(st.sampled_from(range(len(cases))), min_size=1)
    contests = data.draw(st.lists(st.builds(Contest, numbers, st.integers(1, 3)), max_size=5))
    contenders = find_contenders(contests, best, worst)
    for contest in contests:
        entrants = list(contest.entrants)
        left = [i for i in entrants if contenders[i]]
        all_values, values_left = (np.sort(values[n])[: contest.places] for n in (entrants, left))
        np.testing.assert_array_equal(all_values, values_left)
    for i in range(len(cases)):
        # the best case of this one, the worst of the others
        at_worst = np.where(np.arange(len(cases)) == i, best, worst)
        wins = [
            sum(at_worst[n] < best[i] for n in contest.entrants) < contest.places
            for contest in contests
            if i in contest.entrants
        ]
        assert contenders[i] == any(wins)


@pytest.mark.parametrize("model_name", ["linear", "mlp"])
def test_without_rungs_it_is_the_plain_fitness(model_name: str) -> None:
    engine = make_engine(model_name)
    finished = FinishedTrainings()
    result = race(engine, FORMULAS, RacingSettings(), finished, contests=[])
    plain = engine.compute_fitness(compile_all(FORMULAS), NUM_STEPS, 0, "fitness")
    np.testing.assert_array_equal(result.fitness, plain)
    np.testing.assert_array_equal(result.best_case, plain)
    assert set(result.steps.tolist()) == {NUM_STEPS}
    assert finished == FinishedTrainings()


@pytest.mark.parametrize("margin", [0.0, MARGIN])
@pytest.mark.parametrize("model_name", ["linear", "mlp"])
def test_every_score_is_that_of_plain_training_up_to_its_step(
    model_name: str, margin: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And where trainings end as they were, those stop that are worse, by the margin, than enough others."""
    monkeypatch.setattr("evoloss.engine.racing.MARGIN", margin)
    engine, known = make_engine(model_name), know_ends()
    curve = measure_curve(engine, FORMULAS)
    first, second, _ = RACING.list_rungs(NUM_STEPS)
    rivals = [0.75 * np.median(curve[first]), 0.75 * np.median(curve[second])]
    contests = [
        Contest(frozenset(range(9)), 3),
        Contest(frozenset([3, 5])),
        Contest(frozenset([0, 1, 4, 7, 8])),
    ]
    result = race(engine, FORMULAS, finished=known, contests=contests, rivals=rivals)
    scores = np.array([curve[step][p] for p, step in enumerate(result.steps.tolist())])
    np.testing.assert_allclose(result.fitness, scores, rtol=1e-12)
    best_case = np.where(result.steps < NUM_STEPS, 1 - margin, 1.0) * scores
    np.testing.assert_allclose(result.best_case, best_case, rtol=1e-12)
    running = set(range(7))
    for rung in (first, second):
        # who left before is no rival
        worst = [*(curve[rung][p] if p in running else math.inf for p in range(7)), *rivals]
        going = {
            p
            for p in running
            for contest in contests
            if p in contest.entrants
            and sum(worst[q] < (1 - margin) * curve[rung][p] for q in contest.entrants)
            < contest.places
        }
        assert {p for p in range(7) if result.steps[p] == rung} == running - going
        running = going
    assert set(result.steps.tolist()) > {NUM_STEPS}
    # whoever ran to the end is known from now on
    assert [len(scores) for scores in known.scores.values()] == [40 + len(running)] * 3


@settings(max_examples=15, deadline=None)
@given(st.permutations(range(len(FORMULAS))))
def test_the_order_of_candidates_does_not_matter(order: list[int]) -> None:
    engine = make_engine()
    straight, turned = race(engine, FORMULAS), race(engine, [FORMULAS[p] for p in order])
    np.testing.assert_array_equal(straight.steps[order], turned.steps)
    np.testing.assert_allclose(straight.fitness[order], turned.fitness, rtol=1e-12)


def test_equal_scores_share_their_fate_in_one_contest() -> None:
    result = race(make_engine(), [FORMULAS[0]] * 5)
    assert set(result.steps.tolist()) == {NUM_STEPS}


def test_known_rivals_stop_a_candidate() -> None:
    first = RACING.list_rungs(NUM_STEPS)[0]
    engine = make_engine()
    assert race(engine, FORMULAS[:1], rivals=[1e-9]).steps.tolist() == [first]
    assert race(engine, FORMULAS[:1], rivals=[9.0, math.inf]).steps.tolist() == [NUM_STEPS]


def test_who_competes_with_nobody_goes_on_and_who_is_in_no_contest_stops() -> None:
    first = RACING.list_rungs(NUM_STEPS)[0]
    alone = [Contest(frozenset([1]))]
    assert race(make_engine(), FORMULAS[:2], contests=alone).steps.tolist() == [first, NUM_STEPS]


def test_the_first_race_stops_nobody_and_the_next_knows_its_ends() -> None:
    engine, finished = make_engine(), FinishedTrainings()
    many = FORMULAS * (NEIGHBOURS // len(FORMULAS) + 1)
    first = race(engine, many, finished=finished, contests=[])
    assert set(first.steps.tolist()) == {NUM_STEPS}
    curve = measure_curve(engine, many)
    assert list(finished.scores) == list(curve)
    for step, scores in finished.scores.items():
        np.testing.assert_allclose(scores, curve[step], rtol=1e-12)
    assert NUM_STEPS not in race(engine, FORMULAS, finished=finished, contests=[]).steps
    few = know_ends(count=NEIGHBOURS - 1)
    assert set(race(engine, FORMULAS, finished=few, contests=[]).steps.tolist()) == {NUM_STEPS}


@pytest.mark.parametrize("model_name", ["linear", "mlp"])
def test_a_diverged_candidate_leaves_at_the_first_rung_and_is_no_rival(model_name: str) -> None:
    engine = make_engine(model_name)
    alone = race(engine, FORMULAS)
    contests = [
        Contest(frozenset(range(1, 8))),
        Contest(frozenset([0, 4])),
        Contest(frozenset([0])),
    ]
    beside = race(engine, [DIVERGING, *FORMULAS], contests=contests)
    assert np.isnan(beside.fitness[0])
    assert beside.steps[0] == RACING.list_rungs(NUM_STEPS)[0]
    others = [0, 1, 2, 4, 5, 6]  # number 3 has the diverged one alone to beat
    np.testing.assert_allclose(beside.fitness[1:][others], alone.fitness[others], rtol=1e-12)
    np.testing.assert_array_equal(beside.steps[1:][others], alone.steps[others])
    assert alone.steps[3] < beside.steps[4] == NUM_STEPS


def test_a_race_that_all_leave_ends() -> None:
    result = race(make_engine(), [DIVERGING, DIVERGING])
    assert np.isnan(result.fitness).all()
    assert set(result.steps.tolist()) == set(RACING.list_rungs(NUM_STEPS)[:1])
    assert race(make_engine(), []).steps.shape == (0,)


def test_candidates_are_expected_to_go_on_as_others_did() -> None:
    known = FinishedTrainings({4: [0.6, 0.5, 0.9, 0.0], NUM_STEPS: [0.15, 0.25, 0.81, 0.7]})
    found = known.forecast(4, NUM_STEPS, [0.8, 0.4, 0.2, 0.0])
    scores = np.array([0.8, 0.4, 0.2])
    np.testing.assert_allclose(found.best_case, [*((1 - MARGIN) * 0.25 * scores), -math.inf])
    # the last two are not expected to be as good as the best
    least = math.nextafter(0.15, 1.0)
    np.testing.assert_allclose(found.expected, [0.4, 0.2, least, least], rtol=1e-15)
    assert (found.expected[2:] > 0.15).all()
    np.testing.assert_allclose(found.worst_case, [*(0.9 * scores), math.inf])


def test_a_forecast_follows_those_with_similar_scores() -> None:
    """The good ones halve, the bad ones stay as they are; all of the bad ones are as near as each other."""
    good, bad = [(0.1 + 0.001 * i) for i in range(20)], [0.9] * 12
    ends = [0.5 * at for at in good] + bad
    known = FinishedTrainings({4: good + bad, NUM_STEPS: ends})
    found = known.forecast(4, NUM_STEPS, [0.8, 0.13])
    assert [values[0] for values in found] == [(1 - MARGIN) * 0.8, 0.8, 0.8]
    assert found.worst_case[1] == pytest.approx(0.065)
    turned = FinishedTrainings({4: (good + bad)[::-1], NUM_STEPS: ends[::-1]})
    scores = (0.11, 0.3, 0.5, 0.7)
    np.testing.assert_array_equal(
        known.forecast(4, NUM_STEPS, scores), turned.forecast(4, NUM_STEPS, scores)
    )


def test_only_neighbours_make_a_forecast() -> None:
    """Enough that go on as they are, then one that gets far better and one that gets far worse."""
    same = [0.5] * NEIGHBOURS
    known = FinishedTrainings({4: [*same, 0.7, 0.71], NUM_STEPS: [*same, 0.007, 7.1]})
    narrow, wide = (known.forecast(4, NUM_STEPS, [score]) for score in (0.52, 0.65))
    np.testing.assert_allclose(np.ravel(narrow), [(1 - MARGIN) * 0.52, 0.52, 0.52])
    np.testing.assert_allclose(np.ravel(wide), [(1 - MARGIN) * 0.0065, 0.65, 6.5])


def test_perfect_scores_forecast_nothing() -> None:
    known = FinishedTrainings({4: [0.0, 0.0, 0.0], NUM_STEPS: [0.1, 0.2, 0.3]})
    found = known.forecast(4, NUM_STEPS, [0.3])
    np.testing.assert_array_equal(np.ravel(found), [-math.inf, 0.3, math.inf])


def test_a_race_predicts_whom_it_stops() -> None:
    engine = make_engine()
    halved = know_ends(at_rung=1e-3, end=5e-4)
    result = race(engine, FORMULAS, finished=halved)
    curve = measure_curve(engine, FORMULAS)
    stopped = np.flatnonzero(result.steps < NUM_STEPS)
    assert len(stopped) > 2
    for p in stopped:
        assert result.fitness[p] == pytest.approx(0.5 * curve[int(result.steps[p])][p], rel=1e-9)
    ended = result.steps == NUM_STEPS
    np.testing.assert_allclose(result.fitness[ended], curve[NUM_STEPS][ended], rtol=1e-12)


def make_search(
    racing: RacingSettings = RACING,
    seed: int = 0,
    *,
    kind: str = "classification",
    local_search: LocalSearchSettings | None = None,
    elitism_rate: float = 0.05,
) -> GPSearch:
    settings = SearchSettings(
        population_size=20,
        num_generations=8,
        fitness_steps=NUM_STEPS,
        variation=VariationSettings(4, 1.4, 0.70, 0.25, elitism_rate, 2, 4, 10),
        rejection=RejectionSettings(40, 40, 0.05, 2),
        local_search=local_search,
        initial_deviation=1e-3 if local_search else 0.0,
        racing=racing,
    )
    return GPSearch(make_engine(kind=kind), settings, seed)


def find_record(search: GPSearch, formula: str) -> Record:
    return search.archive.records[canonical_key(parse_expression(formula))]


def outcome_of(record: Record) -> tuple[float, int, float]:
    return record.fitness, record.spared, record.best_case


@pytest.mark.parametrize("local_search", [None, LocalSearchSettings(4, 1, 0.01)])
def test_a_search_goes_as_without_racing(local_search: LocalSearchSettings | None) -> None:
    """Same populations, same front: the forecasts are no proofs, so not for every seed there is."""
    same = spared = 0
    for seed in range(6):
        plain, raced = (
            make_search(racing, seed, local_search=local_search)
            for racing in (RacingSettings(), RACING)
        )
        expected, found = plain.run(), raced.run()
        spared += sum(row["stopped"] for row in found.history)
        trees = [[list(i) for i in search.population] for search in (plain, raced)]
        fronts = [
            [replace(r, best_case=0.0, twin_of=None) for r in result.front]
            for result in (expected, found)
        ]
        same += trees[0] == trees[1] and fronts[0] == fronts[1]
    assert spared > 10
    assert same >= 5


def test_a_search_has_no_stopped_loss_among_its_best() -> None:
    search = make_search(seed=4)
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
    search = make_search()
    history = search.run().history
    records = search.archive.records.values()
    runs = [r for r in records if r.status in ("evaluated", "stopped")]
    # one that came back may have been trained to the end since
    assert sum(row["stopped"] for row in history) >= sum(r.spared > 0 for r in runs) > 0
    assert sum(row["diverged"] for row in history) == 0
    spent = sum(row["training_steps"] for row in history)
    trained = sum(row["evaluated"] + row["stopped"] for row in history)
    assert spent < NUM_STEPS * trained
    assert spent >= sum(NUM_STEPS - r.spared for r in runs)
    fates = ("evaluated", "stopped", "diverged", "archive_hits", "zero_gradient", "rejected")
    for row in history:
        assert sum(row[name] for name in fates) + row["gradient_hits"] == row["candidates"]


GOOD, BAD, TWIN, LATER = (
    "mul(-1, mul(y, log(f(x))))",
    "add(sqrt(f(x)), square(sub(y, f(x))))",
    "add(y, add(sqrt(f(x)), square(sub(y, f(x)))))",
    "add(mul(y, y), add(sqrt(f(x)), square(sub(y, f(x)))))",
)


def evaluate(search: GPSearch, formulas: Sequence[str], contests: Sequence[Contest]) -> list[str]:
    """Evaluate losses as a generation; return their statuses."""
    trees = [parse_expression(formula) for formula in formulas]
    generation = len(search._history)
    population = [search.variation.build_individual(tree) for tree in trees]
    search.evaluation.evaluate(population, generation, contests)
    search._history.append({})
    records = search.archive.records
    return [records[canonical_key(tree)].status for tree in trees]


def test_a_stopped_loss_that_comes_back_is_trained_where_it_may_win() -> None:
    search = make_search()
    pair = [Contest(frozenset([0, 1]))]
    assert evaluate(search, [GOOD], []) == ["evaluated"]
    search.archive.finished = know_ends()  # without the one that improved
    assert evaluate(search, [GOOD, BAD], pair) == ["evaluated", "stopped"]
    key = canonical_key(parse_expression(BAD))
    stopped = search.archive.records[key]
    assert stopped.best_case <= stopped.fitness < math.inf
    steps = search.evaluation.counts["training_steps"]
    assert steps == NUM_STEPS - stopped.spared
    # it cannot win here either
    assert evaluate(search, [GOOD, BAD], pair) == ["evaluated", "stopped"]
    assert search.evaluation.counts == {"archive_hits": 2, "training_steps": 0}
    # but alone it wins, whatever else is asked for; it stays the loss of the generation that it came in
    assert evaluate(search, [BAD, GOOD, BAD], [Contest(frozenset([0]))])[0] == "evaluated"
    assert search.evaluation.counts == {"archive_hits": 3, "training_steps": NUM_STEPS}
    trained = make_search(RacingSettings())
    evaluate(trained, [BAD], [])
    outcome = replace(trained.archive.records[key], generation=1, best_case=ANY)
    assert search.archive.records[key] == outcome


def test_a_gradient_twin_shares_the_fate_and_its_contests_count() -> None:
    def meet(contests: list[Contest]) -> tuple[GPSearch, list[str]]:
        search = make_search()
        evaluate(search, [GOOD], [])
        search.archive.finished = know_ends()
        return search, evaluate(search, [GOOD, BAD, TWIN], contests)

    search, statuses = meet([Contest(frozenset([0, 1])), Contest(frozenset([0, 2]))])
    assert statuses == ["evaluated", "stopped", "gradient_hits"]
    first, twin = (find_record(search, text) for text in (BAD, TWIN))
    assert twin.twin_of == canonical_key(parse_expression(BAD))
    assert outcome_of(twin) == outcome_of(first)
    assert first not in search.archive.pareto_front()
    # one that comes later has the same fitness, and if it may win the first one goes on
    pair = Contest(frozenset([0, 1]))
    assert evaluate(search, [GOOD, LATER], [pair]) == ["evaluated", "gradient_hits"]
    assert outcome_of(find_record(search, LATER)) == outcome_of(first)
    assert evaluate(search, [GOOD, LATER], [Contest(frozenset([1]))])[1] == "gradient_hits"
    ended = find_record(search, BAD)
    assert (ended.status, ended.spared) == ("evaluated", 0)
    assert {outcome_of(find_record(search, text)) for text in (TWIN, LATER)} == {outcome_of(ended)}
    # and a twin that may win keeps the other in the race
    _, statuses = meet([Contest(frozenset([0, 1])), Contest(frozenset([2]))])
    assert statuses == ["evaluated", "evaluated", "gradient_hits"]


def test_a_simpler_twin_that_may_be_on_the_front_keeps_the_other_in_the_race() -> None:
    simple, longer = (text.format("abs(sub(y, f(x)))") for text in ("{}", "add(mul(y, y), {})"))
    assert parse_expression(simple).complexity < parse_expression(GOOD).complexity
    search = make_search()
    evaluate(search, [GOOD], [])
    search.archive.finished = know_ends()
    assert evaluate(search, [longer], []) == ["stopped"]
    # whether it comes in a later generation or the same
    assert evaluate(search, [simple], []) == ["gradient_hits"]
    assert find_record(search, longer).status == "evaluated"
    again = make_search()
    evaluate(again, [GOOD], [])
    again.archive.finished = know_ends()
    assert evaluate(again, [longer, simple], []) == ["evaluated", "gradient_hits"]
    assert find_record(again, simple) in again.archive.pareto_front()


def test_who_diverges_after_a_rung_leaves_twins_and_rivals_as_without_racing() -> None:
    search = make_search(kind="regression")
    fair, explosive = "square(sub(y, f(x)))", "square(square(sub(y, f(x))))"
    twins = [f"add({constant}, {explosive})" for constant in ("y", "mul(y, y)")]
    evaluate(search, [fair], [])
    search.archive.finished = know_ends(at_rung=1.0, end=1.0)
    pairs = [Contest(frozenset([0, i])) for i in (1, 2)]
    statuses = evaluate(search, [fair, explosive, twins[0]], pairs)
    assert statuses == ["evaluated", "stopped", "gradient_hits"]
    # trained after all it diverges; its twin, which is not there, waits in its place
    alone = [Contest(frozenset([1]))]
    assert evaluate(search, [fair, explosive], alone) == ["evaluated", "diverged"]
    assert outcome_of(find_record(search, twins[0])) == (math.inf, NUM_STEPS, -math.inf)
    (waiting,) = list_waiting(search.archive)
    assert waiting == canonical_key(parse_expression(twins[0]))
    known = find_true_fitness(search.evaluation.engine, search.archive, NUM_STEPS, 0)
    assert [key for key, fitness in known.items() if math.isnan(fitness)] == [waiting]
    # and is trained for another twin that comes; it diverges too, and so does that one
    assert evaluate(search, [fair, twins[1]], alone) == ["evaluated", "diverged"]
    assert find_record(search, twins[0]).status == "diverged"
    counts = search.evaluation.counts
    assert (counts["archive_hits"], counts["diverged"], counts["gradient_hits"]) == (1, 1, 0)
    assert counts["training_steps"] == 2 * RACING.list_rungs(NUM_STEPS)[1]  # as far as each came
    assert len(search.archive.key_by_gradient) == 1


def test_the_first_twin_whose_training_ends_speaks_for_the_others() -> None:
    """Where gradients vanish far away nothing diverges."""
    explosive, also = "square(square(sub(y, f(x))))", "add(y, square(square(sub(y, f(x)))))"
    bounded = "min(square(square(sub(y, f(x)))), square(square(square(add(1, add(1, 1))))))"
    late = [f"add({constant}, {bounded})" for constant in ("y", "mul(y, y)")]
    search, alone = (make_search(RacingSettings(), kind="regression") for _ in range(2))
    statuses = evaluate(search, [explosive, also, bounded, late[0]], [])
    assert statuses == ["diverged", "diverged", "evaluated", "gradient_hits"]
    evaluate(alone, [bounded], [])
    heir = find_record(search, bounded)
    assert heir.twin_of is None
    assert heir.fitness == pytest.approx(find_record(alone, bounded).fitness, rel=1e-12)
    # now and later
    assert evaluate(search, [late[1]], []) == ["gradient_hits"]
    assert search.evaluation.counts["training_steps"] == 0
    for text in late:
        twin = find_record(search, text)
        assert twin.twin_of == canonical_key(parse_expression(bounded))
        assert outcome_of(twin) == outcome_of(heir)


def test_a_twin_of_who_diverged_is_trained_as_if_it_had_come_alone() -> None:
    """With the weights of its own local search, and as the formula that came out of it."""
    explosive = "square(square(sub(y, f(x))))"
    twin = f"sub({explosive}, mul(-1, mul(-1, y)))"
    local_search = LocalSearchSettings(1, 1, 1e-9)  # weights so near 1 that gradients stay equal
    settings = make_search(RacingSettings(), local_search=local_search).settings
    alone, beside = (
        GPSearch(make_engine(kind="regression"), replace(settings, initial_deviation=0.0), 0)
        for _ in range(2)
    )
    evaluate(alone, [explosive], [])
    fingerprint = alone.evaluation._verdicts.gradient_keys
    assert evaluate(alone, [twin], []) == ["diverged"]
    assert alone.evaluation._verdicts.gradient_keys == fingerprint
    assert evaluate(beside, [explosive, twin], []) == ["diverged", "diverged"]
    expected = replace(find_record(alone, twin), generation=0)
    assert find_record(beside, twin) == expected


@pytest.mark.parametrize("ratio", [0.01, 1.0])
def test_wrong_forecasts_of_rivals_stop_nobody_for_good(ratio: float) -> None:
    """If all were expected to become a hundred times better, nobody stays stopped whom nobody beats by so much."""
    pairs = [Contest(frozenset([2, i])) for i in range(len(FORMULAS))]
    searches = []
    for racing in (RacingSettings(), RACING):
        search = make_search(racing)
        evaluate(search, FORMULAS[1:2], [])  # a simple one, so that the others are not the simplest
        search.archive.finished = know_ends(end=ratio * 1e-3)
        evaluate(search, FORMULAS, pairs)
        searches.append(search)
    spared = sum(r.spared for r in searches[1].archive.records.values())
    assert (spared == 0) == (ratio < 1)
    for contest in pairs:
        winners = [
            min(contest.entrants, key=lambda i: find_record(search, FORMULAS[i]).fitness)
            for search in searches
        ]
        assert winners[0] == winners[1]
    counts = [search.evaluation.counts for search in searches]
    assert counts[1]["stopped"] == sum(r.spared > 0 for r in searches[1].archive.records.values())
    assert counts[0]["evaluated"] == counts[1]["evaluated"] + counts[1]["stopped"]


def test_who_wins_was_trained_to_the_end() -> None:
    """In every generation, the last one too: each tournament's winner, the elite, the front."""
    stopped: list[int] = []

    def check(row: dict[str, Any]) -> None:
        keys = [canonical_key(to_expression(individual)) for individual in search.population]
        records = [search.archive.records[key] for key in keys]
        stopped.append(sum(record.spared > 0 for record in records))
        children = search.plan_children()
        assert len(children) == 17
        for contest in list_contests(children, 3, 20):
            ranked = sorted(records[i].fitness for i in contest.entrants)
            bar = ranked[: contest.places][-1]
            assert all(
                records[i].spared == 0 for i in contest.entrants if records[i].fitness <= bar
            )

    for seed in range(4):
        search = make_search(seed=seed, elitism_rate=0.15)
        search.run(check)
    assert sum(stopped) > 0


def test_what_may_be_on_the_front_is_trained_to_the_end() -> None:
    """A simpler loss than all known ones, however bad."""
    search = make_search()
    assert evaluate(search, [GOOD], []) == ["evaluated"]
    search.archive.finished = know_ends()
    assert evaluate(search, [BAD, "abs(sub(y, f(x)))"], []) == ["stopped", "evaluated"]
    values = [record.fitness for record in search.archive.records.values()]
    assert values[0] < values[2] < values[1]


def test_the_same_seed_gives_the_same_race() -> None:
    def run(seed: int) -> list[tuple[str, float]]:
        return [(str(r.tree), r.fitness) for r in make_search(RACING, seed).run().front]

    assert run(1) == run(1)


def test_the_benchmark_compares_at_equal_budgets() -> None:
    settings = make_search().settings
    results = [compare(make_engine(), settings, RACING, seed, trainings=1) for seed in (0, 1)]
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
