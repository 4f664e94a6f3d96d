"""Loss curves and figures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from analysis_files import LOSSES, REASON, make_results
from matplotlib.figure import Figure

from evoloss.analysis.aggregate import Results, aggregate_results
from evoloss.analysis.figure_filters import FATES, count_fates, draw_filters
from evoloss.analysis.figure_formulas import FIGURE_SETTINGS, draw_formulas, typeset_formula
from evoloss.analysis.figure_learning_curves import draw_learning_curves
from evoloss.analysis.figure_losses import draw_losses
from evoloss.analysis.figure_search_progress import draw_search_progress
from evoloss.analysis.figure_test_error import draw_test_error
from evoloss.analysis.loss_curves import (
    DOMAINS,
    differentiate,
    element_loss,
    standard_loss,
    trace_loss,
    view_limits,
)
from evoloss.analysis.style import METHOD_STYLES, figure_style, method_style, save_figure
from evoloss.errors import ExpressionError

FIGURES: dict[str, Callable[[Results], Figure]] = {
    "test_error": lambda r: draw_test_error(r.final, r.comparison),
    "learning_curves": lambda r: draw_learning_curves(r.runs),
    "search_progress": lambda r: draw_search_progress(r.searches),
    "filters": lambda r: draw_filters(r.searches),
    "losses": lambda r: draw_losses(r.losses),
    "formulas": lambda r: draw_formulas(r.losses),
}
SVG_TEXT = "{http://www.w3.org/2000/svg}text"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return aggregate_results(make_results(tmp_path_factory.mktemp("results"), train_seeds=3))


@pytest.fixture(scope="module")
def empty() -> Results:
    names = ("datasets", "runs", "tuned", "searches", "histories", "simplified", "finetuned")
    return aggregate_results({name: [] for name in (*names, "losses")})


def _texts(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in figure.findobj(mpl.text.Text))


# --- curves ---


def test_gradients_match_autograd() -> None:
    torch = pytest.importorskip("torch")
    from evoloss.expressions import compile_expression, evaluate_program, parse_expression

    for kind, texts in LOSSES.items():
        for text in texts:
            program = compile_expression(parse_expression(text))
            for label in DOMAINS[kind].labels:
                _, f = DOMAINS[kind].predictions(label, 101)
                y = np.full_like(f, label)
                x = torch.tensor(f, requires_grad=True)
                weights = [float(w) for w in program.weights]
                value = evaluate_program(program, torch.tensor(y), x, weights, torch)
                if value.requires_grad:
                    value.sum().backward()
                exact = np.zeros_like(f) if x.grad is None else x.grad.numpy()
                mine = differentiate(element_loss(text), y, f)
                np.testing.assert_allclose(mine, exact, rtol=1e-3, atol=1e-4, err_msg=text)


@pytest.mark.parametrize("kind", DOMAINS)
def test_scaling_a_loss_does_not_change_its_curves(kind: str) -> None:
    one = trace_loss(element_loss(LOSSES[kind][0]), DOMAINS[kind])
    other = trace_loss(element_loss(f"add(mul(7.5, {LOSSES[kind][0]}), add(y, 3))"), DOMAINS[kind])
    assert one is not None
    assert other is not None
    slopes = []
    for a, b in zip(one, other, strict=True):
        np.testing.assert_allclose(a.value, b.value, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(a.gradient, b.gradient, rtol=1e-3, atol=1e-6)
        assert a.value.min() == 0.0
        slopes.append(np.abs(a.gradient).mean())
    assert np.mean(slopes) == pytest.approx(1.0)


def test_standard_losses() -> None:
    name, loss = standard_loss("classification")
    assert name == "cross-entropy"
    half = np.array([0.5])
    np.testing.assert_allclose(loss(np.ones(1), half), np.log(2.0))
    np.testing.assert_array_equal(loss(np.zeros(1), half), 0.0)
    assert standard_loss("regression")[1](np.ones(1), np.array([3.0])) == 4.0


@pytest.mark.parametrize("text", ["sign(sub(f(x), y))", "mul(0, sub(y, f(x)))"])
def test_a_loss_without_slope_has_no_curve(text: str) -> None:
    assert trace_loss(element_loss(text), DOMAINS["regression"]) is None


def test_a_jump_gives_no_spike() -> None:
    loss = element_loss("add(sign(sub(f(x), 0.5)), mul(y, f(x)))")
    f = np.array([0.5 - 5e-7, 0.5 + 5e-7])
    np.testing.assert_allclose(differentiate(loss, np.ones(2), f), 1.0, rtol=1e-6)


def test_a_broken_expression_is_refused() -> None:
    with pytest.raises(ExpressionError):
        element_loss("exec(y)")


def test_view_limits_ignore_a_spike() -> None:
    calm, spike = np.linspace(-1, 1, 100), np.linspace(-1, 1, 100)
    spike[50] = 1e9
    low, high = view_limits([calm, spike])
    assert -1.5 < low < -0.9
    assert 0.9 < high < 1.5
    assert view_limits([]) == (-1.0, 1.0)


# --- figures ---


@pytest.mark.parametrize("name", FIGURES)
def test_figure_is_drawn_and_reproducible(name: str, results: Results, tmp_path: Path) -> None:
    before = dict(mpl.rcParams)
    for folder in ("a", "b"):
        with figure_style(**(FIGURE_SETTINGS if name == "formulas" else {})):
            svg, png = (tmp_path / folder / f"figure.{kind}" for kind in ("svg", "png"))
            save_figure(FIGURES[name](results), svg, png)
    assert dict(mpl.rcParams) == before
    for kind in ("svg", "png"):
        one, two = ((tmp_path / folder / f"figure.{kind}").read_bytes() for folder in "ab")
        assert one == two
    tree = ElementTree.parse(tmp_path / "a/figure.svg")  # noqa: S314 (our own file)
    assert bool(list(tree.iter(SVG_TEXT))) == (name != "formulas")


@pytest.mark.parametrize("name", FIGURES)
def test_nothing_to_draw_is_said(name: str, empty: Results, tmp_path: Path) -> None:
    figure = FIGURES[name](empty)
    save_figure(figure, tmp_path / "figure.svg", tmp_path / "figure.png")
    assert "No " in _texts(figure)


@pytest.mark.parametrize("name", ["search_progress", "filters", "losses", "formulas"])
def test_a_failed_search_is_named(name: str, results: Results) -> None:
    text = " ".join(_texts(FIGURES[name](results)).split())
    assert "gp_lfl, seed 1 failed" in text
    assert REASON in text


def test_missing_runs_are_named(results: Results) -> None:
    text = " ".join(_texts(FIGURES["test_error"](results)).split())
    assert "3 of 9 failed" in text
    assert "1 of 9 diverged" in text
    curves = _texts(FIGURES["learning_curves"](results))
    assert "gp_lfl, search seed 1: search failed" in curves
    assert "evomal: 1 of its runs diverged" in curves


@pytest.mark.parametrize("name", FIGURES)
def test_all_searches_failed(name: str, results: Results, tmp_path: Path) -> None:
    runs = results.runs.copy()
    learned = runs["search_seed"].notna()
    runs.loc[learned, "status"], runs.loc[learned, "reason"] = "failed", REASON
    runs.loc[learned, "value"] = np.nan
    final = results.final.copy()
    learned = final["search_seed"].notna()
    final.loc[learned, "status"], final.loc[learned, "test"] = "failed", np.nan
    numbers = {"best_fitness": np.nan, "median_fitness": np.nan, "evaluated": 0}
    lost = Results(
        runs=runs,
        final=final,
        comparison=results.comparison.assign(p_value=np.nan, verdict="not tested"),
        losses=results.losses.assign(
            status="failed", reason=REASON, expression=None, scale=None, latex=None, infix=None
        ),
        searches=results.searches.assign(status="failed", reason=REASON, **numbers),
        datasets=results.datasets,
        tuned=results.tuned,
        origins=results.origins,
        missing=results.missing,
    )
    save_figure(FIGURES[name](lost), tmp_path / "figure.svg", tmp_path / "figure.png")


def test_fates_sum_to_the_candidates() -> None:
    row = {"task": "t", "method": "m", "candidates": 10, "archive_hits": 2, "zero_gradient": 1}
    row |= {"rejected": 2, "gradient_hits": 1, "stopped": 0, "diverged": 1}
    apart = count_fates(pd.DataFrame([{**row, "evaluated": 2}]))
    inside = count_fates(pd.DataFrame([{**row, "evaluated": 4}]))
    for counts in (apart, inside):
        total = counts[[name for name, *_ in FATES]].sum(axis=1)
        assert total.tolist() == [10.0]
    assert apart["other"].tolist() == [1.0]
    assert inside["evaluated"].tolist() == [3.0]


def test_long_formulas_shrink_and_then_become_text() -> None:
    short = typeset_formula(r"\left|y - f(x)\right|", "|y - f(x)|", 8.0)
    long = typeset_formula(" + ".join(["f(x)"] * 18), "", 8.0)
    endless = typeset_formula(" + ".join(["f(x)"] * 300), " + ".join(["f(x)"] * 300), 8.0)
    broken = typeset_formula(r"\nosuchcommand{y}", "y - f(x)", 8.0)
    assert short.math
    assert long.math
    assert long.size < short.size
    assert not endless.math
    assert "in full in the table" in endless.text
    assert (broken.math, broken.text) == (False, "y - f(x)")
    assert typeset_formula(None, None, 8.0).text == "(no formula)"


def test_methods_differ_in_more_than_colour() -> None:
    styles = list(METHOD_STYLES.values())
    for attribute in ("colour", "marker", "line"):
        assert len({getattr(style, attribute) for style in styles}) == len(styles)
    assert method_style("ml3") == method_style("ml3")
