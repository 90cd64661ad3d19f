"""Which clips of the surveyed videos go where: dropped with a reason, or kept for train or val under a key.

Test: pytest tests/authoring/test_screen.py

A plan depends on the surveys and the settings alone, so every process of every machine makes the same one.
"""

import hashlib
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from toolkit.authoring.screen import find_duplicates
from toolkit.authoring.survey import ClipFacts, Survey
from toolkit.data.shots import MIN_FRAMES
from toolkit.data.video import MAX_MEMBER_PIXELS
from toolkit.errors import UserError, in_words

_MIN_SIDE_PX = 16
_MAX_SIDE_PX = 16384  # x264 takes no longer one


class PackSettings(BaseModel):
    """All that decides what a packing gives; what each means stands in shards/pack.py."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    clip_seconds: float = Field(default=4.0, gt=0)
    stride_seconds: float | None = Field(default=None, gt=0)
    holdout: float = Field(default=0.2, ge=0, lt=1)
    short_side: int | None = Field(default=None, ge=_MIN_SIDE_PX)
    aspects: str | None = None
    gop: int = Field(default=12, ge=1, le=12)
    min_frames: int = Field(default=MIN_FRAMES, ge=MIN_FRAMES)
    min_motion: float = Field(default=8.0, ge=0)
    min_brightness: float = Field(default=12.0, ge=0)
    min_sharpness: float = Field(default=0.35, ge=0)
    duplicate_distance: float = Field(default=2.5, ge=0)
    shard_mb: float = Field(default=256.0, gt=0)

    @field_validator("aspects")
    @classmethod
    def _readable(cls, aspects: str | None) -> str | None:
        for part in [] if aspects is None else aspects.split(","):
            if not re.fullmatch(r"[1-9]\d{0,2}:[1-9]\d{0,2}", part.strip()):
                raise ValueError("it should be widths to heights, like 1:1 or 16:9,1:1,9:16")
        return aspects


def read_settings(settings: dict[str, Any]) -> PackSettings:
    """Check what was asked for. Raises UserError."""
    try:
        return PackSettings(**settings)
    except ValidationError as error:
        faults = [f"--{fault['loc'][0]} is {fault['input']!r}; {in_words(fault['msg'])}" for fault in error.errors()]
        raise UserError("; ".join(faults)) from error


class Kind(Enum):
    """What is wrong with a clip that is dropped: how it is told, and the option that decides it, if one does."""

    TOO_SHORT = "too short", "min_frames"
    NEAR_BLACK = "near-black", "min_brightness"
    NEAR_STATIC = "near-static", "min_motion"
    BLURRED = "blurred", "min_sharpness"
    DUPLICATE = "duplicate", "duplicate_distance"
    TOO_SMALL = "too small", None
    BETWEEN = "between train and val", None

    def __init__(self, words: str, option: str | None) -> None:
        self.words, self.option = words, option


@dataclass(frozen=True)
class Reason:
    """Why a clip is dropped: the kind, by which such clips are counted and shown, and what was measured and is allowed."""

    kind: Kind
    found: str

    def __str__(self) -> str:
        return f"{self.kind.words}: {self.found}"


@dataclass(frozen=True)
class PlannedClip:
    """One clip of a source: kept if reason is None. box_px is cut from its middle, then scaled to size_px."""

    key: str
    source: str
    split: str
    facts: ClipFacts
    box_px: tuple[int, int]
    size_px: tuple[int, int]
    reason: Reason | None


def make_plan(
    surveys: Sequence[Survey], settings: PackSettings, asked: Mapping[tuple[str, int | None], str]
) -> list[PlannedClip]:
    """Decide about every clip of every survey, sources in the order of a hash of their names.

    asked   train or val by a video and the number of a part of it, None for all; where any is val, no other is held out
    """
    surveys = sorted(surveys, key=lambda survey: name_hash(survey.name))
    keys = name_keys([survey.name for survey in surveys])
    found = [(survey.name, part, clip) for survey in surveys for part, clip in enumerate(survey.clips)]
    frames = [fit(clip.height_px, clip.width_px, settings) for _, _, clip in found]
    reasons = [_fault(clip, size_px, settings) for (_, _, clip), (_, size_px) in zip(found, frames, strict=True)]
    _mark_duplicates(found, reasons, settings.duplicate_distance)
    others = "train" if "val" in asked.values() else None
    splits = [asked.get((name, clip.part), others) for name, _, clip in found]
    held_out = _hold_out(found, reasons, [i for i, split in enumerate(splits) if split is None], settings.holdout)
    return [
        PlannedClip(
            key=f"{keys[name]}_{part:04d}",
            source=name,
            split=split or ("val" if i in held_out else "train"),
            facts=clip,
            box_px=box_px,
            size_px=size_px,
            reason=reason,
        )
        for i, ((name, part, clip), (box_px, size_px), reason, split) in enumerate(
            zip(found, frames, reasons, splits, strict=True)
        )
    ]


def _hold_out(
    found: list[tuple[str, int, ClipFacts]], reasons: list[Reason | None], free: list[int], holdout: float
) -> Collection[int]:
    """Choose what is held out of the clips that may go to either split: whole videos, or the end of a single one.

    reasons  gains one for each clip that would be in both
    """
    kept = [i for i in free if reasons[i] is None]
    names = list(dict.fromkeys(found[i][0] for i in kept))
    if len(names) != 1:
        chosen = split_sources(names, holdout)
        return {i for i in free if found[i][0] in chosen}
    if holdout == 0:
        return set()
    last = kept[-min(max(1, round(holdout * len(kept))), len(kept) - 1) :]
    begin = found[last[0]][2].first
    before = [i for i in kept if found[i][2].first + found[i][2].frames <= begin]
    if not before:
        return set()
    for i in set(kept) - {*before, *last}:
        reasons[i] = Reason(Kind.BETWEEN, "shares frames with clips that are held out")
    return set(last)


def split_sources(names: Sequence[str], holdout: float) -> set[str]:
    """Choose the videos held out: the first in hash order, about `holdout` of them, leaving at least one to each."""
    if len(names) < 2 or holdout == 0:
        return set()
    count = min(max(1, round(holdout * len(names))), len(names) - 1)
    return set(sorted(names, key=name_hash)[:count])


def name_hash(name: str) -> str:
    """Hash the path of a video within its folder, as hex digits."""
    return hashlib.sha256(name.encode()).hexdigest()


def name_keys(names: Sequence[str]) -> dict[str, str]:
    """Name each video as its clips' keys begin: what its file is called, and as many digits of its hash as tell it apart."""
    slugs = {name: re.sub(r"[^a-z0-9]+", "-", Path(name).stem.lower()).strip("-")[:40] or "video" for name in names}
    for digits in range(6, 65):
        keys = {name: f"{slug}_{name_hash(name)[:digits]}" for name, slug in slugs.items()}
        if len(set(keys.values())) == len(keys):
            break
    return keys


