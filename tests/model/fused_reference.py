"""The kernels of fused.py beside torch's own functions in float64, on whatever device they run."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.model.fused import AddNorm, AddScaled, Gated, GroupNorm

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# clips, rows, channels, rows of the shift: a tile in part, one full and one over, channels that no tile divides
NORMS = ((1, 40, 64, None), (2, 258, 96, 4), (3, 7, 320, 3))
# what is normed, and what is added before: nothing; a row each for the positions of a frame; as much
ADDS = (((3, 5, 64), None), ((2, 3, 7, 96), (3, 1, 96)), ((2, 3, 7, 1280), (2, 3, 7, 1280)))
SUMS = (((3, 5, 64), 1.0), ((2, 3, 7, 2600), 0.3))  # the last: tiles in part
GATES = ((3, 5, 64), (2, 4, 2600))  # the last: two tiles a row, one of them in part


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
    """The largest error of sum, norm and gradient; where what is added gets one it is of x as well."""
    weight, bias = (draw(i, size[-1], dtype, device) for i in range(2))
    fixed = None if added in (None, size) else draw(3, added, dtype, device)

    def beside(x: Tensor) -> Tensor | None:
        return x.flip(-1) if added == size else fixed

    def formula(x: Tensor) -> Tensor:
        total = x if added is None else x + beside(x)
        return torch.stack([total, F.layer_norm(total, size[-1:], weight.double(), bias.double(), 1e-5)])

    def kernels(x: Tensor) -> Tensor:
        return torch.stack(AddNorm.apply(x, beside(x), weight, bias, 1e-5))

    return compare(kernels, formula, 2 * draw(4, size, dtype, device) + 1)


def compare_sum(size: tuple[int, ...], scale: float, dtype: torch.dtype, device: str) -> float:
    """The largest error of sum and gradient, that of x and that of what is added to it in one."""
    bias = draw(0, size[-1], dtype, device)

    def formula(x: Tensor) -> Tensor:
        return x + scale * (x.flip(-1) + bias.double())

    return compare(lambda x: AddScaled.apply(x, x.flip(-1), bias, scale), formula, draw(1, size, dtype, device))


def compare_gate(size: tuple[int, ...], dtype: torch.dtype, device: str) -> float:
    def gate(x: Tensor) -> Tensor:
        h, gate = x.chunk(2, -1)
        return h * F.gelu(gate)

    return compare(Gated.apply, gate, draw(0, size, dtype, device))


def compare(kernels: Callable[[Tensor], Any], formula: Callable[[Tensor], Tensor], x: Tensor) -> float:
    found = []
    for function, own in ((formula, x.double()), (kernels, x)):
        own = own.detach().requires_grad_()
        y = function(own)
        found.append((y, *torch.autograd.grad(y, own, draw(9, y.shape, x.dtype, str(x.device)).to(y.dtype))))
    pairs = zip(*found, strict=True)
    return max(((got - want).abs().max() / want.abs().max()).item() for want, got in pairs)


def draw(seed: int, size: Any, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
