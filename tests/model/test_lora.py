"""The adapter: what it touches, what it leaves, and its file. Run: pytest tests/model/test_lora.py"""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from tests.model.conftest import forward, make_inputs, make_unet, wake
from toolkit.errors import UserError
from toolkit.model.lora import (
    METADATA_KEY,
    enable_adapter,
    inject_lora,
    load_adapter,
    lora_parameters,
    peft_name,
    save_adapter,
)
from toolkit.model.unet import FramerUNet

ABOUT = {"base": "somewhere/base", "base_fingerprint": "0123456789abcdef", "step": 7}
FINGERPRINT = ABOUT["base_fingerprint"]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """An adapter of rank 4 and alpha 6, trained in appearance, saved."""
    unet = make_unet()
    parameters = inject_lora(unet, 4, 6.0, "spatial", 0)
    wake(parameters)
    save_adapter(tmp_path, dict(parameters), unet, ABOUT)
    return tmp_path


@torch.no_grad()
def tuned_output(folder: Path, scale: float = 1.0) -> torch.Tensor:
    unet = make_unet()
    load_adapter(unet, folder, FINGERPRINT, scale)
    return forward(unet, make_inputs())


@torch.no_grad()
def base_output() -> torch.Tensor:
    return forward(make_unet(), make_inputs())


@pytest.mark.parametrize("targets", ["spatial", "temporal", "all"])
def test_fresh_adapter_leaves_the_output_unchanged(unet: FramerUNet, targets: str) -> None:
    """B starts at zero, so the adapted network is the base to rounding; with B awake it is not."""
    parameters = inject_lora(unet, 4, 4, targets, 0)
    with torch.no_grad():
        assert (forward(unet, make_inputs()) - base_output()).abs().max() < 1e-6
        wake(parameters)
        assert (forward(unet, make_inputs()) - base_output()).abs().max() > 1e-3


def test_adapter_adds_alpha_over_rank_b_a(unet: FramerUNet) -> None:
    """y = W x + b + alpha / rank B A x on one layer, computed by hand."""
    parameters = inject_lora(unet, 4, 6.0, "spatial", 0)
    wake(parameters)
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"
    layer, x = unet.get_submodule(name), torch.randn(2, 5, 32)
    a, b = (parameters[f"{name}.lora_{m}.default.weight"] for m in "AB")
    by_hand = x @ layer.base_layer.weight.T + layer.base_layer.bias + 6 / 4 * (x @ a.T) @ b.T
    assert torch.allclose(layer(x), by_hand, atol=1e-5)


def test_start_depends_on_the_seed_alone() -> None:
    """The A matrices come from the seed, not from the global generator, and are bounded as PEFT's default is."""
    first = inject_lora(make_unet(), 4, 4, "spatial", 3)
    torch.manual_seed(1234)
    again, other = inject_lora(make_unet(), 4, 4, "spatial", 3), inject_lora(make_unet(), 4, 4, "spatial", 4)
    for name, parameter in first.items():
        assert torch.equal(parameter, again[name])
        if ".lora_A." in name:
            assert not torch.equal(parameter, other[name])
            bound = parameter.shape[1] ** -0.5  # kaiming_uniform with a = sqrt(5)
            assert 0.8 * bound < parameter.abs().max() <= bound
        else:
            assert not parameter.any()


@pytest.mark.parametrize("targets", ["to_q", r".*\.attn9\..*", r"conv_in"])
def test_expression_without_a_match_is_refused(unet: FramerUNet, targets: str) -> None:
    """A part of a name, a wrong name and a layer that is not linear match nothing, and the error repeats them."""
    with pytest.raises(UserError, match="matches no linear layer"):
        inject_lora(unet, 4, 4, targets, 0)
    assert not lora_parameters(unet)


def test_invalid_expression_is_refused(unet: FramerUNet) -> None:
    """A broken regular expression is a sentence."""
    with pytest.raises(UserError, match="'\\(to_q' is not a regular expression"):
        inject_lora(unet, 4, 4, "(to_q", 0)


def test_expression_selects_what_it_matches(unet: FramerUNet) -> None:
    """A regular expression over whole names adapts those layers and no other of the same ending."""
    chosen = r"(down_blocks|mid_block)\..*\.transformer_blocks\.0\.attn2\.to_v"
    parameters = inject_lora(unet, 2, 2, chosen, 0)
    modules = {name.split(".lora_")[0] for name in parameters}
    assert modules == {
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v",
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_v",
    }


