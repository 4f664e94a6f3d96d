"""The loss-evolution example of Kozax (de Vries, Keemink, van Gerven, arXiv 2502.03047): data, settings and a search.

There, a candidate loss trains four small networks on random XOR points; its fitness is their mean error rate. Kept: the
points (uniform in the unit square, classes by x1 > 1/2 xor x2 > 1/2), 50 fresh ones a step, 500 to validate, a tanh MLP
2-16-16-1 with a sigmoid output, Adam 0.01, the operators. Different here: the four networks of a candidate share the
points and differ in their initial parameters (PyTorch's defaults), ``log`` is log(max(|a|, 1e-7)), and trees hold the
constants +1 and -1 alone.
"""

from __future__ import annotations

import numpy as np
import torch

from evoloss.engine.filters import RejectionSettings
from evoloss.search.individuals import VariationSettings
from evoloss.search.settings import SearchSettings
from evoloss.seeding import numpy_generator
from evoloss.tasks import Split, Task

BATCH_SIZE = 50
NUM_STEPS = 150
NUM_NETWORKS = 4
POPULATION_SIZE = 500
NUM_GENERATIONS = 15
VALIDATION_ROWS = 500
OPERATORS = ("add", "sub", "mul", "log")


def make_xor_task(seed: int = 0) -> Task:
    """Return the task. The training split has one row per step and batch place: each point is seen once."""

    def draw(split: str, rows: int) -> Split:
        x = numpy_generator(seed, "xor", split).random((rows, 2), dtype=np.float32)
        y = (x[:, 0] > 0.5) ^ (x[:, 1] > 0.5)
        return Split(torch.from_numpy(x), torch.from_numpy(y.astype(np.int64)))

    return Task(
        "xor", "classification", "error_rate", "cross_entropy", 1, (2,),
        draw("train", BATCH_SIZE * NUM_STEPS),
        draw("validation", VALIDATION_ROWS),
        draw("test", VALIDATION_ROWS),
    )  # fmt: skip


def make_xor_search(population_size: int, num_generations: int) -> SearchSettings:
    """Return the example's search; variation and filters are ours, and there is no local search."""
    return SearchSettings(
        population_size=population_size,
        num_generations=num_generations - 1,  # the first generation counts, which GPSearch calls 0
        fitness_steps=NUM_STEPS,
        variation=VariationSettings(4, 1.4, 0.70, 0.25, 0.05, 2, 4, 10, OPERATORS),
        rejection=RejectionSettings(100, 100, 0.01, 2),
        local_search=None,
        initial_deviation=0.0,
        num_networks=NUM_NETWORKS,
    )
