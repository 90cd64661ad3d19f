"""What is counted is what a hand counts. Run: pytest tests/run/test_meter.py"""

import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from toolkit.run.meter import Meter

N, D, H = 7, 16, 32


def make(*sizes: int) -> torch.Tensor:
    return torch.empty(sizes, device="meta")


def test_two_layers() -> None:
    """Operations, bytes, FLOPs and peak of a small network, forward and backward, as worked out by hand."""
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(D, H, bias=False), nn.ReLU(), nn.Linear(H, D, bias=False))
    x_ND = make(N, D)
    with Meter([x_ND, *net.parameters()]) as meter:
        y_ND = net(x_ND)
        meter.phase = "backward"
        torch.autograd.backward(y_ND, make(N, D))
    forward, backward = meter.costs["forward"], meter.costs["backward"]
    assert forward.ops_by_name == {"mm": 2, "relu": 1}
    assert forward.flop == 2 * 2 * N * D * H and backward.flop == 3 * 2 * N * D * H  # x needs no gradient
    assert backward.ops_by_name == {"mm": 3, "threshold_backward": 1}
    weights, hidden, ends = D * H, N * H, N * D
    assert forward.moved_bytes == 4 * ((ends + weights + hidden) + 2 * hidden + (hidden + weights + ends))
    assert forward.peak_bytes == 4 * 2 * hidden  # before and after the ReLU
    # the output, its gradient, both layers' own gradients, and that of what the first layer gave
    assert backward.peak_bytes == 4 * (2 * ends + 2 * weights + hidden)


def test_nothing_is_left() -> None:
    """Whatever was made is forgotten when it is deleted; what was there before is never counted."""
    x, weight = make(N, D), make(D, D)
    with Meter([x, weight]) as meter:
        y = x @ weight
        z = y.relu().view(-1)[3:]
        assert meter.live_bytes == 2 * 4 * N * D  # a view is no memory of its own
        del y, z
        gc.collect()
    assert meter.live_bytes == 0 and meter.costs["forward"].peak_bytes == 2 * 4 * N * D


def test_what_is_read_again_and_again_counts_once() -> None:
    """A tensor that is expanded is read as often as it stands in memory."""
    row = make(1, D)
    with Meter([row]) as meter:
        row.expand(N, D) + 1
    assert meter.costs["forward"].moved_bytes == 4 * (D + N * D)


def test_what_was_seen_before_costs_the_same() -> None:
    """Layers of one size after another: values, layouts and costs as torch gives them the first time, and none on a CPU."""
    mixed, strided = make(N, D).half(), make(D, N).T

    def compute(x_ND: torch.Tensor) -> list[torch.Tensor | None]:
        normed, whole = F.layer_norm(x_ND, (D,)), x_ND.int()
        grads = torch.ops.aten.convolution_backward(
            *(torch.empty(1, 2, 5, device=x_ND.device) for _ in range(2)), torch.empty(2, 2, 1, device=x_ND.device),
            None, [1], [0], [1], False, [0], 1, [False, True, False],
        )  # fmt: skip
        return [normed, x_ND * 2, whole * 2, whole * 2.0, x_ND.bool() * 1, x_ND.bool() * True, *grads]

    def look(tensors: list[torch.Tensor | None]) -> list[object]:
        return [x if x is None else (x.shape, x.stride(), x.dtype, x.device.type) for x in tensors]

    wanted = [look(compute(x)) for x in (strided, mixed.float(), mixed)]
    runs = []
    for _ in range(2):
        with Meter([strided, mixed]) as meter:
            runs.append(([look(compute(x)) for x in (strided, mixed.float(), mixed)], meter.costs["forward"]))
    assert runs[0] == runs[1] and runs[0][0] == wanted
    with Meter([]):
        assert {x.device.type for x in compute(torch.ones(N, D)) if x is not None} == {"cpu"}


@pytest.mark.parametrize("keys", [5, 11])
def test_attention_is_one_kernel(keys: int) -> None:
    """Forward and backward of attention: one operation each, FLOPs of the two and of the five products, no scores kept."""
    q, k, v = make(2, 3, 9, 8), make(2, 3, keys, 8), make(2, 3, keys, 8)
    for tensor in (q, k, v):
        tensor.requires_grad_(True)
    stock = F.scaled_dot_product_attention
    with Meter([q, k, v]) as meter:
        out = F.scaled_dot_product_attention(q, k, v)
        assert out.shape == q.shape and out.transpose(1, 2).is_contiguous()
        meter.phase = "backward"
        out.sum().backward()
    assert F.scaled_dot_product_attention is stock
    product = 2 * (2 * 3) * 9 * keys * 8
    assert meter.costs["forward"].flop == 2 * product and meter.costs["backward"].flop == 5 * product
    assert meter.costs["forward"].ops_by_name["flash_attention"] == 1
    assert meter.costs["backward"].ops_by_name["flash_attention_backward"] == 1
    assert (q.grad is not None and q.grad.shape == q.shape) and (k.grad is not None and k.grad.shape == k.shape)
