"""From a batch to a loss, from two stills to the frames between. Run: pytest tests/run/test_framer.py"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from toolkit.config import DataConfig, EngineConfig, RunConfig
from toolkit.data.loader import Batch
from toolkit.diffusion.conditioning import build_time_ids
from toolkit.diffusion.objective import denoise_from_v, scale_input, time_input
from toolkit.diffusion.sampler import sample_euler
from toolkit.diffusion.schedule import karras_sigmas
from toolkit.model.base import Base, load_base
from toolkit.model.encoders import decode_latents, embed_stills
from toolkit.model.unet import widen_conv_in
from toolkit.rng import rng
from toolkit.run.framer import Framer, to_signed, to_uint8

SIZE_PX = 16
LATENT = SIZE_PX // 2
SCALING = 0.18215
LAYOUTS = ("spec_middle", "framer_clip", "middle_in_clip")


@pytest.fixture(scope="module")
def base(tiny_base: Path) -> Base:
    """The tiny base with every silent weight of its UNet stirred, so that tokens, ids and neighbours matter."""
    base = load_base(str(tiny_base), None, None, torch.device("cpu"), "fp32")
    stir(base.unet)
    return base


@torch.no_grad()
def stir(unet: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in unet.parameters():
        parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


def make_framer(base: Base, frames: int = 5, seed: int = 3, precision: str = "fp32", **diffusion: Any) -> Framer:
    config = RunConfig(
        name="test",
        seed=seed,
        data=DataConfig(shards="", frames=frames, height=SIZE_PX, width=SIZE_PX),
        engine=EngineConfig(precision=precision),
        diffusion=diffusion,
    )
    return Framer(base, config)


def make_batch(positions: list[int], frames: int = 5) -> Batch:
    """Random clips, each a function of its position, as its rate and motion are."""
    pixels = [np.random.default_rng(k).integers(0, 256, (frames, SIZE_PX, SIZE_PX, 3), np.uint8) for k in positions]
    return Batch(
        torch.from_numpy(np.stack(pixels)),
        torch.tensor([5.0 + k for k in positions]),
        torch.tensor([100.0 + k for k in positions]),
        positions,
        [str(k) for k in positions],
        [],
    )


class Spy:
    """Records what the UNet is given."""

    def __init__(self, unet: nn.Module) -> None:
        self.calls: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self.hook = unet.register_forward_pre_hook(self.record, with_kwargs=True)

    def record(self, _: nn.Module, args: tuple, kwargs: dict) -> None:
        named = (
            dict(zip(("sample", "timestep", "encoder_hidden_states", "added_time_ids"), args, strict=False)) | kwargs
        )
        self.calls.append(
            tuple(named[key].clone() for key in ("sample", "timestep", "encoder_hidden_states", "added_time_ids"))
        )

    def __enter__(self) -> "Spy":
        return self

    def __exit__(self, *_: Any) -> None:
        self.hook.remove()


@pytest.mark.parametrize(("layout", "noise_augmentation"), [(name, 0.0) for name in LAYOUTS] + [("framer_clip", 0.1)])
def test_loss_is_a_function_of_positions(base: Base, layout: str, noise_augmentation: float) -> None:
    """The same batch scores the same to the bit, whatever was drawn between; other positions draw other noise."""
    framer, batch = make_framer(base, layout=layout, noise_augmentation=noise_augmentation), make_batch([4, 9])
    loss_B, zero_B = framer.compute_loss(batch)
    torch.manual_seed(1)
    framer.compute_loss(make_batch([77]))
    again_B, zero_again_B = framer.compute_loss(batch)
    assert torch.equal(loss_B, again_B) and torch.equal(zero_B, zero_again_B)
    moved = Batch(batch.frames_BTHWC, batch.fps_B, batch.motion_B, [5, 10], batch.keys, [])
    assert not torch.isclose(framer.compute_loss(moved)[0], loss_B).any()
    assert not torch.isclose(make_framer(base, seed=4, layout=layout).compute_loss(batch)[0], loss_B).any()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_batch_of_two_equals_two_of_one(base: Base, layout: str, precision: str) -> None:
    """How clips are grouped into micro-batches does not change what each scores."""
    framer = make_framer(base, layout=layout, precision=precision, noise_augmentation=0.05)
    both, zero_both = framer.compute_loss(make_batch([4, 9]))
    assert both.shape == zero_both.shape == (2,) and both.dtype == torch.float32
    tolerance = 1e-5 if precision == "fp32" else 2e-2
    for b, position in enumerate([4, 9]):
        loss_B, zero_B = framer.compute_loss(make_batch([position]))
        assert torch.allclose(loss_B[0], both[b], rtol=tolerance) and torch.allclose(zero_B[0], zero_both[b], rtol=1e-5)


@pytest.mark.parametrize("scale_conditioning", [False, True])
@pytest.mark.parametrize("noise_sampler", ["uniform_t", "lognormal"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_input_by_hand(base: Base, layout: str, noise_sampler: str, scale_conditioning: bool) -> None:
    """Every tensor that reaches the UNet in training, computed anew from the VAE, the keys and the equations."""
    settings = {"layout": layout, "noise_sampler": noise_sampler, "scale_conditioning": scale_conditioning}
    framer, batch = make_framer(base, **settings), make_batch([4, 9])
    with Spy(base.unet) as spy:
        framer.compute_loss(batch)
    ((sample, time, tokens, ids),) = spy.calls
    frames = [2] if layout == "spec_middle" else list(range(5))
    assert sample.shape == (2, len(frames), 9, LATENT, LATENT)
    for b, k in enumerate(batch.positions):
        pixels = batch.frames_BTHWC[b].permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.no_grad():
            posterior = base.vae.encode(pixels).latent_dist
        shape = (len(frames), 4, LATENT, LATENT)
        drawn = posterior.mean[frames] + posterior.std[frames] * torch.randn(shape, generator=rng(3, "posterior", k))
        z, noise = SCALING * drawn, torch.randn(shape, generator=rng(3, "noise", k))
        if noise_sampler == "lognormal":
            sigma = (0.7 + 1.6 * torch.randn(1, generator=rng(3, "sigma", k))).exp()
        else:
            t = int(torch.rand(1, generator=rng(3, "sigma", k)) * 1000)
            beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
            sigma = (1 / (1 - beta).cumprod(0)[t] - 1).sqrt().float()
        assert torch.allclose(sample[b, :, :4], (z + sigma * noise) / (1 + sigma**2).sqrt(), atol=1e-4)
        assert torch.allclose(time[b], sigma.log() / 4, atol=1e-5)

        ends = posterior.mode()[[0, -1]] * (SCALING if scale_conditioning else 1)
        if layout == "spec_middle":
            assert torch.allclose(sample[b, 0, 4:8], (ends[0] + ends[1]) / 2, atol=1e-4)
            assert (sample[b, :, 8] == 1).all()
        else:
            assert torch.allclose(sample[b, [0, -1], 4:8], ends, atol=1e-4)
            assert torch.equal(sample[b, 1:-1, 4:8], base.unet.mask_token[0].expand(3, 4, LATENT, LATENT))
            assert sample[b, :, 8].mean((1, 2)).tolist() == [0, 1, 1, 1, 0]
        assert torch.allclose(tokens[b], embed_stills(base.image_encoder, pixels[[0, -1]][None])[0], atol=1e-5)
        assert ids[b].tolist() == [5 + k - 1, 100 + k, 0]


def test_noise_augmentation_reaches_the_stills_only(base: Base) -> None:
    """Pixel noise of the set strength on the conditioning latents, told as third id; targets and tokens are clean."""
    batch = make_batch([4, 9])
    calls = []
    for strength in (0.0, 0.2):
        with Spy(base.unet) as spy:
            make_framer(base, layout="framer_clip", noise_augmentation=strength).compute_loss(batch)
        calls += spy.calls
    (clean, *_, clean_tokens, clean_ids), (noisy, *_, noisy_tokens, noisy_ids) = calls
    assert torch.equal(clean[:, :, :4], noisy[:, :, :4]) and torch.equal(clean_tokens, noisy_tokens)
    # the tiny VAE's latents are 12 x the mean of 2x2 pixels: noise of std 0.2 arrives with 12 x 0.2 / 2
    assert (noisy - clean)[:, [0, -1], 4:7].std() == pytest.approx(1.2, rel=0.05)
    assert torch.equal(clean[:, 1:-1], noisy[:, 1:-1])
    assert clean_ids[:, 2].tolist() == [0, 0] and noisy_ids[:, 2].tolist() == pytest.approx([0.2, 0.2])


def test_clip_tokens_mean_is_one_token(base: Base) -> None:
    """The spec's single token is the average of the two."""
    batch, tokens = make_batch([4]), []
    for mode in ("first_last", "mean"):
        with Spy(base.unet) as spy:
            make_framer(base, clip_tokens=mode).compute_loss(batch)
        tokens.append(spy.calls[0][2])
    assert tokens[0].shape == (1, 2, 32) and torch.allclose(tokens[0].mean(1, keepdim=True), tokens[1])


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
    x, sigma = spy.calls[0][0][:, :, :4].double(), (4 * spy.calls[0][1].double()).exp()
    noise = torch.randn(3, 4, LATENT, LATENT, generator=rng(3, "noise", 4))
    z = x * (1 + sigma**2).sqrt() - sigma * noise
    if space == "v":
        error = raws[0] - (noise - sigma * z) / (1 + sigma**2).sqrt()
    else:
        error = (raws[0] + sigma * x) / (1 + sigma**2).sqrt() - noise
    assert losses == pytest.approx([error.square().mean().item(), error[:, 1].square().mean().item()], rel=1e-3)


