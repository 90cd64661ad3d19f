"""Score a run on its held-out clips: launch/evaluate.py --run runs/NAME."""

from pydantic import PositiveInt

from toolkit.cli import importing, main


def evaluate(
    run: str,
    clips: PositiveInt | None = None,
    steps: PositiveInt | None = None,
    base: str | None = None,
    compile: bool = False,
) -> None:
    """Compare the generated middle frame with the true one, beside linear blending and the untuned base.

    clips    held-out clips; default the recipe's
    steps    sampler steps; default the recipe's
    base     another folder of the run's base, UNet included
    compile  compile the network first: minutes once, then less time a step; for many clips
    """
    with importing():
        from toolkit.run.evaluate import evaluate_run

    report = evaluate_run(run, clips, steps, base, compile)
    print(f"{'middle frame, ' + str(report['clips']) + ' held-out clips':<36}{'PSNR dB':>9}{'SSIM':>8}")
    for name, label in (("linear", "linear blend of the two stills"), ("base", "untuned base"), ("tuned", "tuned")):
        print(f"{label:<36}{report[f'psnr_{name}']:>9.2f}{report[f'ssim_{name}']:>8.3f}")
    print(f"pictures: {report['strip']}  (first | generated | true | last)")


if __name__ == "__main__":
    main(evaluate)
