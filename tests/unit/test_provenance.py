"""Provenance: what it holds, what it must not hold, and the commit for jobs that see no repository."""

from __future__ import annotations

import getpass
import json
import platform
import socket
import sys
from pathlib import Path

import pytest

from evoloss.provenance import (
    COMMIT_VARIABLE,
    describe_commit,
    describe_hardware,
    encode_commit,
    provenance,
)

SETTINGS = {"search": {"population_size": 4}, "task": {"name": "diabetes"}}


def test_it_holds_versions_hardware_and_settings() -> None:
    origin = provenance(SETTINGS, describe_hardware(cores=3), search_seed=5)
    assert origin["config"] == SETTINGS
    assert origin["search_seed"] == 5
    assert origin["packages"]["torch"].startswith("2.")
    assert origin["python"] == platform.python_version()
    hardware = origin["hardware"]
    assert (hardware["cores"], hardware["device"], hardware["gpu"]) == (3, "cpu", None)
    assert len(hardware["cpu"]) > 2


def test_it_holds_no_names_of_hosts_users_or_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(COMMIT_VARIABLE, '{"commit": null, "dirty": null}')
    for module, name in ((platform, "node"), (socket, "gethostname"), (getpass, "getuser")):
        monkeypatch.setattr(module, name, lambda: "odd-name")
    first = json.dumps(provenance(SETTINGS))
    for private in ("odd-name", str(Path.cwd()), sys.prefix):
        assert private not in first
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    assert json.dumps(provenance(SETTINGS)) == first


def test_digest_depends_on_settings_but_not_on_their_order() -> None:
    reordered = dict(reversed(SETTINGS.items()))
    assert provenance(reordered)["config_digest"] == provenance(SETTINGS)["config_digest"]
    assert provenance({})["config_digest"] != provenance(SETTINGS)["config_digest"]


def test_the_commit_reaches_jobs_without_a_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(COMMIT_VARIABLE, '{"commit": "abc", "dirty": true}')
    assert describe_commit() == {"commit": "abc", "dirty": True}
    assert json.loads(encode_commit()) == {"commit": "abc", "dirty": True}
    assert provenance()["commit"] == "abc"
