"""A network loaded for use is the base with its adapters, computed otherwise. Run: pytest tests/run/test_inference.py"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from tests.model.adapters import settings, train_in_appearance
from tests.model.control import make_controlnet
from toolkit.config import ModelConfig, RunConfig
from toolkit.errors import UserError
from toolkit.model.attention import set_attention
from toolkit.model.base import load_base
from toolkit.model.blocks import ResBlock, Transformer
from toolkit.model.lora import adapted_layers, inject_lora, load_adapter, save_adapter
from toolkit.run.framer import Condition, Framer, OnStep, Sampling, Steering
from toolkit.run.inference import Source, load_control, load_framer, read_source

CPU = torch.device("cpu")
SIZE_PX, WEIGHT = 16, 0.7
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"extra_trainable": ["conv_in", "mask_token"]},
    "dora": {"dora": True, "rslora": True},
    "elsewhere": {"targets": ["to_q", "to_out.0", "proj_in", "net.0.proj", "net.2", "linear_1", "time_emb_proj"]},
}


@pytest.fixture(scope="module")
def places(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An adapter of each kind as a run would leave it, and a ControlNet, all of one base."""
    folder = tmp_path_factory.mktemp("adapters")
    for kind, changes in KINDS.items():
        base = load_base(ModelConfig(base=str(tiny_base)), CPU, "fp32")
        recipe = RunConfig(
            name=kind, model={"base": str(tiny_base)}, lora=settings(**changes).model_dump(),
            data={"shards": "s", "frames": 3, "height": SIZE_PX, "width": SIZE_PX}, schedule={"steps": 1},
            diffusion={"layout": "framer_clip"}, engine={"precision": "fp32", "kind": "plain"},
        )  # fmt: skip
        parameters = inject_lora(base.unet, recipe.lora, 0)
        train_in_appearance(parameters, 0.1)
        about = {"recipe": recipe.model_dump(mode="json"), "base": base.name, "base_signature": base.signature}
        (folder / kind).mkdir()
        save_adapter(folder / kind, dict(parameters), base.unet, about)
    stock = load_base(ModelConfig(base=str(tiny_base)), CPU, "fp32").unet
    make_controlnet(stock, awake=True).save_pretrained(folder / "controlnet")
    return {place.name: str(place) for place in folder.iterdir()}


def find(places: dict[str, str], kind: str, weight: float = WEIGHT, precision: str = "fp32") -> Source:
    source = read_source(adapters=[places[kind]], weights=[weight]).with_model(controlnet=places["controlnet"])
    engine = source.config.engine.model_copy(update={"precision": precision})
    return replace(source, config=source.config.model_copy(update={"engine": engine}))


def load_stock(source: Source) -> Framer:
    """diffusers' network with PEFT's adapters beside its weights."""
    config = source.config
    base = load_base(config.model, CPU, config.engine.precision)
    set_attention(base.unet, "sdpa")
    controlnet = load_control(config.model, base, "sdpa")
    for i, (path, weight) in enumerate(source.adapters):
        load_adapter(base.unet, path, base.signature, f"adapter{i}", weight)
    return Framer(base, config.diffusion, config.data.frames, config.seed, controlnet)


def make_condition(framer: Framer, steered: bool = False) -> Condition:
    """Two clips."""
    stills = torch.rand(2, 2, 3, SIZE_PX, SIZE_PX, generator=torch.Generator().manual_seed(0)) * 2 - 1
    condition = framer.condition(stills, torch.tensor([7.0, 5.0]), torch.tensor([127.0, 60.0]))
    points = Steering(np.array([[[4.0, 4.0], [12.0, 10.0]]]))
    return framer.steer(condition, [points] * 2, (SIZE_PX, SIZE_PX)) if steered else condition


def sample(framer: Framer, steps: int, steered: bool = False, on_step: OnStep | None = None) -> Tensor:
    """Guided, so the network is asked about both clips with and without their stills."""
    condition = make_condition(framer, steered)
    noise = torch.randn(2, 3, 4, *condition.ends_B2CHW.shape[-2:], generator=torch.Generator().manual_seed(1))
    return framer.sample(condition, Sampling(steps, max_guidance=3.0), noise, on_step=on_step)


