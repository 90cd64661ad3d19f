"""Killed at any moment of a save, any bit flipped, a full or failing disk. Run: pytest tests/faults/test_checkpoints.py

A save runs in a forked child. Python's audit hooks report every file it opens, renames, makes and deletes, and os.fsync is
wrapped: these are the points at which the child is killed, or told that the disk failed. What safetensors writes is cut by
a limit on the size of a file.
"""

import contextlib
import errno
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests import launching
from tests.checkpoints import KEEP_ALL, is_whole, names, save, submission
from tests.faults.conftest import Faults
from toolkit.config import CheckpointConfig
from toolkit.errors import UserError
from toolkit.run.checkpoint import list_checkpoints, newest_good
from toolkit.run.manifest import find_fault
from toolkit.run.writer import CheckpointWriter

KEEP_TWO = CheckpointConfig(keep=2)
EVENTS = ("open", "os.listdir", "os.scandir", "os.mkdir", "os.rename", "os.remove", "os.rmdir")
ERRORS = (errno.EIO, errno.EDQUOT)
DISK_BYTES = 8 << 20
EACH_STEP = {"checkpoint.every_steps": 1, "engine.kind": "plain", "engine.micro_batch": 4}


def at_each_point(act: Callable[[str], None]) -> None:
    """Call `act` before each file-system call on a run, from now on; for a child, since hooks cannot be taken out."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in EVENTS and (event == "os.remove" or "/run/" in f"{arguments[0]}/"):
            act(f"{event} {Path(str(arguments[0])).name}")

    sync = os.fsync

    def fsync(descriptor: int) -> None:
        act(f"fsync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        sync(descriptor)

    os.fsync = fsync
    sys.addaudithook(hook)


def in_child(work: Callable[[], object]) -> int:
    """Do it in a forked process; returns its exit code, negative for a signal, 99 for an exception."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            work()
            code = 0
        except BaseException as error:
            os.write(2, f"{error!r}\n".encode())
        finally:
            os._exit(code)  # a child that unwound would go on as a second pytest
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def make_run(folder: Path, damaged: bool = False) -> Path:
    """A run with the checkpoints of steps 1, 2 and 3, the last of them damaged or not."""
    run, template = folder / "run", folder / "template/run"
    if not template.exists():
        for step in (1, 2, 3):
            save(template, step)
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(template, run)
    if damaged:
        (run / "checkpoints/step_000003/state.json").write_text("{}")
    return run


def list_points(run: Path, work: Callable[[Path], object]) -> list[str]:
    """Name every point of a piece of work, by doing it once."""
    report = run.parent / "points"

    def record() -> None:
        points: list[str] = []
        at_each_point(points.append)
        work(run)
        report.write_text("\n".join(points))

    assert in_child(record) == 0
    return report.read_text().splitlines()


@dataclass(frozen=True)
class Case:
    """A save, the newest whole step before it, and the step it saves."""

    name: str
    before: int
    step: int
    work: Callable[[Path], object]


CASES = (
    Case("plain", 3, 4, lambda run: save(run, 4)),
    Case("pruning", 3, 4, lambda run: save(run, 4, KEEP_TWO, score=0.5)),
    Case("in place of a damaged one", 2, 3, lambda run: save(run, 3)),
)


@dataclass(frozen=True)
class Kill:
    """Before the point of a number, or, where it is negative, amid a file that grows beyond so many bytes."""

    case: Case
    place: int
    code: int
    newest: int


def list_kills(folder: Path) -> list[Kill]:
    kills = []
    for case in CASES:
        points = list_points(make_run(folder, case.before < 3), case.work)
        published = points.index(f"os.rename step_{case.step:06d}.tmp")
        for i in range(len(points)):
            kills.append(Kill(case, i, -signal.SIGKILL, case.step if i > published else case.before))
        for size_bytes in (1, 500, 1_500, 3_000, 6_000, 9_000, 15_000, 20_000):
            kills.append(Kill(case, -size_bytes, -signal.SIGXFSZ, case.before))
    return kills


def die_at(place: int, work: Callable[[], object]) -> None:
    """Do it up to the point of this number; if negative, until a file grows beyond so many bytes."""
    passed: list[str] = []

    def act(point: str) -> None:
        if len(passed) == place:
            os.kill(os.getpid(), signal.SIGKILL)
        passed.append(point)

    if place >= 0:
        at_each_point(act)
    else:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (-place, -place))
    work()


