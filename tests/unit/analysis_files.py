"""Small result files of every stage, drawn from a seed, for the tests of the analysis."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from evoloss.expressions import parse_expression
from evoloss.expressions.formatting import format_infix, format_latex
from evoloss.results import write_json, write_parquet

TASKS = {
    "diabetes": ("regression", ["mlp"], 0.55),
    "mnist5k": ("classification", ["lenet5"], 0.06),
    "mnist5k_noisy": ("classification", ["linear"], 0.20),
    "surnames": ("classification", ["char_cnn", "gru"], 0.45),
}
FACTORS = {"baseline": 1.2, "baseline_tuned": 1.0, "gp_lfl": 1.02, "evomal": 0.9}
LEARNED = ("gp_lfl", "evomal")
SEARCH_SEEDS = (0, 1, 2)
FAILED = ("mnist5k", "gp_lfl", 1)
"""The search that finds no loss."""
DIVERGED = ("surnames", "gru", "evomal", 2, 1)
"""The run that diverges: task, model, method, search seed, train seed."""
REASON = "every candidate of every generation was rejected"

LOSSES = {
    "classification": [
        "sub(mul(0.41, f(x)), log(sub(add(f(x), 0.15), mul(0.3, y))))",
        "abs(sub(mul(1.007, y), f(x)))",
        "tanh(mul(aq(sub(f(x), y), sqrt(add(y, 0.2))), sub(f(x), y)))",
        (
            "mul(abs(sub(y, f(x))), aq(log(sub(f(x), mul(1.31, y))), max(square(f(x)), "
            "sub(tanh(mul(0.37, y)), sqrt(add(f(x), mul(2.25, aq(y, "
            "log(abs(sub(f(x), 0.31)))))))))))"
        ),
        "sign(sub(f(x), add(0.5, y)))",
    ],
    "regression": [
        "abs(sub(mul(0.93, y), f(x)))",
        "log(add(1.12, square(sub(f(x), y))))",
        "square(sub(f(x), add(y, mul(0.1, tanh(y)))))",
    ],
}


MISSING = [
    {"stage": "search_loss", "task": "diabetes", "method": "evomal", "search_seed": "1"}
    | {"status": "failed", "logs": ["results/logs/a.log"], "files": ["results/a"]},
    {"stage": "train_model", "task": "diabetes", "method": "evomal", "train_seed_group": "0-1"}
    | {"status": "not run", "logs": ["results/logs/a.log"], "files": ["results/b"]},
]
"""Two jobs without a result, as the workflow lists them."""


def make_results(root: Path, train_seeds: int = 5, steps: int = 400) -> dict[str, list[str]]:
    """Write result files below ``root`` and return them as the inputs of ``aggregate_results``."""
    generator = np.random.default_rng(0)
    inputs: dict[str, list[str]] = {
        name: []
        for name in (
            "datasets",
            "runs",
            "tuned",
            "searches",
            "histories",
            "simplified",
            "finetuned",
            "losses",
        )
    }
    for task, (kind, models, level) in TASKS.items():
        inputs["datasets"].append(_card(root, task, kind))
        inputs["tuned"].append(_tuned(root, task, models[0], level))
        for method in LEARNED:
            for seed in SEARCH_SEEDS:
                _search(root, inputs, generator, (task, method, seed), models[0], kind, level)
        for model in models:
            for method, factor in FACTORS.items():
                for seed in range(train_seeds):
                    key = (task, model, method, seed)
                    inputs["runs"].append(_runs(root, generator, key, kind, level * factor, steps))
    return inputs


def provenance() -> dict[str, Any]:
    hardware = {"cpu": "Some CPU", "cores": 2, "device": "cpu", "gpu": None, "cuda": None}
    packages = {"torch": "2.13.0", "numpy": "2.4.6", "snakemake": None}
    return {
        "evoloss": "0.1.0",
        "commit": None,
        "hardware": hardware,
        "packages": packages,
        "platform": "Linux x86_64",
        "python": "3.12.4",
    }


def _card(root: Path, name: str, kind: str) -> str:
    path = root / "results/prepare_dataset" / f"{name}.json"
    classes = {"a": 40, "b": 12} if kind == "classification" else None
    write_json(
        path,
        {
            "name": name,
            "kind": kind,
            "source": "scikit-learn",
            "source_version": "1.5",
            "licence": "BSD-3-Clause",
            "num_rows": 442,
            "sizes": {"train": 265, "validation": 88, "test": 89},
            "input_shape": [10],
            "num_outputs": 2 if classes else 1,
            "class_names": list(classes or {}),
            "class_counts": dict.fromkeys(("train", "validation", "test"), classes)
            if classes
            else None,
            "target_mean": None,
            "target_scale": None,
            "vocabulary_size": None,
            "data_seed": 0,
            "split": [0.6, 0.2, 0.2],
            "checksum": "c0ffee00" * 8,
            "version": "0.1.0",
            "provenance": provenance(),
        },
    )
    return str(path)


def _tuned(root: Path, task: str, model: str, level: float) -> str:
    path = root / "results/tune_learning_rate" / task / f"{model}.json"
    grid = [
        {"learning_rate": rate, "validation_metric": level * (2 - i / 4), "per_seed": [level]}
        for i, rate in enumerate((0.001, 0.01, 0.1, 1.0))
    ]
    best = 1.0 if task == "mnist5k" else 0.1
    document = {"task": task, "model": model, "method": "baseline_tuned", "metric": "error_rate"}
    write_json(
        path, {**document, "best_learning_rate": best, "grid": grid, "provenance": provenance()}
    )
    return str(path)


def _search(
    root: Path,
    inputs: dict[str, list[str]],
    generator: np.random.Generator,
    key: tuple[str, str, int],
    model: str,
    kind: str,
    level: float,
) -> None:
    task, method, seed = key
    status = "failed" if key == FAILED else "ok"
    reason = REASON if key == FAILED else None
    head = {"task": task, "method": method, "search_seed": seed, "status": status, "reason": reason}
    head = {**head, "provenance": provenance()}
    folder = f"{task}/{method}/seed_{seed}"
    texts = LOSSES[kind]
    text = texts[(seed + 2 * (method == "evomal")) % len(texts)]
    expression = parse_expression(text)
    history = root / "results/search_loss" / folder / "history.parquet"
    write_parquet(
        history, _history(generator, level, status == "ok", text), {"provenance": provenance()}
    )
    latex, infix = format_latex(expression), format_infix(expression)
    entry = {"original": text, "simplified": text, "scale": 0.73, "text": infix, "latex": latex}
    entry |= {"tree_complexity": 5}
    entry |= {"complexity_before": expression.complexity + 6, "verified": True, "reason": None}
    entry |= {"complexity_after": expression.complexity, "kept_original": False}
    tuned = text.replace("0.", "0.0", 1)
    loss = {"format": "evoloss-loss", "format_version": 1, "status": status, "reason": reason}
    ok = status == "ok"
    loss |= {"kind": kind, "expression": tuned, "scale": 0.73 + seed, "text": infix}
    loss |= {"latex": latex, "complexity": expression.complexity, "provenance": provenance()}
    if not ok:
        loss |= {"expression": None, "scale": None, "text": None, "latex": None, "complexity": None}
    documents = {
        "searches": (
            f"search_loss/{folder}/hall_of_fame.json",
            {**head, "model": model, "learning_rate": 0.01, "entries": []},
        ),
        "simplified": (f"simplify_loss/{folder}.json", {**head, "entries": [entry] if ok else []}),
        "finetuned": (
            f"finetune_loss/{folder}/finetune.json",
            {
                **head,
                "selected": 0 if ok else None,
                "start_score": level if ok else None,
                "best_score": 0.97 * level if ok else None,
                "trace": [],
                "candidates": [{"expression": text, "score": level}] if ok else [],
            },
        ),
        "losses": (f"finetune_loss/{folder}/loss.json", loss),
    }
    inputs["histories"].append(str(history))
    for name, (path, document) in documents.items():
        write_json(root / "results" / path, document)
        inputs[name].append(str(root / "results" / path))


def _history(
    generator: np.random.Generator, level: float, found: bool, text: str, generations: int = 5
) -> dict[str, list[Any]]:
    best = level * (1 + np.sort(generator.exponential(0.4, generations))[::-1])
    median = best * (1.5 + generator.random(generations))
    counts = generator.multinomial(20, [0.3, 0.1, 0.2, 0.1, 0.1, 0.05, 0.15], generations)
    if not found:
        best, median, counts = (
            best * np.nan,
            median * np.inf,
            np.tile([5, 3, 12, 0, 0, 0, 0], (5, 1)),
        )
    names = (
        "archive_hits", "zero_gradient", "rejected", "gradient_hits", "stopped", "diverged",
        "evaluated",
    )  # fmt: skip
    columns: dict[str, list[Any]] = {
        "generation": list(range(generations)),
        "best_fitness": best.tolist(),
        "median_fitness": median.tolist(),
        "best_expression": [text] * generations,
        "best_complexity": [7] * generations,
        "median_complexity": (9.0 + generator.random() * np.arange(generations)).tolist(),
        "training_steps": [2000] * generations,
        "candidates": [20] * generations,
    }
    columns |= {name: counts[:, i].tolist() for i, name in enumerate(names)}
    for phase in ("local_search", "rejection", "fitness", "total"):
        columns[f"seconds_{phase}"] = generator.random(generations).tolist()
    return columns


def _runs(
    root: Path,
    generator: np.random.Generator,
    key: tuple[str, str, str, int],
    kind: str,
    level: float,
    steps: int,
) -> str:
    task, model, method, seed = key
    path = root / "results/train_model" / task / model / method / f"seeds_{seed}.parquet"
    metric = "error_rate" if kind == "classification" else "mse"
    learned = method in LEARNED
    rows: list[tuple[Any, ...]] = []
    missing = []
    for search_seed in SEARCH_SEEDS if learned else (None,):
        if (task, method, search_seed) == FAILED:
            missing.append({"search_seed": search_seed, "reason": REASON})
            continue
        end = level * (1 + 0.03 * seed + 0.04 * generator.standard_normal())
        for step in range(0, steps + 1, max(steps // 10, 1)):
            value = end + (0.95 - end) * math.exp(-6 * step / max(steps, 1))
            if (task, model, method, search_seed, seed) == DIVERGED and step > steps / 2:
                value = math.nan
            rows.append((search_seed, step, "train", 0.93 * value))
            rows.append((search_seed, step, "validation", value))
        rows.append((search_seed, steps, "test", value * 1.02))
    columns: dict[str, list[Any]] = {
        "task": [task] * len(rows),
        "model": [model] * len(rows),
        "method": [method] * len(rows),
        "search_seed": [row[0] for row in rows],
        "train_seed": [seed] * len(rows),
        "step": [row[1] for row in rows],
        "split": [row[2] for row in rows],
        "metric": [metric] * len(rows),
        "value": [row[3] for row in rows],
    }
    rate = 0.1 if method == "baseline_tuned" else 0.01
    metadata = {"train_seeds": [seed], "missing": missing, "learning_rate": rate}
    metadata |= {"provenance": provenance()}
    write_parquet(path, columns, metadata)
    return str(path)


def make_outputs(root: Path) -> dict[str, str]:
    """Return the outputs of ``aggregate_results`` below ``root``."""
    names = ("runs", "final", "comparison", "losses", "searches")
    outputs = {name: str(root / f"{name}.parquet") for name in names}
    tables = ("test_error", "comparison", "losses", "searches", "datasets", "origin", "missing")
    for table in tables:
        outputs |= {f"{table}_{kind}": str(root / f"{table}.{kind}") for kind in ("csv", "md")}
    return outputs
