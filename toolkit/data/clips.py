"""One sample -> one training clip: draw a window, decode only that, scale and crop.

Test: pytest tests/data/test_clips.py

What is drawn depends on (seed, k) alone, k the position of the sample in the run.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image

from toolkit.data.format import BadSample, ClipInfo
from toolkit.data.index import DatasetIndex
from toolkit.data.video import VideoError, read_frames
from toolkit.rng import rng


@dataclass(frozen=True)
class ClipSettings:
    """What a training clip looks like: T frames, every stride-th of the source, one of `strides` drawn per clip."""

    frames: int
    height_px: int
    width_px: int
    strides: tuple[int, ...] = (1,)
    flip: bool = False
    window: Literal["random", "centre"] = "random"  # centre: smallest stride, middle of the source, never flipped


@dataclass(frozen=True)
class Clip:
    """Frames as they are trained on; fps is the rate they are spaced at, so the source's over the stride."""

    frames_THWC: np.ndarray
    fps: float
    motion: float
    key: str
    shard: str
    position: int


def load_clip(index: DatasetIndex, sample: int, settings: ClipSettings, seed: int, k: int) -> Clip:
    """Read and decode one sample for position k. Raises BadSample with the reason."""
    row, shard = index.rows[sample], index.shards[sample].name
    extension = row.video_extension
    if extension is None:
        raise BadSample(f"{row.key} holds no video; its members are {', '.join(row.members)}")
    frames, stride, flip = draw_window(row.clip, settings, seed, k)
    data = index.read(sample, extension)
    try:
        frames_THWC = read_frames(data, frames, extension)
    except VideoError as error:
        raise BadSample(f"{row.key}.{extension} at offset {row.members[extension].offset}: {error}") from error
    frames_THWC = resize_cover(frames_THWC, settings.height_px, settings.width_px)
    if flip:
        frames_THWC = np.ascontiguousarray(frames_THWC[:, :, ::-1])
    return Clip(frames_THWC, row.clip.fps / stride, row.clip.motion, row.key, shard, k)


def draw_window(clip: ClipInfo, settings: ClipSettings, seed: int, k: int) -> tuple[range, int, bool]:
    """Draw the source's frame numbers, their stride and whether to mirror. Raises BadSample if no stride fits."""
    spans = {stride: (settings.frames - 1) * stride + 1 for stride in sorted(settings.strides)}
    fitting = [stride for stride, span in spans.items() if span <= clip.frames]
    if not fitting:
        raise BadSample(
            f"has {clip.frames} frames; {settings.frames} at stride {min(spans)} need {min(spans.values())}"
        )
    if settings.window == "centre":
        stride, flip = fitting[0], False
        start = (clip.frames - spans[stride]) // 2
    else:
        generator = rng(seed, "window", k)
        stride = fitting[int(torch.randint(len(fitting), (), generator=generator))]
        start = int(torch.randint(clip.frames - spans[stride] + 1, (), generator=generator))
        flip = settings.flip and bool(torch.randint(2, (), generator=rng(seed, "flip", k)))
    return range(start, start + spans[stride], stride), stride, flip


def resize_cover(frames_THWC: np.ndarray, height_px: int, width_px: int) -> np.ndarray:
    """Scale frames to cover height x width, antialiased, and crop the centre; frames of that size pass untouched."""
    _, source_height_px, source_width_px, _ = frames_THWC.shape
    if (source_height_px, source_width_px) == (height_px, width_px):
        return frames_THWC
    scale = max(height_px / source_height_px, width_px / source_width_px)
    crop_width, crop_height = width_px / scale, height_px / scale
    left, top = (source_width_px - crop_width) / 2, (source_height_px - crop_height) / 2
    # Cutting the box while scaling is one pass, and exact where scale-then-crop would round the size first.
    box = (
        max(left, 0.0),
        max(top, 0.0),
        min(left + crop_width, source_width_px),
        min(top + crop_height, source_height_px),
    )
    return np.stack([
        np.asarray(Image.fromarray(frame_HWC).resize((width_px, height_px), Image.Resampling.BICUBIC, box=box))
        for frame_HWC in frames_THWC
    ])  # fmt: skip
