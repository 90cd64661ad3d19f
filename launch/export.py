"""Write a run's adapter for use elsewhere: launch/export.py --run runs/NAME --to diffusers --out exported."""

from typing import Literal

from toolkit.cli import main


def export(
    run: str, to: Literal["peft", "diffusers", "kohya", "merged"], out: str, checkpoint: str | None = None,
    precision: Literal["fp16", "bf16", "fp32"] | None = None,
) -> None:  # fmt: skip
    """Write the run's newest adapter, with a model card, into a new folder.

    run         a run folder
    to          peft, diffusers, kohya: the adapter in that format; merged: the whole UNet with the adapter folded in
    out         the folder to make
    checkpoint  another one than the newest, such as step_000200
    precision   of a merged UNet, default fp16; adapters are fp32
    """
    from toolkit.run.export import export_run

    print(f"wrote {export_run(run, to, out, checkpoint, precision)}")


if __name__ == "__main__":
    main(export)
