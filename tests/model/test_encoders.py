"""Pixels, latents and tokens are those of SVD's own pipeline. Run: pytest tests/model/test_encoders.py"""

from pathlib import Path

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
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

from toolkit.model.encoders import VAE_CONFIG, count_decoding_bytes, decode_latents, embed_stills, encode_frames
from toolkit.model.weights import build_on_meta
from toolkit.run.meter import Meter


@pytest.fixture(scope="module")
def pipeline(tiny_base: Path) -> StableVideoDiffusionPipeline:
    """The stock pipeline, loaded by the stock classes from the tiny base's folder."""
    return StableVideoDiffusionPipeline(
        vae=AutoencoderKLTemporalDecoder.from_pretrained(tiny_base, subfolder="vae"),
        image_encoder=CLIPVisionModelWithProjection.from_pretrained(tiny_base / "image_encoder"),
        unet=UNetSpatioTemporalConditionModel.from_pretrained(tiny_base, subfolder="unet"),
        scheduler=EulerDiscreteScheduler.from_pretrained(tiny_base, subfolder="scheduler"),
        feature_extractor=CLIPImageProcessor.from_pretrained(tiny_base / "feature_extractor"),
    )


@pytest.fixture
def noisy_vae() -> AutoencoderKLTemporalDecoder:
    """A VAE of random weights, whose decoder mixes frames in time (the tiny base's does not until it is trained)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderKLTemporalDecoder(block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2)
        for parameter in vae.parameters():  # biases and mixers start at zero
            torch.nn.init.normal_(parameter, std=0.1) if parameter.ndim < 2 else None
    return vae.eval()


def stills(height_px: int, width_px: int, count: int = 2) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height_px, width_px, 3), np.uint8)


def signed(frames_NHWC: np.ndarray) -> Tensor:
    return torch.from_numpy(frames_NHWC).movedim(-1, 1).float() / 127.5 - 1


@pytest.mark.parametrize("size_px", [(64, 64), (320, 512), (224, 224), (100, 333)])
def test_embedding_equals_the_pipelines(pipeline: StableVideoDiffusionPipeline, size_px: tuple[int, int]) -> None:
    """Each still gets the embedding that StableVideoDiffusionPipeline._encode_image gives its picture."""
    pictures = stills(*size_px)
    mine = embed_stills(pipeline.image_encoder, signed(pictures)[None])
    assert mine.shape == (1, 2, 32)
    for n, picture in enumerate(pictures):
        with torch.no_grad():
            theirs = pipeline._encode_image([Image.fromarray(picture)], "cpu", 1, False)
        assert torch.allclose(mine[0, n], theirs[0, 0], atol=1e-5)
    assert (mine[0, 0] - mine[0, 1]).abs().max() > 1e-2


def test_mode_equals_the_pipelines(pipeline: StableVideoDiffusionPipeline) -> None:
    """The posterior's mean, unscaled, is StableVideoDiffusionPipeline._encode_vae_image of each still."""
    frames = signed(stills(32, 48))
    mean, std = encode_frames(pipeline.vae, frames[None])
    assert mean.shape == std.shape == (1, 2, 4, 16, 24) and mean.dtype == torch.float32 and (std > 0).all()
    with torch.no_grad():
        theirs = pipeline._encode_vae_image(frames, "cpu", 1, False)
    assert torch.allclose(mean[0], theirs, atol=1e-5)


def test_posterior_is_the_vaes(noisy_vae: AutoencoderKLTemporalDecoder) -> None:
    """Mean and std of each frame, clip by clip and frame by frame, are those of the VAE's own distribution."""
    frames = signed(stills(16, 24, 6)).unflatten(0, (2, 3))
    mean, std = encode_frames(noisy_vae, frames)
    with torch.no_grad():
        for b in range(2):
            for t in range(3):
                posterior = noisy_vae.encode(frames[b, t][None]).latent_dist
                assert torch.allclose(mean[b, t], posterior.mode()[0], atol=1e-5)
                assert torch.allclose(std[b, t], posterior.std[0], atol=1e-5)


def test_decoding_equals_the_pipelines(
    pipeline: StableVideoDiffusionPipeline, noisy_vae: AutoencoderKLTemporalDecoder
) -> None:
    """A clip decodes to what StableVideoDiffusionPipeline.decode_latents gives, with all frames at once."""
    latents = torch.randn(1, 5, 4, 8, 12, generator=torch.Generator().manual_seed(0)) * 5
    pipeline = StableVideoDiffusionPipeline(**{**pipeline.components, "vae": noisy_vae})
    mine = decode_latents(noisy_vae, latents)
    with torch.no_grad():
        theirs = pipeline.decode_latents(latents * noisy_vae.config.scaling_factor, 5, 5)  # scaled, B C T H W out
    assert mine.shape == (1, 5, 3, 16, 24)
    assert torch.allclose(mine, theirs.movedim(1, 2).clamp(-1, 1), atol=1e-5)


def test_clips_decode_apart_and_frames_together(noisy_vae: AutoencoderKLTemporalDecoder) -> None:
    """Two clips decode as each alone; a frame does depend on its neighbours."""
    latents = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * 5
    both = decode_latents(noisy_vae, latents)
    assert torch.allclose(both[0], decode_latents(noisy_vae, latents[:1])[0], atol=1e-5)
    assert torch.allclose(both[1], decode_latents(noisy_vae, latents[1:])[0], atol=1e-5)
    assert (both[0, 1] - decode_latents(noisy_vae, latents[:1, 1:2])[0, 0]).abs().max() > 1e-3


def test_decoded_frames_are_clamped(pipeline: StableVideoDiffusionPipeline) -> None:
    """Latents far outside decode into [-1, 1], fp32, without a gradient."""
    frames = decode_latents(pipeline.vae, torch.full((1, 1, 4, 4, 4), 100.0, requires_grad=True))
    assert frames.abs().max() <= 1 and frames.dtype == torch.float32 and not frames.requires_grad


def test_chunks_change_nothing(noisy_vae: AutoencoderKLTemporalDecoder) -> None:
    """Two clips decode in chunks of any size to what they decode to at once."""
    latents = torch.randn(2, 5, 4, 4, 6, generator=torch.Generator().manual_seed(0)) * 5
    whole = decode_latents(noisy_vae, latents)
    for chunk_frames in range(1, 7):
        made = decode_latents(noisy_vae, latents.clone().requires_grad_(), chunk_frames)
        assert torch.allclose(made, whole, atol=1e-5) and made.dtype == torch.float32 and not made.requires_grad


def test_frames_are_encoded_one_by_one(
    monkeypatch: pytest.MonkeyPatch, noisy_vae: AutoencoderKLTemporalDecoder
) -> None:
    """Of however many clips, so that memory stays that of one."""
    encoded, encode = [], noisy_vae.encode
    monkeypatch.setattr(noisy_vae, "encode", lambda frames: (encoded.append(len(frames)), encode(frames))[1])
    encode_frames(noisy_vae, torch.zeros(2, 3, 3, 8, 8))
    assert encoded == [1] * 6


def test_room_to_decode_is_that_of_the_published_decoder() -> None:
    """What is reckoned for a frame is what a clip at once takes, and not much more."""
    vae = build_on_meta(AutoencoderKLTemporalDecoder, VAE_CONFIG).requires_grad_(False)
    latents = torch.empty(1, 4, 4, 40, 64, device="meta")
    with Meter([latents, *vae.parameters()]) as meter:
        decode_latents(vae, latents)
    assert 0.95 < meter.costs["forward"].peak_bytes / (4 * count_decoding_bytes(vae, latents)) <= 1.01
