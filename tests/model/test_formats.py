"""Adapter files: what PEFT, diffusers and kohya tools read, and what comes back. Run: pytest tests/model/test_formats.py"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNetSpatioTemporalConditionModel
from diffusers.loaders import PeftAdapterMixin
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lora_to_diffusers
from diffusers.utils import convert_state_dict_to_diffusers
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.model.adapters import ABOUT, KINDS, SIGNATURE, make_trained, output
from tests.model.conftest import SMALL, make_unet
from toolkit.config import ModelConfig
from toolkit.errors import UserError
from toolkit.model.base import build_unet_on_meta
from toolkit.model.formats import (
    DIFFUSERS_FILE,
    METADATA_KEY,
    AdapterFile,
    LoraKind,
    read_adapter,
    read_metadata,
    untuned,
    write_diffusers,
    write_kohya,
    write_peft,
)
from toolkit.model.lora import load_adapter, lora_parameters, match_targets, save_adapter
from toolkit.model.unet import FramerUNet

KIND = pytest.mark.parametrize("kind", KINDS)
FORMATS = ("peft", "diffusers", "kohya")
MODULE = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


class Stock(UNetSpatioTemporalConditionModel, PeftAdapterMixin):
    """diffusers' UNet with diffusers' own adapter loader, which its SVD UNet lacks."""


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    """{kind: {format: source}} of one trained adapter each; read only."""
    made = {}
    for kind, changes in KINDS.items():
        folder = tmp_path_factory.mktemp(kind)
        unet, parameters = make_trained(**changes)
        save_adapter(folder / "peft", dict(parameters), unet, ABOUT)
        made[kind] = write_all(read_adapter(folder / "peft", unet), folder)
    return made


@pytest.fixture(scope="session")
def outputs() -> dict[str, Tensor]:
    """{kind: what the UNet that was trained gives}"""
    return {kind: output(make_trained(**changes)[0]) for kind, changes in KINDS.items()}


def write_all(adapter: AdapterFile, folder: Path) -> dict[str, Path]:
    base = make_unet()
    write_peft(folder / "peft", adapter)
    write_diffusers(folder / "diffusers", adapter)
    write_kohya(folder / "kohya/name.safetensors", adapter, 1, {name: untuned(base, name) for name in adapter.extras})
    return {"peft": folder / "peft", "diffusers": folder / "diffusers", "kohya": folder / "kohya/name.safetensors"}


def make_stock() -> Stock:
    stock = Stock(in_channels=9, **SMALL).eval()
    stock.load_state_dict({name: t for name, t in make_unet().state_dict().items() if name != "mask_token"})
    return stock


def rewrite(
    source: Path, into: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], header: Any = None
) -> Path:
    """Copy a .safetensors file with other tensors, and with another header or none."""
    save_file({name: t.contiguous() for name, t in change(load_file(source)).items()}, into, metadata=header)
    return into


# read by others


@KIND
def test_peft_reads_it(files: dict[str, Any], outputs: dict[str, Tensor], kind: str) -> None:
    """PeftModel.from_pretrained gives the same output, finds every tensor under PEFT's own name, and the base's name."""
    model = PeftModel.from_pretrained(make_unet(), files[kind]["peft"])
    assert torch.allclose(output(model.base_model.model), outputs[kind], atol=1e-5)
    theirs = get_peft_model_state_dict(model, save_embedding_layers=False)
    mine = load_file(files[kind]["peft"] / "adapter_model.safetensors")
    mine.pop("base_model.model.mask_token", None)  # PEFT has no wrapper for a bare parameter
    assert theirs.keys() == mine.keys() and all(torch.equal(theirs[n], mine[n]) for n in mine)
    assert model.peft_config["default"].base_model_name_or_path == "somewhere/base"


@KIND
def test_diffusers_reads_it(files: dict[str, Any], outputs: dict[str, Tensor], kind: str) -> None:
    """load_lora_adapter of diffusers' own mixin, on the stock UNet, gives the same output."""
    stock = make_stock()
    stock.load_lora_adapter(files[kind]["diffusers"], prefix="unet", use_safetensors=True)
    assert torch.allclose(output(stock), outputs[kind], atol=1e-5)


