"""What a raw output means, and the identities that let any loss run on any network. Run: pytest tests/diffusion"""

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor

from toolkit.diffusion.objective import (
    compute_loss,
    expand_like,
    make_v,
    min_snr_weight,
    refuse_combination,
    scale_input,
    time_input,
    to_denoised,
    to_epsilon,
    to_v,
)
from toolkit.diffusion.schedule import make_alpha_bar, sigma_from_alpha_bar

T_B = torch.tensor([0, 1, 100, 354, 500, 900, 999])
EVERY_FRAME = torch.ones(3, dtype=torch.bool)
ALPHA_BAR = make_alpha_bar(0.00085, 0.012, 1000)
either = pytest.mark.parametrize("parameterization", ["v", "epsilon"])
every_space = pytest.mark.parametrize("space", ["epsilon", "v", "edm"])


def draw(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Clean z, noise, an arbitrary raw output, and alpha_bar and sigma of seven timesteps; all float64."""
    generator = torch.Generator().manual_seed(seed)
    z, noise, raw = torch.randn(3, 7, 3, 4, 5, 6, dtype=torch.float64, generator=generator)
    alpha_bar_B = ALPHA_BAR[T_B].double()
    return z, noise, raw, alpha_bar_B, sigma_from_alpha_bar(alpha_bar_B)


def add_noise(z: Tensor, noise: Tensor, sigma_B: Tensor) -> Tensor:
    return z + expand_like(sigma_B, z) * noise


def mean_square(error: Tensor) -> Tensor:
    return error.square().mean((1, 2, 3, 4))


def test_ddpm_sample_is_the_scaled_input() -> None:
    """sqrt(a) z + sqrt(1 - a) noise = (z + sigma noise) / sqrt(1 + sigma^2)."""
    z, noise, _, alpha_bar_B, sigma_B = draw()
    a = expand_like(alpha_bar_B, z)
    ddpm = a.sqrt() * z + (1 - a).sqrt() * noise
    assert torch.allclose(scale_input(add_noise(z, noise, sigma_B), sigma_B), ddpm, rtol=0, atol=1e-12)


def test_v_equals_ddpms_velocity() -> None:
    """v = sqrt(a) noise - sqrt(1 - a) z."""
    z, noise, _, alpha_bar_B, sigma_B = draw()
    a = expand_like(alpha_bar_B, z)
    assert torch.allclose(make_v(z, noise, sigma_B), a.sqrt() * noise - (1 - a).sqrt() * z, rtol=0, atol=1e-12)


@either
def test_denoised_has_sgms_scalings(parameterization: str) -> None:
    """D = c_skip noisy + c_out F, with c_skip and c_out of sgm's VScalingWithEDMcNoise and EpsScaling, by hand."""
    z, noise, raw, _, sigma_B = draw()
    noisy, s = add_noise(z, noise, sigma_B), expand_like(sigma_B, z)
    c_skip, c_out = (1 / (s**2 + 1), -s / (s**2 + 1) ** 0.5) if parameterization == "v" else (1, -s)
    mine = to_denoised(raw, scale_input(noisy, sigma_B), sigma_B, parameterization)
    assert torch.allclose(mine, c_skip * noisy + c_out * raw, rtol=1e-12, atol=1e-12)


@either
def test_denoised_and_epsilon_split_the_sample(parameterization: str) -> None:
    """D + sigma epsilon = noisy: both readings of one raw output belong to the same sample."""
    z, noise, raw, _, sigma_B = draw()
    noisy = add_noise(z, noise, sigma_B)
    read = raw, scale_input(noisy, sigma_B), sigma_B, parameterization
    assert torch.allclose(add_noise(to_denoised(*read), to_epsilon(*read), sigma_B), noisy, rtol=1e-12, atol=1e-12)


def test_conversions_undo_each_other() -> None:
    """v -> epsilon -> v and epsilon -> v -> epsilon give back the raw output, and a network's own space is left as it is."""
    z, noise, raw, _, sigma_B = draw()
    x = scale_input(add_noise(z, noise, sigma_B), sigma_B)
    assert to_v(raw, x, sigma_B, "v") is raw and to_epsilon(raw, x, sigma_B, "epsilon") is raw
    assert torch.allclose(to_v(to_epsilon(raw, x, sigma_B, "v"), x, sigma_B, "epsilon"), raw, rtol=0, atol=1e-12)
    assert torch.allclose(to_epsilon(to_v(raw, x, sigma_B, "epsilon"), x, sigma_B, "v"), raw, rtol=0, atol=1e-12)


def test_both_parameterizations_of_one_prediction_agree() -> None:
    """A v and the epsilon that it means denoise to the same latents and score the same in every space."""
    z, noise, v, _, sigma_B = draw()
    x = scale_input(add_noise(z, noise, sigma_B), sigma_B)
    epsilon = to_epsilon(v, x, sigma_B, "v")
    assert torch.allclose(to_denoised(v, x, sigma_B, "v"), to_denoised(epsilon, x, sigma_B, "epsilon"), atol=1e-11)
    for space in ("epsilon", "v", "edm"):
        of_v, _ = compute_loss(v, z, noise, sigma_B, EVERY_FRAME, space, "v")
        of_epsilon, _ = compute_loss(epsilon, z, noise, sigma_B, EVERY_FRAME, space, "epsilon")
        assert torch.allclose(of_v, of_epsilon, rtol=1e-10, atol=0)


@either
def test_epsilon_loss_is_alpha_bar_times_v_loss(parameterization: str) -> None:
    """For any raw output, clip by clip, in float64, which compute_loss keeps."""
    z, noise, raw, alpha_bar_B, sigma_B = draw()
    epsilon_B, v_B = (
        compute_loss(raw, z, noise, sigma_B, EVERY_FRAME, space, parameterization)[0] for space in ("epsilon", "v")
    )
    assert epsilon_B.dtype == torch.float64
    assert torch.allclose(epsilon_B, alpha_bar_B * v_B, rtol=1e-11, atol=0)
    own, truth = (epsilon_B, noise) if parameterization == "epsilon" else (v_B, make_v(z, noise, sigma_B))
    assert torch.allclose(own, mean_square(raw - truth), rtol=1e-12, atol=0)


@either
def test_edm_loss_is_its_formula_and_the_v_loss(parameterization: str) -> None:
    """(1 + s^2) / s^2 (D - z)^2, with D from sgm's scalings, equals the loss in v space for any raw output."""
    z, noise, raw, _, sigma_B = draw()
    x = scale_input(add_noise(z, noise, sigma_B), sigma_B)
    weight_B = (1 + sigma_B**2) / sigma_B**2
    wanted_B = weight_B * mean_square(to_denoised(raw, x, sigma_B, parameterization) - z)
    edm_B, _ = compute_loss(raw, z, noise, sigma_B, EVERY_FRAME, "edm", parameterization)
    v_B, _ = compute_loss(raw, z, noise, sigma_B, EVERY_FRAME, "v", parameterization)
    assert torch.allclose(edm_B, wanted_B, rtol=1e-9, atol=0) and torch.equal(edm_B, v_B)


@either
@every_space
def test_perfect_output_has_no_loss(space: str, parameterization: str) -> None:
    """The true v of a v-network, the noise of an epsilon-network: zero everywhere, and z and noise come back."""
    z, noise, _, _, sigma_B = draw()
    perfect = noise if parameterization == "epsilon" else make_v(z, noise, sigma_B)
    loss_B, zero_B = compute_loss(perfect, z, noise, sigma_B, EVERY_FRAME, space, parameterization)
    assert loss_B.max() < 1e-24 and zero_B.min() > 0.5
    read = perfect, scale_input(add_noise(z, noise, sigma_B), sigma_B), sigma_B, parameterization
    assert torch.allclose(to_denoised(*read), z, rtol=0, atol=1e-12)
    assert torch.allclose(to_epsilon(*read), noise, rtol=0, atol=1e-12)


@either
def test_zero_baselines(parameterization: str) -> None:
    """Zero in the space of epsilon scores mean(noise^2), of v mean(v^2); in edm it is what a raw output of zero scores."""
    z, noise, raw, _, sigma_B = draw()
    v = make_v(z, noise, sigma_B)
    for space, target in (("epsilon", noise), ("v", v)):
        _, zero_B = compute_loss(raw, z, noise, sigma_B, EVERY_FRAME, space, parameterization)
        assert torch.allclose(zero_B, mean_square(target), rtol=1e-12)
    silent_B, _ = compute_loss(raw * 0, z, noise, sigma_B, EVERY_FRAME, "edm", parameterization)
    _, zero_B = compute_loss(raw, z, noise, sigma_B, EVERY_FRAME, "edm", parameterization)
    by_hand = mean_square(v) if parameterization == "v" else (1 + sigma_B**2) * mean_square(noise)
    assert torch.equal(zero_B, silent_B) and torch.allclose(zero_B, by_hand, rtol=1e-11)


@either
@every_space
def test_only_scored_frames_count(space: str, parameterization: str) -> None:
    """The loss is the mean over the scored frames; what the others hold is without effect and without gradient."""
    z, noise, raw, _, sigma_B = draw()
    raw.requires_grad_()
    middle, one = torch.tensor([False, True, False]), torch.ones(1, dtype=torch.bool)
    loss_B, zero_B = compute_loss(raw, z, noise, sigma_B, middle, space, parameterization)
    alone = compute_loss(raw[:, 1:2], z[:, 1:2], noise[:, 1:2], sigma_B, one, space, parameterization)
    assert torch.equal(loss_B, alone[0]) and torch.equal(zero_B, alone[1])
    loss_B.sum().backward()
    assert raw.grad[:, 1].abs().min() > 0 and not raw.grad[:, [0, 2]].any()


@either
@every_space
def test_loss_is_taken_in_fp32(space: str, parameterization: str) -> None:
    """bf16 tensors are compared in fp32: the loss is that of the rounded numbers, not rounded again."""
    given = [tensor.bfloat16() for tensor in draw()[:3]]
    sigma_B = draw()[4].float()
    z, noise, raw = given
    low = compute_loss(raw, z, noise, sigma_B, EVERY_FRAME, space, parameterization)
    z, noise, raw = (tensor.float() for tensor in given)
    full = compute_loss(raw, z, noise, sigma_B, EVERY_FRAME, space, parameterization)
    assert low[0].dtype == low[1].dtype == torch.float32
    assert torch.equal(low[0], full[0]) and torch.equal(low[1], full[1])


@every_space
@either
def test_min_snr_counts_errors_of_z(space: str, parameterization: str) -> None:
    """In every space the weighted loss is min(SNR, gamma) (D - z)^2, with SNR as diffusers' own training scripts have it."""
    z, noise, raw, _, sigma_B = draw()
    loss_B, _ = compute_loss(raw, z, noise, sigma_B, EVERY_FRAME, space, parameterization)
    x = scale_input(add_noise(z, noise, sigma_B), sigma_B)
    error_B = mean_square(to_denoised(raw, x, sigma_B, parameterization) - z)
    snr_B = compute_snr(DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012), T_B)
    torch.testing.assert_close(
        loss_B * min_snr_weight(sigma_B, space, 5.0), snr_B.clamp(max=5) * error_B, rtol=1e-4, atol=0
    )
    assert (snr_B > 5).any() and (snr_B < 5).any(), "one side of the clamp alone shows nothing"


