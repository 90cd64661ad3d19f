"""Fill the gap between two stills: launch/interpolate.py --run R --first a.png --last b.png --frames 5 --out ab.mp4."""

from typing import Annotated, Literal

from pydantic import Field, FiniteFloat, NonNegativeInt, PositiveInt

from toolkit.cli import importing, main, split

Rate = Annotated[float, Field(ge=0.01, le=1000)]
Amount = Annotated[float, Field(ge=0, le=1000)]
Names = str | tuple[str, ...] | None  # Fire makes a tuple of a,b and leaves a/x,b/y as it is
Guidance = Annotated[float, Field(ge=1, le=30)]


def interpolate(
    out: str, run: str | None = None, adapter: Names = None, first: str | None = None, last: str | None = None,
    stills: Names = None, pairs: str | None = None, part: str = "1/1", frames: int | None = None,
    lora_scale: FiniteFloat = 1.0, weights: FiniteFloat | tuple[FiniteFloat, ...] = (), fps: Rate | None = None,
    motion: Amount | None = None, steps: PositiveInt | None = None, sampler: Literal["euler", "lcm"] | None = None,
    min_guidance: Guidance | None = None, max_guidance: Guidance | None = None,
    seed: NonNegativeInt | tuple[NonNegativeInt, ...] = (), trajectories: str | None = None,
    controlnet: str | None = None, control_scale: Amount | None = None,
    chunk_frames: PositiveInt | None = None, batch: PositiveInt = 1, config: str | None = None, base: str | None = None,
    unet: str | None = None, ema: FiniteFloat = 0.0, compile: bool = False,
) -> None:  # fmt: skip
    """Interpolate with a run's newest adapter, or with exported adapters.

    out           .mp4, .gif, or a folder for PNG; for pairs the folder of the videos
    run           a run folder
    adapter       instead of run: an exported folder or file of any format, or owner/name[@revision] on the hub; several
                  with commas between
    first, last   a picture each, or a video: of one before the gap its last frame, of one after it its first
    stills        instead of first and last: two pictures or more with commas between, a video through all of them; or one
                  video, between whose frames all is filled
    pairs         instead of these: a CSV of first,last or first,last,name, with paths within its folder, for a video a row;
                  those that are there are not made again, so the same command goes on
    part          of the rows, 3/8 for the third of eight processes
    frames        of each gap, its two stills included: 3, 5, 9, 17, ..., or the window of the recipe, which is the default
                  where the recipe generates it at once (5 for layout spec_middle)
    lora_scale    multiplies alpha / rank: 0 is the untuned base
    ema           0.1 for the average over the training of this sigma_rel, of a run with checkpoint.ema; 0 is none
    weights       one per adapter, with commas between
    fps, motion   frame rate of the result and motion bucket, which the network is told; default those of the training clips,
                  and for one video the rate at which it is as long as it was
    steps         sampler steps; default the recipe's
    sampler       default the recipe's; lcm takes few steps, on bases distilled to it
    min_guidance, max_guidance  classifier-free guidance, rising over the gap; 1 and 1 is none; default the recipe's
    seed          one for all gaps, or one per gap with commas between; default the recipe's
    trajectories  a JSON of points, or auto to match features of the stills; needs a ControlNet
    control_scale of the ControlNet; default 1 for drawn trajectories, 0.5 for found ones
    chunk_frames  frames decoded at once: fewer need less memory of the GPU, take longer and give the same frames; default as
                  many as it has room for
    batch         pairs of stills that the network is asked about at once: faster, and takes more memory; default 1
    compile       compile the network first: minutes once, then less time a step; for many stills, one pair at a time
    config        a recipe, for an adapter that holds none
    base          another folder of the recipe's base, UNet included
    unet          another UNet: a merged export, which needs no run or adapter
    """
    from dataclasses import replace

    from toolkit.errors import UserError

    with importing():
        from toolkit.commands.interpolate import interpolate_stills, settle
        from toolkit.commands.pairs import interpolate_pairs
        from toolkit.run.inference import read_source, recipe_sampling

    if compile and batch > 1:
        raise UserError(
            "--compile is for one pair at a time, since each number of pairs would be compiled; drop --batch"
        )
    if (pairs is not None) + (stills is not None) + (first is not None or last is not None) > 1:
        raise UserError("--first and --last, --stills and --pairs are three ways to name stills; give one of them")
    if (first is None) != (last is None):
        raise UserError(f"--{'last' if first else 'first'} is missing; give both ends of the gap, or --stills")
    if part != "1/1" and pairs is None:
        raise UserError("--part is for --pairs, whose rows it shares out; leave it out")
    source = read_source(run, split(adapter), split(weights), lora_scale, config, unet)
    source = source.with_model(base=base, unet=unet, controlnet=controlnet).averaged(ema)
    given = {"steps": steps, "sampler": sampler, "min_guidance": min_guidance, "max_guidance": max_guidance}
    sampling = replace(
        recipe_sampling(source.config),
        **{name: value for name, value in given.items() if value is not None},
        chunk_frames=chunk_frames,
    )
    filling = settle(source, sampling, frames, fps, motion, split(seed), trajectories, control_scale, controlnet, batch)
    if pairs is not None:
        print(interpolate_pairs(source, pairs, out, filling, part, compile))
        return
    paths = split(stills) or [path for path in (first, last) if path]
    print(f"wrote {interpolate_stills(source, paths, out, filling, compile)}")


if __name__ == "__main__":
    main(interpolate)
