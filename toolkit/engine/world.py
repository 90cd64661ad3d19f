"""The process's place among the ranks, and the few collectives that a run needs. The environment is read here only.

Test: pytest tests/engine. Started by `deepspeed`, `torchrun`, SLURM's `srun` or plain `python`; CPU ranks talk through gloo.
"""

import contextlib
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from toolkit.errors import UserError


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def all_reduce_sum(self, values: Tensor) -> list[float]:
        """Sum a small tensor over the ranks and bring it to the host."""
        if self.size > 1:
            dist.all_reduce(values)
        return values.tolist()

    def broadcast_int(self, value: int) -> int:
        """Give every rank the main rank's number."""
        tensor = torch.tensor([value], dtype=torch.int64, device=self.device)
        if self.size > 1:
            dist.broadcast(tensor, 0)
        return int(tensor.item())

    def gather_texts(self, text: str) -> list[str]:
        """Give every rank the texts of all ranks, in their order; as bytes, since torch's gathering of objects unpickles."""
        if self.size == 1:
            return [text]
        own = torch.tensor(list(text.encode()), dtype=torch.uint8, device=self.device)
        lengths = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(own)], device=self.device))
        padded = own.new_zeros(max(int(length) for length in lengths))
        padded[: len(own)] = own
        parts = [torch.zeros_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded)
        return [bytes(part[: int(length)].tolist()).decode() for part, length in zip(parts, lengths, strict=True)]

    def barrier(self) -> None:
        if self.size > 1:
            # without it, NCCL's first barrier takes the GPU whose number is the rank's, modulo as many as there are
            dist.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


def init_world(join: bool = True, hang_timeout_s: float = 0) -> World:
    """Join the process group and pick the device.

    join            False for inference, which runs alone
    hang_timeout_s  after which something else ends a run that hangs: a collective waits longer
    raises          UserError where the ranks cannot meet, or the environment does not say by numbers which this one is

    On CPU the cores are shared out among the ranks of the machine: two ranks with all threads each fight over the cores
    (measured: 117 s against 5.5 s for ten micro-steps).
    """
    rank, size, local_rank = (_read_number(name, srun, least=alone) for name, srun, alone in _PLACE)
    on_gpu = torch.cuda.is_available()
    if join and size > 1:
        check_address(size)
        if "LOCAL_RANK" not in os.environ and torch.cuda.device_count() == 1:
            local_rank = 0  # a cluster that binds GPUs shows each task its own alone
    if on_gpu and local_rank >= torch.cuda.device_count():
        raise UserError(f"local rank {local_rank} has no GPU, there are {torch.cuda.device_count()}; start fewer ranks")
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would probe for others
        ranks_here = _read_number("LOCAL_WORLD_SIZE", "LOCAL_SIZE", least=1, alone=size)
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_here))
    world = World(rank, size, device) if join else World(0, 1, device)
    if join:
        if size == 1 and dist.is_initialized():  # left by a call that ended in an error, in a notebook for one
            dist.destroy_process_group()
        # alone, without a launcher's address: a store in memory serves DeepSpeed, which insists on a group
        store = None if "MASTER_ADDR" in os.environ else dist.HashStore()
        timeout = timedelta(seconds=max(1800, 2 * hang_timeout_s))
        try:
            dist.init_process_group(
                "nccl" if on_gpu else "gloo", timeout=timeout, store=store, rank=rank, world_size=size
            )
            world.barrier()  # else the main rank might end on a refusal, and its store with it, while others still meet
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"rank {rank} of {size} could not meet the others at {os.environ.get('MASTER_ADDR')}, port "
                f"{os.environ.get('MASTER_PORT')}; look whether all ranks were started, and whether that port is free and "
                f"not behind a firewall ({_first_line(error)})"
            ) from error
        for name, value in zip((name for name, _, _ in _PLACE), (rank, size, local_rank), strict=True):
            os.environ.setdefault(name, str(value))
    return world


def check_address(size: int) -> None:
    """Raise UserError where the main rank's machine is not named, or not known here; torch would try for minutes."""
    address = os.environ.get("MASTER_ADDR")
    if address is None:
        raise UserError(
            f"{size} ranks were started without a place to meet; start them by launch/slurm/submit.py, deepspeed or "
            "torchrun, or export MASTER_ADDR and MASTER_PORT"
        )
    try:
        socket.getaddrinfo(address, None)
    except OSError as error:
        raise UserError(
            f"MASTER_ADDR is {address}, which {socket.gethostname()} cannot resolve ({error.strerror}); give the main "
            "rank's machine by an address, or by a name that every machine knows"
        ) from None


def is_restart() -> bool:
    """Whether torchrun or SLURM starts its job again, by the command that it was given at first."""
    return any(_read_number(name, least=0) > 0 for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))


@contextlib.contextmanager
def naming_lost_ranks(world: World) -> Iterator[None]:
    """Turn what gloo and NCCL say of a rank that is gone, or does not come, into a UserError."""
    try:
        yield
    except RuntimeError as error:
        first = _first_line(error)
        if not isinstance(error, dist.DistError) and not any(word in first for word in _FROM_THE_NETWORK):
            raise
        _, found, last = str(error).partition("Last error:")  # NCCL's own words
        if found:
            first = f"{first} {' '.join(last.split())}"
        late = "timed out" in str(error).lower() or "timeout" in str(error).lower()
        cause = (
            "did not come in time: it hangs, is far slower, or a firewall stands between"
            if late
            else "is gone or out of reach: it ended, and its own last message says why, or its machine or network failed"
        )
        raise UserError(
            f"rank {world.rank} of {world.size} waited for another rank, which {cause}; the same command again, without "
            f"--fresh, goes on from the last checkpoint ({first})"
        ) from error


def _read_number(*names: str, least: int, alone: int | None = None) -> int:
    """What the environment says under the first of some names that it has.

    alone   where it has none; default the least that is allowed
    raises  UserError for what is no such number
    """
    name = next((name for name in names if name in os.environ), None)
    if name is None:
        return least if alone is None else alone
    value = os.environ[name]
    if not value.isdecimal() or int(value) < least:
        raise UserError(
            f"{name} is {value!r} in the environment, where launchers put a whole number from {least} up; take it out "
            f"(unset {name}), or start the ranks by deepspeed, torchrun or launch/slurm/submit.py"
        )
    return int(value)


def _first_line(error: Exception) -> str:
    """What an error says, without torch's closing words."""
    return (str(error).splitlines() or [type(error).__name__])[0].split(". This ")[0]


_FROM_THE_NETWORK = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe")
# as launchers say it, as srun says it to each of its tasks, and for a process that nobody placed
_PLACE = (
    ("RANK", "SLURM_PROCID", 0),
    ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", 1),  # SLURM_NTASKS would be there outside a step, too
    ("LOCAL_RANK", "SLURM_LOCALID", 0),
)
