"""Checkpoints: exact, checked on load, and never lost to a kill, a full disk or a damaged file."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evoloss.checkpoint import (
    CURRENT,
    PREVIOUS,
    Checkpoints,
    compute_identity,
    decode_checkpoint,
    encode_checkpoint,
)
from evoloss.errors import CheckpointError
from evoloss.termination import EXIT_STATUS

STATE = {
    "step": 7,
    "weights": torch.arange(6, dtype=torch.float64).reshape(2, 3) / 7,
    "history": [{"best": float("inf"), "tree": "add(y, f(x))"}, {"best": 0.1 + 0.2, "tree": ""}],
    "random": [3, [1, 2**63], None],
}
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
STATES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


def assert_equal(found: object, expected: object) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    elif isinstance(expected, dict):
        assert isinstance(found, dict)
        assert list(found) == list(expected)
        for key, value in expected.items():
            assert_equal(found[key], value)
    elif isinstance(expected, list):
        assert isinstance(found, list)
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            assert_equal(a, b)
    else:
        assert found == expected


@given(STATES)
def test_every_state_comes_back_exactly(state: object) -> None:
    assert_equal(decode_checkpoint(b"".join(encode_checkpoint(state, "job")), "job"), state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.bool])
def test_tensors_come_back_exactly(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    tensor = (torch.randn(5, 3, generator=generator) * 3).to(dtype).t()
    state = {"a": [tensor, {"b": tensor[:0]}], "nan": torch.tensor([torch.nan, torch.inf])}
    assert_equal(decode_checkpoint(b"".join(encode_checkpoint(state, "job")), "job"), state)


@settings(max_examples=1000)
@given(st.data())
def test_a_mutated_file_is_refused(data: st.DataObject) -> None:
    """Bytes changed, cut off, inserted: always `CheckpointError`, never anything else, never a wrong state."""
    good = b"".join(encode_checkpoint(STATE, "job"))
    kind = data.draw(st.sampled_from(["change", "cut", "insert", "garbage"]))
    place = data.draw(st.integers(0, len(good) - 1))
    piece = data.draw(st.binary(min_size=1, max_size=8))
    bad = {
        "change": good[:place] + piece + good[place + len(piece) :],
        "cut": good[:place],
        "insert": good[:place] + piece + good[place:],
        "garbage": piece * 50,
    }[kind]
    try:
        found = decode_checkpoint(bad, "job")
    except CheckpointError:
        return
    assert_equal(
        found, STATE
    )  # what was changed was not the content: spaces in the first line, say


@settings(max_examples=300)
@given(st.data())
def test_a_forged_body_is_refused_or_harmless(data: st.DataObject) -> None:
    """Whoever changes a file can correct its checksum as well: then the content decides, within our own error."""
    header, body = encode_checkpoint(STATE, "job")
    place = data.draw(st.integers(0, len(body) - 1))
    piece = data.draw(st.binary(min_size=1, max_size=8))
    forged = body[:place] + piece + body[place + len(piece) :]
    fields = json.loads(header)
    fields |= {"size": len(forged), "sha256": hashlib.sha256(forged).hexdigest()}
    try:
        decode_checkpoint(json.dumps(fields).encode() + b"\n" + forged, "job")
    except CheckpointError:
        return


def test_tensors_that_share_memory_come_back_exactly() -> None:
    whole = torch.arange(6.0)
    state = {"whole": whole, "again": whole, "view": whole.view(2, 3), "part": whole[:2]}
    assert_equal(decode_checkpoint(b"".join(encode_checkpoint(state, "job")), "job"), state)


def test_identity_follows_parameters_files_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "data"
    file.write_bytes(b"1")
    first = compute_identity({"a": 1, "b": [2]}, file)
    assert first == compute_identity({"b": [2], "a": 1}, file)
    assert first != compute_identity({"a": 1, "b": [3]}, file)
    file.write_bytes(b"2")
    assert first != compute_identity({"a": 1, "b": [2]}, file)


def test_another_jobs_checkpoint_is_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Checkpoints(tmp_path, "one", 60).save(STATE)
    assert Checkpoints(tmp_path, "other", 60).load() is None
    assert "belongs to another configuration" in caplog.text


def test_a_damaged_checkpoint_gives_way_to_the_previous(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = Checkpoints(tmp_path, "job", 60)
    assert checkpoints.load() is None
    checkpoints.save({"step": 1})
    checkpoints.save({"step": 2})
    assert checkpoints.load() == {"step": 2}
    damaged = bytearray((tmp_path / CURRENT).read_bytes())
    damaged[-3] ^= 1
    (tmp_path / CURRENT).write_bytes(damaged)
    assert checkpoints.load() == {"step": 1}
    assert f"{CURRENT} is not used: it is damaged" in caplog.text
    # the damaged one must not take the place of the good one at the next save
    checkpoints.save({"step": 3})
    (tmp_path / CURRENT).write_bytes(b"")
    assert checkpoints.load() == {"step": 1}
    (tmp_path / PREVIOUS).write_bytes(b"")
    assert checkpoints.load() is None


def test_a_safe_point_saves_when_due_or_late(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, "job", interval=3600)
    checkpoints.reach_safe_point(lambda: {"step": 1})
    assert checkpoints.load() is None
    checkpoints.reach_safe_point(lambda: {"step": 2}, due=True)
    assert checkpoints.load() == {"step": 2}
    Checkpoints(tmp_path, "job", interval=0).reach_safe_point(lambda: {"step": 3})
    assert checkpoints.load() == {"step": 3}


def test_a_full_disk_costs_the_checkpoint_not_the_job(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = Checkpoints(tmp_path, "job", 60)
    checkpoints.save({"step": 1})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        checkpoints.save({"big": torch.zeros(1000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert "no checkpoint written" in caplog.text
    assert checkpoints.load() == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == [PREVIOUS]
    checkpoints.save({"step": 2})
    assert checkpoints.load() == {"step": 2}


WRITER = """
import sys, torch
from evoloss.checkpoint import Checkpoints
checkpoints = Checkpoints(sys.argv[1], "job", 0)
step = 0
while True:
    step += 1
    checkpoints.reach_safe_point(lambda: {"step": step, "x": torch.full((20000,), float(step))})
    print(step, flush=True)
"""


def start_writer(directory: Path) -> subprocess.Popen[str]:
    workflow = Path(__file__).parents[2] / "workflow"
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(directory)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(workflow)},
    )


def test_killed_while_writing_a_good_checkpoint_is_left(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for attempt in range(6):
        writer = start_writer(tmp_path / str(attempt))
        assert writer.stdout is not None
        for _ in range(3):
            writer.stdout.readline()
        time.sleep(generator.uniform(0, 0.05))
        writer.kill()
        seen = writer.stdout.read().split()
        writer.wait()
        state = Checkpoints(tmp_path / str(attempt), "job", 60).load()
        assert state is not None
        # a kill between the two renames costs one checkpoint
        assert state["step"] >= int(seen[-1] if seen else 3) - 1
        assert (state["x"] == state["step"]).all()


def test_sigterm_saves_and_leaves_with_its_status(tmp_path: Path) -> None:
    writer = start_writer(tmp_path)
    assert writer.stdout is not None
    writer.stdout.readline()
    writer.terminate()
    steps = ["1", *writer.stdout.read().split()]
    assert writer.wait(timeout=30) == EXIT_STATUS == 143
    state = Checkpoints(tmp_path, "job", 60).load()
    assert state is not None
    assert state["step"] == int(steps[-1]) + 1
