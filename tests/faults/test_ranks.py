"""One rank that dies ends all of them; one that is asked to end makes all of them save and end together.

T3 and T7; `make faults` runs the long form. Run: pytest tests/faults/test_ranks.py
"""

import os
import random
import signal
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.faults.forked import (
    BACKWARD,
    Trial,
    Warm,
    goes_on,
    newest,
    run_folder,
    same_run,
    strike,
    wait_for,
    wait_for_steps,
)
from tests.launching import launch, read_numbers, start, train_command, train_here
from toolkit.run.checkpoint import list_checkpoints
from toolkit.run.job import make_engine
from toolkit.run.signals import Requests, Wishes

TERM, USR2, INT, KILL = signal.SIGTERM, signal.SIGUSR2, signal.SIGINT, signal.SIGKILL
# where a signal meets a rank: a place, which call of it, the steps after which the run then may end
PLACES = {
    "in a step": (BACKWARD, 4, 4),
    "in an update": ("engine.zero:ZeroEngine.step", 4, 5),
    "at a save": ("run.trainer:save", 1, 3),
    "reading the base": ("run.job:load_base", 1, 1),
    "looking for a checkpoint": ("run.job:find_resume", 1, 1),
    "making the engine": ("run.job:make_engine", 1, 1),
}
WRITING = ("run.checkpoint:_publish", 1, 4)  # by a thread of the main rank, one or two steps after the save


def test_t3_kill_of_one(faults: Any, forked: Warm, small_run: dict[str, Any], undisturbed: Path) -> None:
    """SIGKILL to one rank, in a step, a save or while loading: all end within 30 s, the folder is free, nothing is lost.

    Launchers send TERM to the other ranks, and kill them after 30 s; here the other ends before, and says in one sentence
    that a rank is gone, or that there was nothing to save yet.
    """
    cases = [(rank, place, call) for place, call, _ in PLACES.values() for rank in (1, 0)] + [(0, *WRITING[:2])]
    cases = cases[: faults.choose(short=2, long=13)]
    faults.begin("T3 kill of one rank", len(cases))
    passed = 0
    for number, (rank, place, call) in enumerate(cases):
        overrides = small_run | {"name": f"t3_{number}", "data.workers": number % 2}
        trial = forked.start(overrides, wounds=[strike([rank], place, call, KILL)])
        wait_for(lambda: trial.ended(rank), 60)  # noqa: B023
        trial.signal(TERM, 1 - rank)
        codes, said = trial.wait(30), trial.stderr(1 - rank)
        good = codes[rank] == -KILL and "Traceback" not in said
        if codes[1 - rank] == 75:
            good &= "asked to end while still loading" in said
        else:
            good &= codes[1 - rank] == 2 and f"rank {1 - rank} of 2 waited for another rank, which is gone" in said
        print(rank, place, codes, good, said)
        passed += good and goes_on(forked, overrides, undisturbed)
    faults.end(passed)


@pytest.mark.launch
def test_t3_kill_of_one_in_a_launch(faults: Any, small_run: dict[str, Any], undisturbed: Path) -> None:
    """The same under DeepSpeed's launcher, which sends TERM to the others when one is gone."""
    trials, passed = faults.choose(short=0, long=2), 0
    if not trials:
        pytest.skip("two launches a trial: make faults")
    faults.begin("T3 kill of one rank of a DeepSpeed launch", trials)
    for rank in range(trials):
        overrides = small_run | {"name": f"t3_launch_{rank}"}
        code, _ = strike_launch(overrides, partial(find_rank, rank), KILL, within_s=30)
        passed += code != 0 and launch_goes_on(overrides, undisturbed)
    faults.end(passed)


def strike_launch(
    overrides: dict[str, Any], find: Callable[[int], int], number: int, within_s: float
) -> tuple[int, str]:
    """Send a signal to a process of a DeepSpeed launch after some steps; returns what the launch ends with and says.

    find  the process, from the launcher's
    """
    process = start(train_command("deepspeed", 2, overrides), 2)
    wait_for_steps(run_folder(overrides), 2)
    os.kill(find(process.pid), number)
    _, stderr = process.communicate(timeout=within_s)
    return process.returncode, stderr


def launch_goes_on(overrides: dict[str, Any], undisturbed: Path) -> bool:
    """Whether the same launch again ends as if nothing had happened."""
    return launch("deepspeed", 2, overrides).returncode == 0 and same_run(run_folder(overrides), undisturbed)


def find_rank(rank: int, launcher: int) -> int:
    """The process of one rank under a launcher."""
    for process in psutil.Process(launcher).children(recursive=True):
        if (
            "launch/train.py" in process.cmdline()
            and process.environ().get("RANK") == str(rank)
            and not process.children()
        ):
            return process.pid
    raise AssertionError(f"no rank {rank} under process {launcher}")


