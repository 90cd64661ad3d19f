"""Checkpoints written by a thread while training goes on; a failed write is told, and costs no older one.

Test: pytest tests/run/test_checkpoint.py, tests/faults/test_checkpoints.py
"""

from __future__ import annotations

import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from enum import IntEnum
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from toolkit.config import CheckpointConfig
from toolkit.engine.plain import State
from toolkit.errors import UserError, in_one_line
from toolkit.run.checkpoint import clear_leftovers, list_checkpoints, save_checkpoint

LOOK_S = 1.0


class Write(IntEnum):
    """How the checkpoint that was handed over last is getting on."""

    OVER = 0  # written, or failed
    MOVES = 1
    STANDS = 2


class CheckpointWriter:
    """Writes one run's checkpoints, one at a time; for the main rank, which holds the run folder's lock."""

    def __init__(self, run: Path, settings: CheckpointConfig) -> None:
        """Also clears what a kill left half written."""
        clear_leftovers(run)
        self.run, self.settings = run, settings
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._last: Future[None] | None = None
        self._clock = self._thread.submit(lambda: time.pthread_getcpuclockid(threading.get_ident())).result()
        self._worked_s = 0.0

    def submit(self, step: int, tensors: State, unet: nn.Module, state: dict[str, Any], about: dict[str, Any]) -> None:
        """Hand a checkpoint over once the one before it is done, whether written or failed.

        Arguments as save_checkpoint has them; the tensors are the thread's from now on.
        """
        error = self._last.exception() if self._last else None
        if error and not isinstance(error, UserError):
            raise error
        self._last = self._thread.submit(self._save, step, tensors, unet, state, about)

    def look(self) -> Write:
        """Wait a second for the last one, and tell how it gets on; it stands if it did nothing since the look before.

        What it does is seen by its thread's processor time: copying, hashing, and bringing to a disk that answers what
        was copied, take some of it all the time; waiting for a disk that hangs takes none.
        """
        if self._last is None or self._last in wait([self._last], LOOK_S).done:
            return Write.OVER
        before_s, self._worked_s = self._worked_s, time.clock_gettime(self._clock)
        return Write.MOVES if self._worked_s > before_s else Write.STANDS

    def wait(self) -> None:
        """Return when the last one is on disk. Raises UserError where it failed: no run may end as if it stood there."""
        if self._last:
            self._last.result()

    def close(self) -> None:
        """Let a write under way end."""
        self._thread.shutdown()

    def _save(self, step: int, tensors: State, unet: nn.Module, state: dict[str, Any], about: dict[str, Any]) -> None:
        try:
            save_checkpoint(self.run, step, tensors, unet, state, about, self.settings)
        except (OSError, MemoryError, SafetensorError, UserError) as error:
            whole = [folder.name for folder in list_checkpoints(self.run)]
            rest = f"the newest whole one is {whole[-1]}" if whole else "there is none before it"
            message = f"saving the checkpoint of step {step} failed: {in_one_line(error)}; {rest}"
            print(message, file=sys.stderr, flush=True)
            raise UserError(message) from None
