"""One sample -> one training clip: draw a window, decode only that, scale and crop; or cut it out of cached latents.

Test: pytest tests/data/test_clips.py

What is drawn depends on (seed, k) alone, k the position of the sample in the run.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from toolkit.data.format import BadSample, ClipInfo
from toolkit.data.index import DatasetIndex
from toolkit.data.latents import LatentsError, LatentsReader, Window
from toolkit.data.video import VideoError, read_frames
from toolkit.rng import integer, uniform


@dataclass(frozen=True)
class ClipSettings:
    """What a training clip looks like: T frames, every stride-th of the source, one of `strides` drawn per clip.

    strides  ascending
    """

    frames: int
    height_px: int
    width_px: int
    strides: tuple[int, ...] = (1,)
    flip: bool = False
    reverse: bool = False
    random_crop: float = 0.0  # a crop is drawn whose sides are up to this share shorter than the largest that fits
    window: Literal["random", "centre"] = "random"  # centre: smallest stride, middle of the source, no augmentation
    matched: bool = False  # whether what moved between the two ends is looked for

    def span(self, stride: int) -> int:
        """Source frames from the first of a window to its last, both counted."""
        return (self.frames - 1) * stride + 1

    @property
    def least_frames(self) -> int:
        """Source frames that a clip must have: one too short for the other strides takes the smallest."""
        return self.span(self.strides[0])

    @property
    def augmented(self) -> bool:
        return self.window == "random" and (self.flip or self.random_crop > 0)


@dataclass(frozen=True)
class Clip:
    """Frames as they are trained on; fps is the rate they are spaced at, so the source's over the stride."""

    frames_THWC: np.ndarray
    fps: float
    motion: float
    key: str


class CachedClip(NamedTuple):
    """As Clip, with what the encoders made of the frames."""

    latents: Window
    fps: float
    motion: float
    key: str


class Crop(NamedTuple):
    """Part of the largest box of the wanted aspect: its side as a share, and where it lies in what is left, 0 to 1."""

    side: float = 1.0
    x: float = 0.5
    y: float = 0.5
    flip: bool = False


def load_clip(index: DatasetIndex, sample: int, settings: ClipSettings, seed: int, k: int) -> Clip:
    """Read and decode one sample's window for position k. Raises BadSample with the reason."""
    clip, key = index.rows[sample].clip, index.rows[sample].key
    frames, stride = draw_window(clip, settings, seed, k)
    frames_THWC = decode_frames(index, sample, frames, settings, draw_crop(settings, seed, k))
    if draw_reverse(settings, seed, k):
        frames_THWC = frames_THWC[::-1]
    return Clip(frames_THWC, clip.fps / stride, clip.motion, key)


def load_cached(
    index: DatasetIndex, sample: int, settings: ClipSettings, seed: int, k: int, reader: LatentsReader
) -> CachedClip:
    """Cut the same window out of a cached sample. Raises BadSample with the reason."""
    row, shard = index.rows[sample], index.shards[sample]
    frames, stride = draw_window(row.clip, settings, seed, k)
    if row.latents is None:
        raise BadSample(f"{row.key} holds no latents; its video did not decode when the cache was made")
    variant = integer(row.latents.variants, seed, "variant", k) if settings.augmented else 0
    offset = row.members["safetensors"].offset
    assert isinstance(shard, Path)  # latents of another machine are refused when they are opened
    try:
        latents = reader.read(shard, offset, row.latents, variant, frames)
    except (LatentsError, OSError) as error:
        raise BadSample(f"{row.key}.safetensors at offset {offset}: {error}") from error
    if draw_reverse(settings, seed, k):
        mean_TX, std_TX, embeds_2X, info = latents
        latents = Window(mean_TX[::-1], std_TX[::-1], embeds_2X[::-1], info)
    return CachedClip(latents, row.clip.fps / stride, row.clip.motion, row.key)


