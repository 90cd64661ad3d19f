"""Computing activations a second time changes nothing. Run: pytest tests/model/test_recompute.py"""

from contextlib import nullcontext

import pytest
import torch

from tests.model.adapters import KINDS, settings, train_in_appearance
from tests.model.conftest import forward, make_inputs, make_unet
from toolkit.model.dropout import adapter_dropout
from toolkit.model.lora import inject_lora
from toolkit.model.recompute import recompute_whole_modules


@pytest.mark.parametrize("kind", ["plain", "dora", "extras", "dropout"])
def test_same_gradients_from_less_memory(kind: str) -> None:
    """Loss and every gradient to the bit, dropout included, while much less is kept for the backward pass."""
    losses, gradients, kept = [], [], []
    for again in (False, True):
        unet = make_unet()
        parameters = inject_lora(unet, settings(**KINDS.get(kind, {"dropout": 0.4})), 0)
        train_in_appearance(parameters)
        if again:
            recompute_whole_modules(unet)
        sizes: dict[int, int] = {}

        def keep(tensor: torch.Tensor, sizes: dict[int, int] = sizes) -> torch.Tensor:
            if not isinstance(tensor, torch.nn.Parameter):
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with adapter_dropout(unet, 7, [5, 9]) if kind == "dropout" else nullcontext():
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                loss = forward(unet, make_inputs()).square().mean()
            loss.backward()
        losses.append(loss.item())
        gradients.append({name: p.grad for name, p in parameters.items() if p.grad is not None})
        kept.append(sum(sizes.values()))
    assert losses[0] == losses[1] and gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    assert any(gradient.any() for gradient in gradients[0].values())
    assert kept[1] < kept[0] / 3


def test_inference_computes_once() -> None:
    """Where no gradient is asked for, each module runs once, with the same output."""
    unet = make_unet()
    calls: list[str] = []
    for name, module in unet.named_modules():
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    with torch.no_grad():
        wanted = forward(unet, make_inputs())
        once, calls[:] = list(calls), []
        recompute_whole_modules(unet)
        assert torch.equal(forward(unet, make_inputs()), wanted) and calls == once
