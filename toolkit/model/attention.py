"""One switch for the attention kernel, decided once at start.

Test: pytest tests/model. Kernels launch one grid row per (batch x head) or per batch and fail above 65,535
(facebookresearch/xformers #845, pytorch/pytorch #142228); SVD's temporal attention runs one batch entry per latent
pixel, so large frames get there. Here a larger batch is split and never meets that limit.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from toolkit.errors import UserError, in_one_line

MAX_GRID = 65_535
MAX_FRAMES, FRAME_DIMS = 32, (16, 32, 64, 128)  # what temporal.py computes: frames, channels of a head

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v as (batch, tokens, heads, head_dim) -> the same as q


@dataclass(frozen=True)
class Kernel:
    """What computes attention: of rows, and where it is there along the frames (temporal.FrameAttention's arguments)."""

    rows: Attend
    frames: Callable[..., Tensor] | None = None


def attend_sdpa(q_BNHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v by torch.nn.functional.scaled_dot_product_attention."""
    q, k, v = (x.transpose(1, 2) for x in (q_BNHD, k_BLHD, v_BLHD))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def pin(*backends: SDPBackend) -> Attend:
    """SDPA by the first of these of torch's kernels that can; the backward pass is by the one that ran."""

    def attend(q_BNHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor) -> Tensor:
        with sdpa_kernel(list(backends), set_priority=True):
            return attend_sdpa(q_BNHD, k_BLHD, v_BLHD)

    return attend


def attend_xformers(q_BNHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v by xformers' memory-efficient kernel."""
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(q_BNHD, k_BLHD, v_BLHD)


def attend_frames(heads: int, *parts_BTNnC: Tensor) -> Tensor:
    """Triton's kernel along the frames."""
    from toolkit.model.temporal import FrameAttention

    return FrameAttention.apply(heads, *parts_BTNnC)


# torch's kernels by name; each stands back where it cannot compute a layer's sizes
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION,
}  # fmt: skip
_ROWS: dict[str, Attend] = {"xformers": attend_xformers, "sdpa": attend_sdpa}
_ROWS |= {name: pin(first, *BACKENDS.values(), SDPBackend.MATH) for name, first in BACKENDS.items()}
KERNELS = {name: Kernel(rows) for name, rows in _ROWS.items()}
KERNELS |= {f"{name} + triton": Kernel(rows, attend_frames) for name, rows in _ROWS.items()}


class AttentionProcessor:
    """Runs a diffusers Attention layer of the SVD UNet: no mask, no norms on q and k, no dropout (checked at start)."""

    def __init__(self, kernel: Kernel, max_grid: int = MAX_GRID) -> None:
        self.kernel = kernel
        self.max_grid = max_grid

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: None = None,
    ) -> Tensor:
        assert attention_mask is None, "the SVD UNet attends without a mask"
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (
            layer(x).unflatten(2, (attn.heads, -1))
            for layer, x in ((attn.to_q, hidden_states), (attn.to_k, context), (attn.to_v, context))
        )
        return attn.to_out[1](attn.to_out[0](attend_in_chunks(self.kernel.rows, q, k, v, self.max_grid).flatten(2)))


def attend_in_chunks(
    kernel: Attend, q_BNHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor, max_grid: int = MAX_GRID
) -> Tensor:
    """Run a kernel on no more rows at once than it can take."""
    chunk = max(1, max_grid // q_BNHD.shape[2])
    if len(q_BNHD) <= chunk:  # a split into one would be copied in the backward pass
        return kernel(q_BNHD, k_BLHD, v_BLHD)
    return torch.cat([kernel(*rows) for rows in zip(*(x.split(chunk) for x in (q_BNHD, k_BLHD, v_BLHD)), strict=True)])


def choose_attention(choice: str, device: torch.device, dtype: torch.dtype) -> str:
    """Check a choice; "auto" is "sdpa" where nothing is measured (kernels.py).

    raises  UserError where xformers is asked for and cannot run
    """
    if choice != "xformers":
        return "sdpa"
    why_not = "it has no kernel for the CPU" if device.type != "cuda" else _find_xformers_fault(device, dtype)
    if why_not is not None:
        raise UserError(
            f"model.attention is xformers, but {why_not}; use auto, which takes sdpa or what else runs there"
        )
    return choice


def _find_xformers_fault(device: torch.device, dtype: torch.dtype) -> str | None:
    # a call rather than an import: a card may be too old or too new for the kernels of an installed build
    q_BNHD = torch.zeros(1, 16, 1, 64, device=device, dtype=dtype, requires_grad=True)
    try:
        attend_xformers(q_BNHD, q_BNHD, q_BNHD).sum().backward()
    except ImportError:
        return "it is not installed (pip install .[gpu])"
    except (OSError, RuntimeError, NotImplementedError) as error:
        return f"it does not run here ({in_one_line(error)})"
    return None


def set_attention(unet: nn.Module, kind: str) -> None:
    """Install a kernel, by its name in KERNELS, in every attention layer."""
    from diffusers.models.attention_processor import Attention

    kernel = KERNELS[kind]
    for name, layer in unet.named_modules():
        if isinstance(layer, Attention):
            plain = layer.norm_q is None and layer.norm_k is None and layer.group_norm is None
            assert plain and not layer.residual_connection and layer.rescale_output_factor == 1, name
            if hasattr(layer.processor, "kernel"):
                layer.processor.kernel = kernel
            else:  # diffusers' own
                layer.set_processor(AttentionProcessor(kernel))
