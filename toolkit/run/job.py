"""All parts of a training run, built and checked before any long work: data, network, adapter, engine, where it goes on.

Test: pytest tests/run
"""

from __future__ import annotations

import contextlib
import json
import math
import statistics
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import IO, Any

import torch

from toolkit.config import ZERO_STAGES, RunConfig, flatten_config, load_config, load_deepspeed_json, parse_config
from toolkit.data.clips import ClipSettings
from toolkit.data.index import DatasetIndex, open_sources
from toolkit.data.loader import Batch, make_loader
from toolkit.data.order import ORDER_VERSION, accumulation
from toolkit.engine.fsdp2 import Fsdp2Engine
from toolkit.engine.plain import AdamSettings, PlainEngine
from toolkit.engine.world import World, is_restart
from toolkit.engine.zero import ZeroEngine
from toolkit.errors import UserError, printable
from toolkit.model.base import PRECISIONS, Base, build_unet_on_meta, load_base, load_encoders, read_parameterization
from toolkit.model.compile import compile_blocks
from toolkit.model.controlnet import find_controlnet
from toolkit.model.flat import NAME as FLAT
from toolkit.model.flat import FlatAdapter
from toolkit.model.formats import EXTRA_TENSORS, read_metadata
from toolkit.model.lora import match_targets, start_from
from toolkit.model.prepare import Plan, prepare_unet, tell_parts
from toolkit.model.sources import find_weights, fingerprint_files
from toolkit.model.tuning import check_tuning, choose_trainable
from toolkit.rng import RNG_VERSION
from toolkit.run.attention import choose_kernel
from toolkit.run.best import Best, Look, count_misses, look_of
from toolkit.run.cache import check_cache
from toolkit.run.checkpoint import check_space, list_checkpoints
from toolkit.run.ema import Averages
from toolkit.run.folder import (
    INEXACT,
    Resume,
    await_folder,
    check_folder,
    find_adapter,
    find_resume,
    prepare_folder,
    record_start,
    refuse_closed,
)
from toolkit.run.framer import Framer, check_objective
from toolkit.run.gallery import Gallery
from toolkit.run.inference import load_control, read_merged, recipe_sampling
from toolkit.run.judge import check_gaps, find_trained, own_gaps, read_lpips
from toolkit.run.ledger import bad_limit
from toolkit.run.manifest import find_fault
from toolkit.run.memory import choose_parts, choose_plan, choose_replay, why_launched
from toolkit.run.validate import Validator
from toolkit.run.writer import CheckpointWriter

LICENCE_NOTE = (
    "an adapter follows the licence of its base: Stability AI's for Stable Video Diffusion; Framer's authors "
    "publish their weights for academic use"
)


# fields that may differ from one machine of a run to another: where the same things lie, and how they are fetched
PLACES = ("runs_dir", "data.shards", "data.mix", "data.cache_", "data.workers", "model.base", "model.unet",
          "model.controlnet", "lora.init_from", "validation.lpips", "engine.deepspeed")  # fmt: skip

Engine = PlainEngine | ZeroEngine | Fsdp2Engine


@dataclass(frozen=True)
class Job:
    """All parts of a run, built and checked, standing where it goes on, of `total` steps."""

    framer: Framer
    adapter: FlatAdapter
    engine: Engine
    index: DatasetIndex
    validator: Validator | None
    gallery: Gallery | None
    identity: dict[str, Any]  # fingerprints that a checkpoint must share
    look: Look  # at held-out clips
    about: dict[str, Any]  # what the adapter's file tells of itself
    computed_by: str  # kernel, blocks and memory plan
    accumulation: int
    resume: Resume
    total: int
    # the main rank's own
    averages: Averages | None
    writer: CheckpointWriter | None
    lock: IO[str] | None  # of the run folder, as long as the job lives


