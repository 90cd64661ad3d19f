"""Verify shards: python shards/check.py SHARDS [--json]. Exit code 1 if anything is wrong."""

import sys

from toolkit.cli import main


def check(shards: str, json: bool = False) -> None:
    """Compare every byte of a folder of shards with its indexes, and every clip with its facts.

    Args:
        shards: folder that holds the shards
        json: print one JSON object, {shards, clips, train, val, seconds, faults: [{shard, key, offset, fault}]}
    """
    from json import dumps

    from toolkit.data import check as checking

    report = checking.check(shards)
    print(dumps(report.as_dict(), indent=1) if json else report.summary())
    if report.faults:
        sys.exit(1)


if __name__ == "__main__":
    main(check)
