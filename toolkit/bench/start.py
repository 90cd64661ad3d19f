"""Times what a user waits for before anything happens, in fresh processes, beside importing the libraries alone.

Test: pytest tests/bench/test_start.py
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from pydantic import PositiveInt

from toolkit.authoring.pack import pack
from toolkit.authoring.synth import synth
from toolkit.errors import UserError
from toolkit.model.tiny import make_tiny_base

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = "import torch, deepspeed; from diffusers import UNetSpatioTemporalConditionModel"
HELP = ("train", "doctor", "interpolate")
DOCTOR_RECIPE, STEP_RECIPE = "launch/recipes/sign_576.yaml", "launch/recipes/tiny_cpu.yaml"
ENGINES = ("zero2", "plain")
IMPORTS = "imports"


class Start(NamedTuple):
    """A command, and how the line begins at which the wait is over; without one, at its end."""

    command: list[str]
    until: str | None = None


def bench_start(rounds: PositiveInt = 5) -> dict[str, Any]:
    """Start each command in turns, `rounds` times.

    returns  {rounds, threads, starts: {command: {s, ratio, cpu_s, cpu_ratio}}}: medians of the seconds from the start to its
             end, or to the first step's line, and of the processor's seconds until then, which other programs disturb less;
             ratios to importing torch, diffusers' UNet and DeepSpeed alone. What is `new` finds nothing kept by an earlier
             start, what is `again` does; help is that of --help
    raises   UserError for a command that fails
    """
    times: dict[str, list[tuple[float, float]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        with contextlib.redirect_stdout(sys.stderr):
            synth(folder / "videos", clips=12, seconds=1, size=96)
            pack(folder / "videos", folder / "shards", jobs=1)
            make_tiny_base(folder / "base", seed=0)
        for number in range(rounds):
            for name, start in list_starts(folder, folder / str(number)):
                times[name].append(wait_for(start, folder / str(number)))
    medians = {name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in times.items()}
    alone_s, alone_cpu_s = medians[IMPORTS]
    starts = {
        name: {
            "s": round(s, 2), "ratio": round(s / alone_s, 3),
            "cpu_s": round(cpu_s, 2), "cpu_ratio": round(cpu_s / alone_cpu_s, 3),
        }
        for name, (s, cpu_s) in medians.items()
    }  # fmt: skip
    return {"rounds": rounds, "threads": torch.get_num_threads(), "starts": starts}


def list_starts(folder: Path, own: Path) -> Iterator[tuple[str, Start]]:
    """Name the commands of one round; folder: what all rounds read, own: for what this one writes."""

    def step(name: str, engine: str) -> tuple[str, Start]:
        data = ["--model.base", f"{folder}/base", "--data.shards", f"{folder}/shards", "--runs_dir", f"{own}/{name}"]
        flags = [*data, "--engine.kind", engine, "--log_every_steps", "1"]
        return name, Start([sys.executable, "launch/train.py", "--config", STEP_RECIPE, *flags], until="step ")

    doctor = Start([sys.executable, "launch/doctor.py", "--config", DOCTOR_RECIPE])
    yield IMPORTS, Start([sys.executable, "-c", LIBRARIES])
    for script in HELP:
        yield f"{script}_help", Start([sys.executable, f"launch/{script}.py", "--help"])
    yield "doctor_begins", Start(doctor.command, until="name: ")  # to answer, with the recipe that it counts
    yield from (("doctor_new", doctor), ("doctor_again", doctor))
    yield step("first_step_new", "zero2")
    yield from (step(f"first_step_{engine}_again", engine) for engine in ENGINES)


def wait_for(start: Start, own: Path) -> tuple[float, float]:
    """Start a command and wait; returns its seconds, and those of the processor."""
    environment = os.environ | {"XDG_CACHE_HOME": str(own / "cache"), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    if not torch.cuda.is_available():
        environment["DS_ACCELERATOR"] = "cpu"  # as a run says; else DeepSpeed looks for others
    with tempfile.TemporaryFile("w+") as said:
        began_s = time.monotonic()
        options: Any = {"cwd": ROOT, "env": environment, "stdout": subprocess.PIPE, "stderr": said, "text": True}
        with subprocess.Popen(start.command, **options) as process:
            came = any(start.until is not None and line.startswith(start.until) for line in process.stdout or ())
            if not came:
                os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # its times can be read until it is reaped
            took_s, cpu = time.monotonic() - began_s, psutil.Process(process.pid).cpu_times()
            process.kill()
        if not came and (process.returncode or start.until is not None):
            said.seek(0)
            raise UserError(f"{' '.join(start.command)} failed with {process.returncode}: {said.read()[-1000:]}")
    return took_s, cpu.user + cpu.system