def build_job(config: RunConfig, world: World, fresh: bool, allow_change: bool = False) -> Job:
    """Build every part; all that can be wrong with the user's input is found here, before any long work.

    Arguments as train has them.
    """
    per_rank = check_engine(config, world.size)
    recipe = {name: value for name, value in flatten_config(config).items() if not name.startswith(PLACES)}
    refuse_other_ranks(recipe | {"fresh": fresh, "allow_change": allow_change}, world)
    fresh = fresh and not goes_on_by_itself(config.folder, world)
    parts = choose_parts(config)
    index = open_sources(config.data, "train")
    check_clips(config, index)
    held_out = check_looks(config)
    refuse_closed(config.folder)
    changed = "" if fresh else check_folder(config, allow_change)
    begun = not fresh and list_checkpoints(config.folder)  # its own adapter is further than the one it started from
    start = find_adapter(config.lora.init_from) if config.lora.init_from is not None and not begun else None
    if world.is_main:
        warn_of_trained(config, start, bool(begun))
        if config.model.unet is not None:
            warn_of_borrowed(Path(config.model.unet))
    model = config.model
    if index.cached:
        check_cache(config)
    check_objective(config.diffusion, read_parameterization(model))
    check_tuning(build_unet_on_meta(model), config)  # before weights are read
    if config.diffusion.control:
        find_controlnet(str(config.model.controlnet), config.model.controlnet_revision)
    attention = choose_kernel(config.model.attention, config, world, PRECISIONS[config.engine.precision], parts)
    generates = config.validation.figures_every_steps is not None
    encoders = not index.cached or config.data.debug or generates  # which decode what is drawn
    base = load_base(model, world.device, config.engine.precision, encoders=encoders)
    plan = choose_plan(config, base.unet.config, base.latent_px, world, None if index.cached else base.vae_config)
    framer, adapter = make_framer(config, base, attention, plan, start)
    compiled = ", compiled at the first step" if config.model.compile else ""
    computed_by = f"attention {attention}, blocks {tell_parts(parts)}{compiled}, memory {plan}"
    trainable = adapter.flat.numel()
    identity, look = identify(config, base, index), look_of(config)
    refuse_other_ranks(identity | {"held-out clips": look.get("held_out")}, world)
    check_space(config.folder, base.unet, adapter.shapes, checkpoints=2, ema=config.checkpoint.ema)
    lock = prepare_folder(config, fresh) if world.is_main else None  # last: nothing is moved aside for a faulty recipe
    resume = find_resume(config, identity, adapter.shapes, look, world, allow_change)
    if world.is_main:
        if fresh:
            print("begun anew; give the command without --fresh from now on, or it begins anew once more")
        if changed:
            print(f"going on with another recipe, so not as the run was begun: {changed}")
        record_start(config)
        if resume.computed_by not in ("", computed_by):  # another card, or less room on it
            print(f"{resume.computed_by} then, {computed_by} now: {INEXACT}", file=sys.stderr)
    await_folder(config, world)
    total = total_steps(config, len(index), resume.step, resume.k_next)
    engine = make_engine(config, base.unet, adapter, per_rank)
    saved = adapter.join(resume.tensors) if resume.tensors is not None else None
    if saved is not None:
        engine.scatter(saved, resume.updates)
    averaged = config.checkpoint.ema and world.is_main
    averages = Averages(adapter, resume.updates, saved[FLAT] if saved is not None else None) if averaged else None
    validator = (
        Validator(config, held_out, index, clip_settings(config), framer, world) if held_out is not None else None
    )
    if validator is not None and not encoders:  # its clips are videos still
        validator.encode(*load_encoders(model, world.device, config.engine.precision))
    gallery = Gallery(config, framer, world) if generates else None
    writer = CheckpointWriter(config.folder, config.checkpoint) if world.is_main else None
    if world.is_main:
        announce(
            config, index, computed_by + tell_launches(config, world.device), trainable, resume.step, total, world.size
        )
    about = describe_adapter(config, base, index)
    return Job(
        framer=framer,
        adapter=adapter,
        engine=engine,
        index=index,
        validator=validator,
        gallery=gallery,
        identity=identity,
        look=look,
        about=about,
        computed_by=computed_by,
        accumulation=per_rank,
        # without views of a file, which would take its room on the disk to the end of the run
        resume=replace(resume, tensors=None),
        total=total,
        averages=averages,
        writer=writer,
        lock=lock,
    )


