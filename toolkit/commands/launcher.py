"""How a program starts training on this machine, as a person would: by DeepSpeed's launcher, a process for each rank.

Test: pytest tests/commands/test_sweep.py
"""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def program(name: str) -> str:
    """Where a program of this project is, such as launch/train.py, seen from here."""
    return os.path.relpath(ROOT / name)


def default_ranks() -> int:
    """All GPUs, or two ranks: on a CPU, DeepSpeed's launcher would start one."""
    import torch

    return torch.cuda.device_count() or 2


def training_command(ranks: int) -> list[str]:
    """How launch/train.py is started in so many processes; its flags come after."""
    if ranks == 1:
        return [sys.executable, program("launch/train.py")]
    with socket.socket() as probe:  # else two trainings on one machine would meet at the same port
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    deepspeed = str(Path(sys.executable).with_name("deepspeed"))
    return [deepspeed, "--num_gpus", str(ranks), "--master_port", str(port), program("launch/train.py")]
