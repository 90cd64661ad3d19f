"""What is dropped deserves it, what signs is kept, and a plan is exact. Run: pytest tests/authoring/test_screen.py"""

import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from toolkit.authoring.plan import Kind, PackSettings, fit, make_plan, name_hash, name_keys, split_sources
from toolkit.authoring.screen import SIGNATURE_FRAMES, SIGNATURE_SIDE, find_duplicates, sharpness
from toolkit.authoring.survey import ClipFacts, Survey, survey
from toolkit.data.video import read_frames, write_video

PIXELS = SIGNATURE_FRAMES * SIGNATURE_SIDE**2


def facts(value: int = 90, **changes: float) -> ClipFacts:
    """A clip that passes, whose signature is a flat grey."""
    passing = {"frames": 40, "motion": 100.0, "brightness": 90.0, "sharpness": 0.6}
    return ClipFacts.model_validate(
        {"first": 0, "start_s": 0.0, "fps": 25.0, "height_px": 480, "width_px": 640, "picture": b""}
        | {"signature": b""}
        | passing
        | changes
    ).model_copy(update={"signature": bytes([value]) * PIXELS})


def reasons(*clips: ClipFacts, **settings: float) -> list[str | None]:
    """Why each is dropped, as it is told."""
    plan = make_plan([Survey(name="a.mp4", clips=clips)], PackSettings(**settings), {})
    return [clip.reason and str(clip.reason) for clip in plan]


def test_each_threshold_drops_what_is_below_it_and_can_be_moved() -> None:
    """The reason names the kind, the value and the threshold; at the threshold, and with the option at 0, it is kept."""
    cases = [
        ("min_motion", "motion", 7.0, "near-static: motion 7 is below 8"),
        ("min_brightness", "brightness", 11.5, "near-black: brightness 11.5 is below 12"),
        ("min_sharpness", "sharpness", 0.3, "blurred: sharpness 0.3 is below 0.35"),
    ]
    for option, field, value, reason in cases:
        clip = facts(**{field: value})
        assert option in [kind.option for kind in Kind if reason.startswith(kind.words)]
        assert reasons(clip) == [reason]
        assert reasons(clip, **{option: 0}) == reasons(clip, **{option: value}) == [None]
    assert reasons(facts(frames=13), min_frames=14) == ["too short: 13 frames is below 14"]
    assert reasons(facts(frames=2)) == ["too short: 2 frames is below 3"]
    assert reasons(facts(width_px=14)) == ["too small: 14 x 480 px has a side below 16"]


def test_the_first_of_several_alike_is_kept() -> None:
    """Of clips that differ by less than the distance one stays; what is dropped anyway makes no other a duplicate."""
    clips = [facts(50), facts(52), facts(51), facts(54), facts(90, motion=1), facts(90)]
    dropped = reasons(*(clip.model_copy(update={"first": 40 * i}) for i, clip in enumerate(clips)))
    assert [reason and reason.split(" is")[0] for reason in dropped] == [
        None, "duplicate: difference 2.00", "duplicate: difference 1.00", None, "near-static: motion 1", None,
    ]  # fmt: skip
    assert reasons(facts(50), facts(50), duplicate_distance=0) == [None, None]


def test_clips_that_share_frames_are_no_duplicates() -> None:
    """Overlap is asked for; the same picture in frames that are not shared, or in another video, is a duplicate."""
    clips = [facts(first=first) for first in (0, 20, 39, 40, 79)]
    expected = [None, None, None, *["duplicate: difference 0.00 is below 2.5"] * 2]
    assert reasons(*clips) == expected
    both = [Survey(name=name, clips=tuple(clips)) for name in ("a.mp4", "b.mp4")]
    kept = [clip.source for clip in make_plan(both, PackSettings(), {}) if clip.reason is None]
    assert len(kept) == 3 and len(set(kept)) == 1


