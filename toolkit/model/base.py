"""Loads the frozen base: UNet, VAE, CLIP image encoder and scheduler settings, by name, from folders, hub ids or one file.

Test: pytest tests/model. Only safetensors are read. Nothing here trains; see lora.py for what does. Each part is found and
checked before the first is read, because reading takes minutes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from toolkit.config import ModelConfig
from toolkit.errors import UserError, in_one_line
from toolkit.model.encoders import CLIP_SIZE_PX
from toolkit.model.quiet import quiet_libraries
from toolkit.model.unet import PUBLISHED_CONFIGS, SVD_CONFIG, FramerUNet, widen_conv_in

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}  # fp16 for inference only
WEIGHTED = ("unet", "vae", "image_encoder")
PARTS = (*WEIGHTED, "scheduler")
# name -> hub ids of the base and of the UNet that replaces its own; "tiny" is a folder (toolkit/run/pretrain.py)
NAMED_BASES: dict[str, tuple[str, str | None]] = {
    "framer": ("stabilityai/stable-video-diffusion-img2vid-xt", "wwen1997/framer_512x320"),
    "svd": ("stabilityai/stable-video-diffusion-img2vid", None),
    "svd-xt": ("stabilityai/stable-video-diffusion-img2vid-xt", None),
}
STEMS = ("diffusion_pytorch_model", "model")  # how diffusers and transformers call a part's weights
PICKLES = (".bin", ".ckpt", ".pt", ".pth")


class Weights(NamedTuple):
    """The files that hold one part's weights, and the variant that they are."""

    files: tuple[Path, ...]
    variant: Literal["fp16"] | None


@dataclass(frozen=True)
class Base:
    """A loaded base model, all parts frozen and in eval mode."""

    name: str  # where the UNet came from: its folder, file or hub id
    unet: FramerUNet
    vae: Any  # diffusers AutoencoderKLTemporalDecoder
    image_encoder: Any  # transformers CLIPVisionModelWithProjection
    scheduler: dict[str, Any]  # scheduler_config.json with diffusers' defaults: betas, sigma_min, sigma_max, ...
    parameterization: Literal["v", "epsilon"]  # what the UNet's raw output means
    dtype: torch.dtype  # of UNet and CLIP; the VAE may stay in fp32
    signature: list[float]  # sign_unet, before any adapter: which base an adapter belongs to
    sources: dict[str, str]  # part -> file it was read from; owner/name@commit/file for a hub snapshot
    files: tuple[Path, ...]  # everything that was read, for fingerprint_files


def load_base(model: ModelConfig, device: torch.device, precision: str) -> Base:
    """Load every part onto the device.

    model      base, unet, their revisions and the variant to read; other fields have no say
    precision  of PRECISIONS; the VAE stays in fp32 where its config says force_upcast
    raises     UserError naming the part that is missing, incomplete, of other channels or of another kind of diffusion
    """
    from diffusers import AutoencoderKLTemporalDecoder
    from transformers import CLIPVisionModelWithProjection

    dtype = PRECISIONS[precision]
    places = _find_parts(model)
    scheduler, parameterization = read_scheduler(places["scheduler"])
    read_unet_config(places["unet"])
    weights = {part: find_weights(places[part], model.variant) for part in WEIGHTED}

    upcast = _read_json(places["vae"] / "config.json").get("force_upcast", True)  # diffusers' default
    vae_dtype = torch.float32 if upcast else dtype
    vae = load_part(AutoencoderKLTemporalDecoder, places["vae"], model.variant, dtype=vae_dtype).to(device)
    encoder = load_part(CLIPVisionModelWithProjection, places["image_encoder"], model.variant, dtype=dtype).to(device)
    unet = load_unet(places["unet"], dtype, model.variant).to(device)
    if encoder.config.image_size != CLIP_SIZE_PX:
        raise UserError(
            f"{places['image_encoder']} reads pictures of {encoder.config.image_size} pixels; SVD's reads {CLIP_SIZE_PX}"
        )
    for part, network in zip(WEIGHTED, (unet, vae, encoder), strict=True):
        _refuse_non_finite(network, places[part])
        network.requires_grad_(False).eval()
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
    )


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


def fingerprint_files(files: Iterable[Path]) -> str:
    """Hash the content of files in their order, for exact resuming: sha256 hex, first 16 digits; seconds per gigabyte."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]


def name_base(model: ModelConfig) -> str:
    """Where a base's UNet comes from: the hub id behind a short name, or the folder, file or id as it was given."""
    base, unet = _resolve_names(model)
    return unet or base


