"""A run's adapter on its way out: PEFT, diffusers, kohya, or merged into the UNet, each with a model card.

Test: pytest tests/commands/test_export.py. The recipe goes along, in the weights' header or, for a merged UNet, beside it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from toolkit.config import RunConfig, parse_config
from toolkit.data.files import appearing, is_free, share
from toolkit.errors import UserError
from toolkit.model.base import PRECISIONS, build_unet_on_meta, describe_unet, find_unet, load_unet, name_base, sign_unet
from toolkit.model.formats import AdapterFile, read_metadata, read_peft, write_diffusers, write_kohya, write_peft
from toolkit.model.lora import load_adapter, merge_adapters, refuse_other_base, with_values
from toolkit.model.quiet import quiet_libraries
from toolkit.model.sources import is_hub_id
from toolkit.model.tuning import ABOUT_FILE, put_values
from toolkit.model.unet import FramerUNet
from toolkit.run.ema import put_together
from toolkit.run.inference import read_merged, read_run, refuse_damaged

_USE_HERE = (
    "python launch/interpolate.py --adapter FOLDER --first a.png --last b.png --out ab.mp4",
    "python launch/interpolate.py --unet FOLDER --first a.png --last b.png --out ab.mp4",
)
_USE_ELSEWHERE = {
    "peft": """\
from peft import PeftModel
IMPORT

unet = UNET.from_pretrained(BASE, subfolder="unet")
unet = PeftModel.from_pretrained(unet, "FOLDER")""",
    "diffusers": """\
from diffusers.loaders import PeftAdapterMixin
IMPORT

class UNet(UNET, PeftAdapterMixin): ...
unet = UNet.from_pretrained(BASE, subfolder="unet")
unet.load_lora_adapter("FOLDER", prefix="unet", use_safetensors=True)""",
    "kohya": """\
# lora_unet_<layer>: diffusers' name of the layer, dots as underscores; Stability's name for temporal layers, as in ComfyUI.
# W += alpha / rank * lora_up @ lora_down; with dora_scale, each row of that W is then scaled to this length.
# .diff and .diff_b are added as they are.""",
    "merged": """\
IMPORT

unet = UNET.from_pretrained("FOLDER", subfolder="unet")""",
}
_IMPORT = {
    "UNetSpatioTemporalConditionModel": "from diffusers import UNetSpatioTemporalConditionModel",
    "FramerUNet": "from toolkit import FramerUNet  # diffusers' class has no mask_token",
}


def export_run(
    run: str | None,
    to: str,
    out: str,
    checkpoint: str | None = None,
    precision: str | None = None,
    ema: float = 0.0,
) -> Path:
    """Write a run's adapter and a model card into a new folder.

    to          peft, diffusers, kohya or merged
    checkpoint  as find_checkpoint takes it
    precision   of PRECISIONS, of a merged UNet; adapters are fp32. Default fp16, as Stability ships its weights: bf16 keeps
                8 bits of a weight, in which much of a small update is lost (docs/LEDGER.md)
    ema         sigma_rel of the average over the training that is written, see ema.py; 0: the checkpoint's own weights
    returns     the folder
    raises      UserError where it is not empty, the run has no such checkpoint, or its base is not here and is needed
    """
    if precision is not None and to != "merged":
        raise UserError(f"--precision is for --to merged; an adapter in the form {to} is always fp32, so leave it out")
    folder = Path(os.path.expanduser(out)).resolve()
    if not is_free(folder, folder=True):
        raise UserError(f"{out} is there already; give --out a folder that is new or empty")
    source, config = find_checkpoint(None if run is None else Path(run).expanduser(), checkpoint)
    if config.tuning == "full" and to != "merged":
        raise UserError(
            f"{source} holds a whole UNet (tuning full) and no adapter that could be written in the form {to}; give --to "
            "merged"
        )
    about = read_about(source) | ({"ema": ema} if ema else {})
    values = put_together(source, ema) if ema else None
    adapter = None if config.tuning == "full" else replace(read_peft(source), metadata=about)
    if adapter is not None and values is not None:
        adapter = with_values(adapter, values)
    with appearing(folder, folder=True) as aside:
        if adapter is None or to == "merged":
            _write_merged(aside, source, about | {"precision": precision or "fp16"}, config, values)
        elif to == "peft":
            write_peft(aside, adapter)
        elif to == "diffusers":
            write_diffusers(aside, adapter)
        else:
            _write_kohya(aside / f"{config.name}.safetensors", adapter, source, config)
        (aside / "README.md").write_text(make_card(adapter, about, config, to))
        share(aside)
    return folder


