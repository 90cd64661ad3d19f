"""Score runs on held-out clips: launch/evaluate.py --run runs/NAME [--gaps 4,8,16] [--sweep lora_scale=0,0.5,0.8,1]."""

from pydantic import PositiveInt

from toolkit.cli import importing, main, split


def evaluate(
    run: str | None = None,
    adapter: str | None = None,
    gaps: PositiveInt | tuple[PositiveInt, ...] = (),
    sweep: str | None = None,
    clips: PositiveInt | None = None,
    steps: PositiveInt | None = None,
    base: str | None = None,
    lpips: str | None = None,
    fvd: str | None = None,
    out: str | None = None,
    shards: str | None = None,
    compile: bool = False,
    json: bool = False,
    plot: bool = False,
    checkpoint: str | None = None,
) -> None:
    """Compare generated frames with the true ones, beside linear blending and the untuned base.

    run         a run folder, or several with commas between, which are judged on the same clips
    checkpoint  of each run: latest (the default), best (by validation), or one such as step_000200
    adapter     checkpoints or exported adapters beside the runs, here or on the hub, with commas between
    gaps        source frames between the two ends, with commas between: 4,8,16; default the recipe's
    sweep       lora_scale=0,0.5,0.7,0.8,0.9,1, or ema=0,0.05,0.1,0.2 (averages over the training, of a run with
                checkpoint.ema; 0 is none), or sampler_steps, or max_guidance: each value is judged, and one recommended
    clips       held-out clips; default the recipe's
    steps       sampler steps; default those of the first one's recipe
    base        another folder of the run's base, UNet included
    lpips       weights of LPIPS with AlexNet, as safetensors
    fvd         i3d_torchscript.pt of universome/fvd-comparison, for windows of 9 frames and more
    out         folder for evaluation.json, report.html and samples/strip.png; default the first run's
    shards      judge on the held-out clips of this folder, not the run's own: does it forget what it could before?
    compile     compile the network first: minutes once, then less time a step; for many clips
    json        print what evaluation.json holds, and nothing else
    plot        only draw what the runs have logged so far, to samples/curves.svg; goes with --run alone
    """
    import sys
    from contextlib import redirect_stdout
    from json import dumps
    from pathlib import Path

    if plot:
        from toolkit.commands.curves import write_curves
        from toolkit.errors import UserError

        others = (adapter, gaps, sweep, clips, steps, base, lpips, fvd, out, shards, compile, json, checkpoint)
        if run is None or any(other not in (None, (), False) for other in others):
            raise UserError("--plot draws what runs have logged; give --run, a run folder, and no other flag")
        print("\n".join(f"wrote {write_curves(Path(name).expanduser())}" for name in split(run)))
        return
    with redirect_stdout(sys.stderr), importing():
        from toolkit.commands.evaluate import evaluate_run
        from toolkit.commands.report import to_text

    with redirect_stdout(sys.stderr):
        report = evaluate_run(
            split(run),
            clips=clips,
            steps=steps,
            base=base,
            compiled=compile,
            adapters=split(adapter),
            gaps=split(gaps),
            sweep=sweep,
            lpips=lpips,
            out=out,
            shards=shards,
            fvd=fvd,
            checkpoint=checkpoint,
        )
    if json:
        print(dumps(report, indent=2))
    else:
        tuned = next(iter(report["judged"]))
        print(
            f"{to_text(report)}\npictures: {report['strip']}  (first | linear | base | {tuned} | true | last)\n"
            f"report: {report['report']}"
        )


if __name__ == "__main__":
    main(evaluate)
