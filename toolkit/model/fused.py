"""What the blocks compute number by number, in Triton kernels: norms with what is beside them, sums, a feed-forward's gate.

Test: pytest tests/model/test_fused.py (torch's own, in float64). torch's group norm gives a GPU 32 things to do at once for
a clip, and wants channels first where convolutions want them last; its gate is three passes over parts of a tensor; what is
added before a layer norm, beside its gradient, or by a convolution as bias, is a pass of its own. Layers are frozen, so no
gradient is made of their weights. Imported where it runs only: Triton is there with CUDA only.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from toolkit.model.projection import multiply

CHUNK, ROWS, CHANNELS = tl.constexpr(64), tl.constexpr(32), tl.constexpr(64)  # a program's tile: to sum, to apply
STRIP, AHEAD = tl.constexpr(4), tl.constexpr(4)  # rows of a chunk that are summed at once, and how many such are read
NUMBERS = 1024  # numbers that a program gates, or norms in rows


@triton.jit
def _at(start, rows, channel, channels, HEIGHT: tl.constexpr):  # type: ignore[no-untyped-def]
    """A tile of a frame's (M, C): where in it, and what of it exists."""
    row = start + tl.arange(0, HEIGHT)
    return row[:, None] * channels + channel[None, :], (row < rows)[:, None] & (channel < channels)[None, :]


@triton.jit
def _of_channels(values, row, channel, channels):  # type: ignore[no-untyped-def]
    """A row's values (1, C) of a program's channels, as fp32."""
    return tl.load(values + row * channels + channel, channel < channels, 0.0).to(tl.float32)[None, :]


@triton.jit
def _slope(gradient, z, SILU: tl.constexpr):  # type: ignore[no-untyped-def]
    """The gradient of z, from that of what is made of it."""
    if SILU:
        share = tl.sigmoid(z)
        gradient = gradient * share * (1 + z * (1 - share))
    return gradient


@triton.jit
def sum_chunks(  # type: ignore[no-untyped-def]
    x, shift, gradient, scale, offset, sums, rows, channels, frames, BACKWARD: tl.constexpr, SILU: tl.constexpr
):
    """Of a chunk of rows, sums over it of each channel: of x and x^2, or of z's gradient and of that times x."""
    chunk, frame = tl.program_id(0), tl.program_id(1)
    clip, channel = frame // frames, tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    first = frame.to(tl.int64) * rows * channels  # more than 2^31 numbers may stand before a frame
    if shift is not None:
        moved = _of_channels(shift, frame, channel, channels)
    if BACKWARD:
        a, b = _of_channels(scale, clip, channel, channels), _of_channels(offset, clip, channel, channels)
    one, two = tl.zeros((STRIP, CHANNELS), tl.float32), tl.zeros((STRIP, CHANNELS), tl.float32)
    for start in tl.range(chunk * CHUNK, (chunk + 1) * CHUNK, STRIP, loop_unroll_factor=AHEAD):
        at, there = _at(start, rows, channel, channels, STRIP)
        value = tl.load(x + first + at, there, 0.0).to(tl.float32)
        if shift is not None:
            value = tl.where(there, value + moved, 0.0)
        weight = value
        if BACKWARD:
            weight = _slope(tl.load(gradient + first + at, there, 0.0).to(tl.float32), value * a + b, SILU)
        one += weight
        two += weight * value
    out = sums + (frame * tl.num_programs(0) + chunk) * 2 * channels + channel
    tl.store(out, tl.sum(one, 0), channel < channels)
    tl.store(out + channels, tl.sum(two, 0), channel < channels)


