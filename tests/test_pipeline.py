"""FramerPipeline behaves as diffusers' pipelines do, and samples as the toolkit does. Run: pytest tests/test_pipeline.py"""

import inspect
import json
import math
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    DDIMScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    StableVideoDiffusionPipeline,
    UNetSpatioTemporalConditionModel,
)
from PIL import Image
from torch import Tensor

from tests.launching import RECIPE, train_here
from tests.model.control import make_controlnet
from toolkit import FramerPipeline, FramerUNet
from toolkit.config import LoraConfig, load_config
from toolkit.diffusion.schedule import lcm_sigmas
from toolkit.model.controlnet import FramerControlNet
from toolkit.model.formats import read_metadata
from toolkit.model.lora import inject_lora, save_adapter
from toolkit.model.tuning import ABOUT_FILE
from toolkit.run.folder import newest_adapter
from toolkit.run.framer import Framer, Sampling, to_signed

SIZE_PX = 32
LATENT = SIZE_PX // 2


@pytest.fixture(scope="module")
def pipe(tiny_base: Path) -> FramerPipeline:
    """A pipeline of five frames; a test that changes it changes it back."""
    return load(tiny_base)


def load(base: Path, **settings: Any) -> FramerPipeline:
    pipe = FramerPipeline.from_pretrained(base, num_frames=5, **settings)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def adapters(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two adapters of different kinds, moved as training would; the second one has dropout too, and a conv_in of its own."""
    folders = []
    for i, settings in enumerate(
        (LoraConfig(rank=2, alpha=4), LoraConfig(rank=3, targets="all", extra_trainable=["conv_in"]))
    ):
        unet = load(tiny_base).unet
        parameters = inject_lora(unet, settings, i)
        for k, parameter in enumerate(parameters.values()):
            parameter.data += 0.03 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(k))
        folders.append(tmp_path_factory.mktemp("adapter"))
        diffusion = {"layout": ("framer_clip", "spec_middle")[i], "clip_tokens": "first_last"}
        recipe = {"diffusion": diffusion | {"conditioning_dropout": (0.0, 0.1)[i]}}
        save_adapter(folders[-1], dict(parameters), unet, {"recipe": recipe})
    return folders


def picture(seed: int, width_px: int = SIZE_PX, height_px: int = SIZE_PX) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height_px, width_px, 3), np.uint8))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(pipe: FramerPipeline, **changes: Any) -> Tensor:
    """Frames of one or more clips as a tensor, in two steps without guidance."""
    given = {"image": picture(1), "last_image": picture(2), "num_inference_steps": 2, "max_guidance_scale": 1.0}
    return pipe(**(given | {"generator": seeded(), "output_type": "pt"} | changes)).frames


def test_importing_the_package_loads_no_torch() -> None:
    """The commands start at once; the pipeline is imported when it is asked for, and other names are errors."""
    code = "import sys, toolkit; assert 'torch' not in sys.modules; toolkit.nothing"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "has no attribute 'nothing'" in done.stderr and "AssertionError" not in done.stderr


def test_calls_have_the_names_of_the_stock_pipeline() -> None:
    """Parameters that both have stand in the same order with the same defaults, but for sizes, which the stills tell."""
    ours, stock = (
        inspect.signature(kind.__call__).parameters for kind in (FramerPipeline, StableVideoDiffusionPipeline)
    )
    shared = [name for name in stock if name in ours]
    assert [name for name in ours if name in stock] == shared
    assert set(stock) - set(shared) == {"sigmas", "num_videos_per_prompt"}
    config = inspect.signature(
        FramerPipeline.__init__
    ).parameters  # what a None stands for, unless it was told otherwise
    other = {"height", "width", "num_frames", "callback_on_step_end_tensor_inputs"}
    for name in set(shared) - other:
        place = "noise_augmentation" if name == "noise_aug_strength" else name
        assert (config if place in config else ours)[place].default == stock[name].default, name


@pytest.mark.parametrize("layout", ["framer_clip", "middle_in_clip", "spec_middle"])
@pytest.mark.parametrize("guidance", [(1.0, 1.0), (1.0, 3.0)])
def test_frames_are_those_of_the_toolkit(tiny_base: Path, layout: str, guidance: tuple[float, float]) -> None:
    """The same noise gives the latents of Framer.sample, and its decoded frames between the untouched stills."""
    pipe = load(tiny_base, layout=layout, noise_augmentation=0.0)
    frames = 1 if layout == "spec_middle" else 5
    noise = torch.randn(1, frames, 4, LATENT, LATENT, generator=seeded(3))
    given: dict[str, Any] = {"latents": noise, "min_guidance_scale": guidance[0], "max_guidance_scale": guidance[1]}
    latents = make(pipe, output_type="latent", fps=9, motion_bucket_id=50, **given)
    video = make(pipe, fps=9, motion_bucket_id=50, **given)
    framer: Framer = pipe._make_framer(5, 0.0)
    stills = to_signed(torch.from_numpy(np.stack([picture(1), picture(2)])))[None]
    condition = framer.condition(stills, torch.tensor([9.0]), torch.tensor([50.0]))
    wanted = framer.sample(condition, Sampling(2, "euler", *guidance), noise)
    assert torch.equal(latents, wanted)
    made = framer.decode(wanted)
    between = made if frames == 1 else made[:, 1:-1]
    assert torch.allclose(video, torch.cat([stills[:, :1], between, stills[:, 1:]], 1) / 2 + 0.5, atol=1e-4)


def test_euler_loop_of_the_stock_scheduler(pipe: FramerPipeline) -> None:
    """The registered EulerDiscreteScheduler, stepped by hand over the same network, ends in the same latents."""
    noise = torch.randn(1, 5, 4, LATENT, LATENT, generator=seeded(3))
    latents = make(pipe, output_type="latent", latents=noise, noise_aug_strength=0.0, num_inference_steps=4)
    framer = pipe._make_framer(5, 0.0)
    stills = to_signed(torch.from_numpy(np.stack([picture(1), picture(2)])))[None]
    condition = framer.condition(stills, torch.tensor([7.0]), torch.tensor([127.0]))
    scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(4)
    by_hand = noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        sigma_B = (4 * t).exp().view(1)
        with torch.no_grad():
            raw = framer.predict(scheduler.scale_model_input(by_hand, t), sigma_B, condition)
        by_hand = scheduler.step(raw, t, by_hand).prev_sample
    assert torch.allclose(latents, by_hand, rtol=1e-4, atol=1e-4)


def test_seeds(pipe: FramerPipeline) -> None:
    """The same seed, the same frames; a batch with one generator per clip is each clip alone."""
    one, again, other = make(pipe), make(pipe), make(pipe, generator=seeded(5))
    assert torch.equal(one, again) and not torch.equal(one, other)
    both = make(pipe, image=[picture(1)] * 2, last_image=[picture(2)] * 2, generator=[seeded(0), seeded(5)], fps=7)
    assert torch.allclose(both, torch.cat([one, other]), atol=1e-4)


def test_output_types(pipe: FramerPipeline) -> None:
    """PIL lists, arrays with channels last, tensors with channels first; a bare value without return_dict."""
    tensor, array, pil = (make(pipe, output_type=kind) for kind in ("pt", "np", "pil"))
    assert tensor.shape == (1, 5, 3, SIZE_PX, SIZE_PX) and array.shape == (1, 5, SIZE_PX, SIZE_PX, 3)
    assert np.allclose(array, tensor.movedim(2, -1).numpy()) and tensor.min() >= 0 and tensor.max() <= 1
    assert np.abs(np.asarray(pil[0][2]) / 255 - array[0, 2]).max() < 0.003
    assert np.array_equal(np.asarray(pil[0][0]), np.asarray(picture(1)))
    assert np.array_equal(np.asarray(pil[0][-1]), np.asarray(picture(2)))
    bare = pipe(picture(1), picture(2), num_inference_steps=1, return_dict=False, output_type="np")
    assert bare.shape == array.shape


def test_stills_as_tensors_and_of_another_size(pipe: FramerPipeline) -> None:
    """A tensor in [0, 1] is the picture of the same pixels; a larger still is scaled to cover the size and cropped."""
    as_tensors = [torch.tensor(np.asarray(picture(i))).movedim(-1, 0)[None] / 255 for i in (1, 2)]
    assert torch.equal(make(pipe, image=as_tensors[0], last_image=as_tensors[1]), make(pipe))
    wide = make(pipe, image=picture(1, 96, 48), last_image=picture(2, 96, 48), height=32, width=40)
    assert wide.shape[-2:] == (32, 40)
    own = make(pipe, image=picture(1, 45, 37), last_image=picture(2, 45, 37), num_inference_steps=1)
    assert own.shape[-2:] == (32, 40)


def test_number_of_frames(pipe: FramerPipeline) -> None:
    """Any window, Framer's even ones too; the chunks of the decoder change no frame."""
    assert make(pipe, num_frames=4).shape[1] == 4
    whole, chunked = make(pipe), make(pipe, decode_chunk_size=2)
    assert chunked.shape == whole.shape and torch.allclose(whole, chunked, atol=1e-5)


def test_callback_sees_and_changes_latents(pipe: FramerPipeline) -> None:
    """Called after each step with the stock timesteps; what it returns is gone on with."""
    seen: list[tuple[int, float]] = []

    def watch(inside: Any, step: int, timestep: Tensor, given: dict[str, Tensor]) -> dict[str, Tensor]:
        assert inside is pipe and given["latents"].shape == (1, 5, 4, LATENT, LATENT)
        seen.append((step, float(timestep)))
        return {"latents": given["latents"] * 0} if step == 1 else {}

    assert not make(pipe, callback_on_step_end=watch, output_type="latent").any()
    scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(2)
    assert seen == [(i, pytest.approx(float(t), abs=1e-5)) for i, t in enumerate(scheduler.timesteps)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": "a.png"}, "`image` has to be of type .* but is <class 'str'>"),
        ({"last_image": torch.zeros(1, 4, 32, 32)}, r"`last_image` is a tensor of shape \(1, 4, 32, 32\)"),
        ({"image": torch.full((1, 3, 32, 32), -1.0)}, r"in \[0, 1\]"),
        ({"image": torch.full((1, 3, 32, 32), math.nan)}, r"in \[0, 1\]"),
        ({"height": 30}, "divisible by 8 but are 30 and 32"),
        ({"image": [picture(1)] * 2}, "2 first and 1 last images"),
        ({"generator": [seeded(), seeded()]}, "2 generators for 1 clips"),
        ({"latents": torch.zeros(1, 5, 4, 3, 3)}, r"latents have the shape \(1, 5, 4, 3, 3\); these stills need"),
        ({"trajectories": np.zeros((1, 2, 2))}, "no controlnet"),
        ({"num_frames": 0}, "window of 0 frames"),
        ({"num_inference_steps": 0}, "0 sampler steps: sampler euler takes 1 to 1000"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "has noise; allowed is latents"),
        ({"output_type": "latents"}, "output_type is latents; it must be pil, np, pt or latent"),
        ({"decode_chunk_size": -1}, "decode_chunk_size is -1; give 1 or more"),
    ],
)
def test_bad_input_is_refused(
    pipe: FramerPipeline, changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ValueError that says what was given and what is allowed, as diffusers does, and before anything is encoded."""
    if "latents" not in changes:  # whose shape is known from the stills' latents
        monkeypatch.setattr(Framer, "condition", lambda *_: 1 / 0)
    with pytest.raises(ValueError, match=message):
        make(pipe, **changes)


def timesteps(pipe: FramerPipeline, steps: int) -> list[float]:
    """What a callback is told in a run of so many steps."""
    seen: list[float] = []

    def watch(inside: Any, step: int, timestep: Tensor, given: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(float(timestep))
        return {}

    make(pipe, num_inference_steps=steps, callback_on_step_end=watch)
    return seen


def test_scheduler_chooses_the_sampler(tiny_base: Path) -> None:
    """LCM and consistency schedulers take the few-step sampler; one that is not known is refused, not ignored."""
    pipe = load(tiny_base)
    euler = make(pipe)
    for kind in (LCMScheduler, CMStochasticIterativeScheduler):
        pipe.scheduler = kind.from_config(pipe.scheduler.config)
        assert not torch.allclose(make(pipe), euler, atol=1e-3)
        assert timesteps(pipe, 4) == pytest.approx([math.log(s) / 4 for s in lcm_sigmas(4, 0.002, 700.0)[:-1]])
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="DDIMScheduler; this pipeline samples with EulerDiscreteScheduler"):
        make(pipe)


def test_saving_and_loading(tiny_base: Path, tmp_path: Path) -> None:
    """save_pretrained keeps weights, mask_token, ControlNet and settings; a setting given when loading wins."""
    pipe = load(tiny_base, clip_tokens="first", noise_augmentation=0.1)
    pipe.register_modules(controlnet=make_controlnet(pipe.unet))
    torch.nn.init.normal_(pipe.unet.mask_token)
    pipe.save_pretrained(tmp_path)
    again = FramerPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert isinstance(again.unet, FramerUNet) and isinstance(again.controlnet, FramerControlNet)
    assert torch.equal(again.unet.mask_token, pipe.unet.mask_token)
    assert (again.config.num_frames, again.config.clip_tokens, again.config.noise_augmentation) == (5, "first", 0.1)
    assert torch.equal(make(again), make(pipe))
    assert FramerPipeline.from_pretrained(tmp_path, clip_tokens="mean").config.clip_tokens == "mean"
    for i, scheduler in enumerate((LCMScheduler(), CMStochasticIterativeScheduler(sigma_max=500.0))):
        pipe.scheduler = scheduler  # whose own betas, and what it says of the raw output, are not the base's
        wanted = make(pipe)
        pipe.save_pretrained(tmp_path / str(i))
        again = FramerPipeline.from_pretrained(tmp_path / str(i))
        again.set_progress_bar_config(disable=True)
        assert type(again.scheduler) is type(scheduler) and torch.equal(make(again), wanted)


def test_from_pipe_shares_the_parts(tiny_base: Path, adapters: list[Path]) -> None:
    """The new pipeline has the parts and settings of the old one, but for those given anew; adapters it cannot share."""
    pipe = load(tiny_base, scale_conditioning=True)
    pipe.register_modules(controlnet=make_controlnet(pipe.unet))
    again = FramerPipeline.from_pipe(pipe, num_inference_steps=3)
    again.set_progress_bar_config(disable=True)
    assert again.components == pipe.components
    assert (again.config.scale_conditioning, again.config.num_inference_steps) == (True, 3)
    assert torch.equal(make(again), make(pipe))
    pipe.load_lora_weights(adapters[0])
    with pytest.raises(ValueError, match="adapters stand beside the weights; call fuse_lora or unload_lora_weights"):
        FramerPipeline.from_pipe(pipe)


def test_another_unet_is_refused(pipe: FramerPipeline) -> None:
    """SVD's own of eight channels, and one of nine that has no mask_token."""
    for channels in (8, 9):
        stock = UNetSpatioTemporalConditionModel.from_config({**pipe.unet.config, "in_channels": channels})
        with pytest.raises(
            ValueError, match=f"UNetSpatioTemporalConditionModel of {channels} channels; give a FramerUNet"
        ):
            FramerPipeline(pipe.vae, pipe.image_encoder, stock, pipe.scheduler)


def test_parts_of_their_own_places(tiny_base: Path, tmp_path: Path) -> None:
    """UNet and ControlNet are found by paths, as the base is; a merged export that does not tell its clips has SVD's."""
    pipe = load(tiny_base)
    pipe.register_modules(controlnet=make_controlnet(pipe.unet))
    torch.nn.init.normal_(pipe.unet.mask_token)
    pipe.save_pretrained(tmp_path)
    recipe = load_config(RECIPE, {"data.shards": "shards", "diffusion.clip_tokens": "mean"}).model_dump(mode="json")
    (tmp_path / ABOUT_FILE).write_text(json.dumps({"recipe": recipe}))
    again = FramerPipeline.from_pretrained(tiny_base, unet=tmp_path, controlnet=tmp_path / "controlnet")
    assert torch.equal(again.unet.mask_token, pipe.unet.mask_token) and again.controlnet is not None
    assert (again.config.clip_tokens, again.config.fps, again.config.motion_bucket_id) == ("mean", 7, 127)


def test_wrong_settings_are_refused_before_weights_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """An argument that does not exist, and a dtype that cannot be; nothing is looked for on the disk or the hub."""
    monkeypatch.setattr("toolkit.pipeline.load_base", lambda *_: 1 / 0)
    with pytest.raises(TypeError, match="from_pretrained knows no layuot; settings are clip_tokens, fps"):
        FramerPipeline.from_pretrained("framer", layuot="framer_clip")
    with pytest.raises(ValueError, match="torch_dtype is torch.float64; it must be torch.float32"):
        FramerPipeline.from_pretrained("framer", torch_dtype=torch.float64)


def test_precision_and_device_follow_diffusers(tiny_base: Path) -> None:
    """bfloat16 as asked for, close to float32; .to() moves all parts; model offloading computes the same."""
    full, half = load(tiny_base), load(tiny_base, torch_dtype=torch.bfloat16)
    assert half.unet.dtype == half.image_encoder.dtype == torch.bfloat16
    assert (make(full) - make(half)).abs().mean() < 0.02
    wanted = make(full)
    full.enable_model_cpu_offload(device="cpu")
    assert (make(full) - wanted).abs().max() < 1.5 / 255  # weights that moved are summed in another order
    with pytest.raises(NotImplementedError, match="use enable_model_cpu_offload"):
        full.enable_sequential_cpu_offload()


def test_trajectories_reach_the_controlnet(tiny_base: Path) -> None:
    """With a ControlNet, points steer; their scale counts."""
    pipe = load(tiny_base)
    pipe.register_modules(controlnet=make_controlnet(pipe.unet, awake=True))
    points = np.array([[[8.0, 8.0], [20.0, 16.0]]])
    free, steered = make(pipe), make(pipe, trajectories=points)
    assert not torch.allclose(free, steered, atol=1e-3)
    assert torch.allclose(make(pipe, trajectories=points, controlnet_conditioning_scale=0.0), free, atol=1e-5)
    for shape in ((1, 1, 2), (1, 3, 1), (1, 2, 3), (2, 2)):
        with pytest.raises(ValueError, match=r"trajectories have the shape .*; give \(P, K, 2\) with K of 2 or more"):
            make(pipe, trajectories=np.zeros(shape))
    nothing_matched = np.zeros((0, 2, 2))  # which training with diffusion.control sees too
    assert not torch.allclose(make(pipe, trajectories=nothing_matched), free, atol=1e-3)


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([[[8, 8], [math.nan, 8]]], "hold a number that is not finite"),
        ([[[8, 8], [8, math.inf]]], "hold a number that is not finite"),
        ([[[40, 8], [8, 32]], [[-1, 8], [8, -1]]], "no place inside the 40x32 picture; give .* in its pixels"),
    ],
)
def test_trajectories_that_steer_nothing_are_refused(
    tiny_base: Path, points: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbers that are no places, and points that never are in the picture, before anything is encoded."""
    pipe = load(tiny_base)
    pipe.register_modules(controlnet=make_controlnet(pipe.unet))
    monkeypatch.setattr(Framer, "condition", lambda *_: 1 / 0)
    with pytest.raises(ValueError, match=message):
        make(pipe, trajectories=points, height=32, width=40)
    with pytest.raises(ZeroDivisionError):  # one place inside is enough
        make(pipe, trajectories=[[[40, 8], [39, 31]]], height=32, width=40)


def test_lora_verbs(tiny_base: Path, adapters: list[Path]) -> None:
    """Load, weigh, switch off and on, delete, unload: the frames follow, and at the end the base is back bit for bit."""
    pipe = load(tiny_base)
    base = make(pipe)
    pipe.load_lora_weights(adapters[0], adapter_name="a")
    one = make(pipe)
    pipe.set_adapters("a", 0.0)
    assert not torch.allclose(one, base, atol=1e-3) and torch.equal(make(pipe), base)
    with pytest.warns(UserWarning, match="was trained with layout spec_middle .here it is framer_clip"):
        pipe.load_lora_weights(adapters[1].parent, weight_name=adapters[1].name)
    assert pipe.get_list_adapters() == {"unet": ["a", "adapter_0"]}
    pipe.set_adapters(("a", "adapter_0"), (1.0, 0.5))
    for names, weights, message in (
        (["a", "a"], [1.0, 0.5], "2 weights for a, a; give each adapter once"), ("a", [1.0, 2.0], "2 weights for a;"),
        ("a", float("nan"), "weights are nan; give finite numbers"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            pipe.set_adapters(names, weights)
    assert pipe.get_active_adapters() == ["a", "adapter_0"]
    two = make(pipe)
    pipe.disable_lora()
    assert torch.equal(make(pipe), base)
    pipe.enable_lora()
    assert torch.equal(make(pipe), two)
    pipe.disable_lora()
    pipe.delete_adapters("adapter_0")
    assert torch.equal(make(pipe), base)  # still off
    pipe.enable_lora()
    assert torch.allclose(make(pipe), one, atol=1e-6) and pipe.get_active_adapters() == ["a"]
    pipe.unload_lora_weights()
    assert torch.equal(make(pipe), base) and pipe.get_list_adapters() == {}
    for call in (lambda: pipe.fuse_lora(), lambda: pipe.unfuse_lora(), lambda: pipe.delete_adapters("a")):
        with pytest.raises(ValueError, match="no adapter"):
            call()


@pytest.mark.filterwarnings("ignore:.*was trained with ")
def test_guidance_that_no_training_saw_is_told(tiny_base: Path, adapters: list[Path]) -> None:
    """With guidance, of an active adapter whose recipe has no conditioning_dropout; not of one that is off, nor without."""
    pipe = load(tiny_base)
    for name, adapter in zip("ab", adapters, strict=True):
        pipe.load_lora_weights(adapter, name)

    def told(max_guidance: float) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            make(pipe, num_inference_steps=1, max_guidance_scale=max_guidance)
        return [str(w.message) for w in caught if w.filename == __file__]

    file = pipe._adapters["a"][0]
    message = f"guidance above 1, but {file} was trained without diffusion.conditioning_dropout"
    assert told(3.0) == [message] and told(1.0) == []
    pipe.disable_lora()
    assert told(3.0) == []
    pipe.set_adapters("b")
    assert told(3.0) == []


@pytest.mark.filterwarnings("ignore:.*was trained with")
def test_verbs_follow_the_network_s_precision(tiny_base: Path, adapters: list[Path]) -> None:
    """.to() after loading: what was trained whole goes back, or is folded in, as the rest of the network is by then."""
    for verb in ("unload_lora_weights", "fuse_lora"):
        pipe = load(tiny_base, torch_dtype=torch.bfloat16)
        pipe.load_lora_weights(adapters[1], "a")
        pipe.to(torch.float32)
        getattr(pipe, verb)()
        assert {p.dtype for p in pipe.unet.parameters()} == {torch.float32}
        assert make(pipe).isfinite().all()


@pytest.mark.parametrize("name", ["v1.0", "train", "to", "training", "_modules"])
def test_names_that_torch_could_not_hold_are_refused(tiny_base: Path, adapters: list[Path], name: str) -> None:
    """A dot, and the names of torch's own methods and values; nothing is left behind."""
    pipe = load(tiny_base)
    before = list(pipe.unet.state_dict())
    with pytest.raises(ValueError, match=f"an adapter cannot be named '{name}'"):
        pipe.load_lora_weights(adapters[0], name)
    assert list(pipe.unet.state_dict()) == before and pipe.get_list_adapters() == {}


@pytest.mark.filterwarnings("ignore:.*was trained with")
def test_fusing_is_undone_exactly(tiny_base: Path, adapters: list[Path]) -> None:
    """Fused, plain modules give the adapters' frames; unfused, the adapters stand beside the base's own bits again."""
    pipe = load(tiny_base)
    base, before = make(pipe), {name: p.clone() for name, p in pipe.unet.state_dict().items()}
    for i, adapter in enumerate(adapters):
        pipe.load_lora_weights(adapter, f"a{i}")
    pipe.set_adapters(["a0", "a1"], [1.0, 0.5])
    tuned = make(pipe)
    pipe.fuse_lora()
    assert not any("lora" in name for name in pipe.unet.state_dict())
    assert torch.allclose(make(pipe), tuned, atol=1e-4)
    for call in (
        lambda: pipe.load_lora_weights(adapters[0], "more"),
        lambda: pipe.set_adapters("a0"),
        pipe.disable_lora,
        pipe.fuse_lora,
    ):
        with pytest.raises(ValueError, match="fused into the weights; call unfuse_lora"):
            call()
    pipe.unfuse_lora()
    assert torch.allclose(make(pipe), tuned, atol=1e-5) and pipe.unet.weights == {"a0": 1.0, "a1": 0.5}
    pipe.fuse_lora(lora_scale=0.5, adapter_names=["a1"])
    assert not torch.allclose(make(pipe), tuned, atol=1e-3)
    pipe.unfuse_lora()
    assert torch.allclose(make(pipe), tuned, atol=1e-5) and pipe.unet.weights == {"a0": 1.0, "a1": 0.5}
    pipe.disable_lora()
    for nothing in ({}, {"adapter_names": []}):
        with pytest.raises(ValueError, match="no adapter is active; call load_lora_weights, or enable_lora"):
            pipe.fuse_lora(**nothing)
    pipe.unload_lora_weights()
    after = pipe.unet.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(make(pipe), base)


def test_fused_and_unloaded_stays_fused(tiny_base: Path, adapters: list[Path], tmp_path: Path) -> None:
    """diffusers' own way to a tuned pipeline without adapters: fuse those named, as they are weighed, unload, save."""
    pipe = load(tiny_base)
    for i in range(2):
        pipe.load_lora_weights(adapters[0], f"a{i}")
    pipe.set_adapters("a0", 0.6)
    tuned = make(pipe)
    with pytest.raises(ValueError, match="adapters stand beside the weights; call fuse_lora or unload_lora_weights"):
        pipe.save_pretrained(tmp_path)
    pipe.fuse_lora(adapter_names=["a0"])
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path)
    again = FramerPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.allclose(make(again), tuned, atol=1e-4)
    assert torch.allclose(make(pipe), tuned, atol=1e-4) and pipe.get_list_adapters() == {}
    assert not any("lora" in name for name in pipe.unet.state_dict())
    with pytest.raises(ValueError, match="no adapter is fused"):
        pipe.unfuse_lora()


