"""A run that hangs ends itself and says which rank waits where. Run: pytest tests/faults/test_hang.py

T15; `make faults` runs the long form.
"""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.faults.forked import (
    ROOT,
    Warm,
    Wound,
    goes_on,
    newest,
    run_folder,
    same_run,
    wait_for,
    wait_for_steps,
)
from toolkit.run.watchdog import HANG

TIMEOUT_S = 5.0
AT_REDUCTION = r"at toolkit/engine/(world|zero)\.py:\d+, .*"  # where it meets the others
IN_LOADER = r"at toolkit/data/loader\.py:\d+, .*"
WORKER = "data.loader:load_clip"


def stick(rank: int, place: str, call: int, seconds: float | None) -> Wound:
    return "stick", {"victims": [rank], "place": place, "call": call, "seconds": seconds}


# data.workers; the harm, or the rank that is stopped; its rank, and where that says it waits
CASES: dict[str, tuple[int, Wound | None, int, str]] = {
    "rank 1 stopped": (0, None, 1, r"(at|outside) .*"),
    "a worker in a deadlock": (1, stick(1, WORKER, 5, None), 1, IN_LOADER),
    "rank 0 stopped": (0, None, 0, r"(at|outside) .*"),
    "a read of 60 s": (0, stick(0, WORKER, 4, 60), 0, IN_LOADER),
    "a worker in a read of 60 s": (2, stick(0, WORKER, 3, 60), 0, IN_LOADER),
    "a rank in a deadlock": (
        0,
        stick(1, "engine.zero:ZeroEngine.step", 4, None),
        1,
        r"at toolkit/run/trainer\.py:\d+, .*",
    ),
}


def test_t15_hang(faults: Any, forked: Warm, small_run: dict[str, Any], undisturbed: Path) -> None:
    """A stopped rank, a deadlock, a read that does not end: all ranks exit in time, with the stacks of all written.

    The message says where each rank waits. In the long form the same command is given again, and goes on exactly.
    """
    names = [*CASES][: faults.choose(short=2, long=6)]
    faults.begin("T15 hang", len(names))
    passed = 0
    for number, name in enumerate(names):
        workers, wound, victim, place = CASES[name]
        overrides = small_run | {"name": f"t15_{number}", "data.workers": workers, "engine.hang_timeout_s": TIMEOUT_S}
        run = undisturbed.with_name(overrides["name"])
        trial = forked.start(overrides, wounds=[wound] if wound else [])
        if wound is None:
            wait_for_steps(run, 3)
            trial.signal(signal.SIGSTOP, victim)
        codes = trial.wait()
        ended_s = max((trial.folder / f"code.{rank}").stat().st_mtime for rank in (0, 1))
        late_s = ended_s - (run / "log.jsonl").stat().st_mtime - TIMEOUT_S
        said = trial.stderr()
        good = codes == [HANG, HANG] and late_s <= 10 and said.count(f"no step for {TIMEOUT_S:g} s") == 1
        good &= re.search(rf"rank {1 - victim} waits {AT_REDUCTION}|rank 0, 1 waits", said) is not None
        good &= re.search(rf"rank ({victim}|0, 1) waits {place}", said) is not None
        stacks = [(run / f"stacks/rank_0000{rank}.txt").read_text() for rank in (0, 1)]
        good &= all(
            "trainer.py" in text and "MainThread" in text or "most recent call first" in text for text in stacks
        )
        if workers:
            good &= "load_clip" in stacks[victim].partition("loader worker")[2] or "strike" in stacks[victim]
        print(f"{name}: {codes}, {late_s:.1f} s after the timeout, {said}", *stacks, sep="\n")
        passed += good and (not faults.long or goes_on(forked, overrides | {"engine.hang_timeout_s": 600}, undisturbed))
    faults.end(passed)


def test_t15_a_pause_is_no_hang(faults: Any, forked: Warm, small_run: dict[str, Any], undisturbed: Path) -> None:
    """Ctrl-Z, and fg after longer than the timeout, in the long form also all its grace: the run goes on, bit by bit."""
    trials, passed = faults.choose(short=1, long=3), 0
    faults.begin("T15 Ctrl-Z and fg", trials)
    for trial in range(trials):
        overrides = small_run | {
            "name": f"t15_pause_{trial}",
            "data.workers": trial % 2,
            "engine.hang_timeout_s": TIMEOUT_S,
        }
        run = undisturbed.with_name(overrides["name"])
        started = forked.start(overrides)
        wait_for_steps(run, 2 + trial)
        started.signal(signal.SIGSTOP)
        time.sleep(TIMEOUT_S + (12 if faults.long else 3))
        started.signal(signal.SIGCONT)
        codes = started.wait()
        print(codes, started.stderr())
        passed += codes == [0, 0] and same_run(run, undisturbed)
    faults.end(passed)


