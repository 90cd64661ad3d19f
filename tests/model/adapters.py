"""Adapters of every kind that a recipe can ask for, trained in appearance. No tests in here."""

from typing import Any

import torch
from torch import Tensor, nn

from tests.model.conftest import forward, make_inputs, make_unet, wake
from toolkit.config import LoraConfig
from toolkit.model.lora import inject_lora
from toolkit.model.unet import FramerUNet

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "rank_pattern": {"rank_pattern": {"to_q": 2, r".*\.attn2\.to_v": 7}},
    "extras": {"extra_trainable": ["conv_in", "mask_token"]},
    "everything": {
        "rslora": True, "dora": True, "rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_v": 9.0},
        "extra_trainable": ["conv_in", "mask_token"],
    },
}  # fmt: skip
SIGNATURE = [0.5, -0.25, 0.125]  # of the base that the adapters say they were trained on
ABOUT = {"base": "somewhere/base", "base_signature": SIGNATURE, "step": 7, "recipe": {"lora": {"rank": 4}}}


def settings(**changes: Any) -> LoraConfig:
    """A recipe's lora section of rank 4 and alpha 6 over all attention layers."""
    return LoraConfig(**{"rank": 4, "alpha": 6, "targets": "all"} | changes)


def train_in_appearance(parameters: dict[str, nn.Parameter], std: float = 0.3) -> None:
    """Move every parameter of an adapter away from its start."""
    wake(parameters, std)
    for i, (name, parameter) in enumerate(parameters.items()):
        if ".lora_A." not in name and ".lora_B." not in name:  # magnitudes and tensors trained whole
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
            parameter.data.mul_(1 + std * noise)


def make_trained(**changes: Any) -> tuple[FramerUNet, dict[str, nn.Parameter]]:
    """A UNet with a trained adapter of `settings(**changes)` in it, and the adapter's parameters."""
    unet = make_unet()
    parameters = inject_lora(unet, settings(**changes), 0)
    train_in_appearance(parameters)
    return unet, parameters


@torch.no_grad()
def output(unet: nn.Module) -> Tensor:
    """The UNet's output on the inputs of every test."""
    return forward(unet, make_inputs())
