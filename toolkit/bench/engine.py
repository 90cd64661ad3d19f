"""What an engine costs the host beside a plain loop: time of an optimizer step in which there is little to compute.

Test: pytest tests/bench/test_ranks.py. What counts is the number of tensors, not their size: at a small rank a CPU
spends its time on what it does for each of them, and that is what a GPU waits for.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import PositiveInt
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

from toolkit.bench.full import stopwatch
from toolkit.bench.ranks import ACCUMULATION, LR, AdapterAlone, answer, make_engine_of, run_on_ranks, take_step
from toolkit.bench.reduction import ADAM, DefaultZero
from toolkit.engine.world import World

Contender = tuple[Callable[[int], Tensor], Any]  # the loss of a micro-batch, and the engine


def bench_engine(lora_rank: PositiveInt = 2, rounds: PositiveInt = 40) -> dict[str, Any]:
    """Time one optimizer step of one process with each engine, in turns; 256 matrices, ACCUMULATION micro-batches.

    lora_rank  of the matrices
    returns    {plain_ms, zero2_ours, zero2_default, ddp, loss: {engine: loss of the last step}}: the median of a plain
               loop over the matrices, and ratios to it, medians over the rounds
    """
    return run_on_ranks(__name__, 1, {"lora_rank": lora_rank, "rounds": rounds})


class PlainLoop:
    """What anyone would write: backward, clip, AdamW."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self.optimizer = AdamW(parameters, LR, (ADAM.beta1, ADAM.beta2), ADAM.eps, ADAM.weight_decay)

    def backward(self, loss: Tensor) -> None:
        (loss / ACCUMULATION).backward()

    def step(self, lr: float) -> None:
        nn.utils.clip_grad_norm_(self.parameters, ADAM.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()


def list_contenders(lora_rank: int, world: World) -> dict[str, Contender]:
    """Each with an adapter of its own, all of the same values."""

    def alone() -> AdapterAlone:
        return AdapterAlone(lora_rank, world.device)

    plain, ours, default, wrapped = alone(), alone(), alone(), DistributedDataParallel(alone())

    def forward_wrapped(k: int) -> Tensor:
        if (k + 1) % ACCUMULATION == 0:
            return wrapped(k)
        with wrapped.no_sync():
            return wrapped(k)

    return {
        "plain": (plain, PlainLoop(list(plain.parameters()))),
        "zero2_ours": (ours, make_engine_of("zero2", ours)),
        "zero2_default": (default, DefaultZero(default, bf16=False)),
        "ddp": (forward_wrapped, PlainLoop(list(wrapped.parameters()))),
    }


def measure(world: World, folder: Path, lora_rank: int, rounds: int) -> dict[str, Any]:
    """Two steps of each to warm up, then `rounds` timed ones in turns."""
    contenders = list_contenders(lora_rank, world)
    times_s: dict[str, list[float]] = {name: [] for name in contenders}
    losses = {}
    for number in range(2 + rounds):
        for name, (forward, engine) in contenders.items():
            seconds, loss = stopwatch(partial(take_step, forward, engine, number, world), world.device)
            times_s[name].append(seconds)
            losses[name] = loss.item()
    plain_s, *others = ((name, times[2:]) for name, times in times_s.items())
    ratios = {name: statistics.median(a / b for a, b in zip(times, plain_s[1], strict=True)) for name, times in others}
    return {"plain_ms": statistics.median(plain_s[1]) * 1e3, **ratios, "loss": losses}


if __name__ == "__main__":
    answer(measure)