def find_checkpoint(run: Path | None, name: str | None) -> tuple[Path, RunConfig]:
    """Find a checkpoint, verified, and its recipe: the run's, or for a folder named by its path that in its header.

    name    latest (None too), best, one of the run's such as step_000200, or a path
    raises  UserError where there is none, it is damaged, it is no checkpoint, or one of another run
    """
    if name is not None and (os.sep in name or run is None):
        folder = Path(name).expanduser()
        if run is not None and not folder.resolve().is_relative_to(run.resolve()):
            raise UserError(f"--checkpoint {name} is none of {run}; leave --run out, or name one of its own")
        refuse_damaged(folder, "give another one")
        return folder, parse_config(read_about(folder).get("recipe"), folder)
    if run is None:
        raise UserError("nothing to export; give --run, a run folder, or --checkpoint with the path of a checkpoint")
    return read_run(run, name)


def read_about(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint tells of what it holds: a whole UNet beside it, an adapter in its header."""
    return read_merged(checkpoint) or read_metadata(checkpoint)


def make_card(adapter: AdapterFile | None, about: dict[str, Any], config: RunConfig, to: str) -> str:
    """A model card in Markdown with front matter for the hub: what it is, how it was trained, how it is used.

    adapter  None: the UNet's own weights were tuned
    about    what the checkpoint tells of itself
    """
    lora = config.lora
    base = about.get("base") or name_base(config.model)
    front: dict[str, Any] = {
        "library_name": "peft" if to == "peft" else "diffusers",
        "license": "other",
        "license_name": "licence-of-the-base-model",
        "pipeline_tag": "image-to-video",
        "tags": ["framer", "stable-video-diffusion", "frame-interpolation", *["lora"] * (adapter is not None)],
    }
    if is_hub_id(base):  # the hub wants the id of a model there, and no path
        front["base_model"] = base
    kind = "DoRA" if lora.dora else "LoRA"
    what = f"The UNet of {base} with a {kind} merged into it" if to == "merged" else f"A {kind} for the UNet of {base}"
    if adapter is None:
        what = f"A UNet tuned from that of {base}"
    patterns = {f"{name} of {key}": value for name in ("rank", "alpha")
                for key, value in getattr(lora, f"{name}_pattern").items()}  # fmt: skip
    weights = about.get("base_files", {}).get("unet", "unknown")
    if os.path.isabs(weights):
        weights = "/".join(Path(weights).parts[-2:])  # the rest is a place on one machine
    facts: dict[str, Any] = {"base": base, "weights of the base": weights}
    if adapter is None:
        facts["trained parameters"] = config.full.parameters
    else:
        facts |= {
            "rank": lora.rank,
            "alpha": f"{lora.alpha:g}" + " (rsLoRA)" * lora.rslora,
            **patterns,
            "targets": lora.targets if isinstance(lora.targets, str) else ", ".join(lora.targets),
            "adapted layers": len(adapter.kind.ranks),
            "trained whole": ", ".join(lora.extra_trainable) or "nothing",
        }
    facts["optimizer steps"] = about.get("step", "unknown")
    if "ema" in about:
        facts["average over them"] = f"sigma_rel {about['ema']:g} (arXiv 2312.02696)"
    table = "\n".join(f"| {_cell(name)} | {_cell(value)} |" for name, value in facts.items())
    notes = "".join(f"\n- {note}" for note in _list_notes(adapter, to)) if adapter is not None else ""
    return f"""\
---
{yaml.safe_dump(front, sort_keys=False)}---

# {config.name}

{what}: it generates the frames between two stills. Trained with Framer Toolkit, and written in the form: {to}.

| | |
|---|---|
{table}

## Use

In Framer Toolkit, FOLDER being where these files lie, or their id on the hub:

    {_USE_HERE[to == "merged"]}

Elsewhere:

```python
{_show_use(to, base, _count_channels(config), adapter is not None and bool(adapter.extras))}
```
{notes}

## How it was trained

```yaml
{yaml.safe_dump(about.get("recipe") or config.model_dump(mode="json"), sort_keys=False).rstrip()}
```

## Licence

These weights derive from others, whose licences apply to them: {about.get("licence", "that of the base")}.
"""


def _show_use(to: str, base: str, channels: int, has_extras: bool) -> str:
    """Code that loads an export without this toolkit, or with its UNet class where the stock one would lose a part."""
    if channels == 8 and has_extras and to in ("peft", "diffusers"):
        return (
            "from toolkit import FramerPipeline  # it widens the base's eight channels to nine\n\n"
            f'pipe = FramerPipeline.from_pretrained({base!r})\npipe.load_lora_weights("FOLDER")'
        )
    unet = "FramerUNet" if channels == 9 or to == "merged" else "UNetSpatioTemporalConditionModel"
    whole = is_hub_id(base) or (Path(base) / "unet").is_dir()  # else a file, or a UNet's own folder
    words = {"IMPORT": _IMPORT[unet], "UNET": unet, "BASE": repr(base if whole else "FOLDER OF THE BASE")}
    code = _USE_ELSEWHERE[to]
    for word, meaning in words.items():
        code = code.replace(word, meaning)
    return code


def _count_channels(config: RunConfig) -> int:
    """Input channels of a base's UNet, as far as it can be looked at here, else Framer's nine."""
    try:
        return describe_unet(config.model)["in_channels"]
    except (UserError, KeyError):
        return 9


def _list_notes(adapter: AdapterFile, to: str) -> list[str]:
    """What others do not do as this toolkit does."""
    notes = []
    if to == "diffusers":
        notes.append(
            "alpha stands in the file's header (lora_adapter_metadata): a diffusers that does not read it scales by 1."
        )
    if adapter.extras and to != "merged":
        notes.append(
            f"{', '.join(sorted(adapter.extras))}: trained whole. A UNet of eight input channels (plain SVD) has no place "
            "for them, and ComfyUI none for mask_token: use this toolkit's FramerPipeline, or an export --to merged."
        )
    if adapter.kind.dora and to == "kohya":
        notes.append("ComfyUI divides by the norm of the base's rows, PEFT and this toolkit by that of W + s B A.")
    # comfy/utils.py unet_to_diffusers names attention, and of residual blocks those of images
    unnamed = [name for name in adapter.kind.ranks if "_res_block." in name or ".time_pos_embed." in name]
    if to == "kohya" and unnamed:
        notes.append(
            f"{len(unnamed)} of {len(adapter.kind.ranks)} layers are of kinds that ComfyUI has no names for and leaves out, "
            f"such as {unnamed[0]}: an export --to merged has them all."
        )
    if to == "kohya":
        notes.append(
            "ComfyUI itself knows SVD's UNet of eight channels; kijai/ComfyUI-FramerWrapper, for Framer's nine, takes a "
            "whole UNet and no LoRA: an export --to merged."
        )
    return notes


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|")  # regular expressions hold it


def _write_kohya(file: Path, adapter: AdapterFile, source: Path, config: RunConfig) -> None:
    model = config.model
    if not adapter.extras:
        write_kohya(file, adapter, build_unet_on_meta(model).config.layers_per_block, {})
        return
    unet = load_unet(find_unet(model), torch.float32, model.variant)  # its own values, to take the differences from
    refuse_other_base(adapter.metadata, sign_unet(unet), source)
    base = {name: unet.get_parameter(name).detach() for name in adapter.extras}
    write_kohya(file, adapter, unet.config.layers_per_block, base)


def _write_merged(
    folder: Path, source: Path, metadata: dict[str, Any], config: RunConfig, values: Mapping[str, Tensor] | None
) -> None:
    model = config.model
    whole = config.tuning == "full"
    unet: FramerUNet = load_unet(source if whole else find_unet(model), torch.float32, model.variant)
    if not whole:  # in fp32, so that sums are rounded once
        load_adapter(unet, source, sign_unet(unet), values=values)
        merge_adapters(unet)
    elif values is not None:
        put_values(unet, values)
    with quiet_libraries():
        unet.to(PRECISIONS[metadata["precision"]]).save_pretrained(folder / "unet", safe_serialization=True)
    (folder / ABOUT_FILE).write_text(json.dumps(metadata, indent=2, sort_keys=True) + "\n")