@KIND
def test_kohya_by_hand(files: dict[str, Any], outputs: dict[str, Tensor], kind: str) -> None:
    """W + alpha / r up down on the weights, DoRA's rows rescaled to dora_scale, .diff added: the same output."""
    tensors, unet = load_file(files[kind]["kohya"]), make_unet()
    names = {"lora_unet_" + stability_name(unet, n).replace(".", "_"): module for n, module in unet.named_modules()}
    with torch.no_grad():
        for key in [k for k in tensors if k.endswith(".lora_down.weight")]:
            name = key.split(".")[0]
            down, up, alpha = (
                tensors.pop(f"{name}.{part}") for part in ("lora_down.weight", "lora_up.weight", "alpha")
            )
            weight = names[name].weight
            weight += alpha / len(down) * up @ down
            if f"{name}.dora_scale" in tensors:
                weight *= tensors.pop(f"{name}.dora_scale") / weight.norm(dim=1, keepdim=True)
        for key in [k for k in tensors if not k.startswith("lora_unet_mask_token")]:
            name, part = key.split(".")
            getattr(names[name], {"diff": "weight", "diff_b": "bias"}[part]).data += tensors.pop(key)
    assert torch.allclose(output(unet), outputs[kind], atol=1e-5)
    assert list(tensors) == (["lora_unet_mask_token.diff"] if "extra_trainable" in KINDS[kind] else [])


def stability_name(unet: Any, name: str) -> str:
    """A temporal layer's name in Stability's own UNet, which counts blocks in running order; others' as it is."""
    stages = {"mid_block.attentions.0.temporal_transformer_blocks": "middle_block.1.time_stack"}
    for side, blocks, place in (
        ("input", unet.down_blocks, 1),
        ("output", unet.up_blocks, 0),
    ):  # input_blocks.0 is conv_in
        for i, block in enumerate(blocks):
            for j in range(len(block.resnets)):
                ours = f"{'down' if side == 'input' else 'up'}_blocks.{i}.attentions.{j}.temporal_transformer_blocks"
                stages[ours] = f"{side}_blocks.{place}.1.time_stack"
                place += 1
            place += len(getattr(block, "downsamplers", None) or ())
    ours = next((stage for stage in stages if name.startswith(f"{stage}.")), "")
    return stages[ours] + name.removeprefix(ours) if ours else name


def test_kohya_names_at_full_size(tmp_path: Path) -> None:
    """The 128 temporal layers of SVD stand under the names of its original checkpoint, the spatial ones under diffusers'."""
    unet = build_unet_on_meta(ModelConfig(base="framer"))
    modules = match_targets(unet, "all")
    named = {n: torch.zeros(1, 1) for m in modules for n in (f"{m}.lora_A.weight", f"{m}.lora_B.weight")}
    adapter = AdapterFile(LoraKind(dict.fromkeys(modules, 1), dict.fromkeys(modules, 1.0)), named)
    write_kohya(tmp_path / "x.safetensors", adapter, unet.config.layers_per_block, {})
    names = {name.split(".")[0].removeprefix("lora_unet_") for name in load_file(tmp_path / "x.safetensors")}
    assert len(names) == 256 and names == {stability_name(unet, module).replace(".", "_") for module in modules}
    temporal = {name for name in names if "time_stack" in name}
    places = [1, 2, 4, 5, 7, 8], [3, 4, 5, 6, 7, 8, 9, 10, 11]  # of the blocks that attend, in the original checkpoint
    stages = [f"{side}_blocks_{i}_1" for side, of in zip(("input", "output"), places, strict=True) for i in of]
    parts = [f"{attention}_{part}" for attention in ("attn1", "attn2") for part in ("to_q", "to_k", "to_v", "to_out_0")]
    assert temporal == {f"{stage}_time_stack_0_{part}" for stage in [*stages, "middle_block_1"] for part in parts}


