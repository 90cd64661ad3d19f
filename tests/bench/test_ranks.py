"""What is measured on several ranks, and the scaling tables after it. Run: pytest tests/bench/test_ranks.py"""

import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional

from tests.launching import ROOT
from toolkit.bench.checkpoint import bench_checkpoint
from toolkit.bench.engine import bench_engine
from toolkit.bench.reduction import Collectives, bench_reduction, summarise
from toolkit.bench.scaling import ETHERNET, INFINIBAND, NVLINK, TRAINABLE, bench_scaling, communication_s
from toolkit.engine.world import init_world

DOC = (ROOT / "docs/SCALING.md").read_text()


@pytest.fixture(scope="module")
def reduction() -> dict[str, Any]:
    """The smallest measurement: the published matrices at rank 2, two ranks, one timed step."""
    return bench_reduction(ranks=2, lora_rank=2, rounds=1)


def calls(reduction: dict[str, Any], engine: str) -> dict[str, tuple[int, float]]:
    """{kind: (calls, bytes)} of an engine's step."""
    return {kind: (n, round(mb * 1e6)) for kind, (n, mb) in reduction["engines"][engine]["calls"].items()}


@pytest.mark.launch
def test_every_engine_takes_the_same_steps(reduction: dict[str, Any]) -> None:
    """After the same micro-batches all fp32 engines and DeepSpeed's default have the same loss; so the costs compare."""
    losses = {name: row["loss"] for name, row in reduction["engines"].items()}
    bf16 = losses.pop("deepspeed_default_bf16")
    assert set(losses) == {"zero1", "zero2", "zero2_offload", "zero3", "fsdp2", "deepspeed_default"}
    assert list(losses.values()) == pytest.approx([losses["zero2"]] * len(losses), rel=1e-5)
    assert bf16 == pytest.approx(losses["zero2"], rel=0.05)
    assert all(row["step_ms"] > 0 and row["ratio"] > 0 for row in reduction["engines"].values())


@pytest.mark.launch
def test_a_step_reduces_once_and_deepspeeds_default_at_every_micro_batch(reduction: dict[str, Any]) -> None:
    """zero2: gradients once, weights once, a norm. The default: gradients four times. fsdp2: one part of them once."""
    whole = 4 * reduction["trainable"]
    assert reduction["trainable"] == TRAINABLE // 32 and reduction["accumulation"] == 4
    for engine in ("zero1", "zero2", "zero2_offload"):
        assert calls(reduction, engine) == {"all_reduce": (2, whole + 4), "all_gather": (1, whole)}
    assert calls(reduction, "deepspeed_default") == {"all_reduce": (5, 4 * whole + 4), "all_gather": (1, whole)}
    assert calls(reduction, "fsdp2") == {"all_gather": (1, whole), "reduce_scatter": (1, whole), "all_reduce": (1, 4)}
    assert calls(reduction, "zero3") == {"all_gather": (1, whole), "reduce_scatter": (1, whole), "all_reduce": (1, 8)}
    rows = reduction["engines"]
    assert all(
        rows[engine]["small"] == 1 for engine in ("zero1", "zero2", "zero2_offload", "fsdp2", "deepspeed_default")
    )
    assert rows["zero2"]["collectives"] == 3 and rows["deepspeed_default"]["collectives"] == 6


@pytest.mark.launch
def test_the_model_sends_what_was_counted(reduction: dict[str, Any]) -> None:
    """Without latency, the modelled time is a rank's counted megabytes over the bandwidth, for one reduction and four."""
    for engine, reductions in (("zero2", 1), ("deepspeed_default", 4)):
        counted_bytes = reduction["engines"][engine]["sent_mb"] * 1e6 * TRAINABLE / reduction["trainable"]
        hops_s = (2 * reductions + 1) * NVLINK.hop_s + 2 * 2 * NVLINK.hop_s
        modelled_bytes = (communication_s(2, None, reductions) - hops_s) * NVLINK.bytes_per_s
        assert modelled_bytes == pytest.approx(counted_bytes, rel=1e-4)


@pytest.mark.launch
def test_engines_are_timed_at_the_same_steps() -> None:
    """After the same micro-batches a plain loop, DDP and ZeRO-2 used both ways have the same loss; so the times compare."""
    report = bench_engine(lora_rank=2, rounds=2)
    losses = report.pop("loss")
    assert losses.keys() == {"plain", "zero2_ours", "zero2_default", "ddp"}
    assert list(losses.values()) == pytest.approx([losses["plain"]] * 4, rel=1e-5)
    assert report.keys() == {"plain_ms", "zero2_ours", "zero2_default", "ddp"} and min(report.values()) > 0


@pytest.mark.launch
def test_a_checkpoint_is_measured_beside_deepspeeds() -> None:
    """Both sides come back to the bit, in 16 bytes a parameter, and every figure promised is there."""
    report = bench_checkpoint(lora_rank=2, rounds=1)
    assert set(report) == {"trainable", "step_s", "interval", "ours", "deepspeed"}
    for side in (report["ours"], report["deepspeed"]):
        assert side["exact"] is True and side["resume_s"] > 0
        assert side["size_mb"] == pytest.approx(16 * report["trainable"] / 1e6, rel=0.05)
        assert side["stall_percent"] == pytest.approx(side["stall_s"] / report["step_s"])  # of a hundred steps
    assert report["ours"]["background_s"] > 0 == report["deepspeed"]["background_s"]


