"""PyTorch's own sharding, fully_shard: gradients, fp32 masters and moments of the adapter cut over the ranks.

Test: pytest tests/engine (against plain.py). Verbs as in plain.py. The frozen base stays whole on every rank: in bf16 it
takes 3 GB of a card, and sharding it would fetch those 3 GB twice per micro-batch to save them. The adapter's weights are
fetched once per optimizer step (53 MB at rank 64), and its gradients reduced once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from toolkit.engine.pieces import Piece, cut, join
from toolkit.engine.plain import STATE_KEYS, AdamSettings, Saved, State, Timing, make_adamw, update


class Fsdp2Engine:
    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        adam: AdamSettings,
        accumulation: int,
        shard_ranks: int | None,
    ) -> None:
        """
        parameters   named as in the model; the model holds others in their places from here on
        shard_ranks  ranks that share one copy of the state, which must divide the world: several copies are HSDP; None: all
        """
        self.accumulation, self.max_grad_norm = accumulation, adam.max_grad_norm
        self.shapes = {name: parameter.shape for name, parameter in parameters.items()}
        self.device = next(iter(parameters.values())).device
        self.shards = shard_ranks or dist.get_world_size()
        copies = dist.get_world_size() // self.shards
        mesh = init_device_mesh(self.device.type, (copies, self.shards), mesh_dim_names=("copy", "shard"))
        frozen = {parameter for parameter in model.parameters() if not parameter.requires_grad}
        self.model = fully_shard(
            model, mesh=mesh if copies > 1 else mesh["shard"], reshard_after_forward=False, ignored_params=frozen
        )
        self.group, self.shard = mesh.get_group("shard"), mesh.get_local_rank("shard")
        sharded = dict(model.named_parameters())
        self.sharded = {name: sharded[name] for name in parameters}
        # plain tensors of the same memory: AdamW over DTensors takes a dispatch per tensor and operation
        self.masters = {name: nn.Parameter(_local(parameter)) for name, parameter in self.sharded.items()}
        self.optimizer = make_adamw(list(self.masters.values()), adam)
        self._set_updates(0)
        self._micro_steps = 0

    def backward(self, loss: Tensor) -> None:
        self._micro_steps += 1
        last = self._micro_steps == self.accumulation
        self.model.set_requires_gradient_sync(last)
        self.model.set_reshard_after_backward(last)
        (loss / self.accumulation).backward()

    def step(self, lr: float, skip: bool = False, timing: Timing = nullcontext) -> float:
        with timing("optimizer"):  # the last backward pass has reduced
            for name, master in self.masters.items():
                gradient = self.sharded[name].grad
                master.grad = torch.zeros_like(master) if gradient is None else _local(gradient)
                self.sharded[name].grad = None
            self._micro_steps = 0
            norm = math.nan if skip else self._clip()
            self.updates += update(self.optimizer, lr, norm)
        return norm

    def gather(self) -> State:
        whole = {key: join(self._pieces(key), self.shapes, self.device, self.group) for key in STATE_KEYS}
        return {name: {key: whole[key][name] for key in STATE_KEYS} for name in whole["master"]}

    def scatter(self, state: Saved, updates: int) -> None:
        self._set_updates(updates)
        for key in STATE_KEYS:
            cut(state, key, self._pieces(key))

    def close(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def _clip(self) -> float:
        """Scale the gradients down to the largest norm allowed; returns their norm before, the same on every rank."""
        gradients = [master.grad for master in self.masters.values() if master.grad is not None]
        square = nn.utils.get_total_norm(gradients).square()
        dist.all_reduce(square, group=self.group)
        norm = square.sqrt()
        nn.utils.clip_grads_with_norm_(self.masters.values(), self.max_grad_norm, norm)
        return float(norm)

    def _set_updates(self, updates: int) -> None:
        """Make the moments, zero, with Adam's count of updates."""
        self.updates = updates
        for master in self.masters.values():
            self.optimizer.state[master] = {
                "step": torch.tensor(float(updates), device=master.device),
                "exp_avg": torch.zeros_like(master),
                "exp_avg_sq": torch.zeros_like(master),
            }

    def _pieces(self, key: str) -> Iterator[Piece]:
        for name, master in self.masters.items():
            rows, *rest = self.shapes[name]
            start = min(rows, math.ceil(rows / self.shards) * self.shard) * math.prod(rest)
            yield Piece(
                name, start, (master if key == "master" else self.optimizer.state[master][key]).detach().flatten()
            )


def _local(tensor: Tensor) -> Tensor:
    """This rank's part, in the same memory."""
    assert isinstance(tensor, DTensor)
    return tensor.to_local().detach()
