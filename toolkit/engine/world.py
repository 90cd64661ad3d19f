"""The process's place among the ranks, and the few collectives that a run needs. The environment is read here only.

Test: pytest tests/engine. Started by `deepspeed`, `torchrun` or plain `python`; CPU ranks talk through gloo.
"""

import os
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

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


def init_world(join: bool = True) -> World:
    """Join the process group and pick the device.

    join  False for inference, which runs alone

    On CPU the cores are shared out among the ranks of the machine: two ranks with all threads each fight over the cores
    (measured: 117 s against 5.5 s for ten micro-steps).
    """
    rank, size, local_rank = (int(os.environ.get(name, default)) for name, default in _PLACE)
    on_gpu = torch.cuda.is_available()
    if "RANK" not in os.environ and int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        raise UserError("srun started several tasks without ranks; start one task per node, and torchrun in it")
    if on_gpu and local_rank >= torch.cuda.device_count():
        raise UserError(f"local rank {local_rank} has no GPU, there are {torch.cuda.device_count()}; start fewer ranks")
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would probe for others
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", size)))
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_here))
    if join:
        # alone, without a launcher's address: a store in memory serves DeepSpeed, which insists on a group
        store = None if "MASTER_ADDR" in os.environ else dist.HashStore()
        dist.init_process_group(
            "nccl" if on_gpu else "gloo", timeout=timedelta(minutes=30), store=store, rank=rank, world_size=size
        )
        for name, value in zip((name for name, _ in _PLACE), (rank, size, local_rank), strict=True):
            os.environ.setdefault(name, str(value))
    return World(rank, size, device)


_PLACE = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))
