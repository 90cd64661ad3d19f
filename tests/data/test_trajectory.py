"""Points move as given, through the stills' crop, and are drawn as spots. Run: pytest tests/data/test_trajectory.py"""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn.functional import interpolate

from toolkit.data.clips import resize_cover
from toolkit.data.trajectory import draw_heatmaps, match_stills, places_at, read_trajectories
from toolkit.data.video import read_frames
from toolkit.errors import UserError


def reference_heatmap(places_P2: np.ndarray, height_px: int, width_px: int) -> np.ndarray:
    """One frame as Framer is known to draw it, resized by torch and not rounded.

    The spot: 200 pixels square, a Gaussian of sigma 40 and peak 255 inside a disc, in whole levels.
    """
    offset = torch.arange(200, dtype=torch.float64) - 100
    distance = torch.hypot(offset[:, None], offset)
    spot = torch.where(distance <= 100, (255 * torch.exp(-((distance / 40) ** 2) / 2)).floor(), 0.0)[None, None]
    heatmap_HW = np.zeros((height_px, width_px))
    for x, y in places_P2:
        columns = [c for c in range(1, width_px - 1) if math.floor(x) - 20 <= c < math.floor(x) + 20]
        rows = [r for r in range(1, height_px - 1) if math.floor(y) - 20 <= r < math.floor(y) + 20]
        if 0 <= x < width_px and 0 <= y < height_px and rows and columns:
            box = interpolate(spot, (len(rows), len(columns)), mode="bilinear", align_corners=False, antialias=False)
            heatmap_HW[np.ix_(rows, columns)] = box[0, 0]
    return heatmap_HW


@pytest.mark.parametrize(("height_px", "width_px"), [(64, 96), (100, 41), (24, 40), (3, 3), (2, 64)])
def test_heatmaps_are_the_references(height_px: int, width_px: int) -> None:
    """Spots whole, cut, overlapping, outside and on every edge: whole levels, off by rounding alone."""
    size_2 = np.array([width_px, height_px])
    points_PT2 = np.random.default_rng(0).uniform(-25, size_2 + 25, (36, 6, 2))
    edges = [
        [0, 0],
        [-1e-9, 1],
        [1, -1e-9],
        size_2 - 1e-9,
        [width_px, 1],
        [1, height_px],
        size_2 // 2,
        size_2 / 2 + 0.7,
    ]
    points_PT2[::9, :, :] = np.array([*edges, *edges, *edges]).reshape(4, 6, 2)
    heatmaps_T3HW = draw_heatmaps(points_PT2, height_px, width_px)
    assert heatmaps_T3HW.shape == (6, 3, height_px, width_px) and heatmaps_T3HW.dtype == np.float32
    assert (heatmaps_T3HW == heatmaps_T3HW[:, :1]).all() and (heatmaps_T3HW % 1 == 0).all()
    reference_THW = np.stack([reference_heatmap(places, height_px, width_px) for places in points_PT2.swapaxes(0, 1)])
    assert np.abs(heatmaps_T3HW[:, 0] - reference_THW).max() <= 0.5 + 1e-6
    assert (reference_THW.max() > 0) == (min(height_px, width_px) > 2)


def test_whole_spot_is_every_fifth_of_the_template() -> None:
    """Shrinking fivefold samples at 2, 7, 12 ... and mixes nothing; beside the spot is nothing; no point, no spot."""
    heatmap_HW = draw_heatmaps(np.array([[[50.9, 40.2]]]), 80, 100)[0, 0]
    wanted_HW = np.zeros((80, 100))
    for row, column in np.ndindex(40, 40):
        squared = (5 * row + 2 - 100) ** 2 + (5 * column + 2 - 100) ** 2
        wanted_HW[20 + row, 30 + column] = math.floor(255 * math.exp(-squared / 3200)) if squared <= 100**2 else 0
    assert (heatmap_HW == wanted_HW).all() and heatmap_HW.max() == 254
    assert not draw_heatmaps(np.zeros((0, 4, 2)), 80, 100).any()


