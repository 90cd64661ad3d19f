"""A run's adapter, exported to every format and read back: the same network. Run: pytest tests/commands/test_export.py"""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
import yaml
from diffusers import UNetSpatioTemporalConditionModel
from diffusers.loaders import PeftAdapterMixin
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from tests.hub import COMMIT, serve_hub
from tests.launching import ROOT, train_here
from toolkit.commands import export
from toolkit.commands.export import export_run
from toolkit.config import ModelConfig, RunConfig, dump_config, load_config
from toolkit.errors import UserError
from toolkit.model.base import Base, load_base
from toolkit.model.formats import AdapterFile, LoraKind, read_metadata
from toolkit.model.lora import load_adapter
from toolkit.model.tiny import make_tiny_base
from toolkit.model.unet import FramerUNet
from toolkit.run.checkpoint import list_checkpoints
from toolkit.run.inference import load_framer, read_source
from toolkit.run.manifest import write_manifest

CPU = torch.device("cpu")
UNET_FILE = "unet/diffusion_pytorch_model.safetensors"
ADAPTER_FORMATS = ("peft", "diffusers", "kohya")
Exported = dict[str, Path]


class Stock(UNetSpatioTemporalConditionModel, PeftAdapterMixin):
    """diffusers' UNet with diffusers' own adapter loader."""


@pytest.fixture(scope="module")
def run(tiny_run: dict[str, Any]) -> Path:
    """Two steps of everything that an adapter can hold."""
    changes = {
        "name": "to_export", "engine.kind": "plain", "engine.precision": "fp32", "engine.micro_batch": 4,
        "schedule.steps": 2, "checkpoint.every_steps": 1, "diffusion.layout": "middle_in_clip",
        "lora.dora": True, "lora.rslora": True, "lora.extra_trainable": ["conv_in", "mask_token"],
    }  # fmt: skip
    return train_here(tiny_run | changes)


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("exported")
    made = {to: export_run(str(run), to, str(folder / to)) for to in ADAPTER_FORMATS}
    return made | {"merged": export_run(str(run), "merged", str(folder / "merged"), precision="fp32")}


@pytest.fixture(scope="module")
def base(tiny_base: Path) -> Base:
    return load_base(ModelConfig(base=str(tiny_base)), CPU, "fp32")


