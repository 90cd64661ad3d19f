"""What a running job is asked from outside: a signal to end, or a file named `save` or `stop` dropped into its folder.

Test: pytest tests/faults/test_ranks.py. A handler only notes the signal. The run looks at the notes once a step and sums
them over the ranks, beside the loss: so all ranks save and end at the same step, whichever of them was asked. While all is
still loaded there is nothing to save, and a rank that cannot get to its first step ends by itself.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NamedTuple

REQUEUE = 75  # EX_TEMPFAIL, the exit code that says: saved in time, start the same command again
REQUEUE_FILE = "requeue"  # in the run folder: the same for batch scripts, since launchers can lose an exit code
SAVE_FILE, STOP_FILE = "save", "stop"
# SLURM and clouds announce the end of a job by TERM or USR2 (NCCL once took USR1 for itself), a person by Ctrl-C, and a
# terminal that is closed by HUP
SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)
_LOADING_S = 20  # less than launchers wait before they kill
_NOTHING_TO_SAVE = b"asked to end while still loading: nothing to save, the same command starts again\n"


class Wishes(NamedTuple):
    """What is asked of the run: numbers that can be summed over the ranks, above zero where somebody asks."""

    save: float
    stop: float  # save, and end as wished
    yields: float  # save, and end to be started again


class Requests:
    """Notes the signals that reach this process from now on; a second Ctrl-C ends it at once."""

    def __init__(self) -> None:
        self._signalled, self._loading, self._began_s = False, True, time.time()
        self._pid = os.getpid()
        # nohup and the like have some ignored, and so it stays
        heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._note) for number in heard}
        # a rank that waits for one that is gone may stand in C++ for half an hour, where no handler of Python's runs
        reader, self._pipe = os.pipe()
        os.set_blocking(self._pipe, False)
        signal.set_wakeup_fd(self._pipe, warn_on_full_buffer=False)
        threading.Thread(target=self._end_loading, args=(reader,), daemon=True).start()

    def __enter__(self) -> Requests:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Leave the signals to whoever had them."""
        self._loading = False  # whoever called goes on, whatever was asked of this
        signal.set_wakeup_fd(-1)
        os.close(self._pipe)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def age_s(self) -> float:
        """Seconds since the program started, or called for training."""
        return time.time() - self._began_s

    def drop_old(self, run: Path) -> None:
        """Remove what was asked of an earlier start of a run; a wish of today, made while all is loaded, stays."""
        for name in (REQUEUE_FILE, SAVE_FILE, STOP_FILE):
            with contextlib.suppress(FileNotFoundError):
                if (run / name).stat().st_mtime < self._began_s:
                    (run / name).unlink()

    def _note(self, number: int, frame: FrameType | None) -> None:
        first, self._signalled = not self._signalled, True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if first and os.getpid() == self._pid:  # not in a child that has just been forked
            with contextlib.suppress(OSError):  # it would be raised wherever the program stands, in a read for one
                name = signal.Signals(number).name
                os.write(2, f"{name}: asked to end; what is training saves first, at the end of a step\n".encode())

    def _end_loading(self, reader: int) -> None:
        with open(reader, "rb", buffering=0) as pipe:
            while heard := pipe.read(1):
                if heard[0] in self._before and self._loading:
                    time.sleep(_LOADING_S)
                    if self._loading:
                        with contextlib.suppress(OSError):
                            os.write(2, _NOTHING_TO_SAVE)
                        os._exit(REQUEUE)

    def read(self, run: Path | None) -> Wishes:
        """What was asked since the last call, at the end of a step; a file that asks is removed.

        run  the run folder, for the rank that looks after it
        """
        self._loading = False
        save, stop = (run is not None and _take(run / name) for name in (SAVE_FILE, STOP_FILE))
        return Wishes(float(save), float(stop), float(self._signalled))


class Console:
    """A stream that may go away, as a pipe into tee does on Ctrl-C, without ending the run that writes to it."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()


def _take(path: Path) -> bool:
    try:
        path.unlink()
    except (
        OSError
    ):  # it is not there; or a network disk is away for a moment, or it is a folder: no reason to end a run
        return False
    return True
