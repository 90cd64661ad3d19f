"""The network with everything around it: from a batch to a loss, from two stills to the frames between.

Test: pytest tests/run. Training, validation and inference all pass through `condition` and `predict`, so the network is
fed the same way in each. Legend as in DESIGN: B clip, T frame, C channel, H W latent size, N token, D embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from toolkit.config import RunConfig
from toolkit.data.loader import Batch
from toolkit.diffusion.conditioning import build_input, build_time_ids, build_tokens
from toolkit.diffusion.layout import make_layout
from toolkit.diffusion.objective import compute_loss, denoise_from_v, expand_like, scale_input, time_input
from toolkit.diffusion.sampler import bisect, sample_euler
from toolkit.diffusion.schedule import karras_sigmas, lognormal_sigma, make_alpha_bar, uniform_t_sigma
from toolkit.model.base import Base
from toolkit.model.encoders import decode_latents, embed_stills, encode_frames
from toolkit.rng import normal_like, rng


@dataclass(frozen=True)
class Condition:
    """What is known of a clip: latents of the two stills, tokens and time ids."""

    ends_B2CHW: Tensor
    tokens_BND: Tensor
    ids_B3: Tensor


class Framer:
    """A base (with or without adapter) under a recipe's diffusion settings."""

    def __init__(self, base: Base, config: RunConfig) -> None:
        self.base = base
        self.settings = config.diffusion
        self.seed = config.seed
        self.layout = make_layout(config.diffusion.layout, config.data.frames)
        self.scaling = float(base.vae.config.scaling_factor)
        self.alpha_bar = make_alpha_bar(
            base.scheduler["beta_start"], base.scheduler["beta_end"], base.scheduler["num_train_timesteps"]
        )
        self.device = base.unet.device
        self.use_bf16 = config.engine.precision == "bf16"

    def compute_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Noise a batch and score the network's answer.

        returns  loss_B, zero_B: (B,) fp32, the loss and what a prediction of zero scores on the same noise
        """
        frames_BTCHW = to_signed(batch.frames_BTHWC.to(self.device))
        z_BTCHW, means_B2CHW = self._encode_window(frames_BTCHW, batch.positions)
        condition = self.condition(frames_BTCHW[:, [0, -1]], batch.fps_B, batch.motion_B, batch.positions, means_B2CHW)
        sigma_B = self._draw_sigma(batch.positions)
        noise_BTCHW = normal_like(z_BTCHW, self.seed, "noise", batch.positions)
        x_BTCHW = scale_input(z_BTCHW + expand_like(sigma_B, z_BTCHW) * noise_BTCHW, sigma_B)
        raw_BTCHW = self.predict(x_BTCHW, sigma_B, condition)
        return compute_loss(raw_BTCHW, z_BTCHW, noise_BTCHW, sigma_B, self.layout.scored_T, self.settings.loss_space)

    def condition(
        self,
        stills_B2CHW: Tensor,
        fps_B: Tensor,
        motion_B: Tensor,
        positions: Sequence[int],
        means_B2CHW: Tensor | None = None,
    ) -> Condition:
        """Encode what is known of each clip.

        stills_B2CHW  first and last frame, fp32 in [-1, 1], pixels
        fps_B         rate at which the window's frames are spaced
        positions     key the noise augmentation's draws
        means_B2CHW   the stills' latents, where the caller has them already
        """
        strength = self.settings.noise_augmentation
        if means_B2CHW is None or strength:
            noisy = stills_B2CHW + strength * normal_like(stills_B2CHW, self.seed, "noise_augmentation", positions)
            means_B2CHW, _ = encode_frames(self.base.vae, noisy)
        # the VAE's mode; unscaled unless the recipe says otherwise, as SVD and Framer were trained
        ends_B2CHW = means_B2CHW * self.scaling if self.settings.scale_conditioning else means_B2CHW
        tokens_BND = build_tokens(embed_stills(self.base.image_encoder, stills_B2CHW), self.settings.clip_tokens)
        ids_B3 = build_time_ids(fps_B, motion_B, strength).to(self.device)
        return Condition(ends_B2CHW, tokens_BND, ids_B3)

    def predict(self, x_BTCHW: Tensor, sigma_B: Tensor, condition: Condition) -> Tensor:
        """Run the UNet on scaled noisy latents; returns its raw output, (B, T, 4, H, W)."""
        unet = self.base.unet
        input_BTCHW = build_input(x_BTCHW, condition.ends_B2CHW, unet.mask_token, self.layout)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.use_bf16):
            return unet(
                input_BTCHW.to(unet.dtype),
                time_input(sigma_B),
                encoder_hidden_states=condition.tokens_BND.to(unet.dtype),
                added_time_ids=condition.ids_B3,
                return_dict=False,
            )[0]

    @torch.no_grad()
    def sample(self, condition: Condition, steps: int, positions: Sequence[int]) -> Tensor:
        """Generate the window's frames from noise, at the size of the condition's latents.

        returns  frames_BTCHW fp32 in [-1, 1]: the frames that the layout generates or repeats
        """
        scheduler = self.base.scheduler
        sigmas = karras_sigmas(steps, scheduler["sigma_min"], scheduler["sigma_max"])
        blank = torch.zeros(len(positions), self.layout.frames, 4, *condition.ends_B2CHW.shape[-2:], device=self.device)
        noise_BTCHW = normal_like(blank, self.seed, "sample", positions)

        def denoise(noisy_BTCHW: Tensor, sigma_B: Tensor) -> Tensor:
            raw_BTCHW = self.predict(scale_input(noisy_BTCHW, sigma_B), sigma_B, condition)
            return denoise_from_v(raw_BTCHW.float(), noisy_BTCHW, sigma_B)

        return decode_latents(self.base.vae, sample_euler(denoise, noise_BTCHW, sigmas) / self.scaling)

    def generate_middle(
        self, stills_B2CHW: Tensor, fps_B: Tensor, motion_B: Tensor, steps: int, positions: Sequence[int]
    ) -> Tensor:
        """Generate the middle frame of a window between two stills, (B, 3, H, W) in pixels."""
        stills_B2CHW = stills_B2CHW.to(self.device)
        condition = self.condition(stills_B2CHW, fps_B, motion_B, positions)
        return self.sample(condition, steps, positions)[:, self.layout.frames // 2]

    def interpolate(
        self, first_CHW: Tensor, last_CHW: Tensor, frames: int, fps: float, motion: float, steps: int
    ) -> Tensor:
        """Fill the gap between two stills.

        frames   first and last included: the window's own number for a clip layout, else 2^n + 1 by halving
        fps      of the result
        returns  frames_TCHW fp32 in [-1, 1]; the ends are the stills, untouched
        raises   ValueError for another number of frames
        """
        motion_B = torch.tensor([motion])
        if self.layout.frames > 1 and frames == self.layout.window:
            stills_B2CHW = torch.stack([first_CHW, last_CHW])[None].to(self.device)
            condition = self.condition(stills_B2CHW, torch.tensor([fps]), motion_B, [0])
            middle = self.sample(condition, steps, [0])[0, 1:-1].cpu()
            return torch.cat([first_CHW[None], middle, last_CHW[None]])

        def midpoint(left_CHW: Tensor, right_CHW: Tensor, halvings: int) -> Tensor:
            # the network sees a whole window between the two: its frames are spaced by gap / (window - 1)
            fps_B = torch.tensor([fps * (self.layout.window - 1) / 2 ** (halvings + 1)])
            return self.generate_middle(torch.stack([left_CHW, right_CHW])[None], fps_B, motion_B, steps, [0])[0].cpu()

        return torch.stack(bisect(frames, midpoint, first_CHW, last_CHW))

    def _encode_window(self, frames_BTCHW: Tensor, positions: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Encode each needed frame once: z_BTCHW scaled samples of the layout's frames, means_B2CHW of the ends."""
        last = self.layout.window - 1
        needed = sorted({0, *self.layout.in_window, last})
        mean, std = encode_frames(self.base.vae, frames_BTCHW[:, needed])
        kept = [needed.index(i) for i in self.layout.in_window]
        mean_BTCHW, std_BTCHW = mean[:, kept], std[:, kept]
        z_BTCHW = mean_BTCHW + std_BTCHW * normal_like(mean_BTCHW, self.seed, "posterior", positions)
        return z_BTCHW * self.scaling, mean[:, [0, -1]]

    def _draw_sigma(self, positions: Sequence[int]) -> Tensor:
        generators = [rng(self.seed, "sigma", k) for k in positions]
        if self.settings.noise_sampler == "uniform_t":
            sigma_B = uniform_t_sigma(torch.cat([torch.rand(1, generator=g) for g in generators]), self.alpha_bar)
        else:
            normal_B = torch.cat([torch.randn(1, generator=g) for g in generators])
            sigma_B = lognormal_sigma(normal_B, self.settings.lognormal_mean, self.settings.lognormal_std)
        return sigma_B.to(self.device)


def to_signed(frames_BTHWC: Tensor) -> Tensor:
    """uint8 [0, 255], channels last => fp32 [-1, 1], channels first."""
    return frames_BTHWC.movedim(-1, -3).float() / 127.5 - 1


def to_uint8(frames_TCHW: Tensor) -> Tensor:
    """fp32 [-1, 1], channels first => uint8 [0, 255], channels last."""
    return ((frames_TCHW.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).movedim(-3, -1).cpu()
