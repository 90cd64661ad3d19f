"""Who is judged by launch/evaluate.py: tuned networks, values of a sweep, and the untuned bases they are compared with.

Test: pytest tests/commands/test_evaluate.py.
"""

from __future__ import annotations

import difflib
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from toolkit.config import FED_BY, NETWORK_FIELDS, RunConfig
from toolkit.data.index import open_sources
from toolkit.errors import UserError, printable
from toolkit.metrics import Distance, Features
from toolkit.run.framer import NotFinite, Sampling, to_uint8
from toolkit.run.inference import Source, feeding, load_framer, read_source, recipe_sampling
from toolkit.run.judge import Windows, average_frames, find_trained, make_window, score_frames, score_whole

SWEEPABLE = ("lora_scale", "ema", "sampler_steps", "max_guidance")
RESERVED = ("linear", "base", "true")  # names of contenders that nobody trained
# of a recipe: where contenders that are judged together must agree, so that the same frames are made of the same pictures
SPLIT_FIELDS = ("frames", "height", "width")


@dataclass(frozen=True)
class Contender:
    """A network, how it samples, and the label of the untuned base that it is compared with."""

    source: Source
    sampling: Sampling
    base: str


@dataclass(frozen=True)
class Networks:
    """What judges beside formulas, each where its weights are given."""

    lpips: Distance | None = None
    fvd: Features | None = None


@dataclass
class Result:
    """What a contender made of the windows of a gap: figures {name: (B,)}, and the middle frames, (B, H, W, 3) uint8."""

    figures: dict[str, Tensor]
    of_frames: dict[str, Tensor]  # those that each frame between the ends has, (B, T - 2)
    middle_BHWC: Tensor
    features_BD: Tensor | None  # of the windows as videos, for FVD


def read_sources(
    runs: Sequence[str], adapters: Sequence[str], base: str | None, checkpoint: str | None = None
) -> dict[str, Source]:
    """Find what is judged, by the names it goes by: "tuned" where it is one, else as far as they differ.

    checkpoint  of each run, as inference.read_run takes it
    """
    if checkpoint is not None and not runs:
        raise UserError("--checkpoint is of a run; give --run as well, or the checkpoint's own path as --adapter")
    if not runs and not adapters:
        raise UserError(
            "nothing to evaluate; give --run, a run folder, or --adapter, a checkpoint or an exported adapter"
        )
    places = [Path(place).expanduser().absolute() for place in (*runs, *adapters)]
    if len(set(places)) < len(places):
        raise UserError(f"{max(places, key=places.count)} is given twice; name each run and adapter once")
    found = [read_source(run, checkpoint=checkpoint) for run in runs]
    found += [read_source(adapters=[adapter]) for adapter in adapters]
    names = ["tuned"] if len(places) == 1 else [place.name for place in places]
    if len({*names, *RESERVED}) < len(names) + len(RESERVED):
        names = [str(place) for place in places]
    # one seed, so that all draw the same noise
    seed = found[0].config.seed
    seeded = [replace(own, config=own.config.model_copy(update={"seed": seed})) for own in found]
    return {name: own.with_model(base=base) for name, own in zip(names, seeded, strict=True)}


def refuse_other_split(sources: dict[str, Source]) -> None:
    """Refuse to judge together what was not trained to make the same frames of the same clips, saying what differs."""
    (first, own), *others = sources.items()
    fingerprint = open_sources(own.config.data, "val").fingerprint
    for name, other in others:
        mine, theirs = own.config, other.config
        differing = [
            f"data.{field} is {getattr(mine.data, field)} and {getattr(theirs.data, field)}"
            for field in SPLIT_FIELDS
            if getattr(mine.data, field) != getattr(theirs.data, field)
        ]
        layouts = mine.diffusion.layout, theirs.diffusion.layout
        if layouts.count("spec_middle") == 1:  # which makes the middle frame alone
            differing.append(f"diffusion.layout is {layouts[0]} and {layouts[1]}")
        if open_sources(theirs.data, "val").fingerprint != fingerprint:
            wheres = (" + ".join(config.data.sources) for config in (mine, theirs))
            differing.append(f"the held-out clips of {' and '.join(wheres)} are not the same")
        if differing:
            raise UserError(
                f"{first} and {name} cannot be judged together: {'; '.join(differing)}; evaluate one after the other"
            )


