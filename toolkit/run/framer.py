"""The network with everything around it: from a batch to a loss, from two stills to the frames between.

Test: pytest tests/run tests/parity. Training, validation and inference all pass through `condition` and `predict`, so the
network is fed the same way in each. Legend as in DESIGN: B clip, T frame, C channel, H W latent size, N token, D embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from toolkit.config import DiffusionConfig
from toolkit.data.loader import Batch
from toolkit.data.trajectory import draw_heatmaps, places_at
from toolkit.diffusion.conditioning import (
    build_input,
    build_time_ids,
    build_tokens,
    drop_conditioning,
    guidance_T,
    guide,
    make_unconditional,
)
from toolkit.diffusion.layout import make_layout
from toolkit.diffusion.objective import (
    compute_loss,
    expand_like,
    min_snr_weight,
    refuse_combination,
    scale_input,
    time_input,
    to_denoised,
)
from toolkit.diffusion.sampler import OnStep, Pair, bisect, sample_euler, sample_lcm
from toolkit.diffusion.schedule import (
    LCM_LEVELS,
    karras_sigmas,
    lcm_sigmas,
    lognormal_sigma,
    make_alpha_bar,
    trailing_sigmas,
    uniform_t_sigma,
)
from toolkit.errors import UserError
from toolkit.model.base import Base
from toolkit.model.controlnet import steer
from toolkit.model.encoders import decode_latents, embed_stills, encode_frames
from toolkit.rng import normal_like, rng
from toolkit.run.beside import Beside
from toolkit.run.scores import Scores

FOUND_SCALE = 0.5  # of the ControlNet's residuals where trajectories were found, not drawn: Framer's autopilot


@dataclass(frozen=True)
class Condition:
    """What is known of a clip: latents of the two stills, tokens, time ids, and where points shall go, if that is given."""

    ends_B2CHW: Tensor
    tokens_BND: Tensor
    ids_B3: Tensor
    heatmaps_BTCHW: Tensor | None = None  # in pixels; see data/trajectory.py
    control_scale: float = 1.0


@dataclass(frozen=True)
class Task:
    """What the network is asked in a training step: clean and noised latents, and what is known beside them."""

    z_BTCHW: Tensor  # scaled
    noise_BTCHW: Tensor
    sigma_B: Tensor
    x_BTCHW: Tensor  # z + sigma noise, over sqrt(1 + sigma^2)
    condition: Condition


@dataclass(frozen=True)
class Sampling:
    """How frames are drawn from a condition."""

    steps: int = 25
    sampler: Literal["euler", "lcm"] = "euler"
    min_guidance: float = 1.0  # classifier-free guidance rises over the window from this ...
    max_guidance: float = 1.0  # ... to this; 1 and 1 is none, at half the cost
    chunk_frames: int | None = None  # decoded at once, see decode_latents

    def __post_init__(self) -> None:
        most = LCM_LEVELS if self.sampler == "lcm" else 1000
        if not 1 <= self.steps <= most:
            raise UserError(f"{self.steps} sampler steps: sampler {self.sampler} takes 1 to {most}")

    @property
    def guided(self) -> bool:
        """Whether each prediction is made without the stills too."""
        return max(self.min_guidance, self.max_guidance) > 1


class NotFinite(UserError):
    """What a network makes of its input holds a number that is not finite."""


class Framer:
    """A base (with or without adapter) under a recipe's diffusion settings.

    window      frames of a window, first and last still included
    seed        of every draw that is keyed by positions
    controlnet  frozen; it steers wherever a condition holds heatmaps
    device      where the network computes; default where the UNet's weights are
    before      what a network that was made ready (prepare.py) asks for, with the tokens, before it predicts from other
                tokens or weights; None: a network as it was loaded, perhaps of mixed types
    raises      UserError for settings that the base cannot follow
    """

    def __init__(
        self,
        base: Base,
        settings: DiffusionConfig,
        window: int,
        seed: int = 0,
        controlnet: Any = None,
        device: torch.device | None = None,
        before: Callable[[Tensor], None] | None = None,
    ) -> None:
        self.base = base
        self.before = before
        self.settings = settings
        self.seed = seed
        self.controlnet = controlnet
        self.layout = make_layout(settings.layout, window)
        self.parameterization = check_objective(settings, base.parameterization)
        self.scaling = base.scaling
        self.alpha_bar = make_alpha_bar(
            base.scheduler["beta_start"], base.scheduler["beta_end"], base.scheduler["num_train_timesteps"]
        )
        self.device = base.unet.device if device is None else device
        self.alpha_bar_there = self.alpha_bar.to(self.device)  # else the host would wait for a copy at each prediction
        self.beside = Beside(self.device)

    def compute_loss(
        self,
        batch: Batch,
        timing: Callable[[str], AbstractContextManager[Any]] = nullcontext,
        sigma_B: Tensor | None = None,
    ) -> Scores:
        """Noise a batch and score the network's answer, fp32.

        timing   is entered around each phase, "encode" and "forward"
        sigma_B  noise levels, on the host; default drawn by position
        """
        with timing("encode"):
            task = self.beside(lambda: self.prepare(batch, sigma_B))
        with timing("forward"):
            self.begin(task.condition)
            raw_BTCHW = self.predict(task.x_BTCHW, task.sigma_B, task.condition)
            scored_T, space = self.layout.scored_T, self.settings.loss_space
            loss_B, zero_B = compute_loss(
                raw_BTCHW, task.z_BTCHW, task.noise_BTCHW, task.sigma_B, scored_T, space, self.parameterization
            )
        return Scores(loss_B, zero_B, task.sigma_B)

    def weigh(self, scores: Scores) -> Tensor:
        """What training lowers, a number: the mean loss, weighted by min-SNR where the recipe has it; scores are without."""
        if (gamma := self.settings.min_snr_gamma) is None:
            return scores.loss_B.mean()
        return (scores.loss_B * min_snr_weight(scores.sigma_B, self.settings.loss_space, gamma)).mean()

    def prepare(self, batch: Batch, sigma_B: Tensor | None = None) -> Task:
        """Turn a batch of frames, or of their cached latents, into what the network is asked, all draws by position."""
        positions = batch.positions
        mean_BTCHW, std_BTCHW, means_B2CHW = self._encode_window(batch)
        z_BTCHW = mean_BTCHW + std_BTCHW * normal_like(mean_BTCHW, self.seed, "posterior", positions)
        z_BTCHW = z_BTCHW * self.scaling
        if batch.encoded is not None:
            embeds_B2D = batch.encoded.embeds_B2D.to(self.device)
        else:
            assert batch.frames_BTHWC is not None
            stills_B2CHW = to_signed(batch.frames_BTHWC[:, [0, -1]].to(self.device))
            if self.settings.noise_augmentation:
                means_B2CHW = self._encode_stills(
                    stills_B2CHW, self._draw_augmentation(stills_B2CHW, positions, self.seed)
                )
            embeds_B2D = embed_stills(self.base.image_encoder, stills_B2CHW)
        condition = self._join_condition(means_B2CHW, embeds_B2D, batch.fps_B, batch.motion_B)
        condition = self._drop(condition, positions)
        if self.settings.control:
            condition = replace(
                condition, heatmaps_BTCHW=self._draw_heatmaps(batch, z_BTCHW), control_scale=FOUND_SCALE
            )
        # moved here: in this stream, which does not wait for what the main one has still to write
        sigma_B = self._draw_sigma(positions) if sigma_B is None else sigma_B.to(self.device)
        noise_BTCHW = normal_like(z_BTCHW, self.seed, "noise", positions)
        x_BTCHW = scale_input(z_BTCHW + expand_like(sigma_B, z_BTCHW) * noise_BTCHW, sigma_B)
        return Task(z_BTCHW, noise_BTCHW, sigma_B, x_BTCHW, condition)

    def condition(
        self, stills_B2CHW: Tensor, fps_B: Tensor, motion_B: Tensor, augmentation_B2CHW: Tensor | None = None
    ) -> Condition:
        """Encode what is known of each clip.

        stills_B2CHW        first and last frame, fp32 in [-1, 1], pixels
        fps_B               rate at which the window's frames are spaced
        augmentation_B2CHW  N(0, 1) for the pixel noise, where settings.noise_augmentation asks for some
        """
        means_B2CHW = self._encode_stills(stills_B2CHW, augmentation_B2CHW)
        embeds_B2D = embed_stills(self.base.image_encoder, stills_B2CHW)
        return self._join_condition(means_B2CHW, embeds_B2D, fps_B, motion_B)

    def steer(self, condition: Condition, steering: Sequence[Steering], size_px: Sequence[int]) -> Condition:
        """Draw where points shall go in each clip of a condition, at one scale; size_px (height, width) of its stills."""
        assert self.controlnet is not None, "points need a ControlNet that follows them"
        (scale,) = {own.scale for own in steering}
        heatmaps = [own.draw(self.layout.in_window, self.layout.window, size_px) for own in steering]
        return replace(condition, heatmaps_BTCHW=torch.stack(heatmaps).to(self.device), control_scale=scale)

    def begin(self, condition: Condition) -> None:
        """Make ready for predictions from a condition; again after each change of the weights."""
        if self.before is not None:
            self.before(condition.tokens_BND.to(self.base.dtype))

    def predict(self, x_BTCHW: Tensor, sigma_B: Tensor, condition: Condition) -> Tensor:
        """Run the UNet on scaled noisy latents, after begin; returns its raw output, (B, T, 4, H, W)."""
        unet, dtype = self.base.unet, self.base.dtype
        tokens_BND = condition.tokens_BND.to(dtype)
        input_BTCHW = self.join_channels(x_BTCHW, condition).to(dtype)
        time_B = time_input(sigma_B, self.parameterization, self.alpha_bar_there)
        # a loaded adapter's matrices are fp32 beside a bf16 base; networks made ready are of one type
        mixed = dtype != torch.float32 and self.before is None
        with torch.autocast(self.device.type, dtype, enabled=mixed):
            steering: Any = nullcontext()
            if condition.heatmaps_BTCHW is not None:
                residuals = self.controlnet(
                    input_BTCHW, time_B, tokens_BND, condition.ids_B3, condition.heatmaps_BTCHW, condition.control_scale
                )
                steering = steer(unet, residuals)
            with steering:
                return unet(
                    input_BTCHW,
                    time_B,
                    encoder_hidden_states=tokens_BND,
                    added_time_ids=condition.ids_B3,
                    return_dict=False,
                )[0]

    def join_channels(self, x_BTCHW: Tensor, condition: Condition) -> Tensor:
        """The nine channels as the UNet reads them, (B, T, 9, H, W), before they are rounded to its type."""
        return build_input(x_BTCHW, condition.ends_B2CHW, self.base.unet.mask_token, self.layout)

    @torch.no_grad()
    def sample(
        self,
        condition: Condition,
        sampling: Sampling,
        noise_BTCHW: Tensor,
        renoise: Callable[[int], Tensor] | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Walk from noise to the scaled latents of the layout's frames.

        noise_BTCHW  N(0, 1), of the condition's latent size
        renoise      N(0, 1) for step i, which the lcm sampler draws anew
        on_step      called after each step; returns the latents to go on with
        """
        # moved once: at each step the host would wait for the copy
        scale_T = guidance_T(sampling.min_guidance, sampling.max_guidance, self.layout).to(self.device)
        sigmas = self.make_sigmas(sampling).to(self.device)
        if sampling.guided:
            condition = join_unconditional(condition)
        self.begin(condition)

        def denoise(noisy_BTCHW: Tensor, sigma_B: Tensor) -> Tensor:
            x_BTCHW = scale_input(noisy_BTCHW, sigma_B)
            if not sampling.guided:
                raw_BTCHW = self.predict(x_BTCHW, sigma_B, condition).float()
            else:
                both = self.predict(torch.cat([x_BTCHW, x_BTCHW]), torch.cat([sigma_B, sigma_B]), condition)
                known_BTCHW, free_BTCHW = both.float().chunk(2)
                raw_BTCHW = guide(known_BTCHW, free_BTCHW, scale_T)
            return to_denoised(raw_BTCHW, x_BTCHW, sigma_B, self.parameterization)

        if sampling.sampler == "lcm":
            assert renoise is not None
            latents_BTCHW = sample_lcm(denoise, noise_BTCHW, sigmas, renoise, on_step)
        else:
            latents_BTCHW = sample_euler(denoise, noise_BTCHW, sigmas, on_step)
        if not latents_BTCHW.isfinite().all():
            raise NotFinite("the network's answer is not a finite number; lower lora_scale, guidance, fps or motion")
        return latents_BTCHW

    def make_sigmas(self, sampling: Sampling) -> Tensor:
        """Noise levels of a sampling, (steps + 1,) falling to 0: of SVD's own range, or of the table of an epsilon base."""
        if self.parameterization == "epsilon":
            if sampling.steps > len(self.alpha_bar):
                raise UserError(f"{sampling.steps} sampler steps: this base knows {len(self.alpha_bar)} timesteps")
            return trailing_sigmas(sampling.steps, self.alpha_bar)
        make = lcm_sigmas if sampling.sampler == "lcm" else karras_sigmas
        return make(sampling.steps, self.base.scheduler["sigma_min"], self.base.scheduler["sigma_max"])

    def decode(self, latents_BTCHW: Tensor, chunk_frames: int | None = None) -> Tensor:
        """Scaled latents to pixels; returns frames_BTCHW fp32 in [-1, 1]."""
        return decode_latents(self.base.vae, latents_BTCHW / self.scaling, chunk_frames)

    def generate(
        self,
        stills_B2CHW: Tensor,
        fps_B: Tensor,
        motion_B: Tensor,
        sampling: Sampling,
        positions: Sequence[int],
        steering: Sequence[Steering] | None = None,
        on_step: OnStep | None = None,
        seeds: Sequence[int] | None = None,
    ) -> Tensor:
        """Generate the window's frames between stills, with draws keyed by positions.

        steering  points of each clip; None: the network is free
        seeds     of each clip; default the framer's own
        returns   frames_BTCHW fp32 in [-1, 1]: the frames that the layout generates or repeats
        """
        stills_B2CHW = stills_B2CHW.to(self.device)
        seed = self.seed if seeds is None else seeds
        augmentation = self._draw_augmentation(stills_B2CHW, positions, seed)
        condition = self.condition(stills_B2CHW, fps_B, motion_B, augmentation)
        if steering is not None:
            condition = self.steer(condition, steering, stills_B2CHW.shape[-2:])
        size = condition.ends_B2CHW.shape[-2:]
        blank_BTCHW = torch.zeros(len(positions), self.layout.frames, 4, *size, device=self.device)
        noise_BTCHW = normal_like(blank_BTCHW, seed, "sample", positions)

        def renoise(step: int) -> Tensor:
            return normal_like(blank_BTCHW, seed, f"renoise{step}", positions)

        latents_BTCHW = self.sample(condition, sampling, noise_BTCHW, renoise, on_step)
        return self.decode(latents_BTCHW, sampling.chunk_frames)

    def interpolate(
        self,
        stills_NCHW: Tensor,
        frames: int,
        fps: float,
        motion: float,
        sampling: Sampling,
        seeds: Sequence[int] | None = None,
        steering: Sequence[Steering | None] | None = None,
        batch: int = 1,
        on_step: OnStep | None = None,
        first_gap: int = 0,
    ) -> Tensor:
        """Fill the gaps between neighbouring stills of a video.

        frames    of a gap, its two stills included: the window's own number for a clip layout, else 2^n + 1 by halving
        fps       of the result
        seeds     of each gap; default the framer's own
        steering  of each gap; default none
        batch     pairs of stills that the network is asked about at once: more take more memory, and round otherwise
        first_gap  number of the first gap, of a video that is filled part by part
        returns   frames_TCHW fp32 in [-1, 1], T = gaps * (frames - 1) + 1; the stills are untouched. A frame made by halving
                  at place k of the video draws the noise of position k, a window filled at once that of its first still's
        raises    ValueError for another number of frames
        """
        reach = frames - 1
        start = first_gap * reach
        gaps = len(stills_NCHW) - 1
        seeds = seeds or [self.seed] * gaps
        steering = steering or [None] * gaps

        def fill(
            pairs: Sequence[Pair], positions: Sequence[int], parts: Sequence[Steering | None], fps: float
        ) -> Tensor:
            """The windows between pairs of stills; a batch of them is steered, or all of it is free."""
            made: dict[int, Tensor] = {}
            free, steered = (
                [i for i, part in enumerate(parts) if (part is not None) == kind] for kind in (False, True)
            )
            for own in [group[i : i + batch] for group in (free, steered) for i in range(0, len(group), batch)]:
                stills_B2CHW = torch.stack([torch.stack(pairs[i]) for i in own])
                fps_B, motion_B = (torch.full((len(own),), float(value)) for value in (fps, motion))
                places, points = [positions[i] for i in own], [part for i in own if (part := parts[i]) is not None]
                own_seeds = [seeds[place // reach - first_gap] for place in places]
                made |= zip(own, self.generate(
                    stills_B2CHW, fps_B, motion_B, sampling, places, points or None, on_step, own_seeds
                ).cpu(), strict=True)  # fmt: skip
            return torch.stack([made[i] for i in range(len(pairs))])

        stills = list(stills_NCHW)
        if self.fills_at_once(frames):
            windows = fill(list(pairwise(stills)), range(start, start + gaps * reach, reach), steering, fps)
            parts = [torch.cat([still[None], window[1:-1]]) for still, window in zip(stills, windows, strict=False)]
            return torch.cat([*parts, stills_NCHW[-1:]])
        if self.layout.window % 2 == 0:
            raise ValueError(f"{frames} frames: windows of {self.layout.window} have no middle to halve a gap at")

        def midpoints(pairs: list[Pair], places: Sequence[int], halvings: int) -> tuple[Tensor, ...]:
            half = 2**halvings
            parts = []
            for place in places:
                whole, inside = steering[place // reach], place % reach
                parts.append(whole and whole.cut((inside - half) / reach, (inside + half) / reach))
            # the network sees a whole window between the two: its frames are spaced by gap / (window - 1)
            windows = fill(
                pairs, [start + place for place in places], parts, fps * (self.layout.window - 1) / (2 * half)
            )
            return windows[:, self.layout.frames // 2].unbind(0)

        return torch.stack(bisect(frames, midpoints, stills))

    def fills_at_once(self, frames: int) -> bool:
        """Whether so many frames are one window of a clip layout; other numbers are reached by halving."""
        return self.layout.frames > 1 and frames == self.layout.window

    def count_samplings(self, frames: int) -> int:
        """How many times the sampler runs to fill a gap."""
        return 1 if self.fills_at_once(frames) else frames - 2

    def _encode_window(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Posterior of the layout's frames, mean and std (B, T, 4, H, W), and means_B2CHW of the two ends."""
        if batch.encoded is not None:
            in_window = list(self.layout.in_window)
            mean, std = (part.to(self.device).float() for part in (batch.encoded.mean_BTCHW, batch.encoded.std_BTCHW))
            return mean[:, in_window], std[:, in_window], mean[:, [0, -1]]
        assert batch.frames_BTHWC is not None
        needed = sorted({0, *self.layout.in_window, self.layout.window - 1})  # each frame once, and no other
        mean, std = encode_frames(self.base.vae, to_signed(batch.frames_BTHWC[:, needed].to(self.device)))
        kept = [needed.index(i) for i in self.layout.in_window]
        return mean[:, kept], std[:, kept], mean[:, [0, -1]]

    def _encode_stills(self, stills_B2CHW: Tensor, augmentation_B2CHW: Tensor | None) -> Tensor:
        """The VAE's mode of the two stills, unscaled, with the pixel noise that the settings ask for."""
        if self.settings.noise_augmentation:
            assert augmentation_B2CHW is not None
            stills_B2CHW = stills_B2CHW + self.settings.noise_augmentation * augmentation_B2CHW
        return encode_frames(self.base.vae, stills_B2CHW)[0]

    def _draw_augmentation(
        self, stills_B2CHW: Tensor, positions: Sequence[int], seed: int | Sequence[int]
    ) -> Tensor | None:
        if not self.settings.noise_augmentation:
            return None
        return normal_like(stills_B2CHW, seed, "noise_augmentation", positions)

    def _join_condition(self, means_B2CHW: Tensor, embeds_B2D: Tensor, fps_B: Tensor, motion_B: Tensor) -> Condition:
        # unscaled unless the recipe says otherwise, as SVD and Framer were trained
        ends_B2CHW = means_B2CHW * self.scaling if self.settings.scale_conditioning else means_B2CHW
        tokens_BND = build_tokens(embeds_B2D, self.settings.clip_tokens)
        ids_B3 = build_time_ids(fps_B, motion_B, self.settings.noise_augmentation).to(self.device)
        return Condition(ends_B2CHW, tokens_BND, ids_B3)

    def _draw_sigma(self, positions: Sequence[int]) -> Tensor:
        generators = [rng(self.seed, "sigma", k) for k in positions]
        if self.settings.noise_sampler == "uniform_t":
            sigma_B = uniform_t_sigma(torch.cat([torch.rand(1, generator=g) for g in generators]), self.alpha_bar)
        else:
            normal_B = torch.cat([torch.randn(1, generator=g) for g in generators])
            sigma_B = lognormal_sigma(normal_B, self.settings.lognormal_mean, self.settings.lognormal_std)
        return sigma_B.to(self.device)

    def sigma_quantiles(self, shares_N: Tensor) -> Tensor:
        """The noise levels below which such shares of training's draws are, (N,); shares inside (0, 1)."""
        if self.settings.noise_sampler == "uniform_t":
            return uniform_t_sigma(shares_N, self.alpha_bar)
        return lognormal_sigma(torch.special.ndtri(shares_N), self.settings.lognormal_mean, self.settings.lognormal_std)

    def _drop(self, condition: Condition, positions: Sequence[int]) -> Condition:
        """Hide the stills in some of the clips, so that guidance has an unconditional branch to lean on."""
        rate = self.settings.conditioning_dropout
        if not rate:
            return condition
        draws = [torch.rand(1, generator=rng(self.seed, "conditioning_dropout", k)) for k in positions]
        uniform_B = torch.cat(draws).to(self.device)
        ends_B2CHW, tokens_BND = drop_conditioning(condition.ends_B2CHW, condition.tokens_BND, uniform_B, rate)
        return replace(condition, ends_B2CHW=ends_B2CHW, tokens_BND=tokens_BND)

    def _draw_heatmaps(self, batch: Batch, z_BTCHW: Tensor) -> Tensor:
        assert batch.points is not None  # check_cache refuses cached clips here
        window, size_px = self.layout.window, [side * self.base.latent_px for side in z_BTCHW.shape[-2:]]
        found = [Steering(points_PK2, FOUND_SCALE) for points_PK2 in batch.points]
        return torch.stack([s.draw(self.layout.in_window, window, size_px) for s in found]).to(self.device)


@dataclass(frozen=True)
class Steering:
    """Where points go between two stills.

    points_PK2  (x, y) in pixels of each point at K times, evenly spaced from the first still to the last
    scale       of the ControlNet's residuals
    begin, end  the part of the gap that a window covers
    """

    points_PK2: np.ndarray
    scale: float = 1.0
    begin: float = 0.0
    end: float = 1.0

    def cut(self, begin: float, end: float) -> Steering:
        """The same points over a part of this part of the gap."""
        length = self.end - self.begin
        return replace(self, begin=self.begin + length * begin, end=self.begin + length * end)

    def draw(self, in_window: Sequence[int], window: int, size_px: Sequence[int]) -> Tensor:
        """Heatmaps of the frames of a window that enter the UNet, (T, 3, H_px, W_px) in 0..255."""
        times_T = self.begin + (self.end - self.begin) * np.asarray(in_window) / (window - 1)
        return torch.from_numpy(draw_heatmaps(places_at(self.points_PK2, times_T), *size_px))


def check_objective(settings: DiffusionConfig, parameterization: str) -> str:
    """Refuse an objective that is wrong for a base; returns what its raw output means, "v" or "epsilon"."""
    if settings.parameterization not in ("auto", parameterization):
        raise UserError(
            f"diffusion.parameterization is {settings.parameterization}, but the base's scheduler says {parameterization}: "
            "scored as what it is not, a perfect network would be trained away; take auto (any loss_space is exact on it)"
        )
    try:
        refuse_combination(parameterization, settings.noise_sampler, settings.loss_space)
    except ValueError as error:
        raise UserError(f"diffusion: {error}") from None
    return parameterization


def join_unconditional(condition: Condition) -> Condition:
    """Double the batch: the condition, then the same clips with nothing known of their stills."""
    ends_B2CHW, tokens_BND = make_unconditional(condition.ends_B2CHW, condition.tokens_BND)
    heatmaps = condition.heatmaps_BTCHW
    return Condition(
        torch.cat([condition.ends_B2CHW, ends_B2CHW]),
        torch.cat([condition.tokens_BND, tokens_BND]),
        torch.cat([condition.ids_B3, condition.ids_B3]),
        None if heatmaps is None else torch.cat([heatmaps, heatmaps]),
        condition.control_scale,
    )


def to_signed(frames_BTHWC: Tensor) -> Tensor:
    """uint8 [0, 255], channels last => fp32 [-1, 1], channels first."""
    return frames_BTHWC.movedim(-1, -3).float() / 127.5 - 1


def to_uint8(frames_TCHW: Tensor) -> Tensor:
    """fp32 [-1, 1], channels first => uint8 [0, 255], channels last."""
    return ((frames_TCHW.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).movedim(-3, -1).cpu()