@pytest.mark.parametrize(("call", "codes"), [(1, [0, 0]), (2, [HANG, HANG])])
def test_compiling_is_no_hang(forked: Warm, small_run: dict[str, Any], call: int, codes: list[int]) -> None:
    """A first step that takes longer than engine.hang_timeout_s, as compiling may, goes on; any later one is ended."""
    overrides = small_run | {
        "name": f"compiled_{call}",
        "model.compile": True,
        "engine.hang_timeout_s": 3,
        "schedule.steps": 2,
    }
    # compiling itself would take a minute
    wounds = [("drop", {"place": "run.job:compile_blocks"}), stick(0, "run.framer:Framer.compute_loss", call, 7)]
    assert forked.start(overrides, wounds=wounds).wait() == codes


SAVE = "run.writer:save_checkpoint"


@pytest.mark.parametrize(
    ("wound", "codes"),
    [(("drag", {"place": SAVE, "calls": [1, 4], "seconds": 7}), [0, 0]), (stick(0, SAVE, 1, 60), [HANG, HANG])],
)
def test_a_slow_write_is_no_hang(forked: Warm, small_run: dict[str, Any], wound: Wound, codes: list[int]) -> None:
    """Of the first checkpoint and of the last, for longer than engine.hang_timeout_s; one that stands still is one."""
    overrides = small_run | {"name": f"written_{codes[0]}", "engine.hang_timeout_s": 3}
    trial = forked.start(overrides, wounds=[wound])
    assert trial.wait() == codes, trial.stderr()
    assert newest(run_folder(overrides)) == (8 if codes == [0, 0] else 0)


def watch_alone(folder: Path, lines: str, ranks: int = 1) -> subprocess.Popen[str]:
    """Start a process of rank 0 on some lines of Python, watched with little patience; returns when the watch began."""
    code = f"""
import itertools, os, sys, time
from pathlib import Path
from toolkit.run import watchdog
watchdog._BACKSTOP_S = 0.5
with watchdog.Watchdog(Path({str(folder)!r}), 0, {ranks}, timeout_s=1.5) as watch:
    print("watched", flush=True)
    {lines}
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True, **pipes)
    assert process.stdout is not None and process.stdout.readline() == "watched\n"
    return process


@pytest.mark.parametrize(
    ("disk", "says"), [("time.sleep(60)", ""), ("os.open('/no/such/disk', 0)", "its stacks cannot be written")]
)
def test_no_disk_keeps_a_run_that_hangs_from_its_end(tmp_path: Path, disk: str, says: str) -> None:
    """Whether writing the report hangs, too, or fails: the process ends with the code of a hang."""
    process = watch_alone(tmp_path, f"os.fsync = lambda file: {disk}; time.sleep(60)")
    _, said = process.communicate(timeout=30)
    assert process.returncode == HANG and says in said


def test_stacks_where_python_cannot_run(tmp_path: Path) -> None:
    """A call that neither returns nor lets another thread of Python run: its stacks are written all the same."""
    process = watch_alone(tmp_path, "sum(itertools.repeat(0))")
    try:
        wait_for(lambda: "in <module>" in (tmp_path / "stacks/rank_00000.txt").read_text(), 30)
    finally:
        process.kill()  # it would never end


def test_what_is_allowed_is_told(tmp_path: Path) -> None:
    """One beat that may take longer is given that time, and what is said is how long the process was silent for."""
    process = watch_alone(tmp_path, "watch.beat(2); time.sleep(2.5); print('alive', flush=True); time.sleep(60)")
    out, said = process.communicate(timeout=30)
    assert process.returncode == HANG and out == "alive\n" and "no step for 3.5 s" in said


def test_a_lone_rank_may_pause(tmp_path: Path) -> None:
    """Stopped within a step for longer than all its grace, and continued: the process goes on, in its own time."""
    process = watch_alone(tmp_path, "watch.beat(2); sys.stdin.read()")
    process.send_signal(signal.SIGSTOP)
    time.sleep(4)
    process.send_signal(signal.SIGCONT)
    time.sleep(2.5)  # in which it would be taken for one that hangs
    process.communicate(timeout=30)
    assert process.returncode == 0


def test_one_that_was_woken_to_report_does(tmp_path: Path) -> None:
    """Stopped until another rank gave up and continued by it: it gives up too, though its main thread beats at once."""
    process = watch_alone(tmp_path, "while True: watch.beat()", ranks=2)
    process.send_signal(signal.SIGSTOP)
    report = "rank 1 elsewhere 1\nat toolkit/engine/world.py:33, all_reduce for 2 s\n"
    (tmp_path / "stacks/rank_00001.txt").write_text(report)
    time.sleep(2)
    process.send_signal(signal.SIGCONT)
    try:
        _, said = process.communicate(timeout=15)
    finally:
        process.kill()
    assert process.returncode == HANG and "rank 1 waits at toolkit/engine/world.py:33" in said
