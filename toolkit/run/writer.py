"""Checkpoints written by a thread while training goes on; a failed write is told, and costs no older one.

Test: pytest tests/run/test_checkpoint.py, tests/faults/test_checkpoints.py
"""

from __future__ import annotations

import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from toolkit.config import CheckpointConfig
from toolkit.engine.plain import State
from toolkit.errors import UserError, in_one_line
from toolkit.run.checkpoint import clear_leftovers, list_checkpoints, save_checkpoint


class CheckpointWriter:
    """Writes one run's checkpoints, one at a time; for the main rank, which holds the run folder's lock."""

    def __init__(self, run: Path, settings: CheckpointConfig) -> None:
        """Also clears what a kill left half written."""
        clear_leftovers(run)
        self.run, self.settings = run, settings
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._last: Future[None] | None = None

    def submit(self, step: int, tensors: State, unet: nn.Module, state: dict[str, Any], about: dict[str, Any]) -> None:
        """Hand a checkpoint over once the one before it is done, whether written or failed.

        Arguments as save_checkpoint has them; the tensors are the thread's from now on.
        """
        error = self._last.exception() if self._last else None
        if error and not isinstance(error, UserError):
            raise error
        self._last = self._thread.submit(self._save, step, tensors, unet, state, about)

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
