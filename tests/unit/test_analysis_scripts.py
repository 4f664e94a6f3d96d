"""The scripts of aggregate_results and of the figures, run as Snakemake runs them."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
from analysis_files import make_outputs, make_results
from snakemake.iocontainers import InputFiles, OutputFiles, Params, Wildcards

SCRIPTS = Path(__file__).parents[2] / "workflow" / "scripts"
PLOTS = {
    "test_error": ("final", "comparison"),
    "learning_curves": ("runs",),
    "search_progress": ("searches",),
    "filters": ("searches",),
    "losses": ("losses",),
    "formulas": ("losses",),
}


def _run(name: str, inputs: dict[str, object], outputs: dict[str, str], root: Path) -> str:
    log = root / f"{name}.log"
    job = SimpleNamespace(
        input=InputFiles(fromdict=inputs),
        output=OutputFiles(fromdict=outputs),
        params=Params(fromdict={"missing": []}),
        log=[str(log)],
        wildcards=Wildcards(),
        rule=name,
    )
    runpy.run_path(str(SCRIPTS / f"{name}.py"), {"snakemake": job}, "__main__")
    return log.read_text()


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("results")
    outputs = make_outputs(root)
    log = _run("aggregate_results", dict(make_results(root, train_seeds=2)), outputs, root)
    assert "search seed 1 failed" in log
    assert all(Path(path).exists() for path in outputs.values())
    return outputs


@pytest.mark.parametrize("name", PLOTS)
def test_plot_script(name: str, tables: dict[str, str], tmp_path: Path) -> None:
    outputs = {kind: str(tmp_path / f"{name}.{kind}") for kind in ("svg", "png")}
    inputs: dict[str, object] = {table: tables[table] for table in PLOTS[name]}
    _run(f"plot_{name}", inputs, outputs, tmp_path)
    assert Path(outputs["svg"]).read_text(encoding="utf-8").startswith("<?xml")
    assert Path(outputs["png"]).read_bytes().startswith(b"\x89PNG")


def test_scripts_are_short() -> None:
    for name in ("aggregate_results", *(f"plot_{name}" for name in PLOTS)):
        lines = (SCRIPTS / f"{name}.py").read_text().splitlines()
        assert len(lines) <= 30
        assert 'if __name__ == "__main__":' in lines
