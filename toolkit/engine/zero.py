"""DeepSpeed ZeRO: gradients and optimizer state sharded over the ranks, one gradient reduction per optimizer step.

Test: pytest tests/engine (against plain.py, on two ranks). Verbs as in plain.py. The adapter's parameters stay fp32 and
compute runs in bf16 under autocast, so DeepSpeed's own bf16 mode, which would accumulate gradients in bf16, is off.
"""

from __future__ import annotations

import contextlib
import logging
import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.engine.plain import STATE_KEYS, AdamSettings, State, make_adamw


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
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # calls inside DeepSpeed
        self.parameters = dict(parameters)
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=model,
            model_parameters=list(self.parameters.values()),
            optimizer=make_adamw(list(self.parameters.values()), adam),
            config=_complete(settings, sum(p.numel() for p in parameters.values()), adam, accumulation, micro_batch),
        )
        self._reduction = contextlib.ExitStack()
        self._micro_steps = 0

    def backward(self, loss: Tensor) -> None:
        if self._micro_steps == 0:
            # gradients stay local until the stack closes, then one reduction serves all micro-batches
            self._reduction.enter_context(self.engine.coalesce_grad_reduction())
        self._micro_steps += 1
        self.engine.backward(loss)

    def step(self, lr: float) -> float:
        self._reduction.close()
        self._micro_steps = 0
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.engine.set_gradient_accumulation_boundary(True)
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        return float(norm) if norm is not None else math.nan

    def gather(self) -> State:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        fresh = self.engine.global_steps == 0 and not self._inner.state
        state: State = {}
        for name, parameter in self.parameters.items():
            tensors = [safe_get_full_fp32_param(parameter)]
            for key in STATE_KEYS[1:]:
                tensors.append(torch.zeros_like(tensors[0]) if fresh else safe_get_full_optimizer_state(parameter, key))
            state[name] = {k: t.detach().float().cpu().clone() for k, t in zip(STATE_KEYS, tensors, strict=True)}
        return state

    def scatter(self, state: State, step: int) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state
        from deepspeed.utils.mixed_precision_linkage import lazy_init_hp_params_optimizer_state

        # DeepSpeed makes the moments at the first step only; these internals are why the lock file pins its version
        for flat, lp_parameters in zip(
            self.optimizer.single_partition_of_fp32_groups, self.optimizer.bit16_groups, strict=True
        ):
            self._inner.state[flat] = {
                "step": torch.tensor(float(step)),
                "exp_avg": torch.zeros_like(flat),
                "exp_avg_sq": torch.zeros_like(flat),
            }
            lazy_init_hp_params_optimizer_state(lp_parameters, flat, self._inner.state)
        for name, parameter in self.parameters.items():
            saved = {key: tensor.to(parameter.device) for key, tensor in state[name].items()}
            safe_set_full_fp32_param(parameter, saved["master"])
            for key in STATE_KEYS[1:]:
                safe_set_full_optimizer_state(parameter, saved[key], key)
            parameter.data.copy_(saved["master"])

    def close(self) -> None:
        self._reduction.close()
        self.engine.destroy()

    @property
    def _inner(self) -> torch.optim.Optimizer:
        return self.optimizer.optimizer


def _complete(
    settings: dict[str, Any], trainable: int, adam: AdamSettings, accumulation: int, micro_batch: int
) -> dict[str, Any]:
    """Join what DeepSpeed owns with what the recipe owns."""
    zero = {
        key: trainable if value == "auto" else value for key, value in settings.get("zero_optimization", {}).items()
    }
    return settings | {
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": adam.max_grad_norm,
        "steps_per_print": 10**9,  # DeepSpeed's own step lines; the run prints its own
    }
