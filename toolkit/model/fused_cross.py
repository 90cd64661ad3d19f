"""Cross-attention by its tables (cross.py) in Triton kernels: softmax(x M^T) U + bias, read and written once.

Test: pytest tests/model/test_fused.py (the formula, in float64). A table has 10 or 20 rows on SVD's first two levels: as
matrix products these go by a library's slow kernels, and each product, the softmax and the bias are a pass of their own.
Here a program takes some rows of x through both tables; of what lies between only the softmax's weights are kept. Its
gradient goes the same way, U and M in each other's place; those of the tables are summed over parts of the rows first, in
an order that is always the same. The bias is frozen. Imported where it runs only: Triton is there with CUDA only.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

HEIGHTS = (64, 32, 16)  # rows of a program: as many as leave PROGRAMS of them, for the tables are read by each
CHANNELS = 64  # that are multiplied at once
# by the bytes of a number, rows that are summed at once, and how far loads run ahead; 4 bytes are multiplied in registers,
# which hold fewer
STEPS = {2: (64, 3), 4: (16, 1)}
PROGRAMS = 132  # what an H100 computes at once
WARPS = 4


@triton.jit
def attend_rows(  # type: ignore[no-untyped-def]
    x, into, out_of, bias, weights, scores_grad, out, rows, channels, columns,
    BACKWARD: tl.constexpr, LENGTH: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Rows of x through the tables: x M^T, its softmax over the LENGTH columns of each head, times U; or backwards.

    BACKWARD  y's gradient, U, M and the softmax's weights give the gradients of the scores and, where wanted, of x
    WIDTH     columns of weights and scores_grad: a power of two; those beyond the table's come to nothing
    """
    clip, column = tl.program_id(1), tl.arange(0, WIDTH)
    row = tl.program_id(0) * HEIGHT + tl.arange(0, HEIGHT)
    exists = (row < rows)[:, None]
    at = clip.to(tl.int64) * rows + row  # more than 2^31 numbers may stand before a row
    table = (clip * columns + column)[:, None] * channels
    scores = tl.zeros((HEIGHT, WIDTH), tl.float32)
    for start in range(0, channels, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)[None, :]
        x_NC = tl.load(x + at[:, None] * channels + channel, exists & (channel < channels), 0.0)
        into_SC = tl.load(into + table + channel, (column < columns)[:, None] & (channel < channels), 0.0)
        scores = tl.dot(x_NC, tl.trans(into_SC), scores, input_precision="ieee")
    scores = tl.reshape(scores, (HEIGHT, WIDTH // LENGTH, LENGTH))
    beside = at[:, None] * WIDTH + column[None, :]
    if BACKWARD:
        share = tl.load(weights + beside, exists, 1.0).to(tl.float32)
        share = tl.reshape(share, (HEIGHT, WIDTH // LENGTH, LENGTH))
        # what is the same for all columns of a head changes nothing, though rounded weights do not add up to 1
        mean = tl.sum(share * scores, 2, keep_dims=True) / tl.sum(share, 2, keep_dims=True)
        between = share * (scores - mean)
    else:
        between = tl.exp(scores - tl.max(scores, 2, keep_dims=True))
        between /= tl.sum(between, 2, keep_dims=True)
    between = tl.reshape(between, (HEIGHT, WIDTH)).to(weights.dtype.element_ty)
    tl.store((scores_grad if BACKWARD else weights) + beside, between, exists)
    if out is not None:
        for start in range(0, channels, CHANNELS):
            channel = start + tl.arange(0, CHANNELS)[None, :]
            out_of_SC = tl.load(out_of + table + channel, (column < columns)[:, None] & (channel < channels), 0.0)
            y_NC = tl.dot(between, out_of_SC, input_precision="ieee")
            if not BACKWARD:
                y_NC += tl.load(bias + channel, channel < channels, 0.0).to(tl.float32)
            y_NC = y_NC.to(out.dtype.element_ty)
            tl.store(out + at[:, None] * channels + channel, y_NC, exists & (channel < channels))


@triton.jit
def sum_tables(  # type: ignore[no-untyped-def]
    x, gradient, weights, scores_grad, sums, rows, channels, columns, steps,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Of some rows, what they add to the gradients of M and of U."""
    part, clip, column = tl.program_id(0), tl.program_id(2), tl.arange(0, WIDTH)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    m_SC, u_SC = tl.zeros((WIDTH, CHANNELS), tl.float32), tl.zeros((WIDTH, CHANNELS), tl.float32)
    for step in range(steps):
        row = (part * steps + step) * HEIGHT + tl.arange(0, HEIGHT)
        at, exists = (clip.to(tl.int64) * rows + row)[:, None], (row < rows)[:, None]
        there = exists & (channel < channels)
        scores_grad_NS = tl.load(scores_grad + at * WIDTH + column[None, :], exists, 0.0)
        x_NC = tl.load(x + at * channels + channel, there, 0.0)
        m_SC = tl.dot(tl.trans(scores_grad_NS), x_NC, m_SC, input_precision="ieee")
        weights_NS = tl.load(weights + at * WIDTH + column[None, :], exists, 0.0)
        gradient_NC = tl.load(gradient + at * channels + channel, there, 0.0)
        u_SC = tl.dot(tl.trans(weights_NS), gradient_NC, u_SC, input_precision="ieee")
    there = (column < columns)[:, None] & (channel < channels)
    out = sums + ((clip * tl.num_programs(0) + part) * 2 * columns + column)[:, None] * channels + channel
    tl.store(out, m_SC, there)
    tl.store(out + columns * channels, u_SC, there)


class TableAttention(torch.autograd.Function):
    """y = softmax(x M^T) U + bias, the softmax over the tokens of each head."""

    @staticmethod
    def forward(ctx: Any, x_BNC: Tensor, m_BSC: Tensor, u_BSC: Tensor, bias_C: Tensor, heads: int) -> Tensor:
        """
        m_BSC, u_BSC  for each head the rows of its tokens, 2, 4, 8, ... of them
        """
        assert not ctx.needs_input_grad[3]
        x_BNC, m_BSC, u_BSC = x_BNC.contiguous(), m_BSC.contiguous(), u_BSC.contiguous()
        width = max(16, triton.next_power_of_2(m_BSC.shape[1]))  # less is not multiplied
        weights_BNS, y_BNC = x_BNC.new_empty(*x_BNC.shape[:2], width), torch.empty_like(x_BNC)
        _attend(x_BNC, m_BSC, u_BSC, bias_C, weights_BNS, None, y_BNC, heads)
        ctx.save_for_backward(x_BNC, m_BSC, u_BSC, weights_BNS)
        ctx.heads = heads
        return y_BNC

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x_BNC, m_BSC, u_BSC, weights_BNS = ctx.saved_tensors
        gradient_BNC, scores_grad_BNS = gradients[0].contiguous(), torch.empty_like(weights_BNS)
        x_grad = torch.empty_like(x_BNC) if ctx.needs_input_grad[0] else None
        _attend(gradient_BNC, u_BSC, m_BSC, None, weights_BNS, scores_grad_BNS, x_grad, ctx.heads)
        if not any(ctx.needs_input_grad[1:3]):
            return x_grad, None, None, None, None
        m_grad, u_grad = _sum(x_BNC, gradient_BNC, weights_BNS, scores_grad_BNS, m_BSC.shape[1]).unbind(1)
        return x_grad, m_grad, u_grad, None, None


def _attend(
    x_BNC: Tensor, into_BSC: Tensor, out_of_BSC: Tensor, bias_C: Tensor | None, weights_BNS: Tensor,
    scores_grad_BNS: Tensor | None, out_BNC: Tensor | None, heads: int,
) -> None:  # fmt: skip
    (clips, rows, channels), (columns, width) = x_BNC.shape, (into_BSC.shape[1], weights_BNS.shape[2])
    height = next((h for h in HEIGHTS if clips * triton.cdiv(rows, h) >= PROGRAMS), HEIGHTS[-1])
    attend_rows[(triton.cdiv(rows, height), clips)](
        x_BNC, into_BSC, out_of_BSC, bias_C, weights_BNS, scores_grad_BNS, out_BNC, rows, channels, columns,
        scores_grad_BNS is not None, columns // heads, height, width, CHANNELS,
        num_warps=WARPS, num_stages=STEPS[x_BNC.element_size()][1],
    )  # fmt: skip


def _sum(x_BNC: Tensor, gradient_BNC: Tensor, weights_BNS: Tensor, scores_grad_BNS: Tensor, columns: int) -> Tensor:
    """The gradients of M and U, (B, 2, S, C)."""
    clips, rows, channels = x_BNC.shape
    height, stages = STEPS[x_BNC.element_size()]
    blocks, most = triton.cdiv(channels, CHANNELS), triton.cdiv(rows, height)
    steps = triton.cdiv(most, triton.cdiv(2 * PROGRAMS, blocks * clips))  # of each program, for twice PROGRAMS of them
    parts = triton.cdiv(most, steps)
    sums = x_BNC.new_empty(clips, parts, 2, columns, channels, dtype=torch.float32)
    sum_tables[(parts, blocks, clips)](
        x_BNC, gradient_BNC, weights_BNS, scores_grad_BNS, sums, rows, channels, columns, steps,
        height, weights_BNS.shape[2], CHANNELS, num_warps=WARPS, num_stages=stages,
    )  # fmt: skip
    return sums.sum(1).to(x_BNC.dtype)