def refuse_other_ranks(own: Mapping[str, Any], world: World) -> None:
    """Refuse a rank that was started with something else than the main one, naming it. All ranks call it, and all refuse.

    own  what has to be the same on all, as JSON has it
    """
    main, *others = map(json.loads, world.gather_texts(json.dumps(own)))
    for rank, other in enumerate(others, start=1):
        rows = [
            f"{name} is {other[name]!r} there, {main[name]!r} on rank 0" for name in own if other[name] != main[name]
        ]
        if rows:
            raise UserError(
                f"rank {rank} was started with something else than rank 0 ({'; '.join(rows)}); give the same command on "
                "every machine, and the same data and weights"
            )


def goes_on_by_itself(folder: Path, world: World) -> bool:
    """Whether a launcher has started its job again after the same command began this run: --fresh is for the first start."""
    started = folder / "env.json"
    begun = world.is_main and is_restart() and started.exists()
    return bool(world.broadcast_int(int(begun and json.loads(started.read_text())["command"] == sys.argv)))


def check_engine(config: RunConfig, ranks: int) -> int:
    """Refuse an engine that cannot run on so many ranks; returns micro-batches per rank and optimizer step."""
    engine, kind = config.engine, config.engine.kind
    per_rank = accumulation(engine.global_batch, engine.micro_batch, ranks)
    if kind in ZERO_STAGES:
        load_deepspeed_json(engine)
    elif engine.deepspeed is not None:
        raise UserError(f"engine.deepspeed is {engine.deepspeed}, but engine.kind {kind} is not DeepSpeed; take it out")
    if kind == "plain" and ranks > 1:
        raise UserError(f"engine.kind plain runs one process, not {ranks}; use zero2, or start one process")
    if engine.shard_ranks is not None and (kind != "fsdp2" or ranks % engine.shard_ranks):
        raise UserError(
            f"engine.shard_ranks is {engine.shard_ranks}, which is for engine.kind fsdp2 and must divide the ranks; here "
            f"the kind is {kind} with {ranks} ranks"
        )
    return per_rank


def make_engine(config: RunConfig, unet: torch.nn.Module, adapter: FlatAdapter, per_rank: int) -> Engine:
    """Give what trains of a network to the recipe's engine; per_rank: micro-batches per optimizer step."""
    engine, adam, parameters = config.engine, adam_settings(config), {FLAT: adapter.flat}
    if engine.kind == "plain":
        return PlainEngine(parameters, adam, per_rank)
    if engine.kind == "fsdp2":
        return Fsdp2Engine(adapter, parameters, adam, per_rank, engine.shard_ranks)
    # of the frozen network ZeRO-3 keeps a part on each rank; what other engines do not shard, they need not see
    model = torch.nn.ModuleList([unet, adapter]) if engine.kind == "zero3" else adapter
    return ZeroEngine(model, parameters, adam, per_rank, engine.micro_batch, load_deepspeed_json(engine))


def adam_settings(config: RunConfig) -> AdamSettings:
    """What a recipe says of AdamW beside the learning rate."""
    return AdamSettings(**config.optimizer.model_dump(include={field.name for field in fields(AdamSettings)}))


def check_looks(config: RunConfig) -> DatasetIndex | None:
    """Refuse looks at held-out clips that cannot be taken; returns the validation split, where there are losses on it."""
    if config.validation.figures_every_steps is not None:
        check_gaps(config, own_gaps(config))
        read_lpips(config, config.validation.lpips)
        recipe_sampling(config)
    return open_held_out(config)


