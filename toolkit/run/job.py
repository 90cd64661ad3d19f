"""All parts of a training run, built and checked before any long work: data, network, adapter, engine, where it goes on.

Test: pytest tests/run
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from toolkit.config import RunConfig, load_deepspeed_json
from toolkit.data.clips import ClipSettings
from toolkit.data.index import DatasetIndex, open_sources
from toolkit.data.loader import Batch, make_loader
from toolkit.data.order import ORDER_VERSION, accumulation
from toolkit.engine.plain import AdamSettings, PlainEngine
from toolkit.engine.world import World
from toolkit.engine.zero import ZeroEngine
from toolkit.errors import UserError
from toolkit.model.attention import choose_attention, set_attention
from toolkit.model.base import PRECISIONS, Base, build_unet_on_meta, load_base, read_parameterization
from toolkit.model.controlnet import find_controlnet
from toolkit.model.formats import EXTRA_TENSORS
from toolkit.model.lora import choose_kind, inject_lora, match_targets, start_from
from toolkit.model.sources import find_weights, fingerprint_files
from toolkit.rng import RNG_VERSION
from toolkit.run.cache import check_cache
from toolkit.run.folder import check_folder, find_adapter, find_resume, prepare_folder
from toolkit.run.framer import Framer, check_objective
from toolkit.run.inference import load_control
from toolkit.run.ledger import bad_limit
from toolkit.run.pretrain import find_base

LICENCE_NOTE = (
    "an adapter follows the licence of its base: Stability AI's for Stable Video Diffusion; Framer's authors "
    "publish their weights for academic use"
)


@dataclass(frozen=True)
class Job:
    """All parts of a run, built and checked, standing at step `start` of `total`."""

    framer: Framer
    engine: PlainEngine | ZeroEngine
    index: DatasetIndex
    identity: dict[str, Any]  # fingerprints that a checkpoint must share
    about: dict[str, Any]  # what the adapter's file tells of itself
    accumulation: int
    start: int
    total: int
    lock: IO[str] | None  # the run folder's, held by the main rank as long as the job lives


def build_job(config: RunConfig, world: World, fresh: bool) -> Job:
    """Build every part; all that can be wrong with the user's input is found here, before any long work."""
    per_rank, deepspeed_settings = check_engine(config, world.size)
    attention = choose_attention(config.model.attention, world.device, PRECISIONS[config.engine.precision])
    index = open_sources(config.data, "train")
    check_clips(config, index)
    total = total_steps(config, len(index))
    if not fresh:
        check_folder(config)
    start = find_adapter(Path(config.lora.init_from)) if config.lora.init_from is not None else None
    model = find_base(config.model, world)
    if index.cached:
        check_cache(config, model)
    check_objective(config.diffusion, read_parameterization(model))
    choose_kind(build_unet_on_meta(model), config.lora)  # refuses what matches nothing, before weights are read
    if config.diffusion.control:
        find_controlnet(str(config.model.controlnet), config.model.controlnet_revision)
    base = load_base(model, world.device, config.engine.precision)
    controlnet = load_control(config.model, base, attention) if config.diffusion.control else None
    if controlnet is not None and config.model.gradient_checkpointing:
        controlnet.enable_gradient_checkpointing()  # a trained mask_token sends gradients through it
    framer = Framer(base, config.diffusion, config.data.frames, config.seed, controlnet)
    identity = identify(config, base, index)
    parameters = prepare_unet(base, config, attention, start)
    lock = prepare_folder(config, fresh) if world.is_main else None  # last: nothing is moved aside for a faulty recipe
    resume = find_resume(config, identity, world)
    adam = AdamSettings(**config.optimizer.model_dump(exclude={"lr"}))
    engine: PlainEngine | ZeroEngine
    if config.engine.kind == "plain":
        engine = PlainEngine(parameters, adam, per_rank)
    else:
        engine = ZeroEngine(base.unet, parameters, adam, per_rank, config.engine.micro_batch, deepspeed_settings)
    if resume.tensors is not None:
        engine.scatter(resume.tensors, resume.step)
    if world.is_main:
        announce(config, index, attention, sum(p.numel() for p in parameters.values()), resume.step, total, world.size)
    return Job(
        framer, engine, index, identity, describe_adapter(config, base, index), per_rank, resume.step, total, lock
    )


def check_engine(config: RunConfig, ranks: int) -> tuple[int, dict[str, Any]]:
    """Refuse an engine that cannot run on so many ranks; returns micro-batches per rank and step, and DeepSpeed's JSON."""
    per_rank = accumulation(config.engine.global_batch, config.engine.micro_batch, ranks)
    if config.engine.kind == "zero2":
        return per_rank, load_deepspeed_json(config.engine.deepspeed)
    if ranks > 1:
        raise UserError(f"engine.kind plain runs one process, not {ranks}; use zero2, or start one process")
    return per_rank, {}


