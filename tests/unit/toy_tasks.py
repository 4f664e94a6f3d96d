"""Small seeded tasks for tests of engine and search."""

from __future__ import annotations

import torch

from evoloss.tasks import Split, Task


def make_toy_task(
    kind: str = "classification",
    *,
    input_shape: tuple[int, ...] = (6,),
    num_outputs: int = 3,
    rows: int = 60,
    vocabulary_size: int | None = None,
    seed: int = 0,
) -> Task:
    """Return a learnable task: a noisy linear rule of the flattened inputs, float64."""
    generator = torch.Generator().manual_seed(seed)
    features = int(torch.tensor(input_shape).prod())
    rule = torch.randn(features, num_outputs, generator=generator, dtype=torch.float64)

    def draw() -> Split:
        if vocabulary_size:
            x = torch.randint(1, vocabulary_size, (rows, *input_shape), generator=generator)
            return Split(x, x.sum(1) % num_outputs)
        x = torch.randn(rows, *input_shape, generator=generator, dtype=torch.float64)
        score = x.flatten(1) @ rule / features**0.5
        return Split(x, score if kind == "regression" else score.argmax(1))

    names = ("mse", "mse") if kind == "regression" else ("error_rate", "cross_entropy")
    return Task(
        "toy", kind, *names, num_outputs, input_shape, draw(), draw(), draw(), vocabulary_size
    )
