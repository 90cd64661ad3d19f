"""Find a learning rate by a short run whose rate rises: python launch/find_lr.py --config RECIPE [--any.field value]."""

from typing import Annotated, Any

from pydantic import Field

from toolkit.cli import importing, main


def find_lr(config: str, steps: Annotated[int, Field(ge=10)] = 100, **overrides: Any) -> None:
    """Raise the learning rate from 1e-6 to 1 over some fresh steps, and suggest a tenth of where the loss was lowest.

    One process; nothing is trained further. runs_dir/NAME then holds find_lr.json and find_lr.svg: look at the curve.

    config     a recipe
    steps      optimizer steps
    overrides  any field of the recipe by its dotted name
    """
    with importing():
        from toolkit.commands.find_lr import find_lr as start
        from toolkit.commands.find_lr import tell

    print(tell(start(config, steps, overrides)))


if __name__ == "__main__":
    main(find_lr)
