"""Candidates on several threads: each thread computes on one core, whatever the library would do by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Worker = TypeVar("Worker")
Item = TypeVar("Item")
Result = TypeVar("Result")


def map_on_threads(
    make_worker: Callable[[], Worker],
    work: Callable[[Worker, Item], Result],
    items: Sequence[Item],
) -> list[Result]:
    """Return ``work(worker, item)`` for every item, in order, on `torch.get_num_threads` threads.

    Each thread has a worker of its own (`make_worker`), for what must not be shared, and one core; a single item gets
    all of them. What ``work`` raises is raised here.
    """
    count = torch.get_num_threads()
    if count == 1 or len(items) < 2:
        worker = make_worker()
        return [work(worker, item) for item in items]
    try:
        with ThreadPoolExecutor(
            min(count, len(items)), initializer=torch.set_num_threads, initargs=(1,)
        ) as pool:
            workers = [make_worker() for _ in range(min(count, len(items)))]

            def run(item: Item) -> Result:
                worker = workers.pop()
                try:
                    return work(worker, item)
                finally:
                    workers.append(worker)

            return list(pool.map(run, items))
    finally:
        # the setting is a thread's own, but a thread that starts later takes over the last one made
        torch.set_num_threads(count)