def warn_of_sampling(sources: dict[str, Source], sampling: Sampling) -> None:
    """Say whose recipe samples otherwise than all are sampled here."""
    for name, source in sources.items():
        own = recipe_sampling(source.config)
        if own != sampling:
            here, there = _tell(sampling, own), _tell(own, sampling)
            print(f"note: all are sampled by {here}; {name}'s own recipe has {there}", file=sys.stderr)


def _tell(sampling: Sampling, other: Sampling) -> str:
    """Where it differs from another, in words."""
    return ", ".join(f"{key} {value}" for key, value in vars(sampling).items() if value != vars(other)[key])


def warn_of_trained(sources: Iterable[Source], judged: RunConfig, keys: Sequence[str]) -> None:
    """Say where clips that are judged, by their keys, are of videos that were trained on."""
    trained = find_trained((source.config.data for source in sources), judged.data)
    if seen := [trained[key] for key in keys if key in trained]:
        print(
            f"warning: {len(seen)} of the {len(keys)} clips are, by name, of videos that were trained on, such as "
            f"{printable(seen[0])}",
            file=sys.stderr,
        )


def list_contenders(sources: dict[str, Source], sampling: Sampling, sweep: str | None) -> dict[str, Contender]:
    """The tuned networks, those of a sweep, and the untuned bases, one for all that are fed alike.

    Tuned ones come first: what is wrong with an adapter is told at once.
    raises  UserError for a sweep that cannot be
    """
    tuned: dict[str, Contender] = {}
    bases: dict[str, Contender] = {}
    for name, source in sources.items():
        label = next((label for label, other in bases.items() if is_fed_alike(other.source, source)), None)
        if label is None:
            label = f"base of {name}" if bases else "base"
            bases[label] = Contender(source.untuned, sampling, label)
        tuned[name] = Contender(source, sampling, label)
    if sweep is not None:
        if len(sources) > 1:
            raise UserError("--sweep is for one run or adapter; evaluate them one after another")
        field, values = parse_sweep(sweep)
        (source,) = sources.values()
        for value in values:
            swept = apply_sweep(Contender(source, sampling, "base"), field, value)
            # a base that were sampled otherwise would have the sampler's part counted as tuning's
            if swept.sampling != sampling:
                label = f"base, {field} {value:g}"
                swept = replace(swept, base=label)
                bases[label] = Contender(source.untuned, swept.sampling, label)
            tuned[f"{field} {value:g}"] = swept
    return tuned | bases


def is_fed_alike(a: Source, b: Source) -> bool:
    """Whether without adapters the two are the same network, fed in the same way."""
    alike = [
        (
            own.precision,
            [getattr(own.config.model, field) for field in NETWORK_FIELDS],
            [feeding(getattr(own.config.diffusion, field)) for field in (*FED_BY, "control")],
        )
        for own in (a, b)
    ]
    return alike[0] == alike[1]


def parse_sweep(sweep: str) -> tuple[str, list[float]]:
    """Read FIELD=VALUE,VALUE,..., to the six digits that labels have; raises UserError."""
    field, _, text = sweep.partition("=")
    field = field.strip()
    if field not in SWEEPABLE:
        (near,) = difflib.get_close_matches(field, SWEEPABLE, 1, cutoff=0)
        raise UserError(f"--sweep {field}: did you mean {near}? What can be swept is {', '.join(SWEEPABLE)}")
    try:
        values = [float(f"{float(part):g}") for part in text.split(",")]
    except ValueError:
        values = [math.nan]
    if not all(map(math.isfinite, values)):
        raise UserError(f"--sweep {sweep}: give numbers with commas between, such as lora_scale=0,0.5,0.7,0.8,0.9,1.0")
    return field, sorted(set(values))