def check_clips(config: RunConfig, index: DatasetIndex) -> None:
    """Refuse data that cannot fill a batch, or of which too much is too short for the window."""
    span = (config.data.frames - 1) * config.data.stride + 1
    usable = sum(row.clip.frames >= span for row in index.rows)
    if usable < config.engine.global_batch:
        raise UserError(
            f"{' + '.join(config.data.sources)} holds {usable} training clips of {span} frames or more, fewer than one "
            f"batch (engine.global_batch {config.engine.global_batch}); pack more videos, or lower engine.global_batch, "
            "data.frames or data.stride"
        )
    if len(index) - usable > bad_limit(config.data.max_bad_fraction, len(index)):
        raise UserError(
            f"{len(index) - usable} of {len(index)} training clips have fewer than the {span} frames that data.frames "
            f"{config.data.frames} at data.stride {config.data.stride} need; lower one of them, or raise "
            "data.max_bad_fraction to train on the others"
        )


def prepare_unet(
    base: Base, config: RunConfig, attention: str, start: Path | None = None
) -> dict[str, torch.nn.Parameter]:
    """Put the adapter, the attention kernel and checkpointing into the frozen UNet; returns what trains, by name.

    start  an adapter whose values the new one takes over
    """
    parameters = inject_lora(base.unet, config.lora, config.seed)
    if start is not None:
        start_from(base.unet, parameters, start, base.signature)
    set_attention(base.unet, attention)
    if config.model.gradient_checkpointing:
        base.unet.enable_gradient_checkpointing()
    return parameters


def identify(config: RunConfig, base: Base, index: DatasetIndex) -> dict[str, Any]:
    """What must be as it was for a run to go on exactly: weights, data, and what the same seed draws."""
    identity: dict[str, Any] = {
        "base": base.name, "base_fingerprint": fingerprint_files(base.files), "data_fingerprint": index.fingerprint,
        "order_version": ORDER_VERSION, "rng_version": RNG_VERSION,
    }  # fmt: skip
    if config.diffusion.control:
        assert config.model.controlnet is not None  # checked by the config
        place = find_controlnet(config.model.controlnet, config.model.controlnet_revision)
        identity["controlnet_fingerprint"] = fingerprint_files(find_weights(place, None).files)
    return identity


def describe_adapter(config: RunConfig, base: Base, index: DatasetIndex) -> dict[str, Any]:
    """What an adapter's file tells of itself wherever it goes: enough to feed its network as it was trained."""
    lora = config.lora
    return {
        "base": base.name, "base_files": base.sources, "base_signature": base.signature,
        "rank": lora.rank, "alpha": lora.alpha, "targets": lora.targets,
        "modules": len(match_targets(base.unet, lora.targets)),
        "extras": [name for extra in lora.extra_trainable for name in EXTRA_TENSORS[extra]],
        "fps": statistics.median(row.clip.fps / config.data.stride for row in index.rows),
        "motion": statistics.median(row.clip.motion for row in index.rows),
        "licence": LICENCE_NOTE, "recipe": config.model_dump(mode="json"),
    }  # fmt: skip


def make_batches(config: RunConfig, job: Job, world: World) -> Iterator[Batch]:
    """This rank's micro-batches from the job's start to its end."""
    return make_loader(
        job.index,
        job.index.order(config.seed),
        clip_settings(config),
        start_step=job.start,
        stop_step=job.total,
        global_batch=config.engine.global_batch,
        micro_batch=config.engine.micro_batch,
        rank=world.rank,
        world=world.size,
        workers=config.data.workers,
    )


def clip_settings(config: RunConfig) -> ClipSettings:
    """How a recipe wants its windows cut."""
    data = config.data
    return ClipSettings(data.frames, data.height, data.width, (data.stride,), data.flip, data.random_crop)


def total_steps(config: RunConfig, clips: int) -> int:
    """Optimizer steps of a run: given, or enough for the epochs; the last batch may borrow from the next epoch."""
    if config.schedule.steps is not None:
        return config.schedule.steps
    assert config.schedule.epochs is not None  # checked by the config
    return math.ceil(config.schedule.epochs * clips / config.engine.global_batch)


def announce(
    config: RunConfig, index: DatasetIndex, attention: str, trainable: int, start: int, total: int, ranks: int
) -> None:
    """Say what starts, and where it writes."""
    engine = config.engine
    print(
        f"{config.name}: {len(index):,} clips, {total:,} steps of {engine.global_batch} clips "
        f"({engine.micro_batch} x {engine.global_batch // engine.micro_batch // ranks} x {ranks} ranks), "
        f"{trainable:,} trainable parameters, {engine.precision}, attention {attention}, engine {engine.kind}"
    )
    if start >= total:
        print(f"the run is finished ({total} steps); --fresh starts anew")
    elif start:
        print(f"resuming after step {start}")
    print(f"writing to {config.folder}; watch with: tensorboard --logdir {config.runs_dir}", flush=True)
