"""Video files and bytes <-> frames, by PyAV: exact frame numbers, one thread, one frame in memory at a time.

Test: pytest tests/data/test_video.py

T frame, H height and W width in pixels, C the channels red, green, blue; frames are uint8 and upright, that is, the
rotation a phone writes beside its video, and the mirroring a selfie camera does, have been applied.
"""

import bisect
import io
import math
import struct
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.container import InputContainer
from av.stream import Discard
from av.video.frame import VideoFrame
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation, VideoReformatter
from av.video.stream import VideoStream
from PIL import Image

from toolkit.data.boxes import claimed_samples

Source = str | Path | bytes

# Bytes of a shard may come from anywhere, so the demuxer is forced by the extension, and the codecs are few.
CONTAINER_FORMATS = {"mp4": "mp4", "webm": "matroska", "mkv": "matroska"}
CODECS = ("h264", "hevc", "vp9", "av1", "libdav1d", "libaom-av1", "libvpx-vp9", "ffv1")
MAX_PIXELS = 3840 * 2160 * 4
# Of one member of a shard. Training reads up to 2048 x 2048; a decoder may be made to keep 16 such frames in memory.
MAX_MEMBER_PIXELS = 2048 * 2048  # of 12 bits, as 8-bit 4:2:0 has; fewer where they have more
MAX_FRAMES = 100_000
MAX_DECODED_PIXELS = 4_000_000_000  # from the keyframe before a window to its end
MAX_FPS = 1000

# Without these flags swscale rounds coarsely: flat colours came back off by up to 3 of 255, with them by 1.
_EXACT = Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
_SWSCALE = Interpolation.BICUBIC | _EXACT
# Where only the chroma planes are enlarged, bilinear is as near to the source, in 0.6 of the time.
_SWSCALE_CHROMA = Interpolation.BILINEAR | _EXACT
_UNSPECIFIED = 2  # FFmpeg's number for a colour matrix that is not said


class VideoError(ValueError):
    """A video that cannot be read, with the reason; the message starts with the file's name where there is one."""


@dataclass(frozen=True)
class VideoFacts:
    """What a video is: frames counted from its packets, size as displayed.

    tick_s   what times are rounded to
    times_s  when each frame is shown, ascending
    """

    fps: float
    frames: int
    height_px: int
    width_px: int
    tick_s: float
    times_s: tuple[float, ...] = field(repr=False)


def probe(source: Source, extension: str | None = None) -> VideoFacts:
    """Count the frames and decode the first; `extension` as in read_frames. Raises VideoError."""
    with open_video(source, extension) as (container, stream):
        rate = stream.average_rate or stream.guessed_rate
        times, _ = _frame_times(container, stream, MAX_FRAMES if extension else math.inf)
        if not times or not rate or not 0 < rate <= MAX_FPS:
            raise VideoError(f"{len(times)} frames at {rate} fps; a video has at least 1, at up to {MAX_FPS} fps")
        container.seek(min(times[0], 0), stream=stream)
        frame = next(container.decode(stream))
        sides_px = frame.height, frame.width
        height_px, width_px = sides_px[::-1] if frame.rotation // 90 % 2 else sides_px
        tick_s = float(stream.time_base or 1 / rate)
        return VideoFacts(
            fps=float(rate),
            frames=len(times),
            height_px=height_px,
            width_px=width_px,
            tick_s=tick_s,
            times_s=tuple(time * tick_s for time in times),
        )


def iter_frames(
    source: Source, numbers: Container[int] | None = None, extension: str | None = None
) -> Iterator[np.ndarray]:
    """Decode from the first frame to the last, yielding frame_HWC in square pixels. Raises VideoError, also in mid-file.

    numbers    yield only these, counted from 0 as they decode; None: all
    extension  as in read_frames; None: where a packet is damaged, go on as decode_on does
    """
    with open_video(source, extension) as (container, stream):
        reformatter = SdrReformatter()
        frames = container.decode(stream) if extension else (frame for frame, _ in decode_on(container, stream))
        for number, frame in enumerate(frames):
            if numbers is None or number in numbers:
                yield _to_rgb(frame, reformatter, *square_size(frame, stream))


