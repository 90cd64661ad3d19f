"""Noise levels and the sampler against diffusers' schedulers. Run: pytest tests/diffusion/test_schedule.py"""

from collections.abc import Callable

import pytest
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler
from torch import Tensor

from toolkit.diffusion.objective import denoise_from_v, scale_input, time_input
from toolkit.diffusion.sampler import bisect, sample_euler
from toolkit.diffusion.schedule import (
    karras_sigmas,
    lognormal_sigma,
    make_alpha_bar,
    sigma_from_alpha_bar,
    uniform_t_sigma,
)

# stabilityai/stable-video-diffusion-img2vid-xt, scheduler/scheduler_config.json
SVD_SCHEDULER = {
    "beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "interpolation_type": "linear",
    "num_train_timesteps": 1000, "prediction_type": "v_prediction", "sigma_max": 700.0, "sigma_min": 0.002,
    "steps_offset": 1, "timestep_spacing": "leading", "timestep_type": "continuous", "trained_betas": None,
    "use_karras_sigmas": True,
}  # fmt: skip


def svd_alpha_bar() -> Tensor:
    return make_alpha_bar(0.00085, 0.012, 1000)


def test_alpha_bar_equals_ddpms() -> None:
    """All 1,000 values of DDPMScheduler with SVD's betas, and the known ends of sigma."""
    wanted = DDPMScheduler.from_config(SVD_SCHEDULER).alphas_cumprod
    assert torch.allclose(svd_alpha_bar(), wanted, rtol=2e-5, atol=0)
    sigma = sigma_from_alpha_bar(svd_alpha_bar())
    assert sigma.shape == (1000,) and sigma.diff().min() > 0
    assert sigma[[0, 1, 100, 500, 900, 999]].tolist() == pytest.approx(
        [0.0292, 0.0413, 0.344, 1.618, 8.35, 14.61], rel=2e-3
    )


