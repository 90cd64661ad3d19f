"""A network for use: a recipe's base with adapters in it, from a run, exported files, or both.

Test: pytest tests/run. The recipe says how the network is fed, so inference cannot disagree with training: it stands in the
run folder, and in the header of every adapter that this toolkit wrote.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from toolkit.config import FED_BY, DataConfig, ModelConfig, RunConfig, load_config, parse_config
from toolkit.engine.world import init_world
from toolkit.errors import UserError
from toolkit.model.attention import set_attention
from toolkit.model.base import Base, load_base
from toolkit.model.compile import compile_blocks
from toolkit.model.controlnet import FramerControlNet, find_controlnet, load_controlnet
from toolkit.model.formats import check_told, read_metadata
from toolkit.model.lora import load_adapter, merge_adapters
from toolkit.model.prepare import prepare_frozen
from toolkit.model.quiet import quiet_libraries
from toolkit.model.sources import fetch_top, is_hub_id
from toolkit.model.tuning import ABOUT_FILE, put_values
from toolkit.run.attention import choose_kernel
from toolkit.run.checkpoint import best_checkpoint, list_checkpoints
from toolkit.run.ema import plan_average, put_together
from toolkit.run.folder import find_adapter, newest_adapter, refuse_no_run
from toolkit.run.framer import Framer, Sampling
from toolkit.run.manifest import MANIFEST, find_fault


@dataclass(frozen=True)
class Source:
    """What to load: a recipe, and adapters with the weight that multiplies alpha / rank of each."""

    config: RunConfig
    adapters: tuple[tuple[Path, float], ...]
    about: dict[str, Any]  # what the first adapter, or the whole UNet, tells of itself
    tuned_unet: Path | None = None  # in place of the recipe's: what a run with tuning full made of it
    ema: float = 0.0  # sigma_rel of the average that stands for what was trained; 0: itself

    @property
    def model(self) -> ModelConfig:
        """What is loaded before adapters are put in."""
        if self.tuned_unet is None:
            return self.config.model
        return self.config.model.model_copy(update={"unet": str(self.tuned_unet), "unet_revision": None})

    @property
    def place(self) -> Path | None:
        """Where the first of what was trained lies; None for a base alone."""
        return self.adapters[0][0] if self.adapters else self.tuned_unet

    @property
    def untuned(self) -> Source:
        """The base alone, as the recipe feeds it."""
        return replace(self, adapters=(), tuned_unet=None, ema=0.0)

    @property
    def precision(self) -> str:
        """A merged UNet's own, since rounding it again would lose the tuning; else the recipe's."""
        return self.about.get("precision", self.config.engine.precision)

    def with_model(self, **changes: Any) -> Source:
        """The same on another base; a base of one's own brings its UNet with it.

        raises  UserError where another UNet would stand in place of what a run made of its own
        """
        changes = {name: value for name, value in changes.items() if value is not None}
        if self.tuned_unet is not None and "unet" in changes:
            raise UserError(
                f"both --unet and {self.tuned_unet} are given, which is a whole UNet (tuning full); give one of them"
            )
        if "base" in changes:
            changes = {"unet": None, "revision": None, "variant": None} | changes
        if "base" in changes or "unet" in changes:
            changes = {"unet_revision": None} | changes
        if "controlnet" in changes:
            changes = {"controlnet_revision": None} | changes
        model = ModelConfig.model_validate(self.config.model.model_dump() | changes)
        return replace(self, config=self.config.model_copy(update={"model": model}))

    def on_shards(self, folder: str) -> Source:
        """The same with other clips to judge on."""
        data = DataConfig.model_validate(self.config.data.model_dump() | {"shards": folder, "mix": None})
        return replace(self, config=self.config.model_copy(update={"data": data}))

    def averaged(self, sigma_rel: float) -> Source:
        """The same with an average over the training, see ema.py; 0 is the weights themselves.

        raises  UserError where there are several adapters or none, or no such average can be put together
        """
        if sigma_rel:
            places = [place for place, _ in self.adapters] or [
                place for place in (self.tuned_unet,) if place is not None
            ]
            if len(places) != 1:
                raise UserError(f"ema is for one run or checkpoint, and here are {len(places)}; leave it out")
            plan_average(places[0], sigma_rel)
        return replace(self, ema=sigma_rel)


def read_run(run: Path, checkpoint: str | None = None) -> tuple[Path, RunConfig]:
    """Find a run's checkpoint, verified, and its recipe.

    checkpoint  latest (None too), the newest good one; best; or one such as step_000200
    raises      UserError where there is none, or it is damaged
    """
    if checkpoint in (None, "latest"):
        return newest_adapter(run), load_config(run / "config.yaml")
    refuse_no_run(run)
    config = load_config(run / "config.yaml")
    if checkpoint == "best":
        return best_checkpoint(run), config
    known = {folder.name: folder for folder in list_checkpoints(run)}
    if checkpoint not in known:
        raise UserError(f"{run} has no checkpoint {checkpoint}; it has {', '.join(known) or 'none'}")
    refuse_damaged(known[checkpoint], "leave --checkpoint out to take the newest good one")
    return known[checkpoint], config


def refuse_damaged(folder: Path, remedy: str) -> None:
    """Raise UserError for what is no whole checkpoint, with what to do."""
    if not (folder / MANIFEST).is_file():
        raise UserError(f"{folder} is no checkpoint: it has no {MANIFEST}; {remedy}")
    if fault := find_fault(folder):
        raise UserError(f"{folder} is damaged: {fault}; {remedy}")


def read_source(
    run: str | None = None,
    adapters: Sequence[str] = (),
    weights: Sequence[float] = (),
    lora_scale: float = 1.0,
    config: str | None = None,
    unet: str | None = None,
    checkpoint: str | None = None,
) -> Source:
    """Find what a command line names.

    run, adapters  one of them at most: a run folder, or folders and files of any exported format
    weights        one per adapter; default 1
    lora_scale     multiplies every weight
    config         a recipe, for what holds none
    unet           a merged export, where neither run nor adapters are given
    checkpoint     of the run, as read_run takes it
    """
    if run is not None and adapters:
        raise UserError("both --run and --adapter are given; give one of them")
    if run is not None and config is not None:
        raise UserError(f"both --run and --config are given, but {run} has its own recipe; give one of them")
    if weights and len(weights) != len(adapters):
        raise UserError(f"{len(weights)} weights for {len(adapters)} adapters; give --weights one number per --adapter")
    found = [find_adapter(adapter) for adapter in adapters]
    if run is not None:
        place, own = read_run(Path(run).expanduser(), checkpoint)
        if own.tuning == "full" and lora_scale != 1:
            raise UserError(
                f"--lora_scale is given, but {run} tuned the UNet's own weights (tuning full); leave it out"
            )
        if own.tuning == "full":
            return Source(own, (), read_merged(place), place)
        found = [place]
    if not found and unet is None:
        raise UserError(
            "nothing to interpolate with; give --run, a run folder, or --adapter, or --unet, a merged export"
        )
    if not found and lora_scale != 1:
        raise UserError("--lora_scale is given, but no adapter; the tuning in a merged UNet cannot be scaled")
    abouts = [read_metadata(place) for place in found] or [read_merged(str(unet))]
    if config is not None or run is not None:
        recipe = load_config(config or Path(str(run)).expanduser() / "config.yaml")
    elif "recipe" in abouts[0]:
        recipe = parse_config(abouts[0]["recipe"], found[0] if found else str(unet))
    else:
        raise UserError(
            f"{adapters[0] if adapters else unet} does not say how it was trained, as exports of this toolkit do; name a "
            "recipe that feeds the network as it was trained: --config RECIPE"
        )
    for place, about in zip(found, abouts, strict=False):
        if other := list_differences(about, recipe.diffusion.model_dump()):
            print(f"note: {place} was trained with {other}")
    scales = [lora_scale * weight for weight in weights or [1.0] * len(found)]
    return Source(recipe, tuple(zip(found, scales, strict=True)), abouts[0])


def list_differences(about: dict[str, Any], diffusion: Mapping[str, Any]) -> str:
    """Say where an adapter's recipe feeds the network otherwise than these settings; empty where it does not."""
    trained = about.get("recipe", {}).get("diffusion", {})
    other = [key for key in FED_BY if key in trained and feeding(trained[key]) != feeding(diffusion[key])]
    return ", ".join(f"{key} {trained[key]} (here it is {diffusion[key]})" for key in other)


