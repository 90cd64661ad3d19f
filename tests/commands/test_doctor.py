"""The spec's run, looked over without weights: the spec's figures come out. Run: pytest tests/commands/test_doctor.py"""

import json
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.launching import RECIPE, ROOT, TINY, run
from toolkit.commands.doctor import examine
from toolkit.config import load_config
from toolkit.errors import UserError
from toolkit.model.sources import TINY_FOLDER
from toolkit.model.tiny import build_unet
from toolkit.run.cache import cache_shards
from toolkit.run.memory import predict_bytes

SPEC = ROOT / "launch/recipes/sign_576.yaml"


@pytest.mark.launch
@pytest.mark.parametrize(
    ("flags", "modules", "parameters", "dead", "megabytes"),
    [
        ((), 128, 13_279_232, 32, 53.1),
        (("--lora.targets", "all"), 256, 26_558_464, 96, 106.2),
        (
            ("--lora.targets", "[to_q,to_k,to_v,to_out.0,ff.net.0.proj,ff.net.2,proj_in,proj_out]",
             "--diffusion.layout", "middle_in_clip", "--diffusion.clip_tokens", "first_last"),
            352, 52_117_504, 0, 208.5,
        ),
    ],
)  # fmt: skip
def test_doctor_counts_the_specs_adapter(
    flags: tuple[str, ...], modules: int, parameters: int, dead: int, megabytes: float
) -> None:
    """The published counts on a base of 1.52 billion, and how many modules cannot learn; stdout is JSON and nothing else."""
    done = run([sys.executable, "launch/doctor.py", "--config", "launch/recipes/sign_576.yaml", *flags, "--json"])
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["lora_modules"], report["lora_params"]) == (modules, parameters)
    assert (report["base_params"], report["adapter_mb_fp32"]) == (1_524_625_966, megabytes)
    assert (report["dead_modules"], report["accumulation"]) == (dead, 8)


def test_doctor_refuses_what_the_run_would_refuse() -> None:
    """A batch that the ranks cannot share, and a DeepSpeed file that is not there."""
    with pytest.raises(UserError, match="global batch of 4 .* 3 ranks"):
        examine(load_config(RECIPE, {"engine.micro_batch": 1}), ranks=3)
    for engine, ranks, message in (
        ({"deepspeed": "nowhere.json"}, 1, "cannot read engine.deepspeed nowhere.json"),
        ({"kind": "plain"}, 2, "engine.kind plain runs one process, not 2"),
        (
            {"kind": "fsdp2", "deepspeed": "mine.json"},
            2,
            "is mine.json, but engine.kind fsdp2 is not DeepSpeed; take it out",
        ),
        (
            {"kind": "fsdp2", "shard_ranks": 2, "micro_batch": 1},
            1,
            "shard_ranks is 2, .*divide the ranks.* with 1 ranks",
        ),
        ({"shard_ranks": 2}, 2, "for engine.kind fsdp2 .* the kind is zero2"),
    ):
        with pytest.raises(UserError, match=message):
            examine(load_config(RECIPE, {f"engine.{key}": value for key, value in engine.items()}), ranks)


def test_doctor_refuses_looks_and_caches_as_the_run_would(tiny_shards: Path, tiny_base: Path, tmp_path: Path) -> None:
    """No clips held out, a gap that none fills, weights of LPIPS that are not there, latents of another size."""
    alone, cached = (tmp_path / name for name in ("alone", "cached"))
    shutil.copytree(tiny_shards, alone, ignore=shutil.ignore_patterns("val-*"))
    cache_shards(str(tiny_shards), str(tiny_base), str(cached), height=32, width=32)
    ours = TINY | {"model.base": str(tiny_base), "data.shards": str(tiny_shards)}
    figures = {"validation.figures_every_steps": 1, "data.height": 64, "data.width": 64}
    for changes, message in (
        ({"data.shards": str(alone), "validation.every_steps": 1}, "val"),
        (figures | {"validation.gaps": [1000]}, "no held-out clip .* a gap of 1000 source frames"),
        (figures | {"validation.lpips": "nowhere"}, "cannot read LPIPS weights from nowhere"),
        ({"data.shards": str(cached), "data.height": 64}, "cached otherwise .data.height is 64, was 32"),
    ):
        with pytest.raises(UserError, match=message):
            examine(load_config(RECIPE, ours | changes), ranks=1)
    for changes in ({"data.shards": str(alone)}, {"data.shards": str(cached), "validation.every_steps": 1}):
        examine(load_config(RECIPE, ours | changes), ranks=1)