def test_kohya_files_with_diffusers_names_for_temporal_layers_are_read(
    files: dict[str, Any], outputs: dict[str, Tensor], tmp_path: Path
) -> None:
    """Files of tools that know diffusers' names alone."""
    unet, kohya = make_unet(), load_file(files["plain"]["kohya"])
    theirs = {stability_name(unet, n).replace(".", "_"): n.replace(".", "_") for n, _ in unet.named_modules()}
    renamed = {
        f"lora_unet_{theirs[name.removeprefix('lora_unet_')]}.{part}": tensor
        for key, tensor in kohya.items()
        for name, _, part in [key.partition(".")]
    }
    assert renamed.keys() != kohya.keys()
    save_file(renamed, tmp_path / "x.safetensors")
    load_adapter(unet, tmp_path / "x.safetensors", SIGNATURE)
    assert torch.allclose(output(unet), outputs["plain"], atol=1e-5)


def test_names_from_before_peft_are_read(outputs: dict[str, Tensor], tmp_path: Path) -> None:
    """What diffusers' own training scripts write, to_q.lora.down.weight, is read; alpha is the rank there."""
    trained, parameters = make_trained(alpha=4)
    state = {n.replace(".default", ""): p.detach() for n, p in parameters.items()}
    save_file(convert_state_dict_to_diffusers({f"unet.{n}": t for n, t in state.items()}), tmp_path / "old.safetensors")
    with safe_open(tmp_path / "old.safetensors", "pt") as opened:
        assert all(name.endswith((".lora.down.weight", ".lora.up.weight")) for name in opened.keys())  # noqa: SIM118
    unet = make_unet()
    load_adapter(unet, tmp_path / "old.safetensors", SIGNATURE)
    assert torch.allclose(output(unet), output(trained), atol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"rslora": True}, {"rank_pattern": {"to_q": 2}}], ids=str)
def test_diffusers_converts_the_kohya_file(tmp_path: Path, changes: dict[str, Any]) -> None:
    """diffusers' converter of kohya files knows the spatial layers' names, ranks and alphas: the same output."""
    unet, parameters = make_trained(targets="spatial", **changes)
    save_adapter(tmp_path / "peft", dict(parameters), unet, ABOUT)
    kohya = write_all(read_adapter(tmp_path / "peft", unet), tmp_path)["kohya"]
    converted, alphas = _convert_non_diffusers_lora_to_diffusers(load_file(kohya))
    stock = make_stock()
    stock.load_lora_adapter(converted, prefix="unet", network_alphas=alphas)
    assert torch.allclose(output(stock), output(unet), atol=1e-5)


def test_kohya_header(files: dict[str, Any]) -> None:
    """The keys that kohya's tools read stand in the header as text, beside the toolkit's own."""
    with safe_open(files["plain"]["kohya"], "pt") as opened:
        header = opened.metadata()
    assert (header["ss_network_dim"], header["ss_network_alpha"], header["ss_network_module"]) == (
        "4",
        "6.0",
        "networks.lora",
    )
    assert json.loads(header[METADATA_KEY]) == ABOUT


# read by us


@KIND
@pytest.mark.parametrize("form", FORMATS)
def test_every_format_comes_back(files: dict[str, Any], outputs: dict[str, Tensor], kind: str, form: str) -> None:
    """Our loader gives the same output from each format, whole tensors and metadata included."""
    unet, (trained, _) = make_unet(), make_trained(**KINDS[kind])
    assert load_adapter(unet, files[kind][form], SIGNATURE) == ABOUT
    assert torch.allclose(output(unet), outputs[kind], atol=1e-5)
    assert torch.allclose(unet.mask_token, trained.mask_token, atol=1e-6)


