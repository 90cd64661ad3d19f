"""Reads one network's weights strictly: what is missing, too much, of another shape or no number is named, never made up.

Test: pytest tests/model/test_base.py
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from toolkit.errors import UserError, in_one_line
from toolkit.model.quiet import quiet_libraries
from toolkit.model.sources import find_weights, open_weights


def load_part(kind: Any, folder: Path, variant: Literal["fp16"] | None = None, **options: Any) -> Any:
    """Load one network, strictly: from_pretrained alone fills a missing weight with random numbers and a warning.

    options  of from_pretrained; with `dtype`, each tensor is cast as it is read, so there is never a copy in fp32
    """
    weights = find_weights(folder, variant)
    for file in weights.files:
        with open_weights(file):
            pass
    # mismatched shapes are refused below, by name, where the libraries would point to a report that is not shown
    options = {"use_safetensors": True, "variant": weights.variant, "ignore_mismatched_sizes": True} | options
    try:
        with quiet_libraries():
            network, report = kind.from_pretrained(folder, output_loading_info=True, **options)
    except (OSError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"cannot load {folder} as a {kind.__name__}: {in_one_line(error)}") from None
    _refuse_shapes(folder, kind, {name: (given, wanted) for name, given, wanted in report["mismatched_keys"]})
    refuse_faults(folder, kind, report["missing_keys"], report["unexpected_keys"])
    return network


def load_file(kind: Any, config: dict[str, Any], file: Path, dtype: torch.dtype) -> Any:
    """Load one diffusers network from a single safetensors file, as strictly as load_part."""
    network = build_on_meta(kind, config)
    wanted = {name: list(tensor.shape) for name, tensor in network.state_dict().items()}
    with open_weights(file) as tensors:
        names = tensors.keys()
        given = {name: tensors.get_slice(name).get_shape() for name in names}
        refuse_faults(file, kind, wanted.keys() - given.keys(), given.keys() - wanted.keys())
        _refuse_shapes(file, kind, {n: (given[n], wanted[n]) for n in wanted if wanted[n] != given[n]})
        # copied, because what is read is a view of the file, and the file may change
        weights = {name: tensors.get_tensor(name).to(dtype, copy=True) for name in names}
    network.load_state_dict(weights, assign=True)
    return network


def build_on_meta(kind: Any, config: Mapping[str, Any]) -> Any:
    """Build a network of shapes without weights; UserError where the configuration describes none."""
    try:
        with torch.device("meta"):
            # .to("meta") once more: AlphaBlender's mix_factor ignores the device context
            return kind.from_config(config).to("meta")
    except (TypeError, ValueError) as error:
        raise UserError(f"no {kind.__name__} can be built as its configuration says: {in_one_line(error)}") from None


def refuse_faults(place: Path, kind: Any, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    # older transformers saved CLIP's position_ids, a constant
    faults = {
        "missing keys": sorted(missing),
        "unexpected keys": sorted(n for n in unexpected if "position_ids" not in n),
    }
    said = [f"{fault}: {', '.join(names[:3])}" for fault, names in faults.items() if names]
    if said:
        raise UserError(f"{place} does not hold the weights of a {kind.__name__}: {'; '.join(said)}")


def _refuse_shapes(place: Path, kind: Any, mismatched: dict[str, tuple[Any, Any]]) -> None:
    for name, (given, wanted) in sorted(mismatched.items())[:1]:
        raise UserError(
            f"{place} does not hold the weights of this {kind.__name__}: {name} has the shape {list(given)} instead of "
            f"{list(wanted)}"
        )


def refuse_non_finite(network: nn.Module, place: Path) -> None:
    for name, parameter in network.named_parameters():
        if not parameter.isfinite().all():
            raise UserError(f"{place} holds NaN or infinity in {name}; it is damaged, so copy or fetch it again")
