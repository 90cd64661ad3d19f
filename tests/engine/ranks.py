"""Small trainings on the engines alone, each on ranks forked from one warm process: ranks.py FOLDER, then cases as JSON.

A launch pays for its imports on every rank; here they are paid once. Each rank of a case writes FOLDER/<case>.<rank>.json,
what it computed and saw; the main one also gathered states, <case>.half.safetensors and <case>.end.safetensors.
"""

import contextlib
import faulthandler
import json
import os
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from toolkit.engine import pieces  # noqa: E402
from toolkit.engine.fsdp2 import Fsdp2Engine  # noqa: E402
from toolkit.engine.plain import STATE_KEYS, AdamSettings, PlainEngine, State  # noqa: E402
from toolkit.engine.zero import ZeroEngine  # noqa: E402

ADAM = AdamSettings(weight_decay=0.1, beta1=0.9, beta2=0.95, eps=1e-8, max_grad_norm=0.5)
GLOBAL_BATCH, STEPS, HALF = 8, 4, 2
AT_ONCE = 32  # elements of a reduction when state is gathered, of the 106 there are
COLLECTIVES = (
    "all_reduce", "reduce", "reduce_scatter", "reduce_scatter_tensor", "reduce_scatter_single", "_reduce_scatter_base",
    "all_gather", "all_gather_into_tensor", "all_gather_single", "_all_gather_base", "broadcast",
)  # fmt: skip
called: list[tuple[str, int]] = []  # collectives and the elements they moved
Engine = PlainEngine | ZeroEngine | Fsdp2Engine


@dataclass(frozen=True)
class Case:
    """One training of a few steps, on so many ranks."""

    name: str
    kind: str
    ranks: int
    micro_batch: int
    shard_ranks: int | None = None
    zero: dict[str, int] | None = None  # what goes before the kind's own DeepSpeed JSON
    resume: str | None = None  # the case whose half-way state it starts from
    poisons: str | None = None  # in step 1: this value in one gradient element of the last rank; step 2 is skipped


class Network(nn.Module):
    """A frozen layer with an adapter beside it, a head and a shift; few of the sizes divide by a number of ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.down, self.up = nn.Linear(5, 16), nn.Linear(5, 3, bias=False), nn.Linear(3, 16, bias=False)
        self.head, self.token = nn.Linear(16, 2), nn.Parameter(torch.empty(1, 5))
        self.unused = nn.Linear(3, 3, bias=False)  # trains, but no loss reaches it
        generator = torch.Generator().manual_seed(3)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.4, generator=generator)
        self.unused.weight.data[1] = -0.0  # decays to -0.0, whose sign is all there is to lose
        self.base.requires_grad_(False)
        self.token.requires_grad_(False)

    def forward(self, x_BD: Tensor) -> Tensor:
        return self.head(nn.functional.silu(self.base(x_BD) + self.up(self.down(x_BD))))


def run_case(case: Case, rank: int, folder: Path) -> None:
    """Train as one rank, and write down what was computed."""
    network = Network()
    engine = make_engine(case, network)
    if case.resume is not None:
        engine.scatter(read_state(folder / f"{case.resume}.half.safetensors"), HALF)
    losses, norms, collectives, still, half = [], [], [], [], None
    phases: list[dict[str, list[tuple[str, int]]]] = []  # of each step, with the collectives in them
    for step in range(0 if case.resume is None else HALF, STEPS):
        before = look(engine, network)
        called.clear()
        losses.append(accumulate(case, engine, network, step, rank))
        phases.append({})

        @contextlib.contextmanager
        def timing(phase: str, begun: dict[str, list[tuple[str, int]]] = phases[-1]) -> Iterator[None]:
            before = len(called)
            yield
            begun[phase] = called[before:]

        norms.append(engine.step(0.02 / (1 + step), case.poisons is not None and step == 2, timing))
        collectives.append(called[:])
        still.append(look(engine, network) == before)
        half = engine.gather() if step == HALF - 1 else half
    called.clear()
    end = engine.gather()
    collectives.append(called[:])
    report = {
        "losses": losses, "norms": norms, "updates": engine.updates, "collectives": collectives, "still": still,
        "phases": phases, "gathered": [*end], "agrees": agrees(engine, end),
    }  # fmt: skip
    (folder / f"{case.name}.{rank}.json").write_text(json.dumps(report))
    for name, state in (
        ("half", half),
        ("end", end),
    ):  # the first only now: what is gathered must not follow the training
        if state:
            flat = {f"{parameter}/{key}": tensor for parameter, saved in state.items() for key, tensor in saved.items()}
            save_file(flat, folder / f"{case.name}.{name}.safetensors")
    engine.close()


def make_engine(case: Case, network: Network) -> Engine:
    adapter = {name: p for name, p in network.named_parameters() if p.requires_grad}
    accumulation = GLOBAL_BATCH // case.micro_batch // case.ranks
    if case.kind == "plain":
        return PlainEngine(adapter, ADAM, accumulation)
    if case.kind == "fsdp2":
        return Fsdp2Engine(network, adapter, ADAM, accumulation, case.shard_ranks)
    settings = json.loads((ROOT / f"ds_configs/{case.kind}.json").read_text())
    settings["zero_optimization"] |= case.zero or {}
    return ZeroEngine(network, adapter, ADAM, accumulation, case.micro_batch, settings)


def accumulate(case: Case, engine: Engine, network: Network, step: int, rank: int) -> float:
    """Bring this rank's share of a batch to the engine; returns the loss of the whole batch."""
    batch_BD = torch.randn(GLOBAL_BATCH, 5, generator=torch.Generator().manual_seed(step))
    total = torch.zeros((), dtype=torch.float64)
    for own_BD in batch_BD.split(case.micro_batch)[rank :: case.ranks]:
        output = network(own_BD + network.token)  # read before the forward pass, as a mask token is
        if case.poisons is not None and step == 1 and rank == case.ranks - 1:
            output.register_hook(lambda g: g.index_fill(1, torch.tensor([0]), float(case.poisons or 0)))
        loss = (output - own_BD[:, :2]).square().mean()
        engine.backward(loss)
        total += loss.detach() * len(own_BD) / GLOBAL_BATCH
    dist.all_reduce(total)
    return total.item()


