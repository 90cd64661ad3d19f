"""The fused kernels are torch's functions, and the blocks compute the same with them. Run: pytest tests/model/test_fused.py

Without a GPU they run in Triton's interpreter (interpreted_fused.py), which shows what they compute, not how fast.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.model.conftest import forward, make_inputs, make_unet
from toolkit.model.blocks import lay_channels_last

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
    """Output and gradient of norms, sums and gate, whatever part of a tile is filled, with a shift and SiLU or without."""
    if torch.cuda.is_available():
        from tests.model.fused_reference import (
            ADDS,
            DTYPES,
            GATES,
            NORMS,
            SUMS,
            compare_add,
            compare_gate,
            compare_norm,
            compare_sum,
        )

        errors = {
            f"norm {norm}, {name}": compare_norm(*norm, dtype, "cuda")
            for norm in NORMS
            for name, dtype in DTYPES.items()
        }
        errors |= {
            f"add {add}, {name}": compare_add(*add, dtype, "cuda") for add in ADDS for name, dtype in DTYPES.items()
        }
        errors |= {
            f"sum {total}, {name}": compare_sum(*total, dtype, "cuda")
            for total in SUMS
            for name, dtype in DTYPES.items()
        }
        errors |= {
            f"gate {gate}, {name}": compare_gate(gate, dtype, "cuda")
            for gate in GATES
            for name, dtype in DTYPES.items()
        }
    else:
        errors = interpret("kernels")
    assert len(errors) == 20
    for case, error in errors.items():
        assert error < TOLERANCES[case[-4:]], (case, error)


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
def test_blocks_compute_the_same() -> None:
    """Residual blocks, transformer and the network's end, of two clips of three frames, what is added before a norm left to
    the kernel or, where that trains, not."""
    errors = interpret("blocks")
    assert len(errors) == 2 and max(errors.values()) < 1e-5, errors


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
