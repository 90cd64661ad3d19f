"""Cuts fall where the shot changes and nowhere else, and lengths are as asked. Run: pytest tests/data/test_shots.py"""

from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from toolkit.authoring.survey import survey
from toolkit.data.shots import MIN_FRAMES, SHOT_JUMP, cut_span, find_breaks, find_shots, jump_between, rate_of
from toolkit.data.video import read_frames, write_video

# Pairs by one signer before one wall, whose joints are the hardest to see of those that are seen. From learn to school,
# and in a copy from book to school, the picture changes less than it does in the signing beside the joint.
HARD = ["please", "bird", "learn", "book", "student", "yes", "help", "no"]


def one_clip(path: Path) -> list[tuple[int, int]]:
    return [(clip.first, clip.frames) for clip in survey(path, path.name, 1e6, None).clips]


def test_real_videos_are_cut_only_where_they_are_joined(real_videos: Path, tmp_path: Path) -> None:
    """Each real video alone is one shot, fast signing, traffic and all; joined, each joint is a cut and nothing else is."""
    frames = {}
    for path in sorted(real_videos.rglob("*.m[kp][v4]")):
        spans = one_clip(path)
        assert len(spans) == 1, (path, spans)
        if path.parent.name == "asl":
            first, count = spans[0]
            frames[path.stem] = read_frames(path)[first : first + count, ::4, ::4]
    names = [*HARD, *sorted(frames.keys() - set(HARD))]
    assert len(names) == 16
    write_video(tmp_path / "all.mp4", (frame for name in names for frame in frames[name]), 30)
    starts = [0, *accumulate(len(frames[name]) for name in names)]
    assert one_clip(tmp_path / "all.mp4") == [(a, b - a) for a, b in pairwise(starts)]


def test_a_flash_or_a_fast_part_is_no_cut() -> None:
    """Only a jump that stands alone is a cut: not two in a row, not one among its like, not a small one in stillness."""
    jumps = np.zeros(40)
    jumps[20] = 40
    assert find_shots(jumps) == [20]
    for others in ({21: 40}, {17: 30, 23: 30}, {16: 39}):
        busy = jumps.copy()
        busy[list(others)] = list(others.values())
        assert find_shots(busy) == []
    assert find_shots(jumps / 4) == find_shots(jumps[:1]) == []


def test_a_small_part_never_jumps_like_a_shot() -> None:
    """Black to white in a fortieth of the picture stays below the threshold that a new picture passes."""
    before, part, after = (np.full((3, 32, 40), 90, np.uint8) for _ in range(3))
    part[0, :, :1] = 255
    after[0] = np.random.default_rng(0).integers(0, 255, (32, 40))
    assert jump_between(before, before) == 0 and jump_between(before, part) < SHOT_JUMP < jump_between(before, after)


@given(st.lists(st.integers(-4, 60) | st.sampled_from([20, 33]), min_size=1, max_size=60))
def test_time_runs_evenly_between_breaks(steps_ms: list[int]) -> None:
    """Within a span each step is forward and within a factor of 1.5 of the median of those before it; at a break none is."""
    breaks = find_breaks(np.cumsum([0, *steps_ms]) / 1000, 0.001)
    for first, last in pairwise([0, *breaks, len(steps_ms) + 1]):
        for i in range(first, min(last, len(steps_ms))):
            before = steps_ms[max(first, i - 10) : i] or steps_ms[i + 1 : i + 2] or [steps_ms[i]]
            usual_ms, step_ms = float(np.median(before)), steps_ms[i]
            assume(abs(usual_ms / 1.5 - 2 - step_ms) > 1e-6 < abs(usual_ms * 1.5 + 2 - step_ms))
            is_even = step_ms > 0 and usual_ms / 1.5 - 2 < step_ms < usual_ms * 1.5 + 2
            assert is_even == (i + 1 < last or last == len(steps_ms) + 1)


def test_a_changed_rate_costs_no_frame_and_a_lost_one_no_other() -> None:
    """Where another rate begins one span follows the other; a frame that stands alone, also the first, is a span alone."""
    for first_ms, then_ms in ((20, 50), (50, 20), (33, 16)):
        assert find_breaks(np.cumsum([0, *[first_ms] * 99, *[then_ms] * 60]) / 1000, 0.001) == [100]
    assert find_breaks(np.cumsum([0, 500, *[33] * 9, 200, 150, *[33] * 9]) / 1000, 0.001) == [1, 11, 12]
    assert find_breaks(np.cumsum([0, *[33, 50] * 20]) / 1000, 0.001) == []  # film shown at 24 by fields


def test_rate_is_the_declared_one_where_the_times_agree() -> None:
    """Times rounded to milliseconds give 30000/1001 exactly; frames that come slower give their own rate."""
    times_s = np.round(np.arange(50) * 1001 / 30000, 3)
    assert rate_of(times_s, 30000 / 1001, 0.001) == 30000 / 1001
    assert rate_of(np.arange(11) / 12, 30, 0.001) == pytest.approx(12)


@given(st.integers(2, 5000), st.sampled_from([10, 12.5, 24000 / 1001, 25, 29.97, 60]), st.floats(0.1, 20))
def test_parts_are_equal_leave_nothing_and_are_short_enough(frames: int, fps: float, clip_seconds: float) -> None:
    """Without a stride the parts join to the whole, differ by a frame at most, and none is longer than asked."""
    spans = cut_span(frames, fps, clip_seconds, None)
    assert spans[0][0] == 0 and spans[-1][1] == frames and all(a[1] == b[0] for a, b in pairwise(spans))
    lengths = [stop - start for start, stop in spans]
    assert max(lengths) - min(lengths) <= 1 and max(lengths) <= max(MIN_FRAMES, clip_seconds * fps + 1e-5)


@given(st.integers(2, 2000), st.floats(0.2, 5), st.floats(0.05, 5))
def test_a_stride_starts_full_clips_that_far_apart(frames: int, clip_seconds: float, stride_seconds: float) -> None:
    """Every clip is of full length, starts a stride after the last, and no further one would fit."""
    spans = cut_span(frames, 25, clip_seconds, stride_seconds)
    longest, stride = max(MIN_FRAMES, int(25 * clip_seconds + 1e-6)), max(1, round(25 * stride_seconds))
    if frames <= longest:
        assert spans == [(0, frames)]
    else:
        assert [start for start, _ in spans] == list(range(0, len(spans) * stride, stride))
        assert all(stop - start == longest for start, stop in spans)
        assert spans[-1][1] <= frames < spans[-1][1] + stride


def test_seconds_beyond_what_numbers_hold_are_all_there_is() -> None:
    """A length or a stride whose frames cannot be counted is longer than any span."""
    assert cut_span(100, 25, 1e308, None) == [(0, 100)] and cut_span(100, 25, 1.0, 1e308) == [(0, 25)]
