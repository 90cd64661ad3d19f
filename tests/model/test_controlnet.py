"""The ControlNet is Framer's, and steers the stock UNet as Framer's fork does. Run: pytest tests/model/test_controlnet.py

The reference below runs the networks' own submodules one by one, with the residuals added in between, without any hook.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.model.conftest import SMALL, forward, make_inputs, make_unet
from tests.model.control import make_controlnet
from toolkit.errors import UserError
from toolkit.model import controlnet as module
from toolkit.model.attention import set_attention
from toolkit.model.controlnet import (
    PUBLISHED_CONFIG,
    FramerControlNet,
    Residuals,
    find_controlnet,
    load_controlnet,
    steer,
)
from toolkit.model.unet import FramerUNet

# SVD's four levels and two layers, narrow; and the two levels of the other tests
FOUR_LEVELS = SMALL | {
    "block_out_channels": (32, 32, 64, 64),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlockSpatioTemporal",) * 3 + ("DownBlockSpatioTemporal",),
    "up_block_types": ("UpBlockSpatioTemporal",) + ("CrossAttnUpBlockSpatioTemporal",) * 3,
    "num_attention_heads": (2, 2, 4, 4),
}
# wwen1997/framer_512x320 controlnet/config.json, as published with kijai/ComfyUI-FramerWrapper
PUBLISHED_JSON: dict[str, Any] = {
    "_class_name": "ControlNetSVDModel",
    "_diffusers_version": "0.24.0",
    "addition_time_embed_dim": 256,
    "block_out_channels": [320, 640, 1280, 1280],
    "conditioning_channels": 3,
    "conditioning_embedding_out_channels": [16, 32, 96, 256],
    "cross_attention_dim": 1024,
    "down_block_types": ["CrossAttnDownBlockSpatioTemporal"] * 3 + ["DownBlockSpatioTemporal"],
    "feature_channels": 160,
    "feature_out_channels": [160, 160, 256, 256],
    "in_channels": 9,
    "layers_per_block": 2,
    "num_attention_heads": [5, 10, 20, 20],
    "num_frames": 25,
    "out_channels": 4,
    "projection_class_embeddings_input_dim": 768,
    "sample_size": 96,
    "transformer_layers_per_block": 1,
    "up_block_types": ["UpBlockSpatioTemporal"] + ["CrossAttnUpBlockSpatioTemporal"] * 3,
    "with_id_feature": False,
}


def load(source: Path, dtype: torch.dtype = torch.float32, unet: FramerUNet | None = None) -> FramerControlNet:
    return load_controlnet(find_controlnet(str(source)), dtype, unet or make_unet())


def make_four_levels() -> FramerUNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return FramerUNet(in_channels=9, **FOUR_LEVELS).requires_grad_(False).eval()


def make_heatmaps(factor: int = 2) -> Tensor:
    """Two clips of three frames, 0..255, `factor` times the size of make_inputs' latents."""
    generator = torch.Generator().manual_seed(2)
    return torch.rand(2, 3, 1, 8 * factor, 8 * factor, generator=generator).mul(255).round().repeat(1, 1, 3, 1, 1)


def control(controlnet: FramerControlNet, inputs: dict[str, Tensor], heatmaps: Tensor, scale: float = 1) -> Residuals:
    return controlnet(*inputs.values(), heatmaps, scale)


def controlled(unet: FramerUNet, residuals: Residuals, inputs: dict[str, Tensor]) -> Tensor:
    with steer(unet, residuals):
        return forward(unet, inputs)


def encode(network: Any, inputs: dict[str, Tensor], embedded: Tensor | float) -> tuple[list[Tensor], Tensor, dict]:
    """Reference of the encoder and the middle block, submodule by submodule."""
    sample, timestep, tokens, ids = inputs.values()
    batch, frames = sample.shape[:2]
    time = network.time_embedding(network.time_proj(timestep))
    time = time + network.add_embedding(network.add_time_proj(ids.flatten()).reshape(batch, -1))
    common = {
        "temb": time.repeat_interleave(frames, 0),
        "encoder_hidden_states": tokens.repeat_interleave(frames, 0),
        "image_only_indicator": torch.zeros(batch, frames),
    }
    x = network.conv_in(sample.flatten(0, 1)) + embedded
    skips = [x]
    for block in network.down_blocks:
        x, made = block(x, **accepted(block, common))
        skips += made
    return skips, network.mid_block(x, **common), common


