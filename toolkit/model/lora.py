"""LoRA on the attention projections: PEFT injects, this module names, counts, saves and loads.

Test: pytest tests/model. Files are PEFT's own: adapter_model.safetensors + adapter_config.json.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.errors import UserError
from toolkit.rng import rng

_QKVO = r"(to_q|to_k|to_v|to_out\.0)"
# PEFT matches a string target against the whole module name; the dot before transformer_blocks keeps out temporal_.
TARGETS = {
    "spatial": rf".*\.transformer_blocks\.\d+\.attn[12]\.{_QKVO}",
    "temporal": rf".*\.temporal_transformer_blocks\.\d+\.attn[12]\.{_QKVO}",
    "all": rf".*\.attn[12]\.{_QKVO}",
}
METADATA_KEY = "framer_toolkit"  # of the safetensors header: base, base_fingerprint, step, as JSON
_PREFIX = "base_model.model."  # what PeftModel puts before every module name in its files


def inject_lora(unet: Any, rank: int, alpha: float, targets: str, seed: int) -> dict[str, nn.Parameter]:
    """Put trainable adapters into a frozen UNet; the output is unchanged until they are trained.

    targets  "spatial", "temporal", "all", or a regular expression matched against whole module names
    seed     of the A matrices (uniform, PEFT's default); the B matrices are zero
    returns  {parameter name: fp32 parameter}, in a fixed order
    raises   UserError where the expression is invalid or matches nothing
    """
    from peft import LoraConfig, inject_adapter_in_model

    pattern = TARGETS.get(targets, targets)
    try:
        matches = [n for n, m in unet.named_modules() if isinstance(m, nn.Linear) and re.fullmatch(pattern, n)]
    except re.error as error:
        raise UserError(f"lora.targets {targets!r} is not a regular expression: {error}") from None
    if not matches:
        raise UserError(
            f"lora.targets {targets!r} matches no linear layer; use spatial, temporal or all, or see doctor"
        )
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=matches), unet)
    _disable_input_cast(unet)
    return _initialise(lora_parameters(unet), seed)


def lora_parameters(unet: Any) -> dict[str, nn.Parameter]:
    """Name the adapter's parameters as the UNet does, sorted."""
    return {name: p for name, p in sorted(unet.named_parameters()) if ".lora_A." in name or ".lora_B." in name}


def peft_name(parameter_name: str) -> str:
    """Name of a parameter in adapter_model.safetensors."""
    return _PREFIX + parameter_name.replace(".default.", ".")


def save_adapter(folder: Path, tensors: dict[str, Tensor], unet: Any, metadata: dict[str, Any]) -> None:
    """Write adapter_model.safetensors and adapter_config.json as PEFT reads them.

    tensors   {parameter name: fp32 tensor}
    metadata  kept in the safetensors header: base, fingerprint, step
    """
    from safetensors.torch import save_file

    config = unet.peft_config["default"]
    config.base_model_name_or_path = metadata["base"]
    config.save_pretrained(folder)
    named = {peft_name(name): tensor.detach().float().cpu().contiguous() for name, tensor in tensors.items()}
    # one header key: safetensors writes several in random order, and the same adapter should be the same file
    header = {METADATA_KEY: json.dumps(metadata, sort_keys=True)}
    save_file(named, folder / "adapter_model.safetensors", metadata=header)


def load_adapter(unet: Any, folder: Path, fingerprint: str, scale: float = 1.0) -> dict[str, Any]:
    """Inject a saved adapter into the base it was trained on.

    fingerprint  of the loaded base; an adapter of another base is refused
    scale        multiplies alpha / rank, it does not replace it
    returns      the adapter's metadata
    raises       UserError where the files are missing, belong to another base, or do not fit
    """
    from peft import LoraConfig, inject_adapter_in_model
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            metadata = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        saved = json.loads((folder / "adapter_config.json").read_text())
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise UserError(
            f"no readable adapter in {folder}: {error}; it holds adapter_model.safetensors and adapter_config.json"
        ) from None
    if metadata.get("base_fingerprint", fingerprint) != fingerprint:
        raise UserError(
            f"the adapter in {folder} was trained on {metadata.get('base')} ({metadata['base_fingerprint']}), "
            f"not on the base given here ({fingerprint}); give its own base with --base"
        )
    foreign = [name for name in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern") if saved.get(name)]
    if foreign:
        raise UserError(
            f"the adapter in {folder} uses {', '.join(foreign)}, which is not supported; only plain LoRA is"
        )
    try:
        config = LoraConfig(r=saved["r"], lora_alpha=saved["lora_alpha"], target_modules=saved["target_modules"])
        inject_adapter_in_model(config, unet)
    except (KeyError, ValueError) as error:
        raise UserError(f"the adapter in {folder} does not fit this UNet: {error}") from None
    _disable_input_cast(unet)
    parameters = lora_parameters(unet)
    wanted = {peft_name(name): parameter for name, parameter in parameters.items()}
    if wanted.keys() != tensors.keys() or any(wanted[n].shape != t.shape for n, t in tensors.items()):
        raise UserError(
            f"the adapter in {folder} does not fit this UNet: {len(wanted.keys() ^ tensors.keys())} names differ"
        )
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.data = tensors[name].to(parameter.device, torch.float32)
    for module in unet.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", scale)
    unet.requires_grad_(False)
    return metadata


def enable_adapter(unet: Any, enabled: bool) -> None:
    """Switch the adapter on or off; off, the UNet is the untuned base."""
    for module in unet.modules():
        if hasattr(module, "enable_adapters"):
            module.enable_adapters(enabled)


def _initialise(parameters: dict[str, nn.Parameter], seed: int) -> dict[str, nn.Parameter]:
    for i, (name, parameter) in enumerate(parameters.items()):
        # masters in fp32 whatever the base's dtype: a bf16 weight loses updates below 2^-9 of its size
        parameter.data = parameter.data.float()
        if ".lora_A." in name and not parameter.is_meta:
            value = nn.init.kaiming_uniform_(
                torch.empty(parameter.shape), math.sqrt(5), generator=rng(seed, "lora_init", i)
            )
            parameter.data.copy_(value)
    return parameters


def _disable_input_cast(unet: Any) -> None:
    # PEFT casts each layer's input to the adapter's fp32; under autocast that only costs memory and a cast back
    for module in unet.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = False
