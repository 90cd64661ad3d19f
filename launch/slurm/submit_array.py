"""Pack, cache or sweep on many machines: launch/slurm/submit_array.py --parts 8 shards/pack.py VIDEOS OUT [its flags]."""

import sys

from pydantic import NonNegativeInt, PositiveInt

from toolkit.cli import main

COMMAND: list[str] = []  # the program and its flags, which Fire must not read


def submit_array(
    parts: PositiveInt, gpus: NonNegativeInt = 0, cpus: PositiveInt = 1, mem: str | None = None, time: str | None = None,
    partition: str | None = None, account: str | None = None, qos: str | None = None, logs: str = "runs/arrays",
    dry_run: bool = False,
) -> None:  # fmt: skip
    """Submit shards/pack.py, shards/cache.py or launch/sweep.py to SLURM as an array; whoever ends last joins the parts.

    Flags before the program are the array's, those after it the program's.

    parts    jobs of the array, each with its share of the videos, clips or runs
    gpus     per job: 0 to pack, 1 to cache or sweep
    cpus     per job
    mem      per job, such as 16G
    time     limit of a job, such as 4:00:00
    partition, account, qos  as the cluster names them
    logs     folder for the script, the logs and a copy of the code
    dry_run  print the jobs' script, and write nothing
    """
    from pathlib import Path

    from toolkit.commands.slurm import Resources
    from toolkit.commands.slurm import submit_array as start

    resources = Resources(1, 1, gpus, cpus, time, partition, account, qos, mem)
    print(start(COMMAND, parts, resources, Path(logs), dry_run))


if __name__ == "__main__":
    program = next((i for i, word in enumerate(sys.argv) if i and word.endswith(".py")), len(sys.argv))
    COMMAND[:] = sys.argv[program:]
    del sys.argv[program:]
    main(submit_array)