class Operations(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def count_ops(function: Any, *args: Any) -> int:
    with Operations() as operations:
        function(*args)
    return operations.count


@pytest.mark.parametrize(
    ("kind", "steered"), [("plain", False), ("plain", True), ("dora", False), ("elsewhere", False)]
)
def test_it_samples_as_diffusers_and_peft_do(places: dict[str, str], kind: str, steered: bool) -> None:
    """Folded and on lean blocks, a weighted adapter gives the latents of stock modules, guided, with a ControlNet too."""
    source = find(places, kind)
    framer = load_framer(source, steered)
    assert framer.before is not None and not adapted_layers(framer.base.unet)
    wanted = sample(load_stock(source), 2, steered)
    assert (sample(framer, 2, steered) - wanted).abs().max() < 1e-4 * wanted.abs().max()
    untuned = sample(load_stock(replace(source, adapters=())), 2, steered)
    assert (untuned - wanted).abs().max() > 3e-3 * wanted.abs().max()  # thirty times what is let pass above


def test_a_step_costs_what_the_base_costs(places: dict[str, str]) -> None:
    """An adapter adds no operation to a sampler step, and the tables of cross-attention are made once for all steps."""
    source = find(places, "plain")
    framer, untuned = load_framer(source), load_framer(replace(source, adapters=()))

    for ready in (framer, untuned):
        sample(ready, 1)  # what is computed once for a network is no step's
    step = count_ops(sample, framer, 2) - count_ops(sample, framer, 1)
    assert step == count_ops(sample, untuned, 2) - count_ops(sample, untuned, 1)
    layer = next(layer for name, layer in framer.base.unet.named_modules() if name.endswith(".attn2"))
    seen = []

    def on_step(step: int, latents_BTCHW: Tensor) -> Tensor:
        seen.append(layer.processor.tables)
        return latents_BTCHW

    sample(framer, 3, on_step=on_step)
    assert seen[0] is seen[1] is seen[2]


def test_small_adapters_survive_rounding(places: dict[str, str]) -> None:
    """In bf16 the folded weights move by all of an adapter of a thousandth of their size, though bf16 has steps of 1/256."""
    source = find(places, "plain", weight=1.0)
    exact = load_base(source.config.model, CPU, "fp32")
    before = {name: tensor.clone() for name, tensor in exact.unet.state_dict().items()}
    load_adapter(exact.unet, source.adapters[0][0], exact.signature)
    layers = adapted_layers(exact.unet)
    updates = {f"{name}.weight": layer.get_delta_weight("default") for name, layer in layers.items()}
    size = torch.cat([before[name].flatten() for name in updates]).norm() * 1e-3
    weight = (size / torch.cat([update.flatten() for update in updates.values()]).norm()).item()
    folded = load_framer(find(places, "plain", weight, "bf16")).base.unet.state_dict()
    moved = torch.cat([(folded[name].float() - before[name].bfloat16().float()).flatten() for name in updates])
    wanted = torch.cat([weight * update.flatten() for update in updates.values()])
    assert folded["conv_in.weight"].dtype == torch.bfloat16
    assert (moved @ wanted / (wanted @ wanted)).item() == pytest.approx(1, abs=0.1)


def test_compiled_blocks_sample_the_same(places: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block becomes one graph without a break, for both halves of a guided batch; stock blocks are refused.

    What is captured is run as it is: making kernels of it takes minutes on a CPU.
    """
    source = find(places, "plain")
    wanted = sample(load_framer(source), 2)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    counters.clear()
    framer = load_framer(source, compiled=True)
    assert torch.allclose(sample(framer, 2), wanted, atol=1e-3)
    blocks = sum(isinstance(module, ResBlock | Transformer) for module in framer.base.unet.modules())
    assert 0 < counters["stats"]["unique_graphs"] <= blocks and not counters["graph_break"]
    model = source.config.model.model_copy(update={"blocks": "stock"})
    stock = replace(source, config=source.config.model_copy(update={"model": model}))
    assert torch.allclose(sample(load_framer(stock), 2), wanted, atol=1e-3)
    with pytest.raises(
        UserError, match="--compile is for lean blocks, and model.blocks of this recipe is without passes"
    ):
        load_framer(stock, compiled=True)
