"""What the raw output means, and how far it is from the truth: v- or epsilon-prediction, scored in any of three spaces.

Test: pytest tests/diffusion. Legend: z clean scaled latents, noise ~ N(0, 1), x = (z + sigma noise) / sqrt(1 + sigma^2) the
network's input, raw its output F; all (B, T, C, H, W). x is also the DDPM sample at alpha_bar = 1 / (1 + sigma^2), so a
network's answer can be read in every space exactly, whatever it was trained to predict:

    "v"        F = v = (noise - sigma z) / sqrt(1 + sigma^2), time ln(sigma) / 4: SVD and Framer
    "epsilon"  F = noise, time an integer t of the DDPM table

The conversions compute in the dtype they are given.
"""

import torch
from torch import Tensor

from toolkit.diffusion.schedule import sigma_from_alpha_bar


def expand_like(value_B: Tensor, sample: Tensor) -> Tensor:
    """Append axes of length 1, so that one value per clip meets the clip's tensor."""
    return value_B.view(-1, *[1] * (sample.ndim - 1))


def scale_input(noisy_BTCHW: Tensor, sigma_B: Tensor) -> Tensor:
    """Scale z + sigma noise to unit variance: x = noisy / sqrt(1 + sigma^2) (EDM c_in)."""
    return noisy_BTCHW / expand_like((1 + sigma_B**2).sqrt(), noisy_BTCHW)


def time_input(sigma_B: Tensor, parameterization: str, alpha_bar: Tensor) -> Tensor:
    """The UNet's time for a noise level: ln(sigma) / 4 for v, the t whose sigma is nearest in logarithm for epsilon.

    alpha_bar  (N,) the DDPM table, which epsilon alone reads
    returns    time_B; for epsilon fp32 whole numbers in 0..N - 1
    source     Stability-AI/generative-models, sgm/modules/diffusionmodules/denoiser_scaling.py, VScalingWithEDMcNoise;
               denoiser.py, DiscreteDenoiser
    """
    if not _predicts_epsilon(parameterization):
        return sigma_B.log() / 4
    table_N = sigma_from_alpha_bar(alpha_bar).log().to(sigma_B.device)
    return (sigma_B.log()[:, None] - table_N).abs().argmin(1).float()


def make_v(z_BTCHW: Tensor, noise_BTCHW: Tensor, sigma_B: Tensor) -> Tensor:
    """The truth in v space: v = (noise - sigma z) / sqrt(1 + sigma^2)."""
    sigma = expand_like(sigma_B, z_BTCHW)
    return (noise_BTCHW - sigma * z_BTCHW) / (1 + sigma**2).sqrt()


def to_epsilon(raw_BTCHW: Tensor, x_BTCHW: Tensor, sigma_B: Tensor, parameterization: str) -> Tensor:
    """Predicted noise; of v it is (F + sigma x) / sqrt(1 + sigma^2)."""
    if _predicts_epsilon(parameterization):
        return raw_BTCHW
    sigma = expand_like(sigma_B, raw_BTCHW)
    return (raw_BTCHW + sigma * x_BTCHW) / (1 + sigma**2).sqrt()


def to_v(raw_BTCHW: Tensor, x_BTCHW: Tensor, sigma_B: Tensor, parameterization: str) -> Tensor:
    """Predicted v; of epsilon it is sqrt(1 + sigma^2) F - sigma x."""
    if not _predicts_epsilon(parameterization):
        return raw_BTCHW
    sigma = expand_like(sigma_B, raw_BTCHW)
    return (1 + sigma**2).sqrt() * raw_BTCHW - sigma * x_BTCHW


def to_denoised(raw_BTCHW: Tensor, x_BTCHW: Tensor, sigma_B: Tensor, parameterization: str) -> Tensor:
    """Denoised latents D in the units of z. v: (x - sigma F) / sqrt(1 + sigma^2); epsilon: sqrt(1 + sigma^2) x - sigma F.

    source  EDM (Karras et al. 2022) eq. 7; v: c_skip = 1 / (1 + sigma^2), c_out = -sigma / sqrt(1 + sigma^2)
    """
    sigma = expand_like(sigma_B, raw_BTCHW)
    if _predicts_epsilon(parameterization):
        return (1 + sigma**2).sqrt() * x_BTCHW - sigma * raw_BTCHW
    return (x_BTCHW - sigma * raw_BTCHW) / (1 + sigma**2).sqrt()