def on_straight_lines(point_K2: np.ndarray, times_T: np.ndarray) -> np.ndarray:
    own_K = np.linspace(0, 1, len(point_K2))
    return np.stack([np.interp(times_T, own_K, axis_K) for axis_K in point_K2.T], axis=1)


@pytest.mark.parametrize("places", [2, 3, 7, 1001])
def test_places_lie_on_straight_lines(places: int) -> None:
    """As numpy interpolates, to rounding; at the ends exactly the first and last place."""
    draws = np.random.default_rng(places)
    points_PK2 = draws.uniform(-100, 700, (3, places, 2))
    times_T = np.concatenate([[0, 1], np.arange(places) / (places - 1), draws.uniform(0, 1, 200)])
    points_PT2 = places_at(points_PK2, times_T)
    assert np.abs(points_PT2 - np.stack([on_straight_lines(point, times_T) for point in points_PK2])).max() < 1e-9
    assert (points_PT2[:, :2] == points_PK2[:, [0, -1]]).all()


@pytest.mark.parametrize(
    ("counts", "common"),
    [([2], 2), ([5, 5], 5), ([2, 3, 4], 7), ([1000], 1000), ([9, 126], 1001), ([1000, 999], 1001)],
)
def test_unlike_counts_come_to_a_common_one(counts: list[int], common: int, tmp_path: Path) -> None:
    """The fewest places that hold everybody's own, which stay exact; past 1001 they still lie on the lines."""
    draws = np.random.default_rng(0)
    points = [draws.uniform(-10, 90, (count, 2)) for count in counts]
    (tmp_path / "t.json").write_text(json.dumps({"points": [places_K2.tolist() for places_K2 in points]}))
    points_PK2 = read_trajectories(tmp_path / "t.json", (64, 96), (64, 96))
    assert points_PK2.shape == (len(counts), common, 2) and points_PK2.dtype == np.float64
    for read_K2, places_K2 in zip(points_PK2, points, strict=True):
        assert np.abs(read_K2 - on_straight_lines(places_K2, np.linspace(0, 1, common))).max() < 1e-9
        if counts != [1000, 999]:
            assert np.abs(read_K2[:: (common - 1) // (len(places_K2) - 1)] - places_K2).max() < 1e-9


@pytest.mark.parametrize("source", [(90, 160), (120, 50), (40, 60), (64, 96)])
def test_points_go_with_what_they_mark(source: tuple[int, int], tmp_path: Path) -> None:
    """A bright dot painted where a point is lies where the point is read, after resize_cover shrank, grew or cut."""
    places = np.array([[0.5, 0.5], [0.46, 0.54], [0.6, 0.47]]) * source[::-1] + [0.3, -0.2]
    (tmp_path / "t.json").write_text(json.dumps({"points": [places.tolist()]}))
    read_K2 = read_trajectories(str(tmp_path / "t.json"), source, (64, 96))[0]
    y_px, x_px = np.mgrid[: source[0], : source[1]] + 0.5
    for (x, y), read_2 in zip(places, read_K2, strict=True):
        dot_HW = 255 * np.exp(-((x_px - x) ** 2 + (y_px - y) ** 2) / (2 * 3**2))
        still_HW = resize_cover(np.repeat(dot_HW.round().astype(np.uint8)[None, ..., None], 3, 3), 64, 96)[0, :, :, 0]
        rows, columns = np.mgrid[:64, :96] + 0.5
        centroid_2 = np.array([(columns * still_HW).sum(), (rows * still_HW).sum()]) / still_HW.sum()
        assert np.abs(centroid_2 - read_2).max() < 0.05


def points_json(points: str) -> str:
    return f'{{"points": {points}}}'


LINE = "[[0, 0], [1, 1]]"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "Expecting value"), (points_json(f"[{LINE}]") + "x", "Extra data"), ("[" * 100_000, ""),
        ("null", "no list"), (f"[{LINE}]", "no list"), ('{"point": []}', "no list"), (points_json("null"), "no list"),
        (points_json(LINE), r"no list of \[x, y\]"), (points_json('{"a": 1}'), "no list"),
        (points_json('"ab"'), "no list"), (points_json("[]"), "0 points"),
        (points_json(f"[{', '.join([LINE] * 1001)}]"), "1001 points"),
        (points_json("[[[1, 2]]]"), "1 place"), (points_json(f"[[{', '.join(['[1, 2]'] * 1001)}]]"), "1001 place"),
        *[(points_json(f"[[[1, 2], {place}]]"), "no list") for place in ("null", "[]", "[3]", "[3, 4, 5]", '"34"')],
        *[(points_json(f"[[[1, 2], [3, {number}]]]"), "coordinate")
          for number in ("null", "true", '"4"', "[4]", "NaN", "-Infinity", "1e999")],
        (points_json(f"[[[1, 2], [3, {10**400}]]]"), ""),
    ],
    ids=lambda value: value[:40],
)  # fmt: skip
def test_malformed_files_are_refused(text: str, why: str, tmp_path: Path) -> None:
    """With the file's name, the fault, and the format it should have."""
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(UserError, match=rf't\.json .*{why}.*\{{"points": \[\[\[x, y\].*1 to 1000 points of 2 to 1000'):
        read_trajectories(tmp_path / "t.json", (64, 96), (64, 96))


