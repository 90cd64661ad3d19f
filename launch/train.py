"""Train a recipe: deepspeed launch/train.py --config launch/recipes/tiny_cpu.yaml [--any.field value] [--fresh]."""

import faulthandler
import sys
from typing import Any

from toolkit.cli import importing, main


def train(
    config: str, fresh: bool = False, allow_change: bool = False, local_rank: int | None = None, **overrides: Any
) -> None:
    """Train a LoRA; the same command again resumes.

    config        a recipe, or config.yaml of a run folder
    fresh         start anew, once in a job; the old run folder is kept beside the new one
    allow_change  go on although data, seed or another field are not those that the run was begun with
    local_rank    given by DeepSpeed's launcher; the environment says the same
    overrides     any field of the recipe by its dotted name: --lora.rank 32
    """
    from toolkit.run.signals import Console, Requests

    faulthandler.enable(2)  # to stderr: a crash inside a library says where
    # before the imports, which take seconds, and to the very end: a launcher's TERM would end a rank before it says its word
    requests = Requests()
    sys.stdout, sys.stderr = Console(sys.stdout), Console(sys.stderr)
    from toolkit.config import load_config

    resolved = load_config(config, overrides)
    with importing():
        from toolkit.run.trainer import train as run

    run(resolved, fresh, allow_change, requests)


if __name__ == "__main__":
    main(train)