def compute_loss(
    raw_BTCHW: Tensor,
    z_BTCHW: Tensor,
    noise_BTCHW: Tensor,
    sigma_B: Tensor,
    scored_T: Tensor,
    space: str,
    parameterization: str,
) -> tuple[Tensor, Tensor]:
    """Mean squared error of each clip, and what a network that knows nothing would score on the same draw.

    raw_BTCHW  the network's raw output
    scored_T   (T,) bool, frames that count
    space      "epsilon" (the spec's): (epsilon - noise)^2; "v": (F - v)^2 = (1 + sigma^2) x epsilon's;
               "edm": (1 + sigma^2) / sigma^2 (D - z)^2, which is the same number as v's
    returns    loss_B, zero_B: (B,) fp32, or fp64 where fp64 is given; zero_B is the score of a prediction of zero in the
               space of epsilon or v, and in "edm" of a raw output of zero
    source     pixeli99/SVD_Xtend, train_svd.py; EDM (Karras et al. 2022) eq. 8
    """
    # at least fp32: the difference of two nearly equal bf16 tensors would have no digits left
    raw, z, noise, sigma_B = (
        tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        for tensor in (raw_BTCHW, z_BTCHW, noise_BTCHW, sigma_B)
    )
    x = scale_input(z + expand_like(sigma_B, z) * noise, sigma_B)
    if space == "epsilon":
        predicted, target = to_epsilon(raw, x, sigma_B, parameterization), noise
    elif space in ("v", "edm"):
        # D - z = -sigma / sqrt(1 + sigma^2) (F - v), so edm's weight undoes its factor; in v nothing is divided by sigma
        predicted, target = to_v(raw, x, sigma_B, parameterization), make_v(z, noise, sigma_B)
    else:
        raise ValueError(f"loss space {space!r}: it must be epsilon, v or edm")
    nothing = to_v(torch.zeros_like(raw), x, sigma_B, parameterization) if space == "edm" else torch.zeros_like(target)
    return _mean_square(predicted - target, scored_T), _mean_square(nothing - target, scored_T)


def min_snr_weight(sigma_B: Tensor, space: str, gamma: float) -> Tensor:
    """What a loss in a space is multiplied by so that (D - z)^2 counts min(SNR, gamma), with SNR = 1 / sigma^2.

    source  Hang et al. 2023 (arXiv:2303.09556), section 3.4, and for v its appendix: v's own loss counts SNR + 1
    """
    snr_B = sigma_B**-2
    return snr_B.clamp(max=gamma) / (snr_B if space == "epsilon" else snr_B + 1)


def refuse_combination(parameterization: str, noise_sampler: str, loss_space: str) -> None:
    """Check that a network can be trained as asked; raises ValueError with the reason.

    Every space goes with either parameterization, since the conversions are exact. Epsilon in "v" or "edm" means the weight
    1 + sigma^2 on its error: much at high noise (215 at t = 999), but what those losses say.
    """
    _predicts_epsilon(parameterization)
    if noise_sampler not in ("uniform_t", "lognormal"):
        raise ValueError(f"noise sampler {noise_sampler!r}: it must be uniform_t or lognormal")
    if loss_space not in ("epsilon", "v", "edm"):
        raise ValueError(f"loss space {loss_space!r}: it must be epsilon, v or edm")
    if parameterization == "epsilon" and noise_sampler == "lognormal":
        raise ValueError(
            "noise sampler lognormal draws any sigma, but a network that predicts epsilon knows only the whole t of its "
            "table (sigma 0.03 to 14.6 for SVD's betas): use uniform_t"
        )


def _predicts_epsilon(parameterization: str) -> bool:
    if parameterization not in ("v", "epsilon"):
        raise ValueError(f"parameterization {parameterization!r}: it must be v or epsilon")
    return parameterization == "epsilon"


def _mean_square(error_BTCHW: Tensor, scored_T: Tensor) -> Tensor:
    scored = [frame for frame, counts in enumerate(scored_T.tolist()) if counts]
    if len(scored) < len(scored_T):  # frame by frame: for a mask the host would wait until a GPU has done all before
        error_BTCHW = torch.stack([error_BTCHW[:, frame] for frame in scored], 1)
    return torch.mean(error_BTCHW**2, dim=(1, 2, 3, 4))
