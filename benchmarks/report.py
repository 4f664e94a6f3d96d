"""Tables of results in Markdown, and the block of ``benchmarks/README.md`` that they fill."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import find_origin
from evoloss.errors import DataError
from evoloss.results import read_json, write_json

BEGIN, END = "<!-- results: begin (written by --update-readme) -->", "<!-- results: end -->"


def format_seconds(seconds: float) -> str:
    """Return seconds with three digits and a readable unit."""
    if seconds >= 600.0:
        return f"{seconds / 60:.3g} min"
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if seconds * factor >= 1.0:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def format_spread(summary: Mapping[str, Any], form: str) -> str:
    """Return ``median (least-greatest)``, each number in the format ``form``."""
    median, least, greatest = (format(summary[name], form) for name in ("median", "min", "max"))
    return f"{median} ({least}-{greatest})"


def make_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def describe_origin(section: Mapping[str, Any]) -> str:
    """Return one line about machine, versions, commit and date of a section."""
    machine = section["machine"]
    origin = find_origin(machine)
    return (
        f"{origin['processor']}, {_count_threads(origin)} of {machine['cores']} cores, "
        f"torch {machine['torch']}, commit {_name_commit(origin)}, "
        f"{machine['date']} UTC, load {machine['load_average']:.1f} at the start."
    )


def format_origin(row: Mapping[str, Any]) -> str:
    """Return processor, threads and commit of a row; see `benchmarks.machine.find_origin`."""
    return f"{row['processor']}, {_count_threads(row)}, {_name_commit(row)}"


def _count_threads(origin: Mapping[str, Any]) -> str:
    return f"{origin['threads']} thread{'s' if origin['threads'] > 1 else ''}"


def _name_commit(origin: Mapping[str, Any]) -> str:
    changed = " with uncommitted changes" if origin["uncommitted_changes"] else ""
    return (origin["commit"] or "no repository")[:7] + changed


def format_timing(results: Mapping[str, Any]) -> str:
    """Return the table of times, ratios and GEMM shares."""
    rows = []
    for name, workload in results.items():
        for phase, r in workload["phases"].items():
            part = "all" if r["steps_run"] == r["steps"] else f"{r['steps_run']} of {r['steps']}"
            rows.append(
                [
                    name,
                    phase,
                    workload["path"],
                    part,
                    format_seconds(r["engine_seconds_per_candidate"]["median"]),
                    format_seconds(r["engine_seconds_per_candidate_first_generation"]["median"]),
                    format_seconds(r["oracle_seconds_per_candidate"]["median"]),
                    format_spread(r["speedup"], ".3g"),
                    format_spread(r["gemm_share"], ".0%") if r["gemm_share"] else "",
                ]
            )
    header = [
        "workload", "phase", "path", "steps run", "engine", "engine, first generation", "sequential autograd",
        "ratio (min-max)", "share of GEMM peak",
    ]  # fmt: skip
    notes = [
        f"{name}: {workload['population']} candidates"
        + (f" x {workload['networks']} networks" if workload["networks"] > 1 else "")
        + f" of {workload['nodes']['min']} to {workload['nodes']['max']} nodes"
        + (
            f", peak memory {workload['peak_memory'] / 2**20:.0f} MiB"
            if workload.get("peak_memory")
            else ""
        )
        for name, workload in results.items()
    ]
    return make_table(header, rows) + "\n\nTimes are per candidate. " + "; ".join(notes) + "."


def format_accuracy(results: Mapping[str, Any]) -> str:
    """Return the table of float32 errors."""
    rows = []
    for name, r in results.items():
        for what, title in (("meta_gradient", "meta-gradient"), ("phi", "phi after {} steps")):
            found = r[what]
            plain = found.get("oracle_float32")
            rows.append(
                [
                    name,
                    title.format(found.get("meta_steps")),
                    f"{found['trees']} ({found['left_out']} left out)",
                    f"{found['engine_float32']['median']:.1e}",
                    f"{found['engine_float32']['max']:.1e}",
                    f"{plain['median']:.1e}, {plain['max']:.1e}" if plain else "",
                ]
            )
    header = ["workload", "what", "trees", "median error", "largest error", "autograd in float32"]
    return make_table(header, rows)


def format_scaling(results: Mapping[str, Any]) -> str:
    """Return the table of log-log slopes."""
    rows = []
    for workload, lines in results.items():
        for variable, line in lines.items():
            slopes = ", ".join(f"{p} {slope:.2f}" for p, slope in line["slope_seconds"].items())
            span = f"{min(line['values']):.3g} to {max(line['values']):.3g}"
            memory = f"{max(line['peak_memory']) / 2**20:.0f} MiB"
            rows.append([workload, variable, span, slopes, f"{line['slope_memory']:.2f}", memory])
    header = ["workload", "variable", "range", "slope of seconds", "of memory", "most memory"]
    return make_table(header, rows) + "\n\n![Cost and memory](scaling.png)"


def format_searches(results: Mapping[str, Any]) -> str:
    """Return the table of whole searches."""
    rows = [
        [
            name,
            f"{r['population']} x {r['generations']}",
            format_origin(r),
            format_seconds(r["seconds"]),
            format_seconds(r["processor_seconds"]),
            f"{r['peak_memory'] / 2**20:.0f} MiB",
            f"{r['local_searches']}, {r['trainings']}, {r['stopped']}",
            f"{r['best_fitness']:.4g}" if r["best_fitness"] is not None else "none",
            str(r["best_complexity"]) if r["best_complexity"] is not None else "none",
        ]
        for name, r in results.items()
    ]
    header = [
        "search",
        "candidates x generations",
        "processor, threads, commit",
        "wall-clock",
        "processor time",
        "most memory",
        "local searches, trainings, of these stopped by a race",
        "best fitness",
        "its nodes",
    ]
    return make_table(header, rows)


def format_racing(results: Mapping[str, Any]) -> str:
    """Return the table of searches with racing against searches without."""
    rows = []
    for name, r in results.items():
        s = r["search"]
        local = s["local_search"]
        steps = f"{local['meta_steps'] if local else 0} + {s['fitness_steps']}"
        for budget, summary in r["summary"].items():
            rows.append(
                [
                    name,
                    f"{s['population_size']} x {s['num_generations']}",
                    steps,
                    f"{r['training']['learning_rate']:g}",
                    str(len(r["seeds"])),
                    budget.replace("_", " "),
                    *(format_difference(summary[key]) for key in ("fitness", "test_error")),
                    f"{summary['share_of_steps_spared']:.0%}",
                    f"{summary['time_ratio']:.2f}",
                    f"{summary['stopped']}, {summary['missed']}",
                    f"{summary['tournaments_changed']} of {summary['tournaments']}",
                ]
            )
    header = [
        "search", "candidates x generations", "meta-steps + training steps", "learning rate", "seeds", "compared at",
        "best fitness, difference", "test error, difference", "training steps spared", "processor time, ratio",
        "stopped, of these better than the search's best", "tournaments decided otherwise",
    ]  # fmt: skip
    return make_table(header, rows)


def format_replays(results: Mapping[str, Any]) -> str:
    """Return the table of recorded searches and their replays with racing."""
    rows = [
        [
            name,
            r["size"],
            format_origin(r),
            f"{r['local_searches']}, {r['trainings']}",
            *("none" if r["fitness"][how] is None else f"{r['fitness'][how]:.4g}" for how in ("off", "on")),
            "never" if r["parted"] is None else f"in generation {r['parted']}",
            str(r["stopped"]),
            f"{r['share_of_steps_spared']:.0%}",
        ]
        for name, r in results.items()
    ]  # fmt: skip
    header = [
        "search", "candidates x generations", "processor, threads, commit", "local searches, trainings",
        "best fitness without racing", "with", "the searches part", "stopped", "training steps spared",
    ]  # fmt: skip
    return make_table(header, rows)


def format_difference(summary: Mapping[str, Any]) -> str:
    """Return ``mean ± standard error, median; better : worse`` of differences; ``?`` for what is not known."""
    mean, median = (
        "?" if summary[key] is None else f"{summary[key]:+.4f}" for key in ("mean", "median")
    )
    error = "?" if summary["standard_error"] is None else f"{summary['standard_error']:.4f}"
    left_out = f"; {summary['left_out']} left out" if summary["left_out"] else ""
    return f"{mean} ± {error}, {median}; {summary['better']} : {summary['worse']}{left_out}"


SECTIONS = {
    "workloads": ("Engine against sequential autograd", format_timing),
    "searches": ("Whole searches", format_searches),
    "racing": ("Racing on, against off", format_racing),
    "replays": ("Racing replayed", format_replays),
    "accuracy": ("Accuracy of float32", format_accuracy),
    "scaling": ("Scaling", format_scaling),
}
"""Section of the JSON file: heading and table."""

ROW_BY_ROW = ("searches", "replays")
"""Sections whose rows may be of different runs; every row says what it is of."""


def format_section(name: str, section: Mapping[str, Any]) -> str:
    """Return heading, origin and table of one section."""
    heading, form = SECTIONS[name]
    last = "Last run: " if name in ROW_BY_ROW else ""
    return f"### {heading}\n\n{last}{describe_origin(section)}\n\n{form(section['results'])}"


def keep_section(path: Path, name: str, section: Mapping[str, Any], merge: bool = False) -> None:
    """Write a section to the JSON file and keep the others; with ``merge`` its own other results too."""
    kept = read_json(path) if path.exists() else {}
    results = section["results"]
    if merge and name in kept:
        results = {**kept[name]["results"], **results}
    write_json(path, {**kept, name: {**section, "results": results}})


def update_readme(path: Path, results: Mapping[str, Any]) -> None:
    """Replace the block between the two marks by the tables of ``results``.

    Raises
    ------
    DataError
        If the marks are missing.
    """
    text = path.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise DataError(f"{path} lacks the marks {BEGIN!r} and {END!r}")
    before, rest = text.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    block = "\n\n".join(format_section(n, results[n]) for n in SECTIONS if n in results)
    path.write_text(f"{before}{BEGIN}\n\n{block}\n\n{END}{after}", encoding="utf-8")