numbers = st.integers() | st.floats() | st.floats(-1e4, 1e4)
anything = st.recursive(
    st.none() | st.booleans() | numbers | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["points", "a"]), inner, max_size=2),
)
right = st.lists(st.lists(st.lists(st.floats(-1e4, 1e4), min_size=2, max_size=2), min_size=2, max_size=4), max_size=3)
nearly = st.lists(st.lists(st.lists(numbers | anything, min_size=2, max_size=2), min_size=2, max_size=4), max_size=3)
values = anything | st.fixed_dictionaries({"points": right | nearly | anything})


@pytest.mark.filterwarnings("error::RuntimeWarning")
@given(data=values.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=20))
@example(data=b'{"points": [[[1, 2], [1e308, -1e308]]]}')
@settings(max_examples=200, deadline=None)
def test_any_file_gives_places_or_a_user_error(data: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Finite points_PK2, each from its first place in the file to its last, or a UserError; nothing else, ever."""
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_bytes(data)
    try:
        points_PK2 = read_trajectories(path, (64, 96), (640, 960))
    except UserError:
        return
    ends_P22 = np.array([[point[0], point[-1]] for point in json.loads(data)["points"]], float)
    assert points_PK2.ndim == 3 and np.isfinite(points_PK2).all()
    assert np.allclose(points_PK2[:, [0, -1]], ends_P22 * 10)


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    """With the system's reason."""
    for path, why in ((tmp_path / "none.json", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(UserError, match=rf'{why}.*\{{"points"'):
            read_trajectories(path, (64, 96), (64, 96))


HEIGHT_PX, WIDTH_PX = 96, 144


def texture(height_px: int, width_px: int) -> np.ndarray:
    cells = np.random.default_rng(0).integers(0, 256, (height_px // 6, width_px // 6, 3), np.uint8)
    return np.asarray(Image.fromarray(cells).resize((width_px, height_px), Image.Resampling.BICUBIC))


def disturbed(still_HWC: np.ndarray, levels: int) -> np.ndarray:
    noise = np.random.default_rng(9).integers(-levels, levels + 1, still_HWC.shape)
    return np.clip(still_HWC + noise, 0, 255).astype(np.uint8)


@pytest.mark.parametrize(("dx", "dy"), [(11, -6), (-17, 20)])
def test_a_shifted_picture_is_matched_by_its_shift(dx: int, dy: int) -> None:
    """Up to five points (or `count`), each moved as the picture was, a sixth of it apart, the same each time."""
    wide = texture(144, 192)
    first_HWC = wide[24 : 24 + HEIGHT_PX, 24 : 24 + WIDTH_PX]
    last_HWC = wide[24 - dy : 24 - dy + HEIGHT_PX, 24 - dx : 24 - dx + WIDTH_PX]
    points_PK2 = match_stills(first_HWC, last_HWC)
    assert points_PK2.shape == (5, 2, 2) and points_PK2.dtype == np.float64
    assert np.abs(points_PK2[:, 1] - points_PK2[:, 0] - [dx, dy]).max() < 0.1
    assert (points_PK2 >= 0).all() and (points_PK2 < [WIDTH_PX, HEIGHT_PX]).all()
    apart_PP = np.linalg.norm(points_PK2[:, None, 0] - points_PK2[:, 0], axis=-1)
    assert apart_PP[~np.eye(5, dtype=bool)].min() >= HEIGHT_PX / 6
    assert (match_stills(first_HWC, last_HWC) == points_PK2).all()
    assert (match_stills(first_HWC, last_HWC, count=2) == points_PK2[:2]).all()


def test_places_are_measured_from_the_corner() -> None:
    """In a picture turned by 180 degrees they turn about its middle; an offset of all places would show twice."""
    still_HWC = texture(HEIGHT_PX, WIDTH_PX)
    points_PK2 = match_stills(still_HWC, still_HWC[::-1, ::-1])
    assert len(points_PK2) == 5 and np.abs(points_PK2.sum(1) - [WIDTH_PX, HEIGHT_PX]).max() < 0.2


@pytest.mark.parametrize("clean", [slice(None, WIDTH_PX // 2), slice(WIDTH_PX // 2, None)])
def test_best_matches_come_first(clean: slice) -> None:
    """Where half of the picture is disturbed, the first two matches lie in the other."""
    still_HWC = texture(HEIGHT_PX, WIDTH_PX)
    last_HWC = disturbed(still_HWC, 50)
    last_HWC[:, clean] = still_HWC[:, clean]
    x_P = match_stills(still_HWC, last_HWC, count=2)[:, 0, 0]
    assert len(x_P) == 2 and np.isin(x_P.astype(int), np.arange(WIDTH_PX)[clean]).all()


def test_what_is_ambiguous_flat_or_unlike_is_not_matched() -> None:
    """No feature of a tiled picture goes to its twin in another tile; flat and mirrored pictures match nothing."""
    tiled_HWC = np.tile(texture(48, 48), (2, 3, 1))
    points_PK2 = match_stills(tiled_HWC, disturbed(tiled_HWC, 8), count=99)
    assert np.abs(points_PK2[:, 1] - points_PK2[:, 0]).max(initial=0) < 24
    flat_HWC, still_HWC = np.full((HEIGHT_PX, WIDTH_PX, 3), 90, np.uint8), texture(HEIGHT_PX, WIDTH_PX)
    mirrored_HWC = still_HWC[:, ::-1]  # SIFT knows turns and scales, no mirrors
    for pair in [(flat_HWC,) * 2, (flat_HWC, still_HWC), (still_HWC, flat_HWC), (still_HWC, mirrored_HWC)]:
        assert match_stills(*pair).shape == (0, 2, 2)


def test_without_scikit_image_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """What to install, and what to do without."""
    monkeypatch.setitem(sys.modules, "skimage.feature", None)
    with pytest.raises(UserError, match=r"pip install framer-toolkit\[autopilot\], or give a file"):
        match_stills(*np.zeros((2, 32, 32, 3), np.uint8))


def test_stills_of_a_signing_clip_are_matched(real_videos: Path) -> None:
    """Twelve frames apart, some points are found, inside the picture."""
    video = sorted((real_videos / "asl").glob("*.mkv"))[0]
    points_PK2 = match_stills(*resize_cover(read_frames(video.read_bytes(), [10, 22], "mkv"), 128, 160))
    assert 1 <= len(points_PK2) <= 5
    assert (points_PK2 >= 0).all() and (points_PK2 < [160, 128]).all()  # so finite, too
