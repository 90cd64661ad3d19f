"""What trains of a UNet: an adapter in it, which is lora.py's, or weights of its own.

Test: pytest tests/run/test_full.py
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from toolkit.config import FullConfig, RunConfig
from toolkit.errors import UserError
from toolkit.model.lora import choose_kind, inject_lora, save_adapter
from toolkit.model.quiet import quiet_libraries
from toolkit.model.sources import STEMS

ABOUT_FILE = "framer_toolkit.json"  # beside a whole UNet, whose weights' header belongs to diffusers


def check_tuning(unet: nn.Module, config: RunConfig) -> None:
    """Refuse a recipe that tunes nothing of a UNet, which may be on meta, so that no weights need be read for it."""
    if config.tuning == "full":
        names = match_parameters(unet, config.full)
        if names == ["mask_token"] and config.diffusion.layout == "spec_middle":
            raise UserError(
                f"full.parameters is {config.full.parameters}, the mask token, which never enters the network in layout "
                "spec_middle; take another diffusion.layout, or other parameters"
            )
    else:
        choose_kind(unet, config.lora)


def choose_trainable(unet: Any, config: RunConfig) -> dict[str, nn.Parameter]:
    """What a recipe trains of a frozen UNet, by the names the UNet has for it, sorted; raises UserError for nothing."""
    if config.tuning == "lora":
        return inject_lora(unet, config.lora, config.seed)
    names = set(match_parameters(unet, config.full))
    return {name: parameter for name, parameter in sorted(unet.named_parameters()) if name in names}


def match_parameters(unet: nn.Module, settings: FullConfig) -> list[str]:
    """Name the weights of a UNet that full tuning trains, sorted; raises UserError for none, or no regular expression."""
    names = sorted(name for name, _ in unet.named_parameters())
    if settings.parameters == "all":
        return names
    try:
        chosen = [name for name in names if re.fullmatch(settings.parameters, name)]
    except re.error as error:
        raise UserError(f"full.parameters {settings.parameters!r} is no regular expression: {error}") from None
    if not chosen:
        raise UserError(
            f"full.parameters {settings.parameters!r} matches no parameter of the UNet, such as {names[0]}; give all, or a "
            "regular expression over whole names"
        )
    return chosen


def put_values(unet: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Give a UNet other values, {parameter name: tensor}, those of choose_trainable with tuning full."""
    for name, tensor in values.items():
        unet.get_parameter(name).data.copy_(tensor)


def weights_beside(unet: Any, tuned: Collection[str]) -> dict[str, Tensor]:
    """What save_tuned writes beside what trains: nothing beside an adapter, and the rest of a whole UNet.

    tuned  names of what trains
    """
    if hasattr(unet, "peft_config"):
        return {}
    return {name: tensor for name, tensor in unet.state_dict().items() if name not in tuned}


def save_tuned(folder: Path, tensors: dict[str, Tensor], unet: Any, about: dict[str, Any]) -> None:
    """Write what trains: an adapter as PEFT does, or a whole UNet as diffusers does.

    tensors  {parameter name: fp32 tensor}, those of choose_trainable; the rest of a whole UNet is as it was loaded
    about    kept beside it
    """
    if hasattr(unet, "peft_config"):
        save_adapter(folder, tensors, unet, about)
        return
    from safetensors.torch import save_file

    with quiet_libraries():
        unet.save_config(folder)
    whole = {n: t.detach().cpu().contiguous() for n, t in (weights_beside(unet, tensors) | tensors).items()}
    save_file(whole, folder / f"{STEMS[0]}.safetensors", metadata={"format": "pt"})
    (folder / ABOUT_FILE).write_text(json.dumps(about, indent=2, sort_keys=True) + "\n")
