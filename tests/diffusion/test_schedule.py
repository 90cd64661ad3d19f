"""Noise levels and the samplers against diffusers' schedulers. Run: pytest tests/diffusion/test_schedule.py"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
)
from torch import Tensor

from toolkit.diffusion.objective import make_v, scale_input, time_input, to_denoised
from toolkit.diffusion.sampler import bisect, sample_euler, sample_lcm
from toolkit.diffusion.schedule import (
    karras_sigmas,
    lcm_sigmas,
    lognormal_sigma,
    make_alpha_bar,
    sigma_from_alpha_bar,
    trailing_sigmas,
    uniform_t_sigma,
)

# stabilityai/stable-video-diffusion-img2vid-xt, scheduler/scheduler_config.json
SVD_SCHEDULER = {
    "beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "interpolation_type": "linear",
    "num_train_timesteps": 1000, "prediction_type": "v_prediction", "sigma_max": 700.0, "sigma_min": 0.002,
    "steps_offset": 1, "timestep_spacing": "leading", "timestep_type": "continuous", "trained_betas": None,
    "use_karras_sigmas": True,
}  # fmt: skip
# an epsilon base on the same betas, sampled at whole timesteps down to no noise at all
TRAILING = {
    "prediction_type": "epsilon", "timestep_spacing": "trailing", "timestep_type": "discrete", "use_karras_sigmas": False,
    "set_alpha_to_one": True,
}  # fmt: skip
# openhe-hub/UniSignMimicTurbo, FramerTurbo/apps/app_turbo_v2.py: what it gives AnimateLCM-SVD's scheduler
SVD_TURBO = {"num_train_timesteps": 40, "sigma_min": 0.002, "sigma_max": 700.0, "sigma_data": 1.0, "rho": 7.0}


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
    ddpm, t_B = DDPMScheduler.from_config(SVD_SCHEDULER), torch.tensor([0, 250, 999])
    z, noise = torch.randn(2, 3, 2, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    sigma_B = sigma_from_alpha_bar(svd_alpha_bar()[t_B])
    mine = scale_input(z + sigma_B.view(-1, 1, 1, 1, 1) * noise, sigma_B)
    assert torch.allclose(mine, ddpm.add_noise(z, noise, t_B), atol=1e-5)
    assert torch.allclose(make_v(z, noise, sigma_B), ddpm.get_velocity(z, noise, t_B), atol=1e-5)


def test_eulers_velocity_is_another_timesteps() -> None:
    """Why EulerDiscreteScheduler.get_velocity is no reference: at t = 900 it gives the velocity of t = 99."""
    z, noise = torch.randn(2, 1, 3, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    scheduler = EulerDiscreteScheduler.from_config(SVD_SCHEDULER)
    theirs = scheduler.get_velocity(z, noise, scheduler.timesteps[[99]])  # t falls from 999, so place 99 is t = 900
    sigma = sigma_from_alpha_bar(svd_alpha_bar())
    assert torch.allclose(theirs, make_v(z, noise, sigma[[99]]), atol=1e-5)
    assert not torch.allclose(theirs, make_v(z, noise, sigma[[900]]), atol=0.1)


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
    assert torch.allclose(time_input(sigmas[:-1], "v", svd_alpha_bar()), scheduler.timesteps, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scheduler_class", [EulerDiscreteScheduler, DDIMScheduler])
@pytest.mark.parametrize("steps", [1, 2, 4, 7, 25, 30, 50, 999, 1000])
def test_trailing_sigmas_equal_diffusers(scheduler_class: Any, steps: int) -> None:
    """The sigmas of an epsilon base's whole timesteps, "trailing", the final 0 included, and its time inputs."""
    scheduler = scheduler_class.from_config(SVD_SCHEDULER, **TRAILING)
    scheduler.set_timesteps(steps)
    sigmas = trailing_sigmas(steps, svd_alpha_bar())
    assert sigmas.shape == (steps + 1,) and sigmas.dtype == torch.float32 and sigmas[-1] == 0
    wanted = sigma_from_alpha_bar(scheduler.alphas_cumprod)[scheduler.timesteps.long()]
    assert torch.allclose(sigmas[:-1], wanted, rtol=2e-5, atol=0)
    assert torch.equal(time_input(sigmas[:-1], "epsilon", svd_alpha_bar()), scheduler.timesteps.float())