def open_held_out(config: RunConfig) -> DatasetIndex | None:
    """The validation split, where a recipe takes losses on it; raises UserError where no clip of it fills a window."""
    if config.validation.every_steps is None:
        return None
    index, span = open_sources(config.data, "val"), clip_settings(config).least_frames
    if not any(row.clip.frames >= span for row in index.rows):
        raise UserError(
            f"no held-out clip of {' + '.join(config.data.sources)} has the {span} frames that data.frames "
            f"{config.data.frames} at data.stride {config.data.strides[0]} need; lower one of them, or pack longer clips"
        )
    return index


def check_clips(config: RunConfig, index: DatasetIndex) -> None:
    """Refuse data that cannot fill a batch, or of which too much is too short for the window."""
    stride, span = config.data.strides[0], clip_settings(config).least_frames
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
            f"{config.data.frames} at data.stride {stride} need; lower one of them, or raise "
            "data.max_bad_fraction to train on the others"
        )


def warn_of_trained(config: RunConfig, start: Path | None, begun: bool) -> None:
    """Say where held-out clips are of videos that the run, or what it starts from, was trained on before.

    Packed anew with more videos, some that were trained on may be held out. A run is told when its data changes.

    start  an adapter that the run starts from
    begun  the run has a checkpoint
    """
    trained_on = [load_config(config.folder / "config.yaml").data] if begun else []
    for place, read in ((start, read_metadata), (config.model.unet, read_merged)):
        # what other programs or older versions wrote tells no recipe, or another one
        with contextlib.suppress(UserError):
            if place is not None and Path(place).exists():
                trained_on.append(parse_config(read(Path(place)).get("recipe"), place).data)
    if trained := find_trained(trained_on, config.data):
        print(
            f"warning: {len(trained)} held-out clips are, by name, of videos that were trained on before, such as "
            f"{printable(next(iter(trained.values())))}, so what is measured on them flatters; to hold out the same videos "
            "as before, name them in the column split of a list for shards/pack.py --captions",
            file=sys.stderr,
        )


def warn_of_borrowed(unet: Path) -> None:
    """Say so of a UNet among a run's checkpoints that it may not stay there: unlike an adapter, it is read at each start."""
    if unet.parent.name == "checkpoints" and (unet.parent.parent / "config.yaml").exists():
        print(
            f"warning: model.unet {unet} is a checkpoint that its own run deletes once it has saved newer ones, and "
            "without it this run can neither be resumed nor used; copy it elsewhere, and name the copy",
            file=sys.stderr,
        )


def make_framer(
    config: RunConfig, base: Base, attention: str, plan: Plan, start: Path | None = None
) -> tuple[Framer, FlatAdapter]:
    """Put an adapter, the attention kernel and a memory plan into a frozen base; returns the adapter too.

    start  an adapter whose values the new one takes over
    """
    controlnet = load_control(config.model, base, attention) if config.diffusion.control else None
    if controlnet is not None and plan != "fast":
        controlnet.enable_gradient_checkpointing()  # a trained mask_token sends gradients through it
    parameters = choose_trainable(base.unet, config)
    if start is not None:
        start_from(base.unet, parameters, start, base.signature)
    trainable = prepare_unet(
        base.unet, parameters, base.dtype, attention, plan, choose_parts(config), config.model.quantize
    )
    if config.model.compile:
        compile_blocks(base.unet)
    if choose_replay(config, base.unet.device):
        trainable.replay(base.unet)
    window, before = config.data.frames, trainable.begin
    return Framer(base, config.diffusion, window, config.seed, controlnet, before=before), trainable.adapter


def tell_launches(config: RunConfig, device: torch.device) -> str:
    """How the kernels of a training pass come to a GPU; empty for a CPU."""
    if device.type != "cuda":
        return ""
    reason = why_launched(config)
    return ", replayed as CUDA graphs" if reason is None else f", launched kernel by kernel ({reason})"


