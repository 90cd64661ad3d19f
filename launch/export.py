"""Write a run's adapter for use elsewhere: launch/export.py --run runs/NAME --to diffusers --out exported."""

from typing import Literal

from pydantic import FiniteFloat

from toolkit.cli import importing, main


def export(
    to: Literal["peft", "diffusers", "kohya", "merged"], out: str, run: str | None = None, checkpoint: str | None = None,
    precision: Literal["fp16", "bf16", "fp32"] | None = None, ema: FiniteFloat = 0.0,
) -> None:  # fmt: skip
    """Write a run's newest adapter, or that of another checkpoint, with a model card, into a new folder.

    to          peft, diffusers, kohya: the adapter in that format; merged: the whole UNet with the adapter folded in
    out         the folder to make
    run         a run folder
    checkpoint  latest, best (by validation), one such as step_000200, or the path of any checkpoint, which needs no run
    precision   of a merged UNet, default fp16; adapters are fp32
    ema         0.1 for the average over the training of this sigma_rel, of a run with checkpoint.ema; 0 is none
    """
    with importing():
        from toolkit.commands.export import export_run

    print(f"wrote {export_run(run, to, out, checkpoint, precision, ema)}")


if __name__ == "__main__":
    main(export)