def test_ddpm_adds_the_same_noise() -> None:
    """DDPMScheduler.add_noise and get_velocity give our scaled input at the sigma of each t."""
    from toolkit.diffusion.objective import make_v

    ddpm, t_B = DDPMScheduler.from_config(SVD_SCHEDULER), torch.tensor([0, 250, 999])
    z, noise = torch.randn(2, 3, 2, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    sigma_B = sigma_from_alpha_bar(svd_alpha_bar()[t_B])
    mine = scale_input(z + sigma_B.view(-1, 1, 1, 1, 1) * noise, sigma_B)
    assert torch.allclose(mine, ddpm.add_noise(z, noise, t_B), atol=1e-5)
    assert torch.allclose(make_v(z, noise, sigma_B), ddpm.get_velocity(z, noise, t_B), atol=1e-5)


def test_uniform_t_covers_every_timestep() -> None:
    """u in [0, 1) reaches t = 0 and t = 999, each t from the u in [t, t + 1) / 1000, and nothing beyond."""
    sigma = sigma_from_alpha_bar(svd_alpha_bar())
    below_one = torch.nextafter(torch.tensor(1.0), torch.tensor(0.0))
    ends = uniform_t_sigma(torch.stack([torch.tensor(0.0), below_one]), svd_alpha_bar())
    assert torch.equal(ends, sigma[[0, 999]])
    middles = (torch.arange(1000) + 0.5) / 1000
    assert torch.equal(uniform_t_sigma(middles, svd_alpha_bar()), sigma)


def test_lognormal_has_its_mean_and_std() -> None:
    """ln sigma = mean + std z; the median of SVD_Xtend's density is 2.01."""
    sigma_B = lognormal_sigma(torch.tensor([0.0, 1.0, -1.96, 1.96]), 0.7, 1.6)
    assert sigma_B.tolist() == pytest.approx([2.0138, 9.974, 0.0875, 46.3], rel=2e-3)


@pytest.mark.parametrize("steps", [1, 2, 6, 25, 30])
def test_karras_sigmas_equal_diffusers(steps: int) -> None:
    """The sigmas of EulerDiscreteScheduler with SVD-XT's settings, the final 0 included, and its time inputs."""
    scheduler = EulerDiscreteScheduler.from_config(SVD_SCHEDULER)
    scheduler.set_timesteps(steps)
    sigmas = karras_sigmas(steps, 0.002, 700.0)
    assert torch.allclose(sigmas, scheduler.sigmas, rtol=1e-5, atol=0)
    assert torch.allclose(time_input(sigmas[:-1]), scheduler.timesteps, rtol=1e-5, atol=1e-6)


def make_network() -> Callable[[Tensor, Tensor], Tensor]:
    """An arbitrary fixed function of input and time, in the place of a UNet."""
    weight_CC = torch.randn(4, 4, generator=torch.Generator().manual_seed(1)) / 2
    return lambda x, time: torch.tanh(torch.einsum("btchw,cd->btdhw", x, weight_CC) + 0.3 * time) - 0.2 * x.roll(1, 3)


@pytest.mark.parametrize("steps", [2, 12, 25])
def test_sampler_walks_as_diffusers_does(steps: int) -> None:
    """From the same noise through the same network, every latent on the way equals EulerDiscreteScheduler's."""
    network = make_network()
    noise = torch.randn(2, 3, 4, 5, 6, generator=torch.Generator().manual_seed(2))
    scheduler = EulerDiscreteScheduler.from_config(SVD_SCHEDULER)
    scheduler.set_timesteps(steps)
    latents = noise * scheduler.init_noise_sigma
    wanted = [latents]
    for time in scheduler.timesteps:
        raw = network(scheduler.scale_model_input(latents, time), time)
        latents = scheduler.step(raw, time, latents).prev_sample
        wanted.append(latents)

    met = []

    def denoise(noisy: Tensor, sigma_B: Tensor) -> Tensor:
        met.append(noisy)
        assert sigma_B.shape == (2,)
        raw = network(scale_input(noisy, sigma_B), time_input(sigma_B).view(-1, 1, 1, 1, 1))
        return denoise_from_v(raw, noisy, sigma_B)

    met.append(sample_euler(denoise, noise, karras_sigmas(steps, 0.002, 700.0)))
    assert len(met) == len(wanted) == steps + 1
    for mine, theirs in zip(met, wanted, strict=True):
        assert (mine - theirs).abs().max() < 1e-5 * max(1.0, theirs.abs().max().item())


def test_perfect_denoiser_arrives_at_the_truth() -> None:
    """Where the network knows z, any number of steps ends at z."""
    z, noise = torch.randn(2, 1, 3, 4, 5, 6, generator=torch.Generator().manual_seed(3))
    for steps in (1, 5, 30):
        assert torch.allclose(sample_euler(lambda *_: z, noise, karras_sigmas(steps, 0.002, 700.0)), z, atol=1e-3)


@pytest.mark.parametrize("frames", [3, 5, 9, 17])
def test_bisect_halves_in_order(frames: int) -> None:
    """Each frame is made once, in the middle of two frames that exist, and halvings says how far they are."""
    made, gap = [], frames - 1

    def midpoint(left: Tensor, right: Tensor, halvings: int) -> Tensor:
        distance = (right - left).item() * gap  # in frames of the result
        assert distance == 2 ** (halvings + 1)
        made.append(halvings)
        return (left + right) / 2

    filled = bisect(frames, midpoint, torch.tensor(0.0), torch.tensor(1.0))
    assert [f.item() for f in filled] == [i / gap for i in range(frames)]
    assert made == sorted(made, reverse=True) and len(made) == frames - 2
    assert made[0] == (gap // 2).bit_length() - 1 and made[-1] == 0


def test_bisect_returns_the_ends_themselves() -> None:
    """The stills are not copied or passed through anything."""
    first, last = torch.rand(2, 3, 4, 4)
    filled = bisect(5, lambda left, right, _: (left + right) / 2, first, last)
    assert filled[0].data_ptr() == first.data_ptr() and filled[-1].data_ptr() == last.data_ptr()


@pytest.mark.parametrize("frames", [-1, 0, 1, 2, 4, 6, 7, 10])
def test_bisect_refuses_other_counts(frames: int) -> None:
    """Only 2^n + 1 frames can be made by halving; the error lists them."""
    with pytest.raises(ValueError, match=f"^{frames} frames: .*3, 5, 9, 17"):
        bisect(frames, lambda *_: torch.zeros(()), torch.zeros(()), torch.zeros(()))
