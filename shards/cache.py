"""Shards of videos -> shards of latents, encoded once: python shards/cache.py SHARDS --base svd-xt [--height 576] ..."""

from typing import Literal

from toolkit.cli import main


def cache(
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
    local_rank: int | None = None,
) -> str:
    """Run the VAE and CLIP over every frame of the training clips, so that training needs neither.

    A run on the cached folder draws the same windows and noise as one on the videos. On several GPUs:
    deepspeed shards/cache.py SHARDS --base BASE; on several machines, --part 1/4, 2/4, ... on a shared folder.

    Args:
        shards: folder that shards/pack.py wrote
        base: whose VAE and image encoder, as model.base of the recipe
        out: folder for the cache; default SHARDS-HEIGHTxWIDTH-KEY, KEY a hash of all that the latents depend on
        height: as data.height of the recipe
        width: as data.width
        variants: kept versions of each clip: the plain one, and this many less one drawn by flip and random_crop
        flip: mirror half of the variants
        random_crop: cut up to this share off the sides of the variants
        precision: as engine.precision
        part: i/N encodes the i-th of N parts; the last to finish joins them
        revision: as model.revision, for a base from the hub
        variant: as model.variant
        local_rank: given by DeepSpeed's launcher; the environment says the same
    """
    from toolkit.run import cache as caching

    return caching.cache_shards(
        shards, base, out, height, width, variants, flip, random_crop, precision, part, revision, variant
    )


if __name__ == "__main__":
    main(cache)
