"""Loading a base in every form that users have it in, and each way it can be wrong. Run: pytest tests/model/test_base.py"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLTemporalDecoder, EulerDiscreteScheduler, UNetSpatioTemporalConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from tests.model.conftest import SMALL, make_unet
from toolkit.config import ModelConfig
from toolkit.errors import UserError
from toolkit.model.base import Base, build_unet_on_meta, load_base, load_unet, same_base, sign_unet
from toolkit.model.controlnet import find_controlnet
from toolkit.model.sources import NAMED_BASES, PARTS, fingerprint_files, name_source
from toolkit.model.unet import PUBLISHED_CONFIGS, widen_conv_in

UNET_WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
VAE_WEIGHTS = "vae/diffusion_pytorch_model.safetensors"
SVD_XT = "stabilityai/stable-video-diffusion-img2vid-xt"
FRAMER = "wwen1997/framer_512x320"


def load(base: Path | str, precision: str = "fp32", **model: Any) -> Base:
    return load_base(ModelConfig(base=str(base), **model), torch.device("cpu"), precision)


@pytest.fixture
def folder(tiny_base: Path, tmp_path: Path) -> Path:
    """A copy of the tiny base to change."""
    return Path(shutil.copytree(tiny_base, tmp_path / "base"))


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# ---- what is loaded


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_base_is_frozen_and_in_its_precision(tiny_base: Path, precision: str) -> None:
    """Every part is in eval mode, without gradients, in the asked dtype."""
    base = load(tiny_base, precision)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    for part in (base.unet, base.vae, base.image_encoder):
        assert not part.training and not any(p.requires_grad for p in part.parameters())
        assert {p.dtype for p in part.parameters()} == {dtype}
    assert base.name == str(tiny_base) and base.scheduler["sigma_max"] == 700.0
    assert base.dtype == dtype and base.parameterization == "v"


def test_loading_leaves_the_libraries_as_they_were(tiny_base: Path) -> None:
    """Their hints and bars are silenced while they load for us, not for the program that uses us."""
    from diffusers.utils import logging as theirs

    before = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    theirs.set_verbosity_info()
    theirs.enable_progress_bar()
    try:
        load(tiny_base)
        assert theirs.get_verbosity() == theirs.INFO and theirs.is_progress_bar_enabled()
    finally:
        theirs.set_verbosity(before[0])
        theirs.enable_progress_bar() if before[1] else theirs.disable_progress_bar()


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


def test_mask_token_survives_where_the_stock_class_drops_it(tmp_path: Path) -> None:
    """diffusers' own loading of a Framer folder loses the token without an error; ours has it, to the bit."""
    make_unet().save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", _class_name="UNetSpatioTemporalConditionModel")  # as Framer's folder says
    stock, report = UNetSpatioTemporalConditionModel.from_pretrained(tmp_path, output_loading_info=True)
    assert list(report["unexpected_keys"]) == ["mask_token"] and not hasattr(stock, "mask_token")
    assert torch.equal(load_unet(tmp_path, torch.float32).mask_token, make_unet().mask_token)


@pytest.mark.parametrize("form", ["pipeline folder", "UNet folder", "single file", "single file in fp16"])
def test_unet_from_elsewhere(tiny_base: Path, tmp_path: Path, form: str) -> None:
    """`unet` in any form replaces the base's and names the base; the base folder needs no unet of its own."""
    wanted, place = make_unet(seed=5), tmp_path / "framer"
    if "fp16" in form:
        wanted = wanted.half()
    wanted.save_pretrained(place / "unet" if form == "pipeline folder" else place)
    if "file" in form:
        place = Path(shutil.move(place / "diffusion_pytorch_model.safetensors", place / "Framer_unet.safetensors"))
    rest = Path(shutil.copytree(tiny_base, tmp_path / "rest", ignore=shutil.ignore_patterns("unet")))
    base = load(rest, unet=str(place))
    assert same_weights(base.unet, wanted.float())
    assert base.name == str(place) and base.sources["unet"].startswith(str(place))
    assert base.sources["vae"] == str(rest / VAE_WEIGHTS)
    assert {p.name: p.shape for p in build_unet_on_meta(ModelConfig(unet=str(place))).parameters()} == {
        p.name: p.shape for p in wanted.parameters()
    }


