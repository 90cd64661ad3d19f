"""Loads the frozen base: UNet, VAE, CLIP image encoder and scheduler settings, from a diffusers folder or hub id.

Test: pytest tests/model. Only safetensors are read. Nothing here trains; see lora.py for what does.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from toolkit.errors import UserError
from toolkit.model.unet import PUBLISHED_CONFIGS, FramerUNet, widen_conv_in

PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}
PARTS = ("unet", "vae", "image_encoder", "scheduler")


@dataclass(frozen=True)
class Base:
    """A loaded base model, all parts frozen and in eval mode."""

    name: str
    unet: FramerUNet
    vae: Any  # diffusers AutoencoderKLTemporalDecoder
    image_encoder: Any  # transformers CLIPVisionModelWithProjection
    scheduler: dict[str, Any]  # scheduler_config.json: betas, sigma range
    fingerprint: str  # sha256 of the UNet's weight files: an adapter belongs to one base


def load_base(base: str, unet: str | None, revision: str | None, device: torch.device, precision: str) -> Base:
    """Load every part onto the device.

    base       folder or hub id in SVD layout
    unet       folder or hub id whose unet/ replaces the base's, or None
    precision  "bf16" or "fp32"; the VAE stays in fp32 where its config says force_upcast
    raises     UserError naming the missing part, or a UNet of other channels or another prediction type
    """
    from diffusers import AutoencoderKLTemporalDecoder
    from diffusers.utils import logging as diffusers_logging
    from transformers import CLIPVisionModelWithProjection
    from transformers.utils import logging as transformers_logging

    # their bars and hints, on every rank, would bury the run's own lines
    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    folder = fetch(base, revision, PARTS if unet is None else PARTS[1:])
    unet_folder = folder if unet is None else fetch(unet, None, ("unet",))
    dtype = PRECISIONS[precision]
    scheduler = read_scheduler(folder)
    vae = load_part(AutoencoderKLTemporalDecoder, folder / "vae")
    vae.to(device, torch.float32 if vae.config.force_upcast else dtype)
    encoder = load_part(CLIPVisionModelWithProjection, folder / "image_encoder")
    network = load_unet(unet_folder, dtype).to(device)
    for part in (network, vae, encoder.to(device, dtype)):
        part.requires_grad_(False).eval()
    return Base(unet or base, network, vae, encoder, scheduler, fingerprint_weights(unet_folder / "unet"))


def load_unet(folder: Path, dtype: torch.dtype) -> FramerUNet:
    """Read unet/ as a 9-channel FramerUNet; an 8-channel SVD UNet is widened without changing its output."""
    from diffusers import UNetSpatioTemporalConditionModel

    channels = _read_json(folder / "unet/config.json").get("in_channels")
    if channels == 8:
        return widen_conv_in(load_part(UNetSpatioTemporalConditionModel, folder / "unet", torch_dtype=dtype))
    if channels != 9:
        raise UserError(f"{folder}/unet reads {channels} channels; a base must read 9 (Framer) or 8 (SVD)")
    return load_part(FramerUNet, folder / "unet", torch_dtype=dtype)


def load_part(kind: Any, folder: Path, **options: Any) -> Any:
    """Load one network, strictly: from_pretrained alone fills a missing weight with random numbers and a warning."""
    try:
        network, report = kind.from_pretrained(folder, use_safetensors=True, output_loading_info=True, **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"cannot load {folder}: {' '.join(str(error).split())}; it must hold config.json and whole .safetensors "
            "weights (other formats are not read, because they can run code)"
        ) from None
    faults = [
        f"{fault.replace('_', ' ')}: {', '.join(names[:3])}"
        for fault in ("missing_keys", "unexpected_keys")
        # older transformers saved CLIP's position_ids, a constant
        if (names := sorted(name for name in report[fault] if not name.endswith("position_ids")))
    ]
    if faults:
        raise UserError(f"{folder} does not hold the weights of a {kind.__name__}: {'; '.join(faults)}")
    return network


def build_unet_on_meta(base: str, unet: str | None, revision: str | None = None) -> FramerUNet:
    """Build the UNet without weights, from the local files or the published configuration, to count and inspect."""
    source = unet or base
    if source in PUBLISHED_CONFIGS and not Path(source).exists():
        config = PUBLISHED_CONFIGS[source]
    else:
        config = _read_json(fetch(source, revision, ("unet",), configs_only=True) / "unet/config.json")
    with torch.device("meta"):
        # .to("meta") once more: AlphaBlender's mix_factor ignores the device context
        return FramerUNet.from_config({**config, "in_channels": 9}).to("meta")


def fetch(source: str, revision: str | None, parts: tuple[str, ...], configs_only: bool = False) -> Path:
    """Find a local folder, or download the wanted parts of a hub repository (JSON and safetensors only)."""
    folder = Path(source)
    if not folder.exists():
        if source.startswith((".", "/", "~")) or source.count("/") != 1:
            raise UserError(
                f"no base model at {source}: give a folder in diffusers layout, a hub id owner/name, or tiny"
            )
        folder = _download(source, revision, parts, configs_only)
    missing = [part for part in parts if not (folder / part).is_dir()]
    if missing:
        raise UserError(f"{source} lacks {', '.join(missing)}; a base in SVD layout holds {', '.join(PARTS)}")
    return folder


def _download(source: str, revision: str | None, parts: tuple[str, ...], configs_only: bool) -> Path:
    from huggingface_hub import snapshot_download

    endings = ("json",) if configs_only else ("json", "safetensors")
    try:
        return Path(
            snapshot_download(
                source,
                revision=revision,
                allow_patterns=[f"{part}/*.{ending}" for part in parts for ending in endings],
                ignore_patterns=["*.fp16.safetensors"],
            )
        )
    except Exception as error:
        raise UserError(
            f"cannot get {source} from the hub: {str(error).splitlines()[0]}; "
            "check the name and the network, or download it elsewhere and give the folder"
        ) from None


def read_scheduler(folder: Path) -> dict[str, Any]:
    """Read scheduler_config.json and refuse a base that is not an SVD-style v-model."""
    config = _read_json(folder / "scheduler/scheduler_config.json")
    kind, betas = config.get("prediction_type"), config.get("beta_schedule")
    if kind != "v_prediction" or betas != "scaled_linear":
        raise UserError(
            f"{folder}/scheduler has prediction_type {kind} and beta_schedule {betas}; "
            "only SVD's v_prediction with scaled_linear betas is supported"
        )
    return config


def fingerprint_weights(folder: Path) -> str:
    """Hash the weight files that are read from a folder: sha256 hex, first 16 digits."""
    # a hub snapshot may hold *.fp16.safetensors beside them, put there by another program
    files = sorted(f for f in folder.glob("*.safetensors") if f.stem.count(".") == 0)
    if not files:
        raise UserError(
            f"{folder} holds no .safetensors file; weights in other formats are not read, because they can run code"
        )
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}; a base in SVD layout has it") from None
