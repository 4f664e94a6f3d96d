"""Unit tests run torch on one thread: parallel test processes would otherwise fight for the cores."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def narrow_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let racing stop somebody in searches as small as a test's: from few neighbours, with little margin."""
    monkeypatch.setattr("evoloss.engine.racing.NEIGHBOURS", 3)
    monkeypatch.setattr("evoloss.engine.racing.MARGIN", 0.2)