@given(st.integers(0, 2**32 - 1), st.floats(0.5, 12))
def test_duplicates_are_those_of_comparing_all_with_all(seed: int, distance: float) -> None:
    """Shortcuts change nothing: a clip is dropped exactly if it comes within the distance of one that is kept apart."""
    draws = np.random.default_rng(seed)
    centres = draws.integers(0, 255, (4, 1)) + draws.integers(-20, 20, (4, PIXELS))
    noise = draws.normal(0, 1, (30, PIXELS)) * draws.uniform(0, 10, (30, 1))
    signatures_NP = np.clip(centres[draws.integers(0, 4, 30)] + noise, 0, 255).astype(np.uint8)
    kept: list[int] = []
    videos, firsts = draws.integers(0, 3, 30), draws.integers(0, 40, 30)
    places_N3 = np.stack([videos, firsts, firsts + 10], axis=1)
    for i, found in enumerate(find_duplicates(signatures_NP, places_N3, distance)):
        others = [j for j in kept if videos[i] != videos[j] or abs(firsts[i] - firsts[j]) >= 10]
        gaps = [float(np.sqrt(((signatures_NP[i] - signatures_NP[j].astype(float)) ** 2).mean())) for j in others]
        nearest = min(gaps, default=np.inf)
        assume(abs(nearest - distance) > 1e-4)
        assert found == (pytest.approx(nearest, rel=1e-5) if nearest < distance else None)
        if found is None:
            kept.append(i)


def test_many_clips_before_one_wall_are_compared_in_time() -> None:
    """All alike in brightness, so that nothing short of their blocks tells them apart: thousands take a second or so."""
    draws = np.random.default_rng(0)
    wall_P = draws.integers(60, 200, PIXELS)
    signatures_NP = np.clip(wall_P + draws.normal(0, 12, (8000, PIXELS)), 0, 255).astype(np.uint8)
    places_N3 = np.stack([np.arange(8000), np.zeros(8000, int), np.full(8000, 100)], axis=1)
    start_s = time.process_time()
    assert find_duplicates(signatures_NP, places_N3, 2.5) == [None] * 8000
    assert time.process_time() - start_s < 3