def read_frames(
    source: Source,
    indices: Sequence[int] | None = None,
    extension: str | None = None,
    transform: Callable[[np.ndarray], np.ndarray] | None = None,
) -> np.ndarray:
    """Decode the frames of the given ascending numbers (None: all) into frames_THWC.

    Frames are numbered by display time, so a variable rate or an edit list shifts nothing, and decoding starts at
    the last keyframe before the first wanted frame.

    extension  mp4, webm or mkv for a shard's bytes: forces the demuxer, admits only CODECS, and bounds what is claimed
    transform  makes of each frame_HWC what is kept, so that one frame of full size is in memory at a time
    raises     VideoError if the file is unreadable, has no such frame or changes its size
    """
    with open_video(source, extension) as (container, stream):
        times, keyframes = _frame_times(container, stream, MAX_FRAMES if extension else math.inf)
        wanted = range(len(times)) if indices is None else indices
        if not wanted or wanted[0] < 0 or wanted[-1] >= len(times):
            raise VideoError(f"frames {list(wanted)[:1]} to {list(wanted)[-1:]} asked of a video of {len(times)}")
        wanted_times = [times[i] for i in wanted]
        nearest = keyframes[max(0, bisect.bisect_right(keyframes, wanted_times[0]) - 1)] if keyframes else times[0]
        found: dict[int | None, np.ndarray] = {}
        shapes = set()
        # Containers seek by decoding time, which B-frames shift: a seek may land one keyframe late. Then start over.
        for start in (nearest, min(times[0], 0)):
            count = wanted[-1] + 1 - bisect.bisect_left(times, start)
            if extension and count * stream.width * stream.height > MAX_DECODED_PIXELS:
                raise VideoError(f"{count} frames from the keyframe on; up to {MAX_DECODED_PIXELS} pixels are decoded")
            container.seek(start, stream=stream)
            for time, frame_HWC in _decode(container, stream, set(wanted_times)):
                shapes.add(frame_HWC.shape)
                found[time] = transform(frame_HWC) if transform else frame_HWC
            if len(shapes) > 1:
                raise VideoError(f"frames of several sizes: {sorted(shape[:2] for shape in shapes)}")
            if len(found) == len(wanted_times):
                return np.stack([found[time] for time in wanted_times])
        raise VideoError(f"{len(wanted_times) - len(found)} of {len(wanted_times)} wanted frames do not decode")


class VideoWriter:
    """Encodes uint8 RGB frames as H.264 in MP4, one by one.

    The same frames give the same bytes (one thread, no dates). 4:2:0 needs even sides: an odd last row or column is
    dropped. A short `gop`, the most frames from keyframe to keyframe, is what makes reading a window fast.
    """

    def __init__(self, target: str | Path | io.BytesIO, fps: float, crf: int = 18, gop: int = 12) -> None:
        destination = target if isinstance(target, io.BytesIO) else str(target)
        self.container = av.open(destination, "w", format="mp4", options={"fflags": "+bitexact"})
        self.rate, self.crf, self.gop = packed_rate(fps), crf, gop
        self.count, self.reformatter = 0, VideoReformatter()
        self.stream: Any = None

    def add(self, frame_HWC: np.ndarray) -> None:
        height_px, width_px = frame_HWC.shape[0] & ~1, frame_HWC.shape[1] & ~1
        if self.stream is None:
            self.stream = _add_h264(self.container, self.rate, height_px, width_px, self.crf, self.gop)
        frame = self.reformatter.reformat(
            VideoFrame.from_ndarray(np.ascontiguousarray(frame_HWC[:height_px, :width_px]), format="rgb24"),
            format="yuv420p",
            dst_colorspace=Colorspace.ITU709,
            dst_color_range=ColorRange.MPEG,
            interpolation=_SWSCALE,
            threads=1,
        )
        frame.pts, frame.time_base = self.count, 1 / self.rate
        self.container.mux(self.stream.encode(frame))
        self.count += 1

    def close(self) -> None:
        if self.stream is not None:
            self.container.mux(self.stream.encode(None))
        self.container.close()


def write_video(
    target: str | Path | io.BytesIO,
    frames_THWC: np.ndarray | Iterable[np.ndarray],
    fps: float,
    crf: int = 18,
    gop: int = 12,
) -> int:
    """Encode frames, an array or any stream of frame_HWC, as VideoWriter does; returns their number."""
    writer = VideoWriter(target, fps, crf, gop)
    for frame_HWC in frames_THWC:
        writer.add(frame_HWC)
    if not writer.count:
        raise ValueError("write_video was given no frames")
    writer.close()
    return writer.count