def test_time_of_v_is_a_quarter_of_log_sigma() -> None:
    """SVD's range of the spec's timesteps: -0.884 at t = 0 to 0.671 at t = 999; float64 stays so."""
    sigma_B = sigma_from_alpha_bar(ALPHA_BAR)[[0, 999]]
    assert time_input(sigma_B, "v", ALPHA_BAR).tolist() == pytest.approx([-0.884, 0.671], abs=1e-3)
    assert torch.equal(time_input(sigma_B.double(), "v", ALPHA_BAR), 0.25 * sigma_B.double().log())


def test_time_of_epsilon_is_the_nearest_timestep() -> None:
    """Each sigma of the table, or one a little off it, gives its own t in fp32; the ends hold what lies beyond them."""
    sigma_B = sigma_from_alpha_bar(ALPHA_BAR)
    every_t = torch.arange(1000, dtype=torch.float32)
    for factor in (1, 1.0005, 0.9995):  # neighbours lie 0.28 % apart or more
        time_B = time_input(sigma_B * factor, "epsilon", ALPHA_BAR)
        assert time_B.dtype == torch.float32 and torch.equal(time_B, every_t)
    below, above = (sigma_B[500] ** (1 - w) * sigma_B[501] ** w for w in (0.49, 0.51))
    beyond = torch.stack([below, above, torch.tensor(0.002), torch.tensor(700.0)])
    assert time_input(beyond, "epsilon", ALPHA_BAR).tolist() == [500, 501, 0, 999]


