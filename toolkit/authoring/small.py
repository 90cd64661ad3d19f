"""Every frame of a video, scaled down to be judged instead of shown: far cheaper than RGB of full size.

Test: pytest tests/authoring/test_survey.py
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from av.video.frame import PictureType, VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter

from toolkit.data.video import SdrReformatter, decode_on, open_video, square_size, upright

_SMALL_HEIGHT_PX, _DETAIL_HEIGHT_PX, _DETAIL_EVERY = 128, 256, 8
_COMBED_HEIGHT_PX, _COLUMNS_EVERY = 480, 4  # of the smallest interlaced format: scaled down combs blend; they are wide


@dataclass(frozen=True)
class SmallFrame:
    """A frame scaled down to be judged, uint8 and upright; height_px and width_px are those of the frame itself.

    after_loss  frames just before it do not decode
    is_damaged  a part of it is made up; FFmpeg says so of H.264 and MPEG-4, not of HEVC and VP9
    is_key      nothing from here on refers to what is before it
    is_between  a B-frame, which may refer to what is shown after it
    is_woven    marked as interlaced: its odd and even rows are of two moments
    luma_HW     128 px high
    chroma_CHW  its two planes, 64 px high
    detail_HW   luma up to 256 px high, of every eighth frame
    rows_HW     luma of its own rows, as stored, and every fourth column, of every eighth frame and the one before it;
                of 480 rows and more
    """

    time_s: float
    after_loss: bool
    is_damaged: bool
    is_key: bool
    is_between: bool
    is_woven: bool
    height_px: int
    width_px: int
    luma_HW: np.ndarray
    chroma_CHW: np.ndarray
    detail_HW: np.ndarray | None
    rows_HW: np.ndarray | None


def iter_small(path: Path) -> Iterator[SmallFrame]:
    """Decode from the first frame to the last, yielding what a survey looks at. Raises VideoError, also in mid-file."""
    with open_video(path, None) as (container, stream):
        small, detail, whole = SdrReformatter(), SdrReformatter(), VideoReformatter()
        rate = stream.average_rate or stream.guessed_rate
        for number, (frame, after_loss) in enumerate(decode_on(container, stream)):
            width_px, height_px = square_size(frame, stream)
            if frame.rotation % 180:
                width_px, height_px = height_px, width_px
            luma_HW, chroma_CHW = _planes(frame, small, _SMALL_HEIGHT_PX, width_px / height_px)
            detail_HW = None
            if number % _DETAIL_EVERY == 0:
                detail_height_px = min(_DETAIL_HEIGHT_PX, max(2, height_px & ~1))
                detail_HW, _ = _planes(frame, detail, detail_height_px, width_px / height_px)
            rows_HW = None
            if frame.height >= _COMBED_HEIGHT_PX and number % _DETAIL_EVERY in (0, _DETAIL_EVERY - 1):
                rows_HW = whole.reformat(frame, format="gray", threads=1).to_ndarray()[:, ::_COLUMNS_EVERY]
            # Where there are no times, frames come evenly.
            time_s = frame.time if frame.time is not None else float(number / rate)
            yield SmallFrame(
                time_s=time_s,
                after_loss=after_loss,
                is_damaged=frame.is_corrupt,
                is_key=frame.key_frame,
                is_between=frame.pict_type == PictureType.B,
                is_woven=bool(frame.interlaced_frame),
                height_px=height_px,
                width_px=width_px,
                luma_HW=luma_HW,
                chroma_CHW=chroma_CHW,
                detail_HW=detail_HW,
                rows_HW=rows_HW,
            )


def _planes(
    frame: VideoFrame, reformatter: SdrReformatter, height_px: int, aspect: float
) -> tuple[np.ndarray, np.ndarray]:
    """Scale an upright frame to an even height in px: luma_HW and chroma_CHW of half its sides."""
    width_px = min(8 * height_px, max(8, round(height_px * aspect / 4) * 4))  # halves twice
    if frame.rotation % 180:
        width_px, height_px = height_px, width_px
    small = reformatter.reformat(frame, width_px, height_px, "yuv420p", Interpolation.AREA)
    samples = small.to_ndarray().reshape(-1)
    luma_HW = samples[: height_px * width_px].reshape(height_px, width_px)
    chroma_CHW = samples[height_px * width_px :].reshape(2, height_px // 2, width_px // 2)
    return upright(luma_HW, frame), upright(chroma_CHW, frame, axes=(1, 2))
