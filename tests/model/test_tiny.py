"""The tiny base is a working base of SVD's classes. Run: pytest tests/model/test_tiny.py"""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLTemporalDecoder, EulerDiscreteScheduler, UNetSpatioTemporalConditionModel
from safetensors.torch import load_file
from transformers import CLIPVisionModelWithProjection

from docs.tiny_base import finish, start
from toolkit.config import ModelConfig
from toolkit.data.format import file_sha256
from toolkit.errors import UserError
from toolkit.metrics import psnr_db
from toolkit.model.base import Base, load_base
from toolkit.model.encoders import decode_latents, encode_frames
from toolkit.model.sources import PARTS, TINY_FOLDER
from toolkit.model.tiny import SCALING, make_tiny_base


@pytest.fixture(scope="module")
def base(tiny_base: Path) -> Base:
    return load_base(ModelConfig(base=str(tiny_base)), torch.device("cpu"), "fp32")


def smooth_frames(frames: int = 3, size_px: int = 64) -> torch.Tensor:
    """Slow waves of colour, one clip."""
    y, x = torch.meshgrid(torch.linspace(0, 3, size_px), torch.linspace(0, 3, size_px), indexing="ij")
    waves = [torch.stack([torch.sin(x + t), torch.cos(y - t), torch.sin(x * y / 3 + t)]) for t in range(frames)]
    return 0.9 * torch.stack(waves)[None]


def test_what_comes_with_the_toolkit_is_small() -> None:
    """At most 12 MB of weights: they are in every clone and every wheel."""
    assert 10e6 < sum(path.stat().st_size for path in TINY_FOLDER.rglob("*.safetensors")) <= 12e6


def test_vae_is_a_codec(base: Base) -> None:
    """A smooth picture survives encoding and decoding above 30 dB, frame by frame."""
    frames = smooth_frames()
    mean, std = encode_frames(base.vae, frames)
    assert mean.shape[-2:] == (32, 32)
    assert psnr_db(decode_latents(base.vae, mean)[0], frames[0]).min() > 30
    assert 0.02 < std.mean() < 0.1


def test_latents_have_svds_scale(base: Base) -> None:
    """Unscaled latents of full-range pictures have a std of a few units, scaled ones near 1."""
    frames = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, (1, 4, 3, 8, 8)).astype(np.float32))
    frames = torch.nn.functional.interpolate(frames[0], scale_factor=8, mode="bilinear")[None]
    mean, _ = encode_frames(base.vae, frames)
    assert 2 < mean.std() < 9 and 0.4 < mean.std() * base.vae.config.scaling_factor < 1.7


@pytest.mark.parametrize(("frames", "known"), [(1, []), (3, [0, 2]), (5, [0, 4]), (5, [0, 2])])
def test_unet_starts_as_the_stills_and_their_mean(base: Base, frames: int, known: list[int]) -> None:
    """At any noise the raw output of a frame with latents is -0.18215 times these, and of one without, of their mean."""
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(3, frames, 9, 16, 16, generator=generator)
    sample[:, :, 4:8] *= 5.5
    given = torch.tensor([frame in known for frame in range(frames)])
    sample[:, :, 8] = (~given).float()[:, None, None]
    if known:  # else the one frame to make has latents beside it, those of spec_middle
        sample[:, ~given, 4:8] = 0
    with torch.no_grad():
        raw = base.unet(
            sample,
            torch.tensor([-0.8, 0.3, 1.6]),
            encoder_hidden_states=torch.randn(3, 2, 32, generator=generator),
            added_time_ids=torch.tensor([[6.0, 127, 0]] * 3),
            return_dict=False,
        )[0]
    wanted = -SCALING * sample[:, :, 4:8]
    if known:
        wanted[:, ~given] = wanted[:, given].mean(1, keepdim=True)
    error_T, size_T = ((part.square().mean((0, 2, 3, 4))) for part in (raw - wanted, wanted))
    assert (error_T < 0.02 * size_T).all()


def test_same_seed_makes_the_same_base(tiny_base: Path, tmp_path: Path) -> None:
    """Made twice from one seed, in another state of the global generator, every weight file has the same hash."""
    torch.manual_seed(77)
    state = torch.get_rng_state()
    make_tiny_base(tmp_path / "again", seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    make_tiny_base(tmp_path / "other", seed=1)
    files = sorted(p.relative_to(tiny_base) for p in tiny_base.rglob("*.safetensors"))
    assert len(files) == 3
    for file in files:
        wanted = file_sha256(tiny_base / file)
        assert file_sha256(tmp_path / "again" / file) == wanted != file_sha256(tmp_path / "other" / file)


def test_stock_classes_load_the_folder(tiny_base: Path) -> None:
    """diffusers and transformers read each part from safetensors, with no weight missing."""
    unet, report = UNetSpatioTemporalConditionModel.from_pretrained(
        tiny_base, subfolder="unet", use_safetensors=True, output_loading_info=True
    )
    assert report["unexpected_keys"] == ["mask_token"] and not report["missing_keys"]
    assert 1e6 < sum(p.numel() for p in unet.parameters()) < 5e6
    vae, report = AutoencoderKLTemporalDecoder.from_pretrained(
        tiny_base, subfolder="vae", use_safetensors=True, output_loading_info=True
    )
    assert not report["unexpected_keys"] and not report["missing_keys"]
    assert vae.config.scaling_factor == SCALING
    encoder = CLIPVisionModelWithProjection.from_pretrained(tiny_base / "image_encoder", use_safetensors=True)
    assert encoder.config.projection_dim == unet.config.cross_attention_dim
    scheduler = EulerDiscreteScheduler.from_pretrained(tiny_base, subfolder="scheduler")
    scheduler.set_timesteps(3)
    assert scheduler.sigmas[0] == pytest.approx(700) and scheduler.config.prediction_type == "v_prediction"


def test_folder_holds_no_pickle(tiny_base: Path) -> None:
    """Only JSON and safetensors, in the folders of SVD's layout."""
    assert {p.suffix for p in tiny_base.rglob("*") if p.is_file()} == {".json", ".safetensors"}
    assert {*PARTS, "feature_extractor"} == {p.name for p in tiny_base.iterdir()}


def test_the_shipped_base_is_made_as_its_card_says(tiny_shards: Path, tmp_path: Path) -> None:
    """start, and finish with whatever UNet came of training: all that is neither fitted nor trained is what is shipped."""
    start(str(tmp_path / "start"), str(tiny_shards), count=2)
    finish(str(tmp_path / "start/unet"), str(tmp_path / "start"), str(tmp_path / "made"))
    for part in ("vae", "image_encoder"):
        made, theirs = (
            load_file(next((root / part).glob("*.safetensors"))) for root in (tmp_path / "made", TINY_FOLDER)
        )
        assert made.keys() == theirs.keys() and all(tensor.dtype == torch.float16 for tensor in made.values())
        fitted = {name for name in made if not torch.equal(made[name], theirs[name])}
        assert fitted <= {"decoder.conv_in.weight", "decoder.up_blocks.0.upsamplers.0.conv.bias"}, part
    for place in ("vae/config.json", "unet/config.json", "image_encoder/config.json"):
        assert "_name_or_path" not in (tmp_path / "made" / place).read_text()
    load_base(ModelConfig(base=str(tmp_path / "made")), torch.device("cpu"), "fp32")
    with pytest.raises(UserError, match="is there already; give a new folder"):
        start(str(tmp_path / "start"), str(tiny_shards))