@pytest.fixture
def group() -> Iterator[None]:
    init_world()
    yield
    dist.destroy_process_group()


def test_collectives_are_counted_however_they_are_called(group: None) -> None:
    """torch.distributed's calls and the functional ones, in bytes by dtype; arithmetic and waiting are none."""
    with Collectives() as collectives:
        tensor = torch.ones(10, dtype=torch.float64) + 1
        dist.all_reduce(tensor)
        dist.all_gather_into_tensor(torch.empty(6, dtype=torch.bfloat16), torch.ones(6, dtype=torch.bfloat16))
        dist.all_gather([torch.empty(3)], torch.ones(3))
        dist.broadcast(torch.ones(5, dtype=torch.int8), 0)
        dist.reduce(torch.ones(2), 0)
        functional.all_reduce(torch.ones(7), "sum", dist.group.WORLD).wait()
        dist.barrier()
    kinds = [kind for kind, _ in collectives.seen]
    assert kinds == ["all_reduce", "all_gather", "all_gather", "broadcast", "reduce", "all_reduce", "barrier"]
    assert [size for _, size in collectives.seen][:6] == [80, 12, 12, 5, 8, 28]


def test_a_ring_sends_what_the_textbook_says() -> None:
    """Four ranks: an all-reduce sends 2 x 3/4 of the whole, an all-gather and a reduce-scatter 3/4."""
    row = summarise([("all_reduce", 4_000_000), ("all_gather", 4_000_000), ("reduce_scatter", 4_000_000)], 4)
    assert row["sent_mb"] == 6 + 3 + 3 and row["collectives"] == 3 and row["small"] == 0
    assert summarise([("all_reduce", 8), ("barrier", 0)], 4)["small"] == 2


def test_the_model_by_hand() -> None:
    """Nothing alone; one node is its ring; 16 nodes add a ring between them; a slower network costs more."""
    whole = 4 * TRAINABLE
    inside_s = 3 * (7 / 8 * whole / 300e9 + 7 * 3e-6) + 2 * 2 * 3 * 3e-6
    between_s = 3 * (15 / 16 * whole / 12.5e9 + 15 * 10e-6) + 2 * 2 * 4 * 10e-6
    assert communication_s(1, ETHERNET) == communication_s(1, None) == 0
    assert communication_s(8, ETHERNET) == communication_s(8, None) == pytest.approx(inside_s)
    assert communication_s(128, ETHERNET) == pytest.approx(inside_s + between_s)
    assert communication_s(128, INFINIBAND) < communication_s(128, ETHERNET) < communication_s(128, ETHERNET, 8)


def test_efficiency_is_clips_per_second_and_gpu_against_one() -> None:
    """At the recipe's batch and at a growing one, from the step's time alone."""
    report = bench_scaling(micro_step_s=0.02, optimizer_s=0.005)
    for table, alone_s in (("recipe", 8 * 0.02 + 0.005), ("growing_8", 8 * 0.02 + 0.005), ("growing_1", 0.025)):
        clips_per_s = report[table][0]["clips"] / alone_s
        for row in report[table]:
            assert row["accumulation"] * row["gpus"] == row["clips"]
            for figures in row["networks"].values():
                assert figures["efficiency"] == pytest.approx(
                    row["clips"] / figures["step_s"] / row["gpus"] / clips_per_s
                )
        assert all(figures["efficiency"] == 1 for figures in report[table][0]["networks"].values())
    assert [row["gpus"] for row in report["growing_1"]] == [2**i for i in range(11)]


@pytest.mark.parametrize("command", re.findall(r"^    python (launch/bench.py scaling.*)$", DOC, re.MULTILINE))
def test_the_document_holds_what_the_command_prints(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each command of docs/SCALING.md is followed by its own output, to the letter."""
    program, *flags = shlex.split(command)
    monkeypatch.setattr(sys, "argv", [program, *flags])
    runpy.run_path(str(ROOT / program), run_name="__main__")
    assert f"    python {command}\n\n{capsys.readouterr().out}" in DOC


def test_the_document_has_both_cases() -> None:
    """The published time and a short one."""
    assert len(re.findall(r"^    python launch/bench.py scaling", DOC, re.MULTILINE)) == 2


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["scaling", "--micro_step_s", "-1"], "seconds above 0"),
        (["scaling", "--micro_step", "1"], "give --micro_step_s, --optimizer_s"),
        (["reduction", "--ranks", "many"], "--ranks is 'many'"),
        (["reduction", "--ranks", "0"], "--ranks is 0"),
        (["checkpoint", "--config", "launch/recipes/tiny_cpu.yaml"], "takes no recipe"),
    ],
)
def test_a_wrong_flag_is_one_line(
    flags: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before any rank is started."""
    monkeypatch.setattr(sys, "argv", ["launch/bench.py", *flags])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "launch/bench.py"), run_name="__main__")
    error = capsys.readouterr().err
    assert ended.value.code == 2 and words in error and error.count("\n") == 1
