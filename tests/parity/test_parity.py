"""Training feeds the network what inference feeds it: SVD's stock pipeline, and Framer's rebuilt in reference.py.

Run: pytest tests/parity. On the tiny base, and where it says so on networks of the published sizes with random weights.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLTemporalDecoder,
    EulerDiscreteScheduler,
    StableVideoDiffusionPipeline,
    UNetSpatioTemporalConditionModel,
)
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from tests.model.test_base import REAL_CLIP, REAL_VAE
from tests.parity.reference import Ask, Spy, framer_inputs, framer_sample
from toolkit import FramerPipeline
from toolkit.config import DiffusionConfig, ModelConfig
from toolkit.data.loader import Batch
from toolkit.model.base import Base, build_unet_on_meta, load_base
from toolkit.model.unet import SVD_CONFIG, widen_conv_in
from toolkit.rng import rng
from toolkit.run.framer import Framer, Sampling, to_signed

SEED, POSITION, FRAMES = 3, 11, 5
FPS, MOTION = 9.0, 99.0
SVD_SCHEDULER: dict[str, Any] = {  # stabilityai/stable-video-diffusion-img2vid-xt scheduler/scheduler_config.json
    "beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "interpolation_type": "linear",
    "num_train_timesteps": 1000, "prediction_type": "v_prediction", "sigma_max": 700.0, "sigma_min": 0.002,
    "steps_offset": 1, "timestep_spacing": "leading", "timestep_type": "continuous", "use_karras_sigmas": True,
}  # fmt: skip


Networks = tuple[Base, StableVideoDiffusionPipeline]
SIZES = pytest.mark.parametrize("networks", ["tiny", "published"], indirect=True, scope="module")


@pytest.fixture(scope="module")
def networks(request: pytest.FixtureRequest, tiny_base: Path) -> Networks:
    """The same VAE and image encoder in our base and in the stock pipeline, whose UNet has eight channels.

    Of the published sizes, the UNets are on meta: their inputs are looked at, their output is not.
    """
    if getattr(request, "param", "tiny") == "tiny":
        base = load_base(ModelConfig(base=str(tiny_base)), torch.device("cpu"), "fp32")
        config = {name: value for name, value in base.unet.config.items() if not name.startswith("_")}
    else:
        with torch.device("meta"):
            vae = AutoencoderKLTemporalDecoder(**REAL_VAE)
            encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(**REAL_CLIP))
        unet, config = build_unet_on_meta(ModelConfig(base="framer")), SVD_CONFIG
        scheduler = dict(EulerDiscreteScheduler(**SVD_SCHEDULER).config)
        base = Base("", unet, fill(vae), fill(encoder), scheduler, "v", torch.float32, [], {}, (), vae.config)
    base.unet.mask_token = nn.Parameter(torch.tensor([0.5, -1.0, 2.0, 0.25]).view(1, 1, 4, 1, 1))
    with torch.device("meta"):
        stock = UNetSpatioTemporalConditionModel.from_config({**config, "in_channels": 8}).to("meta")
    return base, make_pipeline(base, stock)


def make_pipeline(base: Base, unet: nn.Module, **scheduler: Any) -> StableVideoDiffusionPipeline:
    pipeline = StableVideoDiffusionPipeline(
        vae=base.vae,
        image_encoder=base.image_encoder,
        unet=unet,
        scheduler=EulerDiscreteScheduler(**SVD_SCHEDULER | scheduler),
        feature_extractor=CLIPImageProcessor(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def fill(network: nn.Module) -> nn.Module:
    """Small random weights in place; norms are the identity, and every embedding has its own place."""
    network = network.to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        is_norm_weight = parameter.ndim == 1 and name.endswith("weight")
        parameter.fill_(1.0) if is_norm_weight else parameter.normal_(0, 0.02, generator=generator)
    for name, buffer in network.named_buffers():
        assert name.endswith("position_ids"), name
        buffer.copy_(torch.arange(buffer.shape[-1]).expand_as(buffer))
    return network


def make_clip(size_px: tuple[int, int], still: bool = False) -> tuple[Batch, list[Image.Image]]:
    """One clip of smooth random pictures, as the loader gives it, and as pictures; `still` repeats the first at the end."""
    random = np.random.default_rng(5)
    small = random.integers(0, 256, (FRAMES, 6, 8, 3), np.uint8)
    pictures = [Image.fromarray(s).resize(size_px[::-1], Image.Resampling.BICUBIC) for s in small]
    pictures[-1] = pictures[0] if still else pictures[-1]
    frames_BTHWC = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))[None]
    return Batch(frames_BTHWC, torch.tensor([FPS]), torch.tensor([MOTION]), [POSITION], ["clip"], []), pictures


def draw(purpose: str, *shape: int) -> Tensor:
    """What training draws for the clip."""
    return torch.randn(shape, generator=rng(SEED, purpose, POSITION))


def training_call(base: Base, batch: Batch, **settings: Any) -> dict[str, Tensor]:
    """What our training step gives the UNet."""
    framer = Framer(base, DiffusionConfig(**settings), FRAMES, SEED, device=torch.device("cpu"))
    with Spy(base.unet, stop=True) as spy:
        framer.compute_loss(batch)
    return spy.calls[0]


@torch.no_grad()
def noise_target(base: Base, pictures: list[Image.Image], sigma: float) -> Tensor:
    """z + sigma noise of the given frames, from the VAE itself."""
    pixels = torch.stack([torch.from_numpy(np.array(p)).movedim(-1, 0) / 255 for p in pictures]) * 2 - 1
    posteriors = [base.vae.encode(frame[None]).latent_dist for frame in pixels]
    mean, std = (torch.cat([getattr(p, part) for p in posteriors])[None] for part in ("mean", "std"))
    z = 0.18215 * (mean + std * draw("posterior", *mean.shape[1:]))
    return z + sigma * draw("noise", *mean.shape[1:])


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Element by element, to fp32 rounding: the two orders of scaling pixels to [-1, 1] differ in the last bit."""
    assert ours.keys() == theirs.keys() == {"sample", "timestep", "encoder_hidden_states", "added_time_ids"}
    for name, tensor in theirs.items():
        assert torch.allclose(ours[name], tensor.view(ours[name].shape), rtol=1e-4, atol=1e-4), name
    assert ours["sample"].std() > 0.1 and ours["encoder_hidden_states"].std() > 1e-3  # they say something


