"""A prepared network is diffusers' with PEFT's adapter, computed otherwise. Run: pytest tests/model/test_prepare.py"""

from collections.abc import Collection
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from tests.model.adapters import settings, train_in_appearance
from tests.model.conftest import SMALL, forward
from toolkit.config import LEAN, Part
from toolkit.model.flat import NAME
from toolkit.model.lora import inject_lora
from toolkit.model.prepare import Plan, Trainable, prepare_unet, tell_parts
from toolkit.model.unet import FramerUNet


def make(targets: Any, dtype: torch.dtype, **changes: Any) -> tuple[FramerUNet, dict[str, nn.Parameter]]:
    """A UNet of random weights, mixes included, with a trained adapter in it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = FramerUNet(in_channels=9, **SMALL)
        for name, parameter in unet.named_parameters():
            if name.endswith("mix_factor"):
                nn.init.normal_(parameter)
    unet.to(dtype).requires_grad_(False).eval()
    parameters = inject_lora(unet, settings(targets=targets, **changes), 0)
    train_in_appearance(parameters)
    return unet, parameters


def make_inputs(clips: int, frames: int, tokens: int, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator).to(dtype)

    return {
        "sample": draw(clips, frames, 9, 8, 8).requires_grad_(True),
        "timestep": draw(clips),
        "encoder_hidden_states": draw(clips, tokens, 16),
        "added_time_ids": 10 * draw(clips, 3).abs(),
    }


def prepare_double(
    unet: FramerUNet, parameters: dict[str, nn.Parameter], plan: Plan, parts: Collection[Part] = LEAN
) -> Trainable:
    """As a run does it, with masters in double precision."""
    trainable = prepare_unet(unet, parameters, torch.float64, "sdpa", plan, parts)
    trainable.adapter.double()
    trainable.adapter.dtype = torch.float64
    return trainable


@pytest.mark.parametrize("plan", get_args(Plan))
@pytest.mark.parametrize(
    ("clips", "frames", "tokens", "targets"),
    [
        (2, 3, 2, "all"),
        (1, 5, 1, "all"),
        (2, 1, 2, "spatial"),
        (3, 2, 4, "temporal"),
        (1, 4, 2, ["to_q", "to_v"]),
        (1, 3, 2, r".*\.attn2\.to_k|.*\.attn1\.to_out\.0"),
        (2, 3, 2, ["to_q", "net.0.proj", "net.2", "proj_in", "proj_out", "linear_1", "time_emb_proj"]),
    ],
)
def test_lean_blocks_compute_what_stock_ones_do(clips: int, frames: int, tokens: int, targets: Any, plan: Plan) -> None:
    """In float64, output, gradient of the input and of every matrix equal diffusers' and PEFT's to rounding."""
    compare(clips, frames, tokens, targets, plan, LEAN)


@pytest.mark.parametrize("plan", ["fast", "small"])
@pytest.mark.parametrize(
    "parts", [(), ("cross",), ("projections",), ("cross", "projections"), LEAN[:3]], ids=tell_parts
)
def test_some_parts_compute_what_stock_ones_do(parts: tuple[Part, ...], plan: Plan) -> None:
    """Each part of lean blocks by itself, as far as it stands alone."""
    compare(2, 3, 2, "all", plan, parts)


def compare(clips: int, frames: int, tokens: int, targets: Any, plan: Plan, parts: Collection[Part]) -> None:
    stock, stock_parameters = make(targets, torch.float64)
    for parameter in stock_parameters.values():
        parameter.data = parameter.data.double()
    lean, parameters = make(targets, torch.float64)
    trainable = prepare_double(lean, parameters, plan, parts)
    found = []
    for unet in (stock, lean):
        inputs = make_inputs(clips, frames, tokens, torch.float64)
        if unet is lean:
            trainable.begin(inputs["encoder_hidden_states"])
        output = forward(unet, inputs)
        output.square().mean().backward()
        found.append((output.detach(), inputs["sample"].grad))
    for wanted, got in zip(*found, strict=True):
        assert (got - wanted).abs().max() < 1e-13 * wanted.abs().max()
    gradients = trainable.adapter.split({NAME: {"gradient": trainable.adapter.flat.grad}})
    largest = max(p.grad.abs().max() for p in stock_parameters.values() if p.grad is not None)
    for name, parameter in stock_parameters.items():
        wanted = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert (gradients[name]["gradient"] - wanted).abs().max() < 1e-13 * largest, name


def test_bf16_is_as_near_to_the_truth_as_stock() -> None:
    """Against float64, the lean network in bf16 errs no more than a fifth above diffusers and PEFT in bf16."""
    errors = {}
    truth, parameters = make("all", torch.float64)
    for parameter in parameters.values():
        parameter.data = parameter.data.bfloat16().double()
    inputs = make_inputs(2, 3, 2, torch.bfloat16)
    weights = {name: tensor.bfloat16() for name, tensor in truth.state_dict().items()}
    truth.load_state_dict(weights)
    wanted = forward(truth, {name: x.double() for name, x in inputs.items()})
    for kind in ("stock", "lean"):
        unet, parameters = make("all", torch.bfloat16)
        if kind == "stock":
            for parameter in parameters.values():
                parameter.data = parameter.data.bfloat16()
        else:
            trainable = prepare_unet(unet, parameters, torch.bfloat16, "sdpa", "fast", LEAN)
            trainable.begin(inputs["encoder_hidden_states"])
        errors[kind] = (forward(unet, inputs).double() - wanted).norm() / wanted.norm()
    print(errors)
    assert 0 < errors["lean"] < 1.2 * errors["stock"]


def test_frozen_weights_take_no_memory_twice() -> None:
    """Stacked weights are the network's own, in the same memory, under the same names, bit by bit."""
    unet, parameters = make("all", torch.float32)
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items() if ".lora_" not in name}
    prepare_unet(unet, parameters, torch.float32, "sdpa", "fast", LEAN)
    after = unet.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    held = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in after.values()}
    assert len(held) < len(after), "nothing is stacked"
    assert sum(held.values()) == sum(tensor.numel() * tensor.element_size() for tensor in before.values())


