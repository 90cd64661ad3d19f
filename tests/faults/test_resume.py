"""A run that was killed, or begun on other ranks, goes on exactly; with another recipe or other data it is refused.

T1, T2, T8, T21 and T22; `make faults` runs the long form. Run: pytest tests/faults/test_resume.py
"""

import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.faults.forked import Trial, Warm, read_trace, same_run, wait_for
from tests.launching import kill_when, launch, read_numbers, start, train_command
from toolkit.data.pack import pack
from toolkit.data.synth import synth
from toolkit.run.checkpoint import checkpoint_step, list_checkpoints

KILL = [signal.SIGKILL]


def newest(run: Path) -> int:
    """The step of the newest checkpoint, 0 where there is none."""
    return max(map(checkpoint_step, list_checkpoints(run)), default=0)


def kill_after(trial: Trial, run: Path, steps: int, delay_s: float) -> None:
    """Kill all ranks some time after a run has logged so many steps."""
    wait_for(lambda: len(read_numbers(run)) >= steps or not trial.alive(), 90)
    time.sleep(delay_s)
    assert trial.alive(), trial.stderr()
    trial.kill()


def goes_on(forked: Warm, overrides: dict[str, Any], undisturbed: Path, ranks: int = 2) -> bool:
    """Start a run again; whether it goes on after its newest checkpoint, to the undisturbed run's end on the same clips."""
    run = Path(overrides["runs_dir"]) / overrides["name"]
    step, ids = newest(run), f"{run}.ids{time.monotonic_ns()}"
    trial = forked.run(overrides, ranks, wounds=[("trace", {"path": ids})])
    told = f"resuming after step {step}" in trial.stdout() if step else "resuming" not in trial.stdout()
    return told and same_run(run, undisturbed) and read_trace(ids) == read_trace(f"{undisturbed}.ids")[2 * step :]


def test_t1_kill_of_all(faults: Any, forked: Warm, small_run: dict[str, Any], undisturbed: Path) -> None:
    """SIGKILL to every rank at a random moment: the same command again gives the undisturbed run, bit by bit."""
    trials, passed, dice = faults.choose(short=2, long=16), 0, random.Random(1)
    faults.begin("T1 kill of all ranks", trials)
    for trial in range(trials):
        overrides = small_run | {"name": f"t1_{trial}"}
        kill_after(forked.start(overrides), undisturbed.with_name(overrides["name"]), dice.randrange(7), dice.random() / 5)
        passed += goes_on(forked, overrides, undisturbed)
    faults.end(passed)


@pytest.mark.launch
def test_t1_kill_of_a_launch(faults: Any, small_run: dict[str, Any], undisturbed: Path) -> None:
    """The same with two real DeepSpeed ranks and their launcher, which also compute what forked ones do."""
    trials, passed = faults.choose(short=1, long=4), 0
    faults.begin("T1 kill of a DeepSpeed launch", trials)
    for trial in range(trials):
        overrides = small_run | {"name": f"t1_launch_{trial}"}
        run, steps = undisturbed.with_name(overrides["name"]), 3 + trial
        kill_when(start(train_command("deepspeed", 2, overrides), 2), lambda: len(read_numbers(run)) >= steps)  # noqa: B023
        done = launch("deepspeed", 2, overrides)
        assert done.returncode == 0, done.stderr
        passed += f"resuming after step {steps // 2 * 2}" in done.stdout and same_run(run, undisturbed)
    faults.end(passed)


def test_t2_resumes_within_an_epoch(faults: Any, forked: Warm, small_run: dict[str, Any], undisturbed: Path) -> None:
    """Two and three resumes in one epoch of five steps, and one exactly at its end: nothing skipped, nothing twice."""
    cases = [(1, [2, 2]), (1, [2, 2, 2]), (5, [7])][slice(None) if faults.long else slice(1, None)]
    faults.begin("T2 resumes within an epoch", len(cases))
    passed = 0
    for number, (every, calls) in enumerate(cases):
        overrides = small_run | {"name": f"t2_{number}", "checkpoint.every_steps": every}
        run, before = undisturbed.with_name(overrides["name"]), [0]
        for call in calls:
            wound = ("send", {"victims": [0, 1], "place": "engine.zero:ZeroEngine.backward", "call": call, "numbers": KILL})
            assert forked.start(overrides, wounds=[wound]).wait() == [-signal.SIGKILL] * 2
            before.append(newest(run))
        exact = before == [0, 5] if every == 5 else before[-1] < 5
        passed += exact and goes_on(forked, overrides, undisturbed)
    faults.end(passed)


