"""Videos to try everything on, without a camera or a download: people who sign, drawn from a seed.

Test: pytest tests/authoring/test_synth.py

Lengths are shares of the frame's side, x to the right, y down; angles in radians. T frame.
"""

import math
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from toolkit.authoring.shapes import Draws, light, minimum_jerk, render_motion
from toolkit.authoring.signer import draw_look, draw_person
from toolkit.data.files import local_folder
from toolkit.data.video import write_video
from toolkit.errors import UserError

__all__ = ["clip_name", "render_clip", "render_motion", "synth"]

SIGNERS, SIGNS = 97, 64  # no common factor, so 6,208 clips pass before a signer repeats a sign
_SUPERSAMPLE = 2
_SYLLABLES = ("ba", "de", "fo", "gu", "ka", "le", "mi", "no", "pa", "ru", "sa", "te", "vo", "wi", "yu", "zo")

# The poses of one hand, numbers as in draw_person: wrist x, y, turn, breadth, five fingers, spread.
_REST = np.array([0.13, 0.95, -0.2, 0.6, 0.5, 0.4, 0.4, 0.4, 0.4, 0.2])
_HAND_SHAPES = np.array([
    [0.2, 0.0, 0.0, 0.0, 0.0, 0.1],  # fist
    [0.9, 1.0, 1.0, 1.0, 1.0, 0.2],  # flat
    [1.0, 1.0, 1.0, 1.0, 1.0, 1.0],  # spread
    [0.2, 1.0, 0.0, 0.0, 0.0, 0.2],  # point
    [0.2, 1.0, 1.0, 0.0, 0.0, 0.8],  # two
    [1.0, 0.0, 0.0, 0.0, 1.0, 1.0],  # thumb and little finger
    [0.8, 0.5, 0.5, 0.5, 0.5, 0.7],  # claw
])  # fmt: skip
# Where signs are made, from the body's middle for the right hand: forehead, chin, chest, belly, side, front.
_PLACES = np.array([[0.08, 0.19], [0.04, 0.36], [0.05, 0.55], [0.06, 0.75], [0.27, 0.45], [0.14, 0.62]])


def synth(
    out: str | Path,
    clips: int = 24,
    seconds: float = 2.0,
    size: int = 128,
    seed: int = 0,
    fps: float = 30.0,
    kind: Literal["signing", "motion"] = "signing",
) -> str:
    """Write `clips` videos, size px square: of one sign by one signer each, or of things that move.

    raises  UserError if `out` is not empty
    """
    out, frames = local_folder(out), round(seconds * fps)
    if clips < 1 or frames < 3 or size < 32 or size % 2:
        raise UserError(
            f"{clips} clips of {frames} frames at {size} px: at least 1, 3 and 32 are needed, and an even size"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not empty; give a new folder")
    out.mkdir(parents=True, exist_ok=True)
    for index in tqdm(range(clips), desc="synth", unit="clip"):
        if kind == "motion":
            name, frames_THWC = f"motion_{index:05d}", render_motion(seed, index, frames, size)
        else:
            name, frames_THWC = clip_name(index), render_clip(seed, index, frames, size, fps)
        write_video(out / f"{name}.mp4", frames_THWC, fps)
    return f"{clips} videos of {frames / fps:.1f} s in {out}\nnext: python shards/pack.py {out} SHARDS"


def clip_name(index: int) -> str:
    """Name a clip by its made-up sign and its signer, like "kamino_signer07_0007"."""
    sign = index % SIGNS
    word = _SYLLABLES[sign % 16] + _SYLLABLES[(5 * sign + 3) % 16] + _SYLLABLES[(sign // 16 + 3 * sign) % 16]
    return f"{word}_signer{index % SIGNERS:02d}_{index:04d}"


def render_clip(seed: int, index: int, frames: int, size_px: int, fps: float = 30.0) -> np.ndarray:
    """Render a person signing: uint8 frames_THWC, size_px square, a function of (seed, index)."""
    side_px = _SUPERSAMPLE * size_px
    look = draw_look(Draws(seed, "synth/signer", index % SIGNERS), side_px)
    draws = Draws(seed, "synth/clip", index)
    tempo = draws.number(0.85, 1.2)
    times_s = np.arange(frames) / fps
    hands = _draw_sign(Draws(seed, "synth/sign", index % SIGNS), times_s * tempo)
    hands[..., :2] += draws.uniform(-0.012, 0.012, 2, 2)
    sway = _draw_sway(draws, times_s)
    light_THWC = light(draws, frames, frames / fps, size_px, size_px, draws.number(0.04, 0.14))
    frames_THWC = np.stack([
        np.asarray(draw_person(look, hands[t], sway[t], side_px).reduce(_SUPERSAMPLE)) for t in range(frames)
    ])  # fmt: skip
    return np.clip(frames_THWC * light_THWC + 0.5, 0, 255).astype(np.uint8)


def _draw_sign(draws: Draws, times_s: np.ndarray) -> np.ndarray:
    """Draw the poses of both hands over time: float64 (T, 2, 10), the right hand first, each x mirrored outward."""
    both, mirrored, shakes = draws.chance(0.6), draws.chance(0.5), draws.chance(0.4)
    poses, starts, ends = [np.stack([_REST, _REST])], [], []
    clock_s = draws.number(0.0, 0.15)
    while clock_s < times_s[-1]:
        right = _draw_pose(draws)
        left = right if mirrored else _draw_pose(draws)
        poses.append(np.stack([right, left if both else _REST]))
        starts.append(clock_s)
        clock_s += draws.number(0.28, 0.5)
        ends.append(clock_s)
        clock_s += draws.number(0.0, 0.15)
        if len(poses) % 5 == 0:  # the hands come down between signs
            poses.append(poses[0])
            starts.append(clock_s)
            clock_s += draws.number(0.4, 0.55)
            ends.append(clock_s)
    path = np.repeat(poses[0][None], len(times_s), axis=0)
    for before, after, start_s, end_s in zip(poses, poses[1:], starts, ends, strict=False):
        path += minimum_jerk((times_s - start_s) / (end_s - start_s))[:, None, None] * (after - before)
    if shakes:
        phase_T = 2 * math.pi * draws.number(1.5, 3.0) * times_s
        path[:, 0, 0] += 0.018 * np.sin(phase_T)
        path[:, 0, 2] += 0.25 * np.sin(phase_T + 1)
    return path


def _draw_pose(draws: Draws) -> np.ndarray:
    place = _PLACES[draws.integer(0, len(_PLACES) - 1)] + draws.uniform(-0.03, 0.03, 2)
    shape = _HAND_SHAPES[draws.integer(0, len(_HAND_SHAPES) - 1)]
    return np.concatenate([place, draws.uniform(-0.9, 0.9, 1), draws.uniform(0.55, 1.0, 1), shape])


def _draw_sway(draws: Draws, times_s: np.ndarray) -> np.ndarray:
    """Small movements of the body over time, (T, 5): x, y, turn of the head, mouth and brows, lids."""
    phase = draws.uniform(0, 2 * np.pi, 5)
    hz = draws.uniform(0.15, 0.5, 5)
    wave = np.sin(2 * np.pi * hz * times_s[:, None] + phase)
    blink = np.exp(-(((times_s[:, None] - draws.uniform(0, 6, 3)) / 0.06) ** 2)).max(1)
    mouth = (0.5 + 0.5 * np.sin(2 * np.pi * 3 * hz[3] * times_s + phase[3])) ** 2
    return np.stack([0.012 * wave[:, 0], 0.006 * wave[:, 1], wave[:, 2], mouth, blink], axis=1)
