"""DeepSpeed ZeRO 1, 2 (with offload) and 3: state sharded over the ranks, one gradient reduction per optimizer step.

Test: pytest tests/engine (against plain.py). Verbs as in plain.py. The adapter's parameters stay fp32 and
compute runs in bf16 under autocast, so DeepSpeed's own bf16 mode, which would accumulate gradients in bf16, is off.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from toolkit.engine.pieces import Piece, cut, join
from toolkit.engine.plain import STATE_KEYS, AdamSettings, Saved, State, Timing, make_adamw


class ZeroEngine:
    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        adam: AdamSettings,
        accumulation: int,
        micro_batch: int,
        settings: dict[str, Any],
    ) -> None:
        """settings  the DeepSpeed JSON: stage, buckets, overlap; bucket sizes of "auto" become the adapter's size."""
        import deepspeed

        # Else the first launch on a CPU compiles a shared-memory reduction: a minute, and a C++ compiler, for a few MB
        # that gloo moves as well.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # Every engine loads Muon, another optimizer, and that torch's compiler: a second
        with mock.patch("deepspeed.runtime.compiler.compile", lambda: lambda function: function):
            import deepspeed.runtime.zero.muon.original_muon
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # calls inside DeepSpeed
        self.parameters = dict(parameters)
        self.shapes = {name: parameter.shape for name, parameter in parameters.items()}
        self.device = next(iter(parameters.values())).device
        self.stage = settings["zero_optimization"]["stage"]
        if self.stage == 3:
            _keep_whole(model)
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=model,
            model_parameters=list(self.parameters.values()),
            optimizer=make_adamw(list(self.parameters.values()), adam),
            config=_complete(settings, sum(p.numel() for p in parameters.values()), adam, accumulation, micro_batch),
        )
        if self.stage == 3:
            # Kept from its first use to the step, as DeepSpeed keeps what other modules use as well: dropped after each
            # micro-batch, it would be fetched for the next.
            trained: list[Any] = list(self.parameters.values())
            for parameter in trained:
                parameter.is_external_param = True
        self._set_updates(0)

    def backward(self, loss: Tensor) -> None:
        # Gradients stay local until the step, where one reduction serves all micro-batches. This is what entering
        # coalesce_grad_reduction() does; left open by an error, it would reduce at the exit, where no other rank may answer.
        self.optimizer._coalesce_grad_reduction = self.engine.inside_no_sync_ctxt = True
        self.engine.backward(loss)

    def step(self, lr: float, skip: bool = False, timing: Timing = nullcontext) -> float:
        if skip:
            # DeepSpeed's own way out of a step is a norm that is not finite: it drops all gradients and changes nothing
            next(p.grad for p in self.parameters.values() if p.grad is not None).fill_(math.nan)
        self.engine.inside_no_sync_ctxt = False
        with timing("reduce"), self.engine.coalesce_grad_reduction():
            pass
        with timing("optimizer"):
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.engine.set_gradient_accumulation_boundary(True)
            self.engine.step()
            norm = float(self.engine.get_global_grad_norm())
            self.updates += math.isfinite(norm)
        return norm

    def gather(self) -> State:
        whole = {key: join(self._pieces(key), self.shapes, self.device, None) for key in STATE_KEYS}
        return {name: {key: whole[key][name] for key in STATE_KEYS} for name in whole["master"]}

    def scatter(self, state: Saved, updates: int) -> None:
        self._set_updates(updates)
        for key in STATE_KEYS:
            cut(state, key, self._pieces(key))
        if self.stage == 3:
            for group in range(len(self._flats)):
                self.optimizer._reassign_or_swap_out_partitioned_parameters(group)
        else:
            for name, parameter in self.parameters.items():
                parameter.data.copy_(state[name]["master"])

    def close(self) -> None:
        self.engine.destroy()

    # What follows reads DeepSpeed's internals, and is why the lock file pins its version.

    @property
    def _flats(self) -> list[Tensor]:
        """This rank's masters, in one tensor per group."""
        name = "fp32_partitioned_groups_flat" if self.stage == 3 else "single_partition_of_fp32_groups"
        return getattr(self.optimizer, name)

    @property
    def _adam(self) -> dict[Tensor, dict[str, Tensor]]:
        """The inner optimizer's state, by flat master."""
        return self.optimizer.optimizer.state

    def _set_updates(self, updates: int) -> None:
        """Make the moments, zero, with Adam's count of updates; DeepSpeed would make them at the first step."""
        self.updates = updates
        for flat in self._flats:
            self._adam[flat] = {
                "step": torch.tensor(float(updates), device=flat.device),
                "exp_avg": torch.zeros_like(flat),
                "exp_avg_sq": torch.zeros_like(flat),
            }

    def _pieces(self, key: str) -> Iterator[Piece]:
        for name, parameter in self.parameters.items():
            for group, begin, start, length in self._places(parameter):
                flat = self._flats[group]
                values = flat.detach() if key == "master" else self._adam[flat][key]
                yield Piece(name, start, values[begin : begin + length])

    def _places(self, parameter: Any) -> Iterator[tuple[int, int, int, int]]:
        """Where this rank keeps its part of a parameter: group, place in its flat tensor, place in the parameter, length."""
        if self.stage == 3:
            group, begin, length = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
            start = self.optimizer._get_param_partition_rank(parameter) * length
            yield group, begin, start, max(0, min(length, parameter.ds_numel - start))  # the last part is padded
        elif parameter._hp_mapping is not None:
            mapping = parameter._hp_mapping
            fragment, own = mapping.hp_fragment_address, mapping.lp_fragment_address
            yield mapping.param_group_index, fragment.start, own.start, fragment.numel


def _keep_whole(model: nn.Module) -> None:
    """Turn what a network holds beside its layers into buffers, which ZeRO-3 leaves alone.

    It fetches parameters when their layer is called, and a mask token is read before.
    """
    for network in [module for module in model.modules() if any(module.children())]:
        for name, parameter in list(network.named_parameters(recurse=False)):
            assert not parameter.requires_grad, name
            delattr(network, name)
            network.register_buffer(name, parameter.detach(), persistent=False)


def _complete(
    settings: dict[str, Any], trainable: int, adam: AdamSettings, accumulation: int, micro_batch: int
) -> dict[str, Any]:
    """Join what DeepSpeed owns with what the recipe owns."""
    even = trainable + trainable % 2  # DeepSpeed asserts that
    zero = {key: even if value == "auto" else value for key, value in settings["zero_optimization"].items()}
    if zero["stage"] == 3:
        # DeepSpeed's rounds before it adds the bias, and replaces torch's for the whole process, for good
        zero["memory_efficient_linear"] = False
    return {
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,  # DeepSpeed's own would compile at the first start
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": adam.max_grad_norm,
        "steps_per_print": 10**9,  # DeepSpeed's own step lines; the run prints its own
    }
