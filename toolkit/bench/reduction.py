"""Counts what an optimizer step sends between ranks, with each engine and with DeepSpeed's own defaults, and times it.

Test: pytest tests/bench/test_ranks.py. Real ranks, the published adapter without its network; docs/SCALING.md uses it.
What zero3 gathers of the frozen network in a run, for every micro-batch, is therefore not counted.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import PositiveInt
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from toolkit.bench.full import stopwatch
from toolkit.bench.ranks import ACCUMULATION, LR, AdapterAlone, answer, make_engine_of, run_on_ranks, take_step
from toolkit.config import ZERO_STAGES
from toolkit.engine.plain import AdamSettings, make_adamw
from toolkit.engine.world import World

ADAM = AdamSettings(weight_decay=0.01, beta1=0.9, beta2=0.999, eps=1e-8, max_grad_norm=1.0)  # as recipes have it
SMALL_BYTES = 1024  # sums of norms and flags; all else is of the adapter's size
# By the start of an operator's name without underscores; and what a rank of N sends in a ring, in (N - 1) / N of the whole.
KINDS = {"allreduce": "all_reduce", "allgather": "all_gather", "reducescatter": "reduce_scatter", "reduce": "reduce",
         "broadcast": "broadcast", "barrier": "barrier"}  # fmt: skip
RING_SENDS = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "reduce": 1, "broadcast": 1, "barrier": 0}


def bench_reduction(ranks: PositiveInt = 2, lora_rank: PositiveInt = 64, rounds: PositiveInt = 7) -> dict[str, Any]:
    """Compare the engines on the same micro-batches, ACCUMULATION to a step.

    returns  {ranks, accumulation, trainable, engines: {engine: {collectives, small, calls: {kind: [calls, MB]}, sent_mb,
             step_ms, ratio, loss}}}, all per optimizer step: small are the collectives of 1 kB or less; MB of the whole
             tensors; sent_mb what each rank sends where rings carry them; step_ms the median of rounds in which all take
             turns, ratio to that of zero2; loss at the last step, over all ranks
    raises   UserError when a rank fails
    """
    return run_on_ranks(__name__, ranks, {"lora_rank": lora_rank, "rounds": rounds})


class Collectives(TorchDispatchMode):
    """Writes down every collective of this process, whoever calls it: (kind, bytes of the whole tensor)."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func._schema.name.split("::")[1].replace("_", "")
            kind = next((kind for start, kind in KINDS.items() if name.startswith(start)), None)
            if kind is not None:
                self.seen.append((kind, max(map(count_bytes, [*args, result]))))
        return result


def count_bytes(value: Any) -> int:
    """Bytes of a tensor, or of all tensors in lists of them; 0 for anything else."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(count_bytes, value)) if isinstance(value, list | tuple) else 0


def summarise(seen: list[tuple[str, int]], ranks: int) -> dict[str, Any]:
    """Count collectives and what a rank sends for them."""
    calls = {kind: [sizes for other, sizes in seen if other == kind] for kind in RING_SENDS}
    sent = sum(RING_SENDS[kind] * size * (ranks - 1) / ranks for kind, size in seen)
    return {
        "collectives": len(seen),
        "small": sum(size <= SMALL_BYTES for _, size in seen),
        "calls": {kind: [len(sizes), sum(sizes) / 1e6] for kind, sizes in calls.items() if sizes},
        "sent_mb": sent / 1e6,
    }


class DefaultZero:
    """ZeRO-2 as DeepSpeed's documentation uses it: default buckets, step() after every micro-batch."""

    def __init__(self, adapter: AdapterAlone, bf16: bool) -> None:
        import deepspeed

        parameters = list(adapter.parameters())
        self.engine, *_ = deepspeed.initialize(
            model=adapter,
            model_parameters=parameters,
            optimizer=make_adamw(parameters, ADAM),
            config={
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": ACCUMULATION,
                "gradient_clipping": ADAM.max_grad_norm,
                "zero_optimization": {"stage": 2},
                "bf16": {"enabled": bf16},
                "steps_per_print": 10**9,
            },
        )
        self.optimizer = self.engine.optimizer
        for group in self.optimizer.param_groups:
            group["lr"] = LR

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)
        self.engine.step()  # updates the weights at every ACCUMULATION-th call

    def step(self, lr: float) -> None:
        """The last backward has done it."""

    def close(self) -> None:
        self.engine.destroy()


def list_engines() -> Mapping[str, Callable[[AdapterAlone], Any]]:
    """What is compared, by name."""
    ours = {kind: partial(make_engine_of, kind) for kind in (*ZERO_STAGES, "fsdp2")}
    return ours | {
        "deepspeed_default": partial(DefaultZero, bf16=False),
        "deepspeed_default_bf16": partial(DefaultZero, bf16=True),
    }


def measure(world: World, folder: Path, lora_rank: int, rounds: int) -> dict[str, Any]:
    """With each engine: a step that makes its buffers, one that is counted, and `rounds` timed ones, in turns."""
    adapters: dict[str, AdapterAlone] = {}
    engines: dict[str, Any] = {}
    for name, make in list_engines().items():
        adapters[name] = AdapterAlone(lora_rank, world.device)
        engines[name] = make(adapters[name])

    rows: dict[str, dict[str, Any]] = {}
    times_s: dict[str, list[float]] = {name: [] for name in engines}
    for name in engines:
        take_step(adapters[name], engines[name], 0, world)
        with Collectives() as collectives:
            take_step(adapters[name], engines[name], 1, world)
        rows[name] = summarise(collectives.seen, world.size)
    for number in range(2, 2 + rounds):
        for name in engines:
            world.barrier()
            seconds, loss = stopwatch(partial(take_step, adapters[name], engines[name], number, world), world.device)
            times_s[name].append(seconds)
            rows[name]["loss"] = world.all_reduce_sum(loss.double())
    for name, row in rows.items():
        row["step_ms"] = statistics.median(times_s[name]) * 1e3
        row["ratio"] = statistics.median(a / b for a, b in zip(times_s[name], times_s["zero2"], strict=True))
        engines[name].close()
    return {
        "ranks": world.size,
        "accumulation": ACCUMULATION,
        "trainable": sum(p.numel() for p in adapters["deepspeed_default"].parameters()),
        "engines": rows,
    }


if __name__ == "__main__":
    answer(measure)