@pytest.mark.launch
@pytest.mark.parametrize(
    ("changes", "differs"),
    [({"lora.rank": 8, "lora.alpha": 8}, "in rank: "), ({"lora.dora": True}, "in lora.dora: it has False"),
     ({"lora.targets": "spatial"}, "in modules: "), ({}, "")],
)  # fmt: skip
def test_doctor_refuses_an_adapter_that_a_run_cannot_start_from(
    reference_run: Path, changes: dict[str, Any], differs: str
) -> None:
    """Of another rank, kind or place: told before the base's weights are read, and before a job waits in a queue."""
    recipe = load_config(
        reference_run / "config.yaml", {"name": "next", "lora.init_from": str(reference_run)} | changes
    )
    with pytest.raises(UserError, match=f"lora.init_from .* differs {differs}") if differs else nullcontext():
        examine(recipe, ranks=1)


def test_doctor_says_how_the_batch_is_cut() -> None:
    """Global batch, micro-batch, ranks, accumulation, and every other number of ranks that the run could have."""
    keys = ("engine", "global_batch", "micro_batch", "ranks", "accumulation", "possible_ranks")
    for changes, ranks, wanted in (
        ({}, 2, ["zero2", 12, 2, 2, 3, [1, 2, 3, 6]]),
        ({"engine.kind": "fsdp2", "engine.shard_ranks": 2}, 6, ["fsdp2", 12, 2, 6, 1, [2, 6]]),
        ({"engine.kind": "plain"}, 1, ["plain", 12, 2, 1, 6, [1]]),
    ):
        report = examine(load_config(RECIPE, {"engine.global_batch": 12, "engine.micro_batch": 2} | changes), ranks)
        assert [report[key] for key in keys] == wanted
        for fitting in report["possible_ranks"]:
            examine(load_config(RECIPE, {"engine.global_batch": 12, "engine.micro_batch": 2} | changes), fitting)


def test_doctor_refuses_a_wrong_objective() -> None:
    """A v base scored as if its raw output were epsilon; what the base says is named, and what to take instead."""
    with pytest.raises(UserError, match="parameterization is epsilon, but the base's scheduler says v.*take auto"):
        examine(load_config(SPEC, {"diffusion.parameterization": "epsilon"}), ranks=1)


def test_doctor_notes_what_is_probably_not_meant() -> None:
    """A warmup that outlasts the run, or most of it; one token; temporal layers on one frame; a mask token unseen."""
    changes = {
        "schedule.steps": 5, "schedule.warmup_steps": 5, "diffusion.clip_tokens": "first", "lora.targets": "all",
        "diffusion.layout": "spec_middle",
        "lora.extra_trainable": ["conv_in", "mask_token"],
    }  # fmt: skip
    report = examine(load_config(RECIPE, changes), ranks=2)
    notes = " ".join(report["notes"])
    assert "never reaches its peak" in notes and "mask_token cannot learn" in notes
    assert "cross-attention Q and K such as" in notes and "clip_tokens is first, one token" in notes
    assert "temporal self-attention Q and K such as" in notes and "spec_middle, one frame" in notes
    assert report["extra_params"] == 9 * 96 * 9 + 96 + 4  # conv_in of 96 channels, and the mask token
    svd = {"model.base": "svd-xt", "model.attention": "auto", "diffusion.layout": "framer_clip"}
    for extras, said in (([], True), (["conv_in", "mask_token"], False)):
        eight = examine(load_config(SPEC, svd | {"lora.extra_trainable": extras}), ranks=1)["notes"]
        assert any("reads eight channels" in note for note in eight) == said
    late = examine(load_config(RECIPE, {"schedule.steps": 10, "schedule.warmup_steps": 4}), ranks=2)
    assert any("4 of 10 steps" in note for note in late["notes"])
    offload = examine(load_config(RECIPE, {"engine.kind": "zero2_offload", "lora.rank": 1024}), ranks=2)
    moved_gb = 12 * (offload["lora_params"] + offload["extra_params"]) / 1e9
    assert any(f"zero2_offload moves {moved_gb:.2f} GB" in note for note in offload["notes"]) and moved_gb > 0.02
    fine = examine(load_config(RECIPE, {"schedule.steps": 100, "diffusion.layout": "middle_in_clip"}), ranks=2)
    assert fine["dead_modules"] == 0
    for note in fine["notes"]:
        assert "is not on this machine" in note