def test_from_a_run(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    """A run folder brings base, adapter, precision and the recipe's way of feeding; lora_scale 0 is the base."""
    settings = {"name": "run", "runs_dir": str(tmp_path), "engine.kind": "plain", "schedule.steps": 1}
    settings |= {"validation.sampler": "lcm", "validation.sampler_steps": 3, "validation.max_guidance": 2.0}
    run = train_here(tiny_run | settings | {"diffusion.clip_tokens": "mean", "diffusion.scale_conditioning": True})
    pipe = FramerPipeline.from_run(run)
    pipe.set_progress_bar_config(disable=True)
    assert (pipe.config.layout, pipe.config.clip_tokens, pipe.config.scale_conditioning) == (
        "spec_middle",
        "mean",
        True,
    )
    about = read_metadata(newest_adapter(run))
    assert (pipe.config.fps, pipe.config.motion_bucket_id) == (about["fps"], about["motion"]) != (7, 127)
    assert (pipe.config.num_inference_steps, pipe.config.max_guidance_scale) == (3, 2.0)
    assert isinstance(pipe.scheduler, LCMScheduler)
    assert pipe.config.num_frames == 3 and pipe.get_active_adapters() == ["run"]
    assert pipe.unet.conv_out.weight.dtype == torch.bfloat16 and make(pipe).shape[1] == 3
    untuned = FramerPipeline.from_run(run, lora_scale=0.0)
    untuned.set_progress_bar_config(disable=True)
    pipe.disable_lora()
    assert torch.equal(make(pipe), make(untuned))
