"""Work spread over processes: results in any order, a killed process is a sentence, and no process outlives the command.

Test: pytest tests/authoring/test_pack.py
"""

import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import Any, TypeVar

from toolkit.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")


def cores() -> int:
    """How many processes this one may run at once."""
    return len(os.sched_getaffinity(0))


def parse_part(part: str) -> tuple[int, int]:
    """Read which part of how many machines' work is meant, "i/N" with i from 1. Raises UserError."""
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", part)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f"part is {part}; give i/N, from 1/N to N/N, like 3/8 for the third of eight machines")
    return int(match[1]), int(match[2])


class Workers:
    """A pool of `jobs` processes, or, for one job, the process that asks.

    remedy  what to do where a process was killed
    """

    def __init__(
        self,
        jobs: int,
        remedy: str = "start the same command again, which goes on where it was stopped, with fewer --jobs",
    ) -> None:
        self.remedy = remedy
        # Forked from a process that has no threads yet, and has imported what all of them need.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["toolkit.authoring.pack"])
        self.others = set(multiprocessing.active_children())
        self.pool = ProcessPoolExecutor(jobs, context, _start) if jobs > 1 else None

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, kind: type | None, *exception: object) -> None:
        if self.pool:
            if kind:  # who stops does not wait for hours of video
                for process in set(multiprocessing.active_children()) - self.others:
                    process.kill()
            self.pool.shutdown(cancel_futures=True)

    def run(self, task: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[tuple[Item, Result]]:
        """Yield each item with what the task made of it, as they finish. Raises what a task raises."""
        if not self.pool:
            yield from ((item, task(item)) for item in items)
            return
        try:
            futures = {self.pool.submit(task, item): item for item in items}
            for future in as_completed(futures):
                yield futures.pop(future), future.result()
        except BrokenProcessPool:
            raise UserError(f"a process was killed, most likely for want of memory; {self.remedy}") from None


def _start() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that asks hears it and ends the pool
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed parent says nothing, and its pool would wait for work forever."""
    parent: Any = multiprocessing.parent_process()
    wait([parent.sentinel])
    os._exit(1)
