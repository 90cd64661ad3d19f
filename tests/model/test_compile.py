"""Compiled blocks compute the same. Run: pytest tests/model/test_compile.py"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor

from tests.model.adapters import settings
from tests.model.conftest import SMALL, forward, make_inputs, wake
from toolkit.config import LEAN
from toolkit.errors import UserError
from toolkit.model.compile import compile_blocks
from toolkit.model.lora import inject_lora
from toolkit.model.prepare import Plan, prepare_unet
from toolkit.model.unet import FramerUNet


@pytest.fixture
def traced() -> Iterator[None]:
    """Traced, differentiated and run one operation after another, without the minutes that making kernels takes."""
    torch.compiler.set_default_backend("aot_eager")
    yield
    torch.compiler.set_default_backend(None)


@pytest.fixture(autouse=True)
def forgotten() -> None:
    """What other tests compiled."""
    torch._dynamo.reset()


def learn(plan: Plan, part: str | None, layers: int = 1, kernel: str = "sdpa") -> list[torch.Tensor]:
    """Output and gradient of a network of so many layers a block, a part of it compiled, at its second step."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = FramerUNet(in_channels=9, **SMALL | {"layers_per_block": layers}).requires_grad_(False).eval()
    parameters = inject_lora(unet, settings(), 0)
    wake(parameters)
    trainable = prepare_unet(unet, parameters, torch.float32, kernel, plan, LEAN)
    if part is not None:
        compile_blocks(unet.get_submodule(part))
    inputs = make_inputs()
    for _ in range(2):
        trainable.adapter.flat.grad = None
        trainable.begin(inputs["encoder_hidden_states"])
        output = forward(unet, inputs)
        output.square().mean().backward()
    assert trainable.adapter.flat.grad is not None
    return [output.detach(), trainable.adapter.flat.grad]


def agree(seen: list[torch.Tensor], wanted: list[torch.Tensor]) -> bool:
    pairs = zip(seen, wanted, strict=True)
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item()) for a, b in pairs)


@pytest.mark.parametrize(("plan", "kernel"), [("fast", "sdpa"), ("small", "flash")])
def test_output_and_gradients_stay(traced: None, plan: Any, kernel: str) -> None:
    """All blocks traced whole, recomputation and a pinned kernel inside: as computed by Python."""
    assert agree(learn(plan, "", kernel=kernel), learn(plan, None))


def test_no_compiler_is_one_sentence() -> None:
    """Before anything is compiled."""
    with inductor.patch({"cpp.cxx": ("nowhere",)}), pytest.raises(UserError, match="no C\\+\\+ compiler; install g"):
        compile_blocks(torch.nn.Module())


def test_modules_of_one_size_are_compiled_once(traced: None) -> None:
    """Three layers a block in place of two add no graph."""
    graphs = []
    for layers in (2, 3):
        torch._dynamo.reset()
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        learn("fast", "", layers)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"] - before)
    assert graphs[0] == graphs[1] > 4


def test_kernels_of_the_compiler_compute_the_same() -> None:
    """One residual block and one transformer by Inductor, with a C++ compiler's help."""
    assert agree(learn("small", "down_blocks.0"), learn("small", None))
