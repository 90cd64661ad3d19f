"""From a batch to a loss, from two stills to the frames between. Run: pytest tests/run/test_framer.py"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.model.control import make_controlnet
from toolkit.config import DiffusionConfig, ModelConfig
from toolkit.data.loader import Batch
from toolkit.data.trajectory import draw_heatmaps, match_stills
from toolkit.diffusion.sampler import sample_euler
from toolkit.diffusion.schedule import karras_sigmas
from toolkit.errors import UserError
from toolkit.model.base import Base, load_base
from toolkit.model.controlnet import FramerControlNet
from toolkit.model.encoders import decode_latents, embed_stills
from toolkit.rng import rng
from toolkit.run.framer import Condition, Framer, Sampling, Steering, check_objective, to_signed, to_uint8

SIZE_PX = 16
LATENT = SIZE_PX // 2
SCALING = 0.18215
LAYOUTS = ("spec_middle", "framer_clip", "middle_in_clip")
BETA = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
SIGMA = (1 / (1 - BETA).cumprod(0) - 1).sqrt().float()  # of each whole timestep
every_layout = pytest.mark.parametrize("layout", LAYOUTS)
either = pytest.mark.parametrize("parameterization", ["v", "epsilon"])


@pytest.fixture(scope="module")
def base(tiny_base: Path) -> Base:
    """The tiny base with every silent weight of its UNet stirred, so that tokens, ids and neighbours matter."""
    base = load_base(ModelConfig(base=str(tiny_base)), torch.device("cpu"), "fp32")
    stir(base.unet)
    return base


@pytest.fixture(scope="module")
def controlnet(base: Base) -> FramerControlNet:
    """A ControlNet of the tiny base whose last convolutions are awake."""
    return make_controlnet(base.unet, factor=SIZE_PX // LATENT, awake=True)


@torch.no_grad()
def stir(network: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


def make_framer(base: Base, window: int = 5, seed: int = 3, controlnet: Any = None, **diffusion: Any) -> Framer:
    return Framer(base, DiffusionConfig(**diffusion), window, seed, controlnet)


def make_batch(positions: list[int], window: int = 5) -> Batch:
    """Random clips, each a function of its position, as its rate and motion are."""
    pixels = [np.random.default_rng(k).integers(0, 256, (window, SIZE_PX, SIZE_PX, 3), np.uint8) for k in positions]
    return Batch(
        torch.from_numpy(np.stack(pixels)),
        torch.tensor([5.0 + k for k in positions]),
        torch.tensor([100.0 + k for k in positions]),
        positions,
        [str(k) for k in positions],
        [],
    )


def stills_of(batch: Batch) -> Tensor:
    return to_signed(batch.frames_BTHWC)[:, [0, -1]]


def draw(purpose: str, position: int, frames: int) -> Tensor:
    """The draw of seed 3 for a clip's latents."""
    return torch.randn(frames, 4, LATENT, LATENT, generator=rng(3, purpose, position))


def encode_by_hand(base: Base, batch: Batch, b: int, frames: list[int]) -> tuple[Tensor, Tensor]:
    """Scaled latents of some frames of clip b, drawn from the VAE's posterior, and the unscaled modes of its ends."""
    with torch.no_grad():
        posterior = base.vae.encode(to_signed(batch.frames_BTHWC)[b]).latent_dist
    noise = draw("posterior", batch.positions[b], len(frames))
    return SCALING * (posterior.mean[frames] + posterior.std[frames] * noise), posterior.mode()[[0, -1]]


class Call(NamedTuple):
    """What the UNet is given once."""

    sample: Tensor
    time: Tensor
    tokens: Tensor
    ids: Tensor


class Spy:
    """Records what a network is given; the ControlNet's heatmaps and scale too."""

    NAMES = ("sample", "timestep", "encoder_hidden_states", "added_time_ids", "heatmaps", "scale")

    def __init__(self, network: nn.Module) -> None:
        self.calls: list[Call] = []
        self.steering: list[tuple[Tensor, float]] = []
        self.hook = network.register_forward_pre_hook(self.record, with_kwargs=True)

    def record(self, _: nn.Module, args: tuple, kwargs: dict) -> None:
        named = dict(zip(self.NAMES, args, strict=False)) | kwargs
        self.calls.append(Call(*(named[name].detach().clone() for name in self.NAMES[:4])))
        if "heatmaps" in named:
            self.steering.append((named["heatmaps"], named["scale"]))

    def __enter__(self) -> "Spy":
        return self

    def __exit__(self, *_: Any) -> None:
        self.hook.remove()


class Oracle(nn.Module):
    """Stands in for a UNet that has nothing left to learn: it knows the clean latents, and answers v or the noise."""

    device = torch.device("cpu")

    def __init__(self, z_BTCHW: Tensor, parameterization: str) -> None:
        super().__init__()
        self.mask_token = nn.Parameter(torch.zeros(1, 1, 4, 1, 1), requires_grad=False)
        self.z_BTCHW, self.parameterization = z_BTCHW, parameterization

    def forward(self, sample: Tensor, timestep: Tensor, **_: Any) -> tuple[Tensor]:
        x, z = sample[:, :, :4].double(), self.z_BTCHW.double()
        sigma = sigma_of(timestep, self.parameterization).double().view(-1, 1, 1, 1, 1)
        noise = ((1 + sigma**2).sqrt() * x - z) / sigma
        v = (noise - sigma * z) / (1 + sigma**2).sqrt()
        return ((v if self.parameterization == "v" else noise).float(),)


