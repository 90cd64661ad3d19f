"""SVD's VAE decodes a clip in chunks of frames: what it gives of the whole clip at once, in the memory of a chunk.

Test: pytest tests/model/test_decode.py (diffusers' own decoder, in float64). The whole clip goes through a module, chunk by
chunk, before the next; between those that mix frames it lies in the CPU's memory. Two things mix frames, both in the second
half of a SpatioTemporalResBlock: group norms over all frames, for which each chunk is measured when it is made, and
convolutions along the frames, which are given a neighbour on each side. Sources: huggingface/diffusers,
autoencoder_kl_temporal_decoder.py, unet_3d_blocks.py, resnet.py; Chan, Golub and LeVeque 1983, for statistics of parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.resnet import SpatioTemporalResBlock
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

Make = Callable[[int, int], Tensor]  # makes a clip's frames from the first number to before the second, (T, C, H, W)


class Clip:
    """A whole clip in the CPU's memory, from where its frames come back to the device where they were made."""

    x_TCHW: Tensor
    device: torch.device

    def __init__(
        self, make: Make, frames: int, chunk: int, norm: nn.GroupNorm | None = None, over: Clip | None = None
    ) -> None:
        """
        frames  of the clip, made chunk by chunk
        norm    over all frames, which stands with a SiLU before the convolution to come; None: neither
        over    a clip of which nobody reads a frame after this clip's is made: its memory is taken where it fits
        """
        self.frames = frames
        parts = []
        for begin in range(0, frames, chunk):
            x_TCHW = make(begin, min(begin + chunk, frames))
            if begin == 0:
                self.device = x_TCHW.device
                fits = over is not None and over.x_TCHW.shape[1:] == x_TCHW.shape[1:]
                self.x_TCHW = over.x_TCHW if over and fits else reserve(x_TCHW, frames)
            # on CUDA this need not be waited for, since whoever reads or writes there again does so on the same stream
            self.x_TCHW[begin : begin + chunk].copy_(x_TCHW, non_blocking=x_TCHW.is_cuda)
            if norm:
                parts.append((len(x_TCHW) / frames, *measure_groups(x_TCHW, norm.num_groups)))
            del x_TCHW  # before the next is made
        self.affine = join_groups(norm, parts) if norm else None

    def __call__(self, begin: int, end: int) -> Tensor:
        """The frames as they were made."""
        return self.x_TCHW[begin:end].to(self.device, non_blocking=True)

    def convolve(self, conv: nn.Conv3d, begin: int, end: int) -> Tensor:
        """The frames after norm, SiLU and a convolution along three of them, which sees zeros beyond the clip's ends."""
        before, after = min(begin, 1), min(self.frames - end, 1)
        x_TCHW = self(begin - before, end + after)
        if self.affine:
            scale_C11, shift_C11 = self.affine
            x_TCHW = F.silu(torch.addcmul(shift_C11, x_TCHW, scale_C11).to(x_TCHW.dtype), inplace=True)
        x_CTHW = F.pad(x_TCHW.transpose(0, 1), (0, 0, 0, 0, 1 - before, 1 - after))
        return F.conv3d(x_CTHW, conv.weight, conv.bias).transpose(0, 1)


@torch.no_grad()
@apply_forward_hook  # as vae.decode is: a VAE that waits on the CPU comes to the device
def decode_in_chunks(vae: Any, latents_TCHW: Tensor, chunk_frames: int) -> Tensor:
    """Decode the unscaled latents of one clip; returns frames_TCHW, as vae.decode(latents_TCHW, num_frames=T).sample."""
    keep = partial(Clip, frames=len(latents_TCHW), chunk=chunk_frames)
    make: Make = partial(_cut, latents_TCHW)
    x: Clip | None = None
    y: Clip | None = None
    for module in _list_modules(vae.decoder):
        if isinstance(module, SpatioTemporalResBlock):
            space, time = partial(module.spatial_res_block, temb=None), module.temporal_res_block
            make = x = keep(partial(_then, space, make), norm=time.norm1, over=x)
            y = keep(partial(x.convolve, time.conv1), norm=time.norm2, over=y)
            make = partial(_mix, module, x, y)
        elif isinstance(module, nn.Conv3d):
            make = partial(keep(make).convolve, module)
        else:  # it mixes no frames, so a chunk goes on to it at once
            make = partial(_then, module, make)
    return keep(make)(0, len(latents_TCHW))


def _list_modules(decoder: Any) -> Iterator[nn.Module]:
    """The modules of a TemporalDecoder in the order in which it calls them."""
    first, *others = decoder.mid_block.resnets
    yield from (decoder.conv_in, first)
    for attention, block in zip(decoder.mid_block.attentions, others, strict=False):
        yield from (attention, block)
    for up_block in decoder.up_blocks:
        yield from (*up_block.resnets, *(up_block.upsamplers or ()))
    yield from (decoder.conv_norm_out, decoder.conv_act, decoder.conv_out, decoder.time_conv_out)


def _cut(x_TCHW: Tensor, begin: int, end: int) -> Tensor:
    return x_TCHW[begin:end]


def _then(module: Callable[[Tensor], Tensor], make: Make, begin: int, end: int) -> Tensor:
    return module(make(begin, end))


def _mix(block: Any, x: Clip, y: Clip, begin: int, end: int) -> Tensor:
    """The end of a block: x of its spatial half, y of its first convolution along the frames."""
    x_TCHW = x(begin, end)
    y_TCHW = x_TCHW + y.convolve(block.temporal_res_block.conv2, begin, end)
    return block.time_mixer(x_TCHW, y_TCHW)  # by a learned share, the same for all frames


def reserve(x_TCHW: Tensor, frames: int) -> Tensor:
    """The CPU's memory for a clip of such frames."""
    return torch.empty(frames, *x_TCHW.shape[1:], dtype=x_TCHW.dtype, device="cpu", pin_memory=x_TCHW.is_cuda)


def measure_groups(x_TCHW: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Each group's variance and mean over these frames, (G,), in fp32 at least."""
    x_TGCHW = x_TCHW.to(torch.promote_types(x_TCHW.dtype, torch.float32)).unflatten(1, (groups, -1))
    return torch.var_mean(x_TGCHW, (0, 2, 3, 4), correction=0)


def join_groups(norm: nn.GroupNorm, parts: list[tuple[float, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """A group norm over all parts as x scale + shift, each (C, 1, 1).

    parts  share of all numbers, variance and mean of each: no sum of squares, whose difference would lose the digits
    """
    shares, variances, means = zip(*parts, strict=True)
    var_KG, mean_KG = torch.stack(variances), torch.stack(means)
    share_K1 = mean_KG.new_tensor(shares)[:, None]
    mean_G = (share_K1 * mean_KG).sum(0)
    var_G = (share_K1 * (var_KG + (mean_KG - mean_G) ** 2)).sum(0)
    channels = norm.num_channels // norm.num_groups
    scale_C = norm.weight * (var_G + norm.eps).rsqrt().repeat_interleave(channels)
    shift_C = norm.bias - mean_G.repeat_interleave(channels) * scale_C
    return scale_C[:, None, None], shift_C[:, None, None]