def feeding(value: Any) -> Any:
    """The same for settings that feed the network alike: the two clip layouts differ in what training scores."""
    return "framer_clip" if value == "middle_in_clip" else value


def read_merged(place: str | Path, revision: str | None = None) -> dict[str, Any]:
    """What a merged export tells of itself, here or on the hub; empty for a UNet of other programs."""
    folder = fetch_top(str(place), revision) if is_hub_id(str(place)) else Path(place).expanduser()
    file = folder / ABOUT_FILE
    try:
        told = json.loads(file.read_text()) if file.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise UserError(f"cannot read {file}: {error}; export the run again") from None
    return check_told(told, folder)


class Told(NamedTuple):
    """What a network is told of a clip beside its stills; by default what SVD's own pipeline tells it."""

    fps: float = 7.0
    motion: float = 127.0


def told_of(about: dict[str, Any]) -> Told:
    """What a network is told where nobody says otherwise: how its training clips were, as its adapter tells."""
    return Told(**{name: about[name] for name in Told._fields if name in about})


def recipe_sampling(config: RunConfig) -> Sampling:
    """How a recipe samples, where nobody asks for something else."""
    ours = config.validation
    return Sampling(ours.sampler_steps, ours.sampler, ours.min_guidance, ours.max_guidance)


