"""Videos -> train and val shards: cut, re-encode with short GOPs, describe, write, index.

Test: pytest tests/data/test_pack.py

The same videos and settings give the same bytes: no dates or owners in the tars, one encoder thread, and sources
packed in the order of a hash of their names, which also mixes the shards.
"""

import hashlib
import io
import math
import os
import re
import shutil
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path

from tqdm import tqdm

from toolkit.data.clips import resize_cover
from toolkit.data.format import ClipInfo, build_index, index_path, write_index
from toolkit.data.motion import Motion
from toolkit.data.video import VideoError, VideoFacts, iter_frames, probe, write_video
from toolkit.errors import UserError

SOURCE_EXTENSIONS = (
    *(".mp4", ".mkv", ".webm", ".mov", ".m4v", ".avi", ".mpg", ".mpeg", ".ts", ".mts", ".wmv", ".flv", ".ogv"),
    *(".3gp", ".gif"),
)
MIN_FRAMES = 3  # two known ends and one frame between
_STAGING = ".packing"


@dataclass
class PackReport:
    """What a packing made and what it left out, with reasons."""

    out: Path
    clips: dict[str, int] = field(default_factory=lambda: {"train": 0, "val": 0})
    seconds: float = 0.0
    sources: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def summary(self) -> str:
        lines = [f"skipped {name}: {reason}" for name, reason in self.skipped]
        lines.append(
            f"{sum(self.clips.values())} clips ({self.clips['train']} train, {self.clips['val']} val), "
            f"{self.seconds:.1f} s, from {self.sources} videos, {len(self.skipped)} skipped, in {self.out}"
        )
        return "\n".join([*lines, f"next: python shards/check.py {self.out}"])


def pack(
    videos: str | Path,
    out: str | Path,
    clip_seconds: float = 4.0,
    holdout: float = 0.2,
    short_side: int | None = None,
    shard_mb: float = 256.0,
    overwrite: bool = False,
) -> PackReport:
    """Cut every video under a folder into clips of up to clip_seconds, and write them as shards with indexes.

    holdout     share of the videos, not of the clips, that goes to val: a video is never in both
    short_side  pixels the shorter side is scaled down to; never up; None keeps the size
    raises      UserError if there is nothing to pack or `out` holds something else
    """
    videos, out = Path(str(videos)), Path(str(out))
    if clip_seconds <= 0 or not 0 <= holdout < 1 or (short_side is not None and short_side < 16) or shard_mb <= 0:
        raise UserError("clip_seconds and shard_mb must be above 0, holdout at least 0 and below 1, short_side >= 16")
    names = find_videos(videos)
    staging = _prepare(out, overwrite)
    report = PackReport(out)
    facts = _probe_all(videos, names, report)
    held_out = split_sources(list(facts), holdout)
    with _ShardWriter(staging, shard_mb) as writer:
        for name in tqdm(_hash_order(list(facts)), desc="pack", unit="video"):
            split = "val" if name in held_out else "train"
            try:
                for key, data, info in cut_clips(videos / name, name, facts[name], clip_seconds, short_side):
                    writer.add(split, key, data, info)
                    report.clips[split] += 1
                    report.seconds += info.frames / info.fps
            except VideoError as error:
                report.skipped.append((name, f"stopped where it does not decode: {error}"))
    report.sources = len(facts)
    if not sum(report.clips.values()):
        shutil.rmtree(staging)
        name, reason = report.skipped[0]
        raise UserError(f"none of the {len(names)} videos in {videos} gave a clip; {name}: {reason}")
    _publish(staging, out)
    return report