def look(engine: Engine, network: Network) -> list[bytes]:
    """All bits that a step changes on this rank: its masters, moments, Adam's own counts, and what the network computes."""
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    with torch.no_grad():
        output = network(torch.ones(1, 5) + network.token)
    own = [tensor for master, saved in optimizer.state.items() for tensor in (master, *saved.values())]
    return [tensor.detach().numpy().tobytes() for tensor in (*own, output)]


def agrees(engine: Engine, state: State) -> bool:
    """Whether DeepSpeed's own functions, of one collective per tensor, gather the bits that the main rank has."""
    if not isinstance(engine, ZeroEngine):
        return True
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    for name, parameter in engine.parameters.items():
        own = [safe_get_full_fp32_param(parameter)]
        own += [safe_get_full_optimizer_state(parameter, key) for key in STATE_KEYS[1:]]
        if state and not all(torch.equal(state[name][key], t) for key, t in zip(STATE_KEYS, own, strict=True)):
            return False
    return True


def read_state(path: Path) -> State:
    """Read a gathered state back."""
    state: State = {}
    for full_name, tensor in load_file(path).items():
        name, key = full_name.rsplit("/", 1)
        state.setdefault(name, {})[key] = tensor
    return state


def count(name: str) -> None:
    """Note each call of a collective; before DeepSpeed is imported, which takes its own references."""
    function = getattr(dist, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        called.append((name, max(t.numel() for t in (*args, *kwargs.values()) if isinstance(t, Tensor))))
        return function(*args, **kwargs)

    setattr(dist, name, counted)


def fork_rank(case: Case, rank: int, folder: Path) -> int:
    """Start a rank in a process of its own; returns its id."""
    process = os.fork()
    if process:
        return process
    code = 1
    faulthandler.dump_traceback_later(120, exit=True)  # two seconds are usual; nothing else ends a rank that hangs
    try:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(case.ranks)}
        store = dist.FileStore(str(folder / f"{case.name}.store"), case.ranks)
        timeout = timedelta(seconds=60)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=case.ranks, timeout=timeout)
        run_case(case, rank, folder)
        code = 0
    except Exception:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def main(folder: Path, cases: list[Case]) -> None:
    pieces.AT_ONCE = AT_ONCE
    for name in COLLECTIVES:
        if hasattr(dist, name):
            count(name)
    import deepspeed.runtime.zero.stage3
    import deepspeed.runtime.zero.stage_1_and_2  # noqa: F401

    for case in cases:
        processes = [fork_rank(case, rank, folder) for rank in range(case.ranks)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
        if any(codes):
            sys.exit(f"{case}: ranks ended with {codes}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Case(**case) for case in json.loads(sys.argv[2])])
