"""Our attention is diffusers' attention. Run: pytest tests/model/test_attention.py"""

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch.nn.attention import SDPBackend
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from tests.model.conftest import forward, make_inputs
from toolkit.errors import UserError
from toolkit.model.attention import (
    KERNELS,
    AttentionProcessor,
    Kernel,
    attend_sdpa,
    choose_attention,
    pin,
    set_attention,
)
from toolkit.model.unet import FramerUNet


def stock_output(unet: FramerUNet) -> torch.Tensor:
    unet.set_attn_processor(AttnProcessor2_0())
    with torch.no_grad():
        return forward(unet, make_inputs())


def test_sdpa_equals_diffusers(unet: FramerUNet) -> None:
    """The whole UNet gives the same output with diffusers' AttnProcessor2_0 and with ours, in every layer."""
    wanted = stock_output(unet)
    set_attention(unet, "sdpa")
    layers = [m for m in unet.modules() if isinstance(m, Attention)]
    assert layers and all(isinstance(m.processor, AttentionProcessor) for m in layers)
    with torch.no_grad():
        assert torch.allclose(forward(unet, make_inputs()), wanted, atol=1e-6)


@pytest.mark.parametrize("context", [None, 3])
def test_one_layer_equals_diffusers(context: int | None) -> None:
    """Self- and cross-attention, output and gradient."""
    torch.manual_seed(0)
    layer = Attention(24, cross_attention_dim=None if context is None else 10, heads=3, dim_head=8)
    x = torch.randn(5, 7, 24, requires_grad=True)
    tokens = None if context is None else torch.randn(5, context, 10)
    results = []
    for processor in (AttnProcessor2_0(), AttentionProcessor(KERNELS["sdpa"])):
        layer.set_processor(processor)
        out = layer(x, encoder_hidden_states=tokens)
        results.append((out, *torch.autograd.grad(out.square().sum(), [x, layer.to_q.weight, layer.to_v.weight])))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*results, strict=True))


def test_sdpa_is_the_formula() -> None:
    """softmax(q k^T / sqrt(D)) v, written out."""
    q, k, v = (torch.randn(2, n, 3, 8, dtype=torch.float64) for n in (4, 5, 5))
    weight = torch.einsum("bnhd,blhd->bhnl", q, k).div(8**0.5).softmax(-1)
    assert torch.allclose(attend_sdpa(q, k, v), torch.einsum("bhnl,blhd->bnhd", weight, v))


@pytest.mark.parametrize("max_grid", [1, 3, 4, 7, 3 * 5, 65_535])
def test_chunks_change_nothing(max_grid: int) -> None:
    """Whatever the limit, no call has more than max_grid rows (or one clip), and the output is that of one call."""
    torch.manual_seed(0)
    layer, x, tokens = (
        Attention(24, cross_attention_dim=10, heads=3, dim_head=8),
        torch.randn(5, 7, 24),
        torch.randn(5, 2, 10),
    )
    layer.set_processor(AttentionProcessor(KERNELS["sdpa"]))
    whole, sizes = layer(x, encoder_hidden_states=tokens), []

    def counting(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        sizes.append(len(q))
        assert len(q) == len(k) == len(v)
        return attend_sdpa(q, k, v)

    layer.set_processor(AttentionProcessor(Kernel(counting), max_grid))
    assert torch.allclose(layer(x, encoder_hidden_states=tokens), whole, atol=1e-6)
    assert sum(sizes) == 5 and all(size == 1 or size * 3 <= max_grid for size in sizes)


def test_choice_on_the_cpu() -> None:
    """auto and sdpa are SDPA on a CPU; xformers is refused there with what to do."""
    cpu = torch.device("cpu")
    assert choose_attention("auto", cpu, torch.float32) == choose_attention("sdpa", cpu, torch.float32) == "sdpa"
    with pytest.raises(UserError, match="model.attention is xformers, but .*use auto"):
        choose_attention("xformers", cpu, torch.float32)


@pytest.mark.parametrize(
    ("backend", "flash"), [(SDPBackend.FLASH_ATTENTION, True), (SDPBackend.MATH, False)], ids=["flash", "math"]
)
def test_a_pinned_kernel_runs_and_nothing_else_is_pinned(backend: SDPBackend, flash: bool) -> None:
    """In the forward pass and in the one computed a second time that kernel runs; around them it is torch's choice."""
    q, k, v = (torch.randn(2, 5, 3, 16, dtype=torch.float64, requires_grad=True) for _ in range(3))
    attend, ran = pin(backend), []

    def watched(*qkv: torch.Tensor) -> torch.Tensor:
        out = attend(*qkv)
        for found in (out, attend_sdpa(*qkv)):
            assert found.grad_fn is not None
            ran.append("Flash" in found.grad_fn.next_functions[0][0].name())
        return out

    with set_checkpoint_early_stop(False):  # else what is watched would not be reached the second time
        out = checkpoint(watched, q, k, v, use_reentrant=False)
    found = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert ran == [flash, True] * 2
    wanted = torch.autograd.grad(attend_sdpa(q, k, v).square().sum(), (q, k, v))
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(found, wanted, strict=True))


def test_a_kernel_that_cannot_run_leaves_no_trace() -> None:
    """Alone it raises, as where kernels are measured, and pins nothing; in a network another of torch's takes its place."""
    q = torch.randn(2, 5, 3, 16)
    with pytest.raises(RuntimeError):
        pin(SDPBackend.CUDNN_ATTENTION)(q, q, q)
    assert torch.equal(KERNELS["cudnn"].rows(q, q, q), attend_sdpa(q, q, q))
