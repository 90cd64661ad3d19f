"""Loads the frozen base: UNet, VAE, CLIP image encoder and scheduler settings, by name, from folders, hub ids or one file.

Test: pytest tests/model. Only safetensors are read. Nothing here trains; see lora.py for what does. The files of each part,
and the names in the UNet's, are checked before the first is read, because reading takes minutes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from toolkit.config import ModelConfig
from toolkit.errors import UserError
from toolkit.model.encoders import CLIP_CONFIG, CLIP_SIZE_PX, VAE_CONFIG
from toolkit.model.sources import (
    NAMED_BASES,
    PARTS,
    WEIGHTED,
    fetch,
    find_weights,
    name_source,
    open_weights,
    read_json,
    refuse_local_revision,
)
from toolkit.model.unet import PUBLISHED_CONFIGS, SVD_CONFIG, FramerUNet, widen_conv_in
from toolkit.model.weights import build_on_meta, load_file, load_part, refuse_faults, refuse_non_finite

ENCODERS = ("vae", "image_encoder")
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}  # fp16 for inference only


@dataclass(frozen=True)
class Base:
    """A loaded base model, all parts frozen and in eval mode."""

    name: str  # where the UNet came from: its folder, file or hub id
    unet: FramerUNet
    vae: Any  # diffusers AutoencoderKLTemporalDecoder; None where it is not loaded
    image_encoder: Any  # transformers CLIPVisionModelWithProjection; None where it is not loaded
    scheduler: dict[str, Any]  # scheduler_config.json with diffusers' defaults: betas, sigma_min, sigma_max, ...
    parameterization: Literal["v", "epsilon"]  # what the UNet's raw output means
    dtype: torch.dtype  # of UNet and CLIP; the VAE may stay in fp32
    signature: list[float]  # sign_unet, before any adapter: which base an adapter belongs to
    sources: dict[str, str]  # part -> file it was read from; owner/name@commit/file for a hub snapshot
    files: tuple[Path, ...]  # of all parts, for fingerprint_files
    vae_config: Mapping[str, Any]  # complete, whether or not the VAE is loaded

    @property
    def latent_px(self) -> int:
        """Pixels to a latent, along a side."""
        return latent_px(self.vae_config)

    @property
    def scaling(self) -> float:
        """What the VAE's latents are multiplied by for the UNet."""
        return float(self.vae_config["scaling_factor"])


def load_base(
    model: ModelConfig,
    device: torch.device,
    precision: str,
    unet_dtype: torch.dtype | None = None,
    encoders: bool = True,
) -> Base:
    """Load every part onto the device.

    model       base, unet, their revisions and the variant to read; other fields have no say
    precision   of PRECISIONS; the VAE stays in fp32 where its config says force_upcast
    unet_dtype  of the UNet for now, where it is to be changed before it is cast; default that of the precision
    encoders    whether VAE and image encoder are wanted; their files must be there all the same, for they name the base
    raises      UserError naming the part that is missing, incomplete, of other channels or of another kind of diffusion
    """
    dtype = PRECISIONS[precision]
    places = _find_parts(model)
    scheduler, parameterization = read_scheduler(places["scheduler"])
    _check_places(places, model.variant)
    weights = {part: find_weights(places[part], model.variant) for part in WEIGHTED}
    vae, encoder = _read_encoders(places, model.variant, dtype, device) if encoders else (None, None)
    unet = load_unet(places["unet"], unet_dtype or dtype, model.variant).to(device)
    refuse_non_finite(unet, places["unet"])
    unet.requires_grad_(False).eval()
    settings_file = places["scheduler"] / "scheduler_config.json"
    read = {part: found.files for part, found in weights.items()} | {"scheduler": (settings_file,)}
    return Base(
        name=name_base(model),
        unet=unet,
        vae=vae,
        image_encoder=encoder,
        scheduler=scheduler,
        parameterization=parameterization,
        dtype=dtype,
        signature=sign_unet(unet),
        sources={part: name_source(files[0]) for part, files in read.items()},
        files=tuple(file for files in read.values() for file in files),
        vae_config=_complete(read_json(places["vae"] / "config.json")) if vae is None else vae.config,
    )


def find_encoder_files(model: ModelConfig) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """The files of a base's VAE and image encoder, weights and settings. Raises UserError as load_base does."""
    places = _find_encoders(model)
    for part in ENCODERS:
        read_json(places[part] / "config.json")
    vae, encoder = (
        (places[part] / "config.json", *find_weights(places[part], model.variant).files) for part in ENCODERS
    )
    return vae, encoder


