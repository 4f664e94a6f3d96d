"""One search: genetic programming on one task, with one method and one seed."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

from evoloss.engine import LocalSearchSettings
from evoloss.engine.filters import RejectionSettings
from evoloss.engine.racing import RacingSettings
from evoloss.search.gp_search import GPSearch, SearchResult
from evoloss.search.individuals import VariationSettings
from evoloss.search.settings import SearchSettings
from evoloss.stages.setup import StageInput

logger = logging.getLogger(__name__)

_VARIATION = (
    "tournament_size",
    "parsimony_size",
    "crossover_rate",
    "mutation_rate",
    "elitism_rate",
    "init_min_height",
    "init_max_height",
    "max_height",
)


def build_search_settings(
    search: Mapping[str, Any], local_search: Mapping[str, Any]
) -> SearchSettings:
    """Return the search's settings from its configuration sections; ``local_search`` is empty for gp_lfl."""
    return SearchSettings(
        population_size=search["population_size"],
        num_generations=search["num_generations"],
        fitness_steps=search["fitness_steps"],
        variation=VariationSettings(**{name: search[name] for name in _VARIATION}),
        rejection=RejectionSettings(
            search["rejection_steps"],
            search["rejection_sample"],
            search["rejection_learning_rate"],
            search["gradient_digits"],
        ),
        local_search=LocalSearchSettings(
            local_search["meta_steps"],
            local_search["inner_steps"],
            local_search["meta_learning_rate"],
            local_search["linearised"],
        )
        if local_search
        else None,
        initial_deviation=local_search.get("initial_deviation", 0.0),
        num_networks=search["num_networks"],
        racing=RacingSettings(tuple(search["racing_rungs"])),
    )


FATES = ("archive_hits", "zero_gradient", "rejected", "gradient_hits", "stopped", "diverged")


class ProgressLog:
    """Logs one line per generation: where the search is, how good, what was filtered, how long it still takes."""

    def __init__(self, num_generations: int) -> None:
        self.num_generations = num_generations
        self.started = time.monotonic()
        self.seen = 0

    def __call__(self, row: Mapping[str, Any]) -> None:
        self.seen += 1  # not the generation: a resumed search starts in the middle
        to_do = self.num_generations - row["generation"]
        left = (time.monotonic() - self.started) / self.seen * to_do
        filtered = {name: row[name] for name in FATES}
        logger.info(
            "generation %d/%d  best %.4g  %s  evaluated %d of %d (%s)  about %.0f s left",
            row["generation"],
            self.num_generations,
            row["best_fitness"],
            row["best_tree"] or "none yet",
            row["evaluated"],
            row["candidates"],
            ", ".join(f"{name} {count}" for name, count in filtered.items()),
            left,
        )


def search_loss(
    stage: StageInput,
    method: str,
    search: Mapping[str, Any],
    local_search: Mapping[str, Any],
    search_seed: int,
) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """Run a search; return the contents of hall_of_fame.json and the columns of history.parquet."""
    engine = stage.build_engine()
    settings = build_search_settings(search, local_search)
    logger.info(
        "%s on %s with %s, learning rate %g, %s path on %s",
        method,
        engine.task.name,
        engine.model_name,
        engine.settings.learning_rate,
        engine.path.name,
        engine.device,
    )
    checkpoints = stage.open_checkpoints([method, search, local_search, search_seed])
    result = GPSearch(engine, settings, search_seed, checkpoints).run(
        ProgressLog(settings.num_generations)
    )
    hall_of_fame = _describe_front(result)
    if not result.front:
        logger.warning("search failed: %s", hall_of_fame["reason"])
    hall_of_fame |= {
        "task": engine.task.name,
        "model": engine.model_name,
        "method": method,
        "search_seed": search_seed,
        "learning_rate": engine.settings.learning_rate,
        "local_search": _describe_local_search(local_search),
        "provenance": stage.describe_provenance(
            {
                "task": stage.task,
                "training": stage.training,
                "search": search,
                "local_search": local_search,
            },
            search_seed=search_seed,
        ),
    }
    columns = {name: [row[name] for row in result.history] for name in result.history[0]}
    return hall_of_fame, columns


def _describe_local_search(local_search: Mapping[str, Any]) -> str | None:
    if not local_search:
        return None
    return "linearised" if local_search["linearised"] else "exact"


def _describe_front(result: SearchResult) -> dict[str, Any]:
    entries = [
        {
            "expression": str(record.expression),
            "tree": str(record.tree),
            "fitness": record.fitness,
            "complexity": record.complexity,
            "generation": record.generation,
        }
        for record in result.front
    ]
    if entries:
        return {"status": "ok", "reason": None, "entries": entries}
    return {"status": "failed", "reason": _explain_failure(result), "entries": []}


def _explain_failure(result: SearchResult) -> str:
    """Return what became of the candidates of a search without a loss, and what to change."""
    fates = {
        "archive_hits": "repeated",
        "zero_gradient": "without a gradient",
        "rejected": "rejected, as predictions optimised under them are no better than at the start",
        "diverged": "diverged in training",
    }
    counts = {fate: sum(row[fate] for row in result.history) for fate in fates}
    total = sum(row["candidates"] for row in result.history)
    told = ", ".join(f"{count} {fates[fate]}" for fate, count in counts.items() if count)
    # search.learning_rate says which of the two counts
    rates = "training.learning_rate (base) or tune_learning_rate.maximum (tuned)"
    smaller_rate = f"a smaller {rates}, " if counts["diverged"] else ""
    return (
        f"none of the {total} candidates became a loss ({told}); {smaller_rate}a larger search.population_size or "
        "another seed may find one"
    )
