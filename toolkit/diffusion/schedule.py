"""Noise levels: which sigma a training sample gets, and which sigmas a sampler walks down.

Test: pytest tests/diffusion. Legend: B clip; sigma is the noise's std in scaled-latent units, alpha_bar the DDPM
cumulative product, and alpha_bar = 1 / (1 + sigma^2) joins them. Draws come in as arguments, so all is pure.
"""

import torch
from torch import Tensor

LCM_LEVELS = 40  # noise levels that AnimateLCM-SVD was distilled on


def make_alpha_bar(beta_start: float, beta_end: float, steps: int) -> Tensor:
    """Cumulative product of 1 - beta for the "scaled_linear" betas of Stable Diffusion.

    returns  alpha_bar (steps,) fp32, falling
    source   diffusers, schedulers/scheduling_ddpm.py, beta_schedule "scaled_linear"
    """
    # in float64: the running product of 1,000 factors loses digits in fp32
    beta = torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float64) ** 2
    return (1 - beta).cumprod(0).float()


def sigma_from_alpha_bar(alpha_bar: Tensor) -> Tensor:
    """Noise level at which the DDPM sample and the EDM-scaled sample are the same tensor: sqrt((1 - a) / a)."""
    return ((1 - alpha_bar) / alpha_bar).sqrt()


def uniform_t_sigma(uniform_B: Tensor, alpha_bar: Tensor) -> Tensor:
    """Map u in [0, 1) to the sigma of t = floor(u * steps), the spec's t uniform in 0..999.

    returns  sigma_B (B,) fp32
    """
    t_B = (uniform_B * len(alpha_bar)).long()
    return sigma_from_alpha_bar(alpha_bar[t_B])


def lognormal_sigma(normal_B: Tensor, mean: float, std: float) -> Tensor:
    """Map z ~ N(0, 1) to sigma = exp(mean + std z), EDM's training density.

    returns  sigma_B (B,) fp32
    source   EDM (Karras et al. 2022) table 1; SVD_Xtend uses mean 0.7, std 1.6
    """
    return (mean + std * normal_B).exp()


def karras_sigmas(steps: int, sigma_min: float, sigma_max: float) -> Tensor:
    """Sigmas from sigma_max down to sigma_min, evenly spaced in sigma^(1/7), then 0.

    returns  (steps + 1,) fp32
    source   EDM (Karras et al. 2022) eq. 5, with its rho of 7
    """
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    high, low = sigma_max ** (1 / 7), sigma_min ** (1 / 7)
    return torch.cat([(high + ramp * (low - high)) ** 7.0, ramp.new_zeros(1)]).float()


def trailing_sigmas(steps: int, alpha_bar: Tensor) -> Tensor:
    """Sigmas of whole timesteps spaced evenly down from the last, t_i = round(N - i N / steps) - 1, then 0.

    alpha_bar  (N,) the DDPM table
    returns    (steps + 1,) fp32
    raises     ValueError when there are more steps than timesteps
    source     Lin et al. 2023 (arXiv 2305.08891) table 2, "trailing": unlike "leading", the first t is the noisiest
    """
    N = len(alpha_bar)
    if not 1 <= steps <= N:
        raise ValueError(f"{steps} steps: a table of {N} timesteps allows 1 to {N}")
    t = (N - torch.arange(steps, dtype=torch.float64) * (N / steps)).round().long() - 1
    return torch.cat([sigma_from_alpha_bar(alpha_bar[t]), alpha_bar.new_zeros(1)])


def lcm_sigmas(steps: int, sigma_min: float, sigma_max: float) -> Tensor:
    """Sigmas at which AnimateLCM-SVD is asked: every (40 // steps)-th of 40 Karras sigmas from sigma_max, then 0.

    karras_sigmas would end at sigma_min, where there is no noise left to take away, and so waste one of a few steps.

    returns  (steps + 1,) fp32
    raises   ValueError when there are more steps than the 40 of its distillation
    source   openhe-hub/UniSignMimicTurbo, FramerTurbo/models_diffusers/lcm_scheduler.py
    """
    if not 1 <= steps <= LCM_LEVELS:
        raise ValueError(f"{steps} steps: a base distilled on {LCM_LEVELS} noise levels allows 1 to {LCM_LEVELS}")
    sigmas = karras_sigmas(LCM_LEVELS, sigma_min, sigma_max)
    return torch.cat([sigmas[torch.arange(steps) * (LCM_LEVELS // steps)], sigmas[-1:]])
