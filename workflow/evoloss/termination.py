"""SIGTERM: a cluster's notice before it takes the machine away. The job saves its state and leaves."""

from __future__ import annotations

import signal
import threading
from types import FrameType

EXIT_STATUS = 128 + signal.SIGTERM
"""The shell's convention; not 0, so that Snakemake and SLURM know that the job must run again."""


class Terminated(SystemExit):
    """The job was asked to end and has saved its state."""

    def __init__(self) -> None:
        super().__init__(EXIT_STATUS)


class Termination:
    """Remembers SIGTERM from now on; in a thread other than the main one, which gets no signals, it never comes."""

    def __init__(self) -> None:
        self.is_requested = False
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.is_requested = True
