"""Verify shards: python shards/check.py SHARDS [--deep] [--json] [--repair OUT]. Exit code 1 for a fault or a loss."""

import sys

from toolkit.cli import main


def check(shards: str, deep: bool = False, json: bool = False, repair: str | None = None) -> None:
    """Compare every byte of a folder of shards with its indexes, and every clip with its facts.

    Args:
        shards: folder that holds the shards
        deep: decode every frame, and look at every number of cached clips
        json: print one JSON object, {shards, clips, train, val, seconds,
            faults: [{shard, key, offset, fault, repairable}]}; with --repair of the copy, and {lost: [...]}
        repair: new folder for a sound copy; what is damaged is left out of it, and listed
    """
    from json import dumps

    from toolkit.authoring import check as checking
    from toolkit.authoring import repair as repairing

    report = repairing.repair(shards, repair, deep) if repair is not None else checking.check(shards, deep)
    print(dumps(report.as_dict(), indent=1) if json else report.summary())
    if not report.is_whole:
        sys.exit(1)


if __name__ == "__main__":
    main(check)
