"""From noise to latents: Euler's method on the probability-flow equation, or a few steps of a consistency model.

Test: pytest tests/diffusion (against diffusers' Euler, DDIM, consistency and LCM schedulers).
Both samplers take `denoise`: (noisy_BTCHW, sigma_B) -> denoised latents D, and `on_step`: (i, latents_BTCHW) ->
latents_BTCHW, which sees what step i left and may change it. Noise and sigmas are on one device.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

Denoise = Callable[[Tensor, Tensor], Tensor]
OnStep = Callable[[int, Tensor], Tensor]
Pair = tuple[Tensor, Tensor]


def sample_euler(denoise: Denoise, noise_BTCHW: Tensor, sigmas: Tensor, on_step: OnStep | None = None) -> Tensor:
    """Walk from noise down the sigmas.

    noise    N(0, 1); it is scaled here to sqrt(sigma_max^2 + 1), as SVD's scheduler does, and DDIM in its own units
    sigmas   (steps + 1,) falling, the last one 0
    returns  (B, T, C, H, W) clean scaled latents
    source   EDM (Karras et al. 2022) algorithm 1 without churn and second-order correction
    """
    latents_BTCHW = noise_BTCHW * (sigmas[0] ** 2 + 1).sqrt()
    for i, (sigma, sigma_next) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        slope_BTCHW = (latents_BTCHW - _denoise_all(denoise, latents_BTCHW, sigma)) / sigma
        latents_BTCHW = latents_BTCHW + slope_BTCHW * (sigma_next - sigma)
        latents_BTCHW = on_step(i, latents_BTCHW) if on_step else latents_BTCHW
    return latents_BTCHW


def sample_lcm(
    denoise: Denoise,
    noise_BTCHW: Tensor,
    sigmas: Tensor,
    renoise: Callable[[int], Tensor],
    on_step: OnStep | None = None,
) -> Tensor:
    """Jump to the denoised latents and noise them again, for bases distilled to a few steps: latents <- D + s z.

    noise    N(0, 1); it is scaled here as in sample_euler, which is AnimateLCM-SVD's start too
    sigmas   (steps + 1,) falling; s = sqrt(sigma_next^2 - sigmas[-1]^2), so the last one is the noise that D itself still
             holds: 0 for AnimateLCM-SVD and LCM, sigma_min for a consistency model. The network is not asked there
    renoise  i -> z ~ N(0, 1) for step i; not called for the last step, which returns D
    source   Consistency models (Song et al. 2023) algorithm 1; openhe-hub/UniSignMimicTurbo,
             FramerTurbo/models_diffusers/lcm_scheduler.py
    """
    latents_BTCHW = noise_BTCHW * (sigmas[0] ** 2 + 1).sqrt()
    last = len(sigmas) - 2
    for i, (sigma, sigma_next) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        latents_BTCHW = _denoise_all(denoise, latents_BTCHW, sigma)
        if i < last:
            latents_BTCHW = latents_BTCHW + (sigma_next**2 - sigmas[-1] ** 2).sqrt() * renoise(i)
        latents_BTCHW = on_step(i, latents_BTCHW) if on_step else latents_BTCHW
    return latents_BTCHW


def bisect(
    frames: int, midpoints: Callable[[list[Pair], Sequence[int], int], Sequence[Tensor]], stills: Sequence[Tensor]
) -> list[Tensor]:
    """Fill the gaps between neighbouring stills by halving: the middle of each first, then the middles of all halves.

    frames     of a gap, its two stills included, 2^n + 1
    midpoints  (pairs, places, halvings) -> the frame between each pair, number places[i] of the result, which lies
               2^halvings steps from both
    returns    the frames in order, the stills as given
    raises     ValueError when frames is not 2^n + 1
    """
    gap = frames - 1
    if gap < 2 or gap & (gap - 1):
        raise ValueError(f"{frames} frames: halving gives 3, 5, 9, 17, ... frames")
    filled = {gap * i: still for i, still in enumerate(stills)}
    last = gap * (len(stills) - 1)
    while gap > 1:
        half = gap // 2
        places = range(half, last, gap)
        pairs = [(filled[place - half], filled[place + half]) for place in places]
        filled |= dict(zip(places, midpoints(pairs, places, half.bit_length() - 1), strict=True))
        gap = half
    return [filled[i] for i in range(last + 1)]


def _denoise_all(denoise: Denoise, latents_BTCHW: Tensor, sigma: Tensor) -> Tensor:
    return denoise(latents_BTCHW, sigma.expand(len(latents_BTCHW)))
