"""Triton's attention along the frames is the formula, and taken only where it computes. Run: pytest tests/model

Without a GPU the kernels run in Triton's interpreter (interpreted.py), which shows what they compute, not how fast.
"""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor

from toolkit.model.attention import KERNELS, Kernel, attend_sdpa, choose_attention
from toolkit.model.blocks import SelfAttention

FRAMES = (1, 2, 3, 5, 14, 25, 32)
TOLERANCES = {"fp32": 1e-6, "bf16": 2**-6}  # of the largest number; bf16 holds 8 bits, and is rounded three times here
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed; it comes with torch for CUDA"
)


@pytest.fixture(scope="module")
def errors() -> Callable[[str], float]:
    """What interpreted.py found, by case."""
    command = [sys.executable, "-m", "tests.model.interpreted"]
    run = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300)
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    found = {row["case"]: row["error"] for row in rows}

    def find(case: str) -> float:
        assert case in found, f"{case} was not reached:\n{run.stderr[-2000:]}"
        print(case, found[case])
        return found[case]

    return find


@needs_triton
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("frames", FRAMES)
def test_it_is_the_formula(errors: Callable[[str], float], frames: int, heads: int, dtype: str) -> None:
    """Output and gradients of queries, keys and values of one tensor, against softmax attention in float64."""
    assert errors(f"{frames} frames, {heads} heads, {dtype}") < TOLERANCES[dtype]


@needs_triton
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_it_reads_three_tensors_too(errors: Callable[[str], float], dtype: str) -> None:
    """Queries, keys and values by three projections, as where not all are adapted alike."""
    assert errors(f"apart, {dtype}") < TOLERANCES[dtype]


@needs_triton
def test_addresses_go_beyond_32_bits(errors: Callable[[str], float]) -> None:
    """Rows are found where more than 2^31 numbers lie between the first and the last."""
    assert errors("far apart") < TOLERANCES["bf16"]


@needs_triton
@pytest.mark.parametrize("targets", ["all", ["to_q", "to_v"]], ids=str)
def test_the_network_computes_the_same(errors: Callable[[str], float], targets: Any) -> None:
    """A prepared UNet in fp32, two clips, recomputed or not: output, gradient of the input and of all that trains."""
    assert errors(f"network, {targets}") < 1e-5


@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("kernel", ["attend_frames_forward", "attend_frames_backward"])
def test_it_compiles(kernel: str, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's compiler, which needs no card, makes machine code for A100 and H100, where the interpreter takes more."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from toolkit.model import temporal

    function: Any = getattr(temporal, kernel)
    kinds = {"row_stride": "i32", "grad_stride": "i32", "positions": "i32", "heads": "i32", "scale": "fp32"}
    kinds |= {"FRAMES": "constexpr", "DIM": "constexpr"}
    signature = {name: kinds.get(name, "*bf16") for name in function.arg_names}
    source = ASTSource(function, signature, {"FRAMES": 5, "DIM": 64})
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert compiled.asm["cubin"]


@pytest.mark.parametrize(
    ("frames", "heads", "taken"), [(1, 2, True), (32, 2, True), (33, 2, False), (5, 4, False), (5, 1, True)]
)
def test_other_shapes_go_by_rows(frames: int, heads: int, taken: bool) -> None:
    """More than 32 frames, or heads of other than 16 to 128 channels, are computed as without the kernel, to the bit."""
    torch.manual_seed(0)
    layer, x_BTNC = Attention(32, heads=heads, dim_head=32 // heads), torch.randn(2, frames, 3, 32)
    calls = []

    def along_frames(heads: int, *parts_BTNnC: Tensor) -> Tensor:
        calls.append(heads)
        return parts_BTNnC[0][..., 0, :]

    plain, other = (SelfAttention("x", layer, k) for k in (KERNELS["sdpa"], Kernel(attend_sdpa, along_frames)))
    found = other.along_frames(x_BTNC)
    assert calls == [heads] * taken
    assert torch.equal(found, plain.along_frames(x_BTNC)) is not taken


def test_only_auto_takes_it() -> None:
    """A kernel asked for by name computes every layer, and so does what auto takes off CUDA."""
    assert KERNELS["sdpa"].frames is KERNELS["xformers"].frames is None
    assert KERNELS[choose_attention("auto", torch.device("cpu"), torch.float32)].frames is None
