"""How well held-out windows are filled: which windows, their generated frames, and figures with intervals.

Test: pytest tests/run/test_judge.py. Training and launch/evaluate.py both judge by this. The true frames between the two
ends exist, so each figure compares with them; a contender is a linear blend, the untuned base, or a tuned network.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from toolkit import metrics
from toolkit.config import DataConfig, RunConfig
from toolkit.data.clips import Clip, ClipSettings, load_clip
from toolkit.data.format import BadSample
from toolkit.data.index import DatasetIndex, Split, open_sources
from toolkit.data.trajectory import match_stills
from toolkit.errors import UserError
from toolkit.run.framer import FOUND_SCALE, Framer, Sampling, Steering, to_signed


class Figure(NamedTuple):
    label: str
    unit: str
    sign: int  # 1 where more is better, -1 where less is
    digits: int = 2  # worth showing


# of all frames between the ends; those of the middle frame alone are named psnr_middle and so on
FIGURES = {
    "psnr_moving": Figure("moving PSNR", "dB", 1),
    "psnr": Figure("PSNR", "dB", 1),
    "ssim": Figure("SSIM", "", 1, 3),
    "lpips": Figure("LPIPS", "", -1, 3),
    "flicker": Figure("flicker", "levels", -1),
    "lighting_luma": Figure("luma drift", "levels", -1),
    "lighting_colour": Figure("colour drift", "levels", -1),
    "fvd": Figure("FVD", "", -1, 1),  # of all windows together
}
DRIFTS = ("lighting_luma", "lighting_colour")  # figures that the true frames have too


def find_figure(name: str) -> Figure:
    """What a name of `score` means."""
    figure = FIGURES[name.removesuffix("_middle")]
    return figure._replace(label=f"middle {figure.label}") if name.endswith("_middle") else figure


def main_figure(*described: Mapping[str, Mapping[str, Any]]) -> str:
    """What clips are ranked by: PSNR where it moves, or of the whole frames where no clip moves.

    described  figures of the blend, as `describe` has them, in all that is ranked alike
    """
    moves = any(figures["psnr_moving"]["mean"] is not None for figures in described)
    return "psnr_moving" if moves else "psnr"


def read_lpips(config: RunConfig, weights: str | None) -> metrics.Distance | None:
    """Read LPIPS where weights are given. Raises UserError where the pictures of a recipe are too small for it."""
    if weights is None:
        return None
    if (side := min(config.data.height, config.data.width)) < metrics.LPIPS_MIN_PX:
        raise UserError(
            f"LPIPS needs pictures of {metrics.LPIPS_MIN_PX} px or more, and the run's have {side}; leave it out"
        )
    return metrics.load_lpips(Path(weights).expanduser())


@dataclass(frozen=True)
class Windows:
    """Held-out windows whose ends lie `gap` source frames apart.

    frames_BTHWC  uint8: the two ends, and between them the frames that the layout generates
    """

    gap: int
    keys: list[str]
    frames_BTHWC: Tensor
    fps_B: Tensor
    motion_B: Tensor

    def __len__(self) -> int:
        return len(self.keys)

    def true(self, i: int) -> Tensor:
        """Window i as a batch of one, (1, T, 3, H, W) in [-1, 1]."""
        return to_signed(self.frames_BTHWC[i : i + 1])


def own_gap(config: RunConfig) -> int:
    """The gap that a recipe trains on, the shortest of several."""
    return config.data.strides[0] * (config.data.frames - 1)


def own_gaps(config: RunConfig) -> list[int]:
    """The gaps that a recipe is judged at."""
    return [*dict.fromkeys(config.validation.gaps)] or [own_gap(config)]


def window_frames(config: RunConfig) -> int:
    """How many frames a judged window has, both ends included."""
    return 3 if config.diffusion.layout == "spec_middle" else config.data.frames


def name_videos(data: DataConfig, split: Split) -> dict[str, str]:
    """The video that each clip of a split is of, by the clip's key; the key itself where shards name no video."""
    return {row.key: row.clip.source or row.key for row in open_sources(data, split).rows}


def find_trained(trained_on: Iterable[DataConfig], judged_on: DataConfig) -> dict[str, str]:
    """Held-out clips, by key, of videos that are to train on elsewhere, and these videos.

    Videos go by their names, since their bytes differ from packing to packing. What is not there any more is passed over.
    """
    trained: set[str] = set()
    for data in trained_on:
        with contextlib.suppress(UserError, OSError):
            trained |= {*name_videos(data, "train").values()}
    with contextlib.suppress(UserError):  # none is held out
        return {key: video for key, video in name_videos(judged_on, "val").items() if video in trained}
    return {}