def find_starter(launcher: int) -> int:
    """The process that DeepSpeed's command puts on each machine, to start the ranks there."""
    children = psutil.Process(launcher).children(recursive=True)
    return next(process.pid for process in children if "deepspeed.launcher.launch" in process.cmdline())


def ends_to_be_started_again(trial: Trial, run: Path, latest: int) -> bool:
    """Whether all ranks end with code 75 within a step, the last one that was logged being saved."""
    codes, steps = trial.wait(), len(read_numbers(run))
    good = codes == [75] * len(codes) and newest(run) == steps <= latest and (run / "requeue").exists()
    print(run.name, codes, newest(run), steps, latest, trial.stderr())
    return good and "Traceback" not in trial.stderr()


def test_t7_signal_to_one(faults: Any, forked: Warm, small_run: dict[str, Any], undisturbed: Path) -> None:
    """TERM, USR2 or Ctrl-C to either rank, once or twice, at any place: both save after the same step and exit with 75.

    Started again, the run ends as if nothing had happened.
    """
    signals = [(TERM,), (USR2,), (INT,), (TERM, TERM), (USR2, TERM), (TERM, INT)]
    cases = [(victim, *place, numbers) for victim, place, numbers in product((0, 1), PLACES.values(), signals)]
    cases += [(0, *WRITING, numbers) for numbers in signals[:3]]
    random.Random(7).shuffle(cases)
    cases = cases[: faults.choose(short=2, long=40)]
    faults.begin("T7 signal to one rank", len(cases))
    passed = 0
    for number, (victim, place, call, latest, numbers) in enumerate(cases):
        overrides = small_run | {"name": f"t7_{number}"}
        run = undisturbed.with_name(overrides["name"])
        trial = forked.start(overrides, wounds=[strike([victim], place, call, *numbers)])
        good = ends_to_be_started_again(trial, run, latest)
        passed += good and goes_on(forked, overrides, undisturbed) and not (run / "requeue").exists()
    faults.end(passed)


def test_t7_signal_to_all(faults: Any, forked: Warm, small_run: dict[str, Any], undisturbed: Path) -> None:
    """TERM, USR2 or Ctrl-C to the whole process group, loader workers too, at a random moment: the same."""
    trials, passed, dice = faults.choose(short=1, long=10), 0, random.Random(3)
    faults.begin("T7 signal to all, loader workers too", trials)
    for number in range(trials):
        overrides = small_run | {"name": f"t7_all_{number}", "data.workers": 2}
        run, after = undisturbed.with_name(overrides["name"]), dice.randrange(1, 5)
        trial = forked.start(overrides)
        wait_for_steps(run, after)
        time.sleep(dice.random() / 10)
        trial.signal((TERM, USR2, INT)[number % 3])
        good = ends_to_be_started_again(trial, run, 8)
        passed += good and goes_on(forked, overrides, undisturbed)
    faults.end(passed)


@pytest.mark.launch
def test_t7_signal_in_a_launch(faults: Any, small_run: dict[str, Any], undisturbed: Path) -> None:
    """The same with two real DeepSpeed ranks: the code 75 is handed on, and so is a TERM to what started the ranks.

    Not one to the command `deepspeed` itself, which dies of it and leaves the ranks running (docs/LAUNCHING.md).
    """
    trials, passed = faults.choose(short=1, long=3), 0
    faults.begin("T7 signal in a DeepSpeed launch", trials)
    for number in range(trials):
        overrides = small_run | {"name": f"t7_launch_{number}"}
        run = undisturbed.with_name(overrides["name"])
        find = (partial(find_rank, 1), partial(find_rank, 0), find_starter)[number]
        code, stderr = strike_launch(overrides, find, (USR2, TERM, TERM)[number], within_s=60)
        steps = len(read_numbers(run))
        good = newest(run) == steps < 8 and (run / "requeue").exists() and "Traceback" not in stderr
        good &= code == 75 or number == 2  # a launcher that is ended itself has a code of its own
        print(code, steps, stderr[-2000:])
        passed += good and launch_goes_on(overrides, undisturbed)
    faults.end(passed)


def test_second_ctrl_c_ends_at_once(forked: Warm, small_run: dict[str, Any]) -> None:
    """A person who presses Ctrl-C twice does not wait for a save: code 130, one line, and the older checkpoint stands."""
    overrides = small_run | {"name": "ctrl_c"}
    trial = forked.start(overrides, wounds=[strike([0, 1], BACKWARD, 6, INT, INT)])
    assert trial.wait() == [130, 130] and "Traceback" not in trial.stderr()
    assert newest(run_folder(overrides)) == 4


