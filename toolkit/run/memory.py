"""How much memory a training step takes, counted before it is taken, and which plan of saving it fits.

Test: pytest tests/run/test_memory.py
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, get_args

import psutil
import torch
from torch import Tensor

from toolkit.config import RunConfig
from toolkit.diffusion.layout import make_layout
from toolkit.errors import UserError
from toolkit.model.base import PRECISIONS
from toolkit.model.prepare import Blocks, Plan, Trainable, prepare_unet
from toolkit.model.quiet import quiet_libraries
from toolkit.model.tuning import choose_trainable
from toolkit.model.unet import FramerUNet
from toolkit.model.weights import build_on_meta
from toolkit.run.meter import Cost, Meter
from toolkit.run.recall import recall

USABLE = 0.85  # of what is free: an allocator rounds and fragments, and libraries take workspace
PLANS: tuple[Plan, ...] = get_args(Plan)
STATE_BYTES = 16  # per trainable parameter: master, gradient and two moments, fp32
EMA_BYTES = 8  # two averages, where they are kept


@dataclass(frozen=True)
class Shape:
    """What a micro-step feeds the network."""

    clips: int
    frames: int
    height: int  # of latents
    width: int
    tokens: int


def find_shape(config: RunConfig, latent_px: int) -> Shape:
    """The shape of a recipe's micro-batch; latent_px: pixels to a latent, along a side."""
    frames = make_layout(config.diffusion.layout, config.data.frames).frames
    tokens = 2 if config.diffusion.clip_tokens == "first_last" else 1
    height, width = config.data.height // latent_px, config.data.width // latent_px
    return Shape(config.engine.micro_batch, frames, height, width, tokens)


def choose_plan(config: RunConfig, unet: dict[str, Any], latent_px: int, device: torch.device) -> Plan:
    """The recipe's plan; where it says auto, the fastest that fits into what the device has free, else the smallest.

    unet  its configuration; its weights are on the device already
    """
    if config.model.memory != "auto":
        return config.model.memory
    free_bytes = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    *plans, smallest = PLANS
    if config.diffusion.control:  # what a ControlNet takes is not counted here
        return smallest
    fitting = (p for p in plans if predict_bytes(config, unet, latent_px, p) <= USABLE * free_bytes)
    return next(fitting, smallest)


def choose_blocks(config: RunConfig) -> Blocks:
    """Whose forward passes a recipe trains with.

    ZeRO-3 and int8 know layers alone, PEFT computes DoRA and dropout, and lean blocks take all weights but LoRA's as frozen.

    raises  UserError where those that diffusers and PEFT have shall be compiled
    """
    reasons = {
        "model.blocks stock": config.model.blocks == "stock", "lora.dora": config.lora.dora,
        "lora.dropout": config.lora.dropout, "engine.kind zero3": config.engine.kind == "zero3",
        "model.quantize": config.model.quantize, "tuning full": config.tuning == "full",
    }  # fmt: skip
    given = [name for name, applies in reasons.items() if applies]
    if given and config.model.compile:
        raise UserError(
            f"model.compile is on, but {given[0]} takes diffusers' and PEFT's own blocks, which do not compile whole; give "
            "up one of the two"
        )
    return "stock" if given else "lean"


def choose_replay(config: RunConfig, device: torch.device) -> bool:
    """Whether a training pass is replayed as CUDA graphs: where nothing steers it from outside, or is read outside of it."""
    steered = config.diffusion.control or "mask_token" in config.lora.extra_trainable
    return config.model.cuda_graphs and device.type == "cuda" and choose_blocks(config) == "lean" and not steered


def predict_bytes(config: RunConfig, unet: dict[str, Any], latent_px: int, plan: Plan) -> int:
    """Peak bytes of a step beside the frozen weights: activations, gradients, and the state of what trains."""
    shape, blocks = find_shape(config, latent_px), choose_blocks(config)
    question = {
        "peak_bytes": {name: value for name, value in unet.items() if not name.startswith("_")},
        "tuning": config.tuning, "lora": config.lora.model_dump(mode="json"), "full": config.full.parameters,
        "precision": config.engine.precision,
        "shape": asdict(shape), "plan": plan, "blocks": blocks, "quantize": config.model.quantize,
        "ema": config.checkpoint.ema,
    }  # fmt: skip
    return recall(question, lambda: _count_bytes(config, unet, shape, plan, blocks))


def _count_bytes(config: RunConfig, unet: dict[str, Any], shape: Shape, plan: Plan, blocks: Blocks) -> int:
    dtype = PRECISIONS[config.engine.precision]
    with quiet_libraries():
        network = build_on_meta(FramerUNet, unet).to(dtype).requires_grad_(False).eval()
    parameters = choose_trainable(network, config)
    trainable = prepare_unet(network, parameters, dtype, "sdpa", plan, blocks, config.model.quantize)
    costs = count_step(network, shape, trainable)
    state_bytes = STATE_BYTES + EMA_BYTES * config.checkpoint.ema
    return max(cost.peak_bytes for cost in costs.values()) + state_bytes * trainable.adapter.flat.numel()


def count_step(unet: Any, shape: Shape, trainable: Trainable | None = None) -> dict[str, Cost]:
    """Count one micro-step, forward and backward, of a UNet on meta tensors; trainable: where prepare_unet made it ready."""
    inputs = make_inputs(unet, shape)
    target = torch.empty(shape.clips, shape.frames, 4, shape.height, shape.width, device="meta")
    trained = trainable.adapter.parameters() if trainable else ()
    given = [*unet.parameters(), *unet.buffers(), *inputs, target, *trained]
    if trainable is not None:
        with torch.no_grad():
            trainable.begin(inputs[2])
            unet(*inputs, return_dict=False)  # what is computed once is not a step's
    with Meter(given) as meter:
        if trainable is not None:
            trainable.begin(inputs[2])
        output = unet(*inputs, return_dict=False)[0]
        loss = (output.float() - target).square().mean()
        meter.phase = "backward"
        loss.backward()
    return meter.costs


def make_inputs(unet: Any, shape: Shape) -> list[Tensor]:
    """What a UNet on meta tensors is called with."""

    def make(*sizes: int) -> Tensor:
        return torch.empty(sizes, dtype=unet.conv_out.weight.dtype, device="meta")

    return [
        make(shape.clips, shape.frames, unet.conv_in.in_channels, shape.height, shape.width), make(shape.clips),
        make(shape.clips, shape.tokens, unet.config.cross_attention_dim), make(shape.clips, 3),
    ]  # fmt: skip
