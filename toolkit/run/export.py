"""A run's adapter on its way out: PEFT, diffusers, kohya, or merged into the UNet, each with a model card.

Test: pytest tests/run/test_export.py. The recipe goes along, in the weights' header or, for a merged UNet, beside it.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import yaml

from toolkit.config import RunConfig, load_config
from toolkit.engine.world import init_world
from toolkit.errors import UserError
from toolkit.model.base import NAMED_BASES, PRECISIONS, Base, load_base
from toolkit.model.formats import AdapterFile, read_peft, untuned, write_diffusers, write_kohya, write_peft
from toolkit.model.lora import load_adapter, merge_adapters
from toolkit.run.checkpoint import find_fault, list_checkpoints
from toolkit.run.inference import ABOUT_FILE, read_run
from toolkit.run.pretrain import find_base

_USE_HERE = (
    "python launch/interpolate.py --adapter FOLDER --first a.png --last b.png --out ab.mp4",
    "python launch/interpolate.py --unet FOLDER --first a.png --last b.png --out ab.mp4",
)
_USE_ELSEWHERE = {
    "peft": """\
from peft import PeftModel
unet = PeftModel.from_pretrained(unet, "FOLDER")  # a UNetSpatioTemporalConditionModel with nine input channels""",
    "diffusers": """\
from diffusers import UNetSpatioTemporalConditionModel
from diffusers.loaders import PeftAdapterMixin
class UNet(UNetSpatioTemporalConditionModel, PeftAdapterMixin): ...
unet = UNet.from_pretrained(BASE, subfolder="unet")
unet.load_lora_adapter("FOLDER", prefix="unet", use_safetensors=True)""",
    "kohya": """\
# lora_unet_<layer> is the UNet's layer of diffusers' name, dots as underscores: W += alpha / rank * lora_up @ lora_down
# with dora_scale, each row of that W is then scaled to this length; .diff and .diff_b are added as they are""",
    "merged": """\
from diffusers import UNetSpatioTemporalConditionModel
unet = UNetSpatioTemporalConditionModel.from_pretrained("FOLDER", subfolder="unet")  # leaves out mask_token""",
}


def export_run(run: str, to: str, out: str, checkpoint: str | None = None) -> Path:
    """Write a run's adapter and a model card into a new folder.

    to          peft, diffusers, kohya or merged
    checkpoint  the name of one of the run's, such as step_000200; default the newest good one
    returns     the folder
    raises      UserError where it is not empty, the run has no such checkpoint, or its base is not here and is needed
    """
    folder = Path(out).absolute()
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise UserError(f"{out} is there already; give --out a folder that is new or empty")
    source, config = find_checkpoint(Path(run), checkpoint)
    adapter = read_peft(source)
    aside = folder.with_name(f"{folder.name}.tmp{os.getpid()}")
    aside.mkdir(parents=True)
    try:
        if to == "peft":
            write_peft(aside, adapter)
        elif to == "diffusers":
            write_diffusers(aside, adapter)
        elif to == "kohya":
            _write_kohya(aside / f"{config.name}.safetensors", adapter, config)
        else:
            _write_merged(aside, source, adapter.metadata, config)
        (aside / "README.md").write_text(make_card(adapter, config, to))
        os.replace(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def find_checkpoint(run: Path, name: str | None) -> tuple[Path, RunConfig]:
    """Find a checkpoint of a run, the newest good one unless it is named, and the run's recipe."""
    if name is None:
        return read_run(run)
    known = {folder.name: folder for folder in list_checkpoints(run)}
    if name not in known:
        raise UserError(f"{run} has no checkpoint {name}; it has {', '.join(known) or 'none'}")
    if fault := find_fault(known[name]):
        raise UserError(f"{known[name]} is damaged: {fault}; leave --checkpoint out to take the newest good one")
    return known[name], load_config(run / "config.yaml")


def make_card(adapter: AdapterFile, config: RunConfig, to: str) -> str:
    """A model card in Markdown with front matter for the hub: what it is, how it was trained, how it is used."""
    lora, about = config.lora, adapter.metadata
    hub_base, hub_unet = NAMED_BASES.get(config.model.base, (config.model.base, None))
    base = config.model.unet or hub_unet or hub_base
    front: dict[str, Any] = {
        "library_name": "peft" if to == "peft" else "diffusers",
        "license": "other",
        "license_name": "licence-of-the-base-model",
        "pipeline_tag": "image-to-video",
        "tags": ["framer", "stable-video-diffusion", "frame-interpolation", "lora"],
    }
    if base.count("/") == 1 and not Path(base).exists():  # the hub wants the id of a model there, and no path
        front["base_model"] = base
    kind = "DoRA" if lora.dora else "LoRA"
    what = f"The UNet of {base} with a {kind} merged into it" if to == "merged" else f"A {kind} for the UNet of {base}"
    facts = {
        "base": base,
        "rank": lora.rank,
        "alpha": f"{lora.alpha:g}" + " (rsLoRA)" * lora.rslora,
        "targets": lora.targets if isinstance(lora.targets, str) else ", ".join(lora.targets),
        "adapted layers": len(adapter.kind.ranks),
        "trained whole": ", ".join(lora.extra_trainable) or "nothing",
        "optimizer steps": about.get("step", "unknown"),
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    return f"""\
---
{yaml.safe_dump(front, sort_keys=False)}---

# {config.name}

{what}: it generates the frames between two stills. Trained with Framer Toolkit, and written in the form: {to}.

| | |
|---|---|
{table}

## Use

In Framer Toolkit:

    {_USE_HERE[to == "merged"]}

Elsewhere:

```python
{_USE_ELSEWHERE[to].replace("BASE", repr(base))}
```

## How it was trained

```yaml
{yaml.safe_dump(about.get("recipe") or config.model_dump(mode="json"), sort_keys=False).rstrip()}
```

## Licence

These weights derive from others, whose licences apply to them: {about.get("licence", "that of the base")}.
"""


def _write_kohya(file: Path, adapter: AdapterFile, config: RunConfig) -> None:
    unet = _load_base(config).unet if adapter.extras else None  # its own values, to take the differences from
    write_kohya(file, adapter, {name: untuned(unet, name) for name in adapter.extras} if unet else {})


def _write_merged(folder: Path, source: Path, metadata: dict[str, Any], config: RunConfig) -> None:
    base = _load_base(config)
    load_adapter(base.unet, source, base.signature)
    merge_adapters(base.unet)
    base.unet.to(PRECISIONS[config.engine.precision]).save_pretrained(folder / "unet", safe_serialization=True)
    (folder / ABOUT_FILE).write_text(json.dumps(metadata, indent=2, sort_keys=True) + "\n")


def _load_base(config: RunConfig) -> Base:
    """In fp32, so that sums are rounded once."""
    world = init_world(join=False)
    return load_base(find_base(config.model, world), world.device, "fp32")
