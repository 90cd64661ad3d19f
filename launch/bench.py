"""Measure the toolkit on this machine: launch/bench.py full --config launch/recipes/sign_576.yaml [--json]."""

from typing import Any, Literal

from toolkit.cli import main


def bench(what: Literal["full"], config: str, json: bool = False, **overrides: Any) -> None:
    """Time what a recipe does, without its weights and data: random ones of the published sizes.

    what       full: one training step and one interpolation step of the full-size network, with each attention kernel
               that runs here
    json       print one JSON object and nothing else
    overrides  any field of the recipe by its dotted name
    """
    from json import dumps

    from toolkit.config import load_config

    resolved = load_config(config, overrides)
    from toolkit.run.bench import bench_full

    report = bench_full(resolved)
    if json:
        print(dumps(report, indent=2))
        return
    rows = report.pop("kernels")
    for name, value in report.items():
        print(f"{name:<18}{value!s:>16}")
    for kernel, row in rows.items():
        print(f"{kernel}: {', '.join(f'{name} {value}' for name, value in row.items())}")


if __name__ == "__main__":
    main(bench)
