"""Predicts an optimizer step on 1 to 1,024 GPUs from the time of a micro-step and the collectives that were counted.

Test: pytest tests/bench/test_ranks.py (counts against real ranks; the tables of docs/SCALING.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from toolkit.errors import UserError

TRAINABLE = 13_279_232  # rank 64 on 128 modules, fp32 gradients and weights
RECIPE_BATCH = 8
NODE_GPUS = 8
SMALL_SUMS = 2  # per step: the engine's norm, the loop's losses and flags
GPUS = tuple(2**i for i in range(11))


@dataclass(frozen=True)
class Link:
    """What carries a ring."""

    bytes_per_s: float  # inside a node of each GPU, between nodes of each node, in one direction
    hop_s: float  # from one member of a ring to the next


NVLINK = Link(300e9, 3e-6)
ETHERNET, INFINIBAND = Link(12.5e9, 10e-6), Link(400e9, 10e-6)
# what joins nodes, and whether an optimizer step has one gradient reduction or one for each of its micro-batches
NETWORKS = {
    "NVLink": (None, True), "100 GbE": (ETHERNET, True), "8x400 Gb": (INFINIBAND, True),
    "100 GbE, uncoalesced": (ETHERNET, False),
}  # fmt: skip


def communication_s(gpus: int, between: Link | None, reductions: int = 1) -> float:
    """Seconds of one optimizer step in collectives: gradients all-reduced, updated weights all-gathered, small sums.

    between     what joins nodes of 8 GPUs; None: all in one NVLink domain
    reductions  of the gradients per step; 1 for our engines, one per micro-batch by DeepSpeed's default
    """
    inside = gpus if between is None else min(gpus, NODE_GPUS)
    levels = [(inside, NVLINK), *([] if between is None else [(gpus // inside, between)])]
    passes = 2 * reductions + 1  # an all-reduce goes round a ring twice, an all-gather once
    whole_bytes = 4 * TRAINABLE
    large_s = sum(passes * ((n - 1) / n * whole_bytes / link.bytes_per_s + (n - 1) * link.hop_s) for n, link in levels)
    return large_s + SMALL_SUMS * sum(2 * math.ceil(math.log2(n)) * link.hop_s for n, link in levels)


def bench_scaling(micro_step_s: float = 5400 / 351, optimizer_s: float = 0.001) -> dict[str, Any]:
    """Predict steps of the published adapter.

    micro_step_s  forward and backward of one clip on one GPU; default: the published 1.5 hours for 351 clips
    optimizer_s   clipping and update, which sharding is not credited with shortening
    returns       {micro_step_s, optimizer_s, recipe, growing_8, growing_1}, lists of rows: at the recipe's batch of 8
                  clips; with 8 clips per GPU and step; with one. A row is {gpus, accumulation, clips, networks: {network:
                  {step_s, communication_ms, efficiency}}}: efficiency in clips per second and GPU, against one GPU
    raises        UserError for times that are not positive
    """
    if micro_step_s <= 0 or optimizer_s <= 0:
        raise UserError(f"times are {micro_step_s} and {optimizer_s} s; give seconds above 0, as measured on one GPU")

    def rows(gpus: tuple[int, ...], clips_per_step: Callable[[int], int]) -> list[dict[str, Any]]:
        alone_s = clips_per_step(1) * micro_step_s + optimizer_s
        listed = []
        for n in gpus:
            accumulation, networks = clips_per_step(n) // n, {}
            for name, (between, coalesced) in NETWORKS.items():
                waits_s = communication_s(n, between, 1 if coalesced else accumulation)
                step_s = accumulation * micro_step_s + optimizer_s + waits_s
                efficiency = alone_s / clips_per_step(1) * clips_per_step(n) / n / step_s
                networks[name] = {"step_s": step_s, "communication_ms": waits_s * 1e3, "efficiency": efficiency}
            listed.append({"gpus": n, "accumulation": accumulation, "clips": clips_per_step(n), "networks": networks})
        return listed

    return {
        "micro_step_s": micro_step_s,
        "optimizer_s": optimizer_s,
        "recipe": rows((1, 2, 4, 8), lambda n: RECIPE_BATCH),
        "growing_8": rows(GPUS, lambda n: 8 * n),
        "growing_1": rows(GPUS, lambda n: n),
    }


def to_markdown(report: dict[str, Any]) -> str:
    """The tables of docs/SCALING.md."""
    titles = {
        "recipe": f"The recipe's batch of {RECIPE_BATCH} clips, whatever the number of GPUs",
        "growing_8": "8 clips per GPU and step: the batch grows with the GPUs",
        "growing_1": "1 clip per GPU and step: the batch grows with the GPUs",
    }
    lines = [f"For {report['micro_step_s']:.3f} s a clip and {report['optimizer_s'] * 1e3:.1f} ms an update:"]
    for key, title in titles.items():
        lines += ["", f"{title}; time in collectives, and efficiency.", ""]
        lines += [f"| GPUs | clips a step | {' | '.join(NETWORKS)} |", "|---" * (len(NETWORKS) + 2) + "|"]
        for row in report[key]:
            networks = row["networks"].values()
            cells = [f"{n['communication_ms']:.1f} ms, {100 * n['efficiency']:.1f} %" for n in networks]
            lines.append(f"| {row['gpus']:,} | {row['clips']:,} | {' | '.join(cells)} |")
    return "\n".join(lines)
