"""Trainings on ranks forked from one warm process that has done the imports: a trial takes seconds, a launch half a minute.

Run by the fixture `forked`. Each rank runs launch/train.py's own main in its own process, as a launcher would start it: what
it exits with and says is the product's. Only the launcher is missing, so nothing ends the others when one rank dies.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
Wound = tuple[str, dict[str, Any]]  # the name of a function in wounds.py, its arguments


BACKWARD = "engine.zero:ZeroEngine.backward"  # called once a micro-batch


def strike(victims: list[int], place: str, call: int, *numbers: int) -> Wound:
    """Signals that the ranks among the victims send to themselves at one call of a function."""
    return "send", {"victims": victims, "place": place, "call": call, "numbers": numbers}


class Trial:
    """One training under way: its ranks are in a process group of their own, with all that they start."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        wait_for((folder / "pids.json").exists, 60)
        self.group, *self.pids = json.loads((folder / "pids.json").read_text())

    def wait(self, timeout_s: float = 90) -> list[int]:
        """Exit codes of the ranks, minus the signal's number for one that was killed."""
        try:
            wait_for(lambda: all(map(self.ended, range(len(self.pids)))), timeout_s)
        except AssertionError:
            self.kill()
            raise AssertionError(f"still running after {timeout_s} s: {self.stderr()}") from None
        return [json.loads((self.folder / f"code.{rank}").read_text()) for rank in range(len(self.pids))]

    def ended(self, rank: int) -> bool:
        return (self.folder / f"code.{rank}").exists()

    def signal(self, number: int, rank: int | None = None) -> None:
        """Send a signal to one rank, or to the whole group."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pids[rank], number) if rank is not None else os.killpg(self.group, number)

    def kill(self) -> None:
        """SIGKILL all of it at once, as a power cut does."""
        family = [psutil.Process(pid) for pid in (self.group, *self.pids) if psutil.pid_exists(pid)]
        self.signal(signal.SIGKILL)
        psutil.wait_procs(family, timeout=20)

    def stdout(self, rank: int = 0) -> str:
        return (self.folder / f"stdout.{rank}").read_text()

    def stderr(self, rank: int | None = None) -> str:
        ranks = range(len(self.pids)) if rank is None else [rank]
        return "".join((self.folder / f"stderr.{r}").read_text() for r in ranks)


class Warm:
    """The warm process, as tests see it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.trials = folder, 0
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.forked"], cwd=ROOT, stdin=subprocess.PIPE, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        )  # fmt: skip

    def start(
        self, overrides: Mapping[str, Any], ranks: int = 2, *flags: str,
        wounds: Sequence[Wound] = (), environment: Mapping[str, str] | None = None,
    ) -> Trial:  # fmt: skip
        """Start the tiny recipe; wounds are done to each rank before it begins."""
        from tests.launching import RECIPE, free_port

        folder = self.folder / f"trial_{self.trials}"
        folder.mkdir()
        self.trials += 1
        asked = {
            "folder": str(folder), "ranks": ranks, "wounds": wounds,
            "argv": ["--config", str(RECIPE), *(f"--{name}={value}" for name, value in overrides.items()), *flags],
            "environment": {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())} | dict(environment or {}),
        }  # fmt: skip
        assert self.process.stdin is not None
        print(json.dumps(asked), file=self.process.stdin, flush=True)
        return Trial(folder)

    def run(self, overrides: Mapping[str, Any], ranks: int = 2, *flags: str, **more: Any) -> Trial:
        """Train to the end, which must be a good one."""
        trial = self.start(overrides, ranks, *flags, **more)
        codes = trial.wait()
        assert codes == [0] * ranks, (codes, trial.stderr())
        return trial

    def close(self) -> None:
        self.process.communicate()


def same_run(run: Path, other: Path) -> bool:
    """Whether two run folders hold the same steps, each once and in order, and the same last checkpoint, bit for bit."""
    from tests.launching import adapter_bytes, read_numbers
    from toolkit.run.checkpoint import checkpoint_step, list_checkpoints

    numbers = read_numbers(run)
    steps, last = [step for step, *_ in numbers], checkpoint_step(list_checkpoints(other)[-1])
    optimizer = f"checkpoints/step_{last:06d}/optimizer.safetensors"
    return (
        steps == list(range(1, len(steps) + 1))
        and numbers == read_numbers(other)
        and adapter_bytes(run, last) == adapter_bytes(other, last)
        and (run / optimizer).read_bytes() == (other / optimizer).read_bytes()
    )