@pytest.mark.parametrize("targets", ["all", ["to_q", "to_v"]], ids=str)
def test_frozen_weights_are_not_copied_for_tables(targets: Any) -> None:
    """What cross-attention's tables are made of is, for the frozen part, read where the weights are."""
    unet, parameters = make(targets, torch.float32)
    trainable = prepare_unet(unet, parameters, torch.float32, "sdpa", "fast", LEAN)
    for table in trainable.tables:
        for part in ("to_q", "to_out.0"):
            weight = table.weights[part]
            assert table._by_head(weight, part).data_ptr() == weight.data_ptr()


@pytest.mark.parametrize("changes", [{"dora": True}, {"dropout": 0.1}])
def test_other_adapters_are_not_computed_wrongly(changes: dict[str, Any]) -> None:
    """What only PEFT computes is refused, not passed over."""
    unet, parameters = make("all", torch.float32, **changes)
    with pytest.raises(ValueError, match="PEFT's to compute"):
        prepare_unet(unet, parameters, torch.float32, "sdpa", "fast", LEAN)


@pytest.mark.parametrize("parts", [LEAN, tuple(part for part in LEAN if part != "fused")], ids=tell_parts)
def test_what_is_fused_is_a_part_of_its_own(parts: tuple[Part, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Triton's kernels run, a network is computed by them, but with that part left out by none."""
    monkeypatch.setattr("toolkit.model.blocks.fuses", lambda weight: True)
    unet, parameters = make("all", torch.float32)
    prepare_unet(unet, parameters, torch.float32, "sdpa", "fast", parts)
    crossing = [module.processor for name, module in unet.named_modules() if name.endswith(".attn2")]
    fused = {place.fused for place in (*unet.modules(), *crossing) if hasattr(place, "fused")}
    assert fused == {"fused" in parts} and all(hasattr(processor, "fused") for processor in crossing)