@KIND
def test_formats_lose_nothing(files: dict[str, Any], tmp_path: Path, kind: str) -> None:
    """From PEFT to any format and back to PEFT: the same tensors and the same scaling of every module."""
    for form in FORMATS:
        first, again = (read_adapter(files[kind][f], make_unet()) for f in ("peft", form))
        assert first.tensors.keys() == again.tensors.keys() and first.extras.keys() == again.extras.keys()
        assert all(torch.equal(first.tensors[name], again.tensors[name]) for name in first.tensors)
        assert all(torch.allclose(first.extras[name], again.extras[name], atol=1e-6) for name in first.extras)
        assert first.kind.ranks == again.kind.ranks and first.kind.dora == again.kind.dora
        scalings = ([kind.scaling(m) for m in kind.ranks] for kind in (first.kind, again.kind))
        assert next(scalings) == pytest.approx(next(scalings))


@pytest.mark.parametrize("form", ["peft", "diffusers"])
def test_the_same_adapter_is_the_same_file(files: dict[str, Any], tmp_path: Path, form: str) -> None:
    """Written twice, byte for byte, configuration included."""
    adapter = read_adapter(files["everything"]["peft"], make_unet())
    write_all(adapter, tmp_path)
    for file in files["everything"][form].iterdir():
        assert file.read_bytes() == (tmp_path / form / file.name).read_bytes()
    config = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    assert config["target_modules"] == sorted(config["target_modules"])  # the order of a set changes with each process


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_the_file_alone_and_its_folder_are_the_same(files: dict[str, Any], form: str) -> None:
    """The single file, or the folder it stands in."""
    source = files["plain"][form]
    folder, file = (source, source / DIFFUSERS_FILE) if source.is_dir() else (source.parent, source)
    one, other = read_adapter(folder, make_unet()), read_adapter(file, make_unet())
    assert one.kind == other.kind and all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)


def test_kohya_deltas_rest_on_the_untuned_base(files: dict[str, Any]) -> None:
    """Read while another adapter has moved conv_in, a delta is still added to the base's value."""
    unet = make_unet()
    load_adapter(unet, files["extras"]["peft"], SIGNATURE, "first")
    again = read_adapter(files["extras"]["kohya"], unet)
    wanted = read_adapter(files["extras"]["peft"], unet)
    assert all(torch.allclose(again.extras[name], wanted.extras[name], atol=1e-6) for name in wanted.extras)


# trained by others


