"""Gives the doctor's report again at once, without PyTorch, while nothing that it looked at has changed.

Test: pytest tests/commands/test_verdict.py
"""

import os
import sys
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from toolkit.cli import importing
from toolkit.config import RunConfig
from toolkit.data.remote import is_remote
from toolkit.model.sources import NAMED_BASES
from toolkit.run.recall import recall

MOST_FILES = 10_000  # to stamp more takes seconds too


def report(config: RunConfig, ranks: int) -> dict[str, Any]:
    """What doctor.examine says of a recipe; it looks again where a file is new, gone or changed, and where it refused."""

    def examine() -> dict[str, Any]:
        print("counting what a step takes: some seconds, the first time", file=sys.stderr, flush=True)
        with importing():
            from toolkit.commands import doctor  # takes seconds

        return doctor.examine(config, ranks)

    stamps = stamp_files(config)  # before the look: what changes meanwhile has another stamp the next time
    question = {"doctor": config.model_dump(mode="json"), "ranks": ranks}
    return examine() if stamps is None else recall(question, examine, stamps)


def stamp_files(config: RunConfig) -> list[Any] | None:
    """Name, size and times of change of each file that the doctor may look at; None where it looks elsewhere, or at many."""
    model = config.model
    bases = [base for base in (model.base, model.unet) if base is not None]
    fetched = [place for place in (*bases, config.lora.init_from) if place is not None and place not in NAMED_BASES]
    if not all(Path(place).exists() for place in fetched):
        return None  # on the hub, where it may change
    if any(map(is_remote, config.data.sources)):
        return None
    named = chain.from_iterable(NAMED_BASES.values())  # a folder of that name comes before the hub
    places = [*bases, *named, model.controlnet, config.lora.init_from, config.engine.deepspeed, config.validation.lpips,
              *config.data.sources]  # fmt: skip
    files = chain.from_iterable(_list_files(Path(place).absolute()) for place in places if place is not None)
    try:
        stamps = [(str(file), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
                  for file in islice(files, MOST_FILES + 1) for stat in [file.stat()]]  # fmt: skip
    except OSError:
        return None
    return stamps if len(stamps) <= MOST_FILES else None


def _list_files(place: Path) -> Iterator[Path]:
    """What is at a place, folders too; of a file also its neighbours, among which is its config.json."""
    if place.exists():
        yield place
    if place.is_file():
        yield from filter(Path.is_file, place.parent.iterdir())
    for folder, folders, names in os.walk(place, followlinks=True):
        yield from (Path(folder, name) for name in (*folders, *names))
