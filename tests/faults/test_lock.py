"""What dead jobs left behind stops nobody; a live one keeps its folder to itself. Run: pytest tests/faults/test_lock.py

T17; `make faults` runs the long form.
"""

import os
import platform
import secrets
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.forked import BACKWARD, Warm, goes_on, same_run, strike, wait_for_steps


@pytest.fixture(scope="module")
def killed(forked: Warm, small_run: dict[str, Any], undisturbed: Path) -> dict[str, Any]:
    """Overrides of a run that was killed in its fifth step; read only."""
    overrides = small_run | {"name": "t17"}
    forked.start(overrides, wounds=[strike([0, 1], BACKWARD, 5, signal.SIGKILL)]).wait()
    return overrides


def lock_of_another_machine(run: Path, shards: Path) -> None:
    (run / "lock").write_text("process 1 on node-0007\n")


def lock_of_a_live_pid(run: Path, shards: Path) -> None:
    """The process that held it is dead, and its number is another's now."""
    (run / "lock").write_text(f"process {os.getpid()} on {platform.node()}\n")


def half_written_config(run: Path, shards: Path) -> None:
    for name in ("config.yaml.tmp", f"config.yaml.{secrets.token_hex(8)}.tmp"):  # of an older version, and of this
        (run / name).write_text("name: t17\nlora:\n  ra")


def half_written_checkpoint(run: Path, shards: Path) -> None:
    for name in ("step_000099.tmp", "step_000002.old"):
        (run / "checkpoints" / name).mkdir()
        (run / "checkpoints" / name / "optimizer.safetensors").write_bytes(secrets.token_bytes(1000))
    for name in ("LATEST", "BEST", "env.json", "log.jsonl", "skipped.jsonl"):
        (run / f"{name}.{secrets.token_hex(8)}.tmp").write_text("step_")


def half_written_lists(run: Path, shards: Path) -> None:
    for name in ("log.jsonl", "skipped.jsonl", "substituted.jsonl"):
        with (run / name).open("a") as file:
            file.write('{"step": 5, "lo')


def half_written_index(run: Path, shards: Path) -> None:
    """Another process was killed while it made the index, and the index is missing."""
    index = next(shards.glob("train-*.index.json"))
    text = index.read_text()
    index.with_name(f"{index.name}.{secrets.token_hex(8)}.tmp").write_text(text[: len(text) // 2])
    index.unlink()


def shared_memory(run: Path, shards: Path) -> None:
    """What loader workers of a killed run leave in /dev/shm."""
    for number in range(3):
        Path(f"/dev/shm/torch_1_{number}_{run.parent.name}").write_bytes(bytes(4096))


LEFTOVERS = (
    lock_of_another_machine, lock_of_a_live_pid, half_written_config, half_written_checkpoint, half_written_lists,
    half_written_index, shared_memory,
)  # fmt: skip


def test_t17_leftovers(
    faults: Any, forked: Warm, killed: dict[str, Any], tiny_shards: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """Each thing that a dead job can leave, and all of them together: the start succeeds, and the run ends exactly."""
    cases: list[tuple[Callable[[Path, Path], None], ...]] = [(leave,) for leave in LEFTOVERS] if faults.long else []
    cases.append(LEFTOVERS)
    faults.begin("T17 leftovers", len(cases))
    passed = 0
    for number, case in enumerate(cases):
        place = tmp_path / f"t17_{number}"
        run = Path(shutil.copytree(undisturbed.with_name("t17"), place / "t17"))
        shards = Path(shutil.copytree(tiny_shards, place / "shards"))
        for leave in case:
            leave(run, shards)
        overrides = killed | {"runs_dir": str(place), "data.shards": str(shards), "data.workers": 1}
        passed += goes_on(forked, overrides, undisturbed)
        assert not list(run.glob("**/*.tmp")) and not list(run.glob("**/*.old"))
        for litter in Path("/dev/shm").glob(f"torch_1_*_{place.name}"):
            litter.unlink()
    faults.end(passed)


def test_t17_second_job(faults: Any, forked: Warm, small_run: dict[str, Any], undisturbed: Path) -> None:
    """While one job writes, a second is refused by all its ranks and names the first; --fresh does not help it."""
    flags = [(), ("--fresh",), ("--allow_change",)] if faults.long else [("--fresh",)]
    faults.begin("T17 second job", len(flags))
    passed = 0
    for number, extra in enumerate(flags):
        overrides = small_run | {"name": f"t17_two_{number}"}
        run = undisturbed.with_name(overrides["name"])
        first = forked.start(overrides)
        wait_for_steps(run, 2)
        first.signal(signal.SIGSTOP)  # it lives as long as is needed
        second = forked.start(overrides, 2, *extra)
        good = second.wait() == [2, 2] and "Traceback" not in second.stderr()
        good &= f"another job (process {first.pids[0]} on {platform.node()}) is writing to {run}" in second.stderr(0)
        first.signal(signal.SIGCONT)
        good &= first.wait() == [0, 0] and same_run(run, undisturbed)
        print(extra, good, second.stderr())
        passed += good
    faults.end(passed)


def test_t17_stuck_loader_worker(faults: Any, forked: Warm, small_run: dict[str, Any], undisturbed: Path) -> None:
    """The main rank is killed while a worker of it is stuck in a read: the other rank ends, and the folder is free."""
    faults.begin("T17 stuck loader worker of a killed rank", 1)
    overrides = small_run | {"name": "t17_orphan", "data.workers": 1}
    run = undisturbed.with_name(overrides["name"])
    stuck = ("stick", {"victims": [0], "place": "data.loader:load_clip", "call": 4, "seconds": 60})
    trial = forked.start(overrides, wounds=[stuck])
    wait_for_steps(run, 3)
    trial.signal(signal.SIGKILL, 0)
    ended = trial.wait(30) == [-signal.SIGKILL, 2]
    faults.end(ended and goes_on(forked, overrides, undisturbed))
