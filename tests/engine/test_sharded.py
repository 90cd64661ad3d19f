"""Every engine is the plain one, on any number of ranks. Run: pytest tests/engine/test_sharded.py

A small network on the engines alone (ranks.py). Figures in comments are measured: two cores, torch 2.13, DeepSpeed 0.19.
"""

import json
import math
import os
import subprocess
import sys
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.engine.ranks import AT_ONCE, HALF, STEPS, Case

pytestmark = pytest.mark.launch
KINDS = ("zero1", "zero2", "zero2_offload", "zero3", "fsdp2")
TRAINABLE = 97
# ZeRO-3 as a large model has it: by default so small a network is fetched once a step and kept
RELEASED = {
    "stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0,
}  # fmt: skip

# eight clips a step: as 1 x 8, 2 x 4 and 8 x 1 micro-batches, on one, two and four ranks
SAME_BATCH = [
    *(Case(f"plain_{micro}", "plain", 1, micro) for micro in (1, 2, 8)),
    *(Case(f"{kind}_1", kind, 1, 8) for kind in KINDS),
    *(Case(f"{kind}_2", kind, 2, 1) for kind in KINDS),
    *(Case(f"{kind}_4", kind, 4, 1) for kind in KINDS),
    Case("released_2", "zero3", 2, 1, zero=RELEASED),
    Case("hsdp_4", "fsdp2", 4, 2, shard_ranks=2),
    Case("copies_2", "fsdp2", 2, 4, shard_ranks=1),
]
POISONED = [Case("plain_nan", "plain", 1, 1, poisons="nan"), *(Case(f"{k}_nan", k, 2, 1, poisons="nan") for k in KINDS)]
RESUMED = [
    *(Case(f"{kind}_again", kind, 2, 1, resume=f"{kind}_2") for kind in KINDS),
    Case("released_again", "zero3", 2, 1, zero=RELEASED, resume="released_2"),
]
MOVED = [
    Case("plain_to_zero2", "zero2", 2, 1, resume="plain_1"),
    Case("zero2_to_zero3", "zero3", 1, 4, resume="zero2_2"),
    Case("zero3_to_fsdp2", "fsdp2", 2, 2, resume="zero3_4"),
    Case("fsdp2_to_hsdp", "fsdp2", 4, 1, shard_ranks=2, resume="fsdp2_2"),
    Case("hsdp_to_offload", "zero2_offload", 2, 2, resume="hsdp_4"),
    Case("offload_to_zero1", "zero1", 1, 2, resume="zero2_offload_2"),
    Case("zero1_to_plain", "plain", 1, 4, resume="zero1_2"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What all cases wrote."""
    folder = tmp_path_factory.mktemp("ranks")
    cases = [asdict(case) for case in (*SAME_BATCH, *POISONED, *RESUMED, *MOVED)]
    command = [sys.executable, str(Path(__file__).with_name("ranks.py")), str(folder), json.dumps(cases)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    return folder


def read(folder: Path, case: Case | str, rank: int = 0) -> dict[str, Any]:
    """What one rank of a case reported."""
    return json.loads((folder / f"{case if isinstance(case, str) else case.name}.{rank}.json").read_text())


def end_state(folder: Path, case: Case | str) -> dict[str, Tensor]:
    """What the main rank of a case gathered at its end."""
    return load_file(folder / f"{case if isinstance(case, str) else case.name}.end.safetensors")


def assert_near(folder: Path, case: Case, reference: str) -> None:
    """Losses within 1e-6, norms within 1e-5 on every rank; masters and moments within 1e-6 of their largest element."""
    wanted = read(folder, reference)
    for rank in range(case.ranks):
        report = read(folder, case, rank)
        assert report["updates"] == wanted["updates"]
        for key, within in (("losses", 1e-6), ("norms", 1e-5)):  # measured: 9e-8 and 2e-7
            mine, other = ([x if math.isfinite(x) else math.nan for x in r[key]] for r in (report, wanted))
            assert mine == pytest.approx(other[-len(mine) :], rel=within, nan_ok=True), key
    state, wanted_state = end_state(folder, case), end_state(folder, reference)
    assert state.keys() == wanted_state.keys()
    for name, tensor in state.items():
        bound = 1e-6 * wanted_state[name].abs().max().item()  # measured: 2e-7
        assert (tensor - wanted_state[name]).abs().max().item() <= bound, name


@pytest.mark.parametrize("case", SAME_BATCH[1:], ids=lambda case: case.name)
def test_every_engine_computes_what_plain_computes(folder: Path, case: Case) -> None:
    """The same eight clips a step, however they are cut: the losses, norms, masters and moments of one plain process."""
    assert_near(folder, case, "plain_1")


@pytest.mark.parametrize("case", RESUMED, ids=lambda case: case.name)
def test_scattered_state_goes_on_bit_equally(folder: Path, case: Case) -> None:
    """Gathered after two steps and scattered into a fresh engine of as many ranks: the bits of four steps in one go."""
    assert case.resume is not None
    for rank in range(case.ranks):
        resumed, whole = read(folder, case, rank), read(folder, case.resume, rank)
        assert resumed["losses"] == whole["losses"][HALF:] and resumed["norms"] == whole["norms"][HALF:]
        assert resumed["updates"] == STEPS
    state, wanted = end_state(folder, case), end_state(folder, case.resume)
    assert all(torch.equal(state[name].view(torch.int32), wanted[name].view(torch.int32)) for name in wanted)


@pytest.mark.parametrize("case", MOVED, ids=lambda case: case.name)
def test_state_moves_between_engines_and_worlds(folder: Path, case: Case) -> None:
    """Gathered on one engine, scattered into another on another number of ranks: it goes on as plain would."""
    assert_near(folder, case, "plain_1")


@pytest.mark.parametrize("case", POISONED, ids=lambda case: case.kind)
def test_non_finite_gradient_changes_nothing_on_any_rank(folder: Path, case: Case) -> None:
    """One NaN on one rank in step 1, a skip in step 2: no bit of state or output moves on any rank, and step 3 is clean."""
    assert_near(folder, case, "plain_nan")
    for rank in range(case.ranks):
        report = read(folder, case, rank)
        assert report["still"] == [False, True, True, False] and report["updates"] == 2
        assert [math.isfinite(norm) for norm in report["norms"]] == [True, False, False, True]


@pytest.mark.parametrize("case", [c for c in SAME_BATCH if c.ranks > 1], ids=lambda case: case.name)
def test_one_gradient_reduction_per_step(folder: Path, case: Case) -> None:
    """Whatever the accumulation: all gradients at once. HSDP scatters the sum in a shard, then adds its copies up."""
    for step in read(folder, case)["collectives"][:-1]:
        sizes = [size for name, size in step if "reduce" in name and size > 1]  # one element: the loss, and the norm
        assert len(sizes) == 1 + (case.name == "hsdp_4") and sizes[0] >= TRAINABLE, step


@pytest.mark.parametrize("case", [c for c in SAME_BATCH if c.ranks > 1], ids=lambda case: case.name)
def test_the_reduction_is_timed_apart(folder: Path, case: Case) -> None:
    """From the optimizer, on every rank; that of fsdp2 is in its last backward pass, before the step."""
    for rank, step in product(range(case.ranks), range(STEPS)):
        phases = read(folder, case, rank)["phases"][step]
        assert [*phases] == (["optimizer"] if case.kind == "fsdp2" else ["reduce", "optimizer"])
        big = {phase: [size for kind, size in own if "reduce" in kind and size > 1] for phase, own in phases.items()}
        assert [min(sizes) >= TRAINABLE for phase, sizes in big.items() if sizes] == [True] * (case.kind != "fsdp2")
        assert big["optimizer"] == []


@pytest.mark.parametrize("case", SAME_BATCH, ids=lambda case: case.name)
def test_gather_brings_all_to_the_main_rank_alone(folder: Path, case: Case) -> None:
    """By as few collectives as their size allows, however many tensors they are; the bits are those of DeepSpeed's own."""
    for rank in range(case.ranks):
        report = read(folder, case, rank)
        assert bool(report["gathered"]) == (rank == 0) and report["agrees"]
    moved = [size for _, size in read(folder, case)["collectives"][-1]]
    elements = sum(tensor.numel() for tensor in end_state(folder, case).values()) // 3
    assert moved == ([] if case.kind == "plain" else [*[AT_ONCE] * (elements // AT_ONCE), elements % AT_ONCE] * 3)


@pytest.mark.parametrize("case", SAME_BATCH, ids=lambda case: case.name)
def test_gather_keeps_the_sign_of_zero(folder: Path, case: Case) -> None:
    """A row of -0.0, which decay leaves as it is: -0.0 after four steps."""
    row = end_state(folder, case)["unused.weight/master"][1]
    assert torch.equal(row.view(torch.int32), torch.full((3,), -0.0).view(torch.int32))


def test_released_weights_are_fetched_for_each_use(folder: Path) -> None:
    """ZeRO-3 that may keep none gathers the frozen layer in each micro-batch: the case above is what it is called."""
    frozen = 5 * 16 + 16
    kept, released = (
        [[size for kind, size in step if "gather" in kind].count(frozen) for step in read(folder, name)["collectives"]]
        for name in ("zero3_2", "released_2")
    )
    assert released[1:-1] == [4, 4, 4] and kept[1:-1] == [0, 0, 0], (kept, released)
