"""What a running job is asked from outside: a signal to end, or a file named `save` or `stop` dropped into its folder.

Test: pytest tests/faults/test_signals.py. A handler only notes the signal. The run looks at the notes once a step and sums
them over the ranks, beside the loss: so all ranks save and end at the same step, whichever of them was asked.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import FrameType
from typing import NamedTuple

REQUEUE = 75  # EX_TEMPFAIL, the exit code that says: saved in time, start the same command again
REQUEUE_FILE = "requeue"  # in the run folder: the same for batch scripts, since launchers can lose an exit code
SAVE_FILE, STOP_FILE = "save", "stop"
# SLURM and clouds announce the end of a job by TERM or USR2 (NCCL once took USR1 for itself), a person by Ctrl-C
SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)


class Wishes(NamedTuple):
    """What is asked of the run: numbers that can be summed over the ranks, above zero where somebody asks."""

    save: float
    stop: float  # save, and end as wished
    yields: float  # save, and end to be started again


class Requests:
    """Notes the signals that reach this process from now on; a second Ctrl-C ends it at once."""

    def __init__(self) -> None:
        self._signalled = False
        self._pid = os.getpid()
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}

    def close(self) -> None:
        """Leave the signals to whoever had them before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if os.getpid() == self._pid:  # not in a child that has just been forked
            os.write(2, f"{signal.Signals(number).name}: saving at the end of this step, then ending\n".encode())

    def read(self, run: Path | None) -> Wishes:
        """What was asked since the last call; a file that asks is removed.

        run  the run folder, for the rank that looks after it
        """
        save, stop = (run is not None and _take(run / name) for name in (SAVE_FILE, STOP_FILE))
        return Wishes(float(save), float(stop), float(self._signalled))


def _take(path: Path) -> bool:
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    return True
