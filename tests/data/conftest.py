"""Videos whose frames carry their own number, and shards packed from them."""

import io
from pathlib import Path

import numpy as np
import pytest

from toolkit.authoring.pack import pack
from toolkit.data.video import write_video

HEIGHT_PX, WIDTH_PX, BITS = 48, 64, 8


def numbered_frames(numbers: range | list[int], video: int = 0) -> np.ndarray:
    """Write each frame's number as 8 black or white columns, above a stripe that names the video: frames_THWC."""
    frames_THWC = np.zeros((len(numbers), HEIGHT_PX, WIDTH_PX, 3), np.uint8)
    for frame_HWC, number in zip(frames_THWC, numbers, strict=True):
        bits = np.array([(number >> bit) & 1 for bit in range(BITS)], np.uint8)
        frame_HWC[:32] = np.repeat(bits * 255, WIDTH_PX // BITS)[:, None]
        frame_HWC[32:] = 40 + 20 * video
    return frames_THWC


def frame_numbers(frames_THWC: np.ndarray) -> list[int]:
    """Read the numbers back."""
    columns = frames_THWC[:, 8:24].mean((1, 3)).reshape(len(frames_THWC), BITS, -1).mean(2)
    return [int(((row > 128) << np.arange(BITS)).sum()) for row in columns]


def encode(frames_THWC: np.ndarray, fps: float = 25, **options: int) -> bytes:
    buffer = io.BytesIO()
    write_video(buffer, frames_THWC, fps, **options)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six numbered videos of 20 to 45 frames at 25 fps."""
    folder = tmp_path_factory.mktemp("videos")
    for video in range(6):
        write_video(folder / f"v{video}.mp4", numbered_frames(range(20 + 5 * video), video), 25)
    return folder


@pytest.fixture(scope="session")
def packed(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Those videos as shards of a clip or two each; read only."""
    out = tmp_path_factory.mktemp("packed") / "shards"
    pack(videos, out, clip_seconds=0.8, shard_mb=0.008)
    return out