@pytest.mark.parametrize("form", ["folder", "single file"])
def test_svd_unet_is_widened(tmp_path: Path, form: str) -> None:
    """Eight channels on disk load as nine, the ninth column zero, in the asked dtype."""
    torch.manual_seed(0)
    stock = UNetSpatioTemporalConditionModel(in_channels=8, **SMALL)
    stock.save_pretrained(tmp_path)
    place = tmp_path if form == "folder" else tmp_path / "diffusion_pytorch_model.safetensors"
    unet = load_unet(place, torch.bfloat16)
    assert unet.config.in_channels == 9 and {p.dtype for p in unet.parameters()} == {torch.bfloat16}
    assert torch.equal(unet.conv_in.weight[:, :8], stock.conv_in.weight.bfloat16())
    assert not unet.conv_in.weight[:, 8].any() and not unet.mask_token.any()


def test_single_file_is_copied_not_mapped(tmp_path: Path) -> None:
    """A file that is written over after loading does not change the loaded weights."""
    make_unet().save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    unet = load_unet(file, torch.float32)
    with file.open("r+b") as stream:
        stream.seek(-4096, os.SEEK_END)
        stream.write(bytes(4096))
    assert same_weights(unet, make_unet())


# ---- variants and shards


def save_parts(base: Base, folder: Path, **options: Any) -> None:
    for part in ("unet", "vae", "image_encoder"):
        getattr(base, part).save_pretrained(folder / part, **options)


@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
@pytest.mark.parametrize(
    ("stored", "variant", "read"),
    [
        ((None,), None, None),
        ((None,), "fp16", None),
        (("fp16",), None, "fp16"),
        (("fp16",), "fp16", "fp16"),
        ((None, "fp16"), None, None),
        ((None, "fp16"), "fp16", "fp16"),
    ],
)
def test_variants_and_shards(
    tiny_base: Path, tmp_path: Path, sharded: bool, stored: tuple[str | None, ...], variant: Any, read: str | None
) -> None:
    """The wanted variant is read, else the other; each part whole or in shards, as the libraries write them."""
    tiny = load(tiny_base)
    shutil.copytree(tiny_base / "scheduler", tmp_path / "scheduler")
    wanted = {}
    for kind in stored:
        base = load(tiny_base)
        for part in (base.unet, base.vae, base.image_encoder):
            if kind:
                part.half()
        save_parts(base, tmp_path, variant=kind, **({"max_shard_size": "200KB"} if sharded else {}))
        wanted[kind] = base
    loaded = load(tmp_path, variant=variant)
    for part in ("unet", "vae", "image_encoder"):
        assert same_weights(getattr(loaded, part), getattr(wanted[read], part).float())
    assert all(("fp16" in file.name) == (read == "fp16") for file in loaded.files[:-1])
    assert (len(loaded.files) > 10) == sharded and len(set(loaded.files)) == len(loaded.files)
    assert same_base(loaded.signature, tiny.signature)


# ---- identity


@pytest.mark.parametrize("rounding", [(), (torch.float16,), (torch.bfloat16,), (torch.float16, torch.bfloat16)])
def test_signature_survives_rounding(rounding: tuple[torch.dtype, ...]) -> None:
    """fp32, fp16, bf16 and fp16-then-bf16 copies of one UNet have one signature; another seed has another."""
    unet = make_unet()
    for dtype in rounding:
        unet = unet.to(dtype)
    assert same_base(sign_unet(make_unet()), sign_unet(unet))
    assert not same_base(sign_unet(make_unet(seed=1)), sign_unet(unet))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("moved", ["conv_in and temporal attention", "conv_in", "temporal attention", "up_blocks"])