def name_source(path: Path) -> str:
    """Name a file for reports: a file of the hub's cache as owner/name@commit/file, any other by its path."""
    cached = re.search(r"models--([^/]+?)--([^/]+)/snapshots/([^/]+)/(.+)$", path.as_posix())
    return "{}/{}@{}/{}".format(*cached.groups()) if cached else str(path)


# ---- what a base consists of


def read_scheduler(folder: Path) -> tuple[dict[str, Any], Literal["v", "epsilon"]]:
    """Read scheduler_config.json, completed with diffusers' defaults, and what it says of the UNet's raw output.

    source  diffusers EulerDiscreteScheduler: prediction_type, timestep_type, beta_schedule
    raises  UserError for any pair but SVD's v_prediction on continuous and epsilon on discrete timesteps, or other betas
    """
    from diffusers import EulerDiscreteScheduler

    given = _read_json(folder / "scheduler_config.json")
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
    config = _read_json(place / "config.json") if place.is_dir() else _infer_unet_config(place)
    channels = config.get("in_channels", 8)  # diffusers' default
    if type(channels) is not int or channels not in (8, 9):
        raise UserError(f"{place} has in_channels {channels!r}; a base must read 9 (Framer) or 8 (SVD)")
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
        return _read_json(beside)
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


def check_weights(model: ModelConfig) -> bool:
    """Look the files of a base over without reading their tensors; False where a hub has them, and nothing is checked.

    raises  UserError as load_base does where a part is missing, cut, pickled, or is not the whole UNet
    """
    base, unet = _resolve_names(model)
    if not all(Path(source).exists() for source in (base, unet) if source is not None):
        return False
    places = _find_parts(model)
    read_scheduler(places["scheduler"])
    for part in WEIGHTED:
        files = find_weights(places[part], model.variant).files
        names = {name for file in files for name in open_weights(file).keys()}  # noqa: SIM118
        if part == "unet":
            config = read_unet_config(places[part])
            kind = _unet_class(config)
            wanted = _build_on_meta(kind, config).state_dict().keys()
            _refuse_faults(places[part], kind, wanted - names, names - wanted)
    return True


def build_unet_on_meta(model: ModelConfig) -> FramerUNet:
    """Build the UNet without weights, to count and inspect."""
    return _build_on_meta(FramerUNet, {**describe_unet(model), "in_channels": 9})


# ---- reading weights


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
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"cannot load {folder} as a {kind.__name__}: {in_one_line(error)}") from None
    _refuse_shapes(folder, kind, {name: (given, wanted) for name, given, wanted in report["mismatched_keys"]})
    _refuse_faults(folder, kind, report["missing_keys"], report["unexpected_keys"])
    return network


def load_file(kind: Any, config: dict[str, Any], file: Path, dtype: torch.dtype) -> Any:
    """Load one diffusers network from a single safetensors file, as strictly as load_part."""
    network = _build_on_meta(kind, config)
    wanted = {name: list(tensor.shape) for name, tensor in network.state_dict().items()}
    with open_weights(file) as tensors:
        names = tensors.keys()
        given = {name: tensors.get_slice(name).get_shape() for name in names}
        _refuse_faults(file, kind, wanted.keys() - given.keys(), given.keys() - wanted.keys())
        _refuse_shapes(file, kind, {n: (given[n], wanted[n]) for n in wanted if wanted[n] != given[n]})
        # copied, because what is read is a view of the file, and the file may change
        weights = {name: tensors.get_tensor(name).to(dtype, copy=True) for name in names}
    network.load_state_dict(weights, assign=True)
    return network