def sigma_of(time_B: Tensor, parameterization: str) -> Tensor:
    """The noise level that a UNet's time stands for: exp(4 time), or that of a whole timestep."""
    if parameterization == "v":
        return (4 * time_B).exp()
    assert time_B.dtype == torch.float32 and torch.equal(time_B, time_B.round())
    return SIGMA[time_B.long()]


def make_oracle(base: Base, z_BTCHW: Tensor, parameterization: Any) -> Base:
    return replace(base, unet=Oracle(z_BTCHW, parameterization), parameterization=parameterization)


# ---- training


@pytest.mark.parametrize(("layout", "noise_augmentation"), [(name, 0.0) for name in LAYOUTS] + [("framer_clip", 0.1)])
def test_loss_is_a_function_of_positions(base: Base, layout: str, noise_augmentation: float) -> None:
    """The same batch scores the same to the bit, whatever was drawn between; other positions draw other noise."""
    framer, batch = make_framer(base, layout=layout, noise_augmentation=noise_augmentation), make_batch([4, 9])
    loss_B, zero_B, _ = framer.compute_loss(batch)
    torch.manual_seed(1)
    framer.compute_loss(make_batch([77]))
    again_B, zero_again_B, _ = framer.compute_loss(batch)
    assert torch.equal(loss_B, again_B) and torch.equal(zero_B, zero_again_B)
    moved = Batch(batch.frames_BTHWC, batch.fps_B, batch.motion_B, [5, 10], batch.keys, [])
    assert not torch.isclose(framer.compute_loss(moved)[0], loss_B).any()
    assert not torch.isclose(make_framer(base, seed=4, layout=layout).compute_loss(batch)[0], loss_B).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_layout
def test_batch_of_two_equals_two_of_one(base: Base, layout: str, dtype: torch.dtype) -> None:
    """How clips are grouped into micro-batches does not change what each scores."""
    framer = make_framer(replace(base, dtype=dtype), layout=layout, noise_augmentation=0.05, conditioning_dropout=0.2)
    both, zero_both, _ = framer.compute_loss(make_batch([4, 9]))
    assert both.shape == zero_both.shape == (2,) and both.dtype == zero_both.dtype == torch.float32
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for b, position in enumerate([4, 9]):
        loss_B, zero_B, _ = framer.compute_loss(make_batch([position]))
        assert torch.allclose(loss_B[0], both[b], rtol=tolerance) and torch.allclose(zero_B[0], zero_both[b], rtol=1e-5)


@pytest.mark.parametrize("scale_conditioning", [False, True])
@pytest.mark.parametrize(
    ("parameterization", "noise_sampler"), [("v", "uniform_t"), ("v", "lognormal"), ("epsilon", "uniform_t")]
)
@every_layout
def test_training_input_by_hand(
    base: Base, layout: str, parameterization: Any, noise_sampler: str, scale_conditioning: bool
) -> None:
    """Every tensor that reaches the UNet in training, computed anew from the VAE, the keys and the equations."""
    settings = {"layout": layout, "noise_sampler": noise_sampler, "scale_conditioning": scale_conditioning}
    framer, batch = make_framer(replace(base, parameterization=parameterization), **settings), make_batch([4, 9])
    with Spy(base.unet) as spy:
        framer.compute_loss(batch)
    (call,) = spy.calls
    frames = [2] if layout == "spec_middle" else list(range(5))
    assert call.sample.shape == (2, len(frames), 9, LATENT, LATENT)
    for b, k in enumerate(batch.positions):
        z, modes = encode_by_hand(base, batch, b, frames)
        if noise_sampler == "lognormal":
            sigma = (0.7 + 1.6 * torch.randn(1, generator=rng(3, "sigma", k))).exp()
        else:
            t = int(torch.rand(1, generator=rng(3, "sigma", k)) * 1000)
            sigma = SIGMA[t]
        noise = draw("noise", k, len(frames))
        assert torch.allclose(call.sample[b, :, :4], (z + sigma * noise) / (1 + sigma**2).sqrt(), atol=1e-4)
        if parameterization == "v":
            assert torch.allclose(call.time[b], sigma.log() / 4, atol=1e-5)
        else:
            assert call.time[b] == t

        ends = modes * (SCALING if scale_conditioning else 1)
        if layout == "spec_middle":
            assert torch.allclose(call.sample[b, 0, 4:8], (ends[0] + ends[1]) / 2, atol=1e-4)
            assert (call.sample[b, :, 8] == 1).all()
        else:
            assert torch.allclose(call.sample[b, [0, -1], 4:8], ends, atol=1e-4)
            assert torch.equal(call.sample[b, 1:-1, 4:8], base.unet.mask_token[0].expand(3, 4, LATENT, LATENT))
            assert call.sample[b, :, 8].mean((1, 2)).tolist() == [0, 1, 1, 1, 0]
        tokens = embed_stills(base.image_encoder, stills_of(batch)[b : b + 1])[0]
        assert torch.allclose(call.tokens[b], tokens, atol=1e-5)
        assert call.ids[b].tolist() == [5 + k - 1, 100 + k, 0]