def test_one_frame_is_the_stock_pipelines(networks: Networks) -> None:
    """Between two equal stills, a frame of layout spec_middle is SVD's own layout: all eight channels, time, token, ids."""
    base, stock = networks
    batch, pictures = make_clip((64, 64), still=True)
    ours = training_call(base, batch, layout="spec_middle", clip_tokens="first")
    sigma = (4 * ours["timestep"]).exp().item()
    noisy = noise_target(base, pictures[2:3], sigma)
    theirs = pipeline_call(base, stock, pictures[0], noisy, sigma)
    assert (ours["sample"][:, :, 8] == 1).all()
    assert_same(ours | {"sample": ours["sample"][:, :, :8]}, theirs)


@SIZES
def test_each_end_is_the_stock_pipelines(networks: Networks) -> None:
    """In a clip, the known frames hold what the stock pipeline makes of those stills, pixel noise included."""
    base, stock = networks
    batch, pictures = make_clip((48, 64))
    ours = training_call(base, batch, layout="framer_clip", noise_sampler="lognormal", noise_augmentation=0.1)
    sigma = (4 * ours["timestep"]).exp().item()
    noisy = noise_target(base, pictures, sigma)
    for end in (0, 1):
        frame = end * (FRAMES - 1)
        generator = rng(SEED, "noise_augmentation", POSITION)
        torch.randn(end, 3, 48, 64, generator=generator)  # the last still's noise comes after the first one's
        theirs = pipeline_call(base, stock, pictures[frame], noisy, sigma, generator, 0.1)
        known = torch.cat([ours["sample"][:, :, :4], ours["sample"][:, [frame] * FRAMES, 4:8]], dim=2)
        assert_same(
            ours | {"sample": known, "encoder_hidden_states": ours["encoder_hidden_states"][:, end : end + 1]}, theirs
        )