def decode_frames(index: DatasetIndex, sample: int, frames: range, settings: ClipSettings, crop: Crop) -> np.ndarray:
    """Decode frames of a sample, scaled and cropped: frames_THWC. Raises BadSample with the reason."""
    row = index.rows[sample]
    extension = row.video_extension
    if extension is None:
        raise BadSample(f"{row.key} holds no video; its members are {', '.join(row.members)}")
    data = index.read(sample, extension)

    def fit(frame_HWC: np.ndarray) -> np.ndarray:
        return resize_cover(frame_HWC[None], settings.height_px, settings.width_px, crop)[0]

    try:
        return read_frames(data, frames, extension, fit)
    except VideoError as error:
        raise BadSample(f"{row.key}.{extension} at offset {row.members[extension].offset}: {error}") from error


def draw_window(clip: ClipInfo, settings: ClipSettings, seed: int, k: int) -> tuple[range, int]:
    """Draw the source's frame numbers and their stride. Raises BadSample if no stride fits."""
    fitting = [stride for stride in settings.strides if settings.span(stride) <= clip.frames]
    if not fitting:
        raise BadSample(
            f"has {clip.frames} frames; {settings.frames} at stride {settings.strides[0]} need {settings.least_frames}"
        )
    if settings.window == "centre":
        stride = fitting[0]
        start = (clip.frames - settings.span(stride)) // 2
    else:
        stride = fitting[integer(len(fitting), seed, "stride", k)] if len(fitting) > 1 else fitting[0]
        start = integer(clip.frames - settings.span(stride) + 1, seed, "window", k)
    return range(start, start + settings.span(stride), stride), stride


def draw_crop(settings: ClipSettings, seed: int, k: int, purpose: str = "crop") -> Crop:
    """Draw whether the picture is mirrored and, for a random_crop above 0, what part of it is seen and where that lies."""
    if not settings.augmented:
        return Crop()
    flip = settings.flip and integer(2, seed, f"{purpose}/flip", k) == 1
    if not settings.random_crop:
        return Crop(flip=flip)
    side = 1 - settings.random_crop * uniform(seed, f"{purpose}/side", k)
    return Crop(side, uniform(seed, f"{purpose}/x", k), uniform(seed, f"{purpose}/y", k), flip)


def draw_reverse(settings: ClipSettings, seed: int, k: int) -> bool:
    """Draw whether a clip is played backwards."""
    return settings.reverse and settings.window == "random" and integer(2, seed, "reverse", k) == 1


def cover_box(
    source_size: tuple[int, int],
    size: tuple[int, int],
    crop: Crop = Crop(),  # noqa: B008
) -> tuple[float, float, float, float]:
    """Left, top, right and bottom in px of the crop of the largest box in a source that has the aspect of a size.

    source_size, size  height, width in px
    """
    (source_height_px, source_width_px), (height_px, width_px) = source_size, size
    scale = max(height_px / source_height_px, width_px / source_width_px)
    crop_width, crop_height = width_px / scale * crop.side, height_px / scale * crop.side
    left, top = max(0.0, source_width_px - crop_width) * crop.x, max(0.0, source_height_px - crop_height) * crop.y
    return left, top, min(left + crop_width, source_width_px), min(top + crop_height, source_height_px)


def resize_cover(frames_THWC: np.ndarray, height_px: int, width_px: int, crop: Crop = Crop()) -> np.ndarray:  # noqa: B008
    """Cut the crop of the largest box of that aspect and scale it to height x width, antialiased.

    Frames of that size already, whole and unmirrored, pass untouched.
    """
    if (source_size := frames_THWC.shape[1:3]) != (height_px, width_px) or crop.side < 1:
        # Cutting the box while scaling is one pass, and exact where scale-then-crop would round the size first.
        box = cover_box(source_size, (height_px, width_px), crop)
        frames_THWC = np.stack([
            np.asarray(Image.fromarray(frame_HWC).resize((width_px, height_px), Image.Resampling.BICUBIC, box=box))
            for frame_HWC in frames_THWC
        ])  # fmt: skip
    return np.ascontiguousarray(frames_THWC[:, :, ::-1]) if crop.flip else frames_THWC
