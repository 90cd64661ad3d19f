"""One look through a source video: what it is, which clips it can be cut into, and how each of them scores.

Test: pytest tests/data/test_survey.py

A survey depends on the bytes of the video, its name and the lengths asked for, on nothing else.
"""

import io
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict

from toolkit.data.format import file_sha256
from toolkit.data.motion import motion_score
from toolkit.data.screen import SIGNATURE_FRAMES, blocks, sharpness
from toolkit.data.shots import MIN_FRAMES, cut_span, find_breaks, find_shots, jump_between, rate_of
from toolkit.data.small import SmallFrame, iter_small
from toolkit.data.video import MAX_FPS, VideoError, VideoFacts, packed_rate, probe
from toolkit.errors import in_one_line

_PICTURE_HEIGHT_PX = 96
_SPOOL_BYTES = 64 << 20  # pictures of a longer video wait on disk


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_bytes="base64", val_json_bytes="base64")


class ClipFacts(_Model):
    """One clip of a source video: its frames [first, first + frames) as they decode, its size as displayed.

    brightness  mean luma, 0 to 255
    sharpness   of its sharpest frame among every eighth, 0 to 1
    signature   luma of 5 frames in 16 x 16 blocks, by which duplicates are known
    picture     JPEG of its first, middle and last frame, side by side
    """

    first: int
    frames: int
    start_s: float
    fps: float
    height_px: int
    width_px: int
    motion: float
    brightness: float
    sharpness: float
    signature: bytes
    picture: bytes


class Survey(_Model):
    """What one video is good for; fault says why it gives no clips, or no more than these."""

    name: str
    sha256: str = ""
    fault: str | None = None
    clips: tuple[ClipFacts, ...] = ()


def survey(path: Path, name: str, clip_seconds: float, stride_seconds: float | None) -> Survey:
    """Decode a video once and judge the clips it can be cut into; what is wrong with it is in the survey's fault."""
    try:
        sha256, facts = file_sha256(path), probe(path)
        _refuse(facts)
    except (VideoError, OSError) as error:
        return Survey(name=name, fault=_reason(error, path))
    with tempfile.SpooledTemporaryFile(_SPOOL_BYTES) as pictures:
        watch, fault = _Watch(pictures), None
        try:
            for frame in iter_small(path):
                watch.add(frame)
        except VideoError as error:
            fault = f"stopped where it does not decode: {_reason(error, path)}"
        clips = tuple(watch.clip(*span) for span in watch.spans(facts, clip_seconds, stride_seconds))
    return Survey(name=name, sha256=sha256, fault=fault or (None if clips else "gives no clip"), clips=clips)


def _refuse(facts: VideoFacts) -> None:
    if facts.frames < MIN_FRAMES:
        raise VideoError(f"has {facts.frames} frames; at least {MIN_FRAMES} are needed")
    if facts.is_pq:
        raise VideoError("is HDR (PQ, SMPTE 2084), whose colours would come out wrong; convert it to SDR first")


def _reason(error: Exception, path: Path) -> str:
    return getattr(error, "strerror", None) or in_one_line(error).removeprefix(f"{path}: ")