def accepted(block: Any, common: dict[str, Tensor]) -> dict[str, Tensor]:
    plain = not getattr(block, "has_cross_attention", False)
    return {name: value for name, value in common.items() if not (plain and name == "encoder_hidden_states")}


def reference(unet: Any, controlnet: Any, inputs: dict[str, Tensor], heatmaps: Tensor, scale: float) -> Tensor:
    """Reference of the controlled UNet: Framer's order of operations, written out."""
    embedding = controlnet.controlnet_cond_embedding
    embedded = heatmaps.flatten(0, 1)
    for conv in (embedding.conv_in, *embedding.blocks):
        embedded = torch.nn.functional.silu(conv(embedded))
    made, middle, _ = encode(controlnet, inputs, embedding.conv_out(embedded))
    skips, x, common = encode(unet, inputs, 0.0)
    x = x + scale * controlnet.controlnet_mid_block(middle)
    skips = [
        skip + scale * conv(residual)
        for skip, conv, residual in zip(skips, controlnet.controlnet_down_blocks, made, strict=True)
    ]
    for block in unet.up_blocks:
        own = tuple(skips.pop() for _ in block.resnets)[::-1]
        x = block(hidden_states=x, res_hidden_states_tuple=own, **accepted(block, common))
    x = unet.conv_out(torch.nn.functional.silu(unet.conv_norm_out(x)))
    return x.unflatten(0, inputs["sample"].shape[:2])


def test_full_size_is_framers() -> None:
    """Of the published configuration: 682,024,417 parameters under 671 names, 12 skips, and Framer's own names."""
    with torch.device("meta"):
        published = FramerControlNet.from_config(PUBLISHED_JSON).to("meta")
        ours = FramerControlNet.from_config(PUBLISHED_CONFIG).to("meta")
    shapes = {name: tensor.shape for name, tensor in published.state_dict().items()}
    assert sum(shape.numel() for shape in shapes.values()) == 682_024_417 and len(shapes) == 671
    assert shapes == {name: tensor.shape for name, tensor in ours.state_dict().items()}
    assert {name.split(".")[0] for name in shapes} == {
        *("conv_in", "time_embedding", "add_embedding", "down_blocks", "mid_block"),
        *("controlnet_cond_embedding", "controlnet_down_blocks", "controlnet_mid_block"),
    }
    widths = [320] * 4 + [640] * 3 + [1280] * 5
    assert [shapes[f"controlnet_down_blocks.{i}.weight"] for i in range(12)] == [(w, w, 1, 1) for w in widths]
    assert shapes["controlnet_cond_embedding.blocks.5.weight"] == (256, 96, 3, 3)
    assert shapes["controlnet_cond_embedding.conv_out.weight"] == (320, 256, 3, 3)


@pytest.mark.parametrize("make", [make_unet, make_four_levels])
@pytest.mark.parametrize("batch", [1, 2])
def test_hooks_equal_the_written_out_network(make: Any, batch: int) -> None:
    """The steered stock UNet gives the reference's output, and the reference's gradient of its input."""
    unet, factor = make(), 2 if make is make_unet else 8
    controlnet = make_controlnet(unet, factor, awake=True)
    inputs = {name: tensor[:batch] for name, tensor in make_inputs().items()}
    heatmaps = make_heatmaps(factor)[:batch]
    sample = inputs["sample"].requires_grad_()
    residuals = control(controlnet, inputs, heatmaps, 0.7)
    assert len(residuals.skips) == (12 if make is make_four_levels else 4)
    ours = controlled(unet, residuals, inputs)
    wanted = reference(unet, controlnet, inputs, heatmaps, 0.7)
    assert torch.allclose(ours, wanted, rtol=1e-5, atol=1e-5)
    grads = [torch.autograd.grad(output.square().sum(), sample)[0] for output in (ours, wanted)]
    assert torch.allclose(*grads, rtol=1e-4, atol=1e-4 * float(grads[1].abs().max()))
    with torch.no_grad():
        assert (ours - forward(unet, inputs)).abs().max() > 0.1


