"""The kernels of fused.py and fused_cross.py beside torch's own functions in float64, on whatever device they run."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.model.fused import AddNorm, AddScaled, FeedForward, Gated, GroupNorm
from toolkit.model.fused_cross import TableAttention

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# clips, rows, channels, rows of the shift: a tile in part, full ones and one over, channels that no tile divides; more
# chunks than are added up at once, as a clip has on SVD's first level
NORMS = ((1, 40, 64, None), (2, 258, 96, 4), (3, 7, 320, 3), (1, 257, 32, 257))
# what is normed, and what is added before: nothing; a row each for the positions of a frame; as much
ADDS = (((3, 5, 64), None), ((2, 3, 7, 96), (3, 1, 96)), ((2, 3, 7, 1280), (2, 3, 7, 1280)))
SUMS = (((3, 5, 64), 1.0), ((2, 3, 7, 2600), 0.3))  # the last: tiles in part
FEEDS = (((3, 5, 64), 64), ((2, 3, 7, 96), 128))  # and how long what it gives is
GATES = (((3, 5, 64),), ((2, 4, 2600),))  # the last: two tiles a row, one of them in part
# clips, rows, channels, heads, tokens: a tile in part; channels that no tile divides; SVD's heads; so many clips that a
# program takes the largest tiles, and sums over more than one
TABLES = ((1, 7, 32, 2, 2), (2, 150, 96, 5, 2), (3, 33, 320, 20, 2), (60, 330, 64, 5, 4))


def compare_all(device: str) -> Iterator[tuple[str, float]]:
    """Each kernel on each of its cases: name and largest error."""
    kinds: list[tuple[str, Callable[..., float], Sequence[Any]]] = [
        ("norm", compare_norm, NORMS),
        ("add", compare_add, ADDS),
        ("sum", compare_sum, SUMS),
        ("gate", compare_gate, GATES),
        ("feed", compare_feed, FEEDS),
        ("tables", compare_tables, TABLES),
    ]
    for kind, own, cases in kinds:
        for case in cases:
            for name, dtype in DTYPES.items():
                yield f"{kind} {case}, {name}", own(*case, dtype, device)


def compare_norm(clips: int, rows: int, channels: int, shifts: int | None, dtype: torch.dtype, device: str) -> float:
    """The largest error of output and gradient beside the largest number of each: with SiLU, and x kept, or without."""
    x, weight, bias = (
        draw(i, size, dtype, device) for i, size in enumerate([(clips, rows, channels), channels, channels])
    )
    shift = None if shifts is None else draw(3, (shifts, channels), dtype, device)
    errors = []
    for silu in (False, True):

        def norm(x: Tensor, silu: bool = silu) -> Tensor:
            given = x
            if shift is not None:
                x = x + shift.double().repeat_interleave(clips * rows // len(shift), 0).view(x.shape)
            y = F.group_norm(x.transpose(1, 2), 32, weight.double(), bias.double(), 1e-5).transpose(1, 2)
            return torch.stack([given, F.silu(y)] if silu else [y])

        def kernels(x: Tensor, silu: bool = silu) -> Tensor:
            return torch.stack(GroupNorm.apply(x, shift, weight, bias, 32, 1e-5, silu, silu))

        errors.append(compare(kernels, norm, 2 * x + 1))
    return max(errors)


def compare_add(size: tuple[int, ...], added: tuple[int, ...] | None, dtype: torch.dtype, device: str) -> float:
    """The largest error of sum, norm and gradient; where what is added gets one it is of x as well.

    That is part of longer rows.
    """
    weight, bias = (draw(i, size[-1], dtype, device) for i in range(2))
    fixed = None if added in (None, size) else draw(3, added, dtype, device)

    def beside(x: Tensor) -> Tensor | None:
        return lengthen(x.flip(-1))[..., : size[-1]] if added == size else fixed

    def formula(x: Tensor) -> Tensor:
        total = x if added is None else x + beside(x)
        return torch.stack([total, F.layer_norm(total, size[-1:], weight.double(), bias.double(), 1e-5)])

    def kernels(x: Tensor) -> Tensor:
        return torch.stack(AddNorm.apply(x, beside(x), weight, bias, 1e-5))

    return compare(kernels, formula, 2 * draw(4, size, dtype, device) + 1)


def compare_sum(size: tuple[int, ...], scale: float, dtype: torch.dtype, device: str) -> float:
    """The largest error of sum and gradient, that of x and that of what is added to it in one; with a bias or without."""
    bias = draw(0, size[-1], dtype, device) if scale < 1 else None

    def formula(x: Tensor) -> Tensor:
        return x + scale * (x.flip(-1) + (0 if bias is None else bias.double()))

    def kernel(x: Tensor) -> Tensor:
        return AddScaled.apply(x, lengthen(x.flip(-1))[..., : size[-1]], bias, scale)

    return compare(kernel, formula, draw(1, size, dtype, device))


def compare_feed(size: tuple[int, ...], width: int, dtype: torch.dtype, device: str) -> float:
    """The largest error of output and gradient, by a matrix that is longer than what it stands for."""
    channels, hidden = size[-1], 80
    sizes = ((2 * hidden, channels), (2 * hidden,), (channels, hidden), (channels,))
    into, gate_bias, out_of, bias = (draw(i, own, dtype, device) * own[-1] ** -0.5 for i, own in enumerate(sizes))
    more = width - channels

    def formula(x: Tensor) -> Tensor:
        h, gate = F.linear(x, into.double(), gate_bias.double()).chunk(2, -1)
        return F.linear(h * F.gelu(gate), out_of.double(), bias.double())

    def kernels(x: Tensor) -> Tensor:
        return FeedForward.apply(x, into, gate_bias, F.pad(out_of, (0, 0, 0, more)), F.pad(bias, (0, more)))

    return compare(kernels, formula, draw(4, size, dtype, device))


def lengthen(x: Tensor) -> Tensor:
    """Rows with zeros after them."""
    return F.pad(x, (0, 24))


def compare_gate(size: tuple[int, ...], dtype: torch.dtype, device: str) -> float:
    def gate(x: Tensor) -> Tensor:
        h, gate = x.chunk(2, -1)
        return h * F.gelu(gate)

    return compare(Gated.apply, gate, draw(0, size, dtype, device))


def compare_tables(
    clips: int, rows: int, channels: int, heads: int, tokens: int, dtype: torch.dtype, device: str
) -> float:
    """The largest error of output and of each gradient, of x and both tables in one tensor, clip by clip."""
    bias, columns = draw(0, channels, dtype, device), heads * tokens
    sizes = (rows, columns, columns)

    def formula(packed: Tensor) -> Tensor:
        x_BNC, m_BSC, u_BSC = packed.split(sizes, 1)
        scores = torch.bmm(x_BNC, m_BSC.mT).unflatten(-1, (heads, tokens))
        return torch.bmm(scores.softmax(-1).flatten(-2), u_BSC) + bias.double()

    def kernels(packed: Tensor) -> Tensor:
        return TableAttention.apply(*packed.split(sizes, 1), bias, heads)

    packed = draw(1, (clips, sum(sizes), channels), dtype, device)
    packed[:, rows : rows + columns] *= 2 * channels**-0.5  # scores as of trained heads, neither alike nor one alone
    if dtype == torch.bfloat16:
        packed[:, 0] *= 100  # scores whose exponentials no number holds
        packed[:, rows + columns :] += 2  # rounded weights must make nothing of what a head's values have in common
    return compare(kernels, formula, packed, sizes)


def compare(
    kernels: Callable[[Tensor], Any], formula: Callable[[Tensor], Tensor], x: Tensor, sizes: tuple[int, ...] = ()
) -> float:
    """sizes  of parts of x, along its second dimension, whose gradients are compared each by itself"""
    found = []
    for function, own in ((formula, x.double()), (kernels, x)):
        own = own.detach().requires_grad_()
        y = function(own)
        (gradient,) = torch.autograd.grad(y, own, draw(9, y.shape, x.dtype, str(x.device)).to(y.dtype))
        found.append((y, *(gradient.split(sizes, 1) if sizes else [gradient])))
    pairs = zip(*found, strict=True)
    return max(((got - want).abs().max() / want.abs().max()).item() for want, got in pairs)


def draw(seed: int, size: Any, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
