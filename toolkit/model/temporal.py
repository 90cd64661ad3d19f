"""Attention along few frames in one Triton kernel, which reads queries, keys and values where the projections wrote them.

Test: pytest tests/model/test_temporal.py (against float64). A kernel for long sequences pads five frames to 64 or 128, and
wants the frames of a position side by side. Here a program takes 32 rows of one head: all frames of as many positions as
fit, which do not see one another. It is imported where it runs only, because Triton is there with CUDA only.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = tl.constexpr(32)


@triton.jit
def _find_rows(positions, heads, FRAMES: tl.constexpr):  # type: ignore[no-untyped-def]
    """This program's head; for each of its rows, its place in (B, T, N), that of its position here, whether it exists."""
    together: tl.constexpr = ROWS // FRAMES
    program, row = tl.program_id(0), tl.arange(0, ROWS)
    block, blocks, place = program // heads, tl.cdiv(positions, together), row // FRAMES
    clip = (block // blocks).to(tl.int64)  # more than 2^31 numbers may stand before a row
    position = block % blocks * together + place
    at = (clip * FRAMES + row % FRAMES) * positions + position
    return program % heads, at, place, (place < together) & (position < positions)


@triton.jit
def _weigh(q_RD, k_RD, place, scale):  # type: ignore[no-untyped-def]
    """softmax(q k^T / sqrt(D)) over the rows of the same position."""
    scores = tl.dot(q_RD, tl.trans(k_RD), input_precision="ieee") * scale
    scores = tl.where(place[:, None] == place[None, :], scores, float("-inf"))
    weights = tl.exp(scores - tl.max(scores, 1)[:, None])
    return weights / tl.sum(weights, 1)[:, None]


@triton.jit
def attend_frames_forward(  # type: ignore[no-untyped-def]
    q, k, v, row_stride, out, positions, heads, scale, FRAMES: tl.constexpr, DIM: tl.constexpr
):
    head, row, place, there = _find_rows(positions, heads, FRAMES)
    column, there = (head * DIM + tl.arange(0, DIM))[None, :], there[:, None]
    read, write = row[:, None] * row_stride + column, row[:, None] * (heads * DIM) + column
    q_RD, k_RD = tl.load(q + read, there, 0.0), tl.load(k + read, there, 0.0)
    v_RD = tl.load(v + read, there, 0.0)
    weights = _weigh(q_RD, k_RD, place, scale)
    y_RD = tl.dot(weights.to(v_RD.dtype), v_RD, input_precision="ieee")
    tl.store(out + write, y_RD.to(v_RD.dtype), there)


@triton.jit
def attend_frames_backward(  # type: ignore[no-untyped-def]
    q, k, v, row_stride, gradient, q_grad, k_grad, v_grad, grad_stride, positions, heads, scale,
    FRAMES: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    head, row, place, there = _find_rows(positions, heads, FRAMES)
    column, there = (head * DIM + tl.arange(0, DIM))[None, :], there[:, None]
    read, write = row[:, None] * row_stride + column, row[:, None] * grad_stride + column
    q_RD, k_RD = tl.load(q + read, there, 0.0), tl.load(k + read, there, 0.0)
    v_RD = tl.load(v + read, there, 0.0)
    g_RD = tl.load(gradient + row[:, None] * (heads * DIM) + column, there, 0.0)
    weights = _weigh(q_RD, k_RD, place, scale)
    weights_grad = tl.dot(g_RD, tl.trans(v_RD), input_precision="ieee")
    scores_grad = weights * (weights_grad - tl.sum(weights * weights_grad, 1)[:, None]) * scale
    weights, scores_grad = weights.to(v_RD.dtype), scores_grad.to(v_RD.dtype)
    tl.store(v_grad + write, tl.dot(tl.trans(weights), g_RD, input_precision="ieee").to(v_RD.dtype), there)
    tl.store(q_grad + write, tl.dot(scores_grad, k_RD, input_precision="ieee").to(v_RD.dtype), there)
    tl.store(k_grad + write, tl.dot(tl.trans(scores_grad), q_RD, input_precision="ieee").to(v_RD.dtype), there)


class FrameAttention(torch.autograd.Function):
    """Each position attends to itself in all frames; only what it is given is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, heads: int, *parts_BTNnC: Tensor) -> Tensor:
        """
        parts_BTNnC  queries, keys and values in this order, in one tensor or in three: (B, T, N, 3, C) or (B, T, N, 1, C);
                     at most 32 frames; C / heads 16, 32, 64 or 128
        returns      (B, T, N, C)
        """
        ctx.save_for_backward(*parts_BTNnC)
        ctx.heads = heads
        out_BTNC = torch.empty_like(parts_BTNnC[0][..., 0, :], memory_format=torch.contiguous_format)
        grid, sizes = _plan(out_BTNC, heads)
        q, k, v = _unpack(parts_BTNnC)
        attend_frames_forward[grid](q, k, v, q.stride(0), out_BTNC, *sizes)
        return out_BTNC

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        gradient_BTNC, parts_BTNnC = gradients[0].contiguous(), ctx.saved_tensors
        parts_grad = [torch.empty_like(part, memory_format=torch.contiguous_format) for part in parts_BTNnC]
        grid, sizes = _plan(gradient_BTNC, ctx.heads)
        (q, k, v), (q_grad, k_grad, v_grad) = _unpack(parts_BTNnC), _unpack(parts_grad)
        attend_frames_backward[grid](
            q, k, v, q.stride(0), gradient_BTNC, q_grad, k_grad, v_grad, q_grad.stride(0), *sizes
        )
        return None, *parts_grad


def _unpack(parts_BTNnC: Any) -> list[Tensor]:
    """Queries, keys and values as (B * T * N, C), alike in memory."""
    return [x_MC for part in parts_BTNnC for x_MC in part.flatten(0, 2).unbind(1)]


def _plan(x_BTNC: Tensor, heads: int) -> tuple[tuple[int], tuple[int, int, float, int, int]]:
    """How many programs, all in the grid's one dimension that goes beyond 65,535; and what each must know."""
    clips, frames, positions, channels = x_BTNC.shape
    dim = channels // heads
    programs = clips * triton.cdiv(positions, ROWS.value // frames) * heads
    return (programs,), (positions, heads, dim**-0.5, frames, dim)