def test_clips_of_a_batch_do_not_meet() -> None:
    """A batch of two gives what each clip gives alone; Framer's own classes mix the clips' tokens."""
    unet = make_unet()
    controlnet, inputs, heatmaps = make_controlnet(unet, awake=True), make_inputs(), make_heatmaps()
    with torch.no_grad():
        both = controlled(unet, control(controlnet, inputs, heatmaps), inputs)
        for b in range(2):
            alone = {name: tensor[b : b + 1] for name, tensor in inputs.items()}
            residuals = control(controlnet, alone, heatmaps[b : b + 1])
            assert torch.allclose(controlled(unet, residuals, alone)[0], both[b], atol=1e-5)


def test_residuals_of_identity_convolutions_are_the_unets_own_skips() -> None:
    """With the heatmaps' embedding at zero, the encoder copied from a UNet makes what the UNet's own makes."""
    unet, inputs = make_unet(), make_inputs()
    controlnet = make_controlnet(unet)
    for conv in (*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block):
        torch.nn.init.dirac_(conv.weight)
    with torch.no_grad():
        residuals = control(controlnet, inputs, make_heatmaps(), 0.5)
        skips, middle, _ = encode(unet, inputs, 0.0)
        for ours, wanted in zip((*residuals.skips, residuals.middle), (*skips, middle), strict=True):
            assert torch.allclose(ours, wanted / 2, atol=1e-5)


def test_no_residual_is_no_change() -> None:
    """A new ControlNet (zero convolutions), scale 0, and a UNet after steering all give the stock output, bit for bit."""
    unet, inputs, heatmaps = make_unet(), make_inputs(), make_heatmaps()
    with torch.no_grad():
        stock = forward(unet, inputs)
        new = make_controlnet(unet)
        assert torch.equal(controlled(unet, control(new, inputs, heatmaps), inputs), stock)
        controlnet = make_controlnet(unet, awake=True)
        assert torch.equal(controlled(unet, control(controlnet, inputs, heatmaps, 0), inputs), stock)
        assert not torch.equal(controlled(unet, control(controlnet, inputs, heatmaps), inputs), stock)
        assert torch.equal(forward(unet, inputs), stock)


def test_steering_ends_with_an_error_too() -> None:
    """No hook stays on the UNet or on the ControlNet when a call fails, and one that does not fit is noticed."""
    unet, inputs = make_unet(), make_inputs()
    controlnet = make_controlnet(unet, awake=True)
    residuals = control(controlnet, inputs, make_heatmaps())
    with pytest.raises(ZeroDivisionError), steer(unet, residuals):
        raise ZeroDivisionError
    with pytest.raises(RuntimeError):
        control(controlnet, inputs | {"encoder_hidden_states": torch.zeros(2, 2, 7)}, make_heatmaps())
    with pytest.raises(AssertionError):
        control(controlnet, inputs, make_heatmaps(factor=8))
    for skips in (residuals.skips[1:], residuals.skips + residuals.skips[:1]):
        with pytest.raises((AssertionError, ValueError)):
            controlled(unet, Residuals(skips, residuals.middle), inputs)
    for part in (*unet.modules(), *controlnet.modules()):
        assert not part._forward_hooks and not part._forward_pre_hooks


def test_gradient_checkpointing_changes_no_gradient() -> None:
    """Every weight of the UNet gets the same gradient with and without it, taken after steering has ended."""
    grads = []
    for checkpointing in (False, True):
        unet, inputs = make_unet().requires_grad_(), make_inputs()
        controlnet = make_controlnet(unet, awake=True)
        if checkpointing:
            unet.enable_gradient_checkpointing()
            controlnet.enable_gradient_checkpointing()
        residuals = control(controlnet, inputs, make_heatmaps())
        assert not residuals.middle.requires_grad
        controlled(unet, residuals, inputs).square().mean().backward()
        grads.append({name: p.grad for name, p in unet.named_parameters() if name != "mask_token"})
    for name, plain in grads[0].items():
        assert plain.abs().max() > 0, name
        assert torch.allclose(plain, grads[1][name], rtol=1e-4, atol=1e-6), name


