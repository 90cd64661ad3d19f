"""The fused kernels are torch's functions, and the blocks compute the same with them. Run: pytest tests/model/test_fused.py

Without a GPU they run in Triton's interpreter (interpreted_fused.py), which shows what they compute, not how fast.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.model.adapters import settings
from tests.model.conftest import forward, make_inputs, make_unet
from toolkit.model.blocks import fuses, lay_channels_last, widen
from toolkit.model.cross import fits
from toolkit.model.lora import inject_lora
from toolkit.model.projection import TILE

TOLERANCES = {"fp32": 1e-6, "bf16": 2**-7}  # of the largest number; bf16 holds 8 bits, and is rounded once
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed; it comes with torch for CUDA"
)


def interpret(part: str) -> dict[str, float]:
    command = [sys.executable, "-m", "tests.model.interpreted_fused", part]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(
        command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return {row["case"]: row["error"] for row in map(json.loads, run.stdout.splitlines())}


@pytest.mark.gpu
@needs_triton
def test_they_are_the_formulas() -> None:
    """Output and gradients of norms, with a shift and SiLU or without, of sums, gate and cross-attention; whatever part of a
    tile is filled."""
    if torch.cuda.is_available():
        from tests.model.fused_reference import compare_all

        errors = dict(compare_all("cuda"))
    else:
        errors = interpret("kernels")
    assert len(errors) == 34
    for case, error in errors.items():
        assert error < TOLERANCES[case[-4:]], (case, error)


@pytest.mark.gpu
@needs_triton
def test_they_are_tried() -> None:
    """What a start tries before it relies on them: each by itself runs here, and so do all together."""
    if torch.cuda.is_available():
        assert fuses(torch.empty(1, device="cuda", dtype=torch.bfloat16))
    else:
        assert interpret("tried") == {"tried": 0}


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
def test_blocks_compute_the_same() -> None:
    """Residual blocks, transformer and the network's end, of two clips of three frames, what is added before a norm left to
    the kernel or, where that trains, not."""
    errors = interpret("blocks")
    assert len(errors) == 4 and max(errors.values()) < 1e-5, errors


@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("width", [16, 32])
def test_cross_attention_compiles(width: int, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's compiler, which needs no card, makes machine code for A100 and H100, where the interpreter takes more."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from toolkit.model import fused_cross

    sizes = {"LENGTH": 2, "HEIGHT": 64, "WIDTH": width, "CHANNELS": fused_cross.CHANNELS}
    kernels: list[tuple[Any, dict[str, Any]]] = [
        (fused_cross.attend_rows, sizes | {"BACKWARD": False, "scores_grad": None}),
        (fused_cross.attend_rows, sizes | {"BACKWARD": True, "bias": None}),
        (fused_cross.sum_tables, {name: size for name, size in sizes.items() if name != "LENGTH"}),
    ]
    for kernel, constants in kernels:
        kinds = dict.fromkeys(("rows", "channels", "columns", "steps"), "i32") | {"sums": "*fp32"}
        kinds |= dict.fromkeys(constants, "constexpr")
        source = ASTSource(kernel, {name: kinds.get(name, "*bf16") for name in kernel.arg_names}, constants)
        assert triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]


@pytest.mark.parametrize(
    ("heads", "tokens", "taken"),
    [(5, 1, False), (5, 2, True), (5, 3, False), (5, 4, True), (16, 2, True), (20, 2, False)],
)
def test_other_tables_go_by_torch(heads: int, tokens: int, taken: bool) -> None:
    """One token, whose weight is known, other numbers than powers of two, and many go without the kernels."""
    assert fits(torch.empty(1, heads * tokens, 64), heads) is taken


def test_feed_forward_layers_keep_their_weights() -> None:
    """Where what they give is made longer, as parts of what does that, in no memory of their own; adapted ones stay."""
    unet = make_unet()
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    layer = unet.down_blocks[0].attentions[0].transformer_blocks[0].ff
    wide = widen(layer)
    assert wide is not None and len(wide[2]) == len(wide[3]) == TILE > layer.net[2].out_features
    assert wide[2].data_ptr() == layer.net[2].weight.data_ptr() and wide[3].data_ptr() == layer.net[2].bias.data_ptr()
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())
    inject_lora(unet, settings(targets="mid_block.attentions.0.transformer_blocks.0.ff.net.2"), 0)
    assert widen(unet.mid_block.attentions[0].transformer_blocks[0].ff) is None


def test_the_layout_changes_nothing() -> None:
    """Channels last: the same weights, and the network computes the same."""
    unet, other = make_unet(dtype=torch.float64), make_unet(dtype=torch.float64)
    lay_channels_last(other)
    weights = other.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in unet.state_dict().items())
    convolution = other.down_blocks[0].resnets[0].spatial_res_block.conv1.weight
    assert convolution.is_contiguous(memory_format=torch.channels_last) and not convolution.is_contiguous()
    inputs = make_inputs(dtype=torch.float64)
    torch.testing.assert_close(forward(other, inputs), forward(unet, inputs), rtol=1e-10, atol=1e-10)
