"""Video files and bytes <-> frames, by PyAV: exact frame numbers, one thread, one frame in memory at a time.

Test: pytest tests/data/test_video.py

T frame, H height and W width in pixels, C the channels red, green, blue; frames are uint8 and upright, that is, the
rotation a phone writes beside its video has been applied.
"""

import bisect
import io
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.container import InputContainer
from av.video.reformatter import ColorRange, Colorspace, Interpolation
from av.video.stream import VideoStream

Source = str | Path | bytes

# Bytes of a shard may come from anywhere, so the demuxer is forced by the extension, and the codecs are few.
CONTAINER_FORMATS = {"mp4": "mp4", "webm": "matroska", "mkv": "matroska"}
CODECS = ("h264", "hevc", "vp9", "av1", "libdav1d", "libaom-av1", "libvpx-vp9", "ffv1")
MAX_PIXELS = 3840 * 2160 * 4
MAX_FRAMES = 100_000  # of one member of a shard
MAX_FPS = 1000

# Without these flags swscale rounds coarsely: flat colours came back off by up to 3 of 255, with them by 1.
_SWSCALE = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT


class VideoError(ValueError):
    """A video that cannot be read, with the reason; the message starts with the file's name where there is one."""


@dataclass(frozen=True)
class VideoFacts:
    """What a video is: frames counted from its packets, size as displayed, codec by FFmpeg's name."""

    fps: float
    frames: int
    height_px: int
    width_px: int
    codec: str


def probe(source: Source, extension: str | None = None) -> VideoFacts:
    """Count the frames and decode the first; `extension` as in read_frames. Raises VideoError."""
    with _open(source, extension) as (container, stream):
        rate = stream.average_rate or stream.guessed_rate
        times, _ = _frame_times(container, stream, MAX_FRAMES if extension else math.inf)
        if not times or not rate or not 0 < rate <= MAX_FPS:
            raise VideoError(f"{len(times)} frames at {rate} fps; a video has at least 1, at up to {MAX_FPS} fps")
        container.seek(min(times[0], 0), stream=stream)
        height_px, width_px, _ = next(_decode(container, stream))[1].shape
        return VideoFacts(float(rate), len(times), height_px, width_px, stream.codec_context.name)


def iter_frames(source: Source) -> Iterator[np.ndarray]:
    """Decode from the first frame to the last, yielding frame_HWC. Raises VideoError, also in mid-file."""
    with _open(source, None) as (container, stream):
        for _, frame_HWC in _decode(container, stream):
            yield frame_HWC


def read_frames(source: Source, indices: Sequence[int] | None = None, extension: str | None = None) -> np.ndarray:
    """Decode the frames of the given ascending numbers (None: all) into frames_THWC.

    Frames are numbered by display time, so a variable rate or an edit list shifts nothing, and decoding starts at
    the last keyframe before the first wanted frame.

    extension  mp4, webm or mkv for a shard's bytes: forces the demuxer and admits only CODECS
    raises     VideoError if the file is unreadable or has no such frame
    """
    with _open(source, extension) as (container, stream):
        times, keyframes = _frame_times(container, stream, MAX_FRAMES if extension else math.inf)
        wanted = range(len(times)) if indices is None else indices
        if not wanted or wanted[0] < 0 or wanted[-1] >= len(times):
            raise VideoError(f"frames {list(wanted)[:1]} to {list(wanted)[-1:]} asked of a video of {len(times)}")
        wanted_times = [times[i] for i in wanted]
        nearest = keyframes[max(0, bisect.bisect_right(keyframes, wanted_times[0]) - 1)] if keyframes else times[0]
        found: dict[int | None, np.ndarray] = {}
        # Containers seek by decoding time, which B-frames shift: a seek may land one keyframe late. Then start over.
        for start in (nearest, min(times[0], 0)):
            container.seek(start, stream=stream)
            found |= dict(_decode(container, stream, set(wanted_times)))
            if len(found) == len(wanted_times):
                return np.stack([found[time] for time in wanted_times])
        raise VideoError(f"{len(wanted_times) - len(found)} of {len(wanted_times)} wanted frames do not decode")