def test_noise_augmentation_reaches_the_stills_only(base: Base) -> None:
    """Pixel noise of the set strength on the conditioning latents, told as third id; targets and tokens are clean."""
    batch = make_batch([4, 9])
    calls = []
    for strength in (0.0, 0.2):
        with Spy(base.unet) as spy:
            make_framer(base, layout="framer_clip", noise_augmentation=strength).compute_loss(batch)
        calls += spy.calls
    clean, noisy = calls
    assert torch.equal(clean.sample[:, :, :4], noisy.sample[:, :, :4]) and torch.equal(clean.tokens, noisy.tokens)
    # the tiny VAE's latents are 12 x the mean of 2x2 pixels: noise of std 0.2 arrives with 12 x 0.2 / 2
    assert (noisy.sample - clean.sample)[:, [0, -1], 4:7].std() == pytest.approx(1.2, rel=0.05)
    assert torch.equal(clean.sample[:, 1:-1], noisy.sample[:, 1:-1])
    assert clean.ids[:, 2].tolist() == [0, 0] and noisy.ids[:, 2].tolist() == pytest.approx([0.2, 0.2])


@every_layout
def test_conditioning_is_dropped_by_position(base: Base, layout: str) -> None:
    """Each clip's own draw says what it loses: its tokens, its ends, or both; all else is as without dropout.

    Mask, mask token, ids, noise and targets stay, and a clip that loses nothing scores the same to the bit.
    """
    batch = make_batch(list(range(12)), 3)
    calls, losses = [], []
    for rate in (0.0, 0.2):
        with Spy(base.unet) as spy:
            losses.append(make_framer(base, 3, layout=layout, conditioning_dropout=rate).compute_loss(batch))
        calls += spy.calls
    whole, dropped = calls
    for b in range(12):
        r = torch.rand(1, generator=rng(3, "conditioning_dropout", b)).item()
        no_tokens, no_ends = r < 0.4, 0.2 <= r < 0.6
        assert torch.equal(dropped.tokens[b], whole.tokens[b] * (not no_tokens))
        wanted = whole.sample[b].clone()
        if no_ends:
            wanted[[0, -1], 4:8] = 0  # spec_middle's only frame holds the mean of the two
        assert torch.equal(dropped.sample[b], wanted)
        same = torch.equal(losses[0][0][b], losses[1][0][b])
        assert same == (not (no_tokens or no_ends))
    kinds = {(bool(dropped.tokens[b].any()), bool(dropped.sample[b, 0, 4:8].any())) for b in range(12)}
    assert len(kinds) == 4  # nothing, tokens, ends and both are all lost by some clip
    assert torch.equal(dropped.time, whole.time) and torch.equal(dropped.ids, whole.ids)
    assert torch.equal(losses[0][1], losses[1][1])


def test_clip_tokens(base: Base) -> None:
    """The spec's single token is the average of the two; plain SVD's is the first."""
    batch, tokens = make_batch([4]), {}
    for mode in ("first_last", "mean", "first"):
        with Spy(base.unet) as spy:
            make_framer(base, clip_tokens=mode).compute_loss(batch)
        tokens[mode] = spy.calls[0].tokens
    both = tokens["first_last"]
    assert both.shape == (1, 2, 32) and torch.allclose(both.mean(1, keepdim=True), tokens["mean"])
    assert torch.equal(both[:, :1], tokens["first"])


@pytest.mark.parametrize("space", ["epsilon", "v"])
def test_layouts_differ_in_what_they_score(base: Base, space: str) -> None:
    """middle_in_clip feeds the network as framer_clip does; the loss is that of the middle frame, or of all frames."""
    batch, raws, losses = make_batch([4], 3), [], []
    hook = base.unet.register_forward_hook(lambda *args: raws.append(args[2][0].detach().double()))
    try:
        with Spy(base.unet) as spy:
            for layout in ("framer_clip", "middle_in_clip"):
                losses.append(make_framer(base, 3, layout=layout, loss_space=space).compute_loss(batch)[0].item())
    finally:
        hook.remove()
    assert torch.equal(*raws) and all(torch.equal(a, b) for a, b in zip(*spy.calls, strict=True))
    x, sigma = spy.calls[0].sample[:, :, :4].double(), (4 * spy.calls[0].time.double()).exp()
    noise = draw("noise", 4, 3)
    z = x * (1 + sigma**2).sqrt() - sigma * noise
    if space == "v":
        error = raws[0] - (noise - sigma * z) / (1 + sigma**2).sqrt()
    else:
        error = (raws[0] + sigma * x) / (1 + sigma**2).sqrt() - noise
    assert losses == pytest.approx([error.square().mean().item(), error[:, 1].square().mean().item()], rel=1e-3)