def find_videos(folder: Path) -> list[str]:
    """List the videos of a tree by their path within it, sorted. Raises UserError if there are none."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; give the folder that holds the videos")
    files = (path for path in folder.rglob("*") if path.suffix.lower() in SOURCE_EXTENSIONS and path.is_file())
    names = sorted(path.relative_to(folder).as_posix() for path in files)
    if not names:
        raise UserError(f"no videos in {folder}; files ending in {' '.join(SOURCE_EXTENSIONS)} are looked for")
    return names


def split_sources(names: list[str], holdout: float) -> set[str]:
    """Choose the videos held out: the first in hash order, about `holdout` of them, leaving at least one to each."""
    if len(names) < 2 or holdout == 0:
        return set()
    count = min(max(1, round(holdout * len(names))), len(names) - 1)
    return set(_hash_order(names)[:count])


def cut_clips(
    path: Path, name: str, facts: VideoFacts, clip_seconds: float, short_side: int | None
) -> Iterator[tuple[str, bytes, ClipInfo]]:
    """Yield (key, mp4 bytes, facts) of the equal parts of one video, each at most clip_seconds long.

    Equal parts leave no short rest: 4.1 s in clips of 4 s become two of 2.05 s. Raises VideoError.
    """
    parts = math.ceil(facts.frames / max(MIN_FRAMES, int(clip_seconds * facts.fps)))
    slug = re.sub(r"[^a-z0-9]+", "-", Path(name).stem.lower()).strip("-")[:40] or "video"
    height_px, width_px = _packed_size(facts, short_side)
    frames = iter_frames(path)
    if short_side is not None:
        frames = (resize_cover(frame_HWC[None], height_px, width_px)[0] for frame_HWC in frames)
    start = 0
    for part in range(parts):
        stop = (part + 1) * facts.frames // parts
        frames_of_part = islice(frames, stop - start)
        first = next(frames_of_part, None)
        if first is None:
            return  # fewer frames decode than the container announces
        motion, buffer = Motion(facts.fps), io.BytesIO()
        count = write_video(buffer, motion.watch(chain([first], frames_of_part)), facts.fps)
        if count >= MIN_FRAMES:
            info = ClipInfo(
                fps=facts.fps,
                frames=count,
                height=height_px,
                width=width_px,
                source=name,
                start_s=round(start / facts.fps, 6),
                motion=motion.score,
            )
            yield f"{slug}_{_name_hash(name)[:6]}_{part:04d}", buffer.getvalue(), info
        start = stop


class _ShardWriter:
    """Writes samples to train-000000.tar, val-000000.tar, ... in a folder, opening the next when one is full."""

    def __init__(self, folder: Path, shard_mb: float) -> None:
        self.folder, self.limit_bytes = folder, shard_mb * 1e6
        self.open: dict[str, tarfile.TarFile] = {}
        self.counts = {"train": 0, "val": 0}

    def __enter__(self) -> "_ShardWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        for tar in self.open.values():
            tar.close()

    def add(self, split: str, key: str, video: bytes, info: ClipInfo) -> None:
        if split in self.open and self.open[split].offset + len(video) > self.limit_bytes:
            self.open.pop(split).close()
        if split not in self.open:
            path = self.folder / f"{split}-{self.counts[split]:06d}.tar"
            # Pax only where a name needs it; stock webdataset and GNU tar read both.
            self.open[split] = tarfile.open(path, "w", format=tarfile.PAX_FORMAT)  # noqa: SIM115 (closed on exit)
            self.counts[split] += 1
        sidecar = info.model_dump_json(exclude_none=True).encode()
        for extension, data in (("mp4", video), ("json", sidecar)):
            member = tarfile.TarInfo(f"{key}.{extension}")  # mtime 0, owner 0: the same videos give the same tar
            member.size = len(data)
            self.open[split].addfile(member, io.BytesIO(data))


def _prepare(out: Path, overwrite: bool) -> Path:
    """Make the staging folder inside `out`, after making sure that nothing foreign or precious is there."""
    present = sorted(path.name for path in out.iterdir() if path.name != _STAGING) if out.is_dir() else []
    foreign = [name for name in present if not name.endswith((".tar", ".index.json"))]
    if foreign:
        raise UserError(f"{out} holds files that are not shards ({foreign[0]}); give a new or empty folder")
    if present and not overwrite:
        raise UserError(f"{out} already holds shards; give another folder, or --overwrite to replace them")
    staging = out / _STAGING
    shutil.rmtree(staging, ignore_errors=True)  # what an interrupted packing left
    staging.mkdir(parents=True)
    return staging


def _publish(staging: Path, out: Path) -> None:
    """Index the finished shards and move them into place; old shards go only now that all new ones are whole."""
    tars = sorted(staging.glob("*.tar"))
    for tar in tars:
        write_index(tar, build_index(tar))
    for old in [*out.glob("*.tar"), *out.glob("*.index.json")]:
        old.unlink()
    for tar in tars:
        os.replace(index_path(tar), index_path(out / tar.name))
        os.replace(tar, out / tar.name)
    staging.rmdir()


def _probe_all(videos: Path, names: list[str], report: PackReport) -> dict[str, VideoFacts]:
    """Probe every video before the split is made, so that an unreadable one is never the whole of val."""
    facts = {}
    for name in names:
        try:
            found = probe(videos / name)
            if found.frames < MIN_FRAMES:
                raise VideoError(f"has {found.frames} frames; at least {MIN_FRAMES} are needed")
            facts[name] = found
        except VideoError as error:
            report.skipped.append((name, str(error).removeprefix(f"{videos / name}: ")))
    return facts


def _packed_size(facts: VideoFacts, short_side: int | None) -> tuple[int, int]:
    """Height and width to pack at: even, as 4:2:0 needs, and never larger than the source."""
    shorter = min(facts.height_px, facts.width_px)
    target = min(short_side or shorter, shorter)
    height_px, width_px = (side * target // (2 * shorter) * 2 for side in (facts.height_px, facts.width_px))
    return height_px, width_px


def _name_hash(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def _hash_order(names: list[str]) -> list[str]:
    return sorted(names, key=_name_hash)