def load_encoders(model: ModelConfig, device: torch.device, precision: str) -> tuple[Any, Any]:
    """Load the VAE and the image encoder alone, as load_base does."""
    return _read_encoders(_find_encoders(model), model.variant, PRECISIONS[precision], device)


def _find_encoders(model: ModelConfig) -> dict[str, Path]:
    base, _ = _resolve_names(model)
    folder = fetch(base, model.revision, ENCODERS, variant=model.variant)
    return {part: folder / part for part in ENCODERS}


def _read_encoders(
    places: dict[str, Path], variant: Literal["fp16"] | None, dtype: torch.dtype, device: torch.device
) -> tuple[Any, Any]:
    from diffusers import AutoencoderKLTemporalDecoder
    from transformers import CLIPVisionModelWithProjection

    own_dtype = vae_dtype(read_json(places["vae"] / "config.json"), dtype)
    vae = load_part(AutoencoderKLTemporalDecoder, places["vae"], variant, dtype=own_dtype).to(device)
    encoder = load_part(CLIPVisionModelWithProjection, places["image_encoder"], variant, dtype=dtype).to(device)
    if encoder.config.image_size != CLIP_SIZE_PX:
        raise UserError(
            f"{places['image_encoder']} reads pictures of {encoder.config.image_size} pixels; SVD's reads {CLIP_SIZE_PX}"
        )
    for part, network in zip(ENCODERS, (vae, encoder), strict=True):
        refuse_non_finite(network, places[part])
        network.requires_grad_(False).eval()
    return vae, encoder


# ---- identity: which base is this?

SIGNATURE_VALUES, CONV_IN_VALUES = 256, 16