def test_adapter_of_peft_is_read(unet: FramerUNet, tmp_path: Path) -> None:
    """What PEFT itself trained and saved, patterns, rsLoRA, DoRA and modules_to_save included, without any metadata."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["to_q", "to_v", "proj_in"], use_rslora=True, use_dora=True, lora_dropout=0.1,
        rank_pattern={"attn2.to_q": 2}, alpha_pattern={"to_v": 3}, modules_to_save=["conv_in"], init_lora_weights=False,
    )  # fmt: skip
    model = get_peft_model(unet, config).eval()
    model.base_model.model.conv_in.modules_to_save.default.weight.data.mul_(1.5)
    model.save_pretrained(tmp_path)
    loaded = make_unet()
    assert load_adapter(loaded, tmp_path, SIGNATURE) == read_metadata(tmp_path) == {}
    assert torch.allclose(output(loaded), output(model.base_model.model), atol=1e-5)


def test_adapter_of_diffusers_is_read(tmp_path: Path) -> None:
    """What save_lora_adapter writes, with names that have no prefix."""
    from peft import LoraConfig

    stock = make_stock()
    stock.add_adapter(LoraConfig(r=4, lora_alpha=2, target_modules=["to_q", "to_k"], init_lora_weights=False))
    stock.save_lora_adapter(tmp_path)
    loaded = make_unet()
    assert load_adapter(loaded, tmp_path, SIGNATURE) == {}
    assert torch.allclose(output(loaded), output(stock), atol=1e-5)


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_without_alpha_alpha_is_the_rank(files: dict[str, Any], tmp_path: Path, form: str) -> None:
    """Files of other trainers that say nothing of alpha, ranks of their own included, add B A as it is."""
    source = files["rank_pattern"][form]
    source = source / DIFFUSERS_FILE if source.is_dir() else source
    file = rewrite(
        source, tmp_path / "x.safetensors", lambda tensors: {n: t for n, t in tensors.items() if "alpha" not in n}
    )
    adapter = read_adapter(file, make_unet())
    assert adapter.kind.ranks == read_adapter(source, make_unet()).kind.ranks and adapter.metadata == {}
    assert {adapter.kind.scaling(module) for module in adapter.kind.ranks} == {1.0}


def test_half_precision_is_read_as_fp32(files: dict[str, Any], tmp_path: Path) -> None:
    """An fp16 file, as kohya writes by default, gives fp32 parameters."""
    file = rewrite(
        files["plain"]["kohya"], tmp_path / "x.safetensors", lambda tensors: {n: t.half() for n, t in tensors.items()}
    )
    unet = make_unet()
    load_adapter(unet, file, SIGNATURE)
    assert {tensor.dtype for tensor in read_adapter(file, unet).tensors.values()} == {torch.float32}
    assert {p.dtype for p in lora_parameters(unet).values()} == {torch.float32}


# refused


@pytest.mark.parametrize("name", ["x.bin", "x.pt", "x.ckpt", "x.pth"])
def test_pickles_are_refused_unread(tmp_path: Path, unet: FramerUNet, name: str) -> None:
    """By their ending, before a byte is read."""
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(UserError, match=f"{name} is a pickle, which can run code.*adapter_model.safetensors"):
        read_adapter(tmp_path / name, unet)
    with pytest.raises(UserError, match=f"no readable adapter .*it holds {name}"):
        read_adapter(tmp_path, unet)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda folder: folder / "nowhere", "no such path"),
        (lambda folder: folder, "no readable adapter in .*it holds ;|it holds"),
        (lambda folder: _write(folder / "notes.txt", b"hello"), "notes.txt is not a .safetensors file"),
        (lambda folder: _write(folder / "x.safetensors", b""), "no readable adapter"),
        (lambda folder: _write(folder / "x.safetensors", b"\xff" * 64), "no readable adapter"),
        (lambda folder: _save(folder / "x.safetensors", {"conv.weight": torch.zeros(2)}), "1 tensors, .* conv.weight"),
        (lambda folder: _save(folder / "x.safetensors", {}), "holds no LoRA .*no tensor"),
        (lambda folder: _save(folder / "adapter_model.safetensors", {"a": torch.zeros(2)}), "give its folder"),
        (lambda folder: _save(folder / "adapter_model.safetensors", {"a": torch.zeros(2)}).parent, "adapter_config.json"),
    ],
)  # fmt: skip
def test_what_is_no_adapter_is_named(tmp_path: Path, unet: FramerUNet, make: Any, said: str) -> None:
    """Nothing there, something else, or a damaged file: a sentence that says what is read."""
    with pytest.raises(UserError, match=said) as caught:
        read_adapter(make(tmp_path), unet)
    assert "(kohya)" in str(caught.value) or "give its folder" in str(caught.value)


@pytest.mark.parametrize("damage", ["cut", "header", "empty", "config"])
def test_damaged_adapter_is_refused(files: dict[str, Any], tmp_path: Path, unet: FramerUNet, damage: str) -> None:
    """A file cut short, with a broken header, empty, or beside a broken configuration is a sentence."""
    folder = Path(shutil.copytree(files["plain"]["peft"], tmp_path / "adapter"))
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    content = weights.read_bytes()
    if damage == "config":
        config.write_text(config.read_text()[:-20])
    else:
        weights.write_bytes({"cut": content[:-9], "header": b"\xff" * 64 + content[64:], "empty": b""}[damage])
    with pytest.raises(UserError, match="no readable adapter"):
        load_adapter(unet, folder, SIGNATURE)
    assert not lora_parameters(unet)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("missing", "127 of its 127 tensors do, 1 missing .missing .*lora_A"),
        ("extra", "128 of its 129 tensors do, .*no place for .*attn7"),
        ("shape", r"12[67] of its 128 tensors do, .*shape \(\d+, \d\) where \(\d+, \d+\) belongs: "),
    ],
)
def test_adapter_that_fits_partly_is_refused(
    files: dict[str, Any], tmp_path: Path, unet: FramerUNet, form: str, damage: str, said: str
) -> None:
    """A tensor too few, one too many or of another shape: how many fit, an example of the fault, and an untouched UNet."""
    source = files["plain"][form]
    folder = Path(shutil.copytree(source if source.is_dir() else source.parent, tmp_path / "adapter"))
    file = next(folder.glob("*.safetensors"))
    with safe_open(file, "pt") as opened:
        header = opened.metadata()

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        name = min(n for n in tensors if re.search(r"lora_(A|down)\.weight", n))
        if damage == "extra":
            return tensors | {name.replace("attn1", "attn7"): tensors[name].clone()}
        return {n: t for n, t in tensors.items() if n != name} | (
            {name: torch.zeros(3, 3)} if damage == "shape" else {}
        )

    rewrite(file, file, change, header)
    with pytest.raises(UserError, match=f"does not fit this UNet: {said}"):
        load_adapter(unet, folder, SIGNATURE)
    assert not lora_parameters(unet)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"r": 5}, r"64 of its 128 tensors do|0 of its 128 tensors do"),
        ({"r": "many"}, "describes no LoRA that can be read"),
        ({"rank_pattern": {"(": 2}}, "describes no LoRA that can be read"),
        ({"r": 4.5}, "describes no LoRA that can be read: rank 4.5"),
        ({"r": 0}, r"has rank 0 and alpha 6\.0 in .*; a rank is at least 1"),
        ({"lora_alpha": float("nan")}, r"has rank 4 and alpha nan in .*, and alpha a finite number"),
        ({"use_rslora": "false"}, "'false' where true or false belongs"),
        ({"r": None, "peft_type": "LOHA"}, "type LOHA; only LORA"),
        ({"bias": "all"}, "uses bias, which is not supported"),
        ({"init_lora_weights": "pissa", "lora_bias": True}, "uses init_lora_weights, lora_bias"),
        ({"some_new_kind": True}, "uses some_new_kind"),
    ],
    ids=str,
)
def test_other_kinds_of_peft_are_refused(
    files: dict[str, Any], tmp_path: Path, unet: FramerUNet, changes: dict[str, Any], said: str
) -> None:
    """A configuration that the tensors contradict, or that would mean another network if it were read as LoRA."""
    folder = Path(shutil.copytree(files["plain"]["peft"], tmp_path / "adapter"))
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    with pytest.raises(UserError, match=said):
        load_adapter(unet, folder, SIGNATURE)


@pytest.mark.parametrize("form", FORMATS)
def test_numbers_that_are_none_are_refused(files: dict[str, Any], tmp_path: Path, unet: FramerUNet, form: str) -> None:
    """NaN or infinity in a tensor is named, and the UNet stays untouched."""
    source = files["plain"][form]
    folder = Path(shutil.copytree(source if source.is_dir() else source.parent, tmp_path / "adapter"))
    file = next(folder.glob("*.safetensors"))
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    name = max(n for n in load_file(file) if re.search(r"lora_(B|up)\.weight", n))
    rewrite(file, file, lambda tensors: tensors | {name: tensors[name] / 0}, header)
    with pytest.raises(UserError, match=r"holds NaN or infinity in .*lora_B\.weight"):
        load_adapter(unet, folder, SIGNATURE)
    assert not lora_parameters(unet)


@pytest.mark.parametrize("form", FORMATS)
def test_an_adapter_that_lost_layers_is_refused(tmp_path: Path, unet: FramerUNet, form: str) -> None:
    """Whole layers that are gone leave a file that fits; the number that were trained stands in its header."""
    trained, parameters = make_trained()
    save_adapter(tmp_path / "peft", dict(parameters), trained, ABOUT | {"modules": 64})
    adapter = read_adapter(tmp_path / "peft", unet)
    load_adapter(make_unet(), write_all(adapter, tmp_path / "whole")[form], SIGNATURE)
    kept = sorted(adapter.kind.ranks)[::2]
    kind = LoraKind({m: adapter.kind.ranks[m] for m in kept}, {m: adapter.kind.alphas[m] for m in kept})
    tensors = {name: t for name, t in adapter.tensors.items() if name.split(".lora_")[0] in kept}
    half = write_all(AdapterFile(kind, tensors, {}, adapter.metadata), tmp_path / "half")[form]
    with pytest.raises(UserError, match="holds 32 of the 64 modules that were trained"):
        load_adapter(unet, half, SIGNATURE)


@pytest.mark.parametrize("form", FORMATS)
def test_an_adapter_that_lost_its_mask_token_is_refused(
    files: dict[str, Any], tmp_path: Path, unet: FramerUNet, form: str
) -> None:
    """What was trained whole is named in the header, so that it is never dropped silently."""
    adapter = read_adapter(files["extras"]["peft"], unet)
    about = ABOUT | {"extras": sorted(adapter.extras)}
    whole = write_all(AdapterFile(adapter.kind, adapter.tensors, adapter.extras, about), tmp_path / "whole")[form]
    load_adapter(make_unet(), whole, SIGNATURE)
    extras = {name: tensor for name, tensor in adapter.extras.items() if name != "mask_token"}
    torn = write_all(AdapterFile(adapter.kind, adapter.tensors, extras, about), tmp_path / "torn")[form]
    with pytest.raises(UserError, match="lacks mask_token, which was trained"):
        load_adapter(unet, torn, SIGNATURE)


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"fps": 0}, "fps is 0; it should be greater than or equal to 0.01"),
        ({"fps": None}, "fps is None"),
        ({"fps": float("nan")}, "fps is nan"),
        ({"motion": "x"}, "motion is 'x'"),
        ({"precision": "fp8"}, "precision is 'fp8'"),
        ({"base_signature": 5}, "base_signature is 5"),
        ({"base_signature": ["a"]}, "base_signature.0 is 'a'"),
        ({"extras": 5}, "extras is 5"),
        ({"recipe": []}, r"recipe is \[\]"),
    ],
)
def test_what_is_told_is_checked(tmp_path: Path, told: dict[str, Any], said: str) -> None:
    """A header comes from somebody else: a value of another kind is one sentence, before anything is computed with it."""
    save_file({"a": torch.zeros(1)}, tmp_path / "adapter_model.safetensors", {"framer_toolkit": json.dumps(told)})
    with pytest.raises(UserError, match=f"{tmp_path} tells of itself is damaged: {said}"):
        read_metadata(tmp_path)


def test_what_is_told_may_be_more(tmp_path: Path) -> None:
    """Fields that are not known here are passed on; what is no JSON, or nested beyond reading, is nothing."""
    for text, told in (('{"fps": 30.0, "mine": {"a": 1}}', {"fps": 30.0, "mine": {"a": 1}}), ("[" * 100_000, {})):
        save_file({"a": torch.zeros(1)}, tmp_path / "adapter_model.safetensors", {"framer_toolkit": text})
        assert read_metadata(tmp_path) == told


def test_names_in_the_files(files: dict[str, Any]) -> None:
    """One tensor of each kind under the name that each format gives it."""
    names = {
        "peft": ("base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_magnitude_vector"),
        "diffusers": ("unet.{}.lora_A.weight", "unet.{}.lora_magnitude_vector"),
        "kohya": ("lora_unet_{}.lora_down.weight", "lora_unet_{}.dora_scale"),
    }
    for form, wanted in names.items():
        source = files["everything"][form]
        held = load_file(next(source.glob("*.safetensors")) if source.is_dir() else source)
        module = MODULE.replace(".", "_") if form == "kohya" else MODULE
        assert {name.format(module) for name in wanted} <= held.keys()


def _write(file: Path, content: bytes) -> Path:
    file.write_bytes(content)
    return file


def _save(file: Path, tensors: dict[str, Tensor]) -> Path:
    save_file(tensors, file)
    return file
