"""Rendered material: seeded draws, textures and smooth paths, and render_motion, generic moving things by the second.

Test: pytest tests/authoring/test_synth.py

T frame, H height and W width in pixels, C colour, K waves of a spectrum. Lengths are shares of the frame's side,
angles are in radians.
"""

import math

import numpy as np
import torch

from toolkit.rng import rng

_TEXELS = 128  # side of a texture that wraps around


class Draws:
    """Numbers in a fixed order from one key of toolkit.rng, as NumPy."""

    def __init__(self, seed: int, purpose: str, counter: int = 0) -> None:
        self.generator = rng(seed, purpose, counter)

    def uniform(self, low: float, high: float, *shape: int) -> np.ndarray:
        return low + (high - low) * torch.rand(shape, generator=self.generator, dtype=torch.float64).numpy()

    def number(self, low: float, high: float) -> float:
        return float(self.uniform(low, high))

    def integer(self, low: int, high: int) -> int:
        """Draw from low to high, both included."""
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def chance(self, share: float) -> bool:
        return self.number(0, 1) < share


def minimum_jerk(u: np.ndarray) -> np.ndarray:
    """Go from 0 to 1 as a reaching hand does, at rest at both ends (Flash and Hogan 1985, eq. 3)."""
    u = np.clip(u, 0.0, 1.0)
    return u**3 * (10 - 15 * u + 6 * u**2)


def noise_texture(draws: Draws) -> np.ndarray:
    """Make cloudy noise that wraps around: float32 (_TEXELS, _TEXELS) in 0 to 1."""
    waves_K = np.hypot(np.fft.fftfreq(_TEXELS)[:, None], np.fft.rfftfreq(_TEXELS)) * _TEXELS
    # An amplitude of f^-1.5 is between that of photographs (1/f) and clouds; the mean is left out.
    amplitude_K = np.maximum(waves_K, 1) ** -1.5 * (waves_K > 0)
    noise_HW = np.fft.irfft2(np.fft.rfft2(draws.uniform(-1, 1, _TEXELS, _TEXELS)) * amplitude_K)
    low, high = noise_HW.min(), noise_HW.max()
    return ((noise_HW - low) / (high - low)).astype(np.float32)


def muted_colour(draws: Draws) -> np.ndarray:
    """Draw a colour as things and clothes have them, more than half way to grey: float32 (3,), 0 to 255."""
    colour_C = draws.uniform(15, 240, 3)
    return (0.4 * colour_C + 0.6 * colour_C.mean()).astype(np.float32)


def pattern(draws: Draws) -> np.ndarray:
    """Make stripes, checks, dots or blots that wrap around: float32 (_TEXELS, _TEXELS, 3), 0 to 255."""
    y_HW, x_HW = np.mgrid[:_TEXELS, :_TEXELS].astype(np.float32) * (2 * math.pi / _TEXELS)
    a, b = draws.integer(1, 6), draws.integer(1, 6)
    kinds = (
        lambda: np.sin(a * x_HW + b * y_HW),
        lambda: np.sin(a * x_HW) * np.sin(b * y_HW),
        lambda: np.sin((a + 2) * x_HW) + np.sin((a + 2) * y_HW) - 0.8,
        lambda: 6 * noise_texture(draws) - 3,
    )
    mix_HW = 0.5 + 0.5 * np.tanh(draws.number(1, 6) * kinds[draws.integer(0, 3)]())
    mix_HW = 0.75 * mix_HW + 0.25 * noise_texture(draws)
    first_C, second_C = muted_colour(draws), muted_colour(draws)
    return (first_C + mix_HW[..., None] * (second_C - first_C)).astype(np.float32)


def light(draws: Draws, frames: int, duration_s: float, height_px: int, width_px: int, strength: float) -> np.ndarray:
    """Make smoothly changing light, a gain and a gradient that turns: float32 factor (T, H, W, 1) around 1."""
    t = np.arange(frames) / max(1, frames) * duration_s
    phase, turn = draws.uniform(0, 2 * math.pi, 2)
    hz_gain, hz_turn = draws.uniform(0.1, 0.5, 2)
    gain_T = 1 + strength * np.sin(2 * math.pi * hz_gain * t + phase)
    angle_T = turn + 2 * math.pi * hz_turn * t * 0.5
    y_H, x_W = np.linspace(-1, 1, height_px), np.linspace(-1, 1, width_px)
    slope = 1.3 * strength
    gradient_THW = np.cos(angle_T)[:, None, None] * x_W + np.sin(angle_T)[:, None, None] * y_H[:, None]
    return (gain_T[:, None, None] + slope * gradient_THW)[..., None].astype(np.float32)