@torch.no_grad()
def output(unet: torch.nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    config = unet.config
    return unet(
        torch.randn(1, 3, 9, 16, 16, generator=generator),
        torch.tensor([0.3]),
        encoder_hidden_states=torch.randn(1, 2, config.cross_attention_dim, generator=generator),
        added_time_ids=torch.tensor([[6.0, 127, 0]]),
        return_dict=False,
    )[0]


def copy_of(base: Base, kind: type = FramerUNet) -> Any:
    unet = kind.from_config(base.unet.config).eval()
    wanted = unet.state_dict().keys()
    unet.load_state_dict({name: tensor for name, tensor in base.unet.state_dict().items() if name in wanted})
    return unet


@pytest.fixture(scope="module")
def trained(run: Path, base: Base) -> FramerUNet:
    """The network as the run left it: its newest checkpoint on its base."""
    unet = copy_of(base)
    load_adapter(unet, run / "checkpoints/step_000002", base.signature)
    assert (output(unet) - output(base.unet)).abs().max() > 1e-2
    assert not torch.equal(unet.mask_token, base.unet.mask_token)
    return unet


@pytest.mark.parametrize("to", ADAPTER_FORMATS)
def test_exported_adapter_is_the_run(exported: Exported, base: Base, trained: FramerUNet, to: str) -> None:
    """Read back by our loader: the same output and mask token, and the metadata of the checkpoint."""
    unet = copy_of(base)
    about = load_adapter(unet, exported[to], base.signature)
    assert torch.allclose(output(unet), output(trained), atol=1e-5)
    assert torch.allclose(unet.mask_token, trained.mask_token, atol=1e-6)
    assert about["step"] == 2 and RunConfig.model_validate(about["recipe"]).name == "to_export"
    assert read_metadata(exported[to]) == about


def test_others_read_it(exported: Exported, base: Base, trained: FramerUNet) -> None:
    """PEFT and diffusers load what was written for them, as the model cards say."""
    model = PeftModel.from_pretrained(copy_of(base), exported["peft"])
    assert torch.allclose(output(model.base_model.model), output(trained), atol=1e-5)
    stock = copy_of(base, Stock)
    stock.load_lora_adapter(exported["diffusers"], prefix="unet", use_safetensors=True)
    assert torch.allclose(output(stock), output(trained), atol=1e-5)


def test_merged_unet_is_the_run(exported: Exported, base: Base, trained: FramerUNet, tiny_base: Path) -> None:
    """FramerUNet.from_pretrained, and load_base with it as model.unet, give the same output; the recipe lies beside."""
    merged = FramerUNet.from_pretrained(exported["merged"] / "unet")
    assert torch.allclose(output(merged), output(trained), atol=1e-5)
    stock = UNetSpatioTemporalConditionModel.from_pretrained(exported["merged"], subfolder="unet")
    assert torch.allclose(output(stock), output(trained), atol=1e-5)
    loaded = load_base(ModelConfig(base=str(tiny_base), unet=str(exported["merged"])), CPU, "fp32")
    assert all(torch.equal(tensor, merged.get_parameter(name)) for name, tensor in loaded.unet.named_parameters())
    assert torch.equal(merged.mask_token, trained.mask_token)
    about = json.loads((exported["merged"] / "framer_toolkit.json").read_text())
    assert about["step"] == 2 and about["recipe"]["name"] == "to_export"


@pytest.mark.parametrize("precision", [None, "bf16"])
def test_merged_unet_is_rounded_once(run: Path, exported: Exported, tmp_path: Path, precision: str | None) -> None:
    """Summed in fp32, then cast: to fp16 unless asked otherwise, and not rounded again to interpolate."""
    rounded = export_run(str(run), "merged", str(tmp_path / "out"), precision=precision)
    dtype = {None: torch.float16, "bf16": torch.bfloat16}[precision]
    wanted, found = (load_file(f / UNET_FILE) for f in (exported["merged"], rounded))
    assert found.keys() == wanted.keys() and all(torch.equal(found[n], t.to(dtype)) for n, t in wanted.items())
    source = read_source(unet=str(rounded)).with_model(unet=str(rounded))
    assert source.config.engine.precision == "fp32" and source.precision == (precision or "fp16")
    assert load_framer(source).base.dtype == {None: torch.float32, "bf16": dtype}[precision]  # fp16 is slow on a CPU


def test_precision_is_for_merged_networks(run: Path, tmp_path: Path) -> None:
    """An adapter is fp32 whatever is asked for, so the flag is refused rather than ignored."""
    with pytest.raises(UserError, match="--precision is for --to merged; an adapter in the form kohya is always fp32"):
        export_run(str(run), "kohya", str(tmp_path / "out"), precision="fp16")


@pytest.mark.parametrize("to", ["kohya", "merged"])
def test_another_base_in_the_run_s_place_is_refused(run: Path, tmp_path: Path, to: str) -> None:
    """What was trained whole is a difference from the base, so the base must be the one that was trained on."""
    moved = Path(shutil.copytree(run, tmp_path / "run"))
    make_tiny_base(tmp_path / "other", seed=1)
    config = load_config(run / "config.yaml", {"model.base": str(tmp_path / "other")})
    (moved / "config.yaml").write_text(dump_config(config))
    with pytest.raises(UserError, match="weights of the base given here are others"):
        export_run(str(moved), to, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", [*ADAPTER_FORMATS, "merged"])
def test_model_card_tells_what_it_is(exported: Exported, to: str, tiny_base: Path) -> None:
    """The hub can read its front matter; rank, targets and steps are there, and the recipe in it is a recipe."""
    card = ModelCard.load(exported[to] / "README.md")
    assert card.data.library_name == ("peft" if to == "peft" else "diffusers") and card.data.license == "other"
    assert "frame-interpolation" in card.data.tags and card.data.base_model is None  # a folder is no id of the hub
    for row in (
        "| rank | 4 |",
        "| targets | all |",
        "| optimizer steps | 2 |",
        f"| base | {tiny_base} |",
        "| weights of the base | unet/diff",
    ):
        assert row in card.text
    recipe = re.search(r"```yaml\n(.*?)```", card.text, re.DOTALL)
    assert recipe and RunConfig.model_validate(yaml.safe_load(recipe[1])).lora.dora
    assert "## Licence" in card.text and "Stability AI" in card.text


def test_card_names_the_base_on_the_hub(run: Path, exported: Exported) -> None:
    """A base by its short name or its hub id becomes base_model."""
    adapter = export.read_peft(exported["peft"])
    adapter.metadata.pop("base")  # where the run found it: a folder
    for changes, wanted in (
        ({"model.base": "framer"}, "wwen1997/framer_512x320"),
        ({"model.base": "svd-xt"}, "stabilityai/stable-video-diffusion-img2vid-xt"),
        ({"model.base": "svd", "model.unet": "someone/else"}, "someone/else"),
    ):
        card = ModelCard(export.make_card(adapter, adapter.metadata, load_config(run / "config.yaml", changes), "peft"))
        assert card.data.base_model == wanted


def test_card_shows_code_that_keeps_every_part(run: Path, exported: Exported) -> None:
    """Nine channels come with a mask token, which the stock class lacks; eight have no place for what was trained whole."""
    adapter = export.read_peft(exported["diffusers"].parent / "peft")
    plain = replace(adapter, extras={}, metadata={})
    for of, changes, shown, hidden in (
        (plain, {"model.base": "framer"}, "class UNet(FramerUNet, PeftAdapterMixin)", "FramerPipeline"),
        (plain, {"model.base": "svd-xt"}, "class UNet(UNetSpatioTemporalConditionModel,", "FramerUNet"),
        (
            replace(adapter, metadata={}),
            {"model.base": "svd-xt"},
            "FramerPipeline.from_pretrained('stabilityai",
            "class UNet",
        ),
    ):
        card = export.make_card(of, of.metadata, load_config(run / "config.yaml", changes), "diffusers")
        assert shown in card and hidden not in card.split("## Use")[1].split("```python")[1].split("```")[0]


def test_kohya_file_is_named_after_the_run(exported: Exported) -> None:
    """Two exported runs can lie in one folder of adapters."""
    assert {path.name for path in exported["kohya"].iterdir()} == {"to_export.safetensors", "README.md"}


def test_an_older_checkpoint_on_request(run: Path, tmp_path: Path) -> None:
    """--checkpoint takes another one than the newest; one that is not there is named beside those that are."""
    assert read_metadata(export_run(str(run), "peft", str(tmp_path / "old"), "step_000001"))["step"] == 1
    with pytest.raises(UserError, match="no checkpoint step_000009; it has step_000001, step_000002"):
        export_run(str(run), "peft", str(tmp_path / "none"), "step_000009")
    assert not (tmp_path / "none").exists()


def test_any_checkpoint_can_be_named(run: Path, tmp_path: Path) -> None:
    """latest, best, or the path of one that lies elsewhere under any name, whose recipe is in its header."""
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    first = copy / "checkpoints/step_000001"
    state = json.loads((first / "state.json").read_text())
    (first / "state.json").write_text(json.dumps(state | {"validation_score": 0.5}))
    (first / "manifest.json").unlink()
    write_manifest(first, copy.name, 1)
    alone = shutil.copytree(first, tmp_path / "handed over")
    named = ((copy, "latest", 2), (copy, "best", 1), (None, alone, 1), (copy, first, 1))
    for i, (of, checkpoint, step) in enumerate(named):
        out = export_run(None if of is None else str(of), "kohya", str(tmp_path / f"out{i}"), str(checkpoint))
        assert read_metadata(out / "to_export.safetensors")["step"] == step


def test_a_place_that_cannot_be_is_told(run: Path, tmp_path: Path) -> None:
    """By the name that was given, not that of what is written aside."""
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write .*/file/out: Not a directory; choose another --out"):
        export_run(str(run), "peft", str(tmp_path / "file/out"))


def test_home_is_the_users_own(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a shell leaves ~ as it is, as in --run=~/runs/NAME."""
    monkeypatch.setenv("HOME", str(run.parent))
    assert export_run(f"~/{run.name}", "peft", str(tmp_path / "out")).is_dir()


def test_what_is_no_checkpoint_is_refused(run: Path, tmp_path: Path) -> None:
    """Nothing named, a folder of something else, a damaged one, the best of a run without validation: a sentence each."""
    harmed = shutil.copytree(run / "checkpoints/step_000001", tmp_path / "harmed")
    (tmp_path / "harmed/state.json").write_text("{}")
    for of, checkpoint, says in (
        (None, None, "nothing to export; give --run"),
        (None, "latest", "latest is no checkpoint: it has no manifest.json"),
        (None, str(run), "is no checkpoint: it has no manifest.json"),
        (None, str(harmed), "harmed is damaged: state.json differs"),
        (str(run), "best", "has no best checkpoint"),
        (str(run), str(harmed), f"--checkpoint {harmed} is none of {run}; leave --run out"),
    ):
        with pytest.raises(UserError, match=says):
            export_run(of, "peft", str(tmp_path / "out"), checkpoint)
    assert not (tmp_path / "out").exists()


def test_a_card_says_what_comfyui_leaves_out() -> None:
    """Layers of residual blocks and of the places of frames, for which it has no names; of attention alone, nothing."""
    known = ["down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "time_embedding.linear_1"]
    others = [
        "down_blocks.0.attentions.0.time_pos_embed.linear_1",
        "mid_block.resnets.0.temporal_res_block.time_emb_proj",
    ]
    for names, said in ((known, 0), (known + others, 1)):
        kind = LoraKind(dict.fromkeys(names, 4), dict.fromkeys(names, 4.0))
        notes = export._list_notes(AdapterFile(kind, {}), "kohya")
        assert sum("2 of 4 layers are of kinds that ComfyUI has no names for" in note for note in notes) == said
        assert not export._list_notes(AdapterFile(kind, {}), "peft")


def test_others_may_read_it(run: Path, tmp_path: Path) -> None:
    """As far as the user lets them: exported weights, and a checkpoint's."""
    folders = [export_run(str(run), to, str(tmp_path / to)) for to in ("peft", "merged")] + list_checkpoints(run)
    (tmp_path / "new").touch()
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 6 and {path.stat().st_mode for path in files} == {(tmp_path / "new").stat().st_mode}


def test_nothing_is_overwritten(run: Path, tmp_path: Path) -> None:
    """A file, or a folder with anything in it, stays as it is; an empty folder, as a mounted disk is, is filled."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes").write_text("mine")
    for taken in ("full", "full/notes"):
        with pytest.raises(UserError, match="is there already; give --out"):
            export_run(str(run), "peft", str(tmp_path / taken))
    assert (tmp_path / "full/notes").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    before = (tmp_path / "empty").stat().st_ino
    assert (export_run(str(run), "peft", str(tmp_path / "empty")) / "README.md").exists()
    assert (tmp_path / "empty").stat().st_ino == before


def test_a_failed_export_leaves_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder appears whole or not at all."""
    monkeypatch.setattr(export, "make_card", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_run(str(run), "peft", str(tmp_path / "out"))
    assert not list(tmp_path.iterdir())


@pytest.mark.launch
def test_an_export_is_used_from_the_hub(exported: Exported, tmp_path: Path) -> None:
    """By the id of where it was uploaded: an adapter, beside which a whole base stays there, and a UNet with its recipe.

    An id of nothing is one sentence.
    """
    shutil.copytree(exported["diffusers"], tmp_path / "repo")
    shutil.copytree(exported["merged"] / "unet", tmp_path / "repo/unet")
    for name in ("a.png", "b.png"):
        PIL.Image.new("RGB", (32, 32)).save(tmp_path / name)
    stills = ["--first", str(tmp_path / "a.png"), "--last", str(tmp_path / "b.png"), "--out"]
    with serve_hub({"signer/signs": tmp_path / "repo", "signer/whole": exported["merged"]}) as endpoint:
        hub = {"HF_ENDPOINT": endpoint, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0"}

        def interpolate(*source: str) -> subprocess.CompletedProcess[str]:
            command = [sys.executable, "launch/interpolate.py", *source, *stills, str(tmp_path / f"{source[0]}.mp4")]
            return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | hub)

        refused = interpolate("--adapter", "signer/none")
        for source in (("--adapter", "signer/signs@main"), ("--unet", "signer/whole")):
            done = interpolate(*source)
            assert done.returncode == 0 and (tmp_path / f"{source[0]}.mp4").stat().st_size, done.stderr
    snapshot = tmp_path / f"cache/models--signer--signs/snapshots/{COMMIT}"
    assert [file.name for file in snapshot.iterdir()] == ["pytorch_lora_weights.safetensors"]
    assert (
        refused.returncode == 2
        and "no adapter at signer/none on this machine, and cannot get signer/none from the hub: 404" in refused.stderr
    )
    assert len(refused.stderr.strip().splitlines()) == 1, refused.stderr


@pytest.mark.launch
def test_command_line(run: Path, tmp_path: Path) -> None:
    """As a user types it."""
    command = [sys.executable, "launch/export.py", "--run", str(run), "--to", "peft", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and f"wrote {tmp_path}/out" in done.stdout, done.stderr
    assert read_metadata(tmp_path / "out")["step"] == 2


def test_merged_unet_of_a_pinned_base_is_read(run: Path, tmp_path: Path) -> None:
    """The base's own revision of its UNet says nothing of the merged one, which is local."""
    merged = export_run(str(run), "merged", str(tmp_path / "out"))
    about = json.loads((merged / "framer_toolkit.json").read_text())
    about["recipe"]["model"] |= {"unet": "owner/name", "unet_revision": "abc"}
    (merged / "framer_toolkit.json").write_text(json.dumps(about))
    source = read_source(unet=str(merged)).with_model(unet=str(merged))
    assert (source.config.model.unet, source.config.model.unet_revision) == (str(merged), None)


def test_merged_unet_is_no_adapter(exported: Exported) -> None:
    """Given in an adapter's place, it is told apart."""
    with pytest.raises(
        UserError, match="holds a whole UNet, such as a merged .* the UNet .*, --unet of interpolate.py"
    ):
        read_source(adapters=[str(exported["merged"])])
