"""Train and judge a grid of runs: launch/sweep.py --config RECIPE --name rate --grid "{optimizer.lr: [0.001, 0.01]}"."""

from typing import Any

from pydantic import PositiveInt

from toolkit.cli import importing, main, split


def sweep(
    config: str,
    name: str,
    grid: str,
    seeds: PositiveInt = 1,
    gaps: PositiveInt | tuple[PositiveInt, ...] = (),
    ranks: PositiveInt | None = None,
    part: str = "1/1",
    **overrides: Any,
) -> None:
    """Train every combination of some fields' values with several seeds, and judge them side by side.

    Stopped at any moment, the same command goes on. runs_dir/NAME holds the runs, and sweep.json, sweep.md and sweep.svg.

    config     a recipe
    name       of the sweep's folder
    grid       fields with lists of values, "{optimizer.lr: [0.001, 0.01], lora.targets: [spatial, all]}", or a word with
               settings by name, "{rank: {low: {lora.rank: 4, lora.alpha: 4}, high: {lora.rank: 64, lora.alpha: 64}}}"; or a
               YAML file
    seeds      runs of each combination, from the recipe's seed on
    gaps       source frames between the two ends at which all are judged, with commas between; default the recipe's
    ranks      processes of a run; default as many as there are GPUs, or two on a CPU
    part       train and judge part i of N alone, as one of N machines that share runs_dir, like 3/8
    overrides  any field of the recipe by its dotted name
    """
    with importing():
        from toolkit.commands.sweep import run_sweep

    run_sweep(config, name, grid, seeds, split(gaps), ranks, part, overrides)


if __name__ == "__main__":
    main(sweep)