def write_gif(target: Path | io.BytesIO, frames_THWC: np.ndarray, fps: float) -> None:
    """Write uint8 frames as an animation that goes round for ever.

    A GIF knows hundredths of a second alone, so frames of other rates last now one more, now one less.
    """
    images = [Image.fromarray(frame_HWC) for frame_HWC in frames_THWC]
    ends_cs = [round(100 * i / fps) for i in range(len(images) + 1)]
    lasts_ms = [10 * (end - begin) for begin, end in pairwise(ends_cs)]
    images[0].save(target, "GIF", save_all=True, append_images=images[1:], duration=lasts_ms, loop=0)


def packed_rate(fps: float) -> Fraction:
    """The rate that a packed video states: the nearest fraction that MP4 and players take, 29.97 as 30000/1001."""
    return Fraction(fps).limit_denominator(1001)


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
def open_video(source: Source, extension: str | None) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open the first video stream for decoding in one thread; FFmpeg's errors leave as VideoError naming the file."""
    name = "" if isinstance(source, bytes) else f"{source}: "
    file = io.BytesIO(source) if isinstance(source, bytes) else str(source)
    max_pixels = MAX_MEMBER_PIXELS if extension else MAX_PIXELS
    # Holds while FFmpeg looks for the size, and in mid-stream; it counts rows padded to 64 px, up to a quarter more.
    limits = {"max_pixels": str(max_pixels * 5 // 4)}
    if extension:  # else FFmpeg decodes a foreign codec's first frames before it can be refused by name
        limits["codec_whitelist"] = ",".join(CODECS)
    container_format = CONTAINER_FORMATS[extension] if extension else None
    try:
        if extension == "mp4" and isinstance(source, bytes):
            _refuse_claims(source)
        with av.open(file, "r", format=container_format, options=limits, metadata_errors="ignore") as container:
            if not container.streams.video:
                raise VideoError("no video stream")
            stream = container.streams.video[0]
            context = stream.codec_context
            if context is None:
                raise VideoError("a codec that FFmpeg does not know")
            if extension and context.name not in CODECS:
                raise VideoError(f"codec {context.name}; allowed in a shard: {', '.join(CODECS)}")
            if not 0 < context.width * context.height <= max_pixels:
                raise VideoError(f"frames of {context.width} x {context.height}; up to {max_pixels} pixels are read")
            bits = context.format.padded_bits_per_pixel if extension and context.format else 12
            if context.width * context.height * bits > max_pixels * 12:
                raise VideoError(f"frames of {context.width} x {context.height} with {bits} bits a pixel are too large")
            for other in container.streams:
                if other is not stream:
                    other.discard = Discard.all  # what nobody reads is not unpacked either: a track may be a zip bomb
            # Frame threads hang when decoding stops early (PyAV-Org/PyAV 1962).
            context.thread_type, context.thread_count = "NONE", 1
            context.options = limits
            yield container, stream
    except (av.error.FFmpegError, OSError) as error:
        raise VideoError(f"{name}{getattr(error, 'strerror', None) or error}") from error
    except VideoError as error:
        raise VideoError(f"{name}{error}") from error
    except StopIteration:
        raise VideoError(f"{name}no frame decodes") from None


def _refuse_claims(data: bytes) -> None:
    try:
        samples = claimed_samples(data)
    except ValueError as error:
        raise VideoError(str(error)) from None
    if samples > MAX_FRAMES:
        raise VideoError(f"over {MAX_FRAMES} frames: its tracks claim {samples} samples")


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
    container: InputContainer, stream: VideoStream, wanted: set[int]
) -> Iterator[tuple[int | None, np.ndarray]]:
    """Yield (display time, frame_HWC) of the wanted times, up to the last of them."""
    last, is_done = max(wanted), False
    reformatter = SdrReformatter()
    for packet in container.demux(stream):
        if is_done:  # to the end, for a generator of packets that is left before it leaks (PyAV 18.1)
            continue
        # What no other frame refers to and nobody wants is not decoded: a quarter of the time at a keyframe every 12.
        idle = packet.pts is not None and packet.pts not in wanted
        stream.codec_context.skip_frame = "NONREF" if idle else "DEFAULT"
        for frame in packet.decode():
            if frame.pts in wanted:
                yield frame.pts, _to_rgb(frame, reformatter, frame.width, frame.height)
            if frame.pts is not None and frame.pts >= last:
                is_done = True
                break


def decode_on(container: InputContainer, stream: VideoStream) -> Iterator[tuple[VideoFrame, bool]]:
    """Yield every frame that decodes, and whether frames just before it are lost; raises FFmpegError at the end if those
    to the end are.

    What follows a damaged packet refers to it, so decoding goes on at the next keyframe. An AVI has no display times, and
    FFmpeg guesses wrong ones where there are B-frames, so its frames get the times of its packets in order.
    """
    times: deque[int | None] = deque()
    damage: av.error.FFmpegError | None = None
    after_loss, resumed = False, None
    for packet in container.demux(stream):
        if damage is not None:
            if not packet.size or not packet.is_keyframe:
                continue
            damage, resumed = None, packet.pts
        times.append(packet.dts)
        try:
            frames = packet.decode()
        except av.error.InvalidDataError as error:
            damage, after_loss = error, True
            stream.codec_context.flush_buffers()
            times.clear()
            continue
        for frame in frames:
            time = times.popleft() if times else None
            if resumed is not None and frame.pts is not None and frame.pts < resumed:
                after_loss = True  # shown before that keyframe, it may refer to what is lost
                continue
            resumed = None  # times may go back later
            if container.format.name == "avi":
                frame.pts = time
            yield frame, after_loss
            after_loss = False
    if damage is not None:
        raise damage


class SdrReformatter:
    """Scales frames, each to the same size, and shows HDR (HLG, PQ) and BT.2020 in the brightness and colours of BT.709.

    The mapping is swscale's: light as on BT.2100's reference display, of which 203 cd/m2 are white (BT.2408). What BT.709
    can show looks the same, what is brighter or more colourful comes to its edge.
    """

    def __init__(self) -> None:
        self._scaler, self._mapper = VideoReformatter(), VideoReformatter()

    def reformat(
        self, frame: VideoFrame, width_px: int, height_px: int, pixels: str, interpolation: Interpolation
    ) -> VideoFrame:
        is_hdr = frame.color_trc in (ColorTrc.ARIB_STD_B67, ColorTrc.SMPTE2084)
        is_wide = is_hdr or frame.color_primaries == ColorPrimaries.BT2020
        # The source's own range and colour matrix are read off the frame; where no matrix is said, FFmpeg takes BT.601, but
        # players take BT.709 if the frame is larger than a DVD's.
        is_untold_hd = frame.colorspace == _UNSPECIFIED and (frame.width >= 1280 or frame.height > 576)
        matrix = Colorspace.ITU709 if is_untold_hd else None
        # Mapped in this same step, or by way of packed RGB, colours come out off by up to 100 of 255 (FFmpeg 8.1).
        scaled = self._scaler.reformat(
            frame,
            width_px,
            height_px,
            format="gbrp16le" if is_wide else pixels,
            src_colorspace=matrix,
            dst_colorspace=matrix,
            dst_color_range=ColorRange.JPEG,
            interpolation=interpolation,
            threads=1,
        )
        if not is_wide:
            return scaled
        scaled.color_primaries = ColorPrimaries.BT2020  # HDR has no other ones, said or not
        scaled.color_trc = frame.color_trc if is_hdr else ColorTrc.BT709  # those of SDR are all shown alike
        return self._mapper.reformat(
            scaled,
            format=pixels,
            dst_colorspace=Colorspace.ITU601,  # JPEG's, where it is not RGB
            dst_color_range=ColorRange.JPEG,
            dst_color_trc=ColorTrc.BT709,
            dst_color_primaries=ColorPrimaries.BT709,
            interpolation=interpolation,
            threads=1,
        )


def _to_rgb(frame: VideoFrame, reformatter: SdrReformatter, width_px: int, height_px: int) -> np.ndarray:
    same_size = (frame.width, frame.height) == (width_px, height_px)
    rgb = reformatter.reformat(frame, width_px, height_px, "rgb24", _SWSCALE_CHROMA if same_size else _SWSCALE)
    return np.ascontiguousarray(upright(rgb.to_ndarray(), frame))


def upright(planes: np.ndarray, frame: VideoFrame, axes: tuple[int, int] = (0, 1)) -> np.ndarray:
    """Mirror and turn what was decoded as the matrix beside it says, of which `rotation` is the turn alone."""
    matrix: Any = frame.side_data.get("DISPLAYMATRIX")
    if matrix is not None:
        a, b, _, c, d = struct.unpack_from("=5i", bytes(matrix))
        if a * d - b * c < 0:
            planes = np.flip(planes, axes[0])
    return np.rot90(planes, frame.rotation // 90, axes)


def square_size(frame: VideoFrame, stream: VideoStream) -> tuple[int, int]:
    """Width and height in px that show a frame of wide or narrow pixels in square ones; a side only shrinks."""
    pixel_aspect = float(stream.sample_aspect_ratio or 1) or 1.0
    return max(2, round(frame.width * min(1, pixel_aspect))), max(2, round(frame.height / max(1, pixel_aspect)))