@pytest.mark.parametrize("steps", [1, 2, 4, 6, 40])
def test_lcm_sigmas_equal_diffusers(steps: int) -> None:
    """Those of a consistency scheduler on 40 levels, but for the last, which AnimateLCM-SVD has at 0."""
    scheduler = CMStochasticIterativeScheduler(**SVD_TURBO)
    scheduler.set_timesteps(steps)
    sigmas = lcm_sigmas(steps, 0.002, 700.0)
    assert torch.allclose(sigmas[:-1], scheduler.sigmas[:-1], rtol=1e-5, atol=0) and sigmas[-1] == 0


@pytest.mark.parametrize("steps", [-1, 0, 1001])
def test_too_many_steps_are_refused(steps: int) -> None:
    """More steps than noise levels, or none; the error says how many there are."""
    with pytest.raises(ValueError, match=f"^{steps} steps: .* 1 to 1000"):
        trailing_sigmas(steps, svd_alpha_bar())
    with pytest.raises(ValueError, match=f"^{steps} steps: .* 1 to 40"):
        lcm_sigmas(steps, 0.002, 700.0)


def make_network() -> Callable[[Tensor, Tensor], Tensor]:
    """An arbitrary fixed function of input and time, in the place of a UNet."""
    weight_CC = torch.randn(4, 4, generator=torch.Generator().manual_seed(1)) / 2

    def answer(x_BTCHW: Tensor, time: Tensor) -> Tensor:
        mixed = torch.einsum("btchw,cd->btdhw", x_BTCHW, weight_CC)
        return torch.tanh(mixed + 0.3 * time.float().reshape(-1, 1, 1, 1, 1)) - 0.2 * x_BTCHW.roll(1, 3)

    return answer


def draw_noise() -> Tensor:
    return torch.randn(2, 3, 4, 5, 6, generator=torch.Generator().manual_seed(2))


class Denoiser:
    """The network read as D, as the samplers ask for it; remembers the noisy latents it was given."""

    def __init__(self, parameterization: str) -> None:
        self.parameterization = parameterization
        self.network = make_network()
        self.met: list[Tensor] = []

    def __call__(self, noisy_BTCHW: Tensor, sigma_B: Tensor) -> Tensor:
        assert sigma_B.shape == (2,)
        self.met.append(noisy_BTCHW)
        x_BTCHW = scale_input(noisy_BTCHW, sigma_B)
        raw_BTCHW = self.network(x_BTCHW, time_input(sigma_B, self.parameterization, svd_alpha_bar()))
        return to_denoised(raw_BTCHW, x_BTCHW, sigma_B, self.parameterization)


def assert_equal_paths(mine: list[Tensor], theirs: list[Tensor]) -> None:
    """Every latent on the way agrees to 1e-5 of its size."""
    assert len(mine) == len(theirs)
    for a, b in zip(mine, theirs, strict=True):
        assert (a - b).abs().max() < 1e-5 * max(1.0, b.abs().max().item())


def walk(scheduler: Any, latents: Tensor) -> list[Tensor]:
    """The latents of diffusers' own loop, from the first to the last."""
    network, path = make_network(), [latents]
    for time in scheduler.timesteps:
        raw = network(scheduler.scale_model_input(path[-1], time), time)
        path.append(scheduler.step(raw, time, path[-1]).prev_sample)
    return path


@pytest.mark.parametrize("steps", [2, 12, 25])
def test_euler_walks_as_svds_scheduler_does(steps: int) -> None:
    """From the same noise through the same network, every latent equals EulerDiscreteScheduler's on SVD's settings."""
    scheduler = EulerDiscreteScheduler.from_config(SVD_SCHEDULER)
    scheduler.set_timesteps(steps)
    theirs = walk(scheduler, draw_noise() * scheduler.init_noise_sigma)
    denoise = Denoiser("v")
    end = sample_euler(denoise, draw_noise(), karras_sigmas(steps, 0.002, 700.0))
    assert_equal_paths([*denoise.met, end], theirs)


