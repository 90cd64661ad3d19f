"""Every kind of adapter trains and resumes exactly. Run: pytest tests/run/test_training.py"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.launching import RECIPE, adapter_bytes, read_numbers, train_here
from tests.model.control import make_controlnet
from toolkit.authoring.pack import pack
from toolkit.commands.evaluate import evaluate_run
from toolkit.config import ModelConfig, load_config
from toolkit.data.index import open_shards
from toolkit.engine.world import init_world
from toolkit.errors import UserError
from toolkit.model.base import load_base
from toolkit.run.folder import newest_adapter
from toolkit.run.job import build_job
from toolkit.run.judge import load_held_out

FED = {
    "diffusion.layout": "middle_in_clip",
    "diffusion.conditioning_dropout": 0.2,
    "diffusion.noise_augmentation": 0.05,
}
KINDS: dict[str, dict[str, Any]] = {
    "extras": FED | {"lora.extra_trainable": ["conv_in", "mask_token"], "lora.rslora": True},
    "dora": {
        "lora.dora": True,
        "lora.rank_pattern": {"mid_block.*": 2},
        "diffusion.loss_space": "edm",
        "diffusion.noise_sampler": "lognormal",
        "diffusion.clip_tokens": "first",
    },
    "dropout": FED | {"lora.dropout": 0.3, "lora.targets": "self"},
    "int8": FED | {"model.quantize": "int8", "model.memory": "small"},
}


@pytest.fixture
def plain(tiny_run: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """Overrides of a run of two steps in this process, in its own folder."""
    return tiny_run | {
        "engine.kind": "plain",
        "schedule.steps": 2,
        "runs_dir": str(tmp_path),
        "checkpoint.every_steps": 1,
    }


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_kind_resumes_exactly(plain: dict[str, Any], kind: str) -> None:
    """Two steps at once, and a copy of that run thrown back to step one and resumed: the same losses, the same bytes."""
    overrides = plain | KINDS[kind] | {"name": "run"}
    whole = train_here(overrides)
    back = Path(shutil.copytree(whole, whole.parent / "back/run"))
    shutil.rmtree(back / "checkpoints/step_000002")
    train_here(overrides | {"runs_dir": str(back.parent)})
    assert read_numbers(back) == read_numbers(whole)
    assert adapter_bytes(back, 2) == adapter_bytes(whole, 2) != adapter_bytes(whole, 1)


def test_a_resumed_run_keeps_no_checkpoint_open(plain: dict[str, Any]) -> None:
    """What it read lies in no file that is mapped still: one that is pruned gives its room on the disk back."""
    overrides = plain | {"name": "run", "checkpoint.ema": True}
    run = train_here(overrides)
    job = build_job(load_config(RECIPE, overrides), init_world(join=False), fresh=False)
    assert job.resume.step == 2 and str(run / "checkpoints") not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("kind", ["extras", "dropout"])
def test_micro_batches_do_not_change_what_is_drawn(plain: dict[str, Any], kind: str) -> None:
    """Four clips one by one or all together: the same masks, drops and noise, so the same loss to fp32 rounding."""
    settings = plain | KINDS[kind] | {"engine.precision": "fp32", "schedule.steps": 1}
    losses = [
        read_numbers(train_here(settings | {"name": f"micro{n}", "engine.micro_batch": n}), "loss", "grad_norm")[0]
        for n in (1, 4)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    if kind == "dropout":
        without = train_here(settings | {"name": "dry", "lora.dropout": 0.0})
        assert abs(read_numbers(without, "grad_norm")[0][0] - losses[0][1]) > 1e-4 * losses[0][1]


def test_another_kernel_or_plan_is_said(plain: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """A run may go on with blocks, plan or kernel that another card calls for, and says that it is not the same then."""
    fast, small = ("attention sdpa, blocks lean, memory fast", "attention sdpa, blocks lean, memory small")
    run = train_here(plain | {"name": "run", "model.memory": "fast"})
    for plan, said in (("fast", False), ("small", True)):
        shutil.rmtree(run / "checkpoints/step_000002")
        train_here(plain | {"name": "run", "model.memory": plan})
        assert (f"{fast} then, {small} now: the run goes on" in capsys.readouterr().err) == said


def test_extras_move_and_are_saved(plain: dict[str, Any], tiny_base: Path) -> None:
    """conv_in and mask_token are trained whole, and stand in the adapter's file beside the matrices."""
    run = train_here(plain | KINDS["extras"] | {"name": "extras"})
    saved = load_file(newest_adapter(run) / "adapter_model.safetensors")
    base = load_base(ModelConfig(base=str(tiny_base)), torch.device("cpu"), "fp32").unet
    for name in ("conv_in.weight", "conv_in.bias", "mask_token"):
        tuned, untuned = saved[f"base_model.model.{name}"], base.get_parameter(name)
        assert tuned.shape == untuned.shape and 0 < (tuned - untuned).abs().max() < 0.1, name