def test_t8_other_ranks(faults: Any, forked: Warm, small_run: dict[str, Any], undisturbed: Path) -> None:
    """Stopped and resumed on another number of ranks in mid-epoch: the same clips in every step, in the same order.

    With two micro-batches a step also the same bits; with four the gradients' sum in another order is near.
    """
    worlds = [[1, 2, 1], [4, 1, 2]] + [[2, 1, 2], [4, 2, 4]] * faults.long
    faults.begin("T8 other numbers of ranks", len(worlds))
    passed = 0
    for world in worlds:
        name = "t8_" + "".join(map(str, world))
        batch = max(2, *world)
        overrides = small_run | {"name": name, "engine.global_batch": batch, "checkpoint.every_steps": 1}
        run = undisturbed.with_name(name)
        rows: list[Any] = []
        for number, ranks in enumerate(world):
            if number < 2:  # ends of itself at a step edge
                wound = ("send", {"victims": [ranks - 1], "place": "engine.zero:ZeroEngine.backward",
                                  "call": 2 * batch // ranks, "numbers": [signal.SIGTERM]})  # fmt: skip
                trial = forked.start(overrides, ranks, wounds=[wound, ("trace", {"path": f"{run}.ids{number}"})])
                assert trial.wait() == [75] * ranks, trial.stderr()
            else:
                forked.run(overrides, ranks, wounds=[("trace", {"path": f"{run}.ids{number}"})])
            rows += read_trace(f"{run}.ids{number}")
        if batch == 2:
            passed += same_run(run, undisturbed) and rows == read_trace(f"{undisturbed}.ids")
            continue
        whole = undisturbed.with_name(f"{name}_whole")
        forked.run(overrides | {"name": whole.name}, 2, wounds=[("trace", {"path": f"{whole}.ids"})])
        losses, wanted = ([loss for (loss,) in read_numbers(folder, "loss")] for folder in (run, whole))
        apart = max(abs(a / b - 1) for a, b in zip(losses, wanted, strict=True))
        print(f"ranks {world}: losses differ by up to {apart:.1e} of 2 ranks'")
        passed += apart <= 1e-3 and rows == read_trace(f"{whole}.ids")
    faults.end(passed)


def test_t21_log_continuity(faults: Any, forked: Warm, small_run: dict[str, Any], undisturbed: Path) -> None:
    """Killed twice beyond a checkpoint: log.jsonl and TensorBoard show every step once, in order, with one value."""
    trials, passed = faults.choose(short=1, long=5), 0
    faults.begin("T21 log continuity", trials)
    for trial in range(trials):
        overrides = small_run | {"name": f"t21_{trial}", "checkpoint.every_steps": 3}
        run = undisturbed.with_name(overrides["name"])
        for steps in (4 + trial % 2, 7):
            kill_after(forked.start(overrides), run, steps, 0)
        forked.run(overrides)
        board = EventAccumulator(str(run / "tb"), size_guidance={"scalars": 0}).Reload()
        passed += len(list((run / "tb").iterdir())) == 3 and same_run(run, undisturbed)
        for tag, key in {"loss/train": "loss", "optimizer/grad_norm": "grad_norm"}.items():
            points = [(event.step, pytest.approx(event.value, rel=1e-6)) for event in board.Scalars(tag)]
            passed -= read_numbers(run, "step", key) != points
    faults.end(passed)


@pytest.fixture(scope="module")
def other_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("other")
    synth(folder / "videos", clips=14, seconds=0.5, size=32, seed=2)
    pack(folder / "videos", folder / "shards")
    return folder / "shards"


@pytest.fixture(scope="module")
def stopped(forked: Warm, small_run: dict[str, Any], undisturbed: Path) -> dict[str, Any]:
    """Overrides of a run that was asked to end at step 4; read only."""
    overrides = small_run | {"name": "t22"}
    wound = ("send", {"victims": [1], "place": "engine.zero:ZeroEngine.backward", "call": 4, "numbers": [signal.SIGTERM]})
    assert forked.start(overrides, wounds=[wound]).wait() == [75, 75]
    return overrides


def test_t22_another_recipe(
    faults: Any, forked: Warm, stopped: dict[str, Any], other_shards: Path, undisturbed: Path
) -> None:
    """Another seed, data, global batch or rank is refused by its old and new value; the first three go on when allowed.

    Allowed, a run walks on from the position where it stopped: no clip of another batch size is skipped or repeated.
    """
    cases = {
        "seed": ({"seed": 7}, "seed was 0, is 7", True),
        "data": ({"data.shards": str(other_shards)}, "data fingerprint was ", True),
        "batch": ({"engine.global_batch": 4}, "engine.global_batch was 2, is 4", True),
        "lr": ({"optimizer.lr": 0.005}, "optimizer.lr was 0.01, is 0.005", True),
        "rank": ({"lora.rank": 8}, "lora.rank was 4, is 8", False),
    }
    names = [*cases] if faults.long else ["data", "batch", "rank"]
    faults.begin("T22 another recipe", len(names))
    passed = 0
    import shutil

    for name in names:
        changes, message, allowed = cases[name]
        run = undisturbed.with_name("t22_" + name) / "t22"
        shutil.copytree(undisturbed.with_name("t22"), run)
        overrides = stopped | changes | {"runs_dir": str(run.parent)}
        log = (run / "log.jsonl").read_bytes()
        refused = forked.start(overrides)
        good = refused.wait() == [2, 2] and message in refused.stderr(0) and "--allow_change" in refused.stderr(0)
        good &= (run / "log.jsonl").read_bytes() == log and "Traceback" not in refused.stderr()
        after = forked.start(overrides, 2, "--allow_change", wounds=[("trace", {"path": f"{run}.ids"})])
        if allowed:
            positions = [k for row, _ in read_trace(f"{run}.ids") for k in row] if after.wait() == [0, 0] else []
            good &= positions == list(range(8, 8 + 4 * (4 if name == "batch" else 2)))
            good &= [step for (step,) in read_numbers(run, "step")] == list(range(1, 9))
        else:
            good &= after.wait() == [2, 2] and message in after.stderr(0)
        print(name, good, refused.stderr(), after.stderr())
        passed += good
    faults.end(passed)