def test_signature_tells_a_fine_tuned_base(moved: str, seed: int) -> None:
    """Weights moved by 1 % rms, in the parts that Framer's own training moves or in others, are another base."""
    parts = {"conv_in": ["conv_in"], "temporal attention": ["temporal_transformer_blocks"], "up_blocks": ["up_blocks"]}
    wanted = [part for name, names in parts.items() if name in moved for part in names]
    unet, generator = make_unet(), torch.Generator().manual_seed(seed)
    for name, weight in unet.named_parameters():
        if any(part in name for part in wanted):
            weight += 0.01 * weight.square().mean().sqrt() * torch.randn(weight.shape, generator=generator)
    assert not same_base(sign_unet(make_unet()), sign_unet(unet.bfloat16()))


def test_signature_of_svd_is_that_of_its_widened_form() -> None:
    """The ninth column and the mask token have no say: an adapter of SVD fits SVD however it was widened."""
    stock = UNetSpatioTemporalConditionModel(in_channels=8, **SMALL)
    wide = widen_conv_in(stock)
    assert sign_unet(wide) == sign_unet(stock)
    wide.mask_token.data += 1
    assert sign_unet(wide) == sign_unet(stock)


def test_signature_is_json_and_finite() -> None:
    """256 numbers that JSON gives back exactly; a broken weight makes a signature that equals none."""
    signature = sign_unet(make_unet())
    assert len(signature) == 256 and json.loads(json.dumps(signature)) == signature
    assert same_base(signature, signature)
    assert not same_base(signature, signature[:-1]) and not same_base([float("nan")], [float("nan")])


def test_fingerprint_follows_what_is_read(folder: Path) -> None:
    """The same bytes elsewhere have the same fingerprint; one changed weight or beta, another; other files have no say."""
    before = fingerprint_files(load(folder).files)
    edit_json(folder / "unet/config.json", _name_or_path="elsewhere")
    shutil.copy(folder / UNET_WEIGHTS, folder / "unet/diffusion_pytorch_model.fp16.safetensors")
    assert fingerprint_files(load(folder.rename(folder.with_name("moved"))).files) == before and len(before) == 16
    folder = folder.with_name("moved")
    seen = {before}
    for weights in (UNET_WEIGHTS, VAE_WEIGHTS, "image_encoder/model.safetensors"):
        edit_weights(folder / weights, lambda tensors: next(iter(tensors.values())).view(-1)[:1].add_(1))
        seen.add(fingerprint_files(load(folder).files))
    edit_json(folder / "scheduler/scheduler_config.json", sigma_max=80.0)
    assert len(seen | {fingerprint_files(load(folder).files)}) == 5


def test_sources_name_hub_files_by_commit() -> None:
    """A file in the hub's cache is owner/name@commit/file; any other is its path."""
    cached = Path(
        "/home/me/.cache/huggingface/hub/models--stabilityai--stable-video-diffusion-img2vid-xt/snapshots/9e4/"
    )
    assert name_source(cached / "vae/model.safetensors") == f"{SVD_XT}@9e4/vae/model.safetensors"
    assert name_source(Path("bases/a/vae/model.safetensors")) == "bases/a/vae/model.safetensors"


# ---- scheduler


SCHEDULERS: dict[str, tuple[dict[str, Any], str]] = {
    "SVD": ({}, "v"),
    "epsilon": ({"prediction_type": "epsilon", "timestep_type": "discrete"}, "epsilon"),
    "epsilon by default": ({"prediction_type": None, "timestep_type": None}, "epsilon"),
    "v on integers": ({"timestep_type": "discrete"}, "v_prediction with timestep_type discrete; supported"),
    "v on integers by default": ({"timestep_type": None}, "timestep_type discrete"),
    "epsilon on sigmas": ({"prediction_type": "epsilon"}, "prediction_type epsilon with timestep_type continuous"),
    "sample": ({"prediction_type": "sample", "timestep_type": "discrete"}, "prediction_type sample"),
    "linear betas": ({"beta_schedule": "linear"}, "beta_schedule linear.*only plain scaled_linear"),
    "betas by default": ({"beta_schedule": None}, "beta_schedule linear"),
    "unknown betas": ({"beta_schedule": "sigmoid"}, "sigmoid is not implemented"),
    "own betas": ({"trained_betas": [0.1, 0.2]}, "trained_betas"),
    "zero terminal SNR": ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
}


