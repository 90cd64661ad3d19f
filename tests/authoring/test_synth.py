"""Rendered material depends on its seed alone, moves smoothly and packs. Run: pytest tests/authoring/test_synth.py"""

import time
from pathlib import Path

import numpy as np
import pytest

from toolkit.authoring.pack import pack
from toolkit.authoring.synth import clip_name, render_clip, render_motion, synth
from toolkit.errors import UserError


def test_rendering_is_a_function_of_seed_and_index() -> None:
    """The same key gives the same frames, another seed or index others."""
    for render in (render_clip, render_motion):
        frames_THWC = render(3, 4, 5, 48)
        assert frames_THWC.shape == (5, 48, 48, 3) and frames_THWC.dtype == np.uint8
        assert np.array_equal(frames_THWC, render(3, 4, 5, 48))
        assert not np.array_equal(frames_THWC, render(3, 5, 5, 48))
        assert not np.array_equal(frames_THWC, render(4, 4, 5, 48))


def test_motion_is_there_and_smooth() -> None:
    """Something moves in every clip, and no frame jumps: neighbours differ less than frames further apart."""
    for index in range(6):
        for frames_THWC in (render_clip(0, index, 40, 64), render_motion(0, index, 12, 64)):
            values = frames_THWC.astype(float)
            near = np.abs(np.diff(values, axis=0)).mean((1, 2, 3))
            far = np.abs(values[8:] - values[:-8]).mean()
            assert near.mean() > 0.05 and far > 1.5 * near.mean() and near.max() < 14


def test_rendering_is_fast_enough() -> None:
    """A loose bound, a quarter of what was measured: generic motion is rendered while a base is pretrained on it."""
    render_motion(0, 0, 3, 64)
    start = time.process_time()
    for index in range(20):
        render_motion(0, index, 14, 64)
    assert 20 * 14 / (time.process_time() - start) > 150


def test_synth_writes_videos_that_pack(tmp_path: Path) -> None:
    """Files are named by sign and signer, and pack; a folder in use is refused."""
    synth(tmp_path / "videos", clips=4, seconds=0.5, size=64, seed=1)
    assert sorted(path.stem for path in (tmp_path / "videos").iterdir()) == sorted(clip_name(i) for i in range(4))
    report = pack(tmp_path / "videos", tmp_path / "shards")
    assert report.clips == {"train": 3, "val": 1} and report.seconds == 2.0
    with pytest.raises(UserError, match="not empty"):
        synth(tmp_path / "videos")


def test_a_tilde_is_the_home_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Quoted from the shell, too."""
    monkeypatch.setenv("HOME", str(tmp_path))
    synth("~/videos", clips=1, seconds=0.2, size=32)
    assert len(list((tmp_path / "videos").iterdir())) == 1


def test_names_are_distinct() -> None:
    """64 signs have 64 words, and no two clips share a name."""
    assert len({clip_name(i).split("_")[0] for i in range(64)}) == 64
    assert len({clip_name(i) for i in range(7000)}) == 7000