def test_inference_input_is_the_training_input(base: Base) -> None:
    """The same clip gives the same conditioning channels, mask, tokens and ids in training and while sampling."""
    batch = make_batch([0])
    stills = to_signed(batch.frames_BTHWC)[0, [0, -1]]
    for layout in LAYOUTS:
        framer = make_framer(base, layout=layout)
        with Spy(base.unet) as spy:
            framer.compute_loss(batch)
            framer.generate_middle(stills[None], batch.fps_B, batch.motion_B, 3, [0])
        (trained, _, tokens, ids), *sampled = spy.calls
        assert len(sampled) == 3
        for given, _, given_tokens, given_ids in sampled:
            assert torch.allclose(given[:, :, 4:], trained[:, :, 4:], atol=1e-5)
            assert torch.equal(given_tokens, tokens) and torch.equal(given_ids, ids)
        sigmas = karras_sigmas(3, 0.002, 700.0)
        assert torch.allclose(torch.cat([call[1] for call in sampled]), sigmas[:-1].log() / 4)
        noise = torch.randn(sampled[0][0].shape[1:2] + (4, LATENT, LATENT), generator=rng(3, "sample", 0))
        assert torch.allclose(sampled[0][0][0, :, :4], noise, atol=1e-5)  # unit variance at the start


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("frames", [3, 5])
def test_interpolation_keeps_the_ends(base: Base, layout: str, frames: int) -> None:
    """As many frames as asked, the stills at the ends untouched, all between in range, the same each time."""
    framer = make_framer(base, 3, layout=layout)
    first, last = to_signed(make_batch([1], 3).frames_BTHWC)[0, [0, -1]]
    made = framer.interpolate(first, last, frames, 7, 127, 1)
    assert made.shape == (frames, 3, SIZE_PX, SIZE_PX) and made.dtype == torch.float32
    assert torch.equal(made[0], first) and torch.equal(made[-1], last)
    assert made.isfinite().all() and made.abs().max() <= 1
    assert torch.equal(framer.interpolate(first, last, frames, 7, 127, 1), made)


