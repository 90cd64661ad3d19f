"""Videos -> tar shards: python shards/pack.py VIDEOS OUT [--clip_seconds 4] [--holdout 0.2] [--short_side 256]"""

from toolkit.cli import main


def pack(
    videos: str,
    out: str,
    clip_seconds: float = 4.0,
    holdout: float = 0.2,
    short_side: int | None = None,
    shard_mb: float = 256.0,
    overwrite: bool = False,
) -> str:
    """Cut the videos under a folder into clips and write them as train and val shards (format: shards/FORMAT.md).

    Args:
        videos: folder that holds the videos, in any depth
        out: folder for the shards
        clip_seconds: longest clip; a longer video is cut into equal parts
        holdout: share of the videos that goes to val, for evaluation
        short_side: scale the shorter side down to this many pixels; never up
        shard_mb: start another shard at this many megabytes
        overwrite: replace the shards that are in out
    """
    from toolkit.data import pack as packing

    return packing.pack(videos, out, clip_seconds, holdout, short_side, shard_mb, overwrite).summary()


if __name__ == "__main__":
    main(pack)
