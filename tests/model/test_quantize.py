"""Frozen weights in int8. Run: pytest tests/model/test_quantize.py"""

import pytest
import torch
from torch import nn

from tests.model.adapters import KINDS, settings
from tests.model.conftest import forward, make_inputs, make_unet, wake
from toolkit.model.lora import inject_lora
from toolkit.model.prepare import prepare_unet
from toolkit.model.unet import FramerUNet


def round_by_hand(unet: FramerUNet) -> None:
    """Each output channel to 255 levels between plus and minus its largest weight, but for what trains."""
    for layer in unet.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.Conv3d) and not layer.weight.requires_grad:
            for channel in layer.weight.data:
                step = channel.abs().max().clamp_min(1e-12) / 127
                channel.copy_((channel / step).round() * step)


def learn(kind: str, quantize: str | None = None, by_hand: bool = False) -> list[torch.Tensor]:
    """Output of a network with its adapter, and the gradient of what trains."""
    unet = make_unet()
    parameters = inject_lora(unet, settings(**KINDS[kind]), 0)
    wake(parameters)
    if by_hand:
        round_by_hand(unet)
    trainable = prepare_unet(unet, parameters, torch.float32, "sdpa", "small", (), quantize)
    inputs = make_inputs()
    trainable.begin(inputs["encoder_hidden_states"])
    output = forward(unet, inputs)
    output.square().mean().backward()
    assert trainable.adapter.flat.grad is not None
    return [output.detach(), trainable.adapter.flat.grad]


@pytest.mark.parametrize("kind", ["plain", "dora", "extras"])
def test_it_is_the_network_of_rounded_weights(kind: str) -> None:
    """Output and gradients are those of a network whose weights were rounded by hand; what trains is not rounded."""
    for seen, wanted in zip(learn(kind, quantize="int8"), learn(kind, by_hand=True), strict=True):
        assert torch.allclose(seen, wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item())


def test_rounding_costs_little() -> None:
    """The output moves, by less than 2 % of its size."""
    seen, whole = learn("plain", "int8")[0], learn("plain")[0]
    assert 0 < (seen - whole).norm() < 0.02 * whole.norm()


def test_weights_take_half_of_bf16() -> None:
    """A byte a weight, and a scale an output channel."""
    sizes = []
    for quantize in (None, "int8"):
        unet = make_unet(dtype=torch.bfloat16)
        prepare_unet(unet, inject_lora(unet, settings(), 0), torch.bfloat16, "sdpa", "small", (), quantize)
        sizes.append(sum(p.numel() * p.element_size() for p in unet.parameters()))
    assert sizes[1] < 0.53 * sizes[0]