def test_training_steers_by_what_the_stills_show(base: Base, controlnet: FramerControlNet) -> None:
    """Each clip's own matched points, at half the scale, drawn in the frames that enter the UNet."""
    picture = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8).repeat(4, 1).repeat(4, 2)
    frames = np.stack([picture, np.roll(picture, 4, 2), np.roll(picture, 8, 2)], 1)
    found = [match_stills(first, last) for first, _, last in frames]
    batch = replace(make_batch([4, 9], 3), frames_BTHWC=torch.from_numpy(frames), points=found)
    with Spy(controlnet) as spy:
        make_framer(base, 3, controlnet=controlnet, control=True).compute_loss(batch)
    ((heatmaps, scale),) = spy.steering
    assert heatmaps.shape == (2, 3, 3, 64, 64) and scale == 0.5
    for b, points in enumerate(found):
        assert len(points)
        between = np.stack([points[:, 0], points.mean(1), points[:, 1]], 1)
        assert torch.equal(heatmaps[b], torch.from_numpy(draw_heatmaps(between, 64, 64)))


def test_only_training_keeps_a_graph(base: Base) -> None:
    """The loss can be differentiated by a weight of the UNet; sampled latents cannot, and so hold no activations."""
    framer, batch, sampled = make_framer(base, 3), make_batch([4], 3), []

    def on_step(step: int, latents_BTCHW: Tensor) -> Tensor:
        sampled.append(latents_BTCHW)
        return latents_BTCHW

    base.unet.mask_token.requires_grad_(True)
    try:
        loss_B, zero_B, _ = framer.compute_loss(batch)
        framer.generate(stills_of(batch), batch.fps_B, batch.motion_B, Sampling(1), [0], on_step=on_step)
    finally:
        base.unet.mask_token.requires_grad_(False)
    assert loss_B.requires_grad and not zero_B.requires_grad and not sampled[0].requires_grad


# ---- objectives


@either
@every_layout
def test_a_network_that_knows_the_clip_is_perfect(base: Base, layout: str, parameterization: str) -> None:
    """Whatever its raw output means, it has no loss in any space, and both samplers end at the clip's latents."""
    batch = make_batch([4, 9])
    frames = [2] if layout == "spec_middle" else list(range(5))
    z = torch.stack([encode_by_hand(base, batch, b, frames)[0] for b in (0, 1)])
    knowing = make_oracle(base, z, parameterization)
    for space in ("epsilon", "v", "edm"):
        loss_B, zero_B, _ = make_framer(knowing, layout=layout, loss_space=space).compute_loss(batch)
        assert loss_B.max() < 1e-6 and zero_B.min() > 0.1
    framer = make_framer(knowing, layout=layout)
    condition = framer.condition(stills_of(batch), batch.fps_B, batch.motion_B)
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
    for sampler in ("euler", "lcm"):
        assert torch.allclose(framer.sample(condition, Sampling(3, sampler), noise, lambda _: noise), z, atol=1e-3)


@pytest.mark.parametrize(
    ("parameterization", "settings", "message"),
    [
        ("v", {"parameterization": "epsilon"}, "is epsilon, but the base's scheduler says v: .*take auto"),
        ("epsilon", {"parameterization": "v"}, "is v, but the base's scheduler says epsilon: .*take auto"),
        ("epsilon", {"noise_sampler": "lognormal"}, "diffusion: noise sampler lognormal .*use uniform_t"),
    ],
)
def test_wrong_objectives_are_refused(base: Base, parameterization: Any, settings: dict, message: str) -> None:
    """A user's mistake, told from settings and scheduler alone, and by the Framer itself."""
    with pytest.raises(UserError, match=message):
        check_objective(DiffusionConfig(**settings), parameterization)
    with pytest.raises(UserError, match=message):
        make_framer(replace(base, parameterization=parameterization), **settings)


@either
def test_right_objectives_are_what_the_base_says(parameterization: str) -> None:
    """auto takes the base's word, and so does the same word; every loss space will do."""
    for named in ("auto", parameterization):
        for space in ("epsilon", "v", "edm"):
            settings = DiffusionConfig(parameterization=named, loss_space=space)
            assert check_objective(settings, parameterization) == parameterization
    assert check_objective(DiffusionConfig(noise_sampler="lognormal"), "v") == "v"


# ---- sampling


@either
def test_inference_input_is_the_training_input(base: Base, parameterization: Any) -> None:
    """The same clip gives the same conditioning channels, mask, tokens and ids in training and while sampling."""
    batch = make_batch([0])
    for layout in LAYOUTS:
        framer = make_framer(replace(base, parameterization=parameterization), layout=layout, noise_augmentation=0.1)
        with Spy(base.unet) as spy:
            framer.compute_loss(batch)
            framer.generate(stills_of(batch), batch.fps_B, batch.motion_B, Sampling(3), [0])
        trained, *sampled = spy.calls
        for call in sampled:
            assert torch.allclose(call.sample[:, :, 4:], trained.sample[:, :, 4:], atol=1e-5)
            assert torch.equal(call.tokens, trained.tokens) and torch.equal(call.ids, trained.ids)
        times = torch.cat([call.time for call in sampled])
        if parameterization == "v":
            assert torch.allclose(times, karras_sigmas(3, 0.002, 700.0)[:-1].log() / 4)
        else:
            assert times.tolist() == [999, 666, 332]
        noise = draw("sample", 0, sampled[0].sample.shape[1])
        assert torch.allclose(sampled[0].sample[0, :, :4], noise, atol=1e-5)  # unit variance at the start


