"""Training steps as a CUDA graph: recorded once, replayed for every batch, so that launching costs no time."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

import torch
from torch import Tensor

from evoloss.engine.memory import is_out_of_memory

logger = logging.getLogger(__name__)

SWITCH = "EVOLOSS_CUDA_GRAPHS"
"""Environment variable: 0 means no graphs."""

WARM_UP = 3
"""Steps taken before the recording: they choose algorithms and allocate the optimiser's state."""

FEWEST_REPLAYS = 30
"""Recording costs as much as some ten ordinary steps."""


class StepRunner:
    """Takes steps on one batch after another; on a GPU by a graph, unless a recording has failed."""

    def __init__(self) -> None:
        self._usable = os.environ.get(SWITCH, "1") != "0"

    def run(self, step: Callable[[Tensor], None], batches: Tensor) -> None:
        """Call ``step(rows)`` for every row of ``batches`` (steps, batch), or do the same by a graph.

        ``step`` works in place on tensors that it does not replace (after `WARM_UP` steps), and never waits for the
        device.
        """
        done = 0
        if self._usable and batches.is_cuda and len(batches) >= WARM_UP + FEWEST_REPLAYS:
            done = self._replay(step, batches)
        for rows in batches[done:]:
            step(rows)

    def _replay(self, step: Callable[[Tensor], None], batches: Tensor) -> int:
        """Return how many steps were taken: all of them, or the warm-up where the recording failed."""
        rows = batches[0].clone()
        here, aside = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            for number in range(WARM_UP):
                rows.copy_(batches[number])
                step(rows)
        here.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                step(rows)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            self._usable = False
            logger.warning("no CUDA graph of a training step, so it is slower: %s", error)
            return WARM_UP
        for batch in batches[WARM_UP:]:
            rows.copy_(batch)
            graph.replay()
        # the graph and its memory go away here, and must not before its last replay is over
        here.synchronize()
        return len(batches)
