"""How fast the attention kernels are on this machine, those that compute what the formula says.

Test: pytest tests/model/test_kernels.py. Who wins depends on the card, the libraries and the sizes; who errs is left out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from toolkit.model.attention import BACKENDS, Attend, attend_frames, attend_in_chunks, attend_xformers, pin
from toolkit.rng import rng

TOLERANCE = 2**-5  # of the largest number: bf16 holds 8 bits, and kernels round several times
CHECKED = 1 << 25  # numbers in the scores that the formula is computed with: 0.13 GB, some of which it makes
ROUNDS, CALLS = 3, 5
AHEAD = 100  # products of two matrices, 0.2 ms each on an H100

Size = tuple[int, int, int, int]  # batch, tokens, heads, head_dim
# queries, keys and values as (batch, tokens, 3, heads, D) to (batch, tokens, heads, D)
Packed = Callable[[Tensor], Tensor]


def by_rows(attend: Attend) -> Packed:
    """A kernel as the blocks call it: on parts of what one projection wrote."""

    def attend_packed(qkv_BN3HD: Tensor) -> Tensor:
        q, k, v = qkv_BN3HD.unbind(2)
        return attend_in_chunks(attend, q, k, v)

    return attend_packed


def attend_triton(qkv_BT3HD: Tensor) -> Tensor:
    """Triton's kernel along frames."""
    qkv_BTN3C = qkv_BT3HD.transpose(0, 1).flatten(3)[None]
    return attend_frames(qkv_BT3HD.shape[3], qkv_BTN3C)[0].unflatten(-1, qkv_BT3HD.shape[3:]).transpose(0, 1)


CANDIDATES: dict[str, Attend] = {"xformers": attend_xformers} | {name: pin(it) for name, it in BACKENDS.items()}


def measure(
    candidates: Mapping[str, Packed],
    sizes: Sequence[Size],
    dtype: torch.dtype,
    device: torch.device,
    frames: bool = False,
) -> dict[str, float]:
    """Seconds of a forward and backward pass of self-attention, without the candidates that fail or err.

    sizes   the first is timed; a candidate must compute all of them
    frames  whether tokens are frames, which lie in memory one after another with all rows in each
    raises  torch.OutOfMemoryError, which says nothing of a candidate
    """
    seconds = {}
    for name, attend in candidates.items():
        try:
            if all(_is_right(attend, _draw(size, dtype, device, frames)) for size in sizes):
                qkv, gradient = _draw(sizes[0], dtype, device, frames)
                seconds[name] = min(_time(attend, qkv, gradient) for _ in range(ROUNDS))
        except torch.OutOfMemoryError:
            raise
        except Exception:  # not installed, not for this card, dtype or size: of each library's and compiler's own kind
            continue
    return seconds


def _draw(size: Size, dtype: torch.dtype, device: torch.device, frames: bool) -> tuple[Tensor, Tensor]:
    """Queries, keys and values, and the gradient of what is made of them."""
    rows, tokens, heads, dim = size
    order = (tokens, rows) if frames else (rows, tokens)
    qkv, gradient = (
        torch.randn(*order, *rest, generator=rng(0, "attention", i, device), dtype=dtype, device=device)
        for i, rest in enumerate(((3, heads, dim), (heads, dim)))
    )
    return (qkv.transpose(0, 1), gradient.transpose(0, 1)) if frames else (qkv, gradient)


def _is_right(attend: Packed, drawn: tuple[Tensor, Tensor]) -> bool:
    """Whether the last rows are what the formula gives; of many tokens the first, which are as good."""
    qkv, gradient = (x[:, : int(CHECKED**0.5)] for x in drawn)
    rows = max(1, CHECKED // qkv.shape[1] ** 2)
    wanted = _run(by_rows(pin(SDPBackend.MATH)), qkv[-rows:, :, :, -1:].float(), gradient[-rows:, :, -1:].float())
    found = [x[-rows:, ..., -1:, :] for x in _run(attend, qkv, gradient)]
    # over one token the gradients of queries and keys are zero, but for rounding
    parts = [(found[0], wanted[0]), *zip(found[1].unbind(2), wanted[1].unbind(2), strict=True)]
    return all((got - want).abs().max() <= TOLERANCE * want.abs().max().clamp(min=1e-3) for got, want in parts)


def _run(attend: Packed, qkv: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    qkv = qkv.detach().requires_grad_()
    out = attend(qkv)
    return out, torch.autograd.grad(out, qkv, gradient)[0]


def _time(attend: Packed, qkv: Tensor, gradient: Tensor) -> float:
    """Seconds of a pass; of a GPU its own, not the host's to launch it: a run that replays graphs does not wait for that."""
    if not qkv.is_cuda:
        began_s = time.perf_counter()
        for _ in range(CALLS):
            _run(attend, qkv, gradient)
        return (time.perf_counter() - began_s) / CALLS
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    ahead = torch.zeros(4096, 4096, dtype=qkv.dtype, device=qkv.device)
    for _ in range(AHEAD):
        ahead = ahead @ ahead  # keeps the card busy until the host has launched what is timed
    began.record()
    for _ in range(CALLS):
        _run(attend, qkv, gradient)
    ended.record()
    ended.synchronize()
    return began.elapsed_time(ended) / 1e3 / CALLS