def write_video(
    target: str | Path | io.BytesIO,
    frames_THWC: np.ndarray | Iterable[np.ndarray],
    fps: float,
    crf: int = 18,
    gop: int = 12,
) -> int:
    """Encode uint8 RGB frames, an array or any stream of frame_HWC, as H.264 in MP4; returns their number.

    The same frames give the same bytes (one thread, no dates). 4:2:0 needs even sides: an odd last row or column is
    dropped. A short `gop`, the most frames from keyframe to keyframe, is what makes reading a window fast.
    """
    destination = target if isinstance(target, io.BytesIO) else str(target)
    rate = Fraction(fps).limit_denominator(1001)
    count = 0
    with av.open(destination, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = None
        for frame_HWC in frames_THWC:
            height_px, width_px = frame_HWC.shape[0] & ~1, frame_HWC.shape[1] & ~1
            if stream is None:
                stream = _add_h264(container, rate, height_px, width_px, crf, gop)
            rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame_HWC[:height_px, :width_px]), format="rgb24")
            frame = rgb.reformat(
                format="yuv420p",
                dst_colorspace=Colorspace.ITU709,
                dst_color_range=ColorRange.MPEG,
                interpolation=_SWSCALE,
                threads=1,
            )
            frame.pts, frame.time_base = count, 1 / rate
            container.mux(stream.encode(frame))
            count += 1
        if stream is None:
            raise ValueError("write_video was given no frames")
        container.mux(stream.encode(None))
    return count


def _add_h264(container: Any, rate: Fraction, height_px: int, width_px: int, crf: int, gop: int) -> Any:
    # mbtree=0: with x264's macroblock tree the same frames gave other bytes now and then, even in one thread (of 18
    # clips of 64 x 48, 10 came in two or three versions over 40 encodings; without it none did). It also takes bits
    # from what moves, which is what matters here.
    options = {"crf": str(crf), "preset": "fast", "threads": "1", "x264-params": "mbtree=0"}
    stream = container.add_stream("libx264", rate=rate, options=options)
    stream.height, stream.width, stream.pix_fmt = height_px, width_px, "yuv420p"
    context = stream.codec_context
    context.gop_size, context.thread_count, context.time_base = gop, 1, 1 / rate
    # Untagged, players guess BT.601 for small and BT.709 for large pictures, and colours shift between them.
    context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
    context.color_primaries = context.color_trc = 1
    return stream


@contextmanager
def _open(source: Source, extension: str | None) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open the first video stream for decoding in one thread; FFmpeg's errors leave as VideoError naming the file."""
    name = "" if isinstance(source, bytes) else f"{source}: "
    file = io.BytesIO(source) if isinstance(source, bytes) else str(source)
    try:
        with av.open(file, "r", format=CONTAINER_FORMATS[extension] if extension else None) as container:
            if not container.streams.video:
                raise VideoError("no video stream")
            stream = container.streams.video[0]
            context = stream.codec_context
            if extension and context.name not in CODECS:
                raise VideoError(f"codec {context.name}; allowed in a shard: {', '.join(CODECS)}")
            if not 0 < context.width * context.height <= MAX_PIXELS:
                raise VideoError(f"frames of {context.width} x {context.height}; up to {MAX_PIXELS} pixels are read")
            # Frame threads hang when decoding stops early (PyAV-Org/PyAV 1962); the limit also holds in mid-stream.
            context.thread_type, context.thread_count = "NONE", 1
            context.options = {"max_pixels": str(MAX_PIXELS)}
            yield container, stream
    except (av.error.FFmpegError, OSError) as error:
        raise VideoError(f"{name}{getattr(error, 'strerror', None) or error}") from error
    except VideoError as error:
        raise VideoError(f"{name}{error}") from error
    except StopIteration:
        raise VideoError(f"{name}no frame decodes") from None


def _frame_times(container: InputContainer, stream: VideoStream, limit: float) -> tuple[list[int], list[int]]:
    """List the display times of all frames and of the keyframes, ascending, in the stream's time base."""
    times: list[int] = []
    keyframes: list[int] = []
    for packet in container.demux(stream):
        if packet.size == 0 or packet.is_discard:
            continue
        time = packet.dts if packet.pts is None else packet.pts  # AVI has decoding times only
        if time is None:
            raise VideoError("frames without times")
        times.append(time)
        if packet.is_keyframe:
            keyframes.append(time)
        if len(times) > limit:
            raise VideoError(f"over {limit} frames")
    return sorted(times), sorted(keyframes)


def _decode(
    container: InputContainer, stream: VideoStream, wanted: set[int] | None = None
) -> Iterator[tuple[int | None, np.ndarray]]:
    """Yield (display time, frame_HWC) of the wanted times (None: all), up to the last of them."""
    last = max(wanted) if wanted else None
    for frame in container.decode(stream):
        if wanted is None or frame.pts in wanted:
            # The source's own range and colour matrix are read off the frame.
            rgb = frame.reformat(format="rgb24", dst_color_range=ColorRange.JPEG, interpolation=_SWSCALE, threads=1)
            frame_HWC = rgb.to_ndarray()
            yield frame.pts, np.ascontiguousarray(np.rot90(frame_HWC, frame.rotation // 90))
        if last is not None and frame.pts is not None and frame.pts >= last:
            return
