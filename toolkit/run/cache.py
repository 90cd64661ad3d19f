"""Encodes the training clips of a folder once: videos -> the VAE's posteriors and CLIP's tokens, shard for shard.

Test: pytest tests/run/test_cache.py

Every frame of a clip is kept, so a run draws its windows from cached shards exactly as from the videos. Each clip is one
file of OUT/.caching until all are there, so the work can be cut among ranks and machines, and killed and gone on with; the
last one to finish joins the files to shards. Clip i of a cached shard is clip i of its source: the order stays.
"""

from __future__ import annotations

import os
import shutil
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from toolkit.config import ModelConfig, RunConfig
from toolkit.data.clips import ClipSettings, Crop, decode_frames, draw_crop
from toolkit.data.files import add_member, link_or_copy, local_folder, refuse_files_above, written_aside
from toolkit.data.format import MEMBER_BYTES, BadSample, build_index, is_whole, load_index, write_index
from toolkit.data.index import CACHING, JOINING, DatasetIndex, open_shards
from toolkit.data.latents import CACHE_FILE, CacheInfo, pack_latents, read_cache_info
from toolkit.engine.world import World, init_world
from toolkit.errors import UserError
from toolkit.model.base import PRECISIONS, find_encoder_files, load_encoders
from toolkit.model.encoders import embed_stills, encode_frames
from toolkit.model.sources import fingerprint_files
from toolkit.parallel import parse_part
from toolkit.run.framer import to_signed


def cache_shards(
    shards: str,
    base: str,
    out: str | None = None,
    height: int = 576,
    width: int = 576,
    variants: int = 1,
    flip: bool = False,
    random_crop: float = 0.0,
    precision: Literal["bf16", "fp32"] = "bf16",
    part: str = "1/1",
    revision: str | None = None,
    variant: Literal["fp16"] | None = None,
) -> str:
    """Encode this rank's and part's share of the training clips, and join all of them when they are complete.

    returns  what was done, for people
    raises   UserError for options that make no sense, or an `out` that holds something else
    """
    source, given = local_folder(shards), local_folder(out) if out is not None else None
    number, parts = parse_part(part)
    check_options(height, width, variants, flip, random_crop)
    index = open_shards(source, "train")
    if index.cached:
        raise UserError(f"{source} is a cache already; give the folder of the videos' shards")
    refuse_bulk(index, height, width, variants, precision)
    world = init_world()
    world.close()  # from here on no rank waits for another: what is done is on the disk
    model = ModelConfig(base=base, revision=revision, variant=variant)
    vae, image_encoder = (fingerprint_files(files) for files in find_encoder_files(model))
    info = CacheInfo(
        base=base, vae=vae, image_encoder=image_encoder, source=str(source),
        source_fingerprint=index.fingerprint, height=height, width=width, variants=variants, flip=flip,
        random_crop=random_crop, precision=precision,
    )  # fmt: skip
    place = source if source.name not in ("", "..") else source.resolve()
    folder = given or place.with_name(f"{place.name}-{height}x{width}-{info.key}")
    refuse_files_above(folder)
    if is_complete(folder, index, info, source):
        return _tell_complete(folder)
    staging = open_staging(folder, info)
    share = range((number - 1) * world.size + world.rank, len(index), parts * world.size)
    if world.is_main:
        print(f"{len(index):,} clips, {len(share):,} of them here, to {folder}; the same command resumes", flush=True)
    if staging.name == CACHING:
        encode_share(index, share, info, model, staging, world)
    done = join_clips(index, info, folder, source)
    return done or f"rank {world.rank} of part {part} is done; whoever ends last joins all clips to shards"


def check_options(height: int, width: int, variants: int, flip: bool, random_crop: float) -> None:
    """Refuse what no training run could use."""
    if height % 8 or width % 8 or not 16 <= height <= 2048 or not 16 <= width <= 2048:
        raise UserError(f"height x width is {height}x{width}; both must be multiples of 8 from 16 to 2048")
    if not 0 <= random_crop <= 0.5:
        raise UserError(f"random_crop is {random_crop}; it must be a share from 0 to 0.5")
    if not 1 <= variants <= 64 or (variants > 1) != (flip or random_crop > 0):
        raise UserError(
            f"variants is {variants}; give 2 to 64 with flip or random_crop, which tell them apart, and 1 without"
        )