def pipeline_call(
    base: Base, stock: StableVideoDiffusionPipeline, still: Image.Image, noisy: Tensor, sigma: float,
    generator: torch.Generator | None = None, augmentation: float = 0.0,
) -> dict[str, Tensor]:  # fmt: skip
    """What StableVideoDiffusionPipeline gives its UNet in a run whose only noise level is sigma."""
    pipeline = make_pipeline(base, stock.unet, sigma_max=sigma)
    with Spy(pipeline.unet, stop=True) as spy:
        pipeline(
            still, still.height, still.width, num_frames=noisy.shape[1], num_inference_steps=1, max_guidance_scale=1.0,
            fps=int(FPS), motion_bucket_id=int(MOTION), noise_aug_strength=augmentation, generator=generator,
            latents=noisy / (sigma**2 + 1) ** 0.5,  # the pipeline multiplies by that
        )  # fmt: skip
    return spy.calls[0]


@pytest.mark.parametrize(
    ("networks", "layout", "sampler", "augmentation"),
    [
        ("tiny", "framer_clip", "uniform_t", 0.0),
        ("tiny", "framer_clip", "lognormal", 0.02),
        ("tiny", "middle_in_clip", "uniform_t", 0.02),
        ("tiny", "middle_in_clip", "lognormal", 0.0),
        ("published", "framer_clip", "lognormal", 0.02),
    ],
    indirect=["networks"],
    scope="module",
)
def test_training_is_framers_inference(networks: Networks, layout: str, sampler: str, augmentation: float) -> None:
    """All nine channels, time, both tokens and ids of a training step are those of Framer's inference at that sigma."""
    base, stock = networks
    batch, pictures = make_clip((48, 64))
    ours = training_call(base, batch, layout=layout, noise_sampler=sampler, noise_augmentation=augmentation)
    sigma = (4 * ours["timestep"]).exp().item()
    ask = Ask(pictures[0], pictures[-1], FRAMES, FPS, MOTION, augmentation, augmentation_noise(48, 64))
    with torch.no_grad():
        theirs = framer_inputs(stock, base.unet.mask_token, ask, noise_target(base, pictures, sigma), sigma)
    assert ours["sample"].shape == (1, FRAMES, 9, *theirs["sample"].shape[-2:])
    assert_same(ours, theirs)


def test_dropped_training_is_guidances_other_branch(networks: Networks) -> None:
    """A clip whose conditioning is dropped sees what Framer's inference shows without it: mask and mask token stay."""
    base, stock = networks
    batch, pictures = make_clip((48, 64))
    third = 1 / 3  # the clip's draw lies where both tokens and ends are lost
    assert third <= torch.rand(1, generator=rng(SEED, "conditioning_dropout", POSITION)).item() < 2 * third
    ours = training_call(base, batch, layout="framer_clip", conditioning_dropout=third)
    sigma = (4 * ours["timestep"]).exp().item()
    ask = Ask(pictures[0], pictures[-1], FRAMES, FPS, MOTION, 0.0, augmentation_noise(48, 64))
    with torch.no_grad():
        theirs = framer_inputs(
            stock, base.unet.mask_token, ask, noise_target(base, pictures, sigma), sigma, known=False
        )
    for name, tensor in theirs.items():
        assert torch.allclose(ours[name], tensor, rtol=1e-4, atol=1e-4), name