@triton.jit
def finish_forward(  # type: ignore[no-untyped-def]
    sums, weight, bias, mean, rstd, scale, offset, rows, channels, chunks, eps,
    SIZE: tl.constexpr, HEIGHT: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Of a group: mean and 1 / deviation; of its channels the scale and the offset that norm them."""
    clip, group = tl.program_id(0), tl.program_id(1)
    one, two, channel, exists = _sum_group(sums, clip, group, channels, chunks, SIZE, HEIGHT, STEPS)
    count = (rows * (channels // tl.num_programs(1))).to(tl.float32)
    middle = tl.sum(one, 0) / count
    spread = 1 / tl.sqrt(tl.maximum(tl.sum(two, 0) / count - middle * middle, 0.0) + eps)
    tl.store(mean + clip * tl.num_programs(1) + group, middle)
    tl.store(rstd + clip * tl.num_programs(1) + group, spread)
    a = tl.load(weight + channel, exists, 0.0).to(tl.float32) * spread
    tl.store(scale + clip * channels + channel, a, exists)
    tl.store(
        offset + clip * channels + channel, tl.load(bias + channel, exists, 0.0).to(tl.float32) - middle * a, exists
    )


@triton.jit
def finish_backward(  # type: ignore[no-untyped-def]
    sums, weight, mean, rstd, of_x, constant, rows, channels, chunks,
    SIZE: tl.constexpr, HEIGHT: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Of a group, what of x, and what constant, is in x's gradient beside scale times z's."""
    clip, group = tl.program_id(0), tl.program_id(1)
    one, two, channel, exists = _sum_group(sums, clip, group, channels, chunks, SIZE, HEIGHT, STEPS)
    count = (rows * (channels // tl.num_programs(1))).to(tl.float32)
    w = tl.load(weight + channel, exists, 0.0).to(tl.float32)
    own, with_x = tl.sum(w * one, 0), tl.sum(w * two, 0)
    middle = tl.load(mean + clip * tl.num_programs(1) + group)
    spread = tl.load(rstd + clip * tl.num_programs(1) + group)
    slope = -spread * spread * spread * (with_x - middle * own) / count
    nothing = tl.zeros((SIZE,), tl.float32)
    tl.store(of_x + clip * channels + channel, nothing + slope, exists)
    tl.store(constant + clip * channels + channel, nothing - slope * middle - spread * own / count, exists)


@triton.jit
def _sum_group(  # type: ignore[no-untyped-def]
    sums, clip, group, channels, chunks, SIZE: tl.constexpr, HEIGHT: tl.constexpr, STEPS: tl.constexpr
):
    """Over all chunks the two sums of each channel of a group; these channels, and which of SIZE exist."""
    size = channels // tl.num_programs(1)
    place = tl.arange(0, SIZE)
    channel, exists = group * size + place, place < size
    one, two = tl.zeros((HEIGHT, SIZE), tl.float32), tl.zeros((HEIGHT, SIZE), tl.float32)
    for step in range(STEPS):
        chunk = step * HEIGHT + tl.arange(0, HEIGHT)
        there = (chunk < chunks)[:, None] & exists[None, :]
        at = sums + ((clip * chunks + chunk) * 2 * channels)[:, None] + channel[None, :]
        one += tl.load(at, there, 0.0)
        two += tl.load(at + channels, there, 0.0)
    return tl.sum(one, 0), tl.sum(two, 0), channel, exists


@triton.jit
def apply_norm(  # type: ignore[no-untyped-def]
    x, shift, gradient, beside, scale, offset, of_x, constant, out, rows, channels, frames,
    BACKWARD: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """silu(scale x + offset), or the gradient of x, to which another one is added."""
    frame, channel = tl.program_id(1), tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    clip, first = frame // frames, frame.to(tl.int64) * rows * channels
    at, there = _at(tl.program_id(0) * ROWS, rows, channel, channels, ROWS)
    value = tl.load(x + first + at, there, 0.0).to(tl.float32)
    if shift is not None:
        value += _of_channels(shift, frame, channel, channels)
    a = _of_channels(scale, clip, channel, channels)
    z = value * a + _of_channels(offset, clip, channel, channels)
    if BACKWARD:
        y = a * _slope(tl.load(gradient + first + at, there, 0.0).to(tl.float32), z, SILU)
        y += value * _of_channels(of_x, clip, channel, channels) + _of_channels(constant, clip, channel, channels)
        if beside is not None:
            y += tl.load(beside + first + at, there, 0.0).to(tl.float32)
    elif SILU:
        y = z * tl.sigmoid(z)
    else:
        y = z
    tl.store(out + first + at, y.to(out.dtype.element_ty), there)


class GroupNorm(torch.autograd.Function):
    """Group norm, and SiLU if wanted, of x + shift, over the rows of a clip and the channels of a group."""

    @staticmethod
    def forward(
        ctx: Any,
        x_NMC: Tensor,
        shift_FC: Tensor | None,
        weight_C: Tensor,
        bias_C: Tensor,
        groups: int,
        eps: float,
        silu: bool,
        keep: bool,
    ) -> tuple[Tensor, ...]:
        """
        x_NMC     contiguous
        shift_FC  added before to as many rows each as there are rows to one of F; it gets no gradient
        keep      whether x, for whatever else reads it, comes before the result: its gradient is added in the same pass
        """
        assert x_NMC.is_contiguous() and not any(ctx.needs_input_grad[1:4])
        clips, rows, channels = x_NMC.shape
        frames = 1 if shift_FC is None else len(shift_FC) // clips
        per_frame, chunks, by_chunk, by_row, sizes = _split(x_NMC, frames, groups)
        sums = x_NMC.new_empty(clips, chunks, 2, channels, dtype=torch.float32)
        scale, offset = (x_NMC.new_empty(clips, channels, dtype=torch.float32) for _ in range(2))
        mean, rstd = (x_NMC.new_empty(clips, groups, dtype=torch.float32) for _ in range(2))
        out = torch.empty_like(x_NMC)
        sum_chunks[by_chunk](
            x_NMC, shift_FC, None, None, None, sums, per_frame, channels, frames, False, silu, num_warps=1
        )
        finish_forward[(clips, groups)](
            sums, weight_C, bias_C, mean, rstd, scale, offset, rows, channels, chunks, eps, **sizes
        )
        apply_norm[by_row](
            x_NMC, shift_FC, None, None, scale, offset, None, None, out, per_frame, channels, frames, False, silu
        )
        ctx.save_for_backward(x_NMC, shift_FC, weight_C, mean, rstd, scale, offset)
        ctx.groups, ctx.silu, ctx.frames = groups, silu, frames
        return (x_NMC, out) if keep else (out,)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x_NMC, shift_FC, weight_C, mean, rstd, scale, offset = ctx.saved_tensors
        *kept, gradient = (gradient.contiguous() for gradient in gradients)
        beside = kept[0] if kept else None
        clips, rows, channels = x_NMC.shape
        per_frame, chunks, by_chunk, by_row, sizes = _split(x_NMC, ctx.frames, ctx.groups)
        sums = scale.new_empty(clips, chunks, 2, channels)
        of_x, constant, out = torch.empty_like(scale), torch.empty_like(scale), torch.empty_like(x_NMC)
        sum_chunks[by_chunk](
            x_NMC, shift_FC, gradient, scale, offset, sums, per_frame, channels, ctx.frames, True, ctx.silu, num_warps=1
        )
        finish_backward[(clips, ctx.groups)](
            sums, weight_C, mean, rstd, of_x, constant, rows, channels, chunks, **sizes
        )
        apply_norm[by_row](
            x_NMC, shift_FC, gradient, beside, scale, offset, of_x, constant, out,
            per_frame, channels, ctx.frames, True, ctx.silu,
        )  # fmt: skip
        return out, None, None, None, None, None, None, None


def _split(x_NMC: Tensor, frames: int, groups: int) -> tuple[int, int, Any, Any, dict[str, int]]:
    """Who does what of clips, each of so many frames that the same is added to.

    returns  rows of a frame; chunks of a clip; programs that sum and that apply; the tile of a group's channels and a
             clip's chunks that one to finish adds up, in how many steps
    """
    clips, rows, channels = x_NMC.shape
    per_frame, blocks = rows // frames, triton.cdiv(channels, CHANNELS.value)
    assert per_frame * channels < 2**31  # kernels count in 32 bits inside a frame
    # the first dimension alone goes beyond 65,535
    by_chunk = triton.cdiv(per_frame, CHUNK.value), clips * frames, blocks
    by_row = triton.cdiv(per_frame, ROWS.value), clips * frames, blocks
    chunks = frames * by_chunk[0]
    size, height = triton.next_power_of_2(channels // groups), min(256, triton.next_power_of_2(chunks))
    warps = max(1, min(8, size * height // 512))
    sizes = {"SIZE": size, "HEIGHT": height, "STEPS": triton.cdiv(chunks, height), "num_warps": warps}
    return per_frame, chunks, by_chunk, by_row, sizes


@triton.jit
def norm_rows(  # type: ignore[no-untyped-def]
    x, added, added_stride, to_total, to_normed, weight, bias, total, out, rows, channels, per_added, shifts, eps,
    BACKWARD: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """x + added and its layer norm, a row of them at once; or of x the gradient, from those of both."""
    row, channel = tl.program_id(0) * HEIGHT + tl.arange(0, HEIGHT), tl.arange(0, WIDTH)
    exists = channel < channels
    there = (row < rows)[:, None] & exists[None, :]
    at = row.to(tl.int64)[:, None] * channels + channel[None, :]
    value = tl.load(x + at, there, 0.0).to(tl.float32)
    if added is not None:  # a row for each, or one for so many: found in 32 bits, for a GPU divides those fast
        beside = added + (row // per_added % shifts).to(tl.int64)[:, None] * added_stride + channel[None, :]
        rounded = (value + tl.load(beside, there, 0.0).to(tl.float32)).to(total.dtype.element_ty)
        tl.store(total + at, rounded, there)
        value = rounded.to(tl.float32)  # what the backward pass reads
    value = tl.where(there, value - (tl.sum(value, 1) / channels)[:, None], 0.0)
    spread = 1 / tl.sqrt(tl.sum(value * value, 1) / channels + eps)[:, None]
    value *= spread
    w = tl.load(weight + channel, exists, 0.0).to(tl.float32)[None, :]
    if BACKWARD:
        g = tl.load(to_normed + at, there, 0.0).to(tl.float32) * w
        y = g - (tl.sum(g, 1) / channels)[:, None] - value * (tl.sum(g * value, 1) / channels)[:, None]
        y = y * spread + tl.load(to_total + at, there, 0.0).to(tl.float32)
    else:
        y = value * w + tl.load(bias + channel, exists, 0.0).to(tl.float32)[None, :]
    tl.store(out + at, y.to(out.dtype.element_ty), there)


class AddNorm(torch.autograd.Function):
    """x + added and its layer norm, both (..., C); the sum alone is kept for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, added: Tensor | None, weight_C: Tensor, bias_C: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """
        added  of x's size; or (T, 1, C) for x (B, T, N, C), which gets no gradient; or None: x is the sum
        """
        assert not any(ctx.needs_input_grad[2:4])
        x = x.contiguous()
        total, out = x if added is None else torch.empty_like(x), torch.empty_like(x)
        ctx.alike = added is not None and added.shape == x.shape
        assert ctx.alike or not ctx.needs_input_grad[1]
        _norm(x, added, None, None, weight_C, bias_C, total, out, eps)
        ctx.save_for_backward(total, weight_C, bias_C)
        ctx.eps = eps
        return total, out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        total, weight_C, bias_C = ctx.saved_tensors
        out = torch.empty_like(total)
        to_total, to_normed = (gradient.contiguous() for gradient in gradients)
        _norm(total, None, to_total, to_normed, weight_C, bias_C, out, out, ctx.eps)
        return out, out if ctx.alike else None, None, None, None


def _norm(
    x: Tensor, added: Tensor | None, to_total: Tensor | None, to_normed: Tensor | None, weight_C: Tensor, bias_C: Tensor,
    total: Tensor, out: Tensor, eps: float,
) -> None:  # fmt: skip
    channels = x.shape[-1]
    rows, width = x.numel() // channels, triton.next_power_of_2(channels)
    per_added = 1 if added is None or added.shape == x.shape else x.shape[-2]
    shifts = 1 if added is None else added.numel() // channels
    height = 1 if to_normed is not None else max(1, NUMBERS // width)
    norm_rows[(triton.cdiv(rows, height),)](
        x, *_lay_rows(added), to_total, to_normed, weight_C, bias_C, total, out, rows, channels, per_added, shifts, eps,
        to_normed is not None, height, width, num_warps=max(1, min(8, width // 512)),
    )  # fmt: skip


def _lay_rows(x: Tensor | None) -> tuple[Tensor | None, int]:
    """x (..., C) and how far its rows lie apart, which may be parts of longer ones."""
    if x is None:
        return None, 0
    x_RC = x.flatten(0, -2)
    x_RC = x_RC if x_RC.stride(1) == 1 else x_RC.contiguous()
    return x_RC, x_RC.stride(0)


@triton.jit
def add_rows(x, y, y_stride, bias, out, rows, channels, scale):  # type: ignore[no-untyped-def]
    """x + scale (y + bias)."""
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    start = tl.program_id(0).to(tl.int64) * ROWS
    at, there = _at(start, rows, channel, channels, ROWS)
    y_at = (start + tl.arange(0, ROWS))[:, None] * y_stride + channel[None, :]
    value = tl.load(y + y_at, there, 0.0).to(tl.float32)
    if bias is not None:
        value += _of_channels(bias, 0, channel, channels)
    value = tl.load(x + at, there, 0.0).to(tl.float32) + scale * value
    tl.store(out + at, value.to(out.dtype.element_ty), there)


class AddScaled(torch.autograd.Function):
    """x + scale (y + bias): the end of a residual block, its convolution's bias in the same pass; or of a transformer's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, bias_C: Tensor | None, scale: float) -> Tensor:
        """
        x       (..., C), contiguous
        y       (..., C)
        bias_C  gets no gradient
        """
        assert x.shape == y.shape and x.is_contiguous() and not ctx.needs_input_grad[2]
        ctx.scale, out, channels = scale, torch.empty_like(x), x.shape[-1]
        rows = x.numel() // channels
        grid = triton.cdiv(rows, ROWS.value), triton.cdiv(channels, CHANNELS.value)
        add_rows[grid](x, *_lay_rows(y), bias_C, out, rows, channels, scale)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        return gradient, gradient if ctx.scale == 1 else ctx.scale * gradient, None, None


@triton.jit
def gate_rows(  # type: ignore[no-untyped-def]
    x, gradient, out, rows, channels, BACKWARD: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr
):
    """h gelu(gate) of a row's h and gate, or the gradients of both side by side."""
    row = tl.program_id(0).to(tl.int64) * HEIGHT + tl.arange(0, HEIGHT)
    channel = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    there = (row < rows)[:, None] & (channel < channels)[None, :]
    at = (row * 2 * channels)[:, None] + channel[None, :]
    half = (row * channels)[:, None] + channel[None, :]
    h, gate = tl.load(x + at, there, 0.0).to(tl.float32), tl.load(x + at + channels, there, 0.0).to(tl.float32)
    share = 0.5 + 0.5 * tl.erf(gate * 0.7071067811865476)
    if BACKWARD:
        g = tl.load(gradient + half, there, 0.0).to(tl.float32)
        slope = share + gate * tl.exp(-0.5 * gate * gate) * 0.3989422804014327
        tl.store(out + at, (g * gate * share).to(out.dtype.element_ty), there)
        tl.store(out + at + channels, (g * h * slope).to(out.dtype.element_ty), there)
    else:
        tl.store(out + half, (h * gate * share).to(out.dtype.element_ty), there)


class Gated(torch.autograd.Function):
    """h gelu(gate) of h and gate side by side, (..., 2 C) to (..., C), which alone are kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x)
        out = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
        _gate(x, None, out, out, False)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        out, gradient = torch.empty_like(x), gradients[0].contiguous()
        _gate(x, gradient, out, gradient, True)
        return out


class FeedForward(torch.autograd.Function):
    """A gated feed-forward layer, frozen, of which the input of the gate alone is kept for the backward pass.

    What it gives may be longer by zeros, for projection.multiply's reason: parts would need a pass of its own for the bias.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, in_GC: Tensor, in_bias_G: Tensor, out_PH: Tensor, out_bias_P: Tensor) -> Tensor:
        """
        x                   (..., C)
        in_GC               to what is gated and the gate, H each
        out_PH, out_bias_P  from there, C rows and others of zeros
        returns             (..., C), its rows parts of P
        """
        assert not any(ctx.needs_input_grad[1:])
        channels = x.shape[-1]
        x_MC = x.flatten(0, -2)
        gated_MG = F.linear(x_MC, in_GC, in_bias_G)
        hidden_MH = gated_MG.new_empty(len(gated_MG), out_PH.shape[1])
        _gate(gated_MG, None, hidden_MH, hidden_MH, False)
        ctx.save_for_backward(gated_MG, in_GC, out_PH)
        return torch.addmm(out_bias_P, hidden_MH, out_PH.t())[:, :channels].unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        gated_MG, in_GC, out_PH = ctx.saved_tensors
        (gradient,) = gradients
        channels = gradient.shape[-1]
        hidden_grad_MH, gated_grad_MG = gradient.flatten(0, -2) @ out_PH[:channels], torch.empty_like(gated_MG)
        _gate(gated_MG, hidden_grad_MH, gated_grad_MG, hidden_grad_MH, True)
        return multiply(gated_grad_MG, in_GC).view(gradient.shape), None, None, None, None


def _gate(x: Tensor, gradient: Tensor | None, out: Tensor, like: Tensor, backward: bool) -> None:
    channels = like.shape[-1]
    rows = like.numel() // channels
    # the largest power of two that divides them: 256 and more in SVD
    width = max(64, min(NUMBERS, channels & -channels))
    height = NUMBERS // width
    gate_rows[(triton.cdiv(rows, height), triton.cdiv(channels, width))](
        x, gradient, out, rows, channels, backward, height, width
    )
