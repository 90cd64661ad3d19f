"""A folder of shards as one list of samples, read by offset.

Test: pytest tests/data/test_format.py

The split is in the shards' names: `val` reads val-*.tar, `train` every other tar of the folder.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from toolkit.data.format import SampleRow, ShardIndex, fingerprint, load_index, read_member
from toolkit.errors import UserError

Split = Literal["train", "val"]


@dataclass(frozen=True)
class DatasetIndex:
    """The samples of one split, shard after shard: sample i of the dataset is rows[i], in the tar shards[i]."""

    folder: Path
    split: Split
    shards: tuple[Path, ...]
    rows: tuple[SampleRow, ...]
    shard_sizes: tuple[int, ...]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, sample: int, extension: str) -> bytes:
        """Read one member's bytes, checked against its crc32. Raises BadSample."""
        return read_member(self.shards[sample], self.rows[sample], extension)


def shard_paths(folder: Path, split: Split) -> list[Path]:
    """List the tars of a split by name. Raises UserError if the folder or its shards are missing."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; pack videos into it: python shards/pack.py VIDEOS {folder}")
    tars = sorted(folder.glob("*.tar"))
    if not tars:
        raise UserError(f"{folder} holds no .tar shards; pack videos into it: python shards/pack.py VIDEOS {folder}")
    chosen = [tar for tar in tars if tar.name.startswith("val-") == (split == "val")]
    if not chosen:
        remedy = "pack at least two videos with --holdout above 0" if split == "val" else "pack with a lower --holdout"
        raise UserError(f"{folder} holds no {split} shards among its {len(tars)} tars; {remedy}")
    return chosen


def open_shards(folder: str | Path, split: Split) -> DatasetIndex:
    """Load or build the index of every shard of a split. Raises UserError naming the shard that cannot be used."""
    paths = shard_paths(Path(folder), split)
    indexes: list[ShardIndex] = []
    for path in paths:
        indexes.append(load_index(path))
        if not indexes[-1].samples:
            raise UserError(f"{path} holds no samples; delete it, or pack the folder again")
    return DatasetIndex(
        folder=Path(folder),
        split=split,
        shards=tuple(path for path, index in zip(paths, indexes, strict=True) for _ in index.samples),
        rows=tuple(row for index in indexes for row in index.samples),
        shard_sizes=tuple(len(index.samples) for index in indexes),
        fingerprint=fingerprint(indexes),
    )