def augmentation_noise(height_px: int, width_px: int) -> tuple[Tensor, Tensor]:
    first, last = draw("noise_augmentation", 2, 3, height_px, width_px).split(1)
    return first, last


@pytest.mark.parametrize("guidance", [(1.0, 1.0), (1.0, 3.0)])
def test_frames_are_framers(tiny_base: Path, guidance: tuple[float, float]) -> None:
    """From the same noise, our command line's sampler and FramerPipeline end in the frames of the reference's loop."""
    pipe = FramerPipeline.from_pretrained(tiny_base, num_frames=FRAMES, noise_augmentation=0.02)
    pipe.set_progress_bar_config(disable=True)
    torch.nn.init.normal_(pipe.unet.mask_token, generator=torch.Generator().manual_seed(1))
    base = load_base(ModelConfig(base=str(tiny_base)), torch.device("cpu"), "fp32")
    base.unet.mask_token.data.copy_(pipe.unet.mask_token)
    batch, pictures = make_clip((32, 48))
    settings = DiffusionConfig(layout="framer_clip", noise_augmentation=0.02)
    framer = Framer(base, settings, FRAMES, SEED)
    stills_B2CHW = to_signed(batch.frames_BTHWC)[:, [0, -1]]
    sampling = Sampling(4, "euler", *guidance)
    ours = framer.generate(stills_B2CHW, batch.fps_B, batch.motion_B, sampling, [POSITION])

    noise = draw("sample", FRAMES, 4, 16, 24)[None]
    ask = Ask(pictures[0], pictures[-1], FRAMES, FPS, MOTION, 0.02, augmentation_noise(32, 48))
    with torch.no_grad():
        theirs = framer_sample(make_pipeline(base, base.unet), base.unet, base.unet.mask_token, ask, noise, 4, guidance)
    assert theirs.std() > 0.1 and torch.allclose(ours, theirs, atol=1e-3)
    library = pipe(
        pictures[0], pictures[-1], num_inference_steps=4, min_guidance_scale=guidance[0], max_guidance_scale=guidance[1],
        fps=FPS, motion_bucket_id=MOTION, latents=noise, output_type="pt",
        generator=rng(SEED, "noise_augmentation", POSITION),
    ).frames  # fmt: skip
    assert torch.allclose(library[:, 1:-1] * 2 - 1, theirs[:, 1:-1], atol=1e-3)


def test_widened_svd_samples_the_stock_frames(tiny_base: Path) -> None:
    """A whole run of StableVideoDiffusionPipeline over one frame, and ours of the same UNet widened to nine channels."""
    base = load_base(ModelConfig(base=str(tiny_base)), torch.device("cpu"), "fp32")
    config = {name: value for name, value in base.unet.config.items() if not name.startswith("_")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        stock = UNetSpatioTemporalConditionModel.from_config({**config, "in_channels": 8}).eval()
    batch, pictures = make_clip((32, 48), still=True)
    noise = draw("sample", 1, 4, 16, 24)[None]
    theirs = make_pipeline(base, stock)(
        pictures[0], 32, 48, num_frames=1, num_inference_steps=4, max_guidance_scale=1.0, fps=int(FPS),
        motion_bucket_id=int(MOTION), noise_aug_strength=0.0, output_type="pt", latents=noise.clone(),
    ).frames  # fmt: skip
    widened = Base("", widen_conv_in(stock), *[getattr(base, part) for part in ("vae", "image_encoder", "scheduler")],
                   "v", torch.float32, [], {}, (), base.vae_config)  # fmt: skip
    framer = Framer(widened, DiffusionConfig(layout="spec_middle", clip_tokens="first"), 3, SEED)
    stills_B2CHW = to_signed(batch.frames_BTHWC)[:, [0, -1]]
    ours = framer.generate(stills_B2CHW, batch.fps_B, batch.motion_B, Sampling(4), [POSITION])
    assert theirs.std() > 0.05 and torch.allclose(ours, theirs * 2 - 1, atol=1e-3)