def fit(height_px: int, width_px: int, settings: PackSettings) -> tuple[tuple[int, int], tuple[int, int]]:
    """Find the box to cut from the middle of a frame, and the size to scale it to: even sides, as 4:2:0 needs, never larger.

    Both are height, width in px. Boxes of one aspect and short side all come to one size. What is larger than a shard
    may hold, or longer than H.264 is encoded, is scaled down to that.
    """
    aspect = Fraction(width_px, height_px)
    if settings.aspects is not None:
        offered = [Fraction(*map(int, part.split(":"))) for part in settings.aspects.split(",")]
        aspect = min(offered, key=lambda other: max(other / aspect, aspect / other))
    box_height_px = min(Fraction(height_px), width_px / aspect)
    box_px = _even(box_height_px), _even(box_height_px * aspect)
    shorter_px = min(box_height_px, box_height_px * aspect)
    readable = Fraction(math.sqrt(MAX_MEMBER_PIXELS / (box_height_px**2 * aspect)))
    encodable = _MAX_SIDE_PX / max(box_height_px, box_height_px * aspect)
    scale = min(Fraction(1), Fraction(settings.short_side or shorter_px) / shorter_px, readable, encodable)
    return box_px, (_even(box_height_px * scale), _even(box_height_px * aspect * scale))


def _even(side_px: Fraction) -> int:
    return int(side_px / 2) * 2


def _fault(clip: ClipFacts, size_px: tuple[int, int], settings: PackSettings) -> Reason | None:
    """Say why a clip cannot be used, judged by itself."""
    if clip.frames < settings.min_frames:
        return Reason(Kind.TOO_SHORT, f"{clip.frames} frames is below {settings.min_frames}")
    if min(size_px) < _MIN_SIDE_PX:
        return Reason(Kind.TOO_SMALL, f"{size_px[1]} x {size_px[0]} px has a side below {_MIN_SIDE_PX}")
    if clip.brightness < settings.min_brightness:
        return Reason(Kind.NEAR_BLACK, f"brightness {clip.brightness:g} is below {settings.min_brightness:g}")
    if clip.motion < settings.min_motion:
        return Reason(Kind.NEAR_STATIC, f"motion {clip.motion:g} is below {settings.min_motion:g}")
    if clip.sharpness < settings.min_sharpness:
        return Reason(Kind.BLURRED, f"sharpness {clip.sharpness:g} is below {settings.min_sharpness:g}")
    return None


def _mark_duplicates(found: list[tuple[str, int, ClipFacts]], reasons: list[Reason | None], distance: float) -> None:
    """Give a reason to each clip without one that repeats an earlier clip without one."""
    rest = [i for i, reason in enumerate(reasons) if reason is None]
    if not distance or not rest:
        return
    signatures_NP = np.stack([np.frombuffer(found[i][2].signature, np.uint8) for i in rest])
    numbers = {name: number for number, (name, _, _) in enumerate(found)}
    places_N3 = np.array(
        [(numbers[name], clip.first, clip.first + clip.frames) for name, _, clip in map(found.__getitem__, rest)]
    )
    for i, gap in zip(rest, find_duplicates(signatures_NP, places_N3, distance), strict=True):
        if gap is not None:
            reasons[i] = Reason(Kind.DUPLICATE, f"difference {gap:.2f} is below {distance:g}")