def test_masters_are_fp32_on_a_bf16_base() -> None:
    """The base keeps bf16, the adapter is fp32, and the two run together under autocast."""
    unet = make_unet(dtype=torch.bfloat16)
    parameters = inject_lora(unet, 4, 4, "all", 0)
    assert {p.dtype for p in parameters.values()} == {torch.float32}
    assert {p.dtype for n, p in unet.named_parameters() if n not in parameters} == {torch.bfloat16}
    assert unet.dtype == torch.bfloat16
    wake(parameters)
    with torch.autocast("cpu", torch.bfloat16):
        forward(unet, make_inputs(dtype=torch.bfloat16)).float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in parameters.values())


def test_gradient_flows_to_the_adapter_only(unet: FramerUNet) -> None:
    """Every adapter matrix gets a gradient, no weight of the base does; checkpointing changes no gradient."""
    parameters = inject_lora(unet, 4, 4, "all", 0)
    wake(parameters)
    assert {n for n, p in unet.named_parameters() if p.requires_grad} == set(parameters)
    unet.train()
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            unet.enable_gradient_checkpointing()
        unet.zero_grad()
        forward(unet, make_inputs()).square().mean().backward()
        assert {n for n, p in unet.named_parameters() if p.grad is not None} == set(parameters)
        grads.append({name: p.grad.clone() for name, p in parameters.items()})
    assert all(g.abs().max() > 1e-8 for g in grads[0].values())
    assert all(torch.allclose(grads[0][n], grads[1][n], rtol=1e-5, atol=1e-9) for n in parameters)


def test_saved_and_loaded_adapter_is_the_same(saved: Path, tmp_path: Path) -> None:
    """Saving, loading and saving again gives the same tensors and the same output, and the metadata comes back."""
    unet = make_unet()
    parameters = inject_lora(unet, 4, 6.0, "spatial", 0)
    wake(parameters)
    loaded = make_unet()
    about = load_adapter(loaded, saved, FINGERPRINT)
    assert about == ABOUT
    with torch.no_grad():
        assert torch.equal(forward(loaded, make_inputs()), forward(unet, make_inputs()))
    again = lora_parameters(loaded)
    assert again.keys() == parameters.keys() and all(torch.equal(again[n], parameters[n]) for n in again)
    assert not any(p.requires_grad for p in loaded.parameters())


def test_peft_reads_the_adapter(saved: Path) -> None:
    """PeftModel.from_pretrained on a plain UNet gives the same output: the files are PEFT's own."""
    model = PeftModel.from_pretrained(make_unet(), saved)
    with torch.no_grad():
        theirs = model.base_model.model(**make_inputs(), return_dict=False)[0]
    assert torch.allclose(theirs, tuned_output(saved), atol=1e-6)
    assert (theirs - base_output()).abs().max() > 1e-3
    config = json.loads((saved / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 6.0, "somewhere/base")


def test_peft_finds_every_tensor(saved: Path) -> None:
    """The names in the file are those PEFT writes itself."""
    from peft import get_peft_model_state_dict

    model = PeftModel.from_pretrained(make_unet(), saved)
    theirs, mine = (
        get_peft_model_state_dict(model, save_embedding_layers=False),
        load_file(saved / "adapter_model.safetensors"),
    )
    assert theirs.keys() == mine.keys() and all(torch.equal(theirs[n], mine[n]) for n in mine)


def test_scale_multiplies_alpha_over_rank(saved: Path) -> None:
    """lora_scale 0 is the base, 1 the adapter as trained, and 0.5 the adapter with half its alpha."""
    assert torch.allclose(tuned_output(saved, 0.0), base_output(), atol=1e-6)
    half = saved / "half"
    half.mkdir()
    shutil.copy(saved / "adapter_model.safetensors", half)
    config = json.loads((saved / "adapter_config.json").read_text())
    (half / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 3.0}))
    assert torch.allclose(tuned_output(saved, 0.5), tuned_output(half), atol=1e-6)
    assert (tuned_output(saved, 0.5) - tuned_output(saved)).abs().max() > 1e-3