def test_doctor_counts_a_base_by_its_own_files(tmp_path: Path) -> None:
    """Whether it is named or given by its folder; and what encodes clips counts where they are no latents yet."""
    named, given = (examine(load_config(RECIPE, {"model.base": base}), ranks=1) for base in ("tiny", str(TINY_FOLDER)))
    assert named["step_gb"] == given["step_gb"]
    assert named["step_gb"]["fast"] > 0.1  # with two pixels to a latent; with eight 0.02
    assert named["encoders_gb"] == given["encoders_gb"] > 0


@pytest.mark.parametrize(("part", "frozen"), [("all", 0), (r".*\.attn1\..*", None)])
def test_doctor_counts_what_trains_once(part: str, frozen: int | None) -> None:
    """Weights that train are not among those that are frozen."""
    changes = {"tuning": "full", "full.parameters": part, "engine.precision": "fp32"}
    report = examine(load_config(RECIPE, changes), 1)
    left = report["base_params"] - report["extra_params"]
    assert (left == frozen) if frozen is not None else 0 < left < report["base_params"]
    assert report["weights_gb"] == pytest.approx(4 * left / 1e9, abs=0.005)


def test_a_mask_token_alone_trains_where_it_enters() -> None:
    """Its gradient goes through the whole network, so that a step takes what LoRA leaves of it; elsewhere it is refused."""
    alone = {"tuning": "full", "full.parameters": "mask_token", "data.frames": 3}
    clip, middle = (load_config(RECIPE, alone | {"diffusion.layout": name}) for name in ("framer_clip", "spec_middle"))
    whole = load_config(RECIPE, {"data.frames": 3, "diffusion.layout": "framer_clip", "model.blocks": "stock"})
    taken = [predict_bytes(config, build_unet().config, 2, "fast", 1) for config in (clip, whole)]
    assert taken[1] / 2 < taken[0] < taken[1] and examine(clip, 1)["extra_params"] == 4
    with pytest.raises(
        UserError, match="full.parameters is mask_token, .* never enters the network in layout spec_middle"
    ):
        examine(middle, 1)


def test_doctor_says_what_keeps_steps_from_being_replayed() -> None:
    """Which a recipe may ask for on a machine without a GPU."""
    for changes, reason in (({}, None), ({"lora.dora": True}, "lora.dora"), ({"model.cuda_graphs": False}, None),
                            ({"lora.extra_trainable": ["mask_token"]}, "lora.extra_trainable mask_token")):  # fmt: skip
        notes = examine(load_config(RECIPE, changes), ranks=1)["notes"]
        assert [note.split(" keeps")[0] for note in notes if "CUDA graphs" in note] == [reason] * (reason is not None)


def test_doctor_looks_local_weights_over(tiny_base: Path, tmp_path: Path) -> None:
    """A base on this machine is checked by its files: what a run would refuse is refused here, nothing else is said."""
    folder = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    ours = {"model.base": str(folder), "schedule.steps": 100, "diffusion.layout": "middle_in_clip"}

    def notes(**changes: Any) -> list[str]:
        return examine(load_config(RECIPE, ours | changes), ranks=2)["notes"]

    assert all("is not on this machine, so clips" in note for note in notes())
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    tensors = load_file(weights)
    save_file({name: t for name, t in tensors.items() if name != "mask_token"}, weights)
    with pytest.raises(UserError, match="missing keys: mask_token"):
        notes()
    weights.write_bytes(whole[:-1])
    with pytest.raises(UserError, match="cut, damaged or no safetensors file"):
        notes()
    weights.write_bytes(whole)
    for changes, message in (
        ({"lora.init_from": "nowhere"}, "no adapter at nowhere"),
        ({"model.controlnet": "./nowhere", "diffusion.control": True}, "no ControlNet at ./nowhere"),
        ({"model.unet": "./nowhere"}, "no base model at ./nowhere"),
    ):
        with pytest.raises(UserError, match=message):
            notes(**changes)
    hub = examine(load_config(SPEC, {"model.attention": "auto"}), ranks=1)["notes"]
    both = "stabilityai/stable-video-diffusion-img2vid-xt, wwen1997/framer_512x320"
    assert f"not on this machine, so their weights are not checked: {both}" in hub
    assert "not on this machine, so their weights are not checked: signer/signs@main" in notes(
        **{"lora.init_from": "signer/signs@main"}
    )
    with pytest.raises(UserError, match="no base model at ./nowhere"):  # another UNet than the tiny base's own
        examine(load_config(RECIPE, {"model.unet": "./nowhere"}), ranks=1)
