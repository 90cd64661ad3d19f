"""Train on a cluster: python launch/slurm/submit.py --config RECIPE --nodes 4 --gpus 8 --time 1-00:00:00 [--dry_run]."""

from typing import Annotated, Any

from pydantic import Field, NonNegativeInt, PositiveInt

from toolkit.cli import main


def submit(
    config: str, nodes: PositiveInt = 1, gpus: NonNegativeInt = 1, tasks: PositiveInt | None = None,
    cpus: PositiveInt | None = None, mem: str | None = None, time: str | None = None, partition: str | None = None,
    account: str | None = None, qos: str | None = None, signal_s: Annotated[int, Field(ge=1, le=65535)] = 120,
    fresh: bool = False, allow_change: bool = False, dry_run: bool = False, **overrides: Any,
) -> None:  # fmt: skip
    """Submit a run to SLURM; it saves before its time is up and queues itself again, until it is done.

    The same command again, without --fresh, goes on with a run that ended early. The code as it stands is copied into the
    run folder, so you can go on editing. What has no flag here can be set by SLURM's own variables, such as
    SBATCH_CONSTRAINT.

    config     a recipe, or config.yaml of a run folder
    nodes      machines
    gpus       per node, one rank each; 0 trains on CPUs
    tasks      with --gpus 0: ranks per node; default 1
    cpus       per rank; default one for it and one for each of its data.workers
    mem        per node, such as 64G
    time       limit of one stay on the machines, such as 12:00:00
    partition, account, qos  as the cluster names them
    signal_s   how many seconds before the limit the run is told to save; SLURM may tell it a minute earlier
    fresh, allow_change  as launch/train.py has them
    dry_run    print the job's script, and write nothing
    overrides  any field of the recipe by its dotted name: --lora.rank 32
    """
    from toolkit.commands.slurm import Resources, submit_run
    from toolkit.config import load_config
    from toolkit.errors import UserError

    if gpus and tasks:
        raise UserError(f"--tasks {tasks} goes with --gpus 0 alone: each of the {gpus} GPUs of a node has one rank")
    resolved = load_config(config, overrides)
    cpus = cpus or 1 + resolved.data.workers
    resources = Resources(nodes, gpus or tasks or 1, gpus, cpus, time, partition, account, qos, mem)
    print(submit_run(resolved, resources, signal_s, fresh, allow_change, dry_run))


if __name__ == "__main__":
    main(submit)
