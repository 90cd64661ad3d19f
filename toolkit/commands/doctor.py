"""Looks a recipe over before anything is downloaded or started: what trains, how large it is, how the batch is cut.

Test: pytest tests/commands/test_doctor.py. The UNet is built on meta tensors: shapes without weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from toolkit.config import RunConfig
from toolkit.data.index import open_sources
from toolkit.data.remote import is_remote
from toolkit.diffusion.layout import make_layout
from toolkit.model.base import (
    PRECISIONS,
    build_unet_on_meta,
    check_weights,
    describe_encoders,
    describe_unet,
    latent_px,
    read_parameterization,
)
from toolkit.model.controlnet import find_controlnet
from toolkit.model.lora import dead_targets, match_targets, start_from
from toolkit.model.sources import is_hub_id
from toolkit.model.tuning import check_tuning, choose_trainable
from toolkit.run.cache import check_cache
from toolkit.run.folder import find_adapter, is_hub_adapter
from toolkit.run.framer import check_objective
from toolkit.run.job import check_clips, check_engine, check_looks, total_steps
from toolkit.run.memory import (
    PLANS,
    SHARED_BYTES,
    count_encoder_bytes,
    predict_bytes,
    predict_encoding_bytes,
    why_launched,
)


def examine(config: RunConfig, ranks: int, begun: bool = False) -> dict[str, Any]:
    """Count what a recipe trains, and how its batches fall on the ranks.

    begun    the run has a checkpoint, and goes on from that, whatever became of the adapter that it started from
    returns  {name, base_params, lora_modules, lora_params, dead_modules, extra_params, adapter_mb_fp32, engine,
             global_batch, micro_batch, ranks, accumulation, possible_ranks, clips, optimizer_steps, weights_gb, step_gb,
             encoders_gb, notes}; clips and optimizer_steps are None where the shards are not on this machine; weights_gb are
             the frozen UNet's, step_gb what a step takes beside them under each plan of model.memory, encoders_gb what VAE
             and image encoder take beside both with what encoding takes, 0 where a run needs neither; in 1e9 bytes
    raises   UserError for what a run of so many ranks would refuse about its engine, batch, data, looks at held-out clips,
             objective, adapter to start from, and weights where they are on this machine
    """
    per_rank = check_engine(config, ranks)
    model = config.model
    check_objective(config.diffusion, read_parameterization(model))
    away = check_weights(model)
    start, init_from = None, None if begun else config.lora.init_from
    if init_from is not None and is_hub_adapter(init_from):
        away.append(init_from)  # as the base is, it is fetched by the run
    elif init_from is not None:
        start = find_adapter(init_from)
    if config.diffusion.control and model.controlnet is not None:
        if is_hub_id(model.controlnet):
            away.append(model.controlnet)  # its gigabytes are fetched by the run
        else:
            find_controlnet(model.controlnet, model.controlnet_revision)
    unet, channels = build_unet_on_meta(model), describe_unet(model).get("in_channels", 8)
    vae, clip = describe_encoders(model)
    base_params = sum(p.numel() for p in unet.parameters())
    check_tuning(unet, config)
    unet.requires_grad_(False)
    modules = match_targets(unet, config.lora.targets) if config.tuning == "lora" else []
    dead = find_dead(modules, config)
    parameters = choose_trainable(unet, config)
    if start is not None:
        start_from(unet, parameters, start, signature=None)
    lora_params = sum(p.numel() for name, p in parameters.items() if ".lora_" in name)
    trainable = sum(p.numel() for p in parameters.values())
    weight_bytes = 1 if config.model.quantize else PRECISIONS[config.engine.precision].itemsize
    report: dict[str, Any] = {
        "name": config.name,
        "base_params": base_params,
        "lora_modules": len(modules),
        "lora_params": lora_params,
        "dead_modules": len(dead),
        "extra_params": trainable - lora_params,
        "adapter_mb_fp32": round(trainable * 4 / 1e6, 1),
        "engine": config.engine.kind,
        "global_batch": config.engine.global_batch,
        "micro_batch": config.engine.micro_batch,
        "ranks": ranks,
        "accumulation": per_rank,
        "possible_ranks": list_ranks(config),
        "clips": None,
        "optimizer_steps": config.schedule.steps,
        "weights_gb": round((base_params - trainable + lora_params) * weight_bytes / 1e9, 2),
        "step_gb": {
            plan: round(predict_bytes(config, unet.config, latent_px(vae), plan, ranks) / 1e9, 2) for plan in PLANS
        },
        "encoders_gb": 0.0,
        "notes": [],
    }
    cached = False
    absent = [source for source in config.data.sources if not is_remote(source) and not Path(source).exists()]
    if not absent:
        index = open_sources(config.data, "train")
        check_clips(config, index)
        check_looks(config)
        if index.cached and not away:
            check_cache(config)
        report["clips"], cached = len(index), index.cached
        report["optimizer_steps"] = total_steps(config, len(index))
    else:
        report["notes"].append(
            f"{', '.join(absent)} is not on this machine, so clips and steps are not counted, and encoders_gb is for videos"
        )
    draws = config.data.debug or config.validation.figures_every_steps is not None
    if not cached or draws:
        encoder_bytes = count_encoder_bytes(config, vae, clip) + predict_encoding_bytes(config, vae)
        report["encoders_gb"] = round(encoder_bytes / 1e9, 2)
    if away:
        report["notes"].append(f"not on this machine, so their weights are not checked: {', '.join(away)}")
    report["notes"] += list_dead(dead, config) + list_doubts(config, report["optimizer_steps"])
    if config.engine.kind == "zero2_offload":
        report["notes"].append(
            f"engine.kind zero2_offload moves {SHARED_BYTES * trainable / 1e9:.2f} GB to the host's memory, beside "
            f"{report['weights_gb']} GB of frozen weights that stay, and updates them there: slower, for next to nothing; "
            "take zero2"
        )
    if config.model.cuda_graphs and (reason := why_launched(config)) is not None:
        report["notes"].append(
            f"{reason} keeps steps from being replayed as CUDA graphs: on a GPU each kernel is launched by itself, which "
            "takes longer where kernels are short"
        )
    if channels == 8 and "conv_in" not in config.lora.extra_trainable:
        report["notes"].append(
            "the base reads eight channels, as plain SVD does, so the mask enters it through zeros and it never saw the "
            "conditioning of a last still: train these too with lora.extra_trainable [conv_in,mask_token]"
        )
    return report


def list_ranks(config: RunConfig) -> list[int]:
    """Numbers of ranks that a run can have, and be resumed with: those that share its global batch out evenly."""
    engine = config.engine
    most = engine.global_batch // engine.micro_batch
    fitting = (ranks for ranks in range(1, most + 1) if most % ranks == 0 and ranks % (engine.shard_ranks or 1) == 0)
    return [1] if engine.kind == "plain" else list(fitting)


def find_dead(modules: list[str], config: RunConfig) -> list[str]:
    """Names of the chosen modules whose LoRA cannot learn with this recipe's frames and tokens."""
    frames = make_layout(config.diffusion.layout, config.data.frames).frames
    tokens = 2 if config.diffusion.clip_tokens == "first_last" else 1
    return dead_targets(modules, frames, tokens)


