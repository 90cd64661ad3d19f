"""The fastest attention kernel is measured once, and every rank takes it. Run: pytest tests/run/test_attention.py"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from tests.launching import ROOT, free_port
from toolkit.config import LEAN, DataConfig, RunConfig
from toolkit.diffusion.layout import make_layout
from toolkit.engine.world import World, init_world
from toolkit.model.attention import Attend, attend_sdpa, pin
from toolkit.model.kernels import Packed, Size, by_rows
from toolkit.run import attention
from toolkit.run.attention import agree, recall_fastest

CPU, SIZE = torch.device("cpu"), (2, 16, 2, 16)
RANKS = """
import os
import sys

import torch
from toolkit.engine.world import init_world
from toolkit.model.attention import attend_sdpa
from toolkit.model.kernels import by_rows
from toolkit.run.attention import agree, runs_everywhere


def fail(qkv):
    raise RuntimeError("no compiler")


child = os.fork()  # imports take longer than all else here
os.environ["RANK"] = os.environ["LOCAL_RANK"] = "0" if child else "1"
world = init_world()
right, size = by_rows(attend_sdpa), (4, 3, 1, 16)
run = [runs_everywhere(kernel, size, torch.float32, world) for kernel in (right, [right, fail][world.rank])]
os.write(1, f"{world.rank} took {agree(world, lambda: sys.argv[1 + world.rank])} {run}\\n".encode())
world.close()
if child:
    os.wait()
"""


@pytest.fixture(autouse=True)
def nothing_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


class Counted:
    """Two kernels that count their calls."""

    def __init__(self) -> None:
        self.calls = 0
        kernels = {"flash": pin(SDPBackend.FLASH_ATTENTION), "math": pin(SDPBackend.MATH)}
        self.kernels = {name: by_rows(self._counting(attend)) for name, attend in kernels.items()}

    def _counting(self, attend: Attend) -> Attend:
        def counting(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.calls += 1
            return attend(q, k, v)

        return counting

    def recall(self, size: Size = SIZE, dtype: torch.dtype = torch.float32) -> tuple[str | None, bool]:
        """What was found, and whether it was measured for that."""
        self.calls = 0
        return recall_fastest(self.kernels, [size], dtype, CPU), self.calls > 0


def test_it_is_measured_once() -> None:
    """The first call measures, later ones remember; another size or precision is another question."""
    counted = Counted()
    name, measured = counted.recall()
    assert name in counted.kernels and measured
    assert counted.recall() == (name, False)
    assert counted.recall(size=(2, 8, 2, 16))[1] and counted.recall(dtype=torch.bfloat16)[1]
    assert counted.recall() == (name, False)


def test_a_passing_failure_is_not_kept() -> None:
    """No name where none runs, or memory is short; at the next start it is asked again."""

    def short(qkv: Tensor) -> Tensor:
        raise torch.OutOfMemoryError

    right = by_rows(pin(SDPBackend.MATH))
    for failing in (short, by_rows(lambda q, k, v: attend_sdpa(k, q, v))):
        assert recall_fastest({"kernel": failing}, [SIZE], torch.float32, CPU) is None
        assert recall_fastest({"kernel": right}, [(3, *SIZE[1:])], torch.float32, CPU) == "kernel"
    assert recall_fastest({"kernel": right}, [SIZE], torch.float32, CPU) == "kernel"


def test_who_does_not_join_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inference in a place where a launcher's variables are set asks nobody else."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert agree(init_world(join=False), lambda: "flash") == "flash"


@pytest.mark.parametrize(("runs", "kernel"), [(True, "flash + triton"), (False, "flash")])
def test_what_is_remembered_must_run_now(monkeypatch: pytest.MonkeyPatch, runs: bool, kernel: str) -> None:
    """On every rank: without a compiler the kernel along the frames would end the run at its first step."""
    config = RunConfig(name="run", data=DataConfig(shards="shards", frames=5))
    tried: list[Size] = []

    def try_it(candidate: Packed, size: Size, *args: Any, **kwargs: Any) -> bool:
        tried.append(size)
        return runs

    monkeypatch.setattr(attention, "agree", lambda world, find: "flash + triton")
    monkeypatch.setattr(attention, "runs_everywhere", try_it)
    world = World(0, 2, torch.device("cuda", 0))
    assert attention.choose_kernel("auto", config, world, torch.bfloat16, LEAN) == kernel
    assert [size[1:] for size in tried] == [(make_layout(config.diffusion.layout, 5).frames, 5, 64)]


@pytest.mark.launch
def test_every_rank_takes_the_main_ranks() -> None:
    """Two ranks that find different kernels run the first one's; what does not run on one of them runs on neither."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RANKS, "flash + triton", "efficient"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | place, capture_output=True, text=True, timeout=120)
    assert sorted(done.stdout.splitlines()) == [
        "0 took flash + triton [True, False]",
        "1 took flash + triton [True, False]",
    ], done.stderr[-2000:]
