"""Measures on random weights of the published sizes, so that no download is needed: time and memory of real steps.

Test: pytest tests/bench/test_full.py (on a small network). Figures go to docs/LEDGER.md with the machine's name.
"""

from __future__ import annotations

import copy
import gc
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.config import RunConfig
from toolkit.data.loader import Batch
from toolkit.diffusion.layout import make_layout
from toolkit.engine.plain import PlainEngine
from toolkit.engine.world import init_world
from toolkit.errors import UserError
from toolkit.model import tiny
from toolkit.model.attention import choose_attention
from toolkit.model.base import PRECISIONS, Base
from toolkit.model.encoders import CLIP_CONFIG, VAE_CONFIG
from toolkit.model.flat import NAME
from toolkit.model.quiet import quiet_libraries
from toolkit.model.tiny import SCHEDULER
from toolkit.model.unet import SVD_CONFIG, FramerUNet
from toolkit.rng import rng
from toolkit.run.framer import Framer, Sampling, to_signed
from toolkit.run.job import adam_settings, make_framer
from toolkit.run.memory import choose_plan
from toolkit.run.monitor import peak_memory_gib


def bench_full(config: RunConfig) -> dict[str, Any]:
    """Run one optimizer step of one clip, and one sampler step between two stills, at a recipe's size and precision.

    returns  {device, threads, base_params, lora_params, frames, height, width, precision, memory, kernels: {kernel: {
             forward_backward_s, optimizer_s, sample_s, loss, sample_mean_abs, peak_gib}}}; on a GPU of the second of two
             runs, since the first one compiles and warms up, but the peak is of both, of what PyTorch reserves; on a CPU
             it is the process's
    """
    if config.diffusion.control:
        raise UserError(
            "diffusion.control is on, but there are no weights of a ControlNet here; switch it off to measure"
        )
    world = init_world(join=False)
    base = make_random_base(world.device, PRECISIONS[config.engine.precision])
    base_params = sum(p.numel() for p in base.unet.parameters())
    kernels = list_kernels(config, world.device)
    plan = choose_plan(config, base.unet.config, base.latent_px, world, base.vae_config)
    batch = make_random_batch(config)
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if world.device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "base_params": base_params,
        "lora_params": 0,
        "frames": make_layout(config.diffusion.layout, config.data.frames).frames,
        "height": config.data.height,
        "width": config.data.width,
        "precision": config.engine.precision,
        "memory": plan,
        "kernels": {},
    }
    runs = 2 if world.device.type == "cuda" else 1
    if len(kernels) > 1:
        base.unet.cpu()  # what each kernel's network is a copy of takes none of their room
    for kernel in kernels:
        # a network of its own, and every kernel starts from the same adapter
        own = base if len(kernels) == 1 else replace(base, unet=copy.deepcopy(base.unet).to(world.device))
        framer, adapter = make_framer(config, own, kernel, plan)
        report["lora_params"] = adapter.flat.numel()
        start = adapter.flat.detach().clone()
        if world.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for _ in range(runs):
            adapter.flat.data.copy_(start)
            engine = PlainEngine({NAME: adapter.flat}, adam_settings(config), 1)
            row = measure_steps(framer, engine, batch, config.optimizer.lr, world.device)
        report["kernels"][kernel] = row | {"peak_gib": round(peak_memory_gib(), 2)}
        del own, framer, adapter, engine
        gc.collect()  # a network refers to itself
        if world.device.type == "cuda":
            torch.cuda.empty_cache()
    return report


def measure_steps(
    framer: Framer, engine: PlainEngine, batch: Batch, lr: float, device: torch.device
) -> dict[str, float]:
    """Time one training step, and one interpolation step."""

    def train() -> Tensor:
        loss_B = framer.compute_loss(batch).loss_B
        engine.backward(loss_B.mean())
        return loss_B.detach()

    forward_backward_s, loss_B = stopwatch(train, device)
    optimizer_s, _ = stopwatch(lambda: torch.tensor(engine.step(lr)), device)
    assert batch.frames_BTHWC is not None
    stills_B2CHW = to_signed(batch.frames_BTHWC)[:, [0, -1]]
    sample_s, frames = stopwatch(
        lambda: framer.generate(stills_B2CHW, batch.fps_B, batch.motion_B, Sampling(1), [0]), device
    )
    return {
        "forward_backward_s": round(forward_backward_s, 3),
        "optimizer_s": round(optimizer_s, 3),
        "sample_s": round(sample_s, 3),
        "loss": loss_B.mean().item(),
        "sample_mean_abs": frames.abs().mean().item(),
    }


def stopwatch(function: Callable[[], Tensor], device: torch.device) -> tuple[float, Tensor]:
    """Seconds of a call, the device's work included, and what it returned."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began_s = time.perf_counter()
    result = function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began_s, result


def list_kernels(config: RunConfig, device: torch.device) -> list[str]:
    """SDPA, and xformers where it runs."""
    kernels = ["sdpa"]
    try:
        kernels.append(choose_attention("xformers", device, PRECISIONS[config.engine.precision]))
    except UserError as error:
        print(f"without xformers: {error}", file=sys.stderr)
    return kernels


def make_random_base(device: torch.device, dtype: torch.dtype) -> Base:
    """Framer's UNet with SVD-XT's VAE and CLIP at their published sizes, random weights, made in place."""
    from diffusers import AutoencoderKLTemporalDecoder
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    with torch.device("meta"):
        unet = FramerUNet.from_config({**SVD_CONFIG, "in_channels": 9})
        vae = AutoencoderKLTemporalDecoder(**VAE_CONFIG)
        encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(**CLIP_CONFIG))
    for i, (part, part_dtype) in enumerate(((unet, dtype), (vae, torch.float32), (encoder, dtype))):
        with quiet_libraries():
            part.to(part_dtype).to_empty(device=device)
        _randomise(part, rng(0, "random_base", i, device))
        part.requires_grad_(False).eval()
    return Base(
        "random", unet, vae, encoder, SCHEDULER, "v", dtype, signature=[], sources={}, files=(), vae_config=vae.config
    )


def make_tiny_base(device: torch.device, dtype: torch.dtype) -> Base:
    """The tiny base's architecture, random weights."""
    parts = tiny.build_unet(), tiny.build_vae(), tiny.build_image_encoder()
    for i, part in enumerate(parts):
        _randomise(part, rng(0, "random_base", i))
        part.to(device, dtype).requires_grad_(False).eval()
    return Base("tiny", *parts, SCHEDULER, "v", dtype, signature=[], sources={}, files=(), vae_config=parts[1].config)


def make_random_batch(config: RunConfig) -> Batch:
    """One clip of noise."""
    data = config.data
    shape = (1, data.frames, data.height, data.width, 3)
    frames = torch.randint(256, shape, dtype=torch.uint8, generator=rng(0, "random_batch"))
    return Batch(frames, torch.tensor([7.0]), torch.tensor([127.0]), [0], ["random"], [])


@torch.no_grad()
def _randomise(part: nn.Module, generator: torch.Generator) -> None:
    # small enough that activations of 16 blocks stay in range; drawn in place, where that takes a second and not a minute
    for name, tensor in part.state_dict().items():
        if tensor.ndim > 1:
            tensor.normal_(0, 0.02, generator=generator)
        else:
            tensor.fill_(float("norm" in name and name.endswith("weight")))
    for name, buffer in part.named_buffers():
        if name.endswith("position_ids"):
            buffer.copy_(torch.arange(buffer.shape[-1]).expand_as(buffer))
