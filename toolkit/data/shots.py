"""Where a video is cut: at changes of shot, where frames are missing, and then by length in seconds.

Test: pytest tests/data/test_shots.py

Frame numbers count from 0; a span (start, stop) excludes stop.
"""

import math
from statistics import median

import numpy as np

from toolkit.data.video import MAX_FRAMES

MIN_FRAMES = 3  # two known ends and one frame between

# Calibrated on 16 signing and 3 general videos, and 80 harsh re-encodings of them (crf 28 to 35), whose keyframes jump:
# inside them no jump above 1.3 times its neighbours exceeds 10.1. Of the 240 joints of two signing videos, most by one
# signer before one wall, all but one jump by 11.1 and 1.35 times their neighbours; that one by less than the signing.
SHOT_JUMP, SHOT_RATIO = 10.6, 1.35
_NEIGHBOURS, _STILL = 5, 0.3
_LARGEST_CHANGE = 48  # of a pixel: a small part of the picture is no cut, however much it changes
_UNEVEN, _RECENT = 1.5, 10  # a step is compared with the median of so many before it


def jump_between(before_CHW: np.ndarray, after_CHW: np.ndarray) -> float:
    """Measure how much two frames differ: the root of the mean squared change of luma and twice that of both chromas.

    before_CHW, after_CHW  uint8 (3, 32, W): luma and chroma, so small that the noise of coding is gone
    """
    changes_CHW = np.minimum(np.abs(after_CHW.astype(np.int16) - before_CHW), _LARGEST_CHANGE)
    luma, blue, red = (changes_CHW.astype(np.float32) ** 2).mean((1, 2))
    return float(np.sqrt(luma + 2 * (blue + red)))


def find_breaks(times_s: np.ndarray, tick_s: float) -> list[int]:
    """List the frames before which time does not run on evenly: after a step that is backwards, or over 1.5 times as long
    or short as the median of the last 10 since the break before; the first step there is compared with the next.
    """
    steps_s = np.diff(times_s).tolist()
    breaks, start = [], 0
    for i, step_s in enumerate(steps_s):
        usual_s = median(steps_s[max(start, i - _RECENT) : i] or steps_s[i + 1 : i + 2] or [step_s])
        if step_s <= 0 or not usual_s / _UNEVEN - 2 * tick_s <= step_s <= usual_s * _UNEVEN + 2 * tick_s:
            breaks.append(start := i + 1)
    return breaks


def find_shots(jumps: np.ndarray) -> list[int]:
    """List the frames that start another shot: jumps[i] leads to frame i, and jumps[0] counts for nothing.

    A cut is a jump that is large, and much larger than any in the 5 frames before and after it. Fast signing is not both,
    and neither is a flash, which jumps twice.
    """
    if len(jumps) < 2:
        return []
    padded = np.pad(jumps[1:], _NEIGHBOURS)
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * _NEIGHBOURS + 1)
    around = np.delete(windows, _NEIGHBOURS, axis=1).max(1)
    is_cut = (jumps[1:] >= SHOT_JUMP) & (jumps[1:] > SHOT_RATIO * (around + _STILL))
    return [int(i) + 1 for i in np.flatnonzero(is_cut)]


def rate_of(times_s: np.ndarray, declared_fps: float, tick_s: float) -> float:
    """Frames per second of an even span: the declared rate wherever the rounded times agree with it, else their own."""
    intervals, lasts_s = len(times_s) - 1, float(times_s[-1] - times_s[0])
    if abs(intervals / declared_fps - lasts_s) <= 2 * tick_s:
        return declared_fps
    return intervals / max(lasts_s, tick_s)


def cut_span(frames: int, fps: float, clip_seconds: float, stride_seconds: float | None) -> list[tuple[int, int]]:
    """Cut a span of frames into clips of at most clip_seconds.

    Without a stride: equal parts, which leave no short rest; 4.1 s in clips of 4 s become two of 2.05 s. With one: a full
    clip every stride_seconds, which may overlap or leave out, or the whole span if it is shorter than a clip.
    """
    longest = max(MIN_FRAMES, int(min(MAX_FRAMES, clip_seconds * fps + 1e-6)))
    if stride_seconds is None:
        parts = math.ceil(frames / longest)
        return [(part * frames // parts, (part + 1) * frames // parts) for part in range(parts)]
    if frames <= longest:
        return [(0, frames)]
    stride = max(1, round(min(frames, stride_seconds * fps)))
    return [(start, start + longest) for start in range(0, frames - longest + 1, stride)]
