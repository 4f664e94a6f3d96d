"""Kill a search with SIGKILL at random moments, start it again until it ends, and print each trial's result.

    python fault_injection.py DIRECTORY NUM_TRIALS

Every search is a process of its own, forked from this one, which has everything imported and compiled. In each third
trial the moment is inside the write of a checkpoint: while its temporary file exists.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from evoloss.results import read_json, write_json
from evoloss.stages.searching import search_loss
from evoloss.stages.setup import StageInput
from evoloss.tasks.datasets import prepare_dataset, save_dataset

SEARCH = {
    "population_size": 8,
    "num_generations": 3,
    "fitness_steps": 120,
    "tournament_size": 3,
    "parsimony_size": 1.4,
    "crossover_rate": 0.7,
    "mutation_rate": 0.25,
    "elitism_rate": 0.05,
    "init_min_height": 2,
    "init_max_height": 4,
    "max_height": 6,
    "rejection_steps": 20,
    "rejection_sample": 50,
    "rejection_learning_rate": 0.01,
    "gradient_digits": 2,
    "racing_rungs": [0.25, 0.5],
    "num_networks": 1,
    "learning_rate": "base",
}
LOCAL_SEARCH = {
    "meta_steps": 6,
    "inner_steps": 1,
    "meta_learning_rate": 0.01,
    "initial_deviation": 0.001,
    "linearised": False,
}
TRAINING = {"batch_size": 32, "optimizer": "sgd", "learning_rate": 0.05, "momentum": 0.9, "nesterov": True,
            "weight_decay": 0.0005, "precision": "float32"}  # fmt: skip


def run_job(stage: StageInput, output: Path) -> None:
    """Do what the rule's script does."""
    hall_of_fame, _ = search_loss(stage, "evomal", SEARCH, LOCAL_SEARCH, 1)
    write_json(output, hall_of_fame)
    stage.remove_checkpoints()


def start_job(stage: StageInput, output: Path) -> int:
    """Fork; the child runs the job and ends."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            run_job(stage, output)
            status = 0
        finally:
            os._exit(status)
    return child


def finish_job(stage: StageInput, output: Path) -> float:
    """Run the job to its end; return its seconds."""
    started = time.monotonic()
    _, status = os.waitpid(start_job(stage, output), 0)
    if status:
        sys.exit(f"the search failed with status {status}")
    return time.monotonic() - started


def is_writing(directory: Path) -> bool:
    """Tell whether a checkpoint's temporary file exists."""
    try:
        return any(path.name.startswith(".current.checkpoint.") for path in directory.iterdir())
    except FileNotFoundError:  # there is no checkpoint yet, or none any more
        return False


def kill_inside_write(child: int, directory: Path) -> bool:
    """Kill the child as soon as it is writing a checkpoint; False if it ended before."""
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if is_writing(directory):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return True
    return False


def say(*words: object) -> None:
    sys.stdout.write(" ".join(map(str, words)) + "\n")
    sys.stdout.flush()


def hash_result(output: Path) -> str:
    """Hash all but the provenance: a commit may be made while this runs."""
    result = read_json(output)
    del result["provenance"]
    return hashlib.sha256(json.dumps(result).encode()).hexdigest()


def main(directory: Path, num_trials: int) -> None:
    """Print a line for an undisturbed search and one for every trial: kind, kills, those inside a write, hash."""
    torch.set_num_threads(1)
    save_dataset(
        *prepare_dataset("diabetes", data_seed=0), directory / "d.npz", directory / "d.json"
    )
    checkpoints, output = directory / "checkpoints", directory / "hall_of_fame.json"
    stage = StageInput(
        {"name": "diabetes", "model": "linear", "label_noise": None, "data_seed": 0},
        TRAINING, str(directory / "d.npz"), "cpu", 1, None, str(checkpoints), 0.0,
    )  # fmt: skip
    run_job(stage, output)
    duration = finish_job(stage, output)
    say("expected", 0, 0, hash_result(output))
    generator = random.Random(0)
    for trial in range(num_trials):
        output.unlink()
        kind = "write" if trial % 3 == 0 else "moment"
        kills, inside = generator.choice([1, 1, 2]), 0
        for _ in range(kills):
            child = start_job(stage, output)
            time.sleep(generator.uniform(0, 0.8 * duration))
            if kind == "write":
                inside += kill_inside_write(child, checkpoints)
            else:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
        finish_job(stage, output)
        say(kind, kills, inside, hash_result(output))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