def test_clip_layouts_fill_their_own_window_at_once(base: Base) -> None:
    """The window's own length, 7 here, takes one sampling for a clip layout; other lengths halve, or are refused."""
    first, last = to_signed(make_batch([1], 3).frames_BTHWC)[0, [0, -1]]
    framer = make_framer(base, 7, layout="framer_clip")
    with Spy(base.unet) as spy:
        assert len(framer.interpolate(first, last, 7, 7, 127, 2)) == 7
    assert [call[0].shape[1] for call in spy.calls] == [7, 7]
    with Spy(base.unet) as spy:
        assert len(framer.interpolate(first, last, 5, 7, 127, 2)) == 5
    assert len(spy.calls) == 3 * 2
    for refused in (4, 6, 11):
        with pytest.raises(ValueError, match="3, 5, 9, 17"):
            framer.interpolate(first, last, refused, 7, 127, 2)
    with pytest.raises(ValueError, match="3, 5, 9, 17"):
        make_framer(base, 7, layout="spec_middle").interpolate(first, last, 7, 7, 127, 2)


@pytest.mark.parametrize("fps", [8, 8.0])
def test_interpolation_tells_the_rate_of_its_windows(base: Base, fps: float) -> None:
    """Halving 9 frames with windows of 5: the first gap, 8 intervals, holds 4 of a window, so half the rate.

    The rate may be a whole number, as a command line gives it, and the noise augmentation is told all the same.
    """
    first, last = to_signed(make_batch([1], 3).frames_BTHWC)[0, [0, -1]]
    with Spy(base.unet) as spy:
        make_framer(base, 5, layout="spec_middle").interpolate(first, last, 9, fps, 127, 1)
    assert [call[3][0, 0].item() + 1 for call in spy.calls] == [4, 8, 8, 16, 16, 16, 16]
    with Spy(base.unet) as spy:
        make_framer(base, 5, layout="framer_clip", noise_augmentation=0.25).interpolate(first, last, 5, fps, 127, 1)
    assert spy.calls[0][3].tolist() == [[7, 127, 0.25]]


