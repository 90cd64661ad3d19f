"""Linear layers of one input computed as one, with their LoRA: three matrix products in place of four operations a layer.

Test: pytest tests/model/test_prepare.py. PEFT injects the layers, scales them and names their matrices; here they are only
multiplied. Equation: y = x W^T + s (x A^T) B^T (arXiv 2106.09685, eq. 3).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.model.dropout import KeyedDropout
from toolkit.model.flat import Stack

TILE, MOST_PARTS = 128, 10  # see multiply: columns that a GPU multiplies at once, parts of the rows


class LoraLinear(torch.autograd.Function):
    """n frozen layers with their LoRA: x (M, I) to (M, n O)."""

    @staticmethod
    def forward(
        ctx: Any, x_MI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, a_NRI: Tensor, b_NOR: Tensor, scale: float
    ) -> Tensor:
        n, outputs, rank = b_NOR.shape
        a_RI = a_NRI.flatten(0, 1)
        y_MO = F.linear(x_MI, weight_OI, bias_O)
        low_MR = F.linear(x_MI, a_RI)
        y_NMO, low_NMR = _by_layer(y_MO, n), _by_layer(low_MR, n)
        y_NMO.baddbmm_(low_NMR, b_NOR.transpose(1, 2), alpha=scale)
        ctx.save_for_backward(x_MI, weight_OI, a_RI, b_NOR, low_MR)
        ctx.scale = scale
        return y_MO

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x_MI, weight_OI, a_RI, b_NOR, low_MR = ctx.saved_tensors
        n, scale = len(b_NOR), ctx.scale
        g_MO = gradients[0].contiguous()
        g_NMO = _by_layer(g_MO, n)
        # beta 0: what is given to be added is not read
        b_grad = torch.baddbmm(b_NOR, g_NMO.transpose(1, 2), _by_layer(low_MR, n), beta=0, alpha=scale)
        low_MR_grad = torch.empty_like(low_MR)
        _by_layer(low_MR_grad, n).baddbmm_(g_NMO, b_NOR, beta=0, alpha=scale)
        a_grad = (low_MR_grad.t() @ x_MI).view(n, -1, x_MI.shape[1])
        x_grad = multiply(g_MO, weight_OI).addmm_(low_MR_grad, a_RI) if ctx.needs_input_grad[0] else None
        return x_grad, None, None, a_grad, b_grad, None


def multiply(x_MK: Tensor, y_KN: Tensor) -> Tensor:
    """x y, on a GPU in parts of its rows where there are not whole tiles of columns.

    For SVD's 320 columns cuBLAS takes a kernel for the whole that needs 1.5 to 1.8 times as long as for parts, or for 384
    columns: on an H200 118, 70 and 73 us of 25,920 x 2,560.
    """
    if not x_MK.is_cuda or y_KN.shape[1] % TILE == 0:
        return x_MK @ y_KN
    parts = next((parts for parts in range(MOST_PARTS, 1, -1) if len(x_MK) % parts == 0), 1)
    return torch.bmm(x_MK.view(parts, -1, len(y_KN)), y_KN.expand(parts, -1, -1)).flatten(0, 1)


def add_lora(
    x_MI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, a_NRI: Tensor, b_NOR: Tensor, scale: float
) -> Tensor:
    """LoraLinear as a formula."""
    low_MNR = F.linear(x_MI, a_NRI.flatten(0, 1)).unflatten(1, (len(a_NRI), -1))
    return F.linear(x_MI, weight_OI, bias_O) + scale * torch.einsum("mnr,nor->mno", low_MNR, b_NOR).flatten(1)


def _by_layer(x_MO: Tensor, n: int) -> Tensor:
    return x_MO.view(len(x_MO), n, -1).transpose(0, 1)


class Projection:
    """Layers of one input as one callable: x (..., I) to (..., n, O)."""

    def __init__(self, layers: dict[str, nn.Module]) -> None:
        """layers  by their names; of one kind (find_kind). Their frozen weights become views of one tensor"""
        self.n = len(layers)
        self.weight_OI = stack_weights(list(layers.values())).flatten(0, 1)
        self.bias = get_base(next(iter(layers.values()))).bias
        assert self.bias is None or self.n == 1
        adapted = find_kind(next(iter(layers.values())))
        self.scale = adapted[1] if adapted else 0.0
        self.stacks = stack_lora(layers) if adapted else ()

    def __call__(self, x: Tensor) -> Tensor:
        rows_MI = x.flatten(0, -2)
        if not self.stacks:
            y_MO = F.linear(rows_MI, self.weight_OI, self.bias)
        else:
            a_NRI, b_NOR = (stack.value for stack in self.stacks)
            # a compiler takes no operation in place on a part of a result, and needs none
            add = add_lora if torch.compiler.is_compiling() else LoraLinear.apply
            y_MO = add(rows_MI, self.weight_OI, self.bias, a_NRI, b_NOR, self.scale)
        return y_MO.view(*x.shape[:-1], self.n, -1)


def get_base(layer: Any) -> nn.Linear:
    """The frozen layer inside of PEFT's, or itself."""
    return layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer


def find_kind(layer: Any) -> tuple[int, float] | None:
    """Rank and scale of a layer's one plain LoRA; None where it has none. Raises ValueError for any other adapter."""
    if not hasattr(layer, "get_base_layer"):
        return None
    (name,) = layer.lora_A
    if layer.lora_variant or isinstance(layer.lora_dropout[name], KeyedDropout) or layer.lora_A[name].bias is not None:
        raise ValueError("DoRA and dropout are PEFT's to compute")
    return layer.r[name], layer.scaling[name]


def stack_lora(layers: Iterable[str]) -> tuple[Stack, Stack]:
    """The A and the B matrices of layers, by the names of these; a FlatAdapter fills them."""
    a, b = (Stack(f"{name}.lora_{side}.default.weight" for name in layers) for side in "AB")
    return a, b


@torch.no_grad()
def stack_weights(layers: Sequence[nn.Module], transposed: bool = False) -> Tensor:
    """Lay the frozen weights of layers side by side, (n, O, I), and make them views of it: no memory is spent.

    transposed  as (n, I, O) in memory
    """
    weights = [get_base(layer).weight for layer in layers]
    stacked = torch.stack([weight.t() for weight in weights]).mT if transposed else torch.stack(weights)
    for layer, weight in zip(layers, stacked, strict=True):
        get_base(layer).weight.data = weight
    return stacked