def test_run_starts_from_an_adapter(plain: dict[str, Any]) -> None:
    """lora.init_from takes the values of another run's adapter: the first loss is the one where that run ended."""
    first = train_here(plain | {"name": "first"})
    config = load_config(RECIPE, plain | {"name": "second", "lora.init_from": str(first)})
    job = build_job(config, init_world(join=False), fresh=False)
    taken = {name: state["master"] for name, state in job.adapter.split(job.engine.gather()).items()}
    saved = load_file(newest_adapter(first) / "adapter_model.safetensors")
    assert len(taken) == len(saved) and any(tensor.any() for name, tensor in taken.items() if ".lora_B." in name)
    for name, tensor in taken.items():
        assert torch.equal(tensor, saved[f"base_model.model.{name.replace('.default.', '.')}"])


def test_a_run_outlives_the_adapter_it_started_from(plain: dict[str, Any]) -> None:
    """Once a run has a checkpoint, lora.init_from is read no more: its source may be gone, and the run resumes exactly."""
    first = train_here(plain | {"name": "first", "schedule.steps": 1})
    overrides = plain | {"name": "second", "lora.init_from": str(first)}
    second = train_here(overrides)
    ended = adapter_bytes(second, 2)
    shutil.rmtree(first)
    shutil.rmtree(second / "checkpoints/step_000002")
    train_here(overrides)
    assert adapter_bytes(second, 2) == ended


def test_weights_may_lie_elsewhere(plain: dict[str, Any], tiny_base: Path, tmp_path: Path) -> None:
    """A run goes on where its base was moved to, exactly; another base there is refused, and so is one of another name."""
    shutil.copytree(tiny_base, tmp_path / "here")
    run = train_here(plain | {"name": "moved", "model.base": str(tmp_path / "here")})
    ended = adapter_bytes(run, 2)
    shutil.rmtree(run / "checkpoints/step_000002")
    base = (tmp_path / "here").rename(tmp_path / "there")
    going_on = plain | {"name": "moved", "model.base": str(base)}
    assert adapter_bytes(train_here(going_on), 2) == ended
    with pytest.raises(UserError, match="made by another recipe .model.base was .*there', is 'tiny'"):
        train_here(going_on | {"model.base": "tiny"})
    weights = base / "unet/diffusion_pytorch_model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(weights).items()}, weights)
    with pytest.raises(UserError, match="base fingerprint was .*, is "):
        train_here(going_on)


