"""The numerical reference: one process, torch.optim.AdamW on the adapter's fp32 masters.

Test: pytest tests/engine. An engine has five verbs, and so have zero.py and fsdp2.py; every rank calls each alike:
    backward(loss)           accumulate gradients of one micro-batch; the step's loss is the mean of its micro-batches
    step(lr, skip=False)     clip, update, clear; returns the gradient norm before clipping. Where that is not finite, on
                             any rank, nothing is updated on any; skip only clears, and returns nan. Another argument,
                             timing, is entered around its phases, "reduce" (where ranks' gradients are) and "optimizer"
    gather()                 {parameter name: {master, exp_avg, exp_avg_sq}}: whole fp32 tensors of one's own, on the CPU
                             of the main rank; {} on the others
    scatter(state, updates)  the reverse, into a fresh engine
    close()
and `updates`, the number of updates made so far, which Adam counts: fewer than steps where some were skipped.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

State = dict[str, dict[str, Tensor]]
Saved = Mapping[str, Mapping[str, Tensor]]  # the same, which may make each tensor when it is asked for
Timing = Callable[[str], AbstractContextManager[Any]]
STATE_KEYS = ("master", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class AdamSettings:
    """What AdamW needs beside the learning rate."""

    weight_decay: float
    beta1: float
    beta2: float
    eps: float
    max_grad_norm: float


def make_adamw(parameters: list[nn.Parameter], adam: AdamSettings) -> torch.optim.AdamW:
    # lr 0: the run's schedule gives it at each step
    return torch.optim.AdamW(
        parameters,
        lr=0.0,
        betas=(adam.beta1, adam.beta2),
        eps=adam.eps,
        weight_decay=adam.weight_decay,
        fused=True,
    )


def update(optimizer: torch.optim.Optimizer, lr: float, norm: float) -> bool:
    """Step an optimizer where its gradients' norm is finite, and clear them; returns whether it was stepped."""
    finite = math.isfinite(norm)
    if finite:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return finite


class PlainEngine:
    def __init__(self, parameters: Mapping[str, nn.Parameter], adam: AdamSettings, accumulation: int) -> None:
        self.parameters = dict(parameters)
        self.optimizer = make_adamw(list(self.parameters.values()), adam)
        self.max_grad_norm = adam.max_grad_norm
        self.accumulation = accumulation
        self.updates = 0

    def backward(self, loss: Tensor) -> None:
        (loss / self.accumulation).backward()

    def step(self, lr: float, skip: bool = False, timing: Timing = nullcontext) -> float:
        with timing("optimizer"):
            for parameter in self.parameters.values():
                if parameter.grad is None:  # one that the loss does not reach decays all the same, as in other engines
                    parameter.grad = torch.zeros_like(parameter)
            norm = math.nan if skip else float(nn.utils.clip_grad_norm_(self.parameters.values(), self.max_grad_norm))
            self.updates += update(self.optimizer, lr, norm)
        return norm

    def gather(self) -> State:
        state: State = {}
        for name, parameter in self.parameters.items():
            moments = self.optimizer.state.get(parameter)
            if moments is None:  # there are none before the first step
                moments = dict.fromkeys(("exp_avg", "exp_avg_sq"), torch.zeros_like(parameter))
            tensors = (parameter.detach(), moments["exp_avg"], moments["exp_avg_sq"])
            state[name] = {key: t.detach().cpu().clone() for key, t in zip(STATE_KEYS, tensors, strict=True)}
        return state

    def scatter(self, state: Saved, updates: int) -> None:
        self.updates = updates
        for name, parameter in self.parameters.items():
            parameter.data.copy_(state[name]["master"])
            self.optimizer.state[parameter] = {
                "step": torch.tensor(float(updates), device=parameter.device),
                "exp_avg": state[name]["exp_avg"].to(parameter.device, copy=True),
                "exp_avg_sq": state[name]["exp_avg_sq"].to(parameter.device, copy=True),
            }

    def close(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