def recovers(run: Path, newest: int) -> bool:
    """The newest whole checkpoint is found, no other is listed, what is left over is cleared, and the next save works."""
    good = newest_good(run, set_aside=True)
    if good is None or good.name != f"step_{newest:06d}" or not is_whole(good):
        return False
    CheckpointWriter(run, KEEP_ALL).close()
    present = {p.name for p in (run / "checkpoints").iterdir() if p.suffix != ".bad"}
    return present == set(names(run)) and all(map(is_whole, list_checkpoints(run))) and is_whole(save(run, 6))


def test_a_save_killed_at_any_point(tmp_path: Path, faults: Faults) -> None:
    """SIGKILL before each file-system call of a save, and amid each file: the newest whole checkpoint is taken, always."""
    kills = list_kills(tmp_path)[:: faults.choose(short=5, long=1)]
    faults.begin("T4 torn checkpoint", len(kills))
    failed = []
    for kill in kills:
        run = make_run(tmp_path, kill.case.before < 3)
        code = in_child(lambda run=run, kill=kill: die_at(kill.place, lambda: kill.case.work(run)))
        if code != kill.code or not recovers(run, kill.newest):
            failed.append((kill, code))
    faults.end(len(kills) - len(failed), failed)


def test_everything_is_synced_before_it_is_named(tmp_path: Path) -> None:
    """What a power cut loses no test sees, but the order it is safe by: each file, the folder, the new name, its folder."""
    run = make_run(tmp_path)
    points = list_points(run, lambda run: save(run, 4))
    rename = points.index("os.rename step_000004.tmp")
    files = {p.name for p in (run / "checkpoints/step_000004").iterdir()}
    assert {f"fsync {name}" for name in (*files, "step_000004.tmp")} <= set(points[:rename])
    assert "fsync checkpoints" in points[rename:] and len(files) == 5
    pointer = next(i for i, point in enumerate(points) if re.fullmatch(r"os.rename LATEST\.\w+\.tmp", point))
    assert points[pointer].replace("os.rename", "fsync") in points[rename:pointer] and "fsync run" in points[pointer:]


def test_any_flipped_bit_is_noticed(tmp_path: Path, faults: Faults, capsys: pytest.CaptureFixture[str]) -> None:
    """One bit of any file, the manifest among them: the checkpoint is damaged, and the one before it is taken."""
    trials = faults.choose(short=200, long=1000)
    faults.begin("T5 bit flips in a checkpoint", trials)
    older, newest = (save(tmp_path, step) for step in (1, 2))
    files, draw = sorted(newest.iterdir()), random.Random(5)
    noticed = 0
    for trial in range(trials):
        file = files[trial % len(files)]
        whole = file.read_bytes()
        flipped = bytearray(whole)
        flipped[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        file.write_bytes(flipped)
        noticed += newest_good(tmp_path, set_aside=False) == older
        file.write_bytes(whole)
    assert is_whole(newest) and len(files) == 5
    assert capsys.readouterr().err.count("step_000002 is damaged") == noticed
    faults.end(noticed)


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of 8 MB, or where this user may mount none, a skip."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk here: {mounted.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def list_failures(folder: Path) -> list[tuple[int, int]]:
    """A point of a save by the writer, and the error to meet there."""
    points = list_points(make_run(folder), lambda run: write_one(run, 4))  # the first is the writer's own, at its start
    return [(place, error) for place in range(1, len(points)) for error in ERRORS]


def write_one(run: Path, step: int) -> None:
    with contextlib.closing(CheckpointWriter(run, KEEP_TWO)) as writer:
        writer.submit(*submission(step, 0.5))
        writer.wait()


def fail_at(run: Path, place: int, error: int) -> None:
    """A disk fails once: the checkpoint is saved or missed with a word, what is listed is whole, the next is saved."""
    passed: list[str] = []

    def act(point: str) -> None:
        passed.append(point)
        if len(passed) == place + 1:
            raise OSError(error, os.strerror(error))

    at_each_point(act)
    try:
        write_one(run, 4)
        assert names(run)[-1] == "step_000004"
    except UserError as refusal:
        assert os.strerror(error) in str(refusal) and "\n" not in str(refusal)
    assert len(passed) > place and all(map(is_whole, list_checkpoints(run))) and len(names(run)) >= 2
    write_one(run, 5)
    assert names(run)[-1] == "step_000005" and is_whole(list_checkpoints(run)[-1])


def test_a_disk_that_fails_at_any_point(tmp_path: Path, faults: Faults) -> None:
    """EIO or EDQUOT from each file-system call of a save: at worst that checkpoint is missed."""
    failures = list_failures(tmp_path)[:: faults.choose(short=5, long=1)]
    faults.begin("T6 disk failing", len(failures))
    failed = []
    for place, error in failures:
        run = make_run(tmp_path)
        if in_child(lambda run=run, place=place, error=error: fail_at(run, place, error)):
            failed.append((place, error))
    faults.end(len(failures) - len(failed), failed)


def fill(disk: Path, left_bytes: int) -> Path:
    """Take the space of a disk but for so much; returns the file that takes it."""
    ballast = disk / "ballast"
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk).free - left_bytes)
    return ballast


