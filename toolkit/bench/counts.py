"""What a training micro-step of the full-size network costs, ours beside diffusers and PEFT as they come; needs no GPU.

Test: pytest tests/bench/test_counts.py. Counted on meta tensors (meter.py): the same on every machine.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal

import torch

from toolkit.config import LEAN, LoraConfig, Part
from toolkit.model.lora import inject_lora
from toolkit.model.prepare import Plan, prepare_frozen, prepare_unet
from toolkit.model.quiet import quiet_libraries
from toolkit.model.unet import SVD_CONFIG, FramerUNet
from toolkit.model.weights import build_on_meta
from toolkit.run.memory import PLANS, Shape, count_step, make_inputs
from toolkit.run.meter import Cost, Meter

LORA = LoraConfig(rank=64, alpha=64, targets="all")
CASES = {  # by layout, frames that enter the network, and pixels
    "spec_1_576": Shape(1, 1, 72, 72, 1),
    "spec_1_512x320": Shape(1, 1, 40, 64, 1),
    "framer_5_576": Shape(1, 5, 72, 72, 2),
    "framer_5_512x320": Shape(1, 5, 40, 64, 2),
    "framer_14_576": Shape(1, 14, 72, 72, 2),
    "framer_14_512x320": Shape(1, 14, 40, 64, 2),
}

CHANNELS = 9  # of the network's input
SAMPLED = "framer_5_576"


def bench_counts(parts: bool = False) -> dict[str, Any]:
    """Count one micro-step of one clip, rank 64 on all attention layers, bf16.

    parts    of SAMPLED count `fast` with the first parts of model.blocks alone too, from none on; those that are Triton
             kernels are not counted on meta tensors
    returns  {case: {stock, ours_fast, ours_balanced, ours_small: {ops, gb_moved, tflop, peak_gb}}}: operations that start a
             kernel, gigabytes (1e9) that they read and write each on its own, floating-point operations, and the peak of
             activations and gradients beside the weights; stock with diffusers' own gradient checkpointing. SAMPLED has
             {stock_sampling, ours_sampling} too: one call of the network at inference
    """
    report = {name: count_case(shape) for name, shape in CASES.items()}
    report[SAMPLED] |= {f"{who}_sampling": describe(count_sampling(CASES[SAMPLED], who)) for who in ("stock", "ours")}
    if parts:
        ladder = [LEAN[:i] for i in range(LEAN.index("passes") + 1)]
        costs = {own: describe(count_ours(CASES[SAMPLED], PLANS[0], own)) for own in ladder}
        report[SAMPLED] |= {name_rung(own): cost for own, cost in costs.items()}
    return report


def name_rung(parts: Collection[Part]) -> str:
    """What `fast` with some parts alone is called: "ours_fast_cross_projections", without commas, to be named in a list."""
    return "_".join(("ours", PLANS[0], *(parts or ("stock",))))


def count_case(shape: Shape) -> dict[str, dict[str, float]]:
    """One row of bench_counts."""
    return {"stock": describe(count_stock(shape))} | {f"ours_{p}": describe(count_ours(shape, p)) for p in PLANS}


def count_ours(shape: Shape, plan: Plan, parts: Collection[Part] = LEAN) -> dict[str, Cost]:
    """As a run prepares the network."""
    unet = make_unet()
    trainable = prepare_unet(unet, inject_lora(unet, LORA, 0), torch.bfloat16, "sdpa", plan, parts)
    return count_step(unet, shape, trainable)


def count_stock(shape: Shape, checkpointing: bool = True) -> dict[str, Cost]:
    """diffusers' network with bf16 adapters injected by PEFT."""
    unet = make_unet()
    inject_bf16(unet)
    if checkpointing:
        unet.enable_gradient_checkpointing()
        unet.train()
    return count_step(unet, shape)


def count_sampling(shape: Shape, who: Literal["stock", "ours"]) -> dict[str, Cost]:
    """One call at inference, the tables of its clip made before: an adapter beside the weights, or folded into them."""
    unet = make_unet()
    inputs = make_inputs(unet, shape)
    with torch.no_grad():
        if who == "stock":
            inject_bf16(unet)
        else:
            prepare_frozen(unet, "sdpa", LEAN)(inputs[2])
        with Meter([*unet.parameters(), *unet.buffers(), *inputs]) as meter:
            unet(*inputs, return_dict=False)
    return meter.costs


def inject_bf16(unet: FramerUNet) -> None:
    """PEFT's adapters in the network's precision."""
    for parameter in inject_lora(unet, LORA, 0).values():
        parameter.data = parameter.data.to(torch.bfloat16)


def make_unet() -> FramerUNet:
    with quiet_libraries():
        unet = build_on_meta(FramerUNet, {**SVD_CONFIG, "in_channels": CHANNELS}).to(torch.bfloat16)
    return unet.requires_grad_(False).eval()


def describe(costs: dict[str, Cost]) -> dict[str, float]:
    """Both phases together."""
    return {
        "ops": sum(cost.ops for cost in costs.values()),
        "gb_moved": round(sum(cost.moved_bytes for cost in costs.values()) / 1e9, 1),
        "tflop": round(sum(cost.flop for cost in costs.values()) / 1e12, 2),
        "peak_gb": round(max(cost.peak_bytes for cost in costs.values()) / 1e9, 2),
    }
