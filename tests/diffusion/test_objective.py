"""The identities that let the spec's epsilon loss run on v-prediction weights. Run: pytest tests/diffusion"""

import pytest
import torch
from torch import Tensor

from toolkit.diffusion.objective import (
    compute_loss,
    denoise_from_v,
    epsilon_from_v,
    expand_like,
    make_v,
    scale_input,
    time_input,
)
from toolkit.diffusion.schedule import make_alpha_bar, sigma_from_alpha_bar

T_B = torch.tensor([0, 1, 100, 354, 500, 900, 999])
EVERY_FRAME = torch.ones(3, dtype=torch.bool)


def draw(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Clean z, noise, an arbitrary raw output, and alpha_bar and sigma of seven timesteps; all float64."""
    generator = torch.Generator().manual_seed(seed)
    z, noise, raw = torch.randn(3, 7, 3, 4, 5, 6, dtype=torch.float64, generator=generator)
    alpha_bar_B = make_alpha_bar(0.00085, 0.012, 1000)[T_B].double()
    return z, noise, raw, alpha_bar_B, sigma_from_alpha_bar(alpha_bar_B)


def mean_square(error: Tensor) -> Tensor:
    return error.square().mean((1, 2, 3, 4))


def test_ddpm_sample_is_the_scaled_input() -> None:
    """sqrt(a) z + sqrt(1 - a) noise = (z + sigma noise) / sqrt(1 + sigma^2)."""
    z, noise, _, alpha_bar_B, sigma_B = draw()
    a, sigma = expand_like(alpha_bar_B, z), expand_like(sigma_B, z)
    ddpm = a.sqrt() * z + (1 - a).sqrt() * noise
    assert torch.allclose(scale_input(z + sigma * noise, sigma_B), ddpm, rtol=0, atol=1e-12)


def test_v_equals_ddpms_velocity() -> None:
    """v = sqrt(a) noise - sqrt(1 - a) z."""
    z, noise, _, alpha_bar_B, sigma_B = draw()
    a = expand_like(alpha_bar_B, z)
    assert torch.allclose(make_v(z, noise, sigma_B), a.sqrt() * noise - (1 - a).sqrt() * z, rtol=0, atol=1e-12)


def test_epsilon_loss_is_alpha_bar_times_v_loss() -> None:
    """For any raw output, clip by clip; on the functions in float64, and through compute_loss to fp32."""
    z, noise, raw, alpha_bar_B, sigma_B = draw()
    x = scale_input(z + expand_like(sigma_B, z) * noise, sigma_B)
    epsilon_B = mean_square(epsilon_from_v(raw, x, sigma_B) - noise)
    v_B = mean_square(raw - make_v(z, noise, sigma_B))
    assert torch.allclose(epsilon_B, alpha_bar_B * v_B, rtol=1e-11, atol=0)
    for space, wanted_B in (("epsilon", epsilon_B), ("v", v_B)):
        loss_B, _ = compute_loss(raw, z, noise, sigma_B, EVERY_FRAME, space)
        assert torch.allclose(loss_B, wanted_B, rtol=1e-6, atol=0)


def test_edm_weighted_loss_is_mse_on_v() -> None:
    """(1 + s^2) / s^2 (D - z)^2 = (F - v)^2 with v = (noise - s z) / sqrt(1 + s^2), for any F."""
    z, noise, raw, _, sigma_B = draw()
    noisy = z + expand_like(sigma_B, z) * noise
    weight_B = (1 + sigma_B**2) / sigma_B**2
    edm_B = weight_B * mean_square(denoise_from_v(raw, noisy, sigma_B) - z)
    assert torch.allclose(edm_B, mean_square(raw - make_v(z, noise, sigma_B)), rtol=1e-9, atol=0)


def test_denoised_and_epsilon_agree() -> None:
    """D + sigma epsilon = noisy: both readings of one raw output split the same sample."""
    z, noise, raw, _, sigma_B = draw()
    sigma = expand_like(sigma_B, z)
    noisy = z + sigma * noise
    again = denoise_from_v(raw, noisy, sigma_B) + sigma * epsilon_from_v(raw, scale_input(noisy, sigma_B), sigma_B)
    assert torch.allclose(again, noisy, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("space", ["epsilon", "v"])
def test_perfect_v_has_no_loss(space: str) -> None:
    """The true v scores zero in both spaces, and gives back z and the noise."""
    z, noise, _, _, sigma_B = draw()
    v = make_v(z, noise, sigma_B)
    loss_B, zero_B = compute_loss(v, z, noise, sigma_B, EVERY_FRAME, space)
    assert loss_B.max() < 1e-13 and zero_B.min() > 0.5
    noisy = z + expand_like(sigma_B, z) * noise
    assert torch.allclose(denoise_from_v(v, noisy, sigma_B), z, atol=1e-11)
    assert torch.allclose(epsilon_from_v(v, scale_input(noisy, sigma_B), sigma_B), noise, atol=1e-11)


def test_zero_baseline_is_the_loss_of_predicting_zero() -> None:
    """In v space the raw output 0; in epsilon space the raw output whose epsilon is 0, which is -sigma x."""
    z, noise, raw, _, sigma_B = draw()
    sigma = expand_like(sigma_B, z)
    x = scale_input(z + sigma * noise, sigma_B)
    for space, zero_raw in (("v", torch.zeros_like(raw)), ("epsilon", -sigma * x)):
        assert space == "v" or epsilon_from_v(zero_raw, x, sigma_B).abs().max() < 1e-12
        loss_B, zero_B = compute_loss(zero_raw, z, noise, sigma_B, EVERY_FRAME, space)
        assert torch.allclose(loss_B, zero_B, rtol=1e-5)
    _, zero_B = compute_loss(raw, z, noise, sigma_B, EVERY_FRAME, "epsilon")
    assert torch.allclose(zero_B, mean_square(noise), rtol=1e-12)


@pytest.mark.parametrize("space", ["epsilon", "v"])
def test_only_scored_frames_count(space: str) -> None:
    """The loss is the mean over the scored frames; what the others hold is without effect and without gradient."""
    z, noise, raw, _, sigma_B = draw()
    raw = raw.float().requires_grad_()
    middle = torch.tensor([False, True, False])
    loss_B, zero_B = compute_loss(raw, z, noise, sigma_B, middle, space)
    one = torch.ones(1, dtype=torch.bool)
    alone = compute_loss(raw[:, 1:2], z[:, 1:2], noise[:, 1:2], sigma_B, one, space)
    assert torch.equal(loss_B, alone[0]) and torch.equal(zero_B, alone[1])
    loss_B.sum().backward()
    assert raw.grad[:, 1].abs().min() > 0 and not raw.grad[:, [0, 2]].any()


def test_loss_is_taken_in_fp32() -> None:
    """A bf16 raw output is compared in fp32: the loss is that of the rounded output, not rounded again."""
    z, noise, raw, _, sigma_B = (tensor.float() for tensor in draw())
    loss_B, zero_B = compute_loss(raw.bfloat16(), z, noise, sigma_B, EVERY_FRAME, "v")
    assert loss_B.dtype == zero_B.dtype == torch.float32
    assert torch.equal(loss_B, compute_loss(raw.bfloat16().float(), z, noise, sigma_B, EVERY_FRAME, "v")[0])


def test_time_is_a_quarter_of_log_sigma() -> None:
    """SVD's range of the spec's timesteps: -0.884 at t = 0 to 0.671 at t = 999."""
    time_B = time_input(sigma_from_alpha_bar(make_alpha_bar(0.00085, 0.012, 1000)[[0, 999]]))
    assert time_B.tolist() == pytest.approx([-0.884, 0.671], abs=1e-3)


def test_unknown_space_is_refused() -> None:
    """The error lists the spaces."""
    z, noise, raw, _, sigma_B = draw()
    with pytest.raises(ValueError, match="'x0'.*epsilon or v"):
        compute_loss(raw, z, noise, sigma_B, EVERY_FRAME, "x0")