def refuse_bulk(index: DatasetIndex, height: int, width: int, variants: int, precision: str) -> None:
    """Refuse a clip whose latents would be larger than a member of a shard may be."""
    frame_bytes = (2 * 4 * (height // 8) * (width // 8) + 1024) * PRECISIONS[precision].itemsize
    longest = max(index.rows, key=lambda row: row.clip.frames)
    most = MEMBER_BYTES["safetensors"] // (frame_bytes * longest.clip.frames)
    if variants > most:
        remedy = f"give --variants {most} at most" if most else "pack shorter clips"
        raise UserError(f"{variants} variants of {longest.key}, {longest.clip.frames} frames, are too large; {remedy}")


def is_complete(folder: Path, index: DatasetIndex, info: CacheInfo, source: Path) -> bool:
    """Whether a folder is this very cache, joined and tidied up. Raises UserError where a shard of it is not whole."""
    found = read_cache_info(folder)
    if found is None or found.key != info.key or (folder / JOINING).exists():
        return False
    for tar in (*(tar for tar, _ in _by_shard(index)), *_held_out(source)):
        if not is_whole(folder / tar.name):
            raise UserError(
                f"this cache was finished in {folder}, but {tar.name} or its index is gone or was changed since; restore "
                f"it, or delete {folder} to make the cache anew"
            )
    shutil.rmtree(folder / CACHING, ignore_errors=True)  # of a process that came too late
    return True


def _tell_complete(folder: Path) -> str:
    return f"{folder} is complete; train on it with --data.shards {folder}"


def open_staging(folder: Path, info: CacheInfo) -> Path:
    """Make or find the folder of single clips. Raises UserError if `folder` holds anything but this very cache."""
    if not (folder / JOINING).exists():
        # other ranks and parts may be making theirs at this moment
        if folder.exists() and any(not path.name.startswith(CACHING) for path in folder.iterdir()):
            raise UserError(f"{folder} holds something else; give another --out, or delete it")
        aside = folder / f"{CACHING}.{os.urandom(8).hex()}"
        aside.mkdir(parents=True)
        (aside / CACHE_FILE).write_text(info.model_dump_json(indent=1))
        try:
            aside.rename(folder / CACHING)
        except OSError:  # it is there already, and not empty
            shutil.rmtree(aside)
    staging = folder / (JOINING if (folder / JOINING).exists() else CACHING)
    found = read_cache_info(staging)
    if found is not None and found.key != info.key:
        raise UserError(f"{folder} was begun with other settings or videos; give another --out, or delete it")
    return staging


def encode_share(
    index: DatasetIndex, share: range, info: CacheInfo, model: ModelConfig, staging: Path, world: World
) -> None:
    """Encode each clip of a share that has no file yet."""
    missing = [sample for sample in share if not any(path.exists() for path in clip_files(staging, sample))]
    if not missing:
        return
    vae, image_encoder = load_encoders(model, world.device, info.precision)
    for sample in tqdm(missing, unit="clip", desc="encode", disable=None if world.is_main else True):
        path, bad = clip_files(staging, sample)
        try:
            data = encode_clip(index, sample, info, vae, image_encoder, world.device)
        except BadSample as error:
            if isinstance(error.__cause__, OSError):  # the disk is at fault, not the clip
                raise UserError(
                    f"{index.shards[sample]}: {error}; the same command goes on when it can be read"
                ) from None
            print(f"{index.shards[sample].name}: {error}", file=sys.stderr)
            path, data = bad, str(error).encode()
        with written_aside(path) as file:
            file.write(data)


def clip_files(staging: Path, sample: int) -> tuple[Path, Path]:
    """Where a clip's latents are kept, or the reason why there are none."""
    return staging / f"{sample:08d}.safetensors", staging / f"{sample:08d}.bad"


@torch.no_grad()
def encode_clip(
    index: DatasetIndex, sample: int, info: CacheInfo, vae: object, image_encoder: object, device: torch.device
) -> bytes:
    """Decode and encode all frames of all variants of a clip. Raises BadSample if the video cannot be read."""
    settings = ClipSettings(1, info.height, info.width, flip=info.flip, random_crop=info.random_crop)
    dtype, purpose = PRECISIONS[info.precision], f"cache/{index.rows[sample].key}"
    variants = []
    for variant in range(info.variants):
        crop = draw_crop(settings, 0, variant, purpose) if variant else Crop()
        # as many as the sidecar says: a run on the videos draws its windows from those
        frames_THWC = decode_frames(index, sample, range(index.rows[sample].clip.frames), settings, crop)
        rows = []
        for frame_HWC in torch.from_numpy(frames_THWC):
            # one at a time, as training encodes them: batched kernels round differently
            frame_11CHW = to_signed(frame_HWC[None, None].to(device))
            mean, std = encode_frames(vae, frame_11CHW)
            rows.append([part[0, 0].to("cpu", dtype) for part in (mean, std, embed_stills(image_encoder, frame_11CHW))])
        variants.append([torch.stack(part) for part in zip(*rows, strict=True)])
    mean_VTCHW, std_VTCHW, tokens_VTD = (torch.stack(part) for part in zip(*variants, strict=True))
    return pack_latents(mean_VTCHW, std_VTCHW, tokens_VTD)


def join_clips(index: DatasetIndex, info: CacheInfo, folder: Path, source: Path) -> str | None:
    """Join the clips' files to shards, if all are there; several processes may do it at once, and write the same bytes.

    returns  what came out; None where clips are missing
    """
    staging, claimed = folder / CACHING, folder / JOINING
    try:
        if not claimed.exists():
            there = {int(path.stem) for path in staging.iterdir() if path.suffix in (".safetensors", ".bad")}
            if len(there) < len(index):
                return None
            staging.rename(claimed)
    except OSError:  # somebody else renamed it
        pass
    try:
        return _join(index, info, folder, source)
    except FileNotFoundError:  # somebody else ended it, and takes the clips away, or was killed while at it
        found = read_cache_info(folder)
        if found is None or found.key != info.key:
            raise
        shutil.rmtree(claimed, ignore_errors=True)
        return _tell_complete(folder)


def _join(index: DatasetIndex, info: CacheInfo, folder: Path, source: Path) -> str:
    claimed = folder / JOINING
    bad_clips = size_bytes = 0
    for tar, samples in _by_shard(index):
        target = folder / tar.name
        with written_aside(target) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
            for sample in samples:
                row = index.rows[sample]
                path, bad = clip_files(claimed, sample)
                if bad.exists():
                    bad_clips += 1
                else:
                    add_member(archive, f"{row.key}.safetensors", path.read_bytes())
                clip = row.clip.model_copy(update={"height": info.height, "width": info.width})
                add_member(archive, f"{row.key}.json", clip.model_dump_json(exclude_none=True).encode())
        write_index(target, build_index(target))
        size_bytes += target.stat().st_size
    for tar in _held_out(source):
        index_of_tar = load_index(tar)  # which has no file where the videos' folder is read-only
        link_or_copy(tar, folder / tar.name)
        write_index(folder / tar.name, index_of_tar)
    with written_aside(folder / CACHE_FILE) as file:  # others may be writing it too
        file.write(info.model_dump_json(indent=1).encode())
    shutil.rmtree(claimed, ignore_errors=True)
    return (
        f"{len(index) - bad_clips:,} clips, {info.variants} variants, {size_bytes / 1e9:.2f} GB, {bad_clips} that do not "
        f"decode, in {folder}\nnext: train on it with --data.shards {folder}"
    )


def check_cache(config: RunConfig) -> None:
    """Refuse a recipe that the cached latents of its sources cannot serve."""
    vae, image_encoder = (fingerprint_files(files) for files in find_encoder_files(config.model))
    for folder in map(Path, config.data.sources):
        info = read_cache_info(folder)
        if info is None:
            raise UserError(
                f"{folder} holds latents without {CACHE_FILE}; make the cache again: python shards/cache.py"
            )
        _refuse_pixel_settings(config, folder, info)
        data = config.data
        wanted = {"data.height": data.height, "data.width": data.width, "VAE": vae, "image encoder": image_encoder}
        found = {
            "data.height": info.height,
            "data.width": info.width,
            "VAE": info.vae,
            "image encoder": info.image_encoder,
        }
        if data.flip or data.random_crop:  # else a cache with more variants serves as well: the plain one is used
            wanted |= {"data.flip": data.flip, "data.random_crop": data.random_crop}
            found |= {"data.flip": info.flip, "data.random_crop": info.random_crop}
        rows = [f"{name} is {wanted[name]}, was {found[name]}" for name in wanted if wanted[name] != found[name]]
        if rows:
            raise UserError(
                f"{folder} was cached otherwise ({'; '.join(rows)}); change the recipe, or cache again: "
                f"{_command(config, info)}"
            )


def _refuse_pixel_settings(config: RunConfig, folder: Path, info: CacheInfo) -> None:
    for name, wanted, why in (
        ("diffusion.control", config.diffusion.control, "looks for trajectories in the pictures"),
        ("diffusion.noise_augmentation", config.diffusion.noise_augmentation > 0, "adds noise to the pictures"),
    ):
        if wanted:
            raise UserError(f"{name} {why}, but {folder} holds latents; switch it off, or train on {info.source}")


def _command(config: RunConfig, info: CacheInfo) -> str:
    data = config.data
    variants = f" --variants {max(2, info.variants)}" if data.flip or data.random_crop else ""
    flip = " --flip" if data.flip else ""
    crop = f" --random_crop {data.random_crop}" if data.random_crop else ""
    model = config.model
    files = "".join(f" --{name} {value}" for name in ("revision", "variant") if (value := getattr(model, name)))
    return (
        f"python shards/cache.py {info.source} --base {model.base}{files} --height {data.height} --width {data.width}"
        f"{variants}{flip}{crop}"
    )


def _held_out(source: Path) -> list[Path]:
    """The shards that go along as they are, since evaluation compares pictures."""
    return sorted(source.glob("val-*.tar"))


def _by_shard(index: DatasetIndex) -> Iterator[tuple[Path, range]]:
    start = 0
    for size in index.shard_sizes:
        yield Path(str(index.shards[start])), range(start, start + size)
        start += size
