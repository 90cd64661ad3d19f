"""What the raw output means, and how far it is from the truth: v-prediction, with the loss in epsilon or v space.

Test: pytest tests/diffusion. Legend: z clean scaled latents, noise ~ N(0, 1), x the network's input, raw its output F;
all (B, T, C, H, W). SVD's UNet is an EDM v-model: it reads c_noise = ln(sigma) / 4 and predicts
v = (noise - sigma z) / sqrt(1 + sigma^2). Because x is also the DDPM sample at alpha_bar = 1 / (1 + sigma^2), the spec's
epsilon loss is computed exactly on such weights by conversion, not by retraining them to another meaning.
"""

import torch
from torch import Tensor


def expand_like(value_B: Tensor, sample: Tensor) -> Tensor:
    """Append axes of length 1, so that one value per clip meets the clip's tensor."""
    return value_B.view(-1, *[1] * (sample.ndim - 1))


def scale_input(noisy_BTCHW: Tensor, sigma_B: Tensor) -> Tensor:
    """Scale z + sigma noise to unit variance: x = noisy / sqrt(1 + sigma^2) (EDM c_in)."""
    return noisy_BTCHW / expand_like((1 + sigma_B**2).sqrt(), noisy_BTCHW)


def time_input(sigma_B: Tensor) -> Tensor:
    """The UNet's time for a noise level: c_noise = ln(sigma) / 4.

    source  Stability-AI/generative-models, sgm/modules/diffusionmodules/denoiser_scaling.py, VScalingWithEDMcNoise
    """
    return sigma_B.log() / 4


def make_v(z_BTCHW: Tensor, noise_BTCHW: Tensor, sigma_B: Tensor) -> Tensor:
    """The target of the raw output: v = (noise - sigma z) / sqrt(1 + sigma^2)."""
    sigma = expand_like(sigma_B, z_BTCHW)
    return (noise_BTCHW - sigma * z_BTCHW) / (1 + sigma**2).sqrt()


def denoise_from_v(raw_BTCHW: Tensor, noisy_BTCHW: Tensor, sigma_B: Tensor) -> Tensor:
    """Denoised latents D = noisy / (1 + sigma^2) - sigma / sqrt(1 + sigma^2) F (EDM c_skip, c_out)."""
    sigma = expand_like(sigma_B, raw_BTCHW)
    return noisy_BTCHW / (1 + sigma**2) - sigma / (1 + sigma**2).sqrt() * raw_BTCHW


def epsilon_from_v(raw_BTCHW: Tensor, x_BTCHW: Tensor, sigma_B: Tensor) -> Tensor:
    """Predicted noise sqrt(alpha_bar) F + sqrt(1 - alpha_bar) x, with alpha_bar = 1 / (1 + sigma^2)."""
    sigma = expand_like(sigma_B, raw_BTCHW)
    return (raw_BTCHW + sigma * x_BTCHW) / (1 + sigma**2).sqrt()


def compute_loss(
    raw_BTCHW: Tensor, z_BTCHW: Tensor, noise_BTCHW: Tensor, sigma_B: Tensor, scored_T: Tensor, space: str
) -> tuple[Tensor, Tensor]:
    """Mean squared error of each clip, and what a prediction of zero would score on the same target.

    raw_BTCHW  the network's raw output (v)
    scored_T   (T,) bool, frames that count
    space      "epsilon" (the spec's) or "v"; at equal weights epsilon loss = alpha_bar x v loss
    returns    loss_B, zero_B: (B,) fp32
    """
    raw = raw_BTCHW.float()  # the difference of two nearly equal bf16 tensors would have no digits left
    if space == "epsilon":
        x_BTCHW = scale_input(z_BTCHW + expand_like(sigma_B, z_BTCHW) * noise_BTCHW, sigma_B)
        predicted, target = epsilon_from_v(raw, x_BTCHW, sigma_B), noise_BTCHW
    elif space == "v":
        predicted, target = raw, make_v(z_BTCHW, noise_BTCHW, sigma_B)
    else:
        raise ValueError(f"loss space {space!r}: it must be epsilon or v")
    return _mean_square(predicted - target, scored_T), _mean_square(target, scored_T)


def _mean_square(error_BTCHW: Tensor, scored_T: Tensor) -> Tensor:
    return torch.mean(error_BTCHW[:, scored_T] ** 2, dim=(1, 2, 3, 4))
