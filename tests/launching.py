"""Starts training as a user does, stops it as a power cut does, and reads what it left behind. No tests in here."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import psutil
import torch.distributed as dist

from toolkit.config import load_config
from toolkit.run.rows import read_rows
from toolkit.run.signals import SIGNALS
from toolkit.run.trainer import train

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "launch/recipes/tiny_cpu.yaml"
Launcher = Literal["deepspeed", "torchrun", "python"]
HEAVY = ("torch", "diffusers", "transformers", "peft", "deepspeed", "numpy")  # libraries that take seconds to load
PLACE = ("RANK", "LOCAL_RANK", "WORLD_SIZE")  # a run in this process leaves these; no child may inherit them

# Ten steps of four clips, three frames of 32 x 32 each. The rate is constant, so that shorter runs begin alike.
TINY: dict[str, Any] = {
    "lora.rank": 4, "lora.alpha": 4, "lora.targets": "all", "lora.extra_trainable": [], "diffusion.layout": "spec_middle",
    "diffusion.noise_sampler": "uniform_t", "diffusion.loss_space": "epsilon", "optimizer.lr": 1e-2,
    "data.frames": 3, "data.stride": 1, "data.height": 32, "data.width": 32,
    "schedule.shape": "constant", "schedule.warmup_steps": 0, "schedule.steps": 10,
    "model.memory": "small",
    "engine.kind": "zero2", "engine.precision": "bf16", "engine.global_batch": 4, "engine.micro_batch": 1,
    "checkpoint.every_steps": 2, "checkpoint.keep": 10,
    "log_every_steps": 1,
}  # fmt: skip


def train_here(overrides: Mapping[str, Any], fresh: bool = False, allow_change: bool = False) -> Path:
    """Train the tiny recipe in this process, on one thread as each rank of two does; returns the run folder.

    The last bits follow the number of threads. What the run leaves in its process is taken away again.
    """
    with mock.patch.dict(os.environ), mock.patch("os.sched_getaffinity", lambda pid: {0}):
        for name in ("OMP_NUM_THREADS", *PLACE):
            os.environ.pop(name, None)
        handlers = {number: signal.getsignal(number) for number in SIGNALS}
        try:
            return train(load_config(RECIPE, dict(overrides)), fresh, allow_change)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            if dist.is_initialized():  # a run that was refused or stopped leaves its group to the end of the process
                dist.destroy_process_group()


def train_command(launcher: Launcher, ranks: int, overrides: Mapping[str, Any], fresh: bool = False) -> list[str]:
    """The command line that trains the tiny recipe."""
    flags = [part for name, value in overrides.items() for part in (f"--{name}", str(value))]
    programs = Path(sys.executable).parent
    start = {
        "python": [sys.executable],
        "torchrun": [programs / "torchrun", "--nproc_per_node", ranks, "--master_port", free_port()],
        "deepspeed": [programs / "deepspeed", "--num_gpus", ranks, "--master_port", free_port()],
    }[launcher]
    fresh_flag = ["--fresh"] if fresh else []
    return [str(part) for part in (*start, "launch/train.py", "--config", RECIPE, *flags, *fresh_flag)]


def launch(
    launcher: Launcher, ranks: int, overrides: Mapping[str, Any], fresh: bool = False, timeout_s: float = 150
) -> subprocess.CompletedProcess[str]:
    """Train by a launcher, in its own processes, to the end; stdout and stderr are text."""
    return run(train_command(launcher, ranks, overrides, fresh), ranks, timeout_s)


def run(command: list[str], ranks: int = 1, timeout_s: float = 150) -> subprocess.CompletedProcess[str]:
    """Run a command from the root of the repository with a core for each rank."""
    process = start(command, ranks)
    try:
        stdout, stderr = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        kill_tree(process.pid)
        stdout, stderr = process.communicate()
        raise AssertionError(f"still running after {timeout_s} s: {stdout}\n{stderr}") from None
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def start(command: list[str], ranks: int = 1) -> subprocess.Popen[str]:
    """Start a command with a core for each rank; the number of threads, and so the last bits, follow from that."""
    cores = sorted(os.sched_getaffinity(0))[:ranks]
    environment = {name: value for name, value in os.environ.items() if name not in PLACE}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )


def kill_when(process: subprocess.Popen[str], ready: Callable[[], bool], timeout_s: float = 120) -> None:
    """Wait until `ready`, then kill the whole tree of processes."""
    until_s = time.monotonic() + timeout_s
    while process.poll() is None and not ready() and time.monotonic() < until_s:
        time.sleep(0.01)
    in_time = process.poll() is None and ready()
    kill_tree(process.pid)
    output = process.communicate()
    assert in_time, f"ended or hung before it could be killed: {output}"


def kill_tree(pid: int) -> None:
    """SIGKILL a process and all its descendants, the parents first, so that none can react."""
    try:
        root = psutil.Process(pid)
        family = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for process in family:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(family, timeout=20)


def read_numbers(run: Path, *keys: str) -> list[tuple[Any, ...]]:
    """Read columns of log.jsonl, (step, loss, grad_norm) by default; JSON gives back every bit of a float."""
    return [tuple(row[key] for key in keys or ("step", "loss", "grad_norm")) for row in read_rows(run / "log.jsonl")]


def adapter_bytes(run: Path, step: int) -> bytes:
    """The tensors of one checkpoint's adapter as they lie in its file; the header before them names the run."""
    content = (run / f"checkpoints/step_{step:06d}/adapter_model.safetensors").read_bytes()
    return content[8 + int.from_bytes(content[:8], "little") :]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
