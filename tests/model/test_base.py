"""Loading a base, and each way a folder can be wrong. Run: pytest tests/model/test_base.py"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNetSpatioTemporalConditionModel
from safetensors.torch import load_file, save_file

from tests.model.conftest import SMALL, make_unet
from toolkit.errors import UserError
from toolkit.model.base import Base, fingerprint_weights, load_base, load_unet

UNET_WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def load(folder: Path, precision: str = "fp32", unet: Path | None = None) -> Base:
    return load_base(str(folder), unet and str(unet), None, torch.device("cpu"), precision)


@pytest.fixture
def folder(tiny_base: Path, tmp_path: Path) -> Path:
    """A copy of the tiny base to damage."""
    return Path(shutil.copytree(tiny_base, tmp_path / "base"))


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_base_is_frozen_and_in_its_precision(tiny_base: Path, precision: str) -> None:
    """Every part is in eval mode, without gradients, in the asked dtype."""
    base = load(tiny_base, precision)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    for part in (base.unet, base.vae, base.image_encoder):
        assert not part.training and not any(p.requires_grad for p in part.parameters())
        assert {p.dtype for p in part.parameters()} == {dtype}
    assert base.name == str(tiny_base) and base.scheduler["sigma_max"] == 700.0


def test_vae_that_must_upcast_stays_fp32(folder: Path) -> None:
    """force_upcast, which SVD's VAE has, keeps the VAE in fp32 under bf16."""
    edit_json(folder / "vae/config.json", force_upcast=True)
    base = load(folder, "bf16")
    assert base.vae.dtype == torch.float32 and base.unet.dtype == torch.bfloat16


def test_loaded_weights_are_the_files(tiny_base: Path) -> None:
    """Every tensor of unet/, mask_token included, is that of the file."""
    state, wanted = load(tiny_base).unet.state_dict(), load_file(tiny_base / UNET_WEIGHTS)
    assert "mask_token" in wanted and state.keys() == wanted.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in wanted.items())


def test_unet_from_another_folder(tiny_base: Path, tmp_path: Path) -> None:
    """With `unet`, that folder's UNet is taken and names the base; the base folder needs no unet of its own."""
    make_unet(seed=5).save_pretrained(tmp_path / "framer/unet")
    rest = Path(shutil.copytree(tiny_base, tmp_path / "rest", ignore=shutil.ignore_patterns("unet")))
    base = load(rest, unet=tmp_path / "framer")
    assert torch.equal(base.unet.mask_token, make_unet(seed=5).mask_token)
    assert base.name == str(tmp_path / "framer") and base.fingerprint == fingerprint_weights(tmp_path / "framer/unet")


def test_svd_unet_is_widened(tmp_path: Path) -> None:
    """Eight channels on disk load as nine, the ninth column zero, in the asked dtype."""
    torch.manual_seed(0)
    stock = UNetSpatioTemporalConditionModel(in_channels=8, **SMALL)
    stock.save_pretrained(tmp_path / "unet")
    unet = load_unet(tmp_path, torch.bfloat16)
    assert unet.config.in_channels == 9 and {p.dtype for p in unet.parameters()} == {torch.bfloat16}
    assert torch.equal(unet.conv_in.weight[:, :8], stock.conv_in.weight.bfloat16())
    assert not unet.conv_in.weight[:, 8].any()


def test_fingerprint_follows_the_weights(folder: Path) -> None:
    """The same bytes elsewhere have the same fingerprint; one changed weight, another; the configuration has no say."""
    before = load(folder).fingerprint
    edit_json(folder / "unet/config.json", _name_or_path="elsewhere")
    assert load(folder).fingerprint == before and len(before) == 16
    edit_weights(folder / UNET_WEIGHTS, lambda tensors: tensors["mask_token"].add_(1))
    assert load(folder).fingerprint != before


def test_fingerprint_is_of_the_weights_that_are_read(folder: Path) -> None:
    """A half-precision variant beside the weights, as hub snapshots hold, is not read and has no say."""
    before = load(folder).fingerprint
    shutil.copy(folder / UNET_WEIGHTS, folder / "unet/diffusion_pytorch_model.fp16.safetensors")
    assert load(folder).fingerprint == before


def only_bin(folder: Path) -> None:
    tensors = load_file(folder / UNET_WEIGHTS)
    torch.save(tensors, folder / "unet/diffusion_pytorch_model.bin")
    os.remove(folder / UNET_WEIGHTS)


def drop(folder: Path, part: str) -> None:
    shutil.rmtree(folder / part)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (shutil.rmtree, "no base model at .*diffusers layout"),
    "no vae": (lambda f: drop(f, "vae"), "lacks vae; a base in SVD layout holds unet, vae, image_encoder, scheduler"),
    "no unet": (lambda f: drop(f, "unet"), "lacks unet"),
    "no image encoder, no scheduler": (
        lambda f: (drop(f, "image_encoder"), drop(f, "scheduler")), "lacks image_encoder, scheduler",
    ),
    "five channels": (lambda f: edit_json(f / "unet/config.json", in_channels=5), "5 channels.*9 .Framer. or 8 .SVD"),
    "epsilon": (
        lambda f: edit_json(f / "scheduler/scheduler_config.json", prediction_type="epsilon"),
        "prediction_type epsilon.*v_prediction",
    ),
    "linear betas": (
        lambda f: edit_json(f / "scheduler/scheduler_config.json", beta_schedule="linear"), "beta_schedule linear",
    ),
    "pickled weights": (only_bin, "safetensors"),
    "no unet config": (lambda f: os.remove(f / "unet/config.json"), "config.json"),
    "no scheduler config": (lambda f: os.remove(f / "scheduler/scheduler_config.json"), "scheduler_config.json"),
    "no vae weights": (lambda f: os.remove(f / "vae/diffusion_pytorch_model.safetensors"), "vae"),
    "no mask token": (
        lambda f: edit_weights(f / UNET_WEIGHTS, lambda tensors: tensors.pop("mask_token")),
        "missing keys: mask_token",
    ),
    "foreign weight": (
        lambda f: edit_weights(f / UNET_WEIGHTS, lambda tensors: tensors.update(extra=torch.zeros(2))),
        "unexpected keys: extra",
    ),
    "missing weight": (
        lambda f: edit_weights(f / UNET_WEIGHTS, lambda tensors: tensors.pop("conv_out.bias")), "conv_out.bias",
    ),
    "missing vae weight": (
        lambda f: edit_weights(f / "vae/diffusion_pytorch_model.safetensors", lambda t: t.pop("quant_conv.bias")),
        "quant_conv.bias",
    ),
    "cut weights": (lambda f: cut(f / UNET_WEIGHTS), "unet"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_base_is_refused(folder: Path, fault: str) -> None:
    """One sentence that names the part and what it must be, before anything runs."""
    damage, said = FAULTS[fault]
    damage(folder)
    with pytest.raises(UserError, match=said) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_svd_unet_with_a_missing_weight_is_refused(tmp_path: Path) -> None:
    """Eight channels and a weight too few: never filled with random numbers."""
    UNetSpatioTemporalConditionModel(in_channels=8, **SMALL).save_pretrained(tmp_path / "unet")
    edit_weights(tmp_path / UNET_WEIGHTS, lambda tensors: tensors.pop("conv_out.bias"))
    with pytest.raises(UserError, match="conv_out.bias"):
        load_unet(tmp_path, torch.float32)