def identify(config: RunConfig, base: Base, index: DatasetIndex) -> dict[str, Any]:
    """What must be as it was for a run to go on exactly: weights, data, and what the same seed draws."""
    identity: dict[str, Any] = {
        "base_fingerprint": fingerprint_files(base.files), "data_fingerprint": index.fingerprint,
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
    adapter = {} if config.tuning == "full" else {
        "rank": lora.rank, "alpha": lora.alpha, "targets": lora.targets,
        "modules": len(match_targets(base.unet, lora.targets)),
        "extras": [name for extra in lora.extra_trainable for name in EXTRA_TENSORS[extra]],
    }  # fmt: skip
    return adapter | {
        "base": base.name, "base_files": base.sources, "base_signature": base.signature,
        "fps": statistics.median(row.clip.fps / statistics.median(config.data.strides) for row in index.rows),
        "motion": statistics.median(row.clip.motion for row in index.rows),
        "licence": LICENCE_NOTE, "recipe": config.model_dump(mode="json"),
    }  # fmt: skip


def make_batches(config: RunConfig, job: Job, world: World) -> Iterator[Batch]:
    """This rank's micro-batches from the job's start to its end."""
    return make_loader(
        job.index,
        job.index.order(config.seed),
        clip_settings(config),
        start_step=job.resume.step,
        stop_step=job.total,
        global_batch=config.engine.global_batch,
        micro_batch=config.engine.micro_batch,
        rank=world.rank,
        world=world.size,
        origin=job.resume.k_next - job.resume.step * config.engine.global_batch,
        workers=config.data.workers,
    )


def clip_settings(config: RunConfig) -> ClipSettings:
    """How a recipe wants its windows cut."""
    data = config.data
    size = data.height, data.width
    return ClipSettings(
        data.frames, *size, data.strides, data.flip, data.reverse, data.random_crop, matched=config.diffusion.control
    )


def total_steps(config: RunConfig, clips: int, done: int = 0, done_clips: int = 0) -> int:
    """Optimizer steps of a run: given, or enough for the epochs; the last batch may borrow from the next epoch.

    done  steps that took done_clips clips, perhaps with another global batch
    """
    if config.schedule.steps is not None:
        return config.schedule.steps
    assert config.schedule.epochs is not None  # checked by the config
    return done + max(0, math.ceil((config.schedule.epochs * clips - done_clips) / config.engine.global_batch))


def is_finished(config: RunConfig, clips: int) -> bool:
    """Whether a run of just this recipe stands in its folder, with a checkpoint of its last step, or ended by patience.

    clips  that it trains on
    """
    checkpoints = list_checkpoints(config.folder)
    if not checkpoints or load_config(config.folder / "config.yaml") != config or find_fault(checkpoints[-1]):
        return False
    state = json.loads((checkpoints[-1] / "state.json").read_text())
    best = Best(config.validation, misses=count_misses(state, look_of(config)))
    return state["step"] >= total_steps(config, clips, state["step"], state["k_next"]) or best.is_over


def announce(
    config: RunConfig, index: DatasetIndex, computed_by: str, trainable: int, start: int, total: int, ranks: int
) -> None:
    """Say what starts, and where it writes."""
    engine = config.engine
    print(
        f"{config.name}: {len(index):,} clips, {total:,} steps of {engine.global_batch} clips "
        f"({engine.micro_batch} x {engine.global_batch // engine.micro_batch // ranks} x {ranks} ranks), "
        f"{trainable:,} trainable parameters, {engine.precision}, {computed_by}, engine {engine.kind}"
    )
    if start >= total:
        print(f"the run is finished ({total} steps); --fresh starts anew")
    elif start:
        print(f"resuming after step {start}")
    print(f"writing to {config.folder}; watch with: tensorboard --logdir {config.runs_dir}", flush=True)
