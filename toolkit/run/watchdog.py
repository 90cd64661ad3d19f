"""Ends a run that hangs: after no step for too long, every rank writes its stacks and exits, and it is said who waits where.

Test: pytest tests/faults/test_hang.py. Ranks meet once a step, so when one hangs all of them do, and all give up at about
the same time. They cannot talk then, so each leaves a report in the run folder, stacks/rank_00000.txt: the stacks of its
threads and of its loader workers. The lowest rank that reports sums the reports up.
"""

from __future__ import annotations

import contextlib
import faulthandler
import linecache
import multiprocessing
import os
import platform
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO

HANG = 70  # EX_SOFTWARE, the exit code of a run that hung
_PLACES = ("at ", "outside ")  # how the line of a report begins that says where its rank waits
_ROOT = Path(__file__).resolve().parents[2]
_PATIENCE_S = 3.0  # for the reports of the other ranks
# After the timeout: the main thread's stack of a process in which no Python thread can run. It does not end it, since after
# a pause by Ctrl-Z this clock, too, has run out; its launcher does, when the other ranks have gone. A lone one stays until
# somebody looks, or its time limit comes.
_BACKSTOP_S = 9.0


class Watchdog:
    """Watches one rank's steps; `with` ends the watch.

    run        the run folder, the same for all ranks
    timeout_s  without a beat for so long, the process writes its report and exits with code HANG
    """

    def __init__(self, run: Path, rank: int, size: int, timeout_s: float) -> None:
        self.folder, self.rank, self.size, self.timeout_s = run / "stacks", rank, size, timeout_s
        self.folder.mkdir(exist_ok=True)
        self._file: IO[str] = self._report(rank).open("w")
        print(f"rank {rank} {platform.node()} {os.getpid()}", file=self._file, flush=True)
        # loader workers are forked after this: they inherit the handler, and write into this rank's file
        faulthandler.register(signal.SIGUSR1, self._file)
        # A handler reads the stack of the thread that it interrupts, which stands still meanwhile. The timer of faulthandler
        # reads them from a thread beside it, and after a pause, when all of them run on, that can crash the process.
        faulthandler.register(signal.SIGALRM, self._file, all_threads=False)
        self._main = threading.main_thread().ident
        self._over = threading.Event()
        self.beat()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def beat(self, extra_s: float = 0) -> None:
        """Tell that the run goes on; extra_s: how much longer than usual the next beat may take."""
        self._allowed_s, self._beat_s = self.timeout_s + extra_s, time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, self._allowed_s + _BACKSTOP_S)

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number in (signal.SIGALRM, signal.SIGUSR1):
            faulthandler.unregister(number)
        self._file.close()
        self._report(self.rank).unlink(missing_ok=True)

    def _watch(self) -> None:
        pause_s = min(1.0, self.timeout_s / 10)
        woken_s = time.monotonic()
        while not self._over.wait(pause_s):
            now_s = time.monotonic()  # once, since a pause may come between any two calls
            slept_s, woken_s = now_s - woken_s, now_s
            if slept_s > self.timeout_s / 2:
                # The whole process was stopped, as by Ctrl-Z: no hang, unless another rank gave up meanwhile. That one has
                # woken it, and is about to go, whether the main thread has beaten since or not.
                if self._others():
                    self._give_up(slept_s)
                self.beat(self._allowed_s - self.timeout_s)
            elif woken_s - self._beat_s > self._allowed_s:
                self._give_up(woken_s - self._beat_s)

    def _give_up(self, silent_s: float) -> None:
        """Write the report, wait for those of the others, sum up, exit; not even a disk that hangs keeps it from that."""
        place = f"{self._where()} for {silent_s:.0f} s"
        end = threading.Timer(_BACKSTOP_S, os._exit, (HANG,))
        end.daemon = True
        end.start()
        try:
            self._report_and_sum_up(place)
        except OSError as error:
            print(f"rank {self.rank} waits {place}; its stacks cannot be written: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(HANG)

    def _report_and_sum_up(self, place: str) -> None:
        print(place, file=self._file, flush=True)
        os.fsync(self._file.fileno())  # else other machines would not see it on a network disk
        faulthandler.dump_traceback(self._file)
        for worker in multiprocessing.active_children():
            if worker.pid is not None:
                print(f"\nloader worker {worker.pid}", file=self._file, flush=True)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker.pid, signal.SIGUSR1)
                time.sleep(0.1)
        self._wait_for_others()
        for other in set(range(self.size)) - set(self._others()) - {self.rank}:
            self._wake(other)
        self._wait_for_others()
        places = {self.rank: place, **self._others()}
        if self.rank == min(places):
            silent = sorted(set(range(self.size)) - set(places))
            print(summarize(places, silent, self._allowed_s, self.folder), file=sys.stderr, flush=True)

    def _wait_for_others(self) -> None:
        until_s = time.monotonic() + _PATIENCE_S
        while len(self._others()) < self.size - 1 and time.monotonic() < until_s:
            time.sleep(0.1)

    def _others(self) -> dict[int, str]:
        """Where the other ranks that gave up in this start of the run were waiting."""
        places: dict[int, str] = {}
        for rank in set(range(self.size)) - {self.rank}:
            with contextlib.suppress(OSError):
                lines = self._report(rank).read_text().splitlines()
                places.update((rank, line) for line in lines if line.startswith(_PLACES))
        return places

    def _wake(self, rank: int) -> None:
        """Let a stopped process of this machine run on, so that it can report; across machines nobody can."""
        with contextlib.suppress(OSError, ValueError, IndexError):
            _, _, host, pid = self._report(rank).read_text().splitlines()[0].split()
            if host == platform.node():
                os.kill(int(pid), signal.SIGCONT)

    def _where(self) -> str:
        """The innermost line of this toolkit that the main thread stands in."""
        frame: FrameType | None = sys._current_frames().get(self._main or 0)
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(_ROOT / "toolkit"):
                line = linecache.getline(str(path), frame.f_lineno).strip()
                return f"at {path.relative_to(_ROOT)}:{frame.f_lineno}, {line}"
            frame = frame.f_back
        return "outside of this toolkit"

    def _report(self, rank: int) -> Path:
        return self.folder / f"rank_{rank:05d}.txt"


def tells_of_hang(report: Path) -> bool:
    """Whether there are stacks in a rank's report: one of a start that was killed says no more than who the rank was."""
    return report.read_bytes().count(b"\n") > 1


def summarize(places: dict[int, str], silent: list[int], timeout_s: float, folder: Path) -> str:
    """Say in lines which ranks wait where, ranks at the same place together.

    places  where each rank that reported waits
    silent  ranks that did not
    """
    together: dict[str, list[int]] = {}
    for rank, place in sorted(places.items()):
        together.setdefault(place.rsplit(" for ", 1)[0], []).append(rank)
    lines = [f"no step for {timeout_s:g} s, so the run was ended; all stacks are in {folder}"]
    lines += [f"  rank {_list_ranks(ranks)} waits {place}" for place, ranks in together.items()]
    if silent:
        lines.append(
            f"  rank {_list_ranks(silent)} does not answer: its process or machine is gone or stopped, look there first"
        )
    lines.append(
        "the same command again, without --fresh, goes on from the last checkpoint; engine.hang_timeout_s sets the time"
    )
    return "\n".join(lines)


def _list_ranks(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
