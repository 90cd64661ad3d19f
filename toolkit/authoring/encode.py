"""The kept clips of each source, encoded into a tar of their own, and those tars put together as shards.

Test: pytest tests/authoring/test_pack.py

A source is the smallest piece of work that is never done twice. The tars hold no dates or owners and one thread encodes,
so the same videos and settings give the same bytes.
"""

import io
import tarfile
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np

from toolkit.authoring.captions import Words
from toolkit.authoring.plan import PlannedClip
from toolkit.authoring.survey import GOES_ON, may_pass
from toolkit.data.clips import resize_cover
from toolkit.data.files import add_member, written_aside
from toolkit.data.format import MEMBER_BYTES, ClipInfo, build_index, file_sha256, index_path, write_index
from toolkit.data.tar import BLOCK_BYTES
from toolkit.data.video import VideoError, VideoWriter, iter_frames
from toolkit.errors import UserError


@dataclass(frozen=True)
class SourceWork:
    """One video to encode: its kept clips in order, what is said about each, and what it hashed to when surveyed."""

    video: Path
    sha256: str
    clips: tuple[PlannedClip, ...]
    words: tuple[Words, ...]
    gop: int
    target: Path

    @property
    def frames(self) -> int:
        return sum(clip.facts.frames for clip in self.clips)


@dataclass(frozen=True)
class Piece:
    """One member of a source's tar that goes into a shard."""

    tar: Path
    name: str
    offset: int
    size_bytes: int

    @property
    def tar_bytes(self) -> int:
        return BLOCK_BYTES * (1 + -(-self.size_bytes // BLOCK_BYTES))


@dataclass(frozen=True)
class ShardWork:
    """One shard to write: its members in order, and where it shall lie."""

    target: Path
    pieces: tuple[Piece, ...]

    @property
    def size_bytes(self) -> int:
        return sum(piece.size_bytes for piece in self.pieces)


def encode_source(work: SourceWork) -> None:
    """Encode the clips of one source in one pass of decoding, unless its tar is there. Raises UserError."""
    if work.target.exists():
        return
    changed = f"{work.video} changed while it was packed; delete {work.target.parents[1]} and start again"
    try:
        if _read_sha256(work.video) != work.sha256:
            raise UserError(changed)
        with (
            written_aside(work.target, first_stays=True) as file,  # another part may have read where its clips lie
            tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar,
        ):
            for (clip, video), words in zip(_encode(work), work.words, strict=True):
                if len(video) > MEMBER_BYTES["mp4"]:
                    raise UserError(
                        f"{work.video}: a clip of {len(video) / 1e6:.0f} MB; up to {MEMBER_BYTES['mp4'] / 1e6:.0f} are "
                        "allowed, so give a shorter --clip_seconds or a smaller --short_side"
                    )
                add_member(tar, f"{clip.key}.mp4", video)
                add_member(tar, f"{clip.key}.json", _info(clip, words).model_dump_json(exclude_none=True).encode())
    except VideoError as error:
        raise UserError(f"{error}; {GOES_ON}" if may_pass(error) else f"{changed}: {error}") from error
    except av.error.FFmpegError as error:  # of encoding, for those of decoding come as VideoError
        raise UserError(f"{work.video} does not encode: {error.strerror}; take it away and start again") from error


def _read_sha256(video: Path) -> str:
    try:
        return file_sha256(video)
    except OSError as error:
        raise UserError(f"{video}: {error.strerror}; {GOES_ON}") from error


def lay_out(staging: Path, tars: Iterable[Path], split_of: Mapping[str, str], shard_mb: float) -> list[ShardWork]:
    """Fill shards with the clips of encoded sources, in order, opening the next when one is full; split_of: by key."""
    shards: dict[str, list[list[Piece]]] = {}
    in_last_bytes: Counter[str] = Counter()  # of each split
    for path in tars:
        with tarfile.open(path, "r:") as tar:
            pieces = [Piece(path, member.name, member.offset_data, member.size) for member in tar]
        for video, sidecar in zip(pieces[::2], pieces[1::2], strict=True):
            split = split_of[video.name.removesuffix(".mp4")]
            filled = shards.setdefault(split, [[]])
            if filled[-1] and in_last_bytes[split] + video.size_bytes > shard_mb * 1e6:
                filled.append([])
                in_last_bytes[split] = 0
            filled[-1] += [video, sidecar]
            in_last_bytes[split] += video.tar_bytes + sidecar.tar_bytes
    return [
        ShardWork(staging / f"{split}-{number:06d}.tar", tuple(pieces))
        for split, filled in shards.items()
        for number, pieces in enumerate(filled)
    ]


def write_shard(work: ShardWork) -> None:
    """Copy the members of a shard together and index it, unless both are there."""
    if not work.target.exists():
        with written_aside(work.target) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
            for piece in work.pieces:
                with open(piece.tar, "rb") as source:
                    source.seek(piece.offset)
                    add_member(tar, piece.name, source.read(piece.size_bytes))
    if not index_path(work.target).exists():
        write_index(work.target, build_index(work.target))


def _encode(work: SourceWork) -> Iterable[tuple[PlannedClip, bytes]]:
    """Yield the clips of a source as MP4, those that overlap encoded side by side. Raises VideoError."""
    numbers = {n for clip in work.clips for n in range(clip.facts.first, clip.facts.first + clip.facts.frames)}
    waiting, running = deque(work.clips), deque[tuple[PlannedClip, io.BytesIO, VideoWriter]]()
    for number, frame_HWC in zip(sorted(numbers), iter_frames(work.video, numbers), strict=False):
        while waiting and waiting[0].facts.first == number:
            clip, buffer = waiting.popleft(), io.BytesIO()
            running.append((clip, buffer, VideoWriter(buffer, clip.facts.fps, gop=work.gop)))
        for clip, _, writer in running:
            writer.add(cut_frame(frame_HWC, clip.box_px, clip.size_px))
        while running and running[0][2].count == running[0][0].facts.frames:
            clip, buffer, writer = running.popleft()
            writer.close()
            yield clip, buffer.getvalue()
    if waiting or running:
        raise VideoError(f"{work.video}: fewer frames decode than before")


def cut_frame(frame_HWC: np.ndarray, box_px: Sequence[int], size_px: tuple[int, int]) -> np.ndarray:
    """Cut a box of height, width in px from a frame's middle and scale it."""
    top, left = (frame_HWC.shape[0] - box_px[0]) // 2, (frame_HWC.shape[1] - box_px[1]) // 2
    return resize_cover(frame_HWC[None, top : top + box_px[0], left : left + box_px[1]], *size_px)[0]


def _info(clip: PlannedClip, words: Words) -> ClipInfo:
    return ClipInfo(
        fps=clip.facts.fps,
        frames=clip.facts.frames,
        height=clip.size_px[0],
        width=clip.size_px[1],
        source=clip.source,
        start_s=clip.facts.start_s,
        motion=clip.facts.motion,
        caption=words.caption,
        label=words.label,
    )
