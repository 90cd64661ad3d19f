"""Measure the toolkit on this machine: launch/bench.py full --config launch/recipes/sign_576.yaml, or loader [--json]."""

from typing import Any, Literal

from toolkit.cli import main


def bench(what: Literal["full", "loader"], config: str | None = None, json: bool = False, **overrides: Any) -> None:
    """Time what a recipe does, without its weights and data: random ones of the published sizes.

    what       full: one training step and one interpolation step of the full-size network, with each attention kernel
               that runs here; loader: clips read per second, beside webdataset, tarfile and others, which needs no recipe
    config     the recipe that `full` measures
    json       print one JSON object and nothing else
    overrides  any field of the recipe by its dotted name
    """
    from json import dumps

    from toolkit.errors import UserError

    if what == "loader":
        if config is not None or overrides:
            raise UserError("bench.py loader takes no recipe and no fields of one; give --json at most")
        from toolkit.run.bench_loader import bench_loader

        report = bench_loader()
    else:
        if config is None:
            raise UserError("bench.py full measures a recipe; give --config launch/recipes/sign_576.yaml or another")
        from toolkit.config import load_config

        resolved = load_config(config, overrides)
        from toolkit.run.bench import bench_full

        report = bench_full(resolved)
    if json:
        print(dumps(report, indent=2))
        return
    for name, value in report.items():
        rows = value if isinstance(value, dict) else {"": value}
        for part, row in rows.items():
            cells = ", ".join(f"{key} {figure}" for key, figure in row.items()) if isinstance(row, dict) else row
            print(f"{name + (f' {part}' if part else ''):<32}{cells}")


if __name__ == "__main__":
    main(bench)
