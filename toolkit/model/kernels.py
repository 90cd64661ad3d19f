"""How fast the attention kernels are on this machine, those that compute what the formula says.

Test: pytest tests/model/test_kernels.py. Who wins depends on the card, the libraries and the sizes; who errs is left out.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from toolkit.model.attention import BACKENDS, Attend, attend_frames, attend_in_chunks, attend_xformers, pin
from toolkit.rng import rng

TOLERANCE = 2**-5  # of the largest number: bf16 holds 8 bits, and kernels round several times
CHECKED = 1 << 25  # numbers in the matrices of scores that the formula is computed with: a hundred megabytes
ROUNDS, CALLS = 3, 5

Size = tuple[int, int, int, int]  # batch, tokens, heads, head_dim

CANDIDATES: dict[str, Attend] = {"xformers": attend_xformers} | {name: pin(it) for name, it in BACKENDS.items()}


def attend_triton(q_BNHD: Tensor, k_BNHD: Tensor, v_BNHD: Tensor) -> Tensor:
    """Triton's kernel along frames, given rows of frames."""
    qkv_TBnC = torch.stack([x.transpose(0, 1).flatten(2) for x in (q_BNHD, k_BNHD, v_BNHD)], -2)
    return attend_frames(q_BNHD.shape[2], qkv_TBnC[None])[0].unflatten(-1, q_BNHD.shape[2:]).transpose(0, 1)


def measure(candidates: Mapping[str, Attend], size: Size, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Seconds of a forward and backward pass of self-attention, without the candidates that fail or err."""
    draws = (rng(0, "attention", i, device) for i in range(4))
    inputs = [torch.randn(size, generator=draw, dtype=dtype, device=device) for draw in draws]
    rows = max(1, CHECKED // size[1] ** 2)
    wanted = _run(pin(SDPBackend.MATH), [x[-rows:, :, -1:].float() for x in inputs])
    seconds = {}
    for name, attend in candidates.items():
        try:
            found = [x[-rows:, :, -1:] for x in _run(attend, inputs)]
            if all(_agree(got, want) for got, want in zip(found, wanted, strict=True)):
                seconds[name] = min(_time(attend, inputs) for _ in range(ROUNDS))
        except Exception:  # not installed, not for this card, dtype or size: of each library's and compiler's own kind
            continue
    return seconds


def _agree(got: Tensor, want: Tensor) -> bool:
    # over one token the gradients of queries and keys are zero, but for rounding
    return bool((got - want).abs().max() <= TOLERANCE * want.abs().max().clamp(min=1e-3))


def _run(attend: Attend, inputs: list[Tensor]) -> list[Tensor]:
    q, k, v, gradient = (x.detach().requires_grad_(i < 3) for i, x in enumerate(inputs))
    out = attend_in_chunks(attend, q, k, v)
    return [out, *torch.autograd.grad(out, (q, k, v), gradient)]


def _time(attend: Attend, inputs: list[Tensor]) -> float:
    on_gpu = inputs[0].is_cuda
    if on_gpu:
        torch.cuda.synchronize()
    began_s = time.perf_counter()
    for _ in range(CALLS):
        _run(attend, inputs)
    if on_gpu:
        torch.cuda.synchronize()
    return (time.perf_counter() - began_s) / CALLS
