"""The shards of a recipe's sources as one list of samples, read by offset.

Test: pytest tests/data/test_index.py

The split is in the shards' names: `val` reads val-*.tar, `train` every other tar of a source.
"""

import functools
import hashlib
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from toolkit.config import DataConfig
from toolkit.data.disk_cache import DiskCache
from toolkit.data.files import refuse_irregular
from toolkit.data.format import SampleRow, ShardIndex, fingerprint, index_path, indexed_tars, load_index, read_member
from toolkit.data.order import MixedOrder, Order, Source
from toolkit.data.remote import RemoteShard, Shard, find_shards, is_remote
from toolkit.errors import UserError

Split = Literal["train", "val"]
# What stands in a folder while it is being written, and who finishes it.
PACKING, PUBLISHING, CACHING, JOINING = ".packing", ".publishing", ".caching", ".joining"
UNFINISHED = {
    PACKING: "shards/pack.py",
    PUBLISHING: "shards/pack.py",
    CACHING: "shards/cache.py",
    JOINING: "shards/cache.py",
}
CHOICE_VERSION = 1  # bump when DatasetIndex.choose would give other clips
_AT_ONCE = 16  # remote indexes fetched together


@dataclass(frozen=True)
class DatasetIndex:
    """The samples of one split, source after source: sample i of the dataset is rows[i], in the tar shards[i]."""

    shards: tuple[Shard, ...]
    rows: tuple[SampleRow, ...]
    sources: tuple[Source, ...]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shard_sizes(self) -> tuple[int, ...]:
        """Samples of each shard."""
        return tuple(size for source in self.sources for size in source.shard_sizes)

    @functools.cached_property
    def cached(self) -> bool:
        """Whether the samples are latents (shards/cache.py), not videos."""
        return any(row.latents is not None for row in self.rows)

    def order(self, seed: int) -> Order | MixedOrder:
        """The order in which a run of that seed walks through the samples."""
        if len(self.sources) == 1:
            return Order(self.shard_sizes, seed)
        return MixedOrder(self.sources, seed)

    def choose(self, least_frames: int, clips: int) -> list[int]:
        """Choose some samples to be looked at, in their order, and put all other usable ones behind them as spares.

        As many of each source as of the others, and of each video, as far as they reach; of a video evenly. For the first
        ones of a split would all be of one recording where these are long.

        least_frames  that a usable sample has
        """
        owners = (owner for owner, source in enumerate(self.sources) for _ in range(sum(source.shard_sizes)))
        videos: dict[tuple[int, str], list[int]] = {}
        for sample, (owner, row) in enumerate(zip(owners, self.rows, strict=True)):
            if row.clip.frames >= least_frames:
                videos.setdefault((owner, row.clip.source), []).append(sample)
        numbers: Counter[int] = Counter()
        turns = []  # the first clip of every video comes before the second of any, and each source in its turn
        for video, own in videos.items():
            turns += [(turn, numbers[video[0]], video) for turn in range(len(own))]
            numbers[video[0]] += 1
        shares = Counter(video for _, _, video in sorted(turns)[:clips])
        chosen = {
            own[(2 * i + 1) * len(own) // (2 * shares[video])]
            for video, own in videos.items()
            for i in range(shares[video])
        }
        return [*sorted(chosen), *sorted({sample for own in videos.values() for sample in own} - chosen)]

    def read(self, sample: int, extension: str) -> bytes:
        """Read one member's bytes, checked against its crc32. Raises BadSample."""
        return read_member(self.shards[sample], self.rows[sample], extension)


def open_shards(folder: str | Path, split: Split) -> DatasetIndex:
    """Open one folder of this machine, as open_sources does."""
    return _join({str(folder): list(shard_paths(Path(folder), split))}, {str(folder): 1})


def open_sources(data: DataConfig, split: Split) -> DatasetIndex:
    """Load or build the index of every shard of a split, of data.shards or data.mix.

    A source of a mix that has no validation shards is passed over where others have some. The same index is returned as
    long as no file of it changes: a start asks for the held-out clips six times.

    raises  UserError naming the source or shard that cannot be used
    """
    cache = DiskCache(Path(data.cache_dir).expanduser(), int(data.cache_gb * 1e9))
    tars = {
        source: find_shards(source, data.remote, cache) if is_remote(source) else _list_folder(Path(source))
        for source in data.sources
    }
    chosen = tuple((source, tuple(shards)) for source, shards in _choose(tars, split).items())
    tars_here = [shard for _, shards in chosen for shard in shards if isinstance(shard, Path)]
    stamps = tuple(_stamp(path) for tar in tars_here for path in (tar, index_path(tar)))
    return _join_stamped(chosen, tuple(data.sources.items()), stamps)


def shard_paths(folder: Path, split: Split) -> list[Path]:
    """List the tars of a split of one folder by name. Raises UserError if there are none."""
    tars = _choose({str(folder): _list_folder(folder)}, split)
    return [tar for tar in tars[str(folder)] if isinstance(tar, Path)]


def _list_folder(folder: Path) -> list[Shard]:
    """List the tars of a folder by name.

    raises  UserError for no folder, an unfinished one, and a tar that is gone or no file
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; pack videos into it: python shards/pack.py VIDEOS {folder}")
    refuse_unfinished(folder)
    tars = sorted(folder.glob("*.tar"))
    for tar in tars:
        refuse_irregular(tar)
    if lost := sorted(indexed_tars(folder) - set(tars)):
        raise UserError(
            f"{lost[0]} is gone, but its index is there; restore it, or delete {index_path(lost[0])} to train without it"
        )
    return [*tars]


def refuse_unfinished(folder: Path) -> None:
    """Raise UserError where a packing or caching of the folder was stopped."""
    for name, program in UNFINISHED.items():
        if (folder / name).exists():
            raise UserError(
                f"{folder} is not finished: it holds {name}; run the same python {program} command again, which goes on "
                "where it was stopped"
            )


def _choose(tars: dict[str, list[Shard]], split: Split) -> dict[str, list[Shard]]:
    """Name the shards of a split of each source that has some."""
    chosen = {}
    for source, all_of_it in tars.items():
        if not all_of_it:
            raise UserError(
                f"{source} holds no .tar shards; pack videos into it: python shards/pack.py VIDEOS {source}"
            )
        chosen[source] = [tar for tar in all_of_it if tar.name.startswith("val-") == (split == "val")]
    empty = [source for source in chosen if not chosen[source]]
    if empty and (split == "train" or len(empty) == len(chosen)):
        remedy = (
            f"pack with a {'--holdout above 0' if split == 'val' else 'lower --holdout'}, or name some in --captions"
        )
        raise UserError(f"{empty[0]} holds no {split} shards among its {len(tars[empty[0]])} tars; {remedy}")
    return {source: shards for source, shards in chosen.items() if shards}


def _stamp(path: Path) -> tuple[int, ...]:
    """A value that changes once a file is written, replaced or removed."""
    try:
        status = path.stat()
    except OSError:
        return ()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


# Two: the clips to train on and those held out. Shards of another machine have no stamp, and are never the same.
@functools.lru_cache(maxsize=2)
def _join_stamped(
    chosen: tuple[tuple[str, tuple[Shard, ...]], ...],
    weights: tuple[tuple[str, int], ...],
    stamps: tuple[tuple[int, ...], ...],
) -> DatasetIndex:
    return _join({source: [*shards] for source, shards in chosen}, dict(weights))


def _join(chosen: dict[str, list[Shard]], weights: Mapping[str, int]) -> DatasetIndex:
    """Open the shards of each source, and number their samples one source after another."""
    opened = {source: _open(shards) for source, shards in chosen.items()}
    _refuse_doubles(opened)
    indexes = [index for source in opened for index in opened[source]]
    shards = [shard for source in chosen for shard in chosen[source]]
    _refuse_unreadable_latents(shards, indexes)
    sources = tuple(Source(tuple(len(index.samples) for index in opened[source]), weights[source]) for source in opened)
    return DatasetIndex(
        shards=tuple(shard for shard, index in zip(shards, indexes, strict=True) for _ in index.samples),
        rows=tuple(row for index in indexes for row in index.samples),
        sources=sources,
        fingerprint=_fingerprint(list(opened.values()), sources),
    )


def _open(shards: list[Shard]) -> list[ShardIndex]:
    if isinstance(shards[0], RemoteShard):
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            indexes = list(pool.map(load_index, shards))
    else:
        indexes = [load_index(shard) for shard in shards]
    for shard, index in zip(shards, indexes, strict=True):
        if not index.samples:
            raise UserError(f"{shard} holds no samples; delete it, or pack the folder again")
    return indexes


def _refuse_doubles(opened: dict[str, list[ShardIndex]]) -> None:
    """Refuse a mix that holds a shard twice, by content, so that no other spelling or copy of a folder slips through."""
    seen: dict[str, str] = {}
    for source, indexes in opened.items():
        for digest in {index.tar_sha256 for index in indexes}:
            if digest in seen:
                raise UserError(
                    f"data.mix: {seen[digest]} and {source} hold the same shard; name it once, by its weight"
                )
            seen[digest] = source


def _refuse_unreadable_latents(shards: list[Shard], indexes: list[ShardIndex]) -> None:
    """Refuse latents on another machine, since they are mapped, and latents beside videos, since a run knows one kind."""
    holds_latents = {
        shard: any(row.latents for row in index.samples) for shard, index in zip(shards, indexes, strict=True)
    }
    away = [shard for shard, latents in holds_latents.items() if latents and isinstance(shard, RemoteShard)]
    if away:
        raise UserError(f"{away[0]} holds latents, which are read from a local disk; copy the shards to this machine")
    if len(set(holds_latents.values())) > 1:
        first = {latents: shard for shard, latents in holds_latents.items()}
        raise UserError(f"{first[True]} holds latents and {first[False]} videos; train from one kind")
    shapes: dict[tuple[str, tuple[int, ...], int], Shard] = {}
    for shard, index in zip(shards, indexes, strict=True):
        for found in (row.latents for row in index.samples if row.latents):
            shapes.setdefault((found.dtype, found.latent_CHW, found.token_dim), shard)
    if len(shapes) > 1:
        (one, shard), (other, another) = list(shapes.items())[:2]
        raise UserError(f"{shard} holds latents {one}, {another} {other}; cache all sources alike, by shards/cache.py")


def _fingerprint(opened: list[list[ShardIndex]], sources: tuple[Source, ...]) -> str:
    """Hash what a run walks through: of one source its content, of several also their weights, in their order."""
    prints = [fingerprint(indexes) for indexes in opened]
    if len(prints) == 1:
        return prints[0]
    lines = (f"{source.weight} {digest}" for source, digest in zip(sources, prints, strict=True))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