def find_weights(folder: Path, variant: Literal["fp16"] | None) -> Weights:
    """List the files that hold a part's weights: the wanted variant, else what there is.

    folder  or the one file that holds them all
    raises  UserError naming shards that are missing, or the pickles that stand there instead
    """
    if folder.is_file():
        return Weights((folder,), None)
    for tag in dict.fromkeys((variant, None, "fp16")):
        suffix = f".{tag}" if tag else ""
        for stem in STEMS:
            whole, index = folder / f"{stem}{suffix}.safetensors", folder / f"{stem}.safetensors.index{suffix}.json"
            if index.is_file():
                files = [folder / name for name in sorted(set(_read_json(index).get("weight_map", {}).values()))]
                if lost := [file.name for file in files if not file.is_file()]:
                    raise UserError(
                        f"{folder} lacks {', '.join(lost[:3])}, which {index.name} lists; copy or fetch it again"
                    )
                return Weights(tuple(files), tag)
            if whole.is_file():
                return Weights((whole,), tag)
    pickles = sorted(file.name for file in folder.glob("*") if file.suffix in PICKLES)
    held = (
        f"only {', '.join(pickles[:3])}: pickles, which are not read, because they can run code" if pickles else "none"
    )
    raise UserError(
        f"{folder} must hold its weights as {STEMS[0]}.safetensors or {STEMS[1]}.safetensors; it holds {held}"
    )


def open_weights(file: Path) -> Any:
    """Open a safetensors file without reading its tensors; refuses one that is damaged."""
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot read {file}: {error}; it is cut, damaged or no safetensors file, so copy or fetch it again"
        ) from None


def _refuse_faults(place: Path, kind: Any, missing: Iterable[str], unexpected: Iterable[str]) -> None:
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


def _refuse_non_finite(network: nn.Module, place: Path) -> None:
    for name, parameter in network.named_parameters():
        if not parameter.isfinite().all():
            raise UserError(f"{place} holds NaN or infinity in {name}; it is damaged, so copy or fetch it again")


def _build_on_meta(kind: Any, config: dict[str, Any]) -> Any:
    with torch.device("meta"):
        # .to("meta") once more: AlphaBlender's mix_factor ignores the device context
        return kind.from_config(config).to("meta")


# ---- finding folders and files


def fetch(
    source: str,
    revision: str | None,
    parts: tuple[str, ...],
    configs_only: bool = False,
    variant: Literal["fp16"] | None = None,
) -> Path:
    """Find a local folder, or download the wanted parts of a hub repository (JSON and safetensors only)."""
    folder = Path(source)
    refuse_local_revision(folder, revision)
    if not folder.exists():
        if source.startswith((".", "/", "~")) or source.count("/") != 1:
            raise UserError(
                f"no base model at {source}: give {', '.join(NAMED_BASES)} or tiny, a folder in diffusers layout, or a "
                "hub id owner/name"
            )
        folder = _download(source, revision, parts, configs_only, variant)
    missing = [part for part in parts if not (folder / part).is_dir()]
    if missing:
        hint = "; a UNet alone is given as model.unet, with svd-xt as model.base" if "unet" not in missing else ""
        raise UserError(f"{source} lacks {', '.join(missing)}; a base in SVD layout holds {', '.join(PARTS)}{hint}")
    return folder


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


def refuse_local_revision(place: Path, revision: str | None) -> None:
    if revision and place.exists():
        raise UserError(f"revision {revision} is given for {place}, which is local and has none; leave it out")


def _download(
    source: str, revision: str | None, parts: Sequence[str], configs_only: bool, variant: Literal["fp16"] | None
) -> Path:
    """Fetch JSON and the wanted variant's weights; then, for parts that have none of it, the other's."""
    weights = [] if configs_only else [pattern for part in parts for pattern in _weight_patterns(part, variant)]
    folder = _snapshot(source, revision, [f"{part}/*.json" for part in parts] + weights)
    bare = [
        part for part in parts if (folder / part / "config.json").is_file() and not _has_weights(folder / part, variant)
    ]
    if bare and not configs_only:
        other = None if variant else "fp16"
        # the same commit, so that both land in one folder
        _snapshot(source, folder.name, [pattern for part in bare for pattern in _weight_patterns(part, other)])
    return folder


def _weight_patterns(part: str, variant: str | None) -> list[str]:
    suffix = f".{variant}" if variant else ""
    return [f"{part}/{stem}{suffix}{shard}.safetensors" for stem in STEMS for shard in ("", "-*-of-?????")]


def _has_weights(folder: Path, variant: Literal["fp16"] | None) -> bool:
    try:
        return bool(find_weights(folder, variant))
    except UserError:
        return False


def _snapshot(source: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
    except Exception as error:
        raise UserError(
            f"cannot get {source} from the hub: {in_one_line(error)}; check the name, the revision and the network; "
            "if it is gated, as SVD-XT may be, accept its licence on its page and log in with a token (hf auth login); or "
            "download it elsewhere and give the folder"
        ) from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise ValueError("it holds no object of settings")
        return content
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}; a base in SVD layout has it") from None