def load_windows(config: RunConfig, gaps: Sequence[int], clips: int) -> dict[int, Windows]:
    """Load the centre window of held-out clips for each gap, of the same clips for all: some that the longest fits.

    gaps    in source frames between the two ends
    clips   at most
    raises  UserError as check_gaps does
    """
    window = config.data.frames
    loaded = _load_clips(config, gaps, clips)
    places = [0, window // 2, window - 1] if window_frames(config) < window else list(range(window))
    return {
        gap: Windows(
            gap,
            [clip.key for clip in own],
            torch.stack([torch.from_numpy(clip.frames_THWC[places]) for clip in own]),
            torch.tensor([clip.fps for clip in own]),
            torch.tensor([clip.motion for clip in own]),
        )
        for gap, own in zip(gaps, zip(*loaded, strict=True), strict=True)
    }


def load_held_out(config: RunConfig, clips: int) -> list[Clip]:
    """Load the centre window of some clips of the validation split, cut as training cuts them."""
    return [clip for (clip,) in _load_clips(config, [own_gap(config)], clips)]


def check_gaps(config: RunConfig, gaps: Sequence[int]) -> DatasetIndex:
    """Open the validation split, once a recipe's windows can fill the gaps between frames of it.

    gaps    in source frames; each a multiple of data.frames - 1, the steps of a window
    raises  UserError for a gap that does not divide, or that is too long for every clip, and where no clip is held out
    """
    window, steps = config.data.frames, config.data.frames - 1
    for gap in gaps:
        if gap < steps or gap % steps:
            near = max(1, round(gap / steps)) * steps
            raise UserError(
                f"a gap of {gap} source frames cannot be filled by windows of data.frames {window}; take a multiple of "
                f"{steps}, such as {near}"
            )
    index = open_sources(config.data, "val")
    longest = max(row.clip.frames for row in index.rows)
    if longest <= max(gaps):
        raise UserError(
            f"no held-out clip of {' + '.join(config.data.sources)} reaches over a gap of {max(gaps)} source frames: the "
            f"longest has {longest}, for gaps up to {longest - 1}; ask for less (--gaps, or data.stride), or pack longer "
            "clips"
        )
    return index


def _load_clips(config: RunConfig, gaps: Sequence[int], clips: int) -> list[list[Clip]]:
    """Of each clip its centre window for each gap; clips that are too short or cannot be read are passed over."""
    index, data, where = check_gaps(config, gaps), config.data, " + ".join(config.data.sources)
    usable, loaded = index.choose(max(gaps) + 1, clips), []
    for sample in usable:
        try:
            loaded.append([
                load_clip(
                    index, sample,
                    ClipSettings(data.frames, data.height, data.width, (gap // (data.frames - 1),), window="centre"),
                    config.seed, sample,
                )
                for gap in gaps
            ])  # fmt: skip
        except BadSample as error:
            print(f"passed over: {error}", file=sys.stderr)
        if len(loaded) == clips:
            break
    if short := len(index) - len(usable):
        print(f"passed over {short} held-out clips that are shorter than {max(gaps) + 1} frames", file=sys.stderr)
    if not loaded:
        raise UserError(f"{where} has no usable validation clip; pack more videos, or lower data.stride")
    return loaded


@torch.no_grad()
def make_window(framer: Framer, windows: Windows, i: int, sampling: Sampling) -> Tensor:
    """Generate the frames between the ends of window i, with noise that depends on i alone, not on who generates.

    returns  (1, T, 3, H, W) in [-1, 1]; the ends are the true ones
    """
    stills_B2CHW = windows.true(i)[:, [0, -1]]
    steering = None
    if framer.settings.control:  # as in training
        first, last = windows.frames_BTHWC[i, [0, -1]].numpy()
        steering = [Steering(match_stills(first, last), FOUND_SCALE)]
    fps_B, motion_B = windows.fps_B[i : i + 1], windows.motion_B[i : i + 1]
    made_BTCHW = framer.generate(stills_B2CHW, fps_B, motion_B, sampling, [i], steering).cpu()
    between_BTCHW = made_BTCHW if framer.layout.frames == 1 else made_BTCHW[:, 1:-1]
    return torch.cat([stills_B2CHW[:, :1], between_BTCHW, stills_B2CHW[:, 1:]], 1)


def blend_window(windows: Windows, i: int) -> Tensor:
    """Blend the ends of window i linearly, as make_window generates."""
    true_BTCHW = windows.true(i)
    time_T111 = torch.linspace(0, 1, true_BTCHW.shape[1]).view(-1, 1, 1, 1)
    return torch.lerp(true_BTCHW[:, :1], true_BTCHW[:, -1:], time_T111)


def score(made_BTCHW: Tensor, true_BTCHW: Tensor, lpips: metrics.Distance | None = None) -> dict[str, Tensor]:
    """Score the frames between the ends of windows against the true ones.

    made, true  (B, T, 3, H, W) in [-1, 1], both with their ends
    returns     {figure: (B,)}: those of FIGURES, lpips only where it is given, flicker only where more than one frame is
                between; the mean over the frames, and of the middle frame, the later of two, as psnr_middle and so on.
                NaN for psnr_moving where nothing moves
    """
    of_frames = score_frames(made_BTCHW, true_BTCHW, lpips)
    return average_frames(of_frames) | score_whole(made_BTCHW, true_BTCHW)


def score_frames(made_BTCHW: Tensor, true_BTCHW: Tensor, lpips: metrics.Distance | None = None) -> dict[str, Tensor]:
    """Those figures of `score` that each frame has, {figure: (B, T - 2)}."""
    clips, between = true_BTCHW.shape[0], true_BTCHW.shape[1] - 2
    moving_NHW = metrics.moving_mask(true_BTCHW).repeat_interleave(between, 0)
    made_NCHW, true_NCHW = (frames[:, 1:-1].flatten(0, 1) for frames in (made_BTCHW, true_BTCHW))
    of_frames = {
        "psnr_moving": metrics.psnr_moving_db(made_NCHW, true_NCHW, moving_NHW),
        "psnr": metrics.psnr_db(made_NCHW, true_NCHW),
        "ssim": metrics.ssim(made_NCHW, true_NCHW),
    }
    if lpips is not None:
        of_frames["lpips"] = lpips(made_NCHW, true_NCHW)
    return {name: values_N.view(clips, between) for name, values_N in of_frames.items()}


def average_frames(of_frames: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Figures of the frames of a window, (B, T), as means and of the middle one."""
    means = {name: values_BT.mean(1) for name, values_BT in of_frames.items()}
    return means | {f"{name}_middle": values_BT[:, values_BT.shape[1] // 2] for name, values_BT in of_frames.items()}


def score_whole(made_BTCHW: Tensor, true_BTCHW: Tensor) -> dict[str, Tensor]:
    """Those figures of `score` that frames have together."""
    luma_B, colour_B = metrics.lighting_drift(made_BTCHW)
    steady = {"flicker": metrics.flicker(made_BTCHW, true_BTCHW)} if made_BTCHW.shape[1] > 3 else {}
    return steady | {"lighting_luma": luma_B, "lighting_colour": colour_B}


def describe(values_B: Tensor) -> dict[str, Any]:
    """The mean of a figure over clips with its 95 % interval; clips where it is not finite do not count.

    returns  {mean, low, high, clips}; None for a number that cannot be given: none for no clip, no interval for one
    source   Student 1908, for few clips: a percentile bootstrap of ten holds the true mean 91 times of 100, of four 82 times
    """
    values = values_B[values_B.isfinite()].double()
    clips, mean = len(values), values.mean().item()
    half = student_t(clips - 1) * values.std().item() / clips**0.5 if clips > 1 else math.nan
    return {"mean": rounded(mean), "low": rounded(mean - half), "high": rounded(mean + half), "clips": clips}


def student_t(freedom: int) -> float:
    """The 97.5 % quantile of Student's t for 1, 2, ... degrees of freedom, to about a thousandth of it.

    source  Abramowitz and Stegun 26.7.5, whose series is too coarse below three degrees
    """
    if freedom < 3:
        return (12.7062, 4.3027)[freedom - 1]
    return sum(term / freedom**i for i, term in enumerate((1.95996, 2.37227, 2.82250, 2.55585, 1.58953)))


def compare(figure: str, own_B: Tensor, other_B: Tensor) -> dict[str, Any]:
    """Describe the difference own - other, clip by clip, and count the clips in which own is better."""
    gain_B = own_B - other_B
    better_B = (find_figure(figure).sign * gain_B > 0) & gain_B.isfinite()  # of the clips that count
    return describe(gain_B) | {"improved": int(better_B.sum())}


def rounded(value: float) -> float | None:
    """Four decimals; None, which JSON knows, for what is not finite."""
    return round(value, 4) if math.isfinite(value) else None