def list_dead(dead: list[str], config: RunConfig) -> list[str]:
    """Say which chosen modules cannot learn, and why."""
    cross = [name for name in dead if ".attn2." in name]
    temporal = [name for name in dead if ".attn2." not in name]
    notes = []
    if cross:
        notes.append(
            f"{len(cross)} modules cannot learn, cross-attention Q and K such as {cross[0]}: diffusion.clip_tokens is "
            f"{config.diffusion.clip_tokens}, one token, and a softmax over one key is 1; take first_last, or other targets"
        )
    if temporal:
        notes.append(
            f"{len(temporal)} modules cannot learn, temporal self-attention Q and K such as {temporal[0]}: "
            f"diffusion.layout is {config.diffusion.layout}, one frame; take middle_in_clip or framer_clip, or other targets"
        )
    return notes


def list_doubts(config: RunConfig, steps: int | None) -> list[str]:
    """Say what is allowed but probably not meant."""
    doubts, warmup, diffusion = [], config.schedule.warmup_steps, config.diffusion
    if steps is not None and warmup >= steps:
        doubts.append(
            f"schedule.warmup_steps is {warmup}, but the run has {steps} steps: the learning rate never reaches its peak"
        )
    elif steps is not None and warmup > 0.3 * steps:
        doubts.append(f"schedule.warmup_steps is {warmup} of {steps} steps: most runs warm up for a tenth or less")
    if diffusion.layout != "spec_middle" and diffusion.scale_conditioning and config.model.base != "tiny":
        doubts.append(
            "diffusion.scale_conditioning is on, but SVD and Framer were trained with unscaled conditioning latents"
        )
    if "mask_token" in config.lora.extra_trainable and diffusion.layout == "spec_middle":
        doubts.append("lora.extra_trainable mask_token cannot learn: in layout spec_middle it never enters the network")
    return doubts
