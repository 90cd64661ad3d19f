"""Reasons to drop a clip that its pictures alone can tell: blur, combs, and being the same as another.

Test: pytest tests/authoring/test_screen.py
"""

import numpy as np
from PIL import Image

SIGNATURE_FRAMES, SIGNATURE_SIDE = 5, 16
_BLUR_WIDTH = 9
_ROWS, _SLACK = 128, 20  # clips compared at once; what fp32 may be off by where 80 squares of up to 128^2 are summed
_MOVED, _MOVED_SHARE = 32, 0.002  # of luma between two frames; of the picture
# Calibrated on 16 signing and 3 general videos: as they are, or at crf 35, near differences are 0.38 to 0.55 of far ones; of
# their 38 copies with two frames woven into each, at crf 23 and 32, 28 have more than 1.5. White noise has 1.0, text that
# scrolls 1.4 at most.
COMBED = 1.5


def sharpness(luma_HW: np.ndarray) -> float:
    """Measure from 0 (blurred) to 1 how much detail a blur would take away.

    One minus the blur of F. Crete et al., "The blur effect", 2007: what is sharp loses most of its differences between
    neighbouring pixels when it is blurred, what is blurred already loses few; so contrast and content matter little.
    A picture without any difference has nothing to be blurred and counts as sharp.
    """
    luma_HW = luma_HW.astype(np.float32)
    return min(_kept_sharp(luma_HW), _kept_sharp(luma_HW.T))


def _kept_sharp(luma_HW: np.ndarray) -> float:
    """The share of the differences between neighbours in a column that a blur along the column takes away."""
    sums = np.cumsum(np.pad(luma_HW, ((_BLUR_WIDTH // 2 + 1, _BLUR_WIDTH // 2), (0, 0)), mode="edge"), axis=0)
    blurred_HW = (sums[_BLUR_WIDTH:] - sums[:-_BLUR_WIDTH]) / _BLUR_WIDTH
    before, after = np.abs(np.diff(luma_HW, axis=0)), np.abs(np.diff(blurred_HW, axis=0))
    total = float(before.sum())
    return float(np.maximum(before - after, 0).sum()) / total if total > 0 else 1.0


def combs(before_HW: np.ndarray, luma_HW: np.ndarray) -> tuple[float, float]:
    """Sum up where the picture moved how much its rows differ from the next ones, and how much from the next but one.

    Rows of one moment differ most from far ones. Where odd and even rows are of two moments, they differ from near ones.
    Two of such sums are compared over many frames: near ones COMBED times as large show combs.

    before_HW, luma_HW  uint8, two frames of the video's own height
    """
    before_HW, luma_HW = before_HW.astype(np.int16), luma_HW.astype(np.int16)
    moved_HW = np.abs(luma_HW - before_HW)[2:-2] > _MOVED
    if moved_HW.size == 0 or moved_HW.mean() <= _MOVED_SHARE:
        return 0.0, 0.0
    doubled_HW = 2 * luma_HW[2:-2]
    near_HW = np.abs(doubled_HW - luma_HW[1:-3] - luma_HW[3:-1])
    far_HW = np.abs(doubled_HW - luma_HW[:-4] - luma_HW[4:])
    return float(near_HW[moved_HW].sum()), float(far_HW[moved_HW].sum())


def blocks(luma_HW: np.ndarray) -> np.ndarray:
    """Average a frame's luma over 16 x 16 blocks: uint8 (16, 16)."""
    return np.asarray(Image.fromarray(luma_HW).resize((SIGNATURE_SIDE, SIGNATURE_SIDE), Image.Resampling.BOX))


def find_duplicates(signatures_NP: np.ndarray, places_N3: np.ndarray, distance: float) -> list[float | None]:
    """For each clip in order, measure how near it comes to one that is kept before it; None if it repeats none.

    Clips of one video that share frames are alike because they were asked for, and repeat nothing.

    signatures_NP  uint8, P luma blocks of each clip
    places_N3      number of its video, first frame, and the one after its last
    distance       root mean square difference of luma below which two clips are the same
    """
    count = len(signatures_NP)
    # Means over groups of blocks differ no more than the blocks: whoever is apart there needs no closer look. Differences
    # from all clips before come as one matrix product of many rows, but for rounding (_SLACK).
    coarse_NP = signatures_NP.reshape(count, SIGNATURE_FRAMES, 4, SIGNATURE_SIDE // 4, 4, SIGNATURE_SIDE // 4)
    coarse_NP = coarse_NP.mean((3, 5), dtype=np.float32).reshape(count, -1) - 128
    squares_N = (coarse_NP**2).sum(1)
    is_kept_N = np.zeros(count, bool)
    repeats: list[float | None] = []
    for clip in range(count):
        if clip % _ROWS == 0:
            last = clip + _ROWS
            rows_RN = squares_N[clip:last, None] + squares_N[:last] - 2 * coarse_NP[clip:last] @ coarse_NP[:last].T
            close_RN = rows_RN < coarse_NP.shape[1] * distance**2 + _SLACK
        near = np.flatnonzero(close_RN[clip % _ROWS, :clip] & is_kept_N[:clip])
        video, first, stop = places_N3[clip]
        videos, firsts, stops = places_N3[near].T
        near = near[(videos != video) | (stops <= first) | (firsts >= stop)]
        gaps = signatures_NP[near].astype(np.int16) - signatures_NP[clip]
        apart = float(np.sqrt((gaps.astype(np.float32) ** 2).mean(1).min(initial=np.inf)))
        repeats.append(apart if apart < distance else None)
        is_kept_N[clip] = apart >= distance
    return repeats