def test_pixels_survive_the_conversion() -> None:
    """uint8 to [-1, 1] and back is the identity for every value; channels move as they should."""
    frames = torch.arange(256, dtype=torch.uint8).repeat_interleave(3).view(1, 16, 16, 3).clone()
    frames[..., 1] = 255 - frames[..., 1]
    signed = to_signed(frames)
    assert signed.shape == (1, 3, 16, 16) and signed.min() == -1 and signed.max() == 1
    assert torch.equal(signed[:, 1], frames[..., 1].float() / 127.5 - 1)
    assert torch.equal(to_uint8(signed), frames)


def test_sampling_equals_the_stock_pipeline(tiny_base: Path) -> None:
    """A run of diffusers' StableVideoDiffusionPipeline, rebuilt from our parts: same network inputs, same frames.

    The stock UNet has eight channels and repeats one still; ours is the same UNet widened, so the ninth is free.
    """
    from diffusers import EulerDiscreteScheduler, StableVideoDiffusionPipeline, UNetSpatioTemporalConditionModel
    from PIL import Image
    from transformers import CLIPImageProcessor

    base = load_base(str(tiny_base), None, None, torch.device("cpu"), "fp32")
    config = {k: v for k, v in base.unet.config.items() if not k.startswith("_")}
    torch.manual_seed(0)
    stock = UNetSpatioTemporalConditionModel(**config | {"in_channels": 8}).eval()
    pipeline = StableVideoDiffusionPipeline(
        vae=base.vae,
        image_encoder=base.image_encoder,
        unet=stock,
        scheduler=EulerDiscreteScheduler.from_pretrained(tiny_base, subfolder="scheduler"),
        feature_extractor=CLIPImageProcessor.from_pretrained(tiny_base / "feature_extractor"),
    )
    pipeline.set_progress_bar_config(disable=True)
    pixels = np.random.default_rng(5).integers(0, 256, (SIZE_PX, SIZE_PX, 3), np.uint8)
    noise = torch.randn(1, 3, 4, LATENT, LATENT, generator=rng(0, "sample"))
    with Spy(stock) as spy:
        theirs = pipeline(
            Image.fromarray(pixels), SIZE_PX, SIZE_PX, num_frames=3, num_inference_steps=4, max_guidance_scale=1.0,
            fps=9, motion_bucket_id=99, noise_aug_strength=0.0, output_type="pt",
            latents=noise.clone(),  # the pipeline scales them
        ).frames  # fmt: skip

    framer = make_framer(Base("", widen_conv_in(stock), base.vae, base.image_encoder, base.scheduler, ""), 3)
    still = to_signed(torch.from_numpy(pixels)[None])
    condition = framer.condition(
        still[:, None].expand(1, 2, -1, -1, -1), torch.tensor([9.0]), torch.tensor([99.0]), [0]
    )
    cond = condition.ends_B2CHW[:, :1].expand(1, 3, -1, -1, -1)

    calls = iter(spy.calls)

    def denoise(noisy: Tensor, sigma_B: Tensor) -> Tensor:
        x, (sample, time, tokens, ids) = scale_input(noisy, sigma_B), next(calls)
        assert torch.allclose(torch.cat([x, cond], 2), sample, atol=1e-4)
        assert torch.allclose(time_input(sigma_B), time.view(1), atol=1e-5)
        assert torch.allclose(condition.tokens_BND[:, :1], tokens, atol=1e-5)
        assert torch.equal(build_time_ids(torch.tensor([9.0]), torch.tensor([99.0]), 0.0), ids)
        mask = torch.ones(1, 3, 1, LATENT, LATENT)
        raw = framer.base.unet(torch.cat([x, cond, mask], 2), time_input(sigma_B), tokens, ids, return_dict=False)[0]
        return denoise_from_v(raw, noisy, sigma_B)

    with torch.no_grad():
        latents = sample_euler(denoise, noise, karras_sigmas(4, 0.002, 700.0))
    assert next(calls, None) is None
    assert torch.allclose(decode_latents(base.vae, latents / SCALING), theirs * 2 - 1, atol=2e-3)
