"""Fill the gap between two stills: launch/interpolate.py --run R --first a.png --last b.png --frames 5 --out ab.mp4."""

from pydantic import FiniteFloat, NonNegativeFloat, PositiveFloat, PositiveInt

from toolkit.cli import main


def interpolate(
    run: str, first: str, last: str, out: str, frames: int = 5, lora_scale: FiniteFloat = 1.0,
    fps: PositiveFloat = 7.0, motion: NonNegativeFloat = 127.0, steps: PositiveInt | None = None, base: str | None = None,
) -> None:  # fmt: skip
    """Interpolate with a run's newest adapter.

    out         .mp4, .gif, or a folder for PNG
    frames      first and last included: 3, 5, 9, 17, ...
    lora_scale  multiplies alpha / rank: 0 is the untuned base
    fps         frame rate of the result, which the network is told
    motion      motion bucket that the network is told
    steps       sampler steps; default the recipe's
    base        another folder of the run's base, UNet included
    """
    from toolkit.run.inference import interpolate_stills

    print(f"wrote {interpolate_stills(run, first, last, out, frames, lora_scale, fps, motion, steps, base)}")


if __name__ == "__main__":
    main(interpolate)