@pytest.mark.parametrize("case", SCHEDULERS)
def test_parameterization_is_read_from_the_scheduler(folder: Path, case: str) -> None:
    """SVD's pair means v, the classic pair epsilon; every other is refused, since its raw output would be misread."""
    changes, wanted = SCHEDULERS[case]
    path = folder / "scheduler/scheduler_config.json"
    edit_json(path, **changes)
    path.write_text(
        json.dumps({name: value for name, value in json.loads(path.read_text()).items() if value is not None})
    )
    if wanted in ("v", "epsilon"):
        assert load(folder).parameterization == wanted
    else:
        with pytest.raises(UserError, match=wanted):
            load(folder)


def test_scheduler_defaults_are_those_of_diffusers(folder: Path) -> None:
    """Without sigma_min and sigma_max, the range is that of the betas, as in diffusers' scheduler over all of it."""
    path = folder / "scheduler/scheduler_config.json"
    settings = {name: value for name, value in json.loads(path.read_text()).items() if not name.startswith("sigma_")}
    path.write_text(json.dumps(settings))
    scheduler = EulerDiscreteScheduler.from_pretrained(folder / "scheduler", timestep_spacing="linspace")
    scheduler.set_timesteps(10)
    loaded = load(folder).scheduler
    assert loaded["sigma_max"] == pytest.approx(scheduler.sigmas[0].item())
    assert loaded["sigma_min"] == pytest.approx(scheduler.sigmas[-2].item())
    assert loaded["sigma_max"] == pytest.approx(14.6146, rel=1e-4) and loaded["sigma_min"] == pytest.approx(
        0.02917, rel=1e-3
    )


# ---- the hub


class Hub:
    """Stands in for the hub: repositories are folders, of which the client's own filter lets some files through."""

    def __init__(self, cache: Path) -> None:
        self.cache, self.repos = cache, dict[str, Path]()
        self.calls: list[tuple[str, str | None]] = []

    def snapshot_download(
        self, source: str, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str] | None
    ) -> str:
        from huggingface_hub.utils import filter_repo_objects

        self.calls.append((source, revision))
        repo = self.repos[source]
        snapshot = self.cache / f"models--{source.replace('/', '--')}/snapshots" / (revision or "c0ffee")
        names = [path.relative_to(repo).as_posix() for path in repo.rglob("*") if path.is_file()]
        for name in filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(repo / name, snapshot / name)
        return str(snapshot)

    def fetched(self, source: str) -> set[str]:
        folder = next((self.cache / f"models--{source.replace('/', '--')}/snapshots").iterdir())
        return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """SVD-XT and Framer as the hub has them: SVD-XT twice, whole and half, and as one file; Framer in fp32 only."""
    hub = Hub(tmp_path / "cache")
    half = load(folder)
    for part in (half.unet, half.vae, half.image_encoder):
        part.half()
    save_parts(half, folder, variant="fp16")
    for name in (
        "svd_xt.safetensors",
        "model_index.json",
        "unet/diffusion_pytorch_model.bin",
        "vae/other.non_ema.safetensors",
    ):
        (folder / name).write_bytes(b"not to be fetched")
    make_unet(seed=5).save_pretrained(tmp_path / "framer/unet")
    make_unet(seed=6).save_pretrained(tmp_path / "framer/controlnet")
    hub.repos = {SVD_XT: folder, FRAMER: tmp_path / "framer"}
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.snapshot_download)
    return hub


