"""From two stills, or many, to a video: what launch/interpolate.py does.

Test: pytest tests/run/test_interpolate.py.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from toolkit.config import RunConfig
from toolkit.data.stills import is_video, read_stills
from toolkit.data.trajectory import match_stills, read_trajectories
from toolkit.data.video import write_gif, write_video
from toolkit.errors import UserError
from toolkit.run.framer import FOUND_SCALE, Framer, Sampling, Steering, to_signed, to_uint8
from toolkit.run.inference import Source, load_framer, told_of

GIF_FPS = 50  # browsers show what is to pass faster at a tenth of a second a frame


def interpolate_stills(
    source: Source,
    paths: Sequence[str],
    out: str,
    frames: int | None,
    fps: float | None,
    motion: float | None,
    sampling: Sampling,
    seeds: Sequence[int],
    trajectories: str | None,
    control_scale: float | None,
    controlnet: str | None = None,
    batch: int = 1,
    compiled: bool = False,
) -> Path:
    """Write a video through pictures to out: .mp4, .gif, or a folder of PNG.

    paths         two pictures or more, of which the first and the last may be videos, or one video (see read_stills)
    frames        of each gap between two pictures, both included; None: the recipe's window, or 5 for layout spec_middle
    fps, motion   None: what the adapter says its clips had; a video alone is as long afterwards as it was
    seeds         one for all gaps, or one per gap; none: the recipe's
    trajectories  "auto" to match features of the stills, or a JSON file for the one gap between two; None: no steering
    controlnet    as it was named for this video, to refuse it where nothing steers; the source holds it too
    control_scale  of the ControlNet; None: 1 for drawn trajectories, 0.5 for found ones, as Framer's app has it
    batch         pairs of pictures that the network is asked about at once
    compiled      worth its minutes for many pictures
    """
    if len(paths) < 2 and not (paths and is_video(paths[0])):
        raise UserError("give --first and --last, or --stills with two pictures or more, or with one video")
    config = source.config
    if trajectories is None and config.diffusion.control:
        trajectories = "auto"
        print("the run was trained with trajectories found between the stills, so they are found here too")
    if frames is None:
        frames = 5 if config.diffusion.layout == "spec_middle" else config.data.frames
    refuse_frames(frames, config)
    stills = read_stills(paths, config.data.height, config.data.width)
    gaps, place = len(stills.cut_NHWC) - 1, Path(os.path.expanduser(out)).resolve()
    told = told_of(source.about)
    if fps is None:
        fps = told.fps if stills.fps is None else stills.fps * (frames - 1)
    motion = motion if motion is not None else told.motion
    refuse_ending(place, fps)
    refuse_steering(config, trajectories, control_scale, controlnet, gaps)
    if len(seeds) not in (0, 1, gaps):
        raise UserError(f"{len(seeds)} seeds for {gaps} gaps; give one --seed for all, or one per gap")
    count = gaps * (frames - 1) + 1
    if stills.fps is not None:
        print(f"{gaps + 1:,} frames at {stills.fps:g} fps become {count:,} at {fps:g}, without sound")
    size_px = (config.data.height, config.data.width)
    if stills.source_px != size_px:
        (height, width), (own_height, own_width) = stills.source_px, size_px
        print(
            f"the stills are scaled and cropped from {width}x{height} to {own_width}x{own_height}, "
            "the size the run was trained at"
        )
    points = find_points(trajectories, stills.cut_NHWC, stills.source_px, config.diffusion.control)
    with appearing(place) as aside:
        framer = load_framer(source, any(p is not None for p in points), compiled)
        note_unguided(sampling, config)
        if control_scale is None:
            control_scale = FOUND_SCALE if trajectories == "auto" else 1.0
        steering = [None if p is None else Steering(p, control_scale) for p in points]
        seeds = [*seeds] * gaps if len(seeds) == 1 else seeds or [framer.seed] * gaps
        made = fill_gaps(framer, stills.cut_NHWC, frames, fps, motion, sampling, seeds, steering, batch)
        write_frames(aside, made, count, fps)
    return place


def fill_gaps(
    framer: Framer, stills_NHWC: np.ndarray, frames: int, fps: float, motion: float, sampling: Sampling,
    seeds: Sequence[int], steering: Sequence[Steering | None], batch: int = 1,
) -> Iterator[np.ndarray]:  # fmt: skip
    """Yield the frames of a video, uint8 (H, W, 3), `batch` gaps of it after another, under a progress bar."""
    from tqdm import tqdm

    gaps = len(stills_NHWC) - 1
    with tqdm(total=gaps * framer.count_samplings(frames) * sampling.steps, unit="step", desc="sampling") as bar:

        def on_step(step: int, latents_BTCHW: Tensor) -> Tensor:
            bar.update(len(latents_BTCHW))
            return latents_BTCHW

        for gap in range(0, gaps, batch):
            own = slice(gap, gap + batch)
            signed_NCHW = to_signed(torch.from_numpy(stills_NHWC[gap : gap + batch + 1]))
            filled_TCHW = framer.interpolate(
                signed_NCHW, frames, fps, motion, sampling, seeds[own], steering[own], batch, on_step, gap
            )
            yield from to_uint8(filled_TCHW[:-1]).numpy()
    yield stills_NHWC[-1]


def find_points(
    trajectories: str | None, stills_NHWC: np.ndarray, source_size: tuple[int, int], always: bool = False
) -> list[np.ndarray | None]:
    """Where points go in each gap, (P, K, 2) in pixels of the stills as the network sees them.

    always   steer without any point too, as training does; else None where nothing is matched: Framer's own ControlNet
             never saw a gap without points
    """
    pairs = list(zip(stills_NHWC[:-1], stills_NHWC[1:], strict=True))
    if trajectories is None:
        return [None] * len(pairs)
    if trajectories != "auto":
        height_px, width_px = stills_NHWC.shape[1:3]
        points = read_trajectories(Path(os.path.expanduser(trajectories)), source_size, (height_px, width_px))
        if not ((points >= 0) & (points < (width_px, height_px))).all(-1).any():
            raise UserError(
                f"{trajectories} has no place inside the {width_px}x{height_px} picture that the network sees"
            )
        return [points]
    found = [match_stills(first, last) for first, last in pairs]
    print(f"trajectories: {', '.join(str(len(points)) for points in found)} points matched between the stills")
    return [points if len(points) or always else None for points in found]


def refuse_steering(
    config: RunConfig, trajectories: str | None, control_scale: float | None, controlnet: str | None, gaps: int
) -> None:
    """Refuse trajectories that nothing would follow, and a follower or strength of none."""
    for flag, value in (("controlnet", controlnet), ("control_scale", control_scale)):
        if trajectories is None and value is not None:
            raise UserError(f"--{flag} is for trajectories, but none are given; add --trajectories auto, or a JSON")
    if trajectories is not None and config.model.controlnet is None:
        raise UserError("trajectories need a ControlNet that follows them; give --controlnet, a folder, file or hub id")
    if trajectories not in (None, "auto") and gaps > 1:
        raise UserError(f"a file of trajectories is for two stills, not {gaps + 1}; take --trajectories auto")


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
    if out.exists() and (out.suffix or out.is_file() or any(out.iterdir())):
        new = "another --out" if out.suffix else "--out a folder that is new or empty"
        raise UserError(f"{out} is there already; give {new}")


@contextmanager
def appearing(out: Path) -> Iterator[Path]:
    """Give a place of out's kind, whose content is out's once all is done; what fails leaves nothing.

    raises  UserError where nothing can be written there, or something has come there meanwhile, which stays
    """
    inside = out.is_dir()  # an empty folder may be where a disk is mounted, whose name stays
    mark = os.urandom(4).hex()
    aside = (out if inside else out.parent) / f".{mark}{out.suffix}"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        aside.touch() if out.suffix else aside.mkdir()
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}; choose another --out") from None
    try:
        yield aside
        if inside:
            for path in aside.iterdir():
                path.rename(out / path.name)
        elif out.exists():
            kept = out.with_name(f"{out.stem}.{mark}{out.suffix}")
            os.replace(aside, kept)
            raise UserError(f"{out} has come there meanwhile, and stays; what was made is {kept}")
        else:
            os.replace(aside, out)
    finally:
        shutil.rmtree(aside, ignore_errors=True) if aside.is_dir() else aside.unlink(missing_ok=True)


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
