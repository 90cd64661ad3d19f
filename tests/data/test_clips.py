"""A window is the frames it says, a function of (seed, k), scaled and centred. Run: pytest tests/data/test_clips.py"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.data.conftest import frame_numbers
from toolkit.data.clips import ClipSettings, Crop, draw_crop, draw_reverse, draw_window, load_clip, resize_cover
from toolkit.data.format import BadSample, ClipInfo
from toolkit.data.index import open_shards

SETTINGS = ClipSettings(frames=3, height_px=48, width_px=64, strides=(1, 2, 4))


def test_window_decodes_to_its_numbers(packed: Path) -> None:
    """For many positions: consecutive frames at one stride, inside the clip; fps is the source's over the stride."""
    index = open_shards(packed, "train")
    seen = set()
    for k in range(40):
        sample = k % len(index)
        clip = load_clip(index, sample, SETTINGS, 7, k)
        window, stride = draw_window(index.rows[sample].clip, SETTINGS, 7, k)
        first = round(index.rows[sample].clip.start_s * 25)
        assert frame_numbers(clip.frames_THWC) == [first + i for i in window]
        assert clip.fps == 25 / stride and clip.key == index.rows[sample].key
        seen.add((stride, window[0]))
    assert {stride for stride, _ in seen} == {1, 2, 4} and len(seen) > 10


def test_draws_depend_on_seed_and_position() -> None:
    """The same (seed, k) draws the same; flips, crops and starts cover their range; every start is reached."""
    info = ClipInfo(fps=25, frames=6, height=8, width=8)
    settings = replace(SETTINGS, strides=(1, 5), flip=True, random_crop=0.25)

    def draw(seed: int) -> list[tuple[tuple[range, int], Crop]]:
        return [(draw_window(info, settings, seed, k), draw_crop(settings, seed, k)) for k in range(200)]

    draws = draw(1)
    assert draws == draw(1) and draws != draw(2)
    assert {window[0] for (window, _), _ in draws} == {0, 1, 2, 3}
    assert {stride for (_, stride), _ in draws} == {1}  # 5 does not fit into 6 frames
    assert 60 < sum(crop.flip for _, crop in draws) < 140
    for part, low, high in (("side", 0.75, 1), ("x", 0, 1), ("y", 0, 1)):
        values = np.array([getattr(crop, part) for _, crop in draws])
        assert low <= values.min() < low + 0.05 * (high - low) and high - 0.05 * (high - low) < values.max() <= high
        assert abs(values.mean() - (low + high) / 2) < 0.1 * (high - low)


def test_the_window_does_not_follow_the_augmentation() -> None:
    """Switching flip or crop on leaves the frames of every position as they were."""
    info = ClipInfo(fps=25, frames=60, height=8, width=8)
    on = replace(SETTINGS, flip=True, random_crop=0.5)
    assert [draw_window(info, on, 1, k) for k in range(99)] == [draw_window(info, SETTINGS, 1, k) for k in range(99)]


def test_centre_window_is_fixed() -> None:
    """Evaluation takes the middle at the smallest stride, whatever the seed, never mirrored or cropped."""
    settings = replace(SETTINGS, window="centre", flip=True, random_crop=0.5)
    info = ClipInfo(fps=25, frames=10, height=8, width=8)
    assert {draw_window(info, settings, seed, seed) for seed in range(9)} == {(range(3, 6), 1)}
    assert {draw_crop(settings, seed, seed) for seed in range(9)} == {Crop()}


def test_too_short_is_a_bad_sample() -> None:
    """The reason tells both numbers."""
    with pytest.raises(BadSample, match="has 5 frames; 3 at stride 4 need 9"):
        draw_window(ClipInfo(fps=25, frames=5, height=8, width=8), replace(SETTINGS, strides=(4,)), 0, 0)


@pytest.mark.parametrize("width_px", [SETTINGS.width_px, SETTINGS.height_px // 2])
def test_flip_mirrors(packed: Path, width_px: int) -> None:
    """A flipped clip is the mirror image of the plain one, and any other is that; also where the sides are cut off."""
    index, plainly = open_shards(packed, "train"), replace(SETTINGS, width_px=width_px)
    flipping = replace(plainly, flip=True)
    flips = [draw_crop(flipping, 3, k).flip for k in range(20)]
    assert len(set(flips)) == 2
    for k, flip in enumerate(flips):
        plain, maybe = (load_clip(index, 0, settings, 3, k).frames_THWC for settings in (plainly, flipping))
        assert np.array_equal(maybe, plain[:, :, ::-1] if flip else plain)


def test_reverse_plays_backwards(packed: Path) -> None:
    """About half of the clips, each the plain one from its end; whatever else is drawn stays as it was."""
    index, settings = open_shards(packed, "train"), replace(SETTINGS, flip=True)
    backwards = replace(settings, reverse=True)
    drawn = [draw_reverse(backwards, 3, k) for k in range(200)]
    assert 60 < sum(drawn) < 140 and drawn != [draw_reverse(backwards, 4, k) for k in range(200)]
    assert drawn != [draw_crop(backwards, 3, k).flip for k in range(200)]
    assert not any(draw_reverse(replace(backwards, window="centre"), 3, k) for k in range(20))
    for k, is_reversed in enumerate(drawn[:12]):
        plain, maybe = (load_clip(index, 0, own, 3, k).frames_THWC for own in (settings, backwards))
        assert np.array_equal(maybe, plain[::-1] if is_reversed else plain)


def test_a_crop_is_a_part_of_the_picture() -> None:
    """On a picture of its own coordinates: a crop of half the side, at each place, holds the coordinates it should."""
    y, x = np.mgrid[:80, :160]
    frames_THWC = np.stack([x, y, 0 * x], -1)[None].astype(np.uint8)
    for at in (0.0, 0.25, 1.0):
        out = resize_cover(frames_THWC, 40, 40, Crop(0.5, at, at))[0].astype(float)
        left, top = (160 - 40) * at, (80 - 40) * at
        assert abs(out[..., 0].mean() - (left + 19.5)) < 0.6 and abs(out[..., 1].mean() - (top + 19.5)) < 0.6
        assert abs(out[20, 20, 0] - (left + 20)) < 1 and abs(out[20, 20, 1] - (top + 20)) < 1
    mirrored = resize_cover(frames_THWC, 40, 40, Crop(0.5, 0.25, 0.25, flip=True))
    assert np.array_equal(mirrored, resize_cover(frames_THWC, 40, 40, Crop(0.5, 0.25, 0.25))[:, :, ::-1])


def test_resize_covers_and_centres() -> None:
    """The centre stays in the centre, the longer side is cropped evenly, fine stripes turn grey and not moire."""
    y, x = np.mgrid[:90, :160]
    frames_THWC = np.stack([np.stack([x, y, 0 * x], -1)] * 2).astype(np.uint8)
    out = resize_cover(frames_THWC, 32, 32)
    assert out.shape == (2, 32, 32, 3)
    middle_C = out[0, 15:17, 15:17].mean((0, 1))
    assert np.abs(middle_C - [79.5, 44.5, 0]).max() < 1.5
    assert np.abs(out[0, :, 0, 0].mean() - (35 + 90 / 64)) < 2 and np.abs(out[0, :, -1, 0].mean() - (124 - 90 / 64)) < 2
    stripes = np.zeros((1, 64, 64, 3), np.uint8)
    stripes[:, :, ::2] = 255
    assert np.abs(resize_cover(stripes, 16, 16)[:, :, 2:-2].astype(int) - 127).max() < 12
    assert resize_cover(stripes, 64, 64) is stripes
