"""Out of memory: the population is worked on in smaller chunks, for as long as a single network still fits."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from evoloss.errors import ModelError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
Chunk = tuple[int, ...]
"""Numbers of the networks (or candidates) that are worked on together."""


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether numpy, torch on a CPU (which raises a plain `RuntimeError`) or CUDA had no memory left."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    phrases = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in phrases)


class Chunks:
    """How many networks fit into memory at once, found by trying; ``what`` is done with them, for messages."""

    def __init__(self, what: str, batch_size: int) -> None:
        self._what = what
        self._batch_size = batch_size
        self._limit: int | None = None

    def split(self, numbers: Sequence[int]) -> list[Chunk]:
        """Return the numbers in the fewest chunks that fit as far as is known; they differ in size by one at most."""
        limit = self._limit or max(1, len(numbers))
        count = -(-len(numbers) // limit)
        edges = [len(numbers) * i // count for i in range(count + 1)] if count else []
        return [tuple(numbers[a:b]) for a, b in itertools.pairwise(edges)]

    def run(
        self, chunks: Sequence[Chunk], work: Callable[[Chunk], Result]
    ) -> list[tuple[Chunk, Result]]:
        """Return the chunks that ``work`` was done on, in order, with its results.

        A chunk that does not fit is halved, and its halves are worked on from the start; later calls to `split` know.
        ``work`` must leave nothing behind of a chunk that fails.

        Raises
        ------
        ModelError
            If a single network does not fit.
        """
        waiting, done = list(chunks), []
        halves: set[Chunk] = set()
        while waiting:
            chunk = waiting.pop(0)
            pieces = self.split(chunk)
            if chunk in halves and len(pieces) > 1:  # its other half did not fit either
                halves.update(pieces)
                waiting[:0] = pieces
                continue
            try:
                done.append((chunk, work(chunk)))
                continue
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                if len(chunk) == 1:
                    raise ModelError(self._describe_failure(error)) from error
            # outside of the except clause, where the traceback would keep the failed work's tensors alive
            limit = -(-len(chunk) // 2)
            if self._limit is None or limit < self._limit:
                # it never rises: of several chunks that fail, the first says so
                self._limit = limit
                logger.warning(
                    "not enough memory to %s with %d losses at once: going on with at most %d at a time",
                    self._what,
                    len(chunk),
                    limit,
                )
            pieces = self.split(chunk)
            halves.update(pieces)
            waiting[:0] = pieces
        return done

    def _describe_failure(self, error: BaseException) -> str:
        reason = " ".join(str(error).split()) or type(error).__name__
        return (
            f"not enough memory to {self._what}, even with a single loss at a time: lower "
            f"training.batch_size (now {self._batch_size}) or search.population_size, take a smaller model, or "
            f"ask for more memory ({reason})"
        )