@dataclass
class _Watch:
    """What is kept of each frame while a video passes: some figures, its blocks, and its picture on the spool."""

    pictures: IO[bytes]
    times_s: list[float] = field(default_factory=list)
    sizes_px: list[tuple[int, int]] = field(default_factory=list)
    jumps: list[float] = field(default_factory=list)
    changes: list[float] = field(default_factory=list)
    brightness: list[float] = field(default_factory=list)
    sharpness: dict[int, float] = field(default_factory=dict)
    blocks: list[np.ndarray] = field(default_factory=list)
    offsets: list[int] = field(default_factory=lambda: [0])
    before: tuple[np.ndarray, np.ndarray] | None = None

    def add(self, frame: SmallFrame) -> None:
        luma_HW = _halved(frame.luma_HW)
        planes_CHW = np.stack([_halved(luma_HW), *map(_halved, frame.chroma_CHW)])
        jump = change = 0.0
        if self.before is not None and self.before[0].shape == luma_HW.shape:
            jump = jump_between(self.before[1], planes_CHW)
            change = float(np.abs(luma_HW.astype(np.int16) - self.before[0]).mean())
        self.before = luma_HW, planes_CHW
        self.jumps.append(jump)
        self.changes.append(change)
        if frame.detail_HW is not None:
            self.sharpness[len(self.times_s)] = sharpness(frame.detail_HW)
        self.times_s.append(frame.time_s)
        self.sizes_px.append((frame.height_px, frame.width_px))
        self.brightness.append(float(luma_HW.mean()))
        self.blocks.append(blocks(luma_HW))
        self.pictures.write(_picture(frame))
        self.offsets.append(self.pictures.tell())

    def spans(
        self, facts: VideoFacts, clip_seconds: float, stride_seconds: float | None
    ) -> list[tuple[int, int, float]]:
        """List the clips as (start, stop, fps): inside a span no shot changes, no frame is missing, no size changes."""
        times_s, sizes_px, jumps = np.array(self.times_s), self.sizes_px, np.array(self.jumps)
        resized = [i for i in range(1, len(sizes_px)) if sizes_px[i] != sizes_px[i - 1]]
        breaks = sorted({0, len(sizes_px), *resized, *find_breaks(times_s, facts.interval_s, facts.tick_s)})
        spans = []
        for start, stop in zip(breaks, breaks[1:], strict=False):
            cuts = [start, *(start + cut for cut in find_shots(jumps[start:stop])), stop]
            for first, last in zip(cuts, cuts[1:], strict=False):
                if last - first < 2:
                    continue
                fps = float(packed_rate(rate_of(times_s[first:last], facts.fps, facts.tick_s)))
                parts = cut_span(last - first, fps, clip_seconds, stride_seconds)
                spans += [(first + a, first + b, fps) for a, b in parts if b - a > 1 and 0 < fps <= MAX_FPS]
        return spans

    def clip(self, start: int, stop: int, fps: float) -> ClipFacts:
        chosen = np.linspace(start, stop - 1, SIGNATURE_FRAMES).round().astype(int)
        sampled = [value for number, value in self.sharpness.items() if start <= number < stop]
        nearest = self.sharpness[max(number for number in self.sharpness if number <= start)]
        return ClipFacts(
            first=start,
            frames=stop - start,
            start_s=round(self.times_s[start] - self.times_s[0], 6),
            fps=fps,
            height_px=self.sizes_px[start][0],
            width_px=self.sizes_px[start][1],
            motion=motion_score(self.changes[start + 1 : stop], fps),
            brightness=round(float(np.mean(self.brightness[start:stop])), 2),
            sharpness=round(max(sampled, default=nearest), 4),
            signature=b"".join(self.blocks[number].tobytes() for number in chosen),
            picture=self._strip([start, (start + stop - 1) // 2, stop - 1]),
        )

    def _strip(self, numbers: list[int]) -> bytes:
        pictures = []
        for number in numbers:
            self.pictures.seek(self.offsets[number])
            jpeg = self.pictures.read(self.offsets[number + 1] - self.offsets[number])
            pictures.append(np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB")))
        return _jpeg(Image.fromarray(np.concatenate(pictures, axis=1)))


def _halved(luma_HW: np.ndarray) -> np.ndarray:
    """Halve both sides by the means of 2 x 2 pixels, an odd last column left out: uint8."""
    rows_HW = luma_HW[::2].astype(np.uint16) + luma_HW[1::2]
    columns = rows_HW.shape[1] // 2
    return ((rows_HW[:, : 2 * columns : 2] + rows_HW[:, 1 : 2 * columns : 2] + 2) >> 2).astype(np.uint8)


def _picture(frame: SmallFrame) -> bytes:
    luma = Image.fromarray(frame.luma_HW)
    planes = [luma, *(Image.fromarray(plane_HW).resize(luma.size) for plane_HW in frame.chroma_CHW)]
    size_px = (max(1, round(_PICTURE_HEIGHT_PX * luma.width / luma.height)), _PICTURE_HEIGHT_PX)
    return _jpeg(Image.merge("YCbCr", planes).resize(size_px, Image.Resampling.BOX))


def _jpeg(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=75)
    return buffer.getvalue()