def test_disabled_adapter_is_the_base(saved: Path) -> None:
    """Off is the base bit for bit, on again the adapter bit for bit."""
    unet = make_unet()
    load_adapter(unet, saved, FINGERPRINT)
    with torch.no_grad():
        tuned = forward(unet, make_inputs())
        enable_adapter(unet, False)
        assert torch.equal(forward(unet, make_inputs()), base_output())
        enable_adapter(unet, True)
        assert torch.equal(forward(unet, make_inputs()), tuned)


def test_an_adapter_of_another_kind_is_refused(saved: Path) -> None:
    """An adapter with rsLoRA would load with a wrong scale; it is refused by name."""
    config = json.loads((saved / "adapter_config.json").read_text())
    (saved / "adapter_config.json").write_text(json.dumps(config | {"use_rslora": True}))
    with pytest.raises(UserError, match="use_rslora"):
        load_adapter(make_unet(), saved, FINGERPRINT)


def test_adapter_of_another_base_is_refused(saved: Path, unet: FramerUNet) -> None:
    """The error names the base it was trained on and both fingerprints; the UNet is left as it was."""
    with pytest.raises(UserError, match=f"somewhere/base .{FINGERPRINT}.*ffff.*--base"):
        load_adapter(unet, saved, "ffff")
    assert not lora_parameters(unet)


def test_missing_adapter_is_refused(tmp_path: Path, unet: FramerUNet) -> None:
    """An empty folder is a sentence that says what should be in it."""
    with pytest.raises(UserError, match="no readable adapter in .*adapter_model.safetensors"):
        load_adapter(unet, tmp_path, FINGERPRINT)


@pytest.mark.parametrize("damage", ["cut", "header", "empty", "config"])
def test_damaged_adapter_is_refused(saved: Path, unet: FramerUNet, damage: str) -> None:
    """A file cut short, with a broken header, empty, or beside a broken configuration is a sentence."""
    weights, config = saved / "adapter_model.safetensors", saved / "adapter_config.json"
    content = weights.read_bytes()
    if damage == "config":
        config.write_text(config.read_text()[:-20])
    else:
        weights.write_bytes({"cut": content[:-9], "header": b"\xff" * 64 + content[64:], "empty": b""}[damage])
    with pytest.raises(UserError, match="no readable adapter"):
        load_adapter(unet, saved, FINGERPRINT)


@pytest.mark.parametrize("damage", ["missing", "extra", "shape", "rank"])
def test_adapter_that_does_not_fit_is_refused(saved: Path, unet: FramerUNet, damage: str) -> None:
    """A tensor too few, one too many, one of another shape, or a configuration of another rank is a sentence."""
    weights, config = saved / "adapter_model.safetensors", saved / "adapter_config.json"
    tensors = load_file(weights)
    name = sorted(tensors)[0]
    if damage == "missing":
        del tensors[name]
    elif damage == "extra":
        tensors[name.replace("attn1", "attn7")] = tensors[name].clone()
    elif damage == "shape":
        tensors[name] = torch.zeros(3, 3)
    else:
        config.write_text(json.dumps(json.loads(config.read_text()) | {"r": 5}))
    save_file(tensors, weights, metadata={METADATA_KEY: json.dumps({"base_fingerprint": FINGERPRINT})})
    with pytest.raises(UserError, match="does not fit this UNet"):
        load_adapter(unet, saved, FINGERPRINT)


def test_names_in_the_file(unet: FramerUNet) -> None:
    """base_model.model. before, and no adapter name inside."""
    parameters = inject_lora(unet, 2, 2, "spatial", 0)
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.default.weight"
    assert name in parameters
    assert peft_name(name) == "base_model.model." + name.replace(".default", "")


def test_saving_does_not_move_the_training_tensors(unet: FramerUNet, tmp_path: Path) -> None:
    """The parameters, their storage and their gradients' flag are what they were before a save."""
    parameters = inject_lora(unet, 2, 2, "spatial", 0)
    before = {name: (p.data_ptr(), copy.deepcopy(p.data)) for name, p in parameters.items()}
    save_adapter(tmp_path, dict(parameters), unet, ABOUT)
    for name, parameter in parameters.items():
        assert parameter.requires_grad and parameter.data_ptr() == before[name][0]
        assert torch.equal(parameter, before[name][1])