@either
@every_space
@pytest.mark.parametrize("noise_sampler", ["uniform_t", "lognormal"])
def test_only_epsilon_with_lognormal_is_refused(parameterization: str, noise_sampler: str, space: str) -> None:
    """Every other combination is exact by conversion."""
    if (parameterization, noise_sampler) != ("epsilon", "lognormal"):
        return refuse_combination(parameterization, noise_sampler, space)
    with pytest.raises(ValueError, match="lognormal.*whole t.*use uniform_t"):
        refuse_combination(parameterization, noise_sampler, space)


@pytest.mark.parametrize(
    "names, said",
    [
        (("auto", "uniform_t", "v"), "'auto'.*v or epsilon"),
        (("v", "cosine", "v"), "'cosine'.*uniform_t or lognormal"),
        (("v", "uniform_t", "x0"), "'x0'.*epsilon, v or edm"),
    ],
)
def test_unknown_names_are_refused(names: tuple[str, str, str], said: str) -> None:
    """By the check and by the functions alike; the error lists what is known."""
    with pytest.raises(ValueError, match=said):
        refuse_combination(*names)
    parameterization, noise_sampler, space = names
    z, noise, raw, _, sigma_B = draw()
    if noise_sampler == "uniform_t":
        with pytest.raises(ValueError, match=said):
            compute_loss(raw, z, noise, sigma_B, EVERY_FRAME, space, parameterization)
