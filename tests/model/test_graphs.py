"""Replayed passes are the network's own. Run: pytest tests/model/test_graphs.py

What is captured can be shown on a GPU alone; what goes into a graph and comes out of it, without one.
"""

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from tests.model.adapters import settings
from tests.model.conftest import forward, make_inputs, make_unet, wake
from toolkit.config import LEAN
from toolkit.model.graphs import Capture
from toolkit.model.lora import inject_lora
from toolkit.model.prepare import Plan, Trainable, prepare_unet

no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU; make gpu runs this on one")


def as_they_are(passes: Callable[..., Tensor], examples: tuple[Tensor, ...]) -> Callable[..., Tensor]:
    """In place of a capture: a GPU's graphs call the passes once for all, and give views of the memory they wrote."""
    return passes


def prepare(plan: Plan, device: str, capture: Capture | None) -> tuple[Any, Trainable]:
    unet = make_unet().to(device)
    parameters = inject_lora(unet, settings(), 0)
    wake(parameters)
    trainable = prepare_unet(unet, parameters, torch.float32, "sdpa", plan, LEAN)
    if capture is not None:
        trainable.replay(unet, capture)
    return unet, trainable


def learn(plan: Plan, device: str, capture: Capture | None) -> list[Tensor]:
    """Three micro-steps of other inputs, gradients added up over two of them, and what a pass without gradients gives."""
    unet, trainable = prepare(plan, device, capture)
    flat, found = trainable.adapter.flat, []
    for step in range(3):
        inputs = {name: (1 + step) * x.to(device) for name, x in make_inputs().items()}
        trainable.begin(inputs["encoder_hidden_states"])
        output = forward(unet, inputs)
        output.square().mean().backward()
        found.append(output.detach().clone())
        if step == 1:
            assert flat.grad is not None
            found.append(flat.grad.clone())
            flat.data.sub_(flat.grad, alpha=0.1)
            flat.grad = None
    with torch.no_grad():
        trainable.begin(inputs["encoder_hidden_states"])
        found.append(forward(unet, inputs))
    assert flat.grad is not None
    return [*found, flat.grad]


def agree(seen: list[Tensor], wanted: list[Tensor]) -> bool:
    pairs = zip(seen, wanted, strict=True)
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item()) for a, b in pairs)


@pytest.mark.parametrize("plan", get_args(Plan))
def test_what_changes_goes_in(plan: Any) -> None:
    """Inputs, tokens and what trains are the passes' own arguments: nothing of the first micro-step stays."""
    assert agree(learn(plan, "cpu", as_they_are), learn(plan, "cpu", None))


@pytest.mark.gpu
@no_gpu
@pytest.mark.parametrize("plan", get_args(Plan))
def test_captured_passes_are_the_networks_own(plan: Any) -> None:
    """As above, by graphs: their memory is written anew each time, and gradients that were given away stay."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # else two runs of anything are 1e-3 apart
        assert agree(learn(plan, "cuda", torch.cuda.make_graphed_callables), learn(plan, "cuda", None))


@pytest.mark.gpu
@no_gpu
@pytest.mark.parametrize("plan", get_args(Plan))
def test_a_gpu_computes_what_a_cpu_does(plan: Any) -> None:
    """Fused kernels, channels last, graphs: in fp32 the same outputs and gradients."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        on_gpu = learn(plan, "cuda", torch.cuda.make_graphed_callables)
    assert agree([x.cpu() for x in on_gpu], learn(plan, "cpu", None))


def test_it_is_captured_once_and_for_gradients_only() -> None:
    """A pass without gradients neither captures nor is captured."""
    captured = []

    def capture(passes: Callable[..., Tensor], examples: tuple[Tensor, ...]) -> Callable[..., Tensor]:
        captured.append([(x.shape, x.requires_grad) for x in examples])
        return passes

    unet, trainable = prepare("fast", "cpu", capture)
    inputs = make_inputs()
    with torch.no_grad():
        trainable.begin(inputs["encoder_hidden_states"])
        forward(unet, inputs)
    assert not captured
    for _ in range(2):
        trainable.begin(inputs["encoder_hidden_states"])
        forward(unet, inputs)
    shapes = [trainable.adapter.flat.shape, *(x.shape for x in inputs.values())]
    assert captured == [list(zip(shapes, [True, False, False, False, False], strict=True))]


def test_other_shapes_are_refused() -> None:
    """What was captured for one size would quietly spread a smaller one over it."""
    unet, trainable = prepare("fast", "cpu", as_they_are)
    inputs = make_inputs()
    trainable.begin(inputs["encoder_hidden_states"])
    forward(unet, inputs)
    with pytest.raises(AssertionError, match="captured for"):
        forward(unet, {name: x[:1] for name, x in inputs.items()})