CONFIGS = {"vae/config.json", "image_encoder/config.json", "scheduler/scheduler_config.json"}
HALF = {"vae/diffusion_pytorch_model.fp16.safetensors", "image_encoder/model.fp16.safetensors"}


def test_named_base_is_fetched_from_its_repositories(hub: Hub) -> None:
    """framer takes Framer's UNet and the rest of SVD-XT, each at its revision, and downloads no more than it reads."""
    base = load("framer", revision="aaaa", unet_revision="bbbb")
    assert hub.calls == [(SVD_XT, "aaaa"), (FRAMER, "bbbb")]
    assert same_weights(base.unet, make_unet(seed=5)) and base.name == FRAMER
    assert hub.fetched(SVD_XT) == CONFIGS | {name.replace(".fp16", "") for name in HALF}
    assert hub.fetched(FRAMER) == {"unet/config.json", UNET_WEIGHTS}
    assert base.sources["unet"] == f"{FRAMER}@bbbb/{UNET_WEIGHTS}"
    assert base.sources["scheduler"] == f"{SVD_XT}@aaaa/scheduler/scheduler_config.json"


def test_half_precision_download(hub: Hub) -> None:
    """variant fp16 downloads only half-precision files, and the full one of the part that has no other."""
    base = load("framer", variant="fp16")
    assert hub.fetched(SVD_XT) == CONFIGS | HALF
    assert hub.fetched(FRAMER) == {"unet/config.json", UNET_WEIGHTS}
    assert hub.calls == [(SVD_XT, None), (FRAMER, None), (FRAMER, "c0ffee")]  # the second look is at the same commit
    assert base.sources["vae"].endswith("@c0ffee/vae/diffusion_pytorch_model.fp16.safetensors")


def test_controlnet_is_fetched_at_its_revision(hub: Hub) -> None:
    """A hub id of a ControlNet can be pinned, and only its own folder is downloaded."""
    assert find_controlnet(FRAMER, "bbbb").parent.name == "bbbb" and hub.calls == [(FRAMER, "bbbb")]
    assert hub.fetched(FRAMER) == {"controlnet/config.json", "controlnet/diffusion_pytorch_model.safetensors"}