def test_blur_lowers_sharpness_at_any_contrast() -> None:
    """More blur, less sharpness; halving the contrast changes little; a flat picture is not called blurred."""
    tiles = np.random.default_rng(0).integers(0, 255, (16, 16), np.uint8).repeat(16, 0).repeat(16, 1)
    picture = Image.fromarray(tiles)
    levels = [sharpness(np.asarray(picture.filter(ImageFilter.GaussianBlur(radius)))) for radius in (0, 1, 2, 4, 8)]
    assert levels == sorted(levels, reverse=True) and levels[0] > 0.6 > 0.35 > levels[3]
    assert sharpness(np.asarray(picture) // 2) == pytest.approx(levels[0], abs=0.02)
    assert sharpness(np.full((64, 64), 7, np.uint8)) == 1


def change(frames_THWC: np.ndarray, filtered: Callable[[Image.Image], Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(filtered(Image.fromarray(frame_HWC))) for frame_HWC in frames_THWC])


def test_real_videos_and_their_spoilt_copies(real_videos: Path, tmp_path: Path) -> None:
    """Signing stays, and two signs of one signer are two; blurred, darkened, frozen, coded anew or combed it is left out."""
    surveys = [survey(path, path.stem, 4.0, None) for path in sorted((real_videos / "asl").iterdir())]
    assert all(clip.reason is None for clip in make_plan(surveys, PackSettings(), {}))
    signatures_NP = np.stack([np.frombuffer(s.clips[0].signature, np.uint8) for s in surveys])
    places_N3 = np.array([(number, 0, 1) for number in range(len(surveys))])
    assert [
        gap for gap in find_duplicates(signatures_NP, places_N3, 3 * PackSettings().duplicate_distance) if gap
    ] == []
    for name in ("bird", "want"):
        frames_THWC = read_frames(real_videos / "asl" / f"{name}.mkv")[:, ::2, ::2]
        spoilt = {
            "blurred": (change(frames_THWC, lambda p: p.filter(ImageFilter.GaussianBlur(2.5))), 18),
            "near-black": ((frames_THWC * 0.05).astype(np.uint8), 18),
            "near-static": (np.repeat(frames_THWC[:1], len(frames_THWC), axis=0), 18),
            "duplicate": (frames_THWC, 30),
            "duplicate smaller": (change(frames_THWC, lambda p: p.resize((160, 120))), 24),
        }
        original = next(s for s in surveys if s.name == name)
        for kind, (changed_THWC, crf) in spoilt.items():
            write_video(tmp_path / "copy.mp4", changed_THWC, 30, crf=crf)
            copy = survey(tmp_path / "copy.mp4", "copy.mp4", 4.0, None)
            found = [clip.reason for clip in make_plan([original, copy], PackSettings(), {}) if clip.reason]
            assert [reason.kind.words for reason in found] == [kind.split()[0]], (name, kind, found)
        woven_THWC = read_frames(real_videos / "asl" / f"{name}.mkv")
        woven_THWC = np.where(np.arange(480)[:, None, None] % 2, woven_THWC[1:], woven_THWC[:-1])
        write_video(tmp_path / "woven.mp4", woven_THWC, 30)
        assert (survey(tmp_path / "woven.mp4", "", 4.0, None).fault or "").startswith("shows combs")


@given(
    st.integers(32, 4000),
    st.integers(32, 4000),
    st.none() | st.integers(16, 720),
    st.sampled_from([None, "1:1", "16:9,1:1,9:16", "4:3"]),
)
def test_frames_fit(height_px: int, width_px: int, short_side: int | None, aspects: str | None) -> None:
    """Sides are even, the box lies in the frame, nothing grows, and boxes of one aspect and short side have one size."""
    settings = PackSettings(short_side=short_side, aspects=aspects)
    box_px, size_px = fit(height_px, width_px, settings)
    assert all(side % 2 == 0 for side in (*box_px, *size_px))
    assert size_px[0] * size_px[1] <= 2048 * 2048
    assert box_px[0] <= height_px and box_px[1] <= width_px and size_px[0] <= box_px[0] and size_px[1] <= box_px[1]
    if aspects is None:
        assert box_px == (height_px & ~1, width_px & ~1)
    else:
        assert box_px[0] >= (height_px & ~1) - 1 or box_px[1] >= (width_px & ~1) - 1  # the largest
    if aspects == "1:1":
        assert size_px[0] == size_px[1]
    if aspects is None and short_side is None and height_px * width_px <= 2048 * 2048:
        assert size_px == box_px
    if aspects and short_side and min(box_px) >= short_side + 2:
        sizes = set()
        for part in aspects.split(","):
            aspect = Fraction(*map(int, part.split(":")))
            sizes.add(tuple(int(short_side * max(1, side) / 2) * 2 for side in (1 / aspect, aspect)))
        assert size_px in sizes


def test_the_nearest_aspect_is_taken() -> None:
    """A phone held upright, a square and a film each go to their own bucket."""
    settings = PackSettings(aspects="16:9,1:1,9:16", short_side=144)
    sizes = [fit(*frame_px, settings)[1] for frame_px in ((1920, 1080), (1000, 1100), (800, 1920), (600, 640))]
    assert sizes == [(256, 144), (144, 144), (144, 256), (144, 144)]


def test_a_plan_is_the_same_in_any_order_and_splits_what_is_kept() -> None:
    """Sources go by the hash of their names, whoever lists them; the share held out is of those that give a clip."""
    names = sorted((f"{i}.mp4" for i in range(24)), key=name_hash)
    moving = {name: 100.0 if i >= 8 else 1.0 for i, name in enumerate(names)}
    surveys = [Survey(name=name, clips=(facts(9 * i, motion=moving[name]),)) for i, name in enumerate(sorted(names))]
    plan = make_plan(surveys, PackSettings(holdout=0.5), {})
    assert plan == make_plan(surveys[::-1], PackSettings(holdout=0.5), {})
    assert [clip.source for clip in plan] == names
    kept = [clip for clip in plan if clip.reason is None]
    assert {clip.source for clip in kept if clip.split == "val"} == split_sources([c.source for c in kept], 0.5)
    assert [clip.split for clip in kept].count("val") == 8


@given(
    lengths=st.lists(st.integers(3, 20), min_size=1, max_size=12), overlap=st.integers(0, 19),
    holdout=st.floats(0, 0.99), still=st.sets(st.integers(0, 11)),
)  # fmt: skip
def test_of_a_single_video_the_end_is_held_out(
    lengths: list[int], overlap: int, holdout: float, still: set[int]
) -> None:
    """About the share asked for of what is kept, later than all that is trained on, and no frame is in both."""
    starts = [sum(max(1, length - overlap) for length in lengths[:i]) for i in range(len(lengths))]
    clips = [
        facts(first=start, frames=length, motion=1.0 if i in still else 100.0)
        for i, (start, length) in enumerate(zip(starts, lengths, strict=True))
    ]
    plan = make_plan(
        [Survey(name="a.mp4", clips=tuple(clips))], PackSettings(holdout=holdout, duplicate_distance=0), {}
    )
    moving = [clip for clip in plan if clip.facts.motion > 1]
    kept = [clip for clip in moving if clip.reason is None]
    train, val = ([clip.facts for clip in kept if clip.split == split] for split in ("train", "val"))
    assert not val or max(clip.first + clip.frames for clip in train) <= min(clip.first for clip in val)
    assert {clip.reason.kind for clip in moving if clip.reason} <= {Kind.BETWEEN}
    if not overlap:
        share = min(max(1, round(holdout * len(moving))), len(moving) - 1) if holdout and moving else 0
        assert len(val) == share and len(kept) == len(moving)
    if not val:
        assert len(kept) == len(moving)


def test_splits_that_people_give_come_first() -> None:
    """Where any is val, the rest is trained on; where some are train, the others are held out as ever."""
    names = sorted((f"{i}.mp4" for i in range(10)), key=name_hash)
    surveys = [Survey(name=name, clips=tuple(facts(first=40 * j, part=j) for j in range(2))) for name in names]
    settings = PackSettings(holdout=0.25, duplicate_distance=0)

    def held_out(asked: dict[tuple[str, int | None], str]) -> set[tuple[str, int | None]]:
        plan = make_plan(surveys, settings, asked)
        return {(clip.source, clip.facts.part) for clip in plan if clip.split == "val"}

    assert held_out({}) == {(name, part) for name in names[:2] for part in (0, 1)}
    assert held_out({(names[5], 1): "val", (names[6], 0): "train"}) == {(names[5], 1)}
    first = {(names[0], 0): "train", (names[0], 1): "train"}
    assert held_out(first) == {(name, part) for name in names[1:3] for part in (0, 1)}
    assert held_out({(name, part): "train" for name in names[1:] for part in (0, 1)}) == {(names[0], 1)}  # its end
    assert held_out({(name, part): "train" for name in names for part in (0, 1)}) == set()


def test_split_is_stable_and_leaves_some_to_each() -> None:
    """About the share asked for, at least one and never all; more videos keep most of the earlier choice."""
    names = [f"{i}.mp4" for i in range(50)]
    assert len(split_sources(names, 0.2)) == 10 and split_sources(names, 0.2) == split_sources(names[::-1], 0.2)
    assert len(split_sources(names[:2], 0.01)) == len(split_sources(names[:2], 0.99)) == 1
    assert split_sources(names[:1], 0.5) == split_sources(names, 0) == set()
    assert len(split_sources(names[:45], 0.2) & split_sources(names, 0.2)) >= 8


def test_keys_are_distinct_though_files_are_called_alike() -> None:
    """Of 20,000 videos called clip.mp4, in folders of their own, some share six digits of the hash; no two share a key."""
    names = [f"signer {i}/clip.mp4" for i in range(20_000)]
    keys = name_keys(names)
    assert len(set(keys.values())) == len(names) and {len(key) for key in keys.values()} != {len("clip_") + 6}
    slugs = [key.rpartition("_")[0] for key in name_keys(["Ein Gruß!.mp4", "日.mp4"]).values()]
    assert slugs == ["ein-gru", "video"]