@pytest.mark.parametrize("steps", [1, 7, 25])
def test_euler_walks_on_an_epsilon_base(steps: int) -> None:
    """The same with epsilon and trailing timesteps; from our start, as Euler's lacks 0.2 % of the noise with "trailing"."""
    scheduler = EulerDiscreteScheduler.from_config(SVD_SCHEDULER, **TRAILING)
    scheduler.set_timesteps(steps)
    denoise = Denoiser("epsilon")
    end = sample_euler(denoise, draw_noise(), trailing_sigmas(steps, svd_alpha_bar()))
    assert_equal_paths([*denoise.met, end], walk(scheduler, denoise.met[0]))


@pytest.mark.parametrize("steps", [1, 8, 25])
def test_euler_is_ddim_on_an_epsilon_base(steps: int) -> None:
    """In DDIM's units, x = latents / sqrt(1 + sigma^2), the start included; steps that divide 1,000, as DDIM wants them."""
    scheduler = DDIMScheduler.from_config(SVD_SCHEDULER, **TRAILING, clip_sample=False)
    scheduler.set_timesteps(steps)
    theirs = walk(scheduler, draw_noise() * scheduler.init_noise_sigma)
    sigmas = trailing_sigmas(steps, svd_alpha_bar())
    denoise = Denoiser("epsilon")
    end = sample_euler(denoise, draw_noise(), sigmas)
    mine = [x / (1 + sigma**2).sqrt() for x, sigma in zip([*denoise.met, end], sigmas, strict=True)]
    assert_equal_paths(mine, theirs)


def draw_renoise(i: int) -> Tensor:
    return torch.randn(2, 3, 4, 5, 6, generator=torch.Generator().manual_seed(100 + i))


@pytest.mark.parametrize("sigma_min", [0.002, 0.5])  # at SVD's own the noise that D holds is too little to be seen
@pytest.mark.parametrize("steps", [1, 2, 6])
def test_lcm_is_a_consistency_models_sampler(steps: int, sigma_min: float) -> None:
    """With its sigmas, which end at sigma_min, every latent equals CMStochasticIterativeScheduler's.

    Its D = c_out raw + c_skip noisy has scalings of its own, so it is given the raw output that makes its D ours.
    """
    scheduler = CMStochasticIterativeScheduler(**SVD_TURBO | {"sigma_min": sigma_min}, clip_denoised=False)
    scheduler.set_timesteps(steps)
    mine = Denoiser("v")
    end = sample_lcm(mine, draw_noise(), scheduler.sigmas, draw_renoise)
    theirs, denoise = [mine.met[0]], Denoiser("v")
    for i, (time, sigma) in enumerate(zip(scheduler.timesteps, scheduler.sigmas[:-1], strict=True)):
        scheduler.scale_model_input(theirs[-1], time)
        c_skip, c_out = scheduler.get_scalings_for_boundary_condition(sigma)
        raw = (denoise(theirs[-1], sigma.expand(2)) - c_skip * theirs[-1]) / c_out
        generator = torch.Generator().manual_seed(100 + i)
        theirs.append(scheduler.step(raw, time, theirs[-1], generator=generator).prev_sample)
    assert_equal_paths([*mine.met, end], theirs)


@pytest.mark.parametrize("prediction, parameterization", [("epsilon", "epsilon"), ("v_prediction", "v")])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_lcm_is_lcms_sampler(prediction: str, parameterization: str, steps: int) -> None:
    """With sigmas that end at 0 every latent equals LCMScheduler's, in its units and from its start.

    Its own boundary scalings, c_out = 1 and c_skip = 0 to 1e-7 at these timesteps, are left as they are.
    """
    scheduler = LCMScheduler.from_config(SVD_SCHEDULER, prediction_type=prediction)
    scheduler.set_timesteps(steps)
    sigmas = torch.cat([sigma_from_alpha_bar(svd_alpha_bar()[scheduler.timesteps]), torch.zeros(1)])
    mine = Denoiser(parameterization)
    end = sample_lcm(mine, draw_noise(), sigmas, draw_renoise)
    network, theirs = make_network(), [draw_noise() * scheduler.init_noise_sigma]
    for i, (t, sigma) in enumerate(zip(scheduler.timesteps, sigmas[:-1], strict=True)):
        raw = network(theirs[-1], t if parameterization == "epsilon" else sigma.log() / 4)
        generator = torch.Generator().manual_seed(100 + i)
        theirs.append(scheduler.step(raw, t, theirs[-1], generator=generator).prev_sample)
    assert_equal_paths([x / (1 + s**2).sqrt() for x, s in zip([*mine.met, end], sigmas, strict=True)], theirs)


