"""One flat parameter is the many that it is made of. Run: pytest tests/model/test_flat.py"""

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.model.adapters import KINDS, settings, train_in_appearance
from tests.model.conftest import forward, make_inputs, make_unet
from toolkit.engine.plain import STATE_KEYS, AdamSettings, PlainEngine
from toolkit.model.flat import NAME, FlatAdapter
from toolkit.model.lora import compute_dtypes, inject_lora
from toolkit.model.unet import FramerUNet

ADAM = AdamSettings(weight_decay=0.1, beta1=0.9, beta2=0.95, eps=1e-8, max_grad_norm=1.0)


def make_flat(kind: str, dtype: torch.dtype = torch.float32) -> tuple[FramerUNet, FlatAdapter, dict[str, Tensor]]:
    """A UNet of a dtype, what trains in it, and the fp32 values that it started from."""
    unet = make_unet(dtype=dtype)
    parameters = inject_lora(unet, settings(**KINDS[kind]), 0)
    train_in_appearance(parameters)
    values = {name: p.detach().clone() for name, p in parameters.items()}
    return unet, FlatAdapter(unet, parameters, compute_dtypes(unet, parameters, dtype)), values


def score(unet: FramerUNet, inputs: dict[str, Tensor]) -> Tensor:
    """A loss that every parameter has a say in."""
    return forward(unet, inputs).float().square().mean() + unet.mask_token.float().square().sum()


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_that_of_the_parameters(kind: str) -> None:
    """Three optimizer steps of two micro-batches: losses, norms, masters and moments of an engine on the parameters."""
    runs: list[Any] = []
    for flat in (False, True):
        unet = make_unet()
        parameters = inject_lora(unet, settings(**KINDS[kind]), 0)
        train_in_appearance(parameters)
        adapter = FlatAdapter(unet, parameters, dict.fromkeys(parameters, torch.float32)) if flat else None
        engine = PlainEngine({NAME: adapter.flat} if adapter else parameters, ADAM, 2)
        seen = []
        for _ in range(3):
            for micro in range(2):
                if adapter:
                    adapter.spread(adapter())
                loss = score(unet, {name: x[micro : micro + 1] for name, x in make_inputs().items()})
                engine.backward(loss)
                seen.append(loss.item())
            seen.append(engine.step(1e-2))
        state = engine.gather()
        runs.append((seen, adapter.split(state) if adapter else state))
    (seen, state), (wanted, wanted_state) = runs[1], runs[0]
    assert seen == pytest.approx(wanted, rel=1e-5) and state.keys() == wanted_state.keys()
    for name, saved in wanted_state.items():
        for key in STATE_KEYS:
            assert state[name][key].shape == saved[key].shape
            assert torch.allclose(state[name][key], saved[key], rtol=1e-3, atol=1e-4 * saved[key].abs().max()), name


@pytest.mark.parametrize("kind", ["plain", "dora", "extras", "everything"])
def test_a_bf16_network_computes_in_bf16(kind: str) -> None:
    """Without autocast: bf16 activations from weights rounded once; DoRA's own in fp32; the masters fp32 and unrounded."""
    unet, adapter, values = make_flat(kind, torch.bfloat16)
    assert not [name for name, p in unet.named_parameters() if p.requires_grad]
    seen: dict[str, torch.dtype] = {}
    for name, module in [item for item in unet.named_modules() if not any(item[1].children())]:
        module.register_forward_hook(lambda _, inputs, output, name=name: seen.update({name: output.dtype}))
    score(unet, make_inputs(dtype=torch.bfloat16)).backward()
    inner = {dtype for name, dtype in seen.items() if ".lora_" in name}
    assert inner == {torch.float32 if "dora" in KINDS[kind] else torch.bfloat16}
    assert {dtype for name, dtype in seen.items() if ".lora_" not in name and "time_proj" not in name} == {
        torch.bfloat16
    }
    assert adapter.flat.dtype == adapter.flat.grad.dtype == torch.float32
    named = adapter.split({NAME: {"master": adapter.flat.detach(), "grad": adapter.flat.grad}})
    assert all(torch.equal(named[name]["master"], values[name]) for name in values)
    assert all(part["grad"].abs().max() > 0 for part in named.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_call_gives_another_tensor(dtype: torch.dtype) -> None:
    """FSDP hangs a hook on what a call returns, at each call: on the parameter itself they would pile up."""
    _, adapter, _ = make_flat("plain", dtype)
    assert adapter().grad_fn is not None and adapter().data_ptr() != adapter.flat.data_ptr()


def test_small_updates_are_not_lost() -> None:
    """A hundred updates too small for bf16 move the masters, and at last what the network computes with."""
    unet, adapter, values = make_flat("plain", torch.bfloat16)
    name = next(iter(values))
    module, attribute = unet.get_submodule(name.removesuffix(".weight")), "weight"
    before = getattr(module, attribute).detach().clone()
    for _ in range(100):
        adapter.flat.data.mul_(1 + 1e-4)
    adapter.spread(adapter())
    after = getattr(module, attribute).detach()
    assert after.dtype == torch.bfloat16 and (after.float() / before.float()).mean().item() == pytest.approx(
        1.01, abs=2e-3
    )


@pytest.mark.parametrize("kind", KINDS)
def test_join_is_the_reverse_of_split(kind: str) -> None:
    """What is saved by name comes back in its place, every element once."""
    _, adapter, values = make_flat(kind)
    state = {NAME: {key: torch.randn_like(adapter.flat) for key in STATE_KEYS}}
    named = adapter.split(state)
    assert {name: part["master"].shape for name, part in named.items()} == {n: v.shape for n, v in values.items()}
    joined = adapter.join({name: named[name] for name in reversed(named)})
    assert all(torch.equal(joined[NAME][key], state[NAME][key]) for key in STATE_KEYS)
    assert {*joined[NAME]} == {*STATE_KEYS}


def test_join_holds_nothing_whole() -> None:
    """A whole tensor lives as long as who asked for it wants it: as many ranks as a host has would each hold all of them."""
    _, adapter, _ = make_flat("plain")
    joined = adapter.join(adapter.split({NAME: {key: torch.randn_like(adapter.flat) for key in STATE_KEYS}}))
    lives = [weakref.ref(joined[NAME][key]) for key in STATE_KEYS]
    assert [whole() for whole in lives] == [None] * len(STATE_KEYS)
