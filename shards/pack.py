"""Videos -> tar shards: python shards/pack.py VIDEOS OUT [--clip_seconds 4] [--short_side 256] [--part 1/8] ..."""

from toolkit.cli import main


def pack(
    videos: str,
    out: str,
    clip_seconds: float = 4.0,
    stride_seconds: float | None = None,
    holdout: float = 0.2,
    short_side: int | None = None,
    aspects: str | None = None,
    gop: int = 12,
    captions: str | None = None,
    min_frames: int = 3,
    min_motion: float = 8.0,
    min_brightness: float = 12.0,
    min_sharpness: float = 0.35,
    duplicate_distance: float = 2.5,
    shard_mb: float = 256.0,
    part: str = "1/1",
    jobs: int | None = None,
    overwrite: bool = False,
) -> str:
    """Cut the videos under a folder into clips and write them as train and val shards (format: shards/FORMAT.md).

    Stopped at any moment, the same command goes on. OUT/report.html shows what was kept and dropped.

    Args:
        videos: folder that holds the videos, in any depth; may be a whole drive, whose trash is passed over
        out: folder for the shards
        clip_seconds: longest clip; what lies between two changes of shot is cut into equal parts
        stride_seconds: instead of equal parts, start a clip of full length every so often; less than clip_seconds overlaps
        holdout: share of the videos that goes to val, for evaluation; of a single one its end
        short_side: scale the shorter side down to this many pixels; never up. More than 2048 x 2048 are scaled down anyway
        aspects: crop the middle to the nearest of these, width to height: 1:1 or 16:9,1:1,9:16
        gop: most frames from keyframe to keyframe, 1 to 12; 1 makes every frame a picture of its own
        captions: CSV of video,caption,label; without a row there, the text file beside a video is its caption. With
            start_s and end_s, in seconds, a row is about a part of a video, of which nothing but such parts is packed.
            With split, train or val, it says what is held out: where a row says val, nothing else is
        min_frames: drop a clip with fewer frames
        min_motion: drop a clip that moves less, from 1 to 255; signing scores about 127
        min_brightness: drop a clip that is darker, from 0 to 255
        min_sharpness: drop a clip that is more blurred, from 0 to 1
        duplicate_distance: drop a clip that differs less from another in luma, from 0 to 255; 0 keeps all
        shard_mb: start another shard at this many megabytes
        part: do part i of N first, as one of N machines that share OUT, like 3/8
        jobs: processes; by default one for each core
        overwrite: replace the shards that are in out, or what another command left half done there
    """
    settings = {name: value for name, value in locals().items() if name not in ("videos", "out")}
    from toolkit.authoring.pack import pack as start

    return start(videos, out, **settings).summary()


if __name__ == "__main__":
    main(pack)