def test_bf16_control_of_an_fp32_unet() -> None:
    """Residuals are added in the UNet's dtype, whatever the ControlNet's, and the toolkit's attention runs in both."""
    unet, inputs, heatmaps = make_unet(), make_inputs(), make_heatmaps()
    controlnet = make_controlnet(unet, awake=True)
    halved = {n: t.bfloat16() if n in ("sample", "encoder_hidden_states") else t for n, t in inputs.items()}
    with torch.no_grad():
        wanted = controlled(unet, control(controlnet, inputs, heatmaps), inputs)
        set_attention(controlnet, "sdpa")
        assert torch.allclose(controlled(unet, control(controlnet, inputs, heatmaps), inputs), wanted, atol=1e-5)
        residuals = control(controlnet.to(torch.bfloat16), halved, heatmaps)
        ours = controlled(unet, residuals, inputs)
    assert residuals.middle.dtype == torch.bfloat16 and ours.dtype == torch.float32
    assert (ours - wanted).std() < 0.05 * wanted.std()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small ControlNet in controlnet/, its config.json as Framer's code writes it; read only."""
    folder = tmp_path_factory.mktemp("control")
    make_controlnet(make_unet(), awake=True).save_pretrained(folder / "controlnet")
    edit_config(folder / "controlnet", _class_name="ControlNetSVDModel", with_id_feature=False, feature_channels=160)
    return folder


def edit_config(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def copy_of(saved: Path, folder: Path) -> Path:
    for file in (saved / "controlnet").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.mark.parametrize("place", [".", "controlnet"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folders_load(saved: Path, place: str, dtype: torch.dtype) -> None:
    """The folder itself or the one above it: the same weights in the asked dtype, frozen, in eval mode."""
    loaded = load(saved / place, dtype)
    weights = load_file(saved / "controlnet/diffusion_pytorch_model.safetensors")
    assert loaded.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name].to(dtype)) for name, tensor in loaded.state_dict().items())
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


def test_single_file_loads(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One fp16 file without a config, as for ComfyUI, is read by the published configuration (here a small one)."""
    file = saved / "controlnet/diffusion_pytorch_model.safetensors"
    with pytest.raises(UserError, match="missing keys"):  # not of the published size
        load(file)
    monkeypatch.setattr(
        module, "PUBLISHED_CONFIG", SMALL | {"in_channels": 9, "conditioning_embedding_out_channels": (16, 32)}
    )
    halves = {name: tensor.half() for name, tensor in load_file(file).items()}
    save_file(halves, tmp_path / "fp16.safetensors")
    loaded = load(tmp_path / "fp16.safetensors")
    assert all(torch.equal(tensor, halves[name].float()) for name, tensor in loaded.state_dict().items())
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    halves["mask_token"] = halves.pop("controlnet_mid_block.bias")
    save_file(halves, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="missing keys: controlnet_mid_block.bias; unexpected keys: mask_token"):
        load(tmp_path / "other.safetensors")


def test_folders_are_read_strictly(saved: Path, tmp_path: Path) -> None:
    """A weight that lacks and one too many are both named; from_pretrained would make the first one up."""
    folder = copy_of(saved, tmp_path)
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    weights["stray"] = weights.pop("conv_in.bias")
    save_file(weights, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="missing keys: conv_in.bias; unexpected keys: stray"):
        load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"with_id_feature": True}, "with_id_feature"),
        ({"in_channels": 8}, "conv_in"),
        ("pickle", "run code"),
        ("pickled file", "run code"),
        ("empty", "no ControlNet at"),
        ("no such folder", "no ControlNet at"),
    ],
)
def test_what_is_refused(saved: Path, tmp_path: Path, change: Any, message: str) -> None:
    """Point features, other channels, pickles and nothing at all: each one sentence."""
    folder = copy_of(saved, tmp_path) if change != "empty" else tmp_path
    if isinstance(change, dict):
        edit_config(folder, **change)
    elif change == "pickle":
        (folder / "diffusion_pytorch_model.safetensors").rename(folder / "diffusion_pytorch_model.bin")
    elif change == "pickled file":
        folder = folder / "controlnet.pth"
        folder.write_bytes(b"\x80\x04.")
    elif change == "no such folder":
        folder = tmp_path / "nowhere"
    with pytest.raises(UserError, match=message) as refusal:
        load(folder)
    assert "\n" not in str(refusal.value)


def test_a_controlnet_of_another_unet_is_refused(saved: Path) -> None:
    """What the two must share is compared before the first step: here the width of the tokens."""
    wider = FramerUNet(in_channels=9, **SMALL | {"cross_attention_dim": 32})
    with pytest.raises(UserError, match="cross_attention_dim 16, the UNet 32"):
        load(saved, unet=wider)
