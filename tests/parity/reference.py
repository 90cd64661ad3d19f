"""Framer's inference, written anew from what is known of it, out of stock diffusers parts alone. No tests in here.

Nothing of toolkit/ is imported: what training and our samplers feed the network is held against this. Facts: aim-uofa/Framer
pipelines/pipeline_stable_video_diffusion_interp_control.py, in the paper's setting without trajectories.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import EulerDiscreteScheduler, StableVideoDiffusionPipeline
from PIL import Image
from torch import Tensor, nn


class Recorded(Exception):
    """Raised in place of a network's answer, once its inputs are known: the network itself may be without weights."""


class Spy:
    """Keeps what a UNet is given; with `stop`, the first call ends there."""

    def __init__(self, unet: nn.Module, stop: bool = False) -> None:
        self.calls: list[dict[str, Tensor]] = []
        self.stop = stop
        self.hook = unet.register_forward_pre_hook(self._record, with_kwargs=True)

    def _record(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = (
            dict(zip(("sample", "timestep", "encoder_hidden_states", "added_time_ids"), args, strict=False)) | kwargs
        )
        self.calls.append({name: value.detach().clone() for name, value in given.items() if isinstance(value, Tensor)})
        if self.stop:
            raise Recorded

    def __enter__(self) -> Spy:
        return self

    def __exit__(self, kind: Any, *_: Any) -> bool:
        self.hook.remove()
        return kind is Recorded


@dataclass(frozen=True)
class Ask:
    """What a user asks of an interpolation."""

    first: Image.Image
    last: Image.Image
    frames: int
    fps: float
    motion: float
    augmentation: float  # strength of the pixel noise
    noises: tuple[Tensor, Tensor]  # its two draws, (1, 3, H_px, W_px)


def encode_still(
    svd: StableVideoDiffusionPipeline, still: Image.Image, ask: Ask, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """One still's CLIP embedding (1, 1, D) and its latents (1, 4, H, W), by the stock pipeline's own methods."""
    embedding = svd._encode_image(still, "cpu", 1, False)
    pixels = svd.video_processor.preprocess(still, height=still.height, width=still.width)
    return embedding, svd._encode_vae_image(pixels + ask.augmentation * noise, "cpu", 1, False)


def framer_inputs(
    svd: StableVideoDiffusionPipeline,
    mask_token: Tensor,
    ask: Ask,
    noisy_BTCHW: Tensor,
    sigma: float,
    known: bool = True,
) -> dict[str, Tensor]:
    """What Framer's pipeline gives the UNet at one noise level, for one clip.

    mask_token   (1, 1, 4, 1, 1)
    noisy_BTCHW  (1, T, 4, H, W), z + sigma noise
    known        False: the branch without conditioning, of classifier-free guidance
    """
    (embed_first, latent_first), (embed_last, latent_last) = (
        encode_still(svd, still, ask, noise) for still, noise in zip((ask.first, ask.last), ask.noises, strict=True)
    )
    per_frame = []
    for t in range(ask.frames):
        if t == 0:
            conditioning, mask = latent_first * known, 0.0
        elif t == ask.frames - 1:
            conditioning, mask = latent_last * known, 0.0
        else:
            conditioning, mask = mask_token[0].expand_as(latent_first), 1.0
        noisy = noisy_BTCHW[:, t] / (sigma**2 + 1) ** 0.5
        per_frame.append(torch.cat([noisy, conditioning, torch.full_like(noisy[:, :1], mask)], dim=1))
    return {
        "sample": torch.stack(per_frame, dim=1),
        "timestep": 0.25 * torch.tensor([sigma]).log(),
        "encoder_hidden_states": torch.cat([embed_first, embed_last], dim=1) * known,
        "added_time_ids": torch.tensor([[ask.fps - 1, ask.motion, ask.augmentation]]),
    }


def framer_sample(
    svd: StableVideoDiffusionPipeline, unet: nn.Module, mask_token: Tensor, ask: Ask, noise_BTCHW: Tensor, steps: int,
    guidance: tuple[float, float],
) -> Tensor:  # fmt: skip
    """Framer's sampling loop with the stock scheduler; returns the decoded frames (1, T, 3, H_px, W_px) in [-1, 1]."""
    scheduler = EulerDiscreteScheduler.from_config(svd.scheduler.config)
    scheduler.set_timesteps(steps)
    latents = noise_BTCHW * scheduler.init_noise_sigma
    scale = torch.linspace(*guidance, ask.frames).view(1, -1, 1, 1, 1)
    for i, t in enumerate(scheduler.timesteps):
        sigma = scheduler.sigmas[i].item()
        given, free = (framer_inputs(svd, mask_token, ask, latents, sigma, known) for known in (True, False))
        assert torch.allclose(given["sample"][:, :, :4], scheduler.scale_model_input(latents, t), atol=1e-5)
        with_stills, without = (unet(**inputs, return_dict=False)[0] for inputs in (given, free))
        latents = scheduler.step(without + scale * (with_stills - without), t, latents).prev_sample
    return svd.decode_latents(latents, ask.frames, ask.frames).movedim(1, 2).clamp(-1, 1)