def read_trace(path: str | Path) -> list[tuple[list[int], list[str]]]:
    """What the ranks that were traced to a path trained on: positions and keys of every micro-batch, in the run's order."""
    path = Path(path)
    rows = [json.loads(line) for file in path.parent.glob(f"{path.name}.*") for line in file.read_text().splitlines()]
    return sorted((positions, keys) for positions, keys in rows)


def goes_on(forked: Warm, overrides: Mapping[str, Any], undisturbed: Path, ranks: int = 2) -> bool:
    """Start a run again; whether it goes on after its newest checkpoint, to the undisturbed run's end on the same clips."""
    run = run_folder(overrides)
    step, ids = newest(run), f"{run}.ids{time.monotonic_ns()}"
    trial = forked.run(overrides, ranks, wounds=[("trace", {"path": ids})])
    told = f"resuming after step {step}" in trial.stdout() if step else "resuming" not in trial.stdout()
    return told and same_run(run, undisturbed) and read_trace(ids) == read_trace(f"{undisturbed}.ids")[2 * step :]


def run_folder(overrides: Mapping[str, Any]) -> Path:
    return Path(overrides["runs_dir"]) / overrides["name"]


def newest(run: Path) -> int:
    """The step of the newest checkpoint, 0 where there is none."""
    from toolkit.run.checkpoint import checkpoint_step, list_checkpoints

    return max(map(checkpoint_step, list_checkpoints(run)), default=0)


def read_scalars(run: Path, tag: str) -> list[tuple[int, float]]:
    """The points that TensorBoard shows: step, value."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run / "tb"), size_guidance={"scalars": 0}).Reload()
    return [(event.step, event.value) for event in board.Scalars(tag)]


def wait_for_steps(run: Path, steps: int) -> None:
    """Return when a run has logged so many."""
    from toolkit.run.rows import read_rows

    wait_for(lambda: len(read_rows(run / "log.jsonl")) >= steps, 120)


def wait_for(ready: Callable[[], bool], timeout_s: float) -> None:
    until_s = time.monotonic() + timeout_s
    while not ready():
        assert time.monotonic() < until_s, f"not within {timeout_s} s"
        time.sleep(0.01)


def serve() -> tuple[int, dict[str, Any]]:
    """Fork the ranks that are asked for, line by line; returns in a rank alone, with its number and what was asked."""
    signal.signal(signal.SIGCHLD, lambda *_: os.waitpid(-1, os.WNOHANG))
    for line in sys.stdin:
        asked = json.loads(line)
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            rank = start_ranks(asked)
            if rank is not None:
                return rank, asked
            os._exit(0)
    sys.exit()


def start_ranks(asked: dict[str, Any]) -> int | None:
    """Fork the ranks and write down their exit codes; returns a rank's number in the rank, None in the parent of all."""
    os.setsid()
    folder, pids = Path(asked["folder"]), []
    for rank in range(asked["ranks"]):
        pid = os.fork()
        if pid == 0:
            return rank
        pids.append(pid)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):  # sent to the group, they are meant for the ranks
        signal.signal(number, signal.SIG_IGN)
    publish(folder / "pids.json", [os.getpid(), *pids])
    for _ in pids:
        pid, status = os.wait()
        publish(folder / f"code.{pids.index(pid)}", os.waitstatus_to_exitcode(status))
    return None


def publish(path: Path, value: Any) -> None:
    aside = path.with_name(f"{path.name}.tmp")
    aside.write_text(json.dumps(value))
    os.replace(aside, path)


def become(rank: int, asked: dict[str, Any]) -> None:
    """Take on what a launcher gives a rank."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        path = Path(asked["folder"]) / f"{name}.{rank}" if descriptor else "/dev/null"
        source = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(source, descriptor)
        os.close(source)
    os.environ |= asked["environment"] | {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(asked["ranks"]),
    }  # fmt: skip
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: asked["ranks"]])
    sys.argv = ["launch/train.py", *asked["argv"]]


def main() -> None:
    import av  # noqa: F401
    import deepspeed.runtime.zero.muon.original_muon as _  # noqa: F401  # it brings the most, and only when an engine is made
    import torch.utils.tensorboard  # noqa: F401
    from diffusers import AutoencoderKLTemporalDecoder, EulerDiscreteScheduler, UNetSpatioTemporalConditionModel  # noqa: F401
    from transformers import CLIPVisionModelWithProjection  # noqa: F401

    import toolkit.run.trainer  # noqa: F401
    from launch.train import train
    from tests.faults import wounds
    from toolkit.cli import main as run

    rank, asked = serve()
    become(rank, asked)
    for name, arguments in asked["wounds"]:
        getattr(wounds, name)(rank, **arguments)
    run(train)


if __name__ == "__main__":
    main()
