"""From noise to latents: Euler's method on the probability-flow equation.

Test: pytest tests/diffusion (against diffusers' EulerDiscreteScheduler).
"""

from collections.abc import Callable

from torch import Tensor


def sample_euler(denoise: Callable[[Tensor, Tensor], Tensor], noise_BTCHW: Tensor, sigmas: Tensor) -> Tensor:
    """Walk from noise down the sigmas.

    denoise  (noisy_BTCHW, sigma_B) -> denoised latents D
    noise    N(0, 1); it is scaled here by sqrt(sigma_max^2 + 1), as SVD's scheduler does with "leading" spacing
    sigmas   (steps + 1,) falling, the last one 0
    returns  (B, T, C, H, W) clean scaled latents
    source   EDM (Karras et al. 2022) algorithm 1 without churn and second-order correction
    """
    latents_BTCHW = noise_BTCHW * (sigmas[0] ** 2 + 1).sqrt()
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:], strict=True):
        sigma_B = sigma.expand(len(latents_BTCHW)).to(latents_BTCHW.device)
        denoised_BTCHW = denoise(latents_BTCHW, sigma_B)
        slope_BTCHW = (latents_BTCHW - denoised_BTCHW) / sigma
        latents_BTCHW = latents_BTCHW + slope_BTCHW * (sigma_next - sigma)
    return latents_BTCHW


def bisect(frames: int, midpoint: Callable[[Tensor, Tensor, int], Tensor], first: Tensor, last: Tensor) -> list[Tensor]:
    """Fill a gap by halving: the middle of the ends first, then the middle of each half.

    frames    first and last included, 2^n + 1
    midpoint  (left, right, halvings) -> the frame between them, which lies 2^halvings steps from each in the result
    returns   the frames in order, the ends as given
    raises    ValueError when frames is not 2^n + 1
    """
    gap = frames - 1
    if gap < 2 or gap & (gap - 1):
        raise ValueError(f"{frames} frames: halving gives 3, 5, 9, 17, ... frames")
    filled: dict[int, Tensor] = {0: first, gap: last}
    while gap > 1:
        half = gap // 2
        for left in range(0, frames - 1, gap):
            filled[left + half] = midpoint(filled[left], filled[left + gap], half.bit_length() - 1)
        gap = half
    return [filled[i] for i in range(frames)]
