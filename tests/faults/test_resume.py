"""A run that was killed, or begun on other ranks, goes on exactly; with another recipe or other data it is refused.

T1, T2, T8, T21 and T22; `make faults` runs the long form. Run: pytest tests/faults/test_resume.py
"""

import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.faults.forked import (
    BACKWARD,
    Trial,
    Warm,
    goes_on,
    newest,
    read_scalars,
    read_trace,
    same_run,
    strike,
    wait_for,
    wait_for_steps,
)
from tests.launching import adapter_bytes, kill_when, launch, read_numbers, start, train_command
from toolkit.authoring.pack import pack
from toolkit.authoring.synth import synth


def kill_after(trial: Trial, run: Path, steps: int, delay_s: float) -> None:
    """Kill all ranks some time after a run has logged so many steps."""
    wait_for_steps(run, steps)
    time.sleep(delay_s)
    assert not trial.ended(0), trial.stderr()
    trial.kill()


def test_t1_kill_of_all(faults: Any, forked: Warm, small_run: dict[str, Any], undisturbed: Path) -> None:
    """SIGKILL to every rank at a random moment: the same command again gives the undisturbed run, bit by bit."""
    trials, passed, dice = faults.choose(short=1, long=16), 0, random.Random(20)
    faults.begin("T1 kill of all ranks", trials)
    for trial in range(trials):
        overrides = small_run | {"name": f"t1_{trial}"}
        kill_after(
            forked.start(overrides), undisturbed.with_name(overrides["name"]), dice.randrange(7), dice.random() / 5
        )
        passed += goes_on(forked, overrides, undisturbed)
    faults.end(passed)