def render_motion(seed: int, index: int, frames: int, size_px: int) -> np.ndarray:
    """Render textured ellipses, polygons and limbs that move, turn and grow over a moving background.

    Everything is a function of (seed, index). Returns uint8 frames_THWC, size_px square, anti-aliased.
    """
    draws = Draws(seed, "synth/motion", index)
    y_HW, x_HW = ((np.mgrid[:size_px, :size_px] + 0.5) / size_px - 0.5).astype(np.float32)
    u_THW, v_THW = _to_object(_path(draws, frames, speed=0.5), x_HW, y_HW)
    frames_THWC = _surface(pattern(draws), u_THW, v_THW)
    for _ in range(draws.integer(2, 5)):
        path = _path(draws, frames, speed=1.0)
        u_THW, v_THW = _to_object(path, x_HW, y_HW)
        distance_THW = _distance(draws, u_THW, v_THW) * path[3][:, None, None]
        alpha_THW = np.clip(0.5 - distance_THW * size_px, 0, 1)[..., None]
        scale = draws.number(1, 2.5)
        surface_THWC = _surface(pattern(draws), u_THW * scale, v_THW * scale)
        # A darker rim, so that an object stands off whatever is behind it.
        surface_THWC *= np.clip(1 - 10 * (distance_THW[..., None] + 0.03), 0.6, 1)
        frames_THWC += alpha_THW * (surface_THWC - frames_THWC)
    frames_THWC *= light(draws, frames, frames / 25, size_px, size_px, draws.number(0, 0.2))
    return np.clip(frames_THWC + 0.5, 0, 255).astype(np.uint8)


def _path(draws: Draws, frames: int, speed: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Draw x, y, angle and size over time, float32 (T,): steady motion with a swing, passing the middle in mid-clip."""
    t = (np.arange(frames) - (frames - 1) / 2).astype(np.float32)
    per_frame = speed * 0.06 * draws.number(0, 1) ** 2
    heading, turn = draws.uniform(-math.pi, math.pi, 2)
    spin = speed * 0.15 * draws.number(-1, 1) ** 3
    growth = speed * 0.03 * draws.number(-1, 1)
    swing, pace, phase = draws.number(0, 0.06) * speed, draws.number(0.1, 0.5), draws.number(0, 2 * math.pi)
    x, y = draws.uniform(-0.35, 0.35, 2)
    x_T = x + per_frame * math.cos(heading) * t + swing * np.sin(pace * t + phase)
    y_T = y + per_frame * math.sin(heading) * t + swing * np.cos(pace * t + phase)
    size_T = np.exp(np.clip(growth * t, -0.7, 0.7) + swing * np.sin(pace * t))
    return tuple(part.astype(np.float32) for part in (x_T, y_T, turn + spin * t, size_T))


def _to_object(path: tuple[np.ndarray, ...], x_HW: np.ndarray, y_HW: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Turn pixel positions into an object's own coordinates: two (T, H, W)."""
    x_T, y_T, angle_T, size_T = (part[:, None, None] for part in path)
    dx_THW, dy_THW = x_HW - x_T, y_HW - y_T
    cos_T, sin_T = np.cos(angle_T) / size_T, np.sin(angle_T) / size_T
    return cos_T * dx_THW + sin_T * dy_THW, cos_T * dy_THW - sin_T * dx_THW


def _distance(draws: Draws, u_THW: np.ndarray, v_THW: np.ndarray) -> np.ndarray:
    """Draw a shape and measure how far outside it each point is (negative inside), nearly Euclidean at the edge."""
    kind, radius = draws.integer(0, 2), draws.number(0.08, 0.25)
    if kind == 0:  # ellipse
        ratio = draws.number(0.4, 1)
        return (np.sqrt(u_THW**2 + (v_THW / ratio) ** 2) - radius) * ratio
    if kind == 1:  # convex polygon
        corners = draws.integer(3, 6)
        normals = np.sort(draws.uniform(-0.3, 0.3, corners) + np.arange(corners) * 2 * math.pi / corners)
        return np.max([u_THW * math.cos(a) + v_THW * math.sin(a) - radius * 0.8 for a in normals], axis=0)
    half_length, thickness = draws.number(0.15, 0.4), draws.number(0.03, 0.09)  # limb
    return np.hypot(u_THW - np.clip(u_THW, -half_length, half_length), v_THW) - thickness


def _surface(pattern_HWC: np.ndarray, u_THW: np.ndarray, v_THW: np.ndarray) -> np.ndarray:
    """Look a texture up at object coordinates: float32 (T, H, W, 3). The nearest texel will do: they are small."""
    rows = (v_THW * _TEXELS).astype(np.int32) & (_TEXELS - 1)
    columns = (u_THW * _TEXELS).astype(np.int32) & (_TEXELS - 1)
    return pattern_HWC.reshape(-1, 3).take(rows * _TEXELS + columns, axis=0)
