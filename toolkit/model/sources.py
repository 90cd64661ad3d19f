"""Finds a base's folders and files, on this machine or on the hub, and opens weights without reading them.

Test: pytest tests/model/test_base.py. Only JSON and safetensors are ever fetched or opened.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from safetensors import SafetensorError, safe_open

from toolkit.errors import UserError, in_one_line

WEIGHTED = ("unet", "vae", "image_encoder")
PARTS = (*WEIGHTED, "scheduler")
# comes with the toolkit; its README tells how it was made
TINY_FOLDER = Path(__file__).resolve().parents[1] / "bases/tiny"
# name -> hub ids of the base, or its folder, and of the UNet that replaces its own
NAMED_BASES: dict[str, tuple[str, str | None]] = {
    "framer": ("stabilityai/stable-video-diffusion-img2vid-xt", "wwen1997/framer_512x320"),
    "svd": ("stabilityai/stable-video-diffusion-img2vid", None),
    "svd-xt": ("stabilityai/stable-video-diffusion-img2vid-xt", None),
    "tiny": (str(TINY_FOLDER), None),
}
STEMS = ("diffusion_pytorch_model", "model")  # how diffusers and transformers call a part's weights
PICKLES = (".bin", ".ckpt", ".pt", ".pth")


class Weights(NamedTuple):
    """The files that hold one part's weights, and the variant that they are."""

    files: tuple[Path, ...]
    variant: Literal["fp16"] | None


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
        if not is_hub_id(source):
            raise UserError(
                f"no base model at {source}: give {', '.join(NAMED_BASES)}, a folder in diffusers layout, or a hub id "
                "owner/name"
            )
        folder = _download(source, revision, parts, configs_only, variant)
    missing = [part for part in parts if not (folder / part).is_dir()]
    if missing:
        hint = "; a UNet alone is given as model.unet, with svd-xt as model.base" if "unet" not in missing else ""
        raise UserError(f"{source} lacks {', '.join(missing)}; a base in SVD layout holds {', '.join(PARTS)}{hint}")
    return folder


def fetch_top(source: str, revision: str | None) -> Path:
    """Download the JSON and safetensors files at the top of a hub repository: an adapter, or what an export tells of itself.

    returns  the folder
    raises   UserError naming the source where there is nothing to be had
    """
    return _snapshot(source, revision, ["*.json", "*.safetensors"], ignored=["*/*"])  # a whole base may lie below


def is_hub_id(source: str) -> bool:
    """Whether a source can only be meant for the hub: owner/name, and nothing of that name is here."""
    return not source.startswith((".", "/", "~")) and source.count("/") == 1 and not Path(source).exists()


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
                shards = read_json(index).get("weight_map")
                if not isinstance(shards, dict) or not shards:
                    raise UserError(f"{index} lists no weights; copy or fetch it again")
                files = [folder / name for name in sorted(set(shards.values()))]
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


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise ValueError("it holds no object of settings")
        return content
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}; a base in SVD layout has it") from None


def refuse_local_revision(place: Path, revision: str | None) -> None:
    if revision and place.exists():
        raise UserError(f"revision {revision} is given for {place}, which is local and has none; leave it out")


def name_source(path: Path) -> str:
    """Name a file for reports: a file of the hub's cache as owner/name@commit/file, any other by its path."""
    cached = re.search(r"models--([^/]+?)--([^/]+)/snapshots/([^/]+)/(.+)$", path.as_posix())
    return "{}/{}@{}/{}".format(*cached.groups()) if cached else str(path)


def fingerprint_files(files: Iterable[Path]) -> str:
    """Hash the content of files in their order, for exact resuming: sha256 hex, first 16 digits; seconds per gigabyte."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]


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


def _snapshot(source: str, revision: str | None, patterns: list[str], ignored: list[str] | None = None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=patterns, ignore_patterns=ignored))
    except Exception as error:
        raise UserError(
            f"cannot get {source} from the hub: {in_one_line(error)}; check the name, the revision and the network; "
            "if it is gated, as SVD-XT may be, accept its licence on its page and log in with a token (hf auth login); or "
            "download it elsewhere and give the folder"
        ) from None
