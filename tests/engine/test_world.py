"""What the environment says of a rank's place. Run: pytest tests/engine/test_world.py"""

from typing import Any

import pytest
import torch

from toolkit.engine.world import init_world, is_restart
from toolkit.errors import UserError

PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE")


@pytest.mark.parametrize(
    ("name", "value", "least"),
    [
        ("RANK", "abc", 0), ("RANK", "", 0), ("SLURM_PROCID", "1.0", 0), ("WORLD_SIZE", "0", 1), ("LOCAL_RANK", "-1", 0),
        ("LOCAL_WORLD_SIZE", "two", 1), ("LOCAL_SIZE", "0", 1), ("TORCHELASTIC_RESTART_COUNT", "x", 0),
    ],
)  # fmt: skip
def test_a_place_that_is_no_number_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, least: int
) -> None:
    """One sentence names the variable, what it says, and what it may say."""
    for other in PLACE:
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"^{name} is '{value}' in the environment, .* whole number from {least} up;"):
        is_restart()
        init_world(join=False)


def test_a_place_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a launcher's name before srun's; without either it is that of a process alone."""
    assert not is_restart()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert is_restart()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # or it shares out the cores
    monkeypatch.setenv("LOCAL_SIZE", "none of it")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    init_world(join=False)


@pytest.mark.parametrize(("place", "gpu"), [(("3", "6", "0"), 0), (("5", "6", "2"), 2)])
def test_ranks_meet_on_their_own_gpus(monkeypatch: pytest.MonkeyPatch, place: tuple[str, ...], gpu: int) -> None:
    """Two machines of four GPUs, three ranks on each: the number of a rank is not that of its GPU."""
    for name, value in zip(PLACE[:3], place, strict=True):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    met: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *args, **kwargs: None)
    monkeypatch.setattr(torch.distributed, "barrier", lambda device_ids=None: met.append(device_ids))
    world = init_world()
    world.barrier()
    assert (world.device.index, met) == (gpu, [[gpu], [gpu]])