@pytest.mark.parametrize("way", ["goes on", "starts from it", "on its UNet"])
def test_held_out_clips_that_were_trained_on_are_told(
    plain: dict[str, Any], tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], way: str
) -> None:
    """Where another packing holds out videos that a run was trained on, and it goes on there or another starts from it."""
    pack(tiny_shards.parent / "videos", tmp_path / "again", holdout=0.5, gop=1)
    own = {row.clip.source for row in open_shards(tiny_shards, "train").rows}
    seen = [row.clip.source for row in open_shards(tmp_path / "again", "val").rows if row.clip.source in own]
    tuning = {"tuning": "full"} if way == "on its UNet" else {}
    first = train_here(plain | tuning | {"name": "first", "schedule.steps": 1})
    second = {
        "goes on": {"name": "first"},
        "starts from it": {"name": "second", "lora.init_from": str(first)},
        "on its UNet": {"name": "second", "model.unet": str(shutil.copytree(newest_adapter(first), tmp_path / "unet"))},
    }[way]
    train_here(plain | second, allow_change=True)
    assert "warning" not in capsys.readouterr().err, "the same data"
    shutil.rmtree(first.with_name("second"), ignore_errors=True)
    train_here(plain | second | {"data.shards": str(tmp_path / "again")}, allow_change=True)
    told = f"warning: {len(seen)} held-out clips are, by name, of videos that were trained on before, such as {seen[0]}"
    assert seen and told in capsys.readouterr().err


def test_controlnet_in_training_is_off_unless_asked_for(plain: dict[str, Any], tiny_base: Path, tmp_path: Path) -> None:
    """Naming a ControlNet changes no loss; diffusion.control steers with points found between the ends."""
    unet = load_base(ModelConfig(base=str(tiny_base)), torch.device("cpu"), "fp32").unet
    control = make_controlnet(unet, awake=True)
    control.save_pretrained(tmp_path / "control/controlnet")
    losses = {}
    for name, extra in {
        "without": {},
        "named": {"model.controlnet": str(tmp_path / "control")},
        "steered": {"model.controlnet": str(tmp_path / "control"), "diffusion.control": True},
    }.items():
        losses[name] = read_numbers(train_here(plain | {"name": name, "schedule.steps": 1} | extra), "loss")
    assert losses["without"] == losses["named"] != losses["steered"]


def test_another_controlnet_on_resume_is_refused(plain: dict[str, Any], tiny_base: Path, tmp_path: Path) -> None:
    """Where it steers in training, the ControlNet is part of what a run must go on with."""
    unet = load_base(ModelConfig(base=str(tiny_base)), torch.device("cpu"), "fp32").unet
    control = make_controlnet(unet, awake=True)
    control.save_pretrained(tmp_path / "control")
    overrides = plain | {"name": "run", "model.controlnet": str(tmp_path / "control"), "diffusion.control": True}
    train_here(overrides | {"schedule.steps": 1})
    control.conv_in.bias.data += 0.1
    control.save_pretrained(tmp_path / "control")
    with pytest.raises(UserError, match=r"controlnet fingerprint was [0-9a-f]+, is [0-9a-f]+"):
        train_here(overrides | {"schedule.steps": 1})


def test_a_wrong_lora_section_is_refused_before_weights_are_read(
    plain: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading takes minutes at full size; targets, patterns and the ControlNet's place are known before."""
    monkeypatch.setattr("toolkit.run.job.load_base", lambda *_, **__: 1 / 0)
    for changes, message in (
        ({"lora.targets": "attn9"}, "lora.targets 'attn9' matches no linear layer"),
        ({"lora.rank_pattern": {"attn9": 2}}, "lora.rank_pattern 'attn9' matches none"),
        ({"model.controlnet": "./nowhere", "diffusion.control": True}, "no ControlNet at ./nowhere"),
    ):
        with pytest.raises(UserError, match=message):
            train_here(plain | {"name": "run"} | changes)


def test_framers_even_windows_train(plain: dict[str, Any], tmp_path: Path) -> None:
    """Framer was trained on 14 frames: an even window in framer_clip trains, and is scored at the later middle."""
    run = train_here(plain | {"name": "run", "diffusion.layout": "framer_clip", "data.frames": 4, "schedule.steps": 1})
    report = evaluate_run(str(run), clips=2, steps=1)
    scores = []
    for clip in load_held_out(load_config(run / "config.yaml"), 2):
        first, _, true, last = clip.frames_THWC.astype(float) / 255
        scores.append(-10 * np.log10(np.square((first + 2 * last) / 3 - true).mean()))
    assert report["clips"] == 2 and report["psnr_linear"] == pytest.approx(np.mean(scores), abs=1e-3)