def test_busy_ranks_end_with_their_own_code(forked: Warm, small_run: dict[str, Any]) -> None:
    """However much gloo's threads still have to do, a refusal is a sentence and code 2 on each rank, Ctrl-C twice is 130."""
    check = "run.job:check_engine"
    crowd, hurry = ("crowd", {"place": check}), strike([0, 1], check, 1, INT, INT)
    refused = forked.start(small_run | {"engine.global_batch": 3}, wounds=[crowd])
    stopped = forked.start(small_run, wounds=[hurry, crowd])
    assert (refused.wait(), stopped.wait()) == ([2, 2], [130, 130]), refused.stderr() + stopped.stderr()
    for rank in (0, 1):
        assert "global batch of 3 cannot be cut" in refused.stderr(rank) and refused.stderr(rank).count("\n") == 1
        assert "stopped; what was published so far is whole" in stopped.stderr(rank)


def test_a_refusal_is_said_whatever_comes(forked: Warm, small_run: dict[str, Any]) -> None:
    """A launcher's TERM to a rank that is about to say why it ends: the sentence comes out, and the code is 2."""
    refused = forked.start(small_run | {"engine.global_batch": 3}, wounds=[strike([0, 1], "cli:_end", 1, TERM)])
    assert refused.wait() == [2, 2]
    assert all("global batch of 3 cannot be cut" in refused.stderr(rank) for rank in (0, 1))


def test_files_ask_for_a_save_and_for_the_end(forked: Warm, small_run: dict[str, Any], undisturbed: Path) -> None:
    """`save` gives a checkpoint at the next step, `stop` one and the end with code 0; both files are gone then."""
    overrides = small_run | {"name": "asked", "checkpoint.every_steps": 100}
    run = undisturbed.with_name("asked")
    trial = forked.start(overrides)
    wait_for_steps(run, 1)
    (run / "save").touch()
    wait_for(lambda: newest(run) > 0, 30)
    saved = newest(run)
    (run / "stop").touch()
    assert trial.wait() == [0, 0], trial.stderr()
    assert 2 <= saved <= newest(run) == len(read_numbers(run)) < 8
    assert not any((run / name).exists() for name in ("save", "stop", "requeue"))
    assert goes_on(forked, overrides, undisturbed)


def test_what_cannot_be_taken_is_not_asked(tmp_path: Path) -> None:
    """A folder named `save`, or a disk that answers with an error, ends no run."""
    (tmp_path / "save").mkdir()
    with Requests() as requests:
        assert requests.read(tmp_path) == requests.read(tmp_path / "save/gone") == Wishes(0, 0, 0)


def test_what_was_asked_of_an_earlier_start(
    small_run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A `stop` made while the run is loaded is obeyed at its first step; files that an earlier start left are not."""
    run = tmp_path / "again"
    overrides = small_run | {"name": "again", "runs_dir": str(tmp_path), "engine.kind": "plain", "schedule.steps": 3}
    with monkeypatch.context() as loading:
        loading.setattr("toolkit.run.job.make_engine", lambda *them: (run / "stop").touch() or make_engine(*them))
        train_here(overrides | {"checkpoint.every_steps": 100})
    assert [folder.name for folder in list_checkpoints(run)] == ["step_000001"]
    for name in ("save", "stop", "requeue"):
        (run / name).touch()
        os.utime(run / name, (0, 0))
    train_here(overrides | {"checkpoint.every_steps": 100})
    assert [folder.name for folder in list_checkpoints(run)] == ["step_000001", "step_000003"]
    assert not any((run / name).exists() for name in ("save", "stop", "requeue"))


def test_ctrl_c_that_ends_the_reader_too(forked: Warm, small_run: dict[str, Any]) -> None:
    """With `| tee` gone, whatever the run says goes nowhere: it saves and ends with 75 as if it had been read."""
    overrides = small_run | {"name": "unread"}
    trial = forked.start(overrides, wounds=[("lose_reader", {}), strike([0, 1], BACKWARD, 4, INT)])
    assert ends_to_be_started_again(trial, run_folder(overrides), 4)


def test_unknown_main_machine_is_told_in_seconds(forked: Warm, small_run: dict[str, Any]) -> None:
    """A MASTER_ADDR that no name server knows: one sentence on every rank, code 2."""
    trial = forked.start(small_run | {"name": "lost"}, environment={"MASTER_ADDR": "node-7.invalid"})
    assert trial.wait(30) == [2, 2]
    for rank in (0, 1):
        assert "MASTER_ADDR is node-7.invalid, which" in trial.stderr(rank) and trial.stderr(rank).count("\n") == 1
