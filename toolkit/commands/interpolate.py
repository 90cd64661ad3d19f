"""From two stills, or many, to a video: what launch/interpolate.py does.

Test: pytest tests/commands/test_interpolate.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from toolkit.config import RunConfig
from toolkit.data.files import appearing, is_free
from toolkit.data.stills import Stills, is_video, read_stills
from toolkit.data.trajectory import match_stills, read_trajectories
from toolkit.data.video import write_gif, write_video
from toolkit.errors import UserError
from toolkit.run.framer import FOUND_SCALE, Framer, Sampling, Steering, to_signed, to_uint8
from toolkit.run.inference import Source, load_framer, told_of

GIF_FPS = 50  # browsers show what is to pass faster at a tenth of a second a frame


@dataclass(frozen=True)
class Filling:
    """How gaps are filled, whatever stills they lie between (settle makes one)."""

    sampling: Sampling
    frames: int
    fps: float | None
    motion: float
    seeds: Sequence[int]
    trajectories: str | None
    control_scale: float
    batch: int


@dataclass(frozen=True)
class Film:
    """A video that is to be made."""

    place: Path
    stills: Stills
    filling: Filling
    fps: float
    seeds: Sequence[int]  # of each gap, and so is what follows
    steering: Sequence[Steering | None]

    @property
    def count(self) -> int:
        """How many frames it will have."""
        return len(self.steering) * (self.filling.frames - 1) + 1


def settle(
    source: Source, sampling: Sampling, frames: int | None = None, fps: float | None = None, motion: float | None = None,
    seeds: Sequence[int] = (), trajectories: str | None = None, control_scale: float | None = None,
    controlnet: str | None = None, batch: int = 1,
) -> Filling:  # fmt: skip
    """Put what is asked for beside what the run says.

    frames         of each gap, its two stills included; None: the recipe's window, or 5 for layout spec_middle
    fps            of the result; None: what the adapter says its clips had, or as long as the video was that is filled
    motion         None: what the adapter says its clips had
    seeds          one for all gaps, or one per gap; none: the recipe's
    trajectories   "auto" to match features of the stills, or a JSON file for the one gap between two; None: no steering
    control_scale  of the ControlNet; None: 1 for drawn trajectories, 0.5 for found ones, as Framer's app has it
    controlnet     as it was named for this, to refuse it where nothing steers; the source holds it too
    batch          pairs of stills that the network is asked about at once
    raises         UserError for what does not go together
    """
    config = source.config
    if trajectories is None and config.diffusion.control:
        trajectories = "auto"
        print("the run was trained with trajectories found between the stills, so they are found here too")
    if frames is None:
        frames = 5 if config.diffusion.layout == "spec_middle" else config.data.frames
    refuse_frames(frames, config)
    refuse_steering(config, trajectories, control_scale, controlnet)
    if control_scale is None:
        control_scale = FOUND_SCALE if trajectories == "auto" else 1.0
    motion = told_of(source.about).motion if motion is None else motion
    return Filling(sampling, frames, fps, motion, seeds, trajectories, control_scale, batch)


def interpolate_stills(
    source: Source, paths: Sequence[str], out: str, filling: Filling, compiled: bool = False
) -> Path:
    """Write a video through stills to out: .mp4, .gif, or a folder of PNG.

    paths     two pictures or more, of which the first and the last may be videos, or one video (see read_stills)
    compiled  worth its minutes for many stills
    """
    if len(paths) < 2 and not (paths and is_video(paths[0])):
        raise UserError("give --first and --last, or --stills with two pictures or more, or with one video")
    film = plan_film(source, paths, Path(os.path.expanduser(out)).resolve(), filling)
    tell(film)
    with appearing(film.place, folder=not film.place.suffix) as aside:
        framer = load_framer(source, any(points is not None for points in film.steering), compiled)
        note_unguided(filling.sampling, source.config)
        with tqdm(total=count_steps(framer, filling) * len(film.steering), unit="step", desc="sampling") as bar:
            write_frames(aside, fill_gaps(framer, film, bar), film.count, film.fps)
    return film.place


def plan_film(source: Source, paths: Sequence[str], place: Path, filling: Filling) -> Film:
    """Read stills, and find where points go between them. Raises UserError where no such video can be made of them."""
    fps = told_of(source.about).fps if filling.fps is None else filling.fps
    refuse_ending(place, fps)  # first: to read a whole video takes a while
    stills = read_stills(paths, source.config.data.height, source.config.data.width)
    gaps = len(stills.cut_NHWC) - 1
    if filling.fps is None and stills.fps is not None:
        fps = stills.fps * (filling.frames - 1)
        refuse_ending(place, fps)
    if filling.trajectories not in (None, "auto") and gaps > 1:
        raise UserError(f"a file of trajectories is for two stills, not {gaps + 1}; take --trajectories auto")
    if len(filling.seeds) not in (0, 1, gaps):
        raise UserError(f"{len(filling.seeds)} seeds for {gaps} gaps; give one --seed for all, or one per gap")
    seeds = filling.seeds if len(filling.seeds) == gaps else [*(filling.seeds or [source.config.seed])] * gaps
    points = find_points(filling.trajectories, stills, source.config.diffusion.control)
    steering = [None if own is None else Steering(own, filling.control_scale) for own in points]
    return Film(place, stills, filling, fps, seeds, steering)


def tell(film: Film) -> None:
    """Say what becomes of the stills."""
    (height, width), (own_height, own_width) = film.stills.source_px, film.stills.cut_NHWC.shape[1:3]
    if film.stills.fps is not None:
        before = f"{len(film.stills.cut_NHWC):,} frames at {film.stills.fps:g} fps"
        print(f"{before} become {film.count:,} at {film.fps:g}, without sound")
    if film.stills.uneven:
        print(
            f"note: the video's frames come unevenly ({film.stills.uneven:,} of {len(film.steering):,} steps), and will be "
            "shown evenly, so what moves changes its speed; make them even first: ffmpeg -i VIDEO -vf fps=30 EVEN.mp4"
        )
    if (height, width) != (own_height, own_width):
        print(
            f"the stills are scaled and cropped from {width}x{height} to {own_width}x{own_height}, "
            "the size the run was trained at"
        )
    if film.filling.trajectories == "auto":
        found = [0 if own is None else len(own.points_PK2) for own in film.steering]
        some = ", ".join(map(str, found)) if len(found) <= 10 else f"{min(found)} to {max(found)}"
        print(f"trajectories: {some} points matched between the stills")


def count_steps(framer: Framer, filling: Filling) -> int:
    """Steps of the sampler in a gap."""
    return framer.count_samplings(filling.frames) * filling.sampling.steps


def fill_gaps(framer: Framer, film: Film, bar: tqdm) -> Iterator[np.ndarray]:
    """Yield the frames of a film, uint8 (H, W, 3), a batch of gaps after another, a step of the bar for each step taken."""
    stills_NHWC, filling = film.stills.cut_NHWC, film.filling

    def on_step(step: int, latents_BTCHW: Tensor) -> Tensor:
        bar.update(len(latents_BTCHW))
        return latents_BTCHW

    for gap in range(0, len(film.steering), filling.batch):
        own = slice(gap, gap + filling.batch)
        filled_TCHW = framer.interpolate(
            to_signed(torch.from_numpy(stills_NHWC[gap : gap + filling.batch + 1])), filling.frames, film.fps,
            filling.motion, filling.sampling, film.seeds[own], film.steering[own], filling.batch, on_step, gap,
        )  # fmt: skip
        yield from to_uint8(filled_TCHW[:-1]).numpy()
    yield stills_NHWC[-1]


def find_points(trajectories: str | None, stills: Stills, always: bool) -> list[np.ndarray | None]:
    """Where points go in each gap, (P, K, 2) in pixels of the stills as the network sees them.

    always   steer without any point too, as training does; else None where nothing is matched: Framer's own ControlNet
             never saw a gap without points
    """
    pairs = list(pairwise(stills.cut_NHWC))
    if trajectories is None:
        return [None] * len(pairs)
    if trajectories != "auto":
        height_px, width_px = stills.cut_NHWC.shape[1:3]
        points = read_trajectories(Path(os.path.expanduser(trajectories)), stills.source_px, (height_px, width_px))
        if not ((points >= 0) & (points < (width_px, height_px))).all(-1).any():
            raise UserError(
                f"{trajectories} has no place inside the {width_px}x{height_px} picture that the network sees"
            )
        return [points]
    found = [match_stills(first, last) for first, last in pairs]
    return [points if len(points) or always else None for points in found]


def refuse_steering(
    config: RunConfig, trajectories: str | None, control_scale: float | None, controlnet: str | None
) -> None:
    """Refuse trajectories that nothing would follow, and a follower or strength of none."""
    for flag, value in (("controlnet", controlnet), ("control_scale", control_scale)):
        if trajectories is None and value is not None:
            raise UserError(f"--{flag} is for trajectories, but none are given; add --trajectories auto, or a JSON")
    if trajectories is not None and config.model.controlnet is None:
        raise UserError("trajectories need a ControlNet that follows them; give --controlnet, a folder, file or hub id")


def note_unguided(sampling: Sampling, config: RunConfig) -> None:
    """Say so where guidance leans on a branch that the tuning never saw."""
    if sampling.guided and not config.diffusion.conditioning_dropout:
        print("note: guidance above 1, but the adapter was trained without diffusion.conditioning_dropout")


def refuse_frames(frames: int, config: RunConfig) -> None:
    """Refuse a number of frames that neither halving nor the recipe's own window gives."""
    window = config.data.frames
    if frames == window and config.diffusion.layout != "spec_middle":
        return
    if window % 2 == 0:
        raise UserError(f"frames is {frames}: this run's windows have {window} frames and no middle; take {window}")
    if frames < 3 or (frames - 1) & (frames - 2):
        own = f", and this run's window {window}" if config.diffusion.layout != "spec_middle" else ""
        raise UserError(f"frames is {frames}: halving gives 3, 5, 9, 17, ...{own}; take one of these")