@pytest.mark.launch
def test_t1_kill_of_a_launch(faults: Any, small_run: dict[str, Any], undisturbed: Path) -> None:
    """The same with two real DeepSpeed ranks and their launcher, which also compute what forked ones do."""
    trials, passed = faults.choose(short=1, long=4), 0
    faults.begin("T1 kill of a DeepSpeed launch", trials)
    for trial in range(trials):
        overrides = small_run | {"name": f"t1_launch_{trial}"}
        run, steps = undisturbed.with_name(overrides["name"]), 4 + trial % 3
        kill_when(start(train_command("deepspeed", 2, overrides), 2), lambda: len(read_numbers(run)) >= steps)  # noqa: B023
        done = launch("deepspeed", 2, overrides)
        assert done.returncode == 0, done.stderr
        # the newest checkpoint may not have been on disk yet: it is written beside the steps
        resumed = any(f"resuming after step {step}" in done.stdout for step in (steps // 2 * 2, steps // 2 * 2 - 2))
        passed += resumed and same_run(run, undisturbed)
    faults.end(passed)


def test_t2_resumes_within_an_epoch(faults: Any, forked: Warm, small_run: dict[str, Any], undisturbed: Path) -> None:
    """Two and three resumes in one epoch of five steps, and one exactly at its end: nothing skipped, nothing twice."""
    # steps between checkpoints, and the newest of each killed start, which stands in the step after it when it is killed
    cases = [(5, [5]), (1, [1, 2]), (1, [1, 2, 3])][: faults.choose(short=2, long=3)]
    faults.begin("T2 resumes within an epoch", len(cases))
    passed = 0
    for number, (every, steps) in enumerate(cases):
        overrides = small_run | {"name": f"t2_{number}", "checkpoint.every_steps": every}
        run = undisturbed.with_name(overrides["name"])
        for step in steps:
            still = {"victims": [0, 1], "place": BACKWARD, "call": every + 1, "seconds": 60}
            trial = forked.start(overrides, wounds=[("stick", still)])
            wait_for(lambda run=run, step=step: newest(run) == step, 30)  # it is written beside the steps
            trial.kill()
        passed += goes_on(forked, overrides, undisturbed)
    faults.end(passed)


def test_t8_other_ranks(faults: Any, forked: Warm, small_run: dict[str, Any], undisturbed: Path) -> None:
    """Stopped and resumed on another number of ranks in mid-epoch: the same clips in every step, in the same order.

    With two micro-batches a step the losses and the adapter are bit-equal, too (a norm that is summed over other shards may
    differ in its last bit); with four the losses are near.
    """
    cases = [[1, 2, 1], [4, 1, 2], [2, 1, 2], [4, 2, 4], [2, 4, 1]][: faults.choose(short=1, long=5)]
    faults.begin("T8 other numbers of ranks", len(cases))
    passed = 0
    for worlds in cases:
        batch, name = max(2, *worlds), "t8_" + "".join(map(str, worlds))
        overrides = small_run | {"name": name, "engine.global_batch": batch}
        run, whole = undisturbed.with_name(name), undisturbed if batch == 2 else undisturbed.with_name(f"{name}_whole")
        rows: list[Any] = []
        for begun, ranks in enumerate(worlds):
            traced = ("trace", {"path": f"{run}.ids{begun}"})
            end = strike([ranks - 1], BACKWARD, 2 * batch // ranks, signal.SIGTERM)  # in the second step
            if begun < 2:
                trial = forked.start(overrides, ranks, wounds=[traced, end])
                assert trial.wait() == [75] * ranks, trial.stderr()
            else:
                forked.run(overrides, ranks, wounds=[traced])
            rows += read_trace(f"{run}.ids{begun}")
        if whole != undisturbed:
            forked.run(overrides | {"name": whole.name}, wounds=[("trace", {"path": f"{whole}.ids"})])
        losses, wanted = ([loss for (loss,) in read_numbers(folder, "loss")] for folder in (run, whole))
        apart = max(abs(a / b - 1) for a, b in zip(losses, wanted, strict=True))
        print(f"ranks {worlds}: losses differ by up to {apart:.1e}")
        same = losses == wanted and adapter_bytes(run, 8) == adapter_bytes(whole, 8)
        passed += rows == read_trace(f"{whole}.ids") and (same if batch == 2 else apart <= 1e-3)
    faults.end(passed)


def test_t21_log_continuity(faults: Any, forked: Warm, small_run: dict[str, Any], undisturbed: Path) -> None:
    """Killed beyond a checkpoint, and again: log.jsonl and TensorBoard show every step once, in order, with one value."""
    trials, passed = faults.choose(short=1, long=5), 0
    faults.begin("T21 log continuity", trials)
    for trial in range(trials):
        overrides = small_run | {"name": f"t21_{trial}", "checkpoint.every_steps": 3}
        run = undisturbed.with_name(overrides["name"])
        kills = (4 + trial % 2, 7)[: faults.choose(short=1, long=2)]
        for steps in kills:
            kill_after(forked.start(overrides), run, steps, 0)
        forked.run(overrides)
        files = len(list((run / "tb").glob("events*")))  # of each start, and what lists the recipe
        good = files == 1 + len(kills) + 1 and same_run(run, undisturbed)
        for tag, key in {"loss/train": "loss", "optimizer/grad_norm": "grad_norm"}.items():
            points = [(step, pytest.approx(value, rel=1e-6)) for step, value in read_scalars(run, tag)]
            good &= read_numbers(run, "step", key) == points
        passed += good
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
    end = strike([1], BACKWARD, 4, signal.SIGTERM)
    assert forked.start(overrides, wounds=[end]).wait() == [75, 75]
    return overrides


def test_t22_another_recipe(
    faults: Any, forked: Warm, stopped: dict[str, Any], other_shards: Path, undisturbed: Path
) -> None:
    """Another seed, data, global batch or rank is refused by its old and new value; the first three go on when allowed.

    Allowed, a run walks on from the position where it stopped: no clip of another batch size is skipped or repeated.
    """
    cases = {
        "rank": ({"lora.rank": 8}, "lora.rank was 4, is 8", False),
        "batch": ({"engine.global_batch": 4}, "engine.global_batch was 2, is 4", True),
        "seed": ({"seed": 7}, "seed was 0, is 7", True),
        "data": ({"data.shards": str(other_shards)}, "data fingerprint was ", True),
        "lr": ({"optimizer.lr": 0.005}, "optimizer.lr was 0.01, is 0.005", True),
    }
    names = [*cases][: faults.choose(short=2, long=5)]
    faults.begin("T22 another recipe", len(names))
    passed = 0
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
