"""Runs the Triton kernels on a CPU, in Triton's interpreter, and prints how far they are from torch: one JSON per line.

Started by test_temporal.py in a process of its own, because whether Triton interprets is settled when it is imported.
"""

import json
import os

os.environ["TRITON_INTERPRET"] = "1"

import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from tests.model.test_prepare import make, make_inputs
from toolkit.config import LEAN
from toolkit.model.prepare import prepare_unet
from toolkit.model.temporal import FrameAttention

FRAMES = (1, 2, 3, 5, 14, 25, 32)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def multiply(builder: object, a: object, b: object, d: object, *_: object) -> object:
    """A dot in fp32 of whatever it is given, as tensor cores do it; the interpreter multiplies the bits of bf16 numbers."""
    x, y = (widen(handle.data) if handle.dtype.scalar == tl.bfloat16 else handle.data for handle in (a, b))
    return interpreter.TensorHandle(x @ y + d.data, d.dtype.scalar)


def convert(builder: object, source: object, target: object) -> object:
    """A conversion that rounds to the nearest, as a card does it; the interpreter cuts off what bf16 cannot hold."""
    target = target.scalar
    if (source.dtype.scalar, target) == (tl.float32, tl.bfloat16):
        rounded = torch.from_numpy(source.data).bfloat16().view(torch.uint16).numpy()
        return interpreter.TensorHandle(rounded, target)
    return as_it_is(builder, source, target)


def widen(bits: object) -> object:
    return torch.from_numpy(bits.copy()).view(torch.bfloat16).float().numpy()


as_it_is = interpreter.InterpreterBuilder.cast_impl
interpreter.InterpreterBuilder.cast_impl = convert
interpreter.InterpreterBuilder.create_dot = multiply


def attend(heads: int, *parts_BTNnC: Tensor) -> Tensor:
    """The formula in float64."""
    q, k, v = (x.double().unflatten(-1, (heads, -1)) for part in parts_BTNnC for x in part.unbind(-2))
    weight = torch.einsum("btnhd,bsnhd->bnhts", q, k).div(q.shape[-1] ** 0.5).softmax(-1)
    return torch.einsum("bnhts,bsnhd->btnhd", weight, v).flatten(-2)


def compare(heads: int, *parts_BTNnC: Tensor) -> float:
    """The largest error of the output and of each gradient, beside the largest number of each."""
    found = []
    for function in (attend, FrameAttention.apply):
        parts = [part.detach().requires_grad_() for part in parts_BTNnC]
        out = function(heads, *parts)
        gradient = torch.randn(out.mT.shape, generator=torch.Generator().manual_seed(1)).to(parts[0].dtype).mT
        found.append([out, *torch.autograd.grad(out, parts, gradient.to(out.dtype))])
        assert function is attend or all(x.is_contiguous() and x.dtype == parts[0].dtype for x in found[-1])
    split = [[out, *(x for grad in grads for x in grad.unbind(-2))] for out, *grads in found]
    return max(
        ((got - want).abs().max() / want.abs().max().clamp(min=1e-9)).item() for want, got in zip(*split, strict=True)
    )


def run_kernels() -> None:
    """Two clips; three heads of 16 channels or one of 64; of positions two programs full, and one over."""
    for name, dtype in DTYPES.items():
        for frames in FRAMES:
            for heads, dim in ((3, 16), (1, 64)):
                generator = torch.Generator().manual_seed(frames)
                packed = torch.randn(2, frames, 2 * (32 // frames) + 1, 3, heads * dim, generator=generator).to(dtype)
                report(f"{frames} frames, {heads} heads, {name}", compare(heads, packed))
        report(f"apart, {name}", compare(heads, *(x.contiguous() for x in packed.split(1, -2))))


def run_far_apart() -> None:
    """More than 2^31 numbers from the first to the last; what lies between is never touched, so it takes no memory."""
    clips, frames, positions, channels, stride = 1, 3, 3, 16, 1 << 28
    whole = torch.empty(8 * stride + 3 * channels, dtype=torch.bfloat16)
    rows = whole.as_strided((clips, frames, positions, 3, channels), (9 * stride, 3 * stride, stride, channels, 1))
    rows.copy_(torch.randn(rows.shape, generator=torch.Generator().manual_seed(0)))
    report("far apart", compare(1, rows))


def run_network() -> None:
    """The whole UNet in fp32: output and gradient of the flat parameter, by Triton beside SDPA."""
    for targets, plan in (("all", "small"), (["to_q", "to_v"], "fast")):
        found = []
        for attention in ("sdpa", "sdpa + triton"):
            unet, parameters = make(targets, torch.float32)
            trainable = prepare_unet(unet, parameters, torch.float32, attention, plan, LEAN)
            inputs = make_inputs(2, 3, 2, torch.float32)
            trainable.begin(inputs["encoder_hidden_states"])
            out = unet(**inputs, return_dict=False)[0]
            out.square().mean().backward()
            found.append((out.detach(), trainable.adapter.flat.grad, inputs["sample"].grad))
        errors = [((got - want).abs().max() / want.abs().max()).item() for want, got in zip(*found, strict=True)]
        report(f"network, {targets}", max(errors))


def report(case: str, error: float) -> None:
    print(json.dumps({"case": case, "error": error}), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_kernels()
    run_network()
    run_far_apart()
