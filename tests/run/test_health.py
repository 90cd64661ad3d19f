"""The norms of an adapter are those of the matrices that it is made of. Run: pytest tests/run/test_health.py"""

from typing import Any

import pytest
import torch

from tests.model.adapters import KINDS, make_trained
from toolkit.model.flat import FlatAdapter
from toolkit.model.lora import adapted_layers, compute_dtypes
from toolkit.run.health import AdapterHealth, name_block

BLOCKS = ["down_blocks.0", "mid_block", "up_blocks.1"]


def watch(**kind: Any) -> tuple[Any, FlatAdapter, AdapterHealth]:
    unet, parameters = make_trained(**kind)
    adapter = FlatAdapter(unet, parameters, compute_dtypes(unet, parameters, torch.float32))
    scalings = {name: layer.scaling["default"] for name, layer in adapted_layers(unet).items()}
    return unet, adapter, AdapterHealth(adapter, scalings)


@pytest.mark.parametrize("kind", ["plain", "rslora", "rank_pattern", "everything"])
def test_norms_are_those_of_what_is_added(kind: str) -> None:
    """By block, of all that PEFT itself would add to the weights in there; of tensors trained whole, their own norm."""
    unet, _, health = watch(**KINDS[kind])
    squares = dict.fromkeys(health.blocks, 0.0)
    for name, layer in adapted_layers(unet).items():
        squares[name_block(name)] += layer.get_delta_weight("default").square().sum().item()
    for name in ("conv_in.weight", "conv_in.bias", "mask_token") if kind == "everything" else ():
        squares[name_block(name)] += unet.get_submodule("conv_in").__dict__.get(
            name.partition(".")[2], unet.__dict__.get(name)
        ).square().sum().item()  # fmt: skip
    found = health.measure()["adapter_norm"]
    extras = ["conv_in", "mask_token"] if kind == "everything" else []
    assert (
        sorted(found) == health.blocks == sorted([f"{b}.{w}" for b in BLOCKS for w in ("spatial", "temporal")] + extras)
    )
    assert found == pytest.approx({block: square**0.5 for block, square in squares.items()}, rel=1e-4)


def test_ratios_are_of_the_change_since_the_last_look() -> None:
    """Moved by a tenth in one block, an adapter has changed there by 0.1 / 1.1, and by nothing at the next look."""
    _, adapter, health = watch()
    sizes = {name: shape.numel() for name, shape in adapter.shapes.items()}
    for part, name in zip(adapter.flat.detach().split([*sizes.values()]), sizes, strict=True):
        if name.startswith("mid_block.") and "temporal" in name:
            part *= 1.1
    wanted = dict.fromkeys(health.blocks, 0.0) | {"mid_block.temporal": 0.1 / 1.1}
    assert health.measure()["update_ratio"] == pytest.approx(wanted, rel=1e-4)
    assert health.measure()["update_ratio"] == dict.fromkeys(health.blocks, 0.0)
