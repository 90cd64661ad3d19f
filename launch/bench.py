"""Measure the toolkit on this machine: launch/bench.py full --config launch/recipes/sign_576.yaml, or loader [--json]."""

from typing import Any, Literal

from toolkit.cli import main


def bench(
    what: Literal["full", "step", "counts", "engine", "loader", "reduction", "checkpoint", "scaling", "start"],
    config: str | None = None, json: bool = False, **options: Any,
) -> None:  # fmt: skip
    """Time what a recipe does, without its weights and data: random ones of the published sizes.

    what     full: one training step and one interpolation step of the full-size network, with SDPA and with xformers where
             it runs
             step: training steps beside diffusers and PEFT: seconds a clip, memory, kernels; on a CPU ratios of a tiny one
             counts: operations, bytes, FLOPs and peak memory of a training step, beside diffusers and PEFT; needs no GPU
             engine: host time of an optimizer step beside a plain loop's: ZeRO-2 as here and by default, DDP
             loader: clips read per second, beside webdataset, tarfile and others
             reduction: what an optimizer step sends between ranks, with each engine and with DeepSpeed's own defaults
             checkpoint: what a save and a resume cost on two ranks, beside DeepSpeed's own
             scaling: predicted steps on 1 to 1,024 GPUs, the tables of docs/SCALING.md
             start: seconds until each command answers, and a run's first step, beside importing the libraries alone
    config   the recipe that `full` measures
    json     print one JSON object and nothing else
    options  full: any field of the recipe by its dotted name; others: --ranks, --case and such, which a wrong one names
    """
    import inspect
    from importlib import import_module
    from json import dumps

    from pydantic import validate_call

    from toolkit.errors import UserError

    module = import_module(f"toolkit.bench.{what}")
    measure = getattr(module, f"bench_{what}")
    if what == "full":
        if config is None:
            raise UserError("bench.py full measures a recipe; give --config launch/recipes/sign_576.yaml or another")
        from toolkit.config import load_config

        options = {"config": load_config(config, options)}
    elif config is not None or not options.keys() <= inspect.signature(measure).parameters.keys():
        flags = ", ".join(f"--{name}" for name in inspect.signature(measure).parameters)
        raise UserError(f"bench.py {what} takes no recipe and no fields of one; give {flags or 'nothing'}, or --json")
    report = validate_call(measure)(**options)
    if json:
        print(dumps(report, indent=2))
    elif what == "scaling":
        print(module.to_markdown(report))
    else:
        show(report)


def show(report: dict[str, Any]) -> None:
    """One line a figure, or a row of them."""
    for name, value in report.items():
        rows = value if isinstance(value, dict) else {"": value}
        for part, row in rows.items():
            cells = ", ".join(f"{key} {figure}" for key, figure in row.items()) if isinstance(row, dict) else row
            print(f"{name + (f' {part}' if part else ''):<32}{cells}")


if __name__ == "__main__":
    main(bench)
