"""Makes the tiny base, once per machine: built from a seed (model/tiny.py), then pretrained on generic moving shapes.

Test: pytest tests/run. It stands in for a base that was "pre-trained on general videos": what it never saw is people, so a
LoRA on people has something to learn.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import torch

from toolkit.config import DiffusionConfig, ModelConfig
from toolkit.data.loader import Batch
from toolkit.data.synth import render_motion
from toolkit.engine.plain import AdamSettings, PlainEngine
from toolkit.engine.world import World, init_world
from toolkit.model.base import load_base
from toolkit.model.quiet import quiet_libraries
from toolkit.model.tiny import make_tiny_base
from toolkit.run.framer import Framer

TINY_FOLDER = Path("bases/tiny_v1")  # the number goes up when the recipe below or model/tiny.py changes
STEPS = 150
CLIPS_PER_STEP = 4
PEAK_LR = 1e-3
SIZE_PX = 64
SEED = 0
OBJECTIVE = DiffusionConfig(layout="spec_middle", noise_sampler="lognormal", lognormal_mean=0.0, loss_space="v")


def find_base(model: ModelConfig, world: World) -> ModelConfig:
    """Turn the base "tiny" into its folder, making it first where it is missing; others pass through."""
    if model.base != "tiny":
        return model
    if world.is_main and not TINY_FOLDER.exists():
        pretrain_tiny_base(TINY_FOLDER, world.device, STEPS)
    world.barrier()
    return model.model_copy(update={"base": str(TINY_FOLDER)})


def pretrain_tiny_base(folder: Path, device: torch.device, steps: int) -> None:
    """Build and pretrain the tiny base aside, then rename it into place."""
    from tqdm import tqdm

    began_s = time.monotonic()
    print(f"making the tiny base in {folder}, once: {steps} steps on moving shapes", flush=True)
    aside = folder.with_name(f"{folder.name}.tmp{os.getpid()}")
    make_tiny_base(aside, SEED)
    base = replace(load_base(ModelConfig(base=str(aside)), device, "fp32"), dtype=torch.bfloat16)  # masters stay fp32
    base.unet.requires_grad_(True)
    with quiet_libraries():
        base.vae.to(torch.bfloat16)  # a quarter of the time; the codec needs no more digits
    framer = Framer(base, OBJECTIVE, window=3, seed=SEED)
    adam = AdamSettings(weight_decay=0.01, beta1=0.9, beta2=0.99, eps=1e-8, max_grad_norm=1.0)
    engine = PlainEngine(dict(base.unet.named_parameters()), adam, accumulation=1)
    for step in tqdm(range(steps), unit="step", desc="pretraining"):
        loss_B, _ = framer.compute_loss(_shapes_batch(step))
        engine.backward(loss_B.mean())
        engine.step(PEAK_LR * min(1, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / steps)))
    base.unet.save_pretrained(aside / "unet", safe_serialization=True)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(aside, folder)
    print(
        f"the tiny base is ready: {time.monotonic() - began_s:.0f} s, last loss {loss_B.mean().item():.3f}", flush=True
    )


def _shapes_batch(step: int) -> Batch:
    positions = list(range(step * CLIPS_PER_STEP, (step + 1) * CLIPS_PER_STEP))
    clips = [torch.from_numpy(render_motion(SEED, k, 3, SIZE_PX)) for k in positions]
    rate_B = torch.full((len(positions),), 4.0)
    return Batch(torch.stack(clips), rate_B, torch.full_like(rate_B, 127.0), positions, [str(k) for k in positions], [])


if __name__ == "__main__":
    find_base(ModelConfig(base="tiny"), init_world(join=False))