def test_lcm_draws_no_noise_for_the_last_step() -> None:
    """The last step returns D as it is, and one step draws nothing."""
    asked, z = [], draw_noise()
    renoise = lambda i: asked.append(i) or draw_renoise(i)  # noqa: E731
    for steps in (1, 4):
        asked.clear()
        end = sample_lcm(lambda *_: z, draw_noise(), lcm_sigmas(steps, 0.002, 700.0), renoise)
        assert end is z and asked == list(range(steps - 1))


@pytest.mark.parametrize("sampler", ["euler", "lcm"])
def test_on_step_sees_and_changes_every_step(sampler: str) -> None:
    """It is called after each step with what the step left, and what it returns is what the next step gets."""
    sigmas, seen, denoise = lcm_sigmas(3, 0.002, 700.0), [], Denoiser("v")

    def on_step(i: int, latents_BTCHW: Tensor) -> Tensor:
        seen.append((i, latents_BTCHW))
        return 2 * latents_BTCHW

    def sample(**more: Any) -> Tensor:
        if sampler == "euler":
            return sample_euler(denoise, draw_noise(), sigmas, **more)
        return sample_lcm(denoise, draw_noise(), sigmas, draw_renoise, **more)

    end = sample(on_step=on_step)
    assert [i for i, _ in seen] == [0, 1, 2] and torch.equal(end, 2 * seen[2][1])
    assert all(torch.equal(denoise.met[i + 1], 2 * seen[i][1]) for i in (0, 1))
    plain = sample()
    assert torch.equal(denoise.met[4], seen[0][1])  # without on_step the second step gets what the first left
    assert torch.equal(sample(on_step=lambda _, latents: latents), plain)


def test_perfect_denoiser_arrives_at_the_truth() -> None:
    """Where the network knows z, any number of steps ends at z."""
    z, noise = torch.randn(2, 1, 3, 4, 5, 6, generator=torch.Generator().manual_seed(3))
    for steps in (1, 5, 30):
        assert torch.allclose(sample_euler(lambda *_: z, noise, karras_sigmas(steps, 0.002, 700.0)), z, atol=1e-3)


@pytest.mark.parametrize("frames", [3, 5, 9, 17])
def test_bisect_halves_in_order(frames: int) -> None:
    """Each frame is made once, at its place between two frames that exist, and halvings says how far they are.

    Of three gaps those of one level are made together.
    """
    made, places, gap = [], [], frames - 1

    def midpoints(pairs: list[Any], level: Any, halvings: int) -> list[Tensor]:
        for (left, right), place in zip(pairs, level, strict=True):
            distance = (right - left).item() * gap  # in frames of the result
            assert distance == 2 ** (halvings + 1) and (left + right).item() * gap == 2 * place
        made.append(halvings)
        places.extend(level)
        return [(left + right) / 2 for left, right in pairs]

    filled = bisect(frames, midpoints, [torch.tensor(float(i)) for i in range(4)])
    assert [f.item() for f in filled] == [i / gap for i in range(3 * gap + 1)]
    assert made == list(range(len(made)))[::-1] and sorted(places) == [i for i in range(3 * gap) if i % gap]


def test_bisect_returns_the_stills_themselves() -> None:
    """The stills are not copied or passed through anything."""
    stills = list(torch.rand(3, 3, 4, 4))
    filled = bisect(5, lambda pairs, *_: [(left + right) / 2 for left, right in pairs], stills)
    assert all(filled[4 * i].data_ptr() == still.data_ptr() for i, still in enumerate(stills))


@pytest.mark.parametrize("frames", [-1, 0, 1, 2, 4, 6, 7, 10])
def test_bisect_refuses_other_counts(frames: int) -> None:
    """Only 2^n + 1 frames can be made by halving; the error lists them."""
    with pytest.raises(ValueError, match=f"^{frames} frames: .*3, 5, 9, 17"):
        bisect(frames, lambda pairs, *_: [torch.zeros(())] * len(pairs), [torch.zeros(())] * 2)
