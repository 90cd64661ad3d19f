"""One look through a source video: what it is, which clips it can be cut into, and how each of them scores.

Test: pytest tests/authoring/test_survey.py

A survey depends on the bytes of the video, its name, and the lengths and parts asked for, on nothing else.
"""

import errno
import io
import math
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict

from toolkit.authoring.motion import motion_score
from toolkit.authoring.screen import COMBED, SIGNATURE_FRAMES, blocks, combs, sharpness
from toolkit.authoring.small import SmallFrame, iter_small
from toolkit.data.format import MIN_FPS, file_sha256
from toolkit.data.shots import MIN_FRAMES, cut_span, find_breaks, find_shots, jump_between, rate_of
from toolkit.data.video import MAX_FPS, VideoError, VideoFacts, packed_rate, probe
from toolkit.errors import UserError, in_one_line

_PICTURE_HEIGHT_PX = 96
_SPOOL_BYTES = 64 << 20  # pictures of a longer video wait on disk
# What the file system says of a name, for good; and what it, or FFmpeg, says of a machine, for now.
_LASTING = (errno.ENOENT, errno.EACCES, errno.EISDIR, errno.ENOTDIR, errno.ELOOP)
_PASSING = (*(errno.EIO, errno.ENOMEM, errno.ENOSPC, errno.ESTALE), *(errno.EMFILE, errno.ENFILE, errno.ETIMEDOUT))
GOES_ON = "once that is mended, the same command goes on where it was stopped"


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_bytes="base64", val_json_bytes="base64")