def sign_unet(unet: nn.Module) -> list[float]:
    """Take 256 weights at fixed places, by which a UNet is known again in any precision; call before injecting adapters.

    One place in each of 240 evenly spaced matrices (more places, where there are fewer matrices), and 16 in conv_in,
    which Framer-style tuning moves. mask_token and conv_in's ninth column are left out, since SVD has neither.
    """
    matrices = {
        name: tensor for name, tensor in sorted(unet.state_dict().items()) if tensor.ndim > 1 and name != "mask_token"
    }
    conv_in = matrices.pop("conv_in.weight")[:, :8]
    others, places = list(matrices.values()), SIGNATURE_VALUES - CONV_IN_VALUES
    picks = [(others[i * len(others) // places], i, places) for i in range(places)]
    picks += [(conv_in, i, CONV_IN_VALUES) for i in range(CONV_IN_VALUES)]
    values = [tensor.flatten()[(2 * i + 1) * tensor.numel() // (2 * count)].item() for tensor, i, count in picks]
    return [float(f"{value:.6g}") for value in values]


def same_base(a: Sequence[float], b: Sequence[float]) -> bool:
    """Compare two signatures: equal up to rounding to fp16 and bf16, one after the other.

    Rounding twice moves a weight by at most one step of bf16, 2^-7 = 0.8 % of it; among 256 weights, even a short
    fine-tuning moves some by more than 1 %.
    """
    return len(a) == len(b) and all(abs(x - y) <= 1e-2 * max(abs(x), abs(y)) + 1e-6 for x, y in zip(a, b, strict=True))


def name_base(model: ModelConfig) -> str:
    """Where a base's UNet comes from: the hub id behind a short name, or the folder, file or id as it was given."""
    base, unet = _resolve_names(model)
    return unet or ("tiny" if model.base == "tiny" else base)  # a folder's place says nothing on another machine


# ---- what a base consists of


def read_scheduler(folder: Path) -> tuple[dict[str, Any], Literal["v", "epsilon"]]:
    """Read scheduler_config.json, completed with diffusers' defaults, and what it says of the UNet's raw output.

    source  diffusers EulerDiscreteScheduler: prediction_type, timestep_type, beta_schedule
    raises  UserError for any pair but SVD's v_prediction on continuous and epsilon on discrete timesteps, or other betas
    """
    from diffusers import EulerDiscreteScheduler

    given = read_json(folder / "scheduler_config.json")
    try:
        scheduler = EulerDiscreteScheduler.from_config({**given, "_class_name": "EulerDiscreteScheduler"})
    except (ImportError, NotImplementedError, TypeError, ValueError) as error:
        raise UserError(
            f"{folder} is no scheduler like SVD's: {error}; give a base with v_prediction or epsilon"
        ) from None
    settings = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
    prediction, timesteps = settings["prediction_type"], settings["timestep_type"]
    betas = settings["beta_schedule"]
    if betas != "scaled_linear" or settings["trained_betas"] is not None or settings["rescale_betas_zero_snr"]:
        raise UserError(
            f"{folder} has beta_schedule {betas}, or trained_betas or rescale_betas_zero_snr; only plain scaled_linear "
            "betas, SVD's, are supported"
        )
    kind = {("v_prediction", "continuous"): "v", ("epsilon", "discrete"): "epsilon"}.get((prediction, timesteps))
    if kind is None:
        raise UserError(
            f"{folder} has prediction_type {prediction} with timestep_type {timesteps}; supported are v_prediction with "
            "continuous timesteps, as SVD and Framer were trained, and epsilon with discrete ones"
        )
    # left out, they are the ends of the table of sigmas
    for name, place in (("sigma_max", 0), ("sigma_min", -2)):
        settings[name] = float(scheduler.sigmas[place]) if settings[name] is None else settings[name]
    return settings, kind  # type: ignore[return-value]


def read_parameterization(model: ModelConfig) -> Literal["v", "epsilon"]:
    """What a base's raw output means, from its scheduler alone, so that a recipe is refused before gigabytes are read."""
    base, _ = _resolve_names(model)
    if base in PUBLISHED_CONFIGS and not Path(base).exists():
        return "v"
    return read_scheduler(fetch(base, model.revision, ("scheduler",), configs_only=True) / "scheduler")[1]


def read_unet_config(place: Path) -> dict[str, Any]:
    """Read the configuration of a UNet folder, or infer that of a single file; refuses UNets of other channels."""
    config = read_json(place / "config.json") if place.is_dir() else _infer_unet_config(place)
    channels = config.get("in_channels", 8)  # diffusers' default
    if type(channels) is not int or channels not in (8, 9):
        raise UserError(f"{place} has in_channels {channels!r}; a base must read 9 (Framer) or 8 (SVD)")
    if type(layers := config.get("layers_per_block", 2)) is not int:
        raise UserError(f"{place} has layers_per_block {layers!r}; it must be one number, as SVD's is")
    return config


def _infer_unet_config(file: Path) -> dict[str, Any]:
    with open_weights(file) as tensors:
        names = tensors.keys()
        if any(name.startswith("model.diffusion_model.") for name in names):
            raise UserError(
                f"{file} is a checkpoint in Stability's original layout (model.diffusion_model...), which is not read; give "
                "the same model in diffusers layout, as --model.base svd-xt has it, or a UNet with diffusers' names"
            )
        if "conv_in.weight" not in names:
            raise UserError(f"{file} has no conv_in.weight, so it is no whole UNet with diffusers' names; give one")
        width, channels = tensors.get_slice("conv_in.weight").get_shape()[:2]
    if width == SVD_CONFIG["block_out_channels"][0]:
        return SVD_CONFIG | {"in_channels": channels}
    if (beside := file.with_name("config.json")).is_file():
        return read_json(beside)
    raise UserError(
        f"{file} is not of the size of SVD's UNet ({width} instead of 320 channels after conv_in); put its config.json "
        "beside it"
    )


def find_unet(model: ModelConfig) -> Path:
    """The folder or file of a base's UNet, for those who need no other part."""
    base, unet = _resolve_names(model)
    if unet is not None:
        return _find_unet(unet, model.unet_revision, model.variant)
    return fetch(base, model.revision, ("unet",), variant=model.variant) / "unet"


def load_unet(place: Path, dtype: torch.dtype, variant: Literal["fp16"] | None = None) -> FramerUNet:
    """Read a UNet folder or file as a 9-channel FramerUNet; an 8-channel SVD UNet is widened, its output unchanged."""
    config = read_unet_config(place)
    kind = _unet_class(config)
    unet = load_part(kind, place, variant, dtype=dtype) if place.is_dir() else load_file(kind, config, place, dtype)
    return unet if kind is FramerUNet else widen_conv_in(unet)


def _unet_class(config: dict[str, Any]) -> Any:
    from diffusers import UNetSpatioTemporalConditionModel

    return FramerUNet if config.get("in_channels", 8) == 9 else UNetSpatioTemporalConditionModel


def describe_unet(model: ModelConfig) -> dict[str, Any]:
    """The UNet's configuration before anything is widened, from the local files or as it was published."""
    base, unet = _resolve_names(model)
    source = unet or base
    if source in PUBLISHED_CONFIGS and not Path(source).exists():
        return PUBLISHED_CONFIGS[source]
    revision = model.unet_revision if unet else model.revision
    return read_unet_config(_find_unet(source, revision, None, configs_only=True))


def describe_encoders(model: ModelConfig) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The configurations of VAE and image encoder, from the local files or as they were published."""
    base, _ = _resolve_names(model)
    if base in PUBLISHED_CONFIGS and not Path(base).exists():
        return _complete(VAE_CONFIG), CLIP_CONFIG
    folder = fetch(base, model.revision, ENCODERS, configs_only=True)
    return _complete(read_json(folder / "vae/config.json")), read_json(folder / "image_encoder/config.json")


def _complete(vae: dict[str, Any]) -> Mapping[str, Any]:
    """A VAE's configuration with diffusers' defaults."""
    from diffusers import AutoencoderKLTemporalDecoder

    config: Mapping[str, Any] = build_on_meta(AutoencoderKLTemporalDecoder, vae).config
    return config


def vae_dtype(vae: Mapping[str, Any], dtype: torch.dtype) -> torch.dtype:
    """What a VAE of this configuration computes in, beside a network in dtype."""
    return torch.float32 if vae.get("force_upcast", True) else dtype  # diffusers' default


def latent_px(vae: Mapping[str, Any]) -> int:
    """Pixels to a latent, along a side, by a VAE's configuration."""
    return int(2 ** (len(vae["block_out_channels"]) - 1))


def check_weights(model: ModelConfig) -> list[str]:
    """Look the files of a base over without reading their tensors; returns the sources that are not on this machine.

    raises  UserError as load_base does where a part is missing, cut, pickled, or not the whole network
    """
    base, unet = _resolve_names(model)
    away = [source for source in (base, unet) if source is not None and not Path(source).exists()]
    places: dict[str, Path] = {}
    if base not in away:
        parts = PARTS if unet is None else PARTS[1:]
        folder = fetch(base, model.revision, parts)
        places = {part: folder / part for part in parts}
        read_scheduler(places["scheduler"])
    if unet is not None and unet not in away:
        places["unet"] = find_unet(model)
    _check_places(places, model.variant)
    return away


def _check_places(places: dict[str, Path], variant: Literal["fp16"] | None) -> None:
    """Compare the names in the headers of a base's weights with what its networks need, as reading would, but at once."""
    for part in [part for part in WEIGHTED if part in places]:
        place = places[part]
        names = {n for file in find_weights(place, variant).files for n in open_weights(file).keys()}  # noqa: SIM118
        if part == "unet":
            config = read_unet_config(place)
            kind = _unet_class(config)
            wanted = build_on_meta(kind, config).state_dict().keys()
            refuse_faults(place, kind, wanted - names, names - wanted)


def build_unet_on_meta(model: ModelConfig) -> FramerUNet:
    """Build the UNet without weights, to count and inspect."""
    return build_on_meta(FramerUNet, {**describe_unet(model), "in_channels": 9})


def _resolve_names(model: ModelConfig) -> tuple[str, str | None]:
    base, unet = NAMED_BASES.get(model.base, (model.base, None))
    unet = model.unet or unet
    if model.unet_revision and unet is None:
        raise UserError(
            f"model.unet_revision {model.unet_revision} is given without model.unet; leave it out, or use model.revision"
        )
    return base, unet


def _find_parts(model: ModelConfig) -> dict[str, Path]:
    base, unet = _resolve_names(model)
    folder = fetch(base, model.revision, PARTS if unet is None else PARTS[1:], variant=model.variant)
    places = {part: folder / part for part in PARTS}
    return places if unet is None else places | {"unet": find_unet(model)}


def _find_unet(source: str, revision: str | None, variant: Literal["fp16"] | None, configs_only: bool = False) -> Path:
    """Find a UNet's folder or single file, wherever users have it: in a pipeline folder, alone, or on the hub."""
    place = Path(source)
    if place.is_file():
        refuse_local_revision(place, revision)
        if place.suffix != ".safetensors":
            raise UserError(f"{source} is no .safetensors file; other formats are not read, because they can run code")
        return place
    if (place / "config.json").is_file() and not (place / "unet").is_dir():
        refuse_local_revision(place, revision)
        return place
    return fetch(source, revision, ("unet",), configs_only, variant) / "unet"
