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

    from toolkit.commands.verdict import report
    from toolkit.config import dump_config, load_config

    resolved = load_config(config, overrides)
    if not json:
        print(dump_config(resolved), flush=True)  # at once: to count takes seconds the first time
    said = report(resolved, ranks)
    if json:
        print(dumps(said, indent=2))
        return
    for name, value in said.items():
        if name != "notes":
            print(f"{name:<18}{value:>16,}" if isinstance(value, int) else f"{name:<18}{value!s:>16}")
    for note in said["notes"]:
        print(f"note: {note}")


if __name__ == "__main__":
    main(doctor)
