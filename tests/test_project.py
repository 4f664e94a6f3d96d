"""The repository itself: linters, types, formats, and documents that say what is true."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import evoloss

pytestmark = pytest.mark.project

ROOT = Path(__file__).parents[1]
CHECKS = {
    "ruff check": ["ruff", "check", "."],
    "ruff format": ["ruff", "format", "--check", "."],
    "mypy": ["mypy"],
    "snakefmt": ["snakefmt", "--check", "--diff", "Snakefile", "workflow/rules"],
    "snakemake --lint": ["snakemake", "--lint", "--configfile", "config.yaml"],
}


@pytest.mark.parametrize("command", CHECKS.values(), ids=CHECKS)
def test_checker_has_no_complaint(command: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def read_pins(name: str) -> dict[str, str]:
    pins = re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "envs" / name).read_text(), re.M)
    return {re.sub(r"[-_.]+", "-", package).lower(): version for package, version in pins}


def test_versions_agree() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == evoloss.__version__
    assert f"## {evoloss.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_dependencies_are_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["workflow"]
    names = {re.split(r"[\[<>=~ ]", line)[0].lower() for line in wanted}
    assert names <= set(read_pins("lock.txt"))
    assert not set(read_pins("lock.txt")) & set(read_pins("lock-dev.txt"))


@pytest.mark.parametrize("name", ["environment.yaml", "environment-cuda.yaml"])
def test_conda_environments_follow_the_lock_file(name: str) -> None:
    pins = read_pins("lock.txt")
    environment = yaml.safe_load((ROOT / "envs" / name).read_text())
    packages = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    pip = next(e["pip"] for e in environment["dependencies"] if isinstance(e, dict))
    names = {"pytorch": "torch", "pytorch-gpu": "torch", "matplotlib-base": "matplotlib"}
    for package, _, version in (entry.partition("=") for entry in packages):
        if version and package != "python":
            pinned = pins[names.get(package, package)]
            assert (pinned + ".").startswith(version + "."), f"{package}: {version} but {pinned}"
    for package, _, version in (entry.partition("==") for entry in pip):
        assert pins[package.lower()] == version
    assert names.keys() & {entry.partition("=")[0] for entry in packages if "=" in entry}


def read_image_recipe(name: str) -> dict[str, str]:
    """The Python version, the system's packages and the lock file that a container recipe installs."""
    patterns = {
        "python": r"^from:? python:([\d.]+)-slim$",
        "system": r'SYSTEM_PACKAGES="([^"]+)"$',
        "options": r'PIP_OPTIONS="([^"]+)"$',
        "copied": r"^(?:COPY|    envs/)?\s*lock\.txt (\S+)$",
        "installed": r"pip install .*-r (\S+)$",
    }
    text = (ROOT / "envs" / name).read_text()
    flags = re.MULTILINE | re.IGNORECASE
    return {key: re.findall(pattern, text, flags)[0] for key, pattern in patterns.items()}


def test_images_and_conda_agree() -> None:
    recipe = read_image_recipe("evoloss.def")
    assert recipe == read_image_recipe("Dockerfile")
    assert recipe["copied"] == recipe["installed"]
    for name in ("environment.yaml", "environment-cuda.yaml"):
        environment = yaml.safe_load((ROOT / "envs" / name).read_text())
        assert f"python={recipe['python']}" in environment["dependencies"]


@pytest.mark.parametrize(
    "document",
    [
        "README.md",
        "workflow/README.md",
        "benchmarks/README.md",
        "docs/cluster.md",
        "docs/environments.md",
        "CONTRIBUTING.md",
    ],
)
def test_links_and_named_files_exist(document: str) -> None:
    path = ROOT / document
    for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
        assert (path.parent / target).exists(), f"{document} links to {target}"


def test_readme_shows_the_two_commands() -> None:
    text = (ROOT / "README.md").read_text()
    install = "python3 -m venv .venv && .venv/bin/pip install -q -r envs/"
    assert f"{install}lock.txt && .venv/bin/snakemake --cores 2" in text
    assert f"{install}lock-dev.txt && .venv/bin/python -m pytest" in text
