"""Tuning full trains the UNet's own weights, resumes exactly and loads elsewhere. Run: pytest tests/run/test_full.py"""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNetSpatioTemporalConditionModel
from safetensors.torch import load_file

from tests.launching import RECIPE, read_numbers, train_here
from toolkit.commands.export import export_run
from toolkit.config import FullConfig, ModelConfig, RunConfig, load_config
from toolkit.data.loader import Batch
from toolkit.engine.world import init_world
from toolkit.errors import UserError
from toolkit.model.base import load_base
from toolkit.model.tuning import match_parameters
from toolkit.model.unet import FramerUNet
from toolkit.pipeline import FramerPipeline
from toolkit.run.checkpoint import newest_good
from toolkit.run.framer import Framer
from toolkit.run.inference import load_framer, read_source
from toolkit.run.job import build_job, make_batches

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def full(tiny_run: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """Overrides of two steps of full tuning in this process, in a folder of its own."""
    return tiny_run | {
        "name": "full", "runs_dir": str(tmp_path), "tuning": "full", "diffusion.layout": "middle_in_clip",
        "engine.kind": "plain", "engine.precision": "fp32", "schedule.steps": 2, "checkpoint.every_steps": 1,
        "optimizer.lr": 1e-3,
    }  # fmt: skip


def read_weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run / f"checkpoints/step_{step:06d}" / WEIGHTS)


def test_equals_a_plain_loop(full: dict[str, Any]) -> None:
    """The weights after two steps are those of stock AdamW on a stock UNet's parameters, fed by the same framer."""
    run = train_here(full | {"model.memory": "fast"})
    config = load_config(run / "config.yaml")
    base = load_base(config.model, torch.device("cpu"), "fp32")
    base.unet.requires_grad_(True)
    framer = Framer(base, config.diffusion, config.data.frames, config.seed)
    adam = torch.optim.AdamW(base.unet.parameters(), 1e-3, (0.9, 0.999), 1e-8, 0.01)
    batches = iter(list(batches_of(config)))
    for _ in range(2):
        for _ in range(4):
            (framer.compute_loss(next(batches)).loss_B.mean() / 4).backward()
        torch.nn.utils.clip_grad_norm_(base.unet.parameters(), 1.0)
        adam.step()
        adam.zero_grad()
    ours, start = read_weights(run, 2), load_base(config.model, torch.device("cpu"), "fp32").unet.state_dict()
    change = torch.cat([(ours[n] - start[n]).flatten() for n in start])
    theirs = torch.cat([(base.unet.state_dict()[n] - start[n]).flatten() for n in start])
    # Adam moves a weight by its whole rate where its gradient is rounding alone
    assert (change - theirs).norm() < 0.02 * theirs.norm() and theirs.norm() > 0


def batches_of(config: RunConfig) -> list[Batch]:
    """The batches that a run takes, from a run of its own that is never stepped."""
    world = init_world(join=False)
    job = build_job(config.model_copy(update={"name": "batches"}), world, fresh=False)
    assert job.writer is not None
    job.writer.close()
    return list(make_batches(config, job, world))


