"""Look a recipe over before starting it: launch/doctor.py --config launch/recipes/sign_576.yaml [--json]."""

from typing import Any

from pydantic import PositiveInt

from toolkit.cli import main


def doctor(config: str, json: bool = False, ranks: PositiveInt = 1, **overrides: Any) -> None:
    """Resolve a recipe and count what it trains, without weights and without data where they are missing.

    json       print one JSON object and nothing else
    ranks      processes that the run will have
    overrides  any field of the recipe by its dotted name
    """
    from json import dumps

    from toolkit.config import dump_config, load_config

    resolved = load_config(config, overrides)
    from toolkit.run.doctor import examine

    report = examine(resolved, ranks)
    if json:
        print(dumps(report, indent=2))
        return
    print(dump_config(resolved))
    for name, value in report.items():
        if name != "notes":
            print(f"{name:<18}{value:>16,}" if isinstance(value, int) else f"{name:<18}{value!s:>16}")
    for note in report["notes"]:
        print(f"note: {note}")


if __name__ == "__main__":
    main(doctor)