def walk_by_hand(framer: Framer, noise_BTCHW: Tensor, steps: int, ask: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Euler's method on what the network's raw answers say of the clean latents."""

    def denoise(noisy_BTCHW: Tensor, sigma_B: Tensor) -> Tensor:
        sigma = sigma_B.view(-1, 1, 1, 1, 1)
        x_BTCHW = noisy_BTCHW / (1 + sigma**2).sqrt()
        raw_BTCHW = ask(x_BTCHW, sigma_B)
        if framer.base.parameterization == "epsilon":
            return (1 + sigma**2).sqrt() * x_BTCHW - sigma * raw_BTCHW
        return (x_BTCHW - sigma * raw_BTCHW) / (1 + sigma**2).sqrt()

    return sample_euler(denoise, noise_BTCHW, framer.make_sigmas(Sampling(steps)))


def make_condition(framer: Framer, batch: Batch, steered: bool = False) -> tuple[Condition, Tensor]:
    """What is known of a batch's clips, steered by a point that crosses the picture if wanted; and noise to start from."""
    condition = framer.condition(stills_of(batch), batch.fps_B, batch.motion_B)
    if steered:
        points = Steering(np.array([[[3.0, 8.0], [13.0, 8.0]]]))
        condition = framer.steer(condition, [points] * 2, (SIZE_PX, SIZE_PX))
    return condition, torch.stack([draw("start", k, framer.layout.frames) for k in batch.positions])


@either
@pytest.mark.parametrize("layout", ["spec_middle", "framer_clip"])
@torch.no_grad()
def test_guidance_of_one_is_none(base: Base, layout: str, parameterization: Any) -> None:
    """The latents of the conditional answer alone to the bit, and the network is asked for no other."""
    framer = make_framer(replace(base, parameterization=parameterization), layout=layout)
    condition, noise = make_condition(framer, make_batch([4, 9]))
    with Spy(base.unet) as spy:
        latents = framer.sample(condition, Sampling(2, min_guidance=1.0, max_guidance=1.0), noise)
    assert [len(call.sample) for call in spy.calls] == [2, 2]
    wanted = walk_by_hand(framer, noise, 2, lambda x, sigma_B: framer.predict(x, sigma_B, condition))
    assert torch.equal(latents, wanted)


@pytest.mark.parametrize("steered", [False, True])
@pytest.mark.parametrize(
    ("layout", "parameterization", "scale"),
    [
        ("framer_clip", "v", [1.0, 1.5, 2.0, 2.5, 3.0]),
        ("middle_in_clip", "epsilon", [1.0, 1.5, 2.0, 2.5, 3.0]),
        ("spec_middle", "v", [2.0]),
    ],
)
@torch.no_grad()
def test_guidance_by_hand(
    base: Base, controlnet: FramerControlNet, layout: str, parameterization: Any, scale: list[float], steered: bool
) -> None:
    """One call answers with and without the stills, which are weighed by a scale that rises over the window.

    Without them tokens and ends are zero; noisy latents, mask, mask token, ids and steering are the same.
    """
    framer = make_framer(replace(base, parameterization=parameterization), controlnet=controlnet, layout=layout)
    condition, noise = make_condition(framer, make_batch([4, 9]), steered)
    with Spy(base.unet) as spy:
        latents = framer.sample(condition, Sampling(2, min_guidance=1.0, max_guidance=3.0), noise)
    for call in spy.calls:
        known, free = (Call(*halves) for halves in zip(*(tensor.chunk(2) for tensor in call), strict=True))
        assert len(known.sample) == 2 and not free.tokens.any() and torch.equal(known.tokens, condition.tokens_BND)
        without = known.sample.clone()
        without[:, [0, -1], 4:8] = 0
        assert torch.equal(free.sample, without) and known.sample[:, 0, 4:8].any()
        assert torch.equal(free.time, known.time) and torch.equal(free.ids, known.ids)

    nothing = replace(condition, ends_B2CHW=condition.ends_B2CHW * 0, tokens_BND=condition.tokens_BND * 0)
    scale_T = torch.tensor(scale).view(-1, 1, 1, 1)

    def ask(x_BTCHW: Tensor, sigma_B: Tensor) -> Tensor:
        known, free = (framer.predict(x_BTCHW, sigma_B, given) for given in (condition, nothing))
        return free + scale_T * (known - free)

    wanted = walk_by_hand(framer, noise, 2, ask)
    assert torch.allclose(latents, wanted, rtol=1e-3, atol=1e-3 * wanted.abs().max())
    plain = framer.sample(condition, Sampling(2), noise)
    assert not torch.allclose(latents, plain, rtol=1e-2, atol=1e-2 * wanted.abs().max())


@either
def test_lcm_draws_new_noise_by_positions(base: Base, parameterization: str) -> None:
    """Each step but the last noises the denoised latents again, with a draw of its own for each clip's position.

    The noise levels are AnimateLCM-SVD's, every tenth of 40 for four steps, or the timesteps of an epsilon base.
    """
    batch = make_batch([4, 9])
    z = torch.randn(2, 5, 4, LATENT, LATENT, generator=torch.Generator().manual_seed(0))
    framer = make_framer(make_oracle(base, z, parameterization), layout="framer_clip")
    with Spy(framer.base.unet) as spy:
        made = framer.generate(stills_of(batch), batch.fps_B, batch.motion_B, Sampling(4, "lcm"), [4, 9])
    first, *later = spy.calls
    levels = [sigma_of(call.time, parameterization)[0] for call in spy.calls]
    wanted = karras_sigmas(40, 0.002, 700.0)[:40:10] if parameterization == "v" else SIGMA[[999, 749, 499, 249]]
    assert torch.allclose(torch.stack(levels), wanted, rtol=1e-4)
    for b, k in enumerate([4, 9]):
        assert torch.allclose(first.sample[b, :, :4], draw("sample", k, 5), atol=1e-5)
        for i, call in enumerate(later):
            sigma = levels[i + 1]
            noised = (z[b] + sigma * draw(f"renoise{i}", k, 5)) / (1 + sigma**2).sqrt()
            assert torch.allclose(call.sample[b, :, :4], noised, atol=2e-4)
    assert torch.allclose(made, decode_latents(base.vae, z / SCALING), atol=1e-4)


@pytest.mark.parametrize(("layout", "sampler"), [("spec_middle", "euler"), ("framer_clip", "lcm")])
def test_clips_generated_together_are_each_alone(base: Base, layout: str, sampler: Any) -> None:
    """Frames follow from stills and position, guided or not, whatever else is in the batch; the seed moves them."""
    framer, batch = make_framer(base, 3, layout=layout, noise_augmentation=0.05), make_batch([4, 9], 3)
    sampling = Sampling(2, sampler, max_guidance=2.0)
    both = framer.generate(stills_of(batch), batch.fps_B, batch.motion_B, sampling, [4, 9])
    assert both.shape == (2, framer.layout.frames, 3, SIZE_PX, SIZE_PX)
    for b, k in enumerate([4, 9]):
        one = make_batch([k], 3)
        alone = framer.generate(stills_of(one), one.fps_B, one.motion_B, sampling, [k])
        assert torch.allclose(alone[0], both[b], atol=1e-3)
        middle = framer.generate(stills_of(one), one.fps_B, one.motion_B, sampling, [k])[:, framer.layout.frames // 2]
        assert torch.equal(middle, alone[:, 0 if layout == "spec_middle" else 1])
        framer.seed = 4
        assert not torch.allclose(
            framer.generate(stills_of(one), one.fps_B, one.motion_B, sampling, [k]), alone, atol=1e-2
        )
        framer.seed = 3


def test_decoder_works_in_chunks(base: Base) -> None:
    """The VAE decodes as many frames at once as the sampling says, and all of a clip by default: the same frames."""
    batch, decoded, made = make_batch([4]), [], []
    hook = base.vae.decoder.conv_in.register_forward_pre_hook(lambda _, args: decoded.append(len(args[0])))
    try:
        for chunk_frames in (None, 2):
            sampling = Sampling(1, chunk_frames=chunk_frames)
            made.append(make_framer(base).generate(stills_of(batch), batch.fps_B, batch.motion_B, sampling, [0]))
    finally:
        hook.remove()
    assert decoded == [5, 2, 2, 1] and torch.allclose(*made, atol=1e-5)


@pytest.mark.parametrize(("sampler", "most"), [("euler", 1000), ("lcm", 40)])
def test_number_of_steps(sampler: Any, most: int) -> None:
    """From one to as many as there are noise levels; others are refused before anything is loaded."""
    for steps in (1, most):
        assert Sampling(steps, sampler).steps == steps
    for steps in (0, most + 1):
        with pytest.raises(UserError, match=f"^{steps} sampler steps: sampler {sampler} takes 1 to {most}"):
            Sampling(steps, sampler)


@pytest.mark.parametrize("sampler", ["euler", "lcm"])
def test_answers_that_are_no_numbers_are_refused(base: Base, sampler: Any) -> None:
    """One that is not finite is told as an error, and never decoded to a frame."""
    z = torch.zeros(1, 5, 4, LATENT, LATENT)
    z[0, 2, 0, 0, 0] = torch.nan
    batch = make_batch([4])
    with pytest.raises(UserError, match="answer is not a finite number"):
        framer = make_framer(make_oracle(base, z, "v"))
        framer.generate(stills_of(batch), batch.fps_B, batch.motion_B, Sampling(2, sampler), [0])


# ---- gaps


@every_layout
@pytest.mark.parametrize("frames", [3, 5])
def test_interpolation_keeps_the_ends(base: Base, layout: str, frames: int) -> None:
    """As many frames as asked, the stills at the ends untouched, all between in range, the same each time."""
    framer = make_framer(base, 3, layout=layout)
    stills = stills_of(make_batch([1], 3))[0]
    made = framer.interpolate(stills, frames, 7, 127, Sampling(1))
    assert made.shape == (frames, 3, SIZE_PX, SIZE_PX) and made.dtype == torch.float32
    assert torch.equal(made[[0, -1]], stills)
    assert made.isfinite().all() and made.abs().max() <= 1
    assert torch.equal(framer.interpolate(stills, frames, 7, 127, Sampling(1)), made)


def test_clip_layouts_fill_their_own_window_at_once(base: Base) -> None:
    """The window's own length, 7 here, takes one sampling for a clip layout; other lengths halve, or are refused."""
    stills = stills_of(make_batch([1], 3))[0]
    framer = make_framer(base, 7, layout="framer_clip")
    for frames, samplings in ((7, 1), (5, 3)):
        seen = []

        def on_step(step: int, latents: Tensor, seen: list[int] = seen) -> Tensor:
            seen.append(step)
            return latents

        with Spy(base.unet) as spy:
            made = framer.interpolate(stills, frames, 7, 127, Sampling(2), on_step=on_step)
        assert len(made) == frames and framer.count_samplings(frames) == samplings
        assert [call.sample.shape[1] for call in spy.calls] == [7] * 2 * samplings and seen == [0, 1] * samplings
    for refused in (4, 6, 11):
        with pytest.raises(ValueError, match="3, 5, 9, 17"):
            framer.interpolate(stills, refused, 7, 127, Sampling(2))
    with pytest.raises(ValueError, match="3, 5, 9, 17"):
        make_framer(base, 7, layout="spec_middle").interpolate(stills, 7, 7, 127, Sampling(2))


def test_even_windows_are_filled_but_never_halved(base: Base) -> None:
    """Framer's own windows are even: all their frames at once, and no other number, since none lies in the middle."""
    stills = stills_of(make_batch([1], 3))[0]
    framer = make_framer(base, 4, layout="framer_clip")
    assert len(framer.interpolate(stills, 4, 7, 127, Sampling(1))) == 4
    with pytest.raises(ValueError, match="5 frames: windows of 4 have no middle"):
        framer.interpolate(stills, 5, 7, 127, Sampling(1))


@pytest.mark.parametrize("fps", [8, 8.0])
def test_interpolation_tells_the_rate_of_its_windows(base: Base, fps: float) -> None:
    """Halving 9 frames with windows of 5: the first gap, 8 intervals, holds 4 of a window, so half the rate.

    The rate may be a whole number, as a command line gives it, and the noise augmentation is told all the same.
    """
    stills = stills_of(make_batch([1], 3))[0]
    with Spy(base.unet) as spy:
        make_framer(base, 5, layout="spec_middle").interpolate(stills, 9, fps, 127, Sampling(1))
    assert [call.ids[0, 0].item() + 1 for call in spy.calls] == [4, 8, 8, 16, 16, 16, 16]
    with Spy(base.unet) as spy:
        framer = make_framer(base, 5, layout="framer_clip", noise_augmentation=0.25)
        framer.interpolate(stills, 5, fps, 127, Sampling(1))
    assert spy.calls[0].ids.tolist() == [[7, 127, 0.25]]


@every_layout
def test_noise_is_keyed_by_the_place_in_the_video(base: Base, layout: str) -> None:
    """Halving draws for the frame at place k from position k, in the third gap as in the first; a window at once from its
    first still's place, but for a layout of the middle alone."""
    stills = stills_of(make_batch([1, 2], 3)).flatten(0, 1)
    framer = make_framer(base, 3, layout=layout)
    with Spy(base.unet) as spy:
        framer.interpolate(stills, 5, 7, 127, Sampling(1))
        framer.interpolate(stills, 3, 7, 127, Sampling(1))
    at_once = [1, 3, 5] if layout == "spec_middle" else [0, 2, 4]
    for call, k in zip(spy.calls, [2, 6, 10, 1, 3, 5, 7, 9, 11, *at_once], strict=True):
        assert torch.allclose(call.sample[0, :, :4], draw("sample", k, framer.layout.frames), atol=1e-5)


@pytest.mark.parametrize(
    ("layout", "sampler", "frames", "calls"),
    [("spec_middle", "euler", 5, [1, 2, 2, 2, 2]), ("framer_clip", "lcm", 3, [1, 2])],
)
def test_pairs_are_filled_together_as_one_by_one(
    base: Base, controlnet: FramerControlNet, layout: str, sampler: Any, frames: int, calls: list[int]
) -> None:
    """Gaps with seeds and points of their own, some without any, give the same frames in fewer calls of the network."""
    stills = stills_of(make_batch([1, 2], 3)).flatten(0, 1)
    framer = make_framer(base, 3, controlnet=controlnet, layout=layout, noise_augmentation=0.05)
    steering = [Steering(np.array([[[4.0, 4.0], [x, 9.0]]]), 0.7) if x else None for x in (9.0, 0.0, 12.0)]
    made = {}
    for batch in (1, 2):
        with Spy(base.unet) as spy:
            made[batch] = framer.interpolate(stills, frames, 7, 127, Sampling(2, sampler), [3, 4, 5], steering, batch)
    assert [len(call.sample) for call in spy.calls] == [size for size in calls for _ in range(2)]
    assert made[1].shape == (3 * (frames - 1) + 1, 3, SIZE_PX, SIZE_PX)
    assert torch.allclose(made[1], made[2], atol=1e-3)
    alone = framer.interpolate(stills[:2], frames, 7, 127, Sampling(2, sampler), [3], steering[:1])
    assert torch.equal(alone, made[1][:frames])
    rest = framer.interpolate(stills[1:], frames, 7, 127, Sampling(2, sampler), [4, 5], steering[1:], first_gap=1)
    assert torch.equal(rest, made[1][frames - 1 :]), "a part of a video is what it is in the whole"
    other = framer.interpolate(stills, frames, 7, 127, Sampling(2, sampler), [3, 4, 6], steering)
    assert torch.equal(other[: 2 * frames - 1], made[1][: 2 * frames - 1]), "the seed is the last gap's own"
    assert not torch.allclose(other[-2], made[1][-2], atol=1e-2)


def test_each_gap_of_a_batch_follows_its_own_points(base: Base, controlnet: FramerControlNet) -> None:
    """Of three gaps the second has none; the other two are steered together, each by what is its own."""
    size_px = 48
    points = [np.array([[[5.0, 24.0], [43.0, 9.0]]]), None, np.array([[[40.0, 40.0], [10.0, 30.0]]])]
    stills = torch.rand(4, 3, size_px, size_px, generator=torch.Generator().manual_seed(0)) * 2 - 1
    framer = make_framer(base, 3, controlnet=controlnet, layout="spec_middle")
    with Spy(controlnet) as spy:
        steering = [None if p is None else Steering(p, 0.7) for p in points]
        framer.interpolate(stills, 3, 7, 127, Sampling(1), steering=steering, batch=3)
    ((heatmaps, scale),) = spy.steering
    middles = [p.mean(1, keepdims=True) for p in points if p is not None]
    wanted = [torch.from_numpy(draw_heatmaps(middle, size_px, size_px)) for middle in middles]
    assert torch.equal(heatmaps, torch.stack(wanted)) and scale == 0.7 and not torch.equal(*wanted)


@pytest.mark.parametrize(
    ("layout", "frames", "times"),
    [
        ("spec_middle", 5, [[0.5], [0.25], [0.75]]),
        ("framer_clip", 5, [[0, 0.5, 1], [0, 0.25, 0.5], [0.5, 0.75, 1]]),
        ("middle_in_clip", 3, [[0, 0.5, 1]]),
    ],
)
def test_steering_follows_the_part_of_the_gap(
    base: Base, controlnet: FramerControlNet, layout: str, frames: int, times: list[list[float]]
) -> None:
    """Each window shows where the points are at its own frames' times; the ControlNet else reads what the UNet reads."""
    size_px = 48  # smaller, and the picture's border would make every spot the same
    points = np.array([[[5.0, 24.0], [24.0, 9.0], [43.0, 24.0]], [[40.0, 40.0], [40.0, 40.0], [10.0, 40.0]]])
    stills = torch.rand(2, 3, size_px, size_px, generator=torch.Generator().manual_seed(0)) * 2 - 1
    framer = make_framer(base, 3, controlnet=controlnet, layout=layout)
    with Spy(controlnet) as spy, Spy(base.unet) as unet_spy:
        framer.interpolate(stills, frames, 7, 127, Sampling(1), steering=[Steering(points, scale=0.7)])
    assert len(spy.steering) == len(times)
    for (heatmaps, scale), times_T in zip(spy.steering, times, strict=True):
        along = [[np.interp(times_T, [0, 0.5, 1], axis) for axis in point.T] for point in points]
        wanted = draw_heatmaps(np.array(along).transpose(0, 2, 1), size_px, size_px)
        assert torch.equal(heatmaps[0], torch.from_numpy(wanted)) and scale == 0.7
    assert len({heatmaps.numpy().tobytes() for heatmaps, _ in spy.steering}) == len(times)
    for read, by_unet in zip(spy.calls, unet_spy.calls, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(read, by_unet, strict=True))


# ---- pixels


def test_pixels_survive_the_conversion() -> None:
    """uint8 to [-1, 1] and back is the identity for every value; channels move as they should."""
    frames = torch.arange(256, dtype=torch.uint8).repeat_interleave(3).view(1, 16, 16, 3).clone()
    frames[..., 1] = 255 - frames[..., 1]
    signed = to_signed(frames)
    assert signed.shape == (1, 3, 16, 16) and signed.min() == -1 and signed.max() == 1
    assert torch.equal(signed[:, 1], frames[..., 1].float() / 127.5 - 1)
    assert torch.equal(to_uint8(signed), frames)