def refuse_ending(out: Path, fps: float) -> None:
    """Refuse a form that cannot be written, and a place where something is already."""
    if out.suffix not in (".mp4", ".gif", ""):
        raise UserError(f"cannot write {out}: the ending must be .mp4 or .gif, or none for a folder of PNG")
    if out.suffix == ".gif" and fps > GIF_FPS:
        raise UserError(f"a GIF shows {GIF_FPS} frames a second at most, not {fps:g}; give --fps {GIF_FPS}, or an .mp4")
    if not is_free(out, folder=not out.suffix):
        new = "another --out" if out.suffix else "--out a folder that is new or empty"
        raise UserError(f"{out} is there already; give {new}")


def write_frames(out: Path, frames: Iterable[np.ndarray], count: int, fps: float) -> None:
    """Write uint8 frames (H, W, 3) as a video, an animation, or numbered pictures, by the ending of out."""
    if out.suffix == ".mp4":
        write_video(out, frames, fps)
    elif out.suffix == ".gif":
        write_gif(out, np.stack([*frames]), fps)
    else:
        digits = max(3, len(str(count - 1)))  # so that names sort as the frames do
        for i, frame_HWC in enumerate(frames):
            Image.fromarray(frame_HWC).save(out / f"{i:0{digits}d}.png")
