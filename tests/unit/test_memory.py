"""Out of memory, by a real limit: the population is worked on in chunks, with the same results."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toy_tasks import make_toy_task

from evoloss.engine import Engine, TrainingRun, TrainingSettings
from evoloss.engine.memory import Chunks, is_out_of_memory
from evoloss.errors import ModelError
from evoloss.expressions import compile_weighted_tree, parse_expression

HERE = Path(__file__).parent


def run_script(mode: str) -> dict[str, Any]:
    paths = [str(HERE), str(HERE.parents[1] / "workflow")]
    done = subprocess.run(
        [sys.executable, str(HERE / "little_memory.py"), mode],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "OMP_NUM_THREADS": "1",
            # large blocks go back to the system when they are freed, so that the limit counts them
            "MALLOC_MMAP_THRESHOLD_": "65536",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on the address space")
def test_little_memory_changes_no_result() -> None:
    ample, little = run_script("ample"), run_script("little")
    assert ample["log"] == []
    np.testing.assert_allclose(little["fitness"], ample["fitness"], rtol=1e-12)
    weights = [np.array(list(chain(*result["weights"]))) for result in (little, ample)]
    np.testing.assert_allclose(*weights, rtol=1e-9)
    for phrase in ("not enough memory to train model", "differentiate through the training of"):
        messages = [line for line in little["log"] if phrase in line]
        assert messages
        assert len(messages) == len(set(messages))


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on the address space")
def test_no_memory_ends_with_a_sentence() -> None:
    result = run_script("none")
    for name in ("fitness", "weights"):
        assert (
            "even with a single loss at a time: lower training.batch_size (now 500) or"
            in (result[name])
        )
        assert "search.population_size" in result[name]


def test_which_errors_are_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    with pytest.raises(MemoryError) as raised:
        np.ones(2**60, dtype=np.uint8)
    assert is_out_of_memory(raised.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("shapes cannot be multiplied"))


@pytest.mark.parametrize("fitting", [1, 2, 3, 7, 25])
def test_chunks_are_halved_until_they_fit(fitting: int) -> None:
    tried: list[int] = []

    def work(chunk: tuple[int, ...]) -> int:
        tried.append(len(chunk))
        if len(chunk) > fitting:
            raise MemoryError
        return sum(chunk)

    chunks = Chunks("train", 8)
    done = chunks.run(chunks.split(range(25)), work)
    assert list(chain(*(chunk for chunk, _ in done))) == list(range(25))
    assert sum(total for _, total in done) == 300
    failed = [size for size in tried if size > fitting]
    assert len(failed) == len(set(failed)) <= 5
    tried.clear()
    chunks.run(chunks.split(range(25)), work)
    assert max(tried) <= fitting


def test_chunks_of_nearly_one_size_lower_the_limit_once(caplog: pytest.LogCaptureFixture) -> None:
    """Parts that were trained together may fail one after the other when they are evaluated."""

    def work(chunk: tuple[int, ...]) -> None:
        if len(chunk) > 4:
            raise MemoryError

    chunks = Chunks("evaluate", 8)
    edges = [0, 6, 13, 19, 26]
    chunks.run([tuple(range(a, b)) for a, b in itertools.pairwise(edges)], work)
    assert len(caplog.messages) == 1
    assert "6 losses at once: going on with at most 3 at a time" in caplog.messages[0]
    assert max(map(len, chunks.split(range(26)))) <= 3


def test_other_errors_and_a_single_network_are_not_tried_again() -> None:
    chunks = Chunks("train model 'm'", 8)

    def fail(chunk: tuple[int, ...]) -> None:
        raise RuntimeError("shapes cannot be multiplied") if len(chunk) > 1 else MemoryError

    with pytest.raises(RuntimeError, match="shapes"):
        chunks.run([(0, 1)], fail)
    with pytest.raises(ModelError, match=r"train model 'm'.*batch_size \(now 8\).*\(MemoryError\)"):
        chunks.run([(0,)], fail)


@pytest.mark.parametrize("model_name", ["linear", "mlp"])
def test_a_run_in_parts_equals_a_whole_one(model_name: str) -> None:
    """Networks that are kept, in another order, of a run in parts; one part is lost and trained again."""
    engine = Engine(
        make_toy_task(rows=20),
        model_name,
        TrainingSettings(8, 0.05, precision="float64"),
        torch.device("cpu"),
    )
    formulas = ("square(sub(y, f(x)))", "abs(sub(y, f(x)))", "mul(-1, mul(y, log(f(x))))")
    programs = [compile_weighted_tree(parse_expression(formula)) for formula in formulas]
    results = []
    for parts in ([(0, 1, 2, 3, 4, 5)], [(0, 1), (2, 3, 4), (5,)]):
        run = TrainingRun(engine, engine.population_loss(programs), 9, 0, num_networks=2)
        run._parts = dict.fromkeys(parts)
        run.advance(4)
        first = run.evaluate("validation").task_loss
        run.keep([2, 0])
        if len(parts) > 1:
            run._parts = dict.fromkeys(run._parts)
        run.advance(9)
        results.append(np.concatenate([first, run.evaluate("test").task_loss]))
    np.testing.assert_allclose(*results, rtol=1e-12)
