"""A loss or gradient that is not finite never reaches the weights. Run: pytest tests/faults/test_nonfinite.py

T9; `make faults` runs the long form.
"""

import json
import math
import signal
from pathlib import Path
from typing import Any

import torch

from tests.faults.forked import (
    BACKWARD,
    Warm,
    Wound,
    newest,
    read_scalars,
    read_trace,
    same_run,
    strike,
)
from tests.launching import read_numbers
from toolkit.engine.world import World
from toolkit.run.checkpoint import list_checkpoints, load_checkpoint
from toolkit.run.rows import read_rows
from toolkit.run.skips import Skips

# what is done, what is not finite then, at which position: step 5 trains on positions 8 (rank 0) and 9 (rank 1)
CASES: dict[str, tuple[Wound, str, list[int]]] = {
    "NaN in a clip of rank 1": (("poison_clips", {"positions": [9]}), "loss", [9]),
    "NaN in an element of a gradient of rank 1": (("poison_gradient", {"victims": [1], "call": 5}), "gradient", [8, 9]),
    "an infinite loss with finite gradients": (("overflow_losses", {"positions": [9]}), "loss", [9]),
    "NaN in a clip of rank 0": (("poison_clips", {"positions": [8]}), "loss", [8]),
    "NaN in a clip of each rank": (("poison_clips", {"positions": [8, 9]}), "loss", [8, 9]),
    "NaN in an element of a gradient of rank 0": (("poison_gradient", {"victims": [0], "call": 5}), "gradient", [8, 9]),
}


def test_t9_one_step(faults: Any, forked: Warm, small_run: dict[str, Any], undisturbed: Path) -> None:
    """One broken number on one rank: on all ranks weights and moments stay bit by bit, and it is said whose it was.

    The steps around it change them. The count stands in the log and in TensorBoard.
    """
    names = [*CASES][: faults.choose(short=3, long=6)]
    faults.begin("T9 not finite, one step", len(names))
    keys = [key for _, row in read_trace(f"{undisturbed}.ids") for key in row]
    passed = 0
    for number, name in enumerate(names):
        wound, what, positions = CASES[name]
        run = undisturbed.with_name(f"t9_{number}")
        forked.run(small_run | {"name": run.name}, wounds=[wound, ("keep_states", {"folder": str(run)})])
        still = [[before == after for before, after in read_states(run / f"states.{rank}")] for rank in (0, 1)]
        named = sorted(
            (row["step"], row["not_finite"], key) for row in read_rows(run / "skipped.jsonl") for key in row["clips"]
        )
        counted = [0] * 4 + [1] * 4
        good = still == [[step == 5 for step in range(1, 9)]] * 2
        good &= named == sorted((5, what, keys[k]) for k in positions)
        good &= [row for (row,) in read_numbers(run, "skipped_steps")] == counted
        good &= [value for _, value in read_scalars(run, "optimizer/skipped_steps")] == counted
        good &= all(is_finite(folder) for folder in list_checkpoints(run)) and newest(run) == 8
        good &= read_numbers(run)[:4] == read_numbers(undisturbed)[:4]
        print(name, good, still, named, read_numbers(run))
        passed += good
    faults.end(passed)


def read_states(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def is_finite(checkpoint: Path) -> bool:
    _, tensors = load_checkpoint(checkpoint)
    return all(tensor.isfinite().all() for saved in tensors.values() for tensor in saved.values())


def test_t9_resume_across_a_skip(faults: Any, forked: Warm, small_run: dict[str, Any], undisturbed: Path) -> None:
    """Killed before, at and after a step that is skipped: the resumed run is the one that was not killed, bit by bit."""
    calls = [4, 6, 7] if faults.long else [6]
    faults.begin("T9 resume across a skipped step", len(calls))
    poison, whole = ("poison_clips", {"positions": [9]}), undisturbed.with_name("t9_whole")
    forked.run(small_run | {"name": whole.name}, wounds=[poison])
    passed = 0
    for call in calls:
        overrides = small_run | {"name": f"t9_resume_{call}", "checkpoint.every_steps": 1}
        run = whole.with_name(overrides["name"])
        kill = strike([0, 1], BACKWARD, call, signal.SIGKILL)
        forked.start(overrides, wounds=[poison, kill]).wait()
        step = newest(run)
        trial = forked.run(overrides, wounds=[poison])
        skipped = [[*row.values()] for row in read_rows(run / "skipped.jsonl")]
        passed += step > 0 and f"resuming after step {step}" in trial.stdout() and same_run(run, whole) and skipped == [
            [*row.values()] for row in read_rows(whole / "skipped.jsonl")
        ]  # fmt: skip
    faults.end(passed)


def test_t9_too_many_in_a_row(faults: Any, forked: Warm, small_run: dict[str, Any], undisturbed: Path) -> None:
    """K broken steps in a row end all ranks in one sentence that names the clips; with a good one between, none ends.

    The same command again ends the same way, and what is saved is finite.
    """
    faults.begin("T9 too many in a row", 3)
    keys = [key for _, row in read_trace(f"{undisturbed}.ids") for key in row]
    overrides, run = small_run | {"optimizer.max_skipped_steps": 3}, undisturbed.with_name("t9_abort")
    passed = 0
    for _ in range(2):
        trial = forked.start(overrides | {"name": run.name}, wounds=[("poison_clips", {"positions": [*range(6, 16)]})])
        good = (
            trial.wait() == [2, 2] and newest(run) >= 4 and all(is_finite(folder) for folder in list_checkpoints(run))
        )
        for said in (trial.stderr(0), trial.stderr(1)):
            good &= said.count("step 6: 3 steps in a row were skipped") == 1 and "Traceback" not in said
            good &= any(keys[k] in said for k in range(6, 12))
        print(trial.stderr())
        passed += good
    apart = undisturbed.with_name("t9_apart")
    forked.run(overrides | {"name": apart.name}, wounds=[("poison_clips", {"positions": [4, 6, 12, 14]})])
    passed += read_numbers(apart, "skipped_steps") == [(n,) for n in (0, 0, 1, 2, 2, 2, 3, 4)]
    faults.end(passed)


def test_a_clip_that_is_twice_in_a_step(tmp_path: Path) -> None:
    """It is listed once, whichever of its two losses is not finite."""
    for step, losses in ((1, [math.nan, 1.0]), (2, [1.0, math.nan])):
        own = [([key], torch.tensor([loss])) for key, loss in zip("aa", losses, strict=True)]
        Skips(tmp_path, 9, 0, World(0, 1, torch.device("cpu"))).note(
            step, math.nan, 1.0, [*own, (["b"], torch.ones(1))]
        )
    assert [row["clips"] for row in read_rows(tmp_path / "skipped.jsonl")] == [["a"], ["a"]]
