"""Looks a recipe over before anything is downloaded or started: what trains, how large it is, how the batch is cut.

Test: pytest tests/run/test_doctor.py. The UNet is built on meta tensors: shapes without weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from toolkit.config import RunConfig
from toolkit.data.index import open_shards
from toolkit.model.base import build_unet_on_meta
from toolkit.model.lora import inject_lora
from toolkit.model.tiny import build_unet
from toolkit.run.trainer import check_clips, check_engine, total_steps


def examine(config: RunConfig, ranks: int) -> dict[str, Any]:
    """Count what a recipe trains, and how its batches fall on the ranks.

    returns  {base_params, lora_modules, lora_params, adapter_mb_fp32, accumulation, clips, optimizer_steps, notes};
             clips and optimizer_steps are None where the shards are not on this machine
    raises   UserError for what a run of so many ranks would refuse about its engine, batch and data
    """
    per_rank, _ = check_engine(config, ranks)
    if config.model.base == "tiny":
        with torch.device("meta"):
            unet = build_unet().to("meta")
    else:
        unet = build_unet_on_meta(config.model.base, config.model.unet, config.model.revision)
    base_params = sum(p.numel() for p in unet.parameters())
    unet.requires_grad_(False)
    parameters = inject_lora(unet, config.lora.rank, config.lora.alpha, config.lora.targets, config.seed)
    lora_params = sum(p.numel() for p in parameters.values())
    report: dict[str, Any] = {
        "name": config.name,
        "base_params": base_params,
        "lora_modules": len(parameters) // 2,
        "lora_params": lora_params,
        "adapter_mb_fp32": round(lora_params * 4 / 1e6, 1),
        "ranks": ranks,
        "accumulation": per_rank,
        "clips": None,
        "optimizer_steps": config.schedule.steps,
        "notes": [],
    }
    if Path(config.data.shards).exists():
        index = open_shards(config.data.shards, "train")
        check_clips(config, index)
        report["clips"] = len(index)
        report["optimizer_steps"] = total_steps(config, len(index))
    else:
        report["notes"].append(f"{config.data.shards} is not on this machine, so clips and steps are not counted")
    report["notes"] += list_doubts(config, report["optimizer_steps"])
    return report


def list_doubts(config: RunConfig, steps: int | None) -> list[str]:
    """Say what is allowed but probably not meant."""
    doubts = []
    if steps is not None and config.schedule.warmup_steps >= steps:
        doubts.append(
            f"schedule.warmup_steps is {config.schedule.warmup_steps}, but the run has {steps} steps: "
            "the learning rate never reaches its peak"
        )
    if config.diffusion.clip_tokens == "mean":
        doubts.append(
            "diffusion.clip_tokens is mean, one token: a softmax over one key is 1, so cross-attention Q and K cannot learn"
        )
    if config.diffusion.layout == "spec_middle" and config.lora.targets in ("temporal", "all"):
        doubts.append("diffusion.layout is spec_middle, one frame: temporal self-attention Q and K cannot learn")
    return doubts