class ClipFacts(_Model):
    """One clip of a source video: its frames [first, first + frames) as they decode, its size as displayed.

    brightness  mean luma, 0 to 255
    sharpness   of its sharpest frame among every eighth, 0 to 1
    signature   luma of 5 frames in 16 x 16 blocks, by which duplicates are known
    picture     JPEG of its first, middle and last frame, side by side
    part        number of the part of the video that it lies in, where parts are named
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
    part: int | None = None


class Survey(_Model):
    """What one video is good for; fault says why it gives no clips, or how many frames lie in none.

    sha256  of the file; empty if it could not be opened
    """

    name: str
    sha256: str = ""
    fault: str | None = None
    clips: tuple[ClipFacts, ...] = ()


def survey(
    path: Path, name: str, clip_seconds: float, stride_seconds: float | None, spool: Path | None = None,
    parts: Sequence[tuple[float, float]] = (),
) -> Survey:  # fmt: skip
    """Decode a video once and judge the clips it can be cut into; what is wrong with it is in the survey's fault.

    parts   begin and end in seconds of what is to be cut, in order; none: all of it
    spool   folder for pictures that would take too much memory; None: the system's
    raises  UserError for an error that may pass, like that of a disk which does not answer
    """
    for _ in range(2):
        try:
            found, passing = _look(path, name, clip_seconds, stride_seconds, spool, parts)
        except OSError as error:
            if error.errno in _LASTING:
                return Survey(name=name, fault=error.strerror)
            raise UserError(f"{path}: {error.strerror or error}; {GOES_ON}") from error
        if not passing:
            break
    # FFmpeg takes the end of a cut MKV for an error of the disk. One that comes again, though every byte could be read, is
    # the video's own.
    return found


def may_pass(error: VideoError) -> bool:
    """Whether FFmpeg lays the blame on the machine, not on the video."""
    return getattr(error.__cause__, "errno", None) in _PASSING


def _look(
    path: Path, name: str, clip_seconds: float, stride_seconds: float | None, spool: Path | None,
    parts: Sequence[tuple[float, float]],
) -> tuple[Survey, bool]:  # fmt: skip
    """Survey a video, and say whether what is wrong with it may pass. Raises OSError."""
    sha256 = file_sha256(path)
    try:
        facts = probe(path)
    except VideoError as error:
        return Survey(name=name, sha256=sha256, fault=_reason(error, path)), may_pass(error)
    if facts.frames < MIN_FRAMES:
        few = f"has {facts.frames} frames; at least {MIN_FRAMES} are needed"
        return Survey(name=name, sha256=sha256, fault=few), False
    with tempfile.SpooledTemporaryFile(_SPOOL_BYTES, dir=str(spool) if spool else None) as pictures:
        watch, faults, passing = Watch(pictures), [], False
        try:
            for frame in iter_small(path):
                watch.add(frame)
        except VideoError as error:
            done_s, whole_s = len(watch.times_s) / facts.fps, facts.frames / facts.fps
            reason = f"stopped after {done_s:.1f} of {whole_s:.1f} s, where it does not decode: {_reason(error, path)}"
            faults, passing = [reason], may_pass(error)
        if watch.losses:
            faults.append(f"{facts.frames - len(watch.times_s)} of {facts.frames} frames do not decode")
        if watch.spoiled:
            faults.append(f"{len(watch.spoiled)} of {facts.frames} frames are damaged, or refer to ones that are")
        if 2 * watch.woven > len(watch.times_s):
            combed = (
                "is marked as interlaced, which shows as combs; encode it anew with ffmpeg -vf bwdif, or, if it has "
                "none, with -vf setfield=prog"
            )
            return Survey(name=name, sha256=sha256, fault=combed), passing
        if watch.near > COMBED * watch.far:
            combed = "shows combs, as interlaced video does that is not marked; encode it anew with ffmpeg -vf bwdif"
            return Survey(name=name, sha256=sha256, fault=combed), passing
        spans, left_out = watch.spans(facts, clip_seconds, stride_seconds, parts)
        clips = tuple(watch.clip(*span) for span in spans)
    if empty := len(parts) - len({clip.part for clip in clips}) if parts else 0:
        faults.append(f"{empty} of its {len(parts)} parts give no clip")
    if left_out:
        faults.append(
            f"{left_out} of {len(watch.times_s)} frames lie in no clip: fewer than {MIN_FRAMES} in a row are of one shot "
            f"and follow evenly in time, at {MIN_FPS:g} to {MAX_FPS:g} fps"
        )
    fault = "; ".join(faults) or (None if clips else "gives no clip")
    return Survey(name=name, sha256=sha256, fault=fault, clips=clips), passing


def _reason(error: VideoError, path: Path) -> str:
    return in_one_line(error).removeprefix(f"{path}: ")


@dataclass
class Watch:
    """What is kept of each frame while a video passes: some figures, its blocks, and its picture on the spool."""

    pictures: IO[bytes]
    times_s: list[float] = field(default_factory=list)
    begin_s: float = math.inf
    sizes_px: list[tuple[int, int]] = field(default_factory=list)
    losses: list[int] = field(default_factory=list)
    spoiled: set[int] = field(default_factory=set)
    is_spoiling: bool = False
    between: int = 0
    woven: int = 0
    near: float = 0
    far: float = 0
    rows: np.ndarray | None = None
    jumps: list[float] = field(default_factory=list)
    changes: list[float] = field(default_factory=list)
    brightness: list[float] = field(default_factory=list)
    sharpness: dict[int, float] = field(default_factory=dict)
    blocks: list[bytes] = field(default_factory=list)
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
        self._judge_damage(frame)
        self.woven += frame.is_woven
        if frame.rows_HW is not None and self.rows is not None and frame.rows_HW.shape == self.rows.shape:
            near, far = combs(self.rows, frame.rows_HW)
            self.near, self.far = self.near + near, self.far + far
        self.rows = frame.rows_HW
        if frame.after_loss:
            self.losses.append(len(self.times_s))
        self.times_s.append(frame.time_s)
        self.begin_s = min(self.begin_s, frame.time_s)
        self.sizes_px.append((frame.height_px, frame.width_px))
        self.brightness.append(float(luma_HW.mean()))
        self.blocks.append(blocks(luma_HW).tobytes())
        self.pictures.write(_picture(frame))
        self.offsets.append(self.pictures.tell())

    def _judge_damage(self, frame: SmallFrame) -> None:
        """Damage spoils what may refer to it: the B-frames shown just before it, and all up to the next keyframe."""
        number = len(self.times_s)
        if frame.is_damaged and not self.is_spoiling:
            self.is_spoiling = True
            self.spoiled.update(range(number - self.between, number))
        elif frame.is_key and not frame.is_damaged:
            self.is_spoiling = False
        if self.is_spoiling:
            self.spoiled.add(number)
        self.between = self.between + 1 if frame.is_between else 0

    def spans(
        self, facts: VideoFacts, clip_seconds: float, stride_seconds: float | None, parts: Sequence[tuple[float, float]]
    ) -> tuple[list[tuple[int, int, float, int | None]], int]:
        """List the clips as (start, stop, fps, part), and count the frames that are too few in a row for one.

        Inside a clip no shot changes, no frame is missing, lost or spoiled, no size changes; it lies in one of the parts.
        """
        times_s = np.array(self.times_s)
        spans, left_out = [], 0
        for first, last, part in self._in_parts(parts, facts, self._shots(facts)):
            overall_fps = rate_of(times_s[first:last], facts.fps, facts.tick_s)
            for a, b in cut_span(last - first, overall_fps, clip_seconds, stride_seconds):
                part_s = times_s[first + a : first + b]
                fps = float(packed_rate(rate_of(part_s, overall_fps, facts.tick_s)))
                if b - a >= MIN_FRAMES and MIN_FPS <= fps <= MAX_FPS:
                    spans.append((first + a, first + b, fps, part))
                else:
                    left_out += b - a
        return spans, left_out

    def _shots(self, facts: VideoFacts) -> Iterator[tuple[int, int]]:
        """Yield the stretches of whole frames of one shot, one size and one rhythm."""
        times_s, sizes_px, jumps = np.array(self.times_s), self.sizes_px, np.array(self.jumps)
        resized = [i for i in range(1, len(sizes_px)) if sizes_px[i] != sizes_px[i - 1]]
        edges = {number for number in self.spoiled if number - 1 not in self.spoiled}
        edges |= {number + 1 for number in self.spoiled}
        breaks = sorted({0, len(sizes_px), *resized, *self.losses, *edges, *find_breaks(times_s, facts.tick_s)})
        for start, stop in zip(breaks, breaks[1:], strict=False):
            if start not in self.spoiled:
                yield from pairwise([start, *(start + cut for cut in find_shots(jumps[start:stop])), stop])

    def _in_parts(
        self, parts: Sequence[tuple[float, float]], facts: VideoFacts, shots: Iterable[tuple[int, int]]
    ) -> Iterator[tuple[int, int, int | None]]:
        """Yield what of each shot lies in each part, and the part's number; all of it where there are no parts."""
        times_s = np.array(self.times_s) - self.begin_s + facts.tick_s / 2
        for first, last in shots:
            if not parts:
                yield first, last, None
                continue
            bounds_P2 = first + np.searchsorted(times_s[first:last], parts)
            for number in np.flatnonzero(bounds_P2[:, 0] < bounds_P2[:, 1]).tolist():
                begin, end = bounds_P2[number].tolist()
                yield begin, end, number

    def clip(self, start: int, stop: int, fps: float, part: int | None) -> ClipFacts:
        chosen = np.linspace(start, stop - 1, SIGNATURE_FRAMES).round().astype(int)
        nearest = next(number for number in range(start, -1, -1) if number in self.sharpness)
        sampled = [self.sharpness[number] for number in range(start, stop) if number in self.sharpness]
        return ClipFacts(
            first=start,
            frames=stop - start,
            start_s=round(self.times_s[start] - self.begin_s, 6),
            fps=fps,
            height_px=self.sizes_px[start][0],
            width_px=self.sizes_px[start][1],
            motion=motion_score(self.changes[start + 1 : stop], fps),
            brightness=round(float(np.mean(self.brightness[start:stop])), 2),
            sharpness=round(max(sampled, default=self.sharpness[nearest]), 4),
            signature=b"".join(self.blocks[number] for number in chosen),
            picture=self._strip([start, (start + stop - 1) // 2, stop - 1]),
            part=part,
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