def apply_sweep(contender: Contender, field: str, value: float) -> Contender:
    """The same contender with another value of one field; a lora_scale of 0 is the untuned base, an ema of 0 the tuned."""
    source, sampling = contender.source, contender.sampling
    if field == "lora_scale":
        if not source.adapters:
            raise UserError(
                "--sweep lora_scale is for adapters, and this run trained whole weights; sweep something else"
            )
        if value < 0:
            raise UserError(f"--sweep lora_scale={value:g}: it must be 0, the untuned base, or more")
        scaled = tuple((place, weight * value) for place, weight in source.adapters)
        return replace(contender, source=replace(source, adapters=scaled) if value else source.untuned)
    if field == "ema":
        return replace(contender, source=source.averaged(value))
    if field == "sampler_steps":
        if value != int(value):
            raise UserError(f"--sweep sampler_steps={value:g}: steps are whole numbers")
        return replace(contender, sampling=replace(sampling, steps=int(value)))
    if not sampling.min_guidance <= value <= 30:
        raise UserError(
            f"--sweep max_guidance={value:g}: it must be between min_guidance {sampling.min_guidance:g} and 30"
        )
    return replace(contender, sampling=replace(sampling, max_guidance=value))


def run_contenders(
    contenders: dict[str, Contender], windows: dict[int, Windows], networks: Networks, compiled: bool
) -> Iterator[tuple[str, int, Result]]:
    """Generate and score the windows of every gap; contenders that are the same share one result.

    raises  NotFinite naming the contender whose network makes no numbers of a window

    The network is read anew for each set of adapters: once they are folded in, the weights without them are gone.
    """
    from tqdm import tqdm

    groups: list[list[str]] = []  # labels of those with the same weights
    for label, contender in contenders.items():
        group = next((own for own in groups if contenders[own[0]].source == contender.source), None)
        if group is None:
            groups.append(group := [])
        group.append(label)
    ways = [dict.fromkeys(contenders[label].sampling for label in group) for group in groups]
    total = sum(map(len, ways)) * sum(map(len, windows.values()))
    with tqdm(total=total, unit="clip", dynamic_ncols=True) as bar:  # which shows what time is left
        for group, samplings in zip(groups, ways, strict=True):
            bar.set_description(group[0])
            source = contenders[group[0]].source
            framer = load_framer(source, source.config.diffusion.control, compiled)
            for sampling, (gap, own) in product(samplings, windows.items()):
                made = (make_window(framer, own, i, sampling) for i in range(len(own)))
                try:
                    result = judge_windows(own, made, networks, bar.update)
                except NotFinite as error:
                    raise NotFinite(f"{group[0]} at a gap of {gap}: {error}") from None
                yield from ((label, gap, result) for label in group if contenders[label].sampling == sampling)
            del framer  # before the next one takes its room


def judge_windows(
    windows: Windows, made: Iterable[Tensor], networks: Networks, beat: Callable[[], object] = lambda: None
) -> Result:
    """Score what was made of each window, (1, T, 3, H, W) with its ends; one at a time is in memory."""
    of_frames: list[dict[str, Tensor]] = []
    of_windows: list[dict[str, Tensor]] = []
    middles: list[Tensor] = []
    features: list[Tensor] = []
    for i, made_BTCHW in enumerate(made):
        of_frames.append(score_frames(made_BTCHW, windows.true(i), networks.lpips))
        of_windows.append(score_whole(made_BTCHW, windows.true(i)))
        middles.append(to_uint8(made_BTCHW[:, made_BTCHW.shape[1] // 2]))
        features += [networks.fvd(made_BTCHW)] if networks.fvd else []
        beat()
    frames, whole = _join(of_frames), _join(of_windows)
    return Result(average_frames(frames) | whole, frames, torch.cat(middles), torch.cat(features) if features else None)


def _join(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([own[name] for own in rows]) for name in rows[0]}