def load_framer(source: Source, steered: bool = False, compiled: bool = False) -> Framer:
    """Load the base with the adapters folded into its weights, and with its ControlNet where trajectories shall steer.

    compiled  its first samplings then take minutes, and later ones of the same size less time

    The weights are read and summed in fp32, and rounded once: a sum of what is rounded already and rounded again would lose
    the small part (docs/LEDGER.md, merging).
    """
    world, config = init_world(join=False), source.config
    model, device = source.model, world.device
    if compiled and "passes" not in model.parts:
        raise UserError(
            "--compile is for lean blocks, and model.blocks of this recipe is without passes; leave --compile out"
        )
    # on a CPU, half precision would be slower than full
    precision = "fp32" if device.type == "cpu" and source.precision == "fp16" else source.precision
    # on the CPU first: a card needs no room for the sum
    base = load_base(model, torch.device("cpu"), precision, torch.float32)
    if source.ema and source.tuned_unet is not None:
        put_values(base.unet, put_together(source.tuned_unet, source.ema))
    for i, (path, weight) in enumerate(source.adapters):
        values = put_together(path, source.ema) if source.ema else None
        load_adapter(base.unet, path, base.signature, f"adapter{i}", weight, values)
    merge_adapters(base.unet)
    with quiet_libraries():
        base.unet.to(base.dtype)
    for part in (base.unet, base.vae, base.image_encoder):
        part.to(device)
    # a run that asked for xformers can be used where there is none
    attention = choose_kernel("sdpa" if model.attention == "sdpa" else "auto", config, world, base.dtype, model.parts)
    set_attention(base.unet, attention)
    controlnet = load_control(model, base, attention) if steered else None
    before = prepare_frozen(base.unet, attention, model.parts)
    if compiled:
        compile_blocks(base.unet)
    return Framer(base, config.diffusion, config.data.frames, config.seed, controlnet, before=before)


def load_control(model: ModelConfig, base: Base, attention: str) -> FramerControlNet:
    """Load the ControlNet of a recipe's model section for a base, beside it."""
    assert model.controlnet is not None
    place = find_controlnet(model.controlnet, model.controlnet_revision)
    controlnet = load_controlnet(place, base.dtype, base.unet).to(base.unet.device)
    shrinks = 2 ** (len(controlnet.config.conditioning_embedding_out_channels) - 1)
    if shrinks != base.latent_px:
        raise UserError(
            f"the ControlNet {model.controlnet} shrinks heatmaps {shrinks} times, the base's VAE pictures {base.latent_px} "
            "times; give the ControlNet of this base"
        )
    set_attention(controlnet, attention)
    return controlnet
