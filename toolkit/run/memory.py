"""How much memory a training step takes, counted before it is taken, and which plan of saving it fits.

Test: pytest tests/run/test_memory.py
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, get_args

import psutil
import torch
from torch import Tensor

from toolkit.config import ZERO_STAGES, Part, RunConfig
from toolkit.diffusion.layout import make_layout
from toolkit.engine.world import World
from toolkit.errors import UserError
from toolkit.model.base import PRECISIONS, vae_dtype
from toolkit.model.encoders import DECODED_NUMBERS, USABLE, encode_frames
from toolkit.model.prepare import Plan, Trainable, prepare_frozen, prepare_unet
from toolkit.model.quiet import quiet_libraries
from toolkit.model.tuning import choose_trainable
from toolkit.model.unet import FramerUNet
from toolkit.model.weights import build_on_meta
from toolkit.run.meter import Cost, Meter
from toolkit.run.recall import recall

PLANS: tuple[Plan, ...] = get_args(Plan)
# bytes for each number that trains, in fp32
SHARED_BYTES = 12  # master and two moments, which engines share out over the ranks
GRADIENT_BYTES = 4
COPY_BYTES = 4  # of the masters, as the network reads them where the masters are shared out
BUCKET_BYTES = 4  # in which DeepSpeed adds gradients up
EMA_BYTES = 8  # two averages, on the main rank
HEALTH_BYTES = 4  # as it was before, by which the main rank tells how much it changed


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


def choose_plan(
    config: RunConfig, unet: Mapping[str, Any], latent_px: int, world: World, vae: Mapping[str, Any] | None = None
) -> Plan:
    """The recipe's plan; where it says auto, the fastest that fits into what each rank has free, else the smallest.

    unet  its configuration; its weights are on the device already
    vae   its own likewise, where it encodes the next clips while the network computes
    """
    if config.model.memory != "auto":
        return config.model.memory
    *plans, smallest = PLANS
    # What a ControlNet takes is not counted here. int8 keeps copies for the backward pass: with every activation kept it
    # would take more than what it saves.
    if config.diffusion.control or config.model.quantize is not None:
        return smallest
    device = world.device
    free_bytes = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    room_bytes = USABLE * free_bytes - (0 if vae is None else predict_encoding_bytes(config, vae))
    # graphs keep the memory that they work in, also while held-out clips are looked at
    if choose_replay(config, device):
        room_bytes -= predict_look_bytes(config, unet, latent_px)
    for plan in plans:
        fits = torch.tensor(
            [float(predict_bytes(config, unet, latent_px, plan, world.size) <= room_bytes)], device=device
        )
        # one plan for all: where weights are sharded, ranks that compute again gather them again, and the others must too
        if world.all_reduce_sum(fits) == [world.size]:
            return plan
    return smallest


def choose_parts(config: RunConfig) -> tuple[Part, ...]:
    """The parts of lean blocks that a recipe trains with.

    ZeRO-3 and int8 know layers alone, PEFT computes DoRA and dropout, and lean blocks take all weights but LoRA's as frozen.

    raises  UserError where forward passes that diffusers has shall be compiled
    """
    reason = _why_not_passes(config)
    if reason is not None and config.model.compile:
        raise UserError(
            f"model.compile is on, but {reason} takes diffusers' own forward passes, which do not compile whole; give up "
            "one of the two"
        )
    return () if _why_stock(config) else config.model.parts


def _why_stock(config: RunConfig) -> str | None:
    reasons = {
        "lora.dora": config.lora.dora, "lora.dropout": config.lora.dropout, "model.quantize": config.model.quantize,
        "engine.kind zero3": config.engine.kind == "zero3", "tuning full": config.tuning == "full",
    }  # fmt: skip
    return next((name for name, applies in reasons.items() if applies), None)


def _why_not_passes(config: RunConfig) -> str | None:
    return _why_stock(config) or (None if "passes" in config.model.parts else "model.blocks without passes")


def why_launched(config: RunConfig) -> str | None:
    """What in a recipe keeps a training pass from being replayed as CUDA graphs, so that each kernel is launched by itself.

    Something that steers the pass from outside, or is read outside of it: a graph would not see it change. None: nothing.
    """
    reasons = {
        "model.cuda_graphs false": not config.model.cuda_graphs, "diffusion.control": config.diffusion.control,
        "lora.extra_trainable mask_token": "mask_token" in config.lora.extra_trainable,
    }  # fmt: skip
    return next((name for name, applies in reasons.items() if applies), _why_not_passes(config))


def choose_replay(config: RunConfig, device: torch.device) -> bool:
    """Whether a training pass is replayed as CUDA graphs."""
    return device.type == "cuda" and why_launched(config) is None


def predict_bytes(config: RunConfig, unet: Mapping[str, Any], latent_px: int, plan: Plan, ranks: int) -> int:
    """Peak bytes of a step beside the frozen weights: activations, gradients, and the state of what trains."""
    shape, parts = find_shape(config, latent_px), choose_parts(config)
    question = {
        "peak_bytes": {name: value for name, value in unet.items() if not name.startswith("_")},
        "tuning": config.tuning, "lora": config.lora.model_dump(mode="json"), "full": config.full.parameters,
        "precision": config.engine.precision,
        "shape": asdict(shape), "plan": plan, "parts": parts, "quantize": config.model.quantize,
        "state": count_state_bytes(config, ranks),
    }  # fmt: skip
    return recall(question, lambda: _count_bytes(config, unet, shape, plan, parts, ranks))


def count_state_bytes(config: RunConfig, ranks: int) -> float:
    """Bytes for each number that trains, on the device of the main rank, which keeps most."""
    kind = config.engine.kind
    sharing = 1 if kind == "plain" else config.engine.shard_ranks or ranks
    kept = 0.0 if kind == "zero2_offload" else SHARED_BYTES / sharing
    own = GRADIENT_BYTES + COPY_BYTES * (kind != "plain") + BUCKET_BYTES * (kind in ZERO_STAGES)
    return kept + own + EMA_BYTES * config.checkpoint.ema + HEALTH_BYTES * (kind not in ("zero3", "fsdp2"))


def predict_look_bytes(config: RunConfig, unet: Mapping[str, Any], latent_px: int) -> int:
    """Peak bytes of a look at held-out clips: a pass without gradients, or decoding a frame; 0 for a run that takes none."""
    looks, generates = config.validation, config.validation.figures_every_steps is not None
    if looks.every_steps is None and not generates:
        return 0
    guided = generates and max(looks.min_guidance, looks.max_guidance) > 1  # with and without its stills at once
    shape = replace(find_shape(config, latent_px), clips=1 + guided)
    dtype = PRECISIONS[config.engine.precision]
    known = {name: value for name, value in unet.items() if not name.startswith("_")}
    parts = choose_parts(config)
    question = {"look_peak_bytes": known, "shape": asdict(shape), "dtype": str(dtype), "parts": parts}
    pass_bytes = recall(question, lambda: _count_pass(unet, shape, dtype, parts))
    frame_bytes = DECODED_NUMBERS * torch.float32.itemsize * config.data.height * config.data.width
    return max(pass_bytes, frame_bytes * generates)


def _count_pass(unet: Mapping[str, Any], shape: Shape, dtype: torch.dtype, parts: Collection[Part]) -> int:
    with quiet_libraries():
        network = build_on_meta(FramerUNet, unet).to(dtype).requires_grad_(False).eval()
    inputs = make_inputs(network, shape)
    with torch.no_grad():
        prepare_frozen(network, "sdpa", parts)(inputs[2])
        with Meter([*network.parameters(), *network.buffers(), *inputs]) as meter:
            network(*inputs, return_dict=False)
    return max(cost.peak_bytes for cost in meter.costs.values())


def count_encoder_bytes(config: RunConfig, vae: Mapping[str, Any], clip: Mapping[str, Any]) -> int:
    """Bytes of the weights of VAE and image encoder, by their configurations."""
    from diffusers import AutoencoderKLTemporalDecoder
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    dtype = PRECISIONS[config.engine.precision]
    with quiet_libraries(), torch.device("meta"):
        encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(**clip))
        parts = ((build_on_meta(AutoencoderKLTemporalDecoder, vae), vae_dtype(vae, dtype)), (encoder, dtype))
    return sum(own.itemsize * sum(p.numel() for p in part.parameters()) for part, own in parts)


def predict_encoding_bytes(config: RunConfig, vae: Mapping[str, Any]) -> int:
    """Peak bytes of encoding a frame beside the weights of a VAE, by its configuration."""
    dtype = vae_dtype(vae, PRECISIONS[config.engine.precision])
    size = (config.data.height, config.data.width)
    known = {name: value for name, value in vae.items() if not name.startswith("_")}
    return recall(
        {"encoding_peak_bytes": known, "size": size, "dtype": str(dtype)}, lambda: _count_encoding(vae, size, dtype)
    )


def _count_encoding(vae: Mapping[str, Any], size: tuple[int, int], dtype: torch.dtype) -> int:
    from diffusers import AutoencoderKLTemporalDecoder

    with quiet_libraries():
        network = build_on_meta(AutoencoderKLTemporalDecoder, vae).to(dtype).requires_grad_(False)
    frame_11CHW = torch.empty(1, 1, 3, *size, dtype=dtype, device="meta")
    with Meter([*network.parameters(), *network.buffers(), frame_11CHW]) as meter:
        encode_frames(network, frame_11CHW)
    return max(cost.peak_bytes for cost in meter.costs.values())


def _count_bytes(
    config: RunConfig, unet: Mapping[str, Any], shape: Shape, plan: Plan, parts: Collection[Part], ranks: int
) -> int:
    dtype = PRECISIONS[config.engine.precision]
    with quiet_libraries():
        network = build_on_meta(FramerUNet, unet).to(dtype).requires_grad_(False).eval()
    parameters = choose_trainable(network, config)
    trainable = prepare_unet(network, parameters, dtype, "sdpa", plan, parts, config.model.quantize)
    costs = count_step(network, shape, trainable)
    state_bytes = count_state_bytes(config, ranks) * trainable.adapter.flat.numel()
    return math.ceil(max(cost.peak_bytes for cost in costs.values()) + state_bytes)


def count_step(unet: Any, shape: Shape, trainable: Trainable | None = None) -> dict[str, Cost]:
    """Count one micro-step, forward and backward, of a UNet on meta tensors; trainable: where prepare_unet made it ready."""
    inputs = make_inputs(unet, shape)
    inputs[0].requires_grad_(trainable is not None and "mask_token" in trainable.adapter.shapes)  # a part of it
    target = torch.empty(shape.clips, shape.frames, 4, shape.height, shape.width, device="meta")
    trained = trainable.adapter.parameters() if trainable else ()
    given = [*unet.parameters(), *unet.buffers(), *inputs, target, *trained]
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