def test_space_is_asked_for_what_does_not_train_as_well(
    full: dict[str, Any], tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint of a part of the UNet holds the rest of it too: one byte less than it takes is refused at the start."""
    chosen = full | {"full.parameters": "conv_out.*", "schedule.steps": 1}
    run = train_here(chosen)
    used_bytes = sum(file.stat().st_size for file in (run / "checkpoints/step_000001").iterdir())
    assert used_bytes > (tiny_base / "unet" / WEIGHTS).stat().st_size
    usage = shutil.disk_usage(run)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2 * used_bytes - 1))
    with pytest.raises(UserError, match="2 checkpoints of .* do not fit on the disk of"):
        train_here(chosen | {"name": "another"})


def test_resumes_exactly(full: dict[str, Any]) -> None:
    """Two steps at once, and a copy of that run thrown back to step one and resumed: the same losses and bytes."""
    whole = train_here(full)
    back = Path(shutil.copytree(whole, whole.parent / "back/full"))
    shutil.rmtree(back / "checkpoints/step_000002")
    train_here(full | {"runs_dir": str(back.parent)})
    assert read_numbers(back) == read_numbers(whole)
    one, two, again = read_weights(whole, 1), read_weights(whole, 2), read_weights(back, 2)
    assert all(torch.equal(again[n], two[n]) for n in two) and any(not torch.equal(one[n], two[n]) for n in two)


def test_trains_the_named_part_alone(full: dict[str, Any]) -> None:
    """What the expression names moves, all else is the base bit for bit, and an optimizer state is kept for it alone."""
    run = train_here(full | {"full.parameters": "mid_block\\..*|mask_token", "schedule.steps": 1})
    base = load_base(load_config(run / "config.yaml").model, torch.device("cpu"), "fp32").unet.state_dict()
    tuned = read_weights(run, 1)
    moved = {name for name in base if not torch.equal(tuned[name], base[name])}
    assert moved and all(name.startswith("mid_block.") or name == "mask_token" for name in moved)
    state = load_file(run / "checkpoints/step_000001/optimizer.safetensors")
    assert {name.rpartition("/")[0] for name in state} == set(
        match_parameters(FramerUNet.from_pretrained(run / "checkpoints/step_000001"), FullConfig(
            parameters="mid_block\\..*|mask_token"))
    )  # fmt: skip


def test_is_used_as_any_run(full: dict[str, Any], tmp_path: Path) -> None:
    """A checkpoint is a diffusers UNet, and a start for others; the run is the tuned network, its base the untuned one."""
    run = train_here(full)
    place = run / "checkpoints/step_000002"
    stock = UNetSpatioTemporalConditionModel.from_pretrained(place, low_cpu_mem_usage=False)
    tuned = read_weights(run, 2)
    assert all(torch.equal(value, tuned[name]) for name, value in stock.state_dict().items())
    source = read_source(str(run))
    weights, untuned = load_framer(source).base.unet, load_framer(source.untuned).base.unet
    assert all(torch.equal(value, tuned[name]) for name, value in weights.state_dict().items())
    assert any(not torch.equal(value, tuned[name]) for name, value in untuned.state_dict().items())
    piped = FramerPipeline.from_run(run).unet.state_dict()
    assert all(torch.equal(value, tuned[name]) for name, value in piped.items())
    exported = export_run(str(run), "merged", str(tmp_path / "out"), precision="fp32")
    out = load_file(exported / "unet" / WEIGHTS)
    assert all(torch.equal(value, tuned[name]) for name, value in out.items())
    next_run = train_here(full | {"name": "next", "model.unet": str(place), "schedule.steps": 1})
    assert load_config(next_run / "config.yaml").model.unet == str(place)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"full.parameters": "nothing"}, "matches no parameter"),
        ({"full.parameters": "["}, "no regular expression"),
        ({"lora.init_from": "adapter"}, "tuning full has none"),
        ({"model.quantize": "int8"}, "tuning full trains them"),
        ({"model.compile": True}, "tuning full takes diffusers"),
    ],
)
def test_refuses_what_cannot_be(full: dict[str, Any], overrides: dict[str, Any], said: str) -> None:
    """Before any weights are read, in a sentence."""
    with pytest.raises(UserError, match=said):
        train_here(full | overrides)


def test_a_unet_that_may_be_pruned_is_told(
    full: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run on a checkpoint of another needs it to its end, and that one deletes it as it goes on; a copy is left alone."""
    newest = newest_good(train_here(full | {"schedule.steps": 1}), set_aside=False)
    assert newest is not None
    copy = shutil.copytree(newest, tmp_path / "copy")
    for unet, told in ((newest, True), (copy, False)):
        train_here(full | {"name": f"on-{told}", "schedule.steps": 1, "model.unet": str(unet)})
        assert ("is a checkpoint that its own run deletes" in capsys.readouterr().err) is told


def test_has_no_adapter_to_give(full: dict[str, Any], tmp_path: Path) -> None:
    """No adapter can be exported from it, scaled, or taken as a start, and no other UNet put in its place."""
    run = train_here(full | {"schedule.steps": 1, "full.parameters": "mid_block.*"})
    with pytest.raises(UserError, match="whole UNet"):
        export_run(str(run), "peft", str(tmp_path / "out"))
    with pytest.raises(UserError, match="lora_scale"):
        read_source(str(run), lora_scale=0.5)
    with pytest.raises(UserError, match="and no adapter"):
        train_here({**full, "name": "lora", "tuning": "lora", "lora.init_from": str(run)})
    with pytest.raises(UserError, match="both --unet and .*step_000001 are given, which is a whole UNet"):
        read_source(str(run)).with_model(unet=str(tmp_path))


def test_recipe_default_is_lora() -> None:
    """A recipe that says nothing tunes adapters."""
    assert load_config(RECIPE).tuning == "lora" and ModelConfig().base == "tiny"