def test_a_disk_that_is_full_at_any_point(
    tmp_path: Path, faults: Faults, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Space that another program takes meanwhile: the checkpoint is missed with one line, and saved once there is space."""
    pages = range(0, 100, faults.choose(short=10, long=1))
    faults.begin("T6 disk full", len(pages))
    with small_disk(tmp_path / "disk") as disk:
        run = make_run(disk)
        needed_bytes = sum(p.stat().st_blocks * 512 for p in (run / "checkpoints/step_000003").iterdir())
        usage, passed = shutil.disk_usage(disk), 0
        for page in pages:
            ballast = fill(disk, page * 1024)
            with monkeypatch.context() as patch:
                patch.setattr(shutil, "disk_usage", lambda place: usage)  # as it was when it was asked
                try:
                    write_one(run, 4)
                    told = page * 1024 >= needed_bytes and capsys.readouterr().err == ""
                except UserError:
                    told = re.fullmatch(
                        r"saving the checkpoint of step 4 failed: .*No space left.*\n", capsys.readouterr().err
                    )
            whole = {p.name for p in (run / "checkpoints").iterdir()} == {
                p.name for p in list_checkpoints(run) if is_whole(p)
            }
            ballast.unlink()
            write_one(run, 4)
            passed += bool(told) and whole and names(run)[-1] == "step_000004"
            make_run(disk)
    assert needed_bytes > 50_000
    faults.end(passed)


def end_of_run(overrides: dict[str, Any], *limit: str) -> tuple[int, str]:
    """Exit code and stderr of a training of ten steps that saves at each."""
    done = launching.run([*limit, *launching.train_command("python", 1, overrides | EACH_STEP)])
    return done.returncode, done.stderr


@pytest.mark.launch
def test_a_run_whose_disk_fills_up(tiny_run: dict[str, Any], tmp_path: Path, faults: Faults) -> None:
    """It takes every step, and ends with code 2 and one sentence as its last save failed; given space, it finishes."""
    faults.begin("T6 run on a full disk", 2)
    with small_disk(tmp_path / "disk") as disk:
        overrides = tiny_run | {"runs_dir": str(disk), "name": "full", "lora.rank": 6}
        code, stderr = end_of_run(overrides)
        folder = disk / "full"
        saved = len(names(folder))
        told = re.findall(
            r"saving the checkpoint of step (\d+) failed: .*, which has .* MiB free; free some space", stderr
        )
        assert code == 2 and "Traceback" not in stderr and 2 <= saved < 10
        assert [int(step) for step in told] == [*range(saved + 1, 11), 10] and len(launching.read_numbers(folder)) == 10
        assert all(find_fault(checkpoint) is None for checkpoint in list_checkpoints(folder))
        subprocess.run(["mount", "-o", f"remount,size={2 * DISK_BYTES}", str(disk)], check=True)
        launching.train_here(overrides | EACH_STEP)
        assert len(names(folder)) == 10
    faults.end(2)


@pytest.mark.launch
def test_a_run_that_can_save_nothing(tiny_run: dict[str, Any], tmp_path: Path, faults: Faults) -> None:
    """No file may grow beyond 200 kB: code 2, a sentence per save, and no folder that looks like a checkpoint."""
    if not faults.long and os.geteuid() == 0:
        pytest.skip("the full disk above says more; --long, or a user who may mount none, runs this one too")
    faults.begin("T6 run that can save nothing", 1)
    code, stderr = end_of_run(tiny_run | {"runs_dir": str(tmp_path), "name": "full"}, "prlimit", "--fsize=200000")
    assert code == 2 and "Traceback" not in stderr and stderr.count("File too large") == 11, stderr
    assert "there is none before it" in stderr and not list((tmp_path / "full/checkpoints").iterdir())
    faults.end(1)
