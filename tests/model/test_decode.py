"""In chunks of frames a clip decodes to what it does at once, in less memory. Run: pytest tests/model/test_decode.py"""

import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLTemporalDecoder
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from toolkit.model import decode
from toolkit.model.decode import Clip, decode_in_chunks
from toolkit.run.meter import Meter


def make_vae(dtype: torch.dtype = torch.float64) -> Any:
    """A VAE of three levels whose decoder mixes frames in time, with pixels of a deviation of about one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderKLTemporalDecoder(
            block_out_channels=(32, 64, 96), down_block_types=("DownEncoderBlock2D",) * 3, layers_per_block=2
        )
        for name, parameter in vae.decoder.named_parameters():  # norms are ones, biases and mixers zeros
            if parameter.ndim < 2:
                nn.init.normal_(parameter, float("norm" in name and "weight" in name), 0.5)
    return vae.to(dtype=dtype).requires_grad_(False).eval()


def make_latents(frames: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(frames)
    return (torch.randn(frames, 4, 4, 6, generator=generator, dtype=torch.float64) * 5).to(dtype)


def error(made: Tensor, wanted: Tensor) -> float:
    assert made.shape == wanted.shape
    return float((made.double() - wanted.double()).abs().max())


def test_the_stock_decoder_mixes_frames() -> None:
    """What the tests below would not see otherwise: cut at a chunk's end, frames differ by far more than they allow."""
    vae, latents = make_vae(), make_latents(5)
    whole = vae.decode(latents, num_frames=5).sample
    assert 0.3 < whole.std() < 3
    cut = torch.cat([vae.decode(part, num_frames=len(part)).sample for part in latents.split(2)])
    assert ((cut - whole).abs().amax((1, 2, 3)) > 0.1).all()


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["float64", "float32"])
@pytest.mark.parametrize("frames", [1, 2, 5, 7])
def test_chunks_of_every_size_equal_the_stock_decode(frames: int, dtype: torch.dtype, atol: float) -> None:
    """Fewer frames than the clip has, all of them, or more; the latents are left as they are.

    The stock decode is in float64, since in fp32 its own norms cost it more digits than those of chunks do.
    """
    vae, latents = make_vae(dtype), make_latents(frames, dtype)
    given, wanted = latents.clone(), make_vae().decode(latents.double(), num_frames=frames).sample
    for chunk_frames in range(1, frames + 2):
        made = decode_in_chunks(vae, latents, chunk_frames)
        assert made.dtype == dtype and error(made, wanted) < atol
    assert torch.equal(latents, given)


def test_half_precision_is_the_stock_decoders() -> None:
    """In bfloat16 chunks are no further from the decode in float64 than the stock decode is."""
    latents = make_latents(5, torch.bfloat16)
    wanted = make_vae().decode(latents.double(), num_frames=5).sample
    vae = make_vae(torch.bfloat16)
    stock = (vae.decode(latents, num_frames=5).sample.double() - wanted).square().mean().sqrt()
    made = (decode_in_chunks(vae, latents, 2).double() - wanted).square().mean().sqrt()
    assert 0 < made < 1.1 * stock


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("chunk", [1, 2, 3, 7])
def test_a_norm_over_chunks_far_from_zero(chunk: int, dtype: torch.dtype) -> None:
    """Means of a hundred or a thousand deviations, other ones in each frame, cost no more digits than in the stock norm."""
    generator = torch.Generator().manual_seed(0)
    level, step = (1000, 3) if dtype == torch.float32 else (100, 1)
    levels_T111 = level + step * torch.arange(7)[:, None, None, None]
    x_TCHW = (levels_T111 + torch.randn(7, 8, 5, 6, generator=generator)).to(dtype)
    norm, conv = nn.GroupNorm(4, 8).to(dtype), nn.Conv3d(8, 8, (3, 1, 1), padding=(1, 0, 0), bias=False).to(dtype)
    nn.init.dirac_(conv.weight)  # what it is given is what it gives
    with torch.no_grad():
        clip = Clip(lambda begin, end: x_TCHW[begin:end], 7, chunk, norm)
        made = torch.cat([clip.convolve(conv, t, t + 1) for t in range(7)])
        x_1CTHW = x_TCHW.transpose(0, 1)[None]
        stock = F.silu(norm(x_1CTHW))[0].transpose(0, 1)
        wanted = F.silu(norm.double()(x_1CTHW.double()))[0].transpose(0, 1)
    assert error(made, wanted) < 2 * error(stock, wanted)


def test_a_vae_that_waits_elsewhere_is_called() -> None:
    """Offloading hangs a hook on the VAE, which brings it to the device; vae.decode calls it, and so do chunks."""
    vae, called = make_vae(), []
    vae._hf_hook = SimpleNamespace(pre_forward=called.append)
    decode_in_chunks(vae, make_latents(2), 1)
    assert called == [vae]


def measure_peak(monkeypatch: pytest.MonkeyPatch, frames: int, chunk_frames: int | None) -> int:
    """Bytes alive at once on the device, here meta: the weights left out, and what lies in the CPU's memory."""
    vae = make_vae(torch.float32).to("meta")
    latents = torch.empty(frames, 4, 16, 16, device="meta")
    with monkeypatch.context() as patch, Meter([latents, *vae.parameters()]) as meter:

        def reserve(x_TCHW: Tensor, frames: int) -> Tensor:
            with _disable_current_modes():
                kept_TCHW = x_TCHW.new_empty(frames, *x_TCHW.shape[1:])
            storage = kept_TCHW.untyped_storage()
            meter._known.add(storage._cdata)
            weakref.finalize(storage, meter._known.discard, storage._cdata)
            return kept_TCHW

        patch.setattr(decode, "reserve", reserve)
        load = Clip.__call__
        patch.setattr(Clip, "__call__", lambda *args: load(*args).clone())  # from the CPU it would be a copy
        if chunk_frames is None:
            vae.decode(latents, num_frames=frames)
        else:
            decode_in_chunks(vae, latents, chunk_frames)
    return meter.costs["forward"].peak_bytes


def test_memory_does_not_grow_with_the_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the finished frames do; at once everything would. Four times the frames take four times the memory then."""
    whole = [measure_peak(monkeypatch, frames, None) for frames in (8, 32)]
    assert whole[1] > 3.9 * whole[0]
    for chunk_frames in (1, 2, 4):
        chunks = [measure_peak(monkeypatch, frames, chunk_frames) for frames in (8, 32)]
        assert chunks[1] < 1.01 * chunks[0]
        assert chunks[0] < 1.01 * whole[0] * chunk_frames / 8  # that of a clip of as many frames at once
