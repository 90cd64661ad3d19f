"""A convolution along the frames as three matrix products, which a GPU computes faster than a convolution this narrow.

Test: pytest tests/model/test_convolution.py (torch's conv3d, in float64). Each frame's neighbours go through a matrix of
their own, and the products are added where they belong: nothing is unfolded or copied. In bf16 a sum is rounded three times.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class FrameConvolution(torch.autograd.Function):
    """Of three frames at a time, with zeros beyond the ends; the weight is frozen and gets no gradient."""

    @staticmethod
    def forward(ctx: Any, x_BTNI: Tensor, weight_OIK: Tensor) -> Tensor:
        """
        x_BTNI      contiguous
        weight_OIK  K is 3
        returns     (B, T, N, O)
        """
        assert not ctx.needs_input_grad[1]
        ctx.save_for_backward(weight_OIK)
        return _add_up(x_BTNI, [tap_OI.t() for tap_OI in weight_OIK.unbind(2)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (weight_OIK,) = ctx.saved_tensors
        # what a frame gave to the one after it comes back from there
        return _add_up(gradients[0].contiguous(), [*weight_OIK.unbind(2)][::-1]), None


def _add_up(x_BTNI: Tensor, taps_IO: list[Tensor]) -> Tensor:
    """Each frame's own product, and those of the frame before and the one after it."""
    before_IO, own_IO, after_IO = taps_IO
    positions = x_BTNI.shape[2]
    x_BMI = x_BTNI.flatten(1, 2)
    y_BMO = x_BMI @ own_IO
    for part_BMO, neighbours_BMI, tap_IO in (
        (y_BMO[:, positions:], x_BMI[:, :-positions], before_IO),
        (y_BMO[:, :-positions], x_BMI[:, positions:], after_IO),
    ):
        part_BMO.baddbmm_(neighbours_BMI, tap_IO.expand(len(x_BMI), -1, -1))
    return y_BMO.unflatten(1, x_BTNI.shape[1:3])
