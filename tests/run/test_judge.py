"""Held-out windows are those they shall be, and figures are of the frames between. Run: pytest tests/run/test_judge.py"""

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from tests.launching import RECIPE
from tests.model.control import make_controlnet
from toolkit.authoring.pack import pack
from toolkit.authoring.synth import synth
from toolkit.config import ModelConfig, RunConfig, load_config
from toolkit.data.clips import ClipSettings, Crop, decode_frames
from toolkit.data.index import open_shards
from toolkit.data.trajectory import match_stills
from toolkit.errors import UserError
from toolkit.metrics import flicker, lighting_drift, moving_mask, psnr_db, psnr_moving_db, ssim
from toolkit.model.base import load_base
from toolkit.run.framer import FOUND_SCALE, Framer, Sampling, Steering, to_uint8
from toolkit.run.judge import (
    Windows,
    blend_window,
    compare,
    describe,
    load_held_out,
    load_windows,
    make_window,
    own_gap,
    score,
)


@pytest.fixture(scope="module")
def shards(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny shards with longer clips held out behind the short ones."""
    folder = tmp_path_factory.mktemp("long")
    synth(folder / "videos", clips=3, seconds=1.5, size=32, seed=2)
    pack(folder / "videos", folder / "long")
    shards = Path(shutil.copytree(tiny_shards, folder / "shards"))
    for path in (folder / "long").glob("train-000000.*"):
        shutil.copy(path, shards / path.name.replace("train-000000", "val-000001"))
    return shards


def recipe(tiny_run: dict[str, Any], shards: Path, **overrides: Any) -> RunConfig:
    named = {name.replace("__", "."): value for name, value in overrides.items()}
    return load_config(RECIPE, tiny_run | {"name": "judged", "data.shards": str(shards)} | named)


def held_out_frames(shards: Path) -> dict[str, tuple[np.ndarray, float]]:
    """Every frame of every held-out clip as it is decoded, and its rate."""
    index = open_shards(shards, "val")
    settings = ClipSettings(3, 32, 32)
    return {
        row.key: (decode_frames(index, i, range(row.clip.frames), settings, Crop()), row.clip.fps)
        for i, row in enumerate(index.rows)
    }


@pytest.mark.parametrize("layout", ["framer_clip", "spec_middle"])
def test_windows_lie_in_the_middle_of_their_clips(tiny_run: dict[str, Any], tiny_shards: Path, layout: str) -> None:
    """As many frames before as behind, spaced evenly over the gap; where the middle alone is made, it and the ends."""
    config = recipe(tiny_run, tiny_shards, diffusion__layout=layout, data__frames=5)
    whole = held_out_frames(tiny_shards)
    windows = load_windows(config, [4, 12], 8)
    assert list(windows) == [4, 12]
    for gap, own in windows.items():
        assert own.keys == list(whole)
        for i, key in enumerate(own.keys):
            frames_THWC, fps = whole[key]
            before = (len(frames_THWC) - gap - 1) // 2
            places = [before + gap * k // 4 for k in ((0, 2, 4) if layout == "spec_middle" else range(5))]
            assert np.array_equal(own.frames_BTHWC[i], frames_THWC[places])
            assert own.fps_B[i].item() == pytest.approx(fps * 4 / gap)
            assert torch.equal(to_uint8(own.true(i))[0], own.frames_BTHWC[i])


def test_all_gaps_have_the_same_clips(
    tiny_run: dict[str, Any], shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those that the longest gap fits into, in their order, and no more than asked for; the others are counted."""
    config, whole = recipe(tiny_run, shards), held_out_frames(shards)
    short = min(len(frames) for frames, _ in whole.values())
    long = [key for key, (frames, _) in whole.items() if len(frames) > short]
    gap = short + short % 2
    assert len(long) >= 2 and len(whole) - len(long) == 2
    windows = load_windows(config, [2, gap], 8)
    assert windows[2].keys == windows[gap].keys == long
    assert f"passed over 2 held-out clips that are shorter than {gap + 1} frames" in capsys.readouterr().err
    assert load_windows(config, [gap], 1)[gap].keys == long[:1]
    assert load_windows(config, [2], 8)[2].keys == list(whole)
    assert [clip.key for clip in load_held_out(config, 3)] == list(whole)[:3] and own_gap(config) == 2


def test_few_clips_are_not_of_one_recording(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    """Of two long videos held out, two clips are judged: one of each, from its middle."""
    synth(tmp_path / "videos", clips=4, seconds=2.5, size=32, seed=2)
    pack(tmp_path / "videos", tmp_path / "shards", clip_seconds=0.5, holdout=0.5, min_motion=0, duplicate_distance=0)
    rows = open_shards(tmp_path / "shards", "val").rows
    keys = {
        name: [row.key for row in rows if row.clip.source == name]
        for name in dict.fromkeys(r.clip.source for r in rows)
    }
    assert [len(own) for own in keys.values()] == [5, 5]
    judged = load_windows(recipe(tiny_run, tmp_path / "shards"), [4], 2)[4].keys
    assert judged == [own[2] for own in keys.values()]


def test_gaps_that_cannot_be_are_refused(tiny_run: dict[str, Any], tiny_shards: Path) -> None:
    """One that the window's steps do not divide, one that no clip reaches over, and data that hold nothing out."""
    config = recipe(tiny_run, tiny_shards, data__frames=5)
    for gap, near in ((6, "4|8"), (2, "4"), (0, "4"), (101, "100")):
        with pytest.raises(UserError, match=rf"gap of {gap} source .* take a multiple of 4, such as ({near})$"):
            load_windows(config, [gap], 2)
    longest = max(len(frames) for frames, _ in held_out_frames(tiny_shards).values())
    with pytest.raises(
        UserError,
        match=rf"reaches over a gap of 400 source frames: the longest has {longest}, for gaps up to {longest - 1}",
    ):
        load_windows(config, [4, 400], 2)


def random_windows(frames: int, clips: int = 2) -> tuple[Tensor, Tensor]:
    """Windows in which a patch changes much and the rest little, and the same with noise between the ends."""
    generator = torch.Generator().manual_seed(0)
    true = torch.rand(clips, frames, 3, 20, 24, generator=generator) * 0.02
    true[:, :, :, 4:9, 5:15] *= 60
    made = true + 0.1 * torch.randn(true.shape, generator=generator)
    made[:, [0, -1]] = true[:, [0, -1]]
    return made, true


@pytest.mark.parametrize("frames", [3, 4, 5])
def test_figures_are_of_the_frames_between(frames: int) -> None:
    """Frame by frame by the metrics, without the ends; the middle is the later of two; the mask is of the whole window."""
    made, true = random_windows(frames)
    figures = score(made, true, lpips=lambda a, b: (a - b).abs().amax((1, 2, 3)))
    mask_BHW = moving_mask(true)
    assert 0 < mask_BHW.float().mean() < 0.2
    metrics = {
        "psnr": psnr_db, "ssim": ssim, "psnr_moving": lambda a, b: psnr_moving_db(a, b, mask_BHW),
        "lpips": lambda a, b: (a - b).abs().amax((1, 2, 3)),
    }  # fmt: skip
    for name, metric in metrics.items():
        of_frames = torch.stack([metric(made[:, t], true[:, t]) for t in range(1, frames - 1)])
        assert torch.allclose(figures.pop(name), of_frames.mean(0), atol=1e-4)
        assert torch.allclose(figures.pop(f"{name}_middle"), of_frames[frames // 2 - 1], atol=1e-4)
    if frames > 3:
        assert torch.equal(figures.pop("flicker"), flicker(made, true))
    assert torch.equal(
        torch.stack([figures.pop("lighting_luma"), figures.pop("lighting_colour")]), torch.stack(lighting_drift(made))
    )
    assert not figures


def test_a_still_clip_has_no_moving_figure() -> None:
    """NaN for that clip alone."""
    made, true = random_windows(3)
    true[1] = true[1, :1]
    assert score(made, true)["psnr_moving"].isnan().tolist() == [False, True]
    assert "lpips" not in score(made, true)


def test_a_blend_is_exact_where_the_video_is_one() -> None:
    """Between two ends that fade into each other; its light never strays."""
    ends = torch.randint(0, 256, (1, 2, 8, 8, 3), generator=torch.Generator().manual_seed(0)).float()
    fade = torch.stack([torch.lerp(ends[:, 0], ends[:, 1], t / 4) for t in range(5)], 1)
    windows = Windows(4, ["a"], fade, torch.ones(1), torch.ones(1))
    assert torch.allclose(blend_window(windows, 0), windows.true(0), atol=1e-5)
    assert torch.stack(lighting_drift(blend_window(windows, 0))).max() < 1e-3


@pytest.mark.parametrize("clips", [2, 3, 4, 5, 8, 12, 100])
def test_intervals_are_those_of_student(clips: int) -> None:
    """SciPy's t distribution gives the same interval, from two clips on."""
    values = torch.randn(clips, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 + 20
    mine = describe(values)
    theirs = stats.t.interval(0.95, clips - 1, values.mean(), stats.sem(values))
    assert mine["mean"] == pytest.approx(values.mean().item(), abs=1e-4) and mine["clips"] == clips
    assert (mine["low"], mine["high"]) == pytest.approx(theirs, abs=2e-3 * (theirs[1] - theirs[0]))


@pytest.mark.parametrize("clips", [3, 5, 10])
def test_intervals_hold_the_truth_as_often_as_they_say(clips: int) -> None:
    """Of a thousand experiments of few clips, 95 % hold the mean that the clips were drawn around."""
    drawn = torch.randn(1000, clips, generator=torch.Generator().manual_seed(0))
    intervals = [describe(values) for values in drawn]
    assert 0.93 < np.mean([own["low"] <= 0 <= own["high"] for own in intervals]) < 0.97


def test_what_is_not_finite_does_not_count() -> None:
    """A clip where nothing moves, or whose frames are no numbers; of no clip nothing is known, of one no interval."""
    values = torch.tensor([math.nan, 20.0, math.inf, 22.0])
    assert describe(values) | {"low": 0, "high": 0} == {"mean": 21.0, "low": 0, "high": 0, "clips": 2}
    assert describe(values[:2]) == {"mean": 20.0, "low": None, "high": None, "clips": 1}
    assert describe(values[:1]) == {"mean": None, "low": None, "high": None, "clips": 0}


def test_gains_are_taken_clip_by_clip() -> None:
    """Clips that differ much, each gaining the same: a narrow interval. Of flicker and LPIPS less is better."""
    base = torch.tensor([10.0, 20.0, 30.0, math.nan])
    gain = compare("psnr_moving", base + torch.tensor([1.0, 1.1, -0.1, 0.0]), base)
    assert gain["mean"] == pytest.approx(2 / 3, abs=1e-3) and gain["improved"] == 2 and gain["clips"] == 3
    assert gain == describe(torch.tensor([1.0, 1.1, -0.1])) | {"improved": 2}
    for figure, better in (("psnr_middle", 3), ("ssim", 3), ("flicker", 0), ("lpips_middle", 0), ("lighting_luma", 0)):
        assert compare(figure, base + 1, base)["improved"] == better
    exact = compare("psnr", torch.tensor([math.inf, 30.0]), torch.tensor([29.0, 29.0]))
    assert (exact["improved"], exact["clips"]) == (1, 1), "what does not count is not better either"


@pytest.mark.parametrize("layout", ["framer_clip", "spec_middle"])
def test_a_window_is_filled_between_its_true_ends(
    tiny_run: dict[str, Any], tiny_shards: Path, tiny_base: Path, layout: str
) -> None:
    """By the network's own frames, with the noise of the window's place; the ends are the true ones."""
    config = recipe(tiny_run, tiny_shards, diffusion__layout=layout, data__frames=5)
    base = load_base(ModelConfig(base=str(tiny_base)), torch.device("cpu"), "fp32")
    framer = Framer(base, config.diffusion, 5, seed=3)
    own = load_windows(config, [8], 2)[8]
    made, true = make_window(framer, own, 1, Sampling(steps=1)), own.true(1)
    assert made.shape == true.shape and made.abs().max() <= 1 and not made.requires_grad
    assert torch.equal(made[:, [0, -1]], true[:, [0, -1]]) and not torch.equal(made[:, 1], true[:, 1])
    with torch.no_grad():
        stills = true[:, [0, -1]]
        direct = framer.generate(stills, own.fps_B[1:], own.motion_B[1:], Sampling(steps=1), [1])
    assert torch.equal(made[:, 1:-1], direct if layout == "spec_middle" else direct[:, 1:-1])


def test_a_run_that_was_steered_is_judged_steered(tiny_run: dict[str, Any], tiny_shards: Path, tiny_base: Path) -> None:
    """By the points that match between the two ends, at training's scale."""
    changes = {"diffusion__layout": "framer_clip", "diffusion__control": True, "model__controlnet": "beside"}
    config = recipe(tiny_run, tiny_shards, **changes)
    base = load_base(ModelConfig(base=str(tiny_base)), torch.device("cpu"), "fp32")
    control = make_controlnet(base.unet, awake=True)
    framer = Framer(base, config.diffusion, 3, seed=3, controlnet=control)
    own = load_windows(config, [8], 1)[8]
    stills, (first, last) = own.true(0)[:, [0, -1]], own.frames_BTHWC[0, [0, -1]].numpy()
    steering = [Steering(match_stills(first, last), FOUND_SCALE)]
    with torch.no_grad():
        steered, free = (
            framer.generate(stills, own.fps_B, own.motion_B, Sampling(steps=1), [0], points)
            for points in (steering, None)
        )
    made = make_window(framer, own, 0, Sampling(steps=1))
    assert torch.equal(made[:, 1], steered[:, 1]) and not torch.equal(steered[:, 1], free[:, 1])
