"""Trajectories of points from the first still to the last, and the heatmaps that Framer's ControlNet reads of them.

Test: pytest tests/data/test_trajectory.py

P point, K place: K >= 2 places of a point, spaced evenly in time over the gap between the stills. A place is (x, y) in
pixels from the top left corner of the picture the network sees, so the picture is [0, width) x [0, height).
"""

import functools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from toolkit.data.clips import cover_box
from toolkit.errors import UserError

MAX_POINTS = 1000
MAX_PLACES = 1000  # of one point, as given; resampled, one more
FORMAT = (
    '{"points": [[[x, y], [x, y], ...], ...]}, in pixels of the first still, '
    f"with 1 to {MAX_POINTS} points of 2 to {MAX_PLACES} places each"
)

SIDE_PX = 20  # a point is drawn over 20 pixels to each side
MAX_RATIO = 0.5  # a match must be twice as near as the second nearest: Framer's autopilot


def read_trajectories(path: str | Path, source_size: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """Read trajectories from JSON and carry them through the scaling and cropping of the stills (clips.resize_cover).

    source_size  (height, width) in pixels of the still as given, which the file speaks of
    size         (height, width) in pixels that the network sees
    returns      points_PK2 float64; a place may lie outside the picture. Points of unlike numbers of places come to a
                 common one by linear interpolation, exact up to K = 1001
    raises       UserError where the file is no such JSON
    """
    try:
        points = [_check_places(places) for places in json.loads(Path(path).read_text())["points"]]
        if not 1 <= len(points) <= MAX_POINTS:
            raise ValueError(f"{len(points)} points")
    except OSError as error:
        raise UserError(f"cannot read the trajectories {path}: {error.strerror}; it must hold {FORMAT}") from None
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        why = str(error) if isinstance(error, ValueError | OverflowError) else "no list of points"
        raise UserError(f"{path} holds no trajectories ({why}); it must hold {FORMAT}") from None
    # the smallest K that has every given place among its own
    steps = min(math.lcm(*(len(places_K2) - 1 for places_K2 in points)), MAX_PLACES)
    times_K = np.linspace(0, 1, steps + 1)
    points_PK2 = np.stack([places_at(places_K2[None], times_K)[0] for places_K2 in points])
    left, top, right, bottom = cover_box(source_size, size)
    return (points_PK2 - (left, top)) * size[::-1] / (right - left, bottom - top)


def _check_places(places: Any) -> np.ndarray:
    if not (isinstance(places, list) and all(isinstance(place, list) and len(place) == 2 for place in places)):
        raise ValueError("a point is no list of [x, y]")
    if not all(type(number) in (int, float) for place in places for number in place):
        raise ValueError("a coordinate is no number")
    if not 2 <= len(places) <= MAX_PLACES:
        raise ValueError(f"{len(places)} place(s) of a point")
    places_K2 = np.array(places, float)
    if not (abs(places_K2) < 1e9).all():  # nor is NaN; a larger number could become infinite when it is scaled
        raise ValueError("a coordinate is not finite, or far off")
    return places_K2


def match_stills(first_HWC: np.ndarray, last_HWC: np.ndarray, count: int = 5) -> np.ndarray:
    """Find what moved where between two stills: SIFT features in both, matched, joined by straight lines.

    stills   uint8, of the size the network sees
    returns  points_PK2 float64, K = 2, at most `count` points, best match first and far from one another (a sixth of the
             shorter side); none where nothing matches. The same stills give the same points
    source   after aim-uofa/Framer models_diffusers/sift_match.py, whose own choices are random, best score, or longest way
    """
    try:
        from skimage.feature import match_descriptors
    except ImportError:
        raise UserError(
            "trajectories are found with scikit-image, which is not installed: pip install framer-toolkit[autopilot], "
            "or give a file of trajectories"
        ) from None
    (first_N2, first_ND), (last_N2, last_ND) = _find_features(first_HWC), _find_features(last_HWC)
    if min(len(first_N2), len(last_N2)) < 2:  # the ratio needs a second nearest
        return np.zeros((0, 2, 2))
    of_first, of_last = match_descriptors(first_ND, last_ND, max_ratio=MAX_RATIO).T
    order = np.argsort(np.linalg.norm(first_ND[of_first] - last_ND[of_last], axis=1), kind="stable")
    apart_px = min(first_HWC.shape[:2]) / 6
    chosen: list[np.ndarray] = []
    for match_22 in np.stack([first_N2[of_first], last_N2[of_last]], axis=1)[order]:
        if len(chosen) < count and all(np.linalg.norm(match_22[0] - other_22[0]) >= apart_px for other_22 in chosen):
            chosen.append(match_22)
    return np.array(chosen).reshape(-1, 2, 2)


def _find_features(still_HWC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    from skimage.color import rgb2gray
    from skimage.feature import SIFT

    sift = SIFT()
    try:
        sift.detect_and_extract(rgb2gray(still_HWC))
    except RuntimeError:  # no feature at all
        return np.zeros((0, 2)), np.zeros((0, 128))
    assert sift.positions is not None and sift.descriptors is not None
    # (row, column); SIFT doubles the picture, and a doubled picture's pixel numbers, halved, lie 1/4 before the centres
    return sift.positions[:, ::-1] + 0.25, sift.descriptors.astype(float)


def places_at(points_PK2: np.ndarray, times_T: np.ndarray) -> np.ndarray:
    """Interpolate trajectories linearly at times in [0, 1], 0 the first still and 1 the last: points_PT2.

    Framer's app bends them (PCHIP) where a point has more than two places; straight is what a file's reader expects.
    """
    steps = points_PK2.shape[1] - 1
    before_T = np.clip(np.floor(times_T * steps).astype(int), 0, steps - 1)
    share_T1 = (times_T * steps - before_T)[:, None]
    return points_PK2[:, before_T] * (1 - share_T1) + points_PK2[:, before_T + 1] * share_T1


def draw_heatmaps(points_PT2: np.ndarray, height_px: int, width_px: int) -> np.ndarray:
    """Draw points as the ControlNet was trained to read them: a Gaussian spot each, later points over earlier ones.

    points   one frame's places lie at points_PT2[:, t]; a point outside the picture is not drawn
    returns  heatmaps_T3HW float32 of whole numbers 0..255 (not scaled to 1), the three channels equal
    source   aim-uofa/Framer models_diffusers/utils.py. There OpenCV shrinks a uint8 template bilinearly; here the same is
             done in floats and rounded half up, which may differ by one level where the picture's border cuts the spot
    """
    heatmaps_THW = np.zeros((points_PT2.shape[1], height_px, width_px), np.float32)
    for heatmap_HW, places_P2 in zip(heatmaps_THW, points_PT2.swapaxes(0, 1), strict=True):
        for x, y in places_P2:
            if 0 <= x < width_px and 0 <= y < height_px:
                left, right = int(max(x - SIDE_PX, 1)), int(min(x + SIDE_PX, width_px - 1))
                top, bottom = int(max(y - SIDE_PX, 1)), int(min(y + SIDE_PX, height_px - 1))
                # the whole spot squeezed into what the border leaves of its box, not cut: Framer's way
                if right > left and bottom > top:
                    heatmap_HW[top:bottom, left:right] = _shrink_spot(bottom - top, right - left)
    return np.repeat(heatmaps_THW[:, None], 3, axis=1)


@functools.cache
def _shrink_spot(height_px: int, width_px: int) -> np.ndarray:
    """The template, bilinearly sampled at half-pixel centres without antialiasing: uint8 values."""
    squared_200 = (np.arange(200) - 100.0) ** 2
    squared = squared_200[:, None] + squared_200
    template = np.floor(255 * np.exp(-squared / (2 * 40**2)) * (squared <= 100**2))
    rows, columns = _bilinear_weights(height_px), _bilinear_weights(width_px)
    return np.floor(rows @ template @ columns.T + 0.5)


def _bilinear_weights(size_px: int) -> np.ndarray:
    places = (np.arange(size_px) + 0.5) * 200 / size_px - 0.5
    return np.maximum(0, 1 - np.abs(places[:, None] - np.arange(200)))
