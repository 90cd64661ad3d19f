"""Computing activations a second time changes nothing. Run: pytest tests/model/test_recompute.py"""

from collections import Counter
from contextlib import nullcontext

import pytest
import torch

from tests.model.adapters import KINDS, settings, train_in_appearance
from tests.model.conftest import forward, make_inputs, make_unet
from toolkit.model.dropout import adapter_dropout
from toolkit.model.lora import inject_lora
from toolkit.model.recompute import find_top_level, recompute_feed_forwards, recompute_whole_modules
from toolkit.model.unet import FramerUNet


def keep_all(unet: FramerUNet) -> None:
    pass


def recompute_top(unet: FramerUNet) -> None:
    recompute_whole_modules(find_top_level(unet))


def recompute_twice(unet: FramerUNet) -> None:
    recompute_whole_modules(unet)
    recompute_feed_forwards(find_top_level(unet))


@pytest.mark.parametrize("kind", ["plain", "dora", "extras", "dropout"])
def test_same_gradients_from_less_memory(kind: str) -> None:
    """Loss and every gradient to the bit, dropout included, while much less is kept for the backward pass."""
    losses, gradients, kept = [], [], []
    for recompute in (keep_all, recompute_top, recompute_whole_modules, recompute_twice):
        unet = make_unet()
        changes = KINDS.get(kind, {"dropout": 0.4, "targets": "linear"})  # in feed-forward layers too
        parameters = inject_lora(unet, settings(**changes), 0)
        train_in_appearance(parameters)
        recompute(unet)
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
    for own_loss, own in zip(losses[1:], gradients[1:], strict=True):
        assert own_loss == losses[0] and own.keys() == gradients[0].keys()
        assert all(torch.equal(gradients[0][name], own[name]) for name in own)
    assert any(gradient.any() for gradient in gradients[0].values())
    assert kept[2] == kept[3] < kept[0] / 3 and kept[2] < kept[1] < kept[0]


def test_how_often_layers_run() -> None:
    """Inside recomputed modules twice; three times in feed-forward layers that are recomputed in there as well."""
    unet = make_unet().requires_grad_(True)
    recompute_twice(unet)
    top = {name for name, _ in unet.named_modules() if name.startswith(("down_blocks.0.", "up_blocks.1."))}
    runs: Counter[str] = Counter()
    for name, module in unet.named_modules():
        if name.endswith((".to_q", ".net.0.proj")):
            module.register_forward_hook(lambda *_, name=name: runs.update([name]))
    forward(unet, make_inputs()).square().mean().backward()
    assert {name in top for name in runs} == {True, False}
    assert all(times == (3 if name.endswith("proj") and name in top else 2) for name, times in runs.items()), runs


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