@pytest.mark.parametrize("error", [TimeoutError(), OSError(""), RuntimeError("first\nsecond")], ids=repr)
def test_what_the_hub_says_is_told_whole(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """On one line, the reason on a later line too; an error without words gives its kind."""

    def refuse(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    said = " ".join(str(error).split()) or type(error).__name__
    with pytest.raises(UserError, match=f"cannot get {SVD_XT} from the hub: {said}; check the name"):
        load("svd-xt")


def test_another_unet_takes_a_named_base_s_place(hub: Hub, tmp_path: Path) -> None:
    """`unet` beside a name replaces the UNet that the name stands for."""
    make_unet(seed=9).save_pretrained(tmp_path / "mine")
    base = load("framer", unet=str(tmp_path / "mine"))
    assert same_weights(base.unet, make_unet(seed=9)) and hub.calls == [(SVD_XT, None)]
    assert base.sources["vae"].startswith(SVD_XT)


def test_inspecting_downloads_no_weights(hub: Hub) -> None:
    """Counting an unpublished hub base reads its configuration alone."""
    hub.repos["me/mine"] = hub.repos[FRAMER]
    build_unet_on_meta(ModelConfig(base=SVD_XT, unet="me/mine"))
    assert hub.fetched("me/mine") == {"unet/config.json"}


def test_unreachable_repository_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the hub answers: one sentence with its reason, the licence and the token."""

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("401 Client Error.\nCannot access gated repo for url ...")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(UserError, match=rf"{SVD_XT} from the hub: 401 Client Error.*gated.*licence.*token") as caught:
        load("svd-xt")
    assert "\n" not in str(caught.value)


# ---- real configurations, without weights


# facts of the published repositories: stabilityai/stable-video-diffusion-img2vid-xt vae/ and image_encoder/config.json
REAL_VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "force_upcast": True,
    "latent_channels": 4,
    "layers_per_block": 2,
    "sample_size": 768,
    "scaling_factor": 0.18215,
}
REAL_CLIP: dict[str, Any] = {
    "hidden_act": "gelu",
    "hidden_size": 1280,
    "image_size": 224,
    "intermediate_size": 5120,
    "num_attention_heads": 16,
    "num_hidden_layers": 32,
    "patch_size": 14,
    "projection_dim": 1024,
}


def test_published_vae_and_image_encoder_are_of_the_known_size() -> None:
    """The published configurations build 97,742,847 and 632,076,800 parameters in the classes that load_base uses."""
    with torch.device("meta"):
        vae, clip = (
            AutoencoderKLTemporalDecoder(**REAL_VAE),
            CLIPVisionModelWithProjection(CLIPVisionConfig(**REAL_CLIP)),
        )
    assert sum(p.numel() for p in vae.parameters()) == 97_742_847
    assert sum(p.numel() for p in clip.parameters()) == 632_076_800


def write_header(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write an fp16 safetensors file of these shapes whose data are a hole: long as the real one, without bytes on disk."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + 2 * tensor.numel()
        header[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)


def real_tensors(channels: int) -> dict[str, torch.Tensor]:
    """Names and shapes of the published UNet; for 8 channels the stock class's, without mask_token."""
    if channels == 9:
        return build_unet_on_meta(ModelConfig(base="framer")).state_dict()
    with torch.device("meta"):
        return UNetSpatioTemporalConditionModel(**PUBLISHED_CONFIGS[SVD_XT]).state_dict()


@pytest.mark.parametrize(("channels", "keys"), [(9, 1429), (8, 1428)])
def test_full_size_single_file_is_known_by_its_header(tmp_path: Path, channels: int, keys: int) -> None:
    """Framer_unet_fp16.safetensors, which comes without configuration, and SVD's likewise: counted, no tensor read."""
    tensors = real_tensors(channels)
    assert len(tensors) == keys
    write_header(tmp_path / "unet.safetensors", tensors)
    assert (tmp_path / "unet.safetensors").stat().st_size == pytest.approx(3.05e9, rel=0.001)
    unet = build_unet_on_meta(ModelConfig(base="svd-xt", unet=str(tmp_path / "unet.safetensors")))
    assert sum(p.numel() for p in unet.parameters()) == 1_524_625_966


FULL_SIZE_FAULTS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "no mask token": (lambda t: t.pop("mask_token"), "weights of a FramerUNet: missing keys: mask_token"),
    "foreign key": (lambda t: t.update(extra=torch.zeros(1)), "unexpected keys: extra"),
    "five channels": (lambda t: t.update({"conv_in.weight": torch.empty(320, 5, 3, 3, device="meta")}), "has in_channels 5"),
    "another shape": (
        lambda t: t.update({"conv_out.bias": torch.empty(7, device="meta")}),
        r"conv_out.bias has the shape \[7\] instead of \[4\]",
    ),
    "another size": (
        lambda t: t.update({"conv_in.weight": torch.empty(64, 9, 3, 3, device="meta")}), "64 instead of 320.*config.json",
    ),
    "an adapter": (lambda t: t.pop("conv_in.weight"), "no conv_in.weight, so it is no whole UNet"),
    "Stability's layout": (
        lambda t: t.update({"model.diffusion_model.out.2.bias": torch.zeros(4)}), "Stability's original layout.*svd-xt",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FULL_SIZE_FAULTS)
def test_faulty_single_file_is_refused(tmp_path: Path, fault: str) -> None:
    """Nothing is dropped or invented: the sentence names what is wrong, from the header alone."""
    damage, said = FULL_SIZE_FAULTS[fault]
    tensors = dict(real_tensors(9))
    damage(tensors)
    write_header(tmp_path / "unet.safetensors", tensors)
    with pytest.raises(UserError, match=said):
        load_unet(tmp_path / "unet.safetensors", torch.bfloat16)


# ---- what is refused


def only_pickle(folder: Path) -> None:
    torch.save(load_file(folder / UNET_WEIGHTS), folder / "unet/diffusion_pytorch_model.bin")
    os.remove(folder / UNET_WEIGHTS)


def lose_shard(folder: Path) -> None:
    unet = make_unet()
    os.remove(folder / UNET_WEIGHTS)
    unet.save_pretrained(folder / "unet", max_shard_size="200KB")
    os.remove(sorted(folder.glob("unet/*-00002-of-*.safetensors"))[0])


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (shutil.rmtree, "no base model at .*framer, svd, svd-xt, tiny, a folder in diffusers layout.*owner/name"),
    "no vae": (
        lambda f: shutil.rmtree(f / "vae"), "lacks vae; a base in SVD layout holds unet, vae, image_encoder, scheduler",
    ),
    "no unet": (lambda f: shutil.rmtree(f / "unet"), "lacks unet"),
    "no image encoder, no scheduler": (
        lambda f: [shutil.rmtree(f / part) for part in ("image_encoder", "scheduler")], "lacks image_encoder, scheduler",
    ),
    "five channels": (lambda f: edit_json(f / "unet/config.json", in_channels=5), "in_channels 5.*9 .Framer. or 8 .SVD"),
    "pickled weights": (only_pickle, r"unet must hold.*only diffusion_pytorch_model\.bin: pickles, which are not read"),
    "no unet config": (lambda f: os.remove(f / "unet/config.json"), "config.json"),
    "no scheduler config": (lambda f: os.remove(f / "scheduler/scheduler_config.json"), "scheduler_config.json"),
    "no vae weights": (lambda f: os.remove(f / VAE_WEIGHTS), "vae must hold its weights.*none"),
    "a lost shard": (lose_shard, r"unet lacks diffusion_pytorch_model-00002-of-\d+.safetensors, which .*index.json lists"),
    "no mask token": (
        lambda f: edit_weights(f / UNET_WEIGHTS, lambda tensors: tensors.pop("mask_token")), "missing keys: mask_token",
    ),
    "foreign weight": (
        lambda f: edit_weights(f / UNET_WEIGHTS, lambda tensors: tensors.update(extra=torch.zeros(2))),
        "unexpected keys: extra",
    ),
    "missing weight": (
        lambda f: edit_weights(f / UNET_WEIGHTS, lambda tensors: tensors.pop("conv_out.bias")), "conv_out.bias",
    ),
    "missing vae weight": (
        lambda f: edit_weights(f / VAE_WEIGHTS, lambda t: t.pop("quant_conv.bias")), "quant_conv.bias",
    ),
    "cut unet": (lambda f: cut(f / UNET_WEIGHTS), "cannot read .*unet/diff.*cut, damaged"),
    "cut image encoder": (lambda f: cut(f / "image_encoder/model.safetensors"), "cannot read .*image_encoder/model"),
    "empty weights": (lambda f: (f / VAE_WEIGHTS).write_bytes(b""), "cannot read .*vae/diff"),
    "NaN": (
        lambda f: edit_weights(f / UNET_WEIGHTS, lambda t: t.update({"conv_in.bias": t["conv_in.bias"] / 0})),
        "unet holds NaN or infinity in conv_in.bias; it is damaged",
    ),
    "another image encoder's weights": (
        lambda f: edit_weights(
            f / "image_encoder/model.safetensors", lambda t: t.update({"visual_projection.weight": torch.zeros(5, 7)})
        ),
        r"image_encoder does not hold .*visual_projection.weight has the shape \[5, 7\] instead of \[32, 32\]",
    ),
    "larger pictures": (
        lambda f: (
            edit_json(f / "image_encoder/config.json", image_size=256),
            edit_weights(
                f / "image_encoder/model.safetensors",
                lambda t: t.update({"vision_model.embeddings.position_embedding.weight": torch.zeros(65, 32)}),
            ),
        ),
        "image_encoder reads pictures of 256 pixels; SVD's reads 224",
    ),
    "channels in words": (lambda f: edit_json(f / "unet/config.json", in_channels="9"), "has in_channels '9'; a base must"),
    "a network that cannot be": (
        lambda f: edit_json(f / "unet/config.json", block_out_channels=[31, 64]), "no FramerUNet can be built as its conf",
    ),
    "widths in one number": (
        lambda f: edit_json(f / "unet/config.json", block_out_channels=32), "no FramerUNet can be built as its conf",
    ),
    "layers in a list": (
        lambda f: edit_json(f / "unet/config.json", layers_per_block=[1, 1]), r"layers_per_block \[1, 1\]; it must be one",
    ),
    "an index of nothing": (
        lambda f: (os.remove(f / UNET_WEIGHTS), (f / f"{UNET_WEIGHTS}.index.json").write_text("{}")),
        "index.json lists no weights; copy or fetch it again",
    ),
    "a list for a config": (lambda f: (f / "unet/config.json").write_text("[]"), "config.json: it holds no object"),
    "a UNet alone": (
        lambda f: [shutil.rmtree(f / part) for part in ("vae", "image_encoder", "scheduler")],
        "lacks vae, image_encoder, scheduler.*a UNet alone is given as model.unet, with svd-xt as model.base",
    ),
    "HTML for weights": (lambda f: (f / VAE_WEIGHTS).write_text("<html>Not found</html>"), "cannot read .*vae/diff"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_base_is_refused(folder: Path, fault: str) -> None:
    """One sentence that names the part and what it must be, before anything runs."""
    damage, said = FAULTS[fault]
    damage(folder)
    with pytest.raises(UserError, match=said) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"revision": "main"}, "revision main is given for .*local"),
        ({"unet": "BASE", "unet_revision": "main"}, "revision main is given for .*local"),
        ({"unet": f"BASE/{UNET_WEIGHTS}", "unet_revision": "main"}, "revision main is given for .*local"),
        ({"unet": "BASE/unet", "unet_revision": "main"}, "revision main is given for .*local"),
        ({"unet_revision": "main"}, "unet_revision main is given without model.unet"),
        ({"unet": "BASE/model_index.ckpt"}, "is no .safetensors file; other formats are not read"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(folder: Path, settings: dict[str, str], said: str) -> None:
    """A revision of something local, or of nothing, and a pickled UNet."""
    (folder / "model_index.ckpt").touch()
    with pytest.raises(UserError, match=said):
        load(folder, **{name: value.replace("BASE", str(folder)) for name, value in settings.items()})


def test_names_stand_for_published_repositories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each name is inspected from its published configuration, even where a folder has that name; ./name is the folder."""
    assert {
        id for name, pair in NAMED_BASES.items() for id in pair if id and name != "tiny"
    } <= PUBLISHED_CONFIGS.keys()
    monkeypatch.chdir(tmp_path)
    make_unet().save_pretrained("framer/unet")
    assert build_unet_on_meta(ModelConfig(base="framer")).config.block_out_channels[0] == 320
    assert build_unet_on_meta(ModelConfig(base="./framer")).config.block_out_channels[0] == 32


def test_svd_unet_with_a_missing_weight_is_refused(tmp_path: Path) -> None:
    """Eight channels and a weight too few: never filled with random numbers."""
    UNetSpatioTemporalConditionModel(in_channels=8, **SMALL).save_pretrained(tmp_path)
    edit_weights(tmp_path / "diffusion_pytorch_model.safetensors", lambda tensors: tensors.pop("conv_out.bias"))
    with pytest.raises(UserError, match="conv_out.bias"):
        load_unet(tmp_path, torch.float32)


def test_parts_are_what_a_base_consists_of(tiny_base: Path) -> None:
    """Every part has a source."""
    assert tuple(sorted(load(tiny_base).sources)) == tuple(sorted(PARTS))
