"""What launch/interpolate.py makes of runs, exports and stills. Run: pytest tests/commands/test_interpolate.py"""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import toolkit.commands.interpolate as interpolate_module
from launch.interpolate import interpolate
from tests.data.test_stills import film as write_film
from tests.launching import ROOT, train_here
from tests.model.control import make_controlnet
from toolkit.commands.interpolate import write_frames
from toolkit.config import ModelConfig
from toolkit.data.video import probe, read_frames, write_video
from toolkit.errors import UserError
from toolkit.model.base import load_base
from toolkit.model.unet import FramerUNet
from toolkit.run.checkpoint import list_checkpoints
from toolkit.run.folder import newest_adapter

SIZE_PX = 32
Frames = Callable[..., np.ndarray]


@pytest.fixture(scope="module")
def trained(tiny_run: dict[str, Any]) -> Path:
    """A run of two steps that is fed as Framer is; read only."""
    return train_here(
        tiny_run
        | {
            "name": "fed",
            "engine.kind": "plain",
            "engine.micro_batch": 4,
            "schedule.steps": 2,
            "engine.precision": "fp32",
        }
        | {"diffusion.layout": "middle_in_clip", "lora.extra_trainable": ["conv_in", "mask_token"]}
    )


@pytest.fixture(scope="module")
def adapter(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run's adapter by itself, its B matrices made large."""
    folder = tmp_path_factory.mktemp("adapter") / "loud"
    shutil.copytree(newest_adapter(trained), folder)
    file = folder / "adapter_model.safetensors"
    tensors, header = load_file(file), read_header(file)
    for i, name in enumerate(sorted(tensors)):
        if ".lora_B." in name:
            tensors[name].normal_(0, 0.05, generator=torch.Generator().manual_seed(i))
    save_file(tensors, file, metadata=header)
    (folder / "manifest.json").unlink()  # which would call it damaged
    return folder


def read_header(file: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        return opened.metadata()


@pytest.fixture(scope="module")
def stills(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three textured pictures, each shifted by three pixels against the one before."""
    folder = tmp_path_factory.mktemp("stills")
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    wide = Image.fromarray(noise).resize((2 * SIZE_PX, SIZE_PX), Image.Resampling.BICUBIC)
    for i in range(3):
        wide.crop((3 * i, 0, 3 * i + SIZE_PX, SIZE_PX)).save(folder / f"{i}.png")
    return [str(folder / f"{i}.png") for i in range(3)]


@pytest.fixture
def frames_of(stills: list[str], tmp_path: Path) -> Frames:
    """Interpolate between the first two stills, or those given, in one step; returns the frames uint8."""
    calls = iter(range(100))

    def make(**flags: Any) -> np.ndarray:
        out = tmp_path / str(next(calls))
        ends = {} if "stills" in flags else {"first": stills[0], "last": stills[1]}
        interpolate(str(out), **({"frames": 3, "steps": 1} | ends | flags))
        return np.stack([np.asarray(Image.open(p)) for p in sorted(out.iterdir())])

    return make


def nearly(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal up to one level of 255: sums in another order."""
    apart = np.abs(a.astype(int) - b)
    return a.shape == b.shape and apart.max() <= 1


def test_video_through_many_stills(trained: Path, stills: list[str], frames_of: Frames) -> None:
    """Two gaps of five frames share the still between them, which is untouched, as the ends are."""
    made = frames_of(run=str(trained), stills=",".join(stills), frames=5)
    assert made.shape == (9, SIZE_PX, SIZE_PX, 3)
    for place, still in zip((0, 4, 8), stills, strict=True):
        assert (made[place] == np.asarray(Image.open(still))).all()
    assert (made[:5] == frames_of(run=str(trained), frames=5)).all()


def test_a_video_is_filled_between_its_frames(
    trained: Path, stills: list[str], frames_of: Frames, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As its frames as pictures are, in parts or not; it plays as long as before, in more frames a second."""
    film = tmp_path / "film.mp4"
    write_video(film, np.stack([np.asarray(Image.open(still)) for still in stills]), 8)
    for i, frame in enumerate(read_frames(film)):
        Image.fromarray(frame).save(tmp_path / f"{i}.png")
    pictures = ",".join(str(tmp_path / f"{i}.png") for i in range(3))
    for batch in (1, 2):
        made = frames_of(run=str(trained), stills=str(film), frames=5, batch=batch)
        assert (made == frames_of(run=str(trained), stills=pictures, frames=5, fps=32, batch=batch)).all()
    said = capsys.readouterr().out
    assert "3 frames at 8 fps become 9 at 32, without sound" in said and "unevenly" not in said
    interpolate(str(tmp_path / "out.mp4"), run=str(trained), stills=str(film), frames=3, steps=1)
    filled = probe(tmp_path / "out.mp4")
    assert (filled.frames, filled.fps) == (5, 16)
    capsys.readouterr()
    uneven = write_film(tmp_path / "uneven.mkv", read_frames(film), times=[0, 1, 25])
    interpolate(str(tmp_path / "even.mp4"), run=str(trained), stills=uneven, frames=3, steps=1)
    assert "3 frames at 2 fps become 5 at 4" in (said := capsys.readouterr().out)
    assert "note: the video's frames come unevenly (1 of 2 steps), and will be shown evenly" in said


def test_every_frame_has_noise_of_its_own(trained: Path, stills: list[str], frames_of: Frames) -> None:
    """The same pair of stills twice in a row is not filled the same way twice."""
    made = frames_of(run=str(trained), stills=",".join([stills[0]] * 3))
    assert not (made[1] == made[3]).all()


def test_seed_per_gap(trained: Path, stills: list[str], frames_of: Frames) -> None:
    """One seed per gap moves that gap only; one seed for all is the same for each."""
    flags = {"run": str(trained), "stills": ",".join(stills)}
    one, two, both = (frames_of(**flags, seed=seed) for seed in ((1, 1), (1, 2), 1))
    assert (one == both).all()
    assert (one[:3] == two[:3]).all() and not (one[3] == two[3]).all()


def test_pairs_together(trained: Path, stills: list[str], frames_of: Frames) -> None:
    """With --batch a video through many stills is the same, to rounding."""
    flags = {"run": str(trained), "stills": ",".join(stills), "frames": 5, "seed": (1, 2)}
    assert nearly(frames_of(**flags, batch=3), frames_of(**flags))


def test_two_halves_of_an_adapter_are_the_adapter(adapter: Path, frames_of: Frames) -> None:
    """Weights add up; lora_scale multiplies them all; at zero the base is untuned."""
    whole = frames_of(adapter=str(adapter))
    assert nearly(frames_of(adapter=f"{adapter},{adapter}", weights=(0.25, 0.75)), whole)
    assert nearly(frames_of(adapter=f"{adapter},{adapter}", weights=(0.5, 1.5), lora_scale=0.5), whole)
    untuned = frames_of(adapter=str(adapter), lora_scale=0.0)
    assert not nearly(untuned, whole)
    assert (frames_of(adapter=f"{adapter},{adapter}", weights=(0.0, 0.0)) == untuned).all()


def test_an_adapter_feeds_its_network_as_it_was_trained(
    adapter: Path, trained: Path, frames_of: Frames, tmp_path: Path
) -> None:
    """The recipe is in the file: no run is needed. Without it, a recipe must be named, and serves as well."""
    asked = {"fps": 7.5, "motion": 100}  # whose defaults are in the file too
    made = frames_of(adapter=str(adapter), **asked)
    bare = Path(shutil.copytree(adapter, tmp_path / "bare"))
    save_file(load_file(bare / "adapter_model.safetensors"), bare / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"bare does not say how it was trained.*; name a recipe"):
        frames_of(adapter=str(bare))
    assert (frames_of(adapter=str(bare), config=str(trained / "config.yaml"), **asked) == made).all()


def test_rate_and_motion_default_to_those_of_the_clips(
    adapter: Path, frames_of: Frames, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network is told what the training clips had in the middle; a flag wins."""
    told = spy_on_ids(monkeypatch)
    about = json.loads(read_header(adapter / "adapter_model.safetensors")["framer_toolkit"])
    frames_of(adapter=str(adapter))
    frames_of(adapter=str(adapter), fps=5.0, motion=80.0)
    assert told[0][0, :2].tolist() == pytest.approx([about["fps"] - 1, about["motion"]])
    assert told[1][0, :2].tolist() == [4, 80]


def test_guidance_asks_the_network_twice(
    adapter: Path, frames_of: Frames, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Above 1 the batch doubles and the frames change; and it is said that the adapter was not trained for it."""
    told = spy_on_ids(monkeypatch)
    free = frames_of(adapter=str(adapter))
    assert "note:" not in capsys.readouterr().out
    guided = frames_of(adapter=str(adapter), max_guidance=6.0)
    assert [len(ids_B3) for ids_B3 in told] == [1, 2] and not nearly(free, guided)
    assert "without diffusion.conditioning_dropout" in capsys.readouterr().out


def test_lcm_sampler_in_few_steps(adapter: Path, frames_of: Frames) -> None:
    """The few-step sampler makes other frames than Euler from the same noise, and the same ones again."""
    few = frames_of(adapter=str(adapter), sampler="lcm", steps=3)
    assert (frames_of(adapter=str(adapter), sampler="lcm", steps=3) == few).all()
    assert not nearly(frames_of(adapter=str(adapter), steps=3), few)


def spy_on_ids(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    told: list[Tensor] = []
    forward = FramerUNet.forward

    def record(self: FramerUNet, *args: Any, **kwargs: Any) -> Any:
        told.append(kwargs["added_time_ids"])
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(FramerUNet, "forward", record)
    return told


@pytest.fixture(scope="module")
def controlnet(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A ControlNet of the tiny base whose last convolutions are awake."""
    unet = load_base(ModelConfig(base=str(tiny_base)), torch.device("cpu"), "fp32").unet
    folder = tmp_path_factory.mktemp("control")
    make_controlnet(unet, awake=True).save_pretrained(folder / "controlnet")
    return str(folder)


def test_trajectories_steer(
    adapter: Path, controlnet: str, stills: list[str], frames_of: Frames, tmp_path: Path
) -> None:
    """A point that is drawn moves the frames, its scale counts, and at scale zero the network is free."""
    path = tmp_path / "points.json"
    path.write_text(json.dumps({"points": [[[8, 8], [24, 20]]]}))
    flags = {"adapter": str(adapter), "controlnet": controlnet}
    free = frames_of(adapter=str(adapter))
    steered = frames_of(**flags, trajectories=str(path))
    assert not nearly(steered, free)
    assert not nearly(frames_of(**flags, trajectories=str(path), control_scale=0.3), steered)
    assert nearly(frames_of(**flags, trajectories=str(path), control_scale=0.0), free)
    path.write_text(json.dumps({"points": [[[-8, 8], [-24, 20]]]}))
    with pytest.raises(UserError, match="has no place inside the 32x32 picture"):
        frames_of(**flags, trajectories=str(path))
    path.write_text(json.dumps({"points": [[[8, 8], [24, 4]]]}))
    assert not nearly(frames_of(**flags, trajectories=str(path)), steered)


def test_found_trajectories(adapter: Path, controlnet: str, frames_of: Frames, tmp_path: Path) -> None:
    """Features of two shifted pictures are matched and steer, with half the scale by default."""
    noise = np.random.default_rng(1).integers(0, 256, (24, 24, 3), np.uint8)
    wide = Image.fromarray(noise).resize((200, 96), Image.Resampling.BICUBIC)
    for i in range(2):
        wide.crop((9 * i, 0, 9 * i + 96, 96)).save(tmp_path / f"{i}.png")
    pair = {"stills": f"{tmp_path}/0.png,{tmp_path}/1.png", "adapter": str(adapter), "controlnet": controlnet}
    found = frames_of(**pair, trajectories="auto")
    assert found.shape == (3, SIZE_PX, SIZE_PX, 3)
    assert (frames_of(**pair, trajectories="auto", control_scale=0.5) == found).all()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({}, "nothing to interpolate with; give --run"),
        ({"run": "RUN", "adapter": "ADAPTER"}, "both --run and --adapter are given"),
        ({"adapter": "ADAPTER", "weights": (1.0, 2.0)}, "2 weights for 1 adapters"),
        ({"adapter": "nowhere"}, "no adapter at nowhere: give a run folder"),
        ({"run": "RUN", "first": None, "last": "a.mp4"}, "--first is missing; give both ends of the gap, or --stills"),
        ({"run": "RUN", "last": None}, "--last is missing; give both ends"),
        ({"run": "RUN", "first": None, "last": None}, "give --first and --last, or --stills"),
        (
            {"run": "RUN", "stills": "a.png"},
            "give --first and --last, or --stills with two pictures or more, or with one",
        ),
        ({"run": "RUN", "seed": (1, 2)}, "2 seeds for 1 gaps"),
        ({"run": "RUN", "trajectories": "auto"}, "trajectories need a ControlNet"),
        ({"run": "RUN", "trajectories": "x.json", "controlnet": "y", "stills": "THREE"}, "is for two stills, not 3"),
        ({"run": "RUN", "trajectories": "x.json", "controlnet": "y"}, "cannot read the trajectories x.json"),
        ({"adapter": "README.md"}, "README.md is not a .safetensors file"),
        ({"adapter": "README.md,ADAPTER"}, "README.md is not a .safetensors file"),
        ({"run": "RUN", "stills": "THREE", "first": "x.png"}, "are three ways to name stills"),
        ({"run": "RUN", "controlnet": "x"}, "--controlnet is for trajectories, but none are given"),
        ({"run": "RUN", "control_scale": 0.5}, "--control_scale is for trajectories, but none"),
        ({"run": "RUN", "config": "x.yaml"}, "both --run and --config are given"),
        ({"unet": "nowhere", "lora_scale": 0.5}, "--lora_scale is given, but no adapter"),
        ({"unet": "nowhere"}, "nowhere does not say how it was trained"),
        ({"run": "RUN", "sampler": "lcm", "steps": 41}, "41 sampler steps: sampler lcm takes 1 to 40"),
    ],
)
def test_flags_that_do_not_go_together_or_lead_nowhere(
    trained: Path, adapter: Path, stills: list[str], frames_of: Frames, flags: dict[str, Any], message: str
) -> None:
    """Each is a sentence, told before anything is loaded."""
    places = {"RUN": str(trained), "ADAPTER": str(adapter), "THREE": ",".join(stills)}
    with pytest.raises(UserError, match=message):
        frames_of(
            **{name: places.get(value, value) if isinstance(value, str) else value for name, value in flags.items()}
        )


def test_an_adapter_that_is_fed_otherwise_is_noted(
    adapter: Path, tmp_path: Path, frames_of: Frames, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of several adapters the first one's recipe feeds the network; one that was trained otherwise is named."""
    other = Path(shutil.copytree(adapter, tmp_path / "other"))
    file = other / "adapter_model.safetensors"
    header = {key: json.loads(text) for key, text in read_header(file).items()}
    header["framer_toolkit"]["recipe"]["diffusion"]["clip_tokens"] = "mean"
    save_file(load_file(file), file, metadata={key: json.dumps(value) for key, value in header.items()})
    frames_of(adapter=f"{adapter},{adapter}")
    assert "note:" not in capsys.readouterr().out
    frames_of(adapter=f"{adapter},{other}")
    assert "other was trained with clip_tokens mean (here it is first_last)" in capsys.readouterr().out


def test_runs_that_asked_for_xformers_can_be_used_without(trained: Path, tmp_path: Path, frames_of: Frames) -> None:
    """The kernel is a matter of the machine, not of the adapter."""
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("attention: auto", "attention: xformers"))
    assert "xformers" in config.read_text()
    assert (frames_of(run=str(run)) == frames_of(run=str(trained))).all()


@pytest.mark.launch
def test_lists_of_bare_names_on_the_command_line(adapter: Path, stills: list[str], tmp_path: Path) -> None:
    """a,b without slashes is a list to Fire, with slashes it is text: both are lists to us."""
    for name in ("a", "b"):
        shutil.copytree(adapter, tmp_path / name)
    for still in stills:
        shutil.copy(still, tmp_path)
    command = [
        sys.executable,
        str(ROOT / "launch/interpolate.py"),
        "--adapter",
        "a,b",
        "--weights",
        "0.5,0.5",
        "--steps",
        "1",
    ]
    command += ["--stills", "0.png,1.png,2.png", "--frames", "3", "--out", "made"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "made").iterdir())) == 5


def test_frames_are_not_mixed_with_what_is_there(trained: Path, stills: list[str], tmp_path: Path) -> None:
    """A folder that holds anything is refused before any work, so no old frame stays in a new video."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full/007.png").write_bytes(b"")
    with pytest.raises(UserError, match="full is there already; give --out a folder that is new or empty"):
        interpolate(str(tmp_path / "full"), run=str(trained), first=stills[0], last=stills[1])


@pytest.mark.parametrize("ending", [".mp4", ".gif"])
def test_a_film_is_there_whole_or_not_at_all(
    trained: Path, stills: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    """What is there stays; a place that takes no file is found before the work; a write that fails leaves nothing."""
    ends = {"run": str(trained), "first": stills[0], "last": stills[1], "frames": 3, "steps": 1, "fps": 10}
    (tmp_path / f"old{ending}").write_bytes(b"mine")
    with pytest.raises(UserError, match="is there already; give another --out"):
        interpolate(str(tmp_path / f"old{ending}"), **ends)
    assert (tmp_path / f"old{ending}").read_bytes() == b"mine"
    with monkeypatch.context() as patch:
        patch.setattr("toolkit.commands.interpolate.load_framer", lambda *given: 1 / 0)
        with pytest.raises(UserError, match="cannot write .*; choose another --out"):
            interpolate(f"/proc/new{ending}", **ends)
    with monkeypatch.context() as patch:
        patch.setattr("toolkit.commands.interpolate.write_frames", _fill_the_disk)
        with pytest.raises(OSError, match="No space"):
            interpolate(str(tmp_path / f"new{ending}"), **ends)
    assert [path.name for path in tmp_path.iterdir()] == [f"old{ending}"]
    interpolate(str(tmp_path / f"new{ending}"), **ends)
    assert {path.name for path in tmp_path.iterdir()} == {f"old{ending}", f"new{ending}"}


def test_what_comes_meanwhile_stays(
    trained: Path, stills: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another command with the same --out was faster: both films are there."""
    write = interpolate_module.write_frames

    def write_late(place: Path, *given: Any) -> None:
        write(place, *given)
        (tmp_path / "a.mp4").write_bytes(b"the other's")

    monkeypatch.setattr(interpolate_module, "write_frames", write_late)
    with pytest.raises(UserError, match="has come there meanwhile, and stays; what was made is .*mp4"):
        interpolate(str(tmp_path / "a.mp4"), run=str(trained), first=stills[0], last=stills[1], frames=3, steps=1)
    (kept,) = tmp_path.glob("a.*.mp4")
    assert (tmp_path / "a.mp4").read_bytes() == b"the other's" and probe(kept).frames == 3
    assert len([*tmp_path.iterdir()]) == 2


@pytest.mark.parametrize("name", ["new", "empty", "mp4", ".gif"])
def test_a_folder_keeps_what_it_is(trained: Path, stills: list[str], tmp_path: Path, name: str) -> None:
    """Whatever it is called; one that is there, as a mounted disk is, is written into and not put in another's place."""
    out = tmp_path / name
    if name == "empty":
        out.mkdir()
        (out / ".begun").touch()  # of a command that was killed
    before = out.stat().st_ino if out.exists() else None
    interpolate(str(out), run=str(trained), first=stills[0], last=stills[1], frames=3, steps=1)
    assert sorted(path.name for path in out.glob("[!.]*")) == ["000.png", "001.png", "002.png"]
    assert before in (None, out.stat().st_ino) and [*tmp_path.iterdir()] == [out]


def test_pictures_sort_as_their_frames_do(tmp_path: Path) -> None:
    """Also where there are a thousand and more of them."""
    write_frames(tmp_path, (np.full((1, 1, 3), i // 4, np.uint8) for i in range(1001)), 1001, 25)
    shown = [np.asarray(Image.open(path))[0, 0, 0] for path in sorted(tmp_path.iterdir())]
    assert shown == [i // 4 for i in range(1001)]


def _fill_the_disk(place: Path, *given: Any) -> None:
    place.write_bytes(b"half")
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_gif_is_not_asked_for_what_it_cannot_hold(trained: Path, stills: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a GIF shows 50 frames a second at most, not 60; give --fps 50, or an .mp4"):
        interpolate(str(tmp_path / "a.gif"), run=str(trained), first=stills[0], last=stills[1], fps=60)


def test_home_is_the_users_own(
    adapter: Path, stills: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a shell leaves ~ as it is, no folder of that name is made."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for i in range(2):
        shutil.copy(stills[i], tmp_path)
    interpolate("~/made.mp4", adapter=str(adapter), first="~/0.png", last="~/1.png", frames=3, steps=1)
    assert {path.name for path in tmp_path.iterdir()} == {"0.png", "1.png", "made.mp4"}


def test_a_damaged_checkpoint_is_not_used(trained: Path, tmp_path: Path, frames_of: Frames) -> None:
    """Named by its path it is verified as a run's own is."""
    folder = Path(shutil.copytree(list_checkpoints(trained)[-1], tmp_path / "copy"))
    frames_of(adapter=str(folder))
    (folder / "README.md").write_text("mine")  # what is beside it may come and go
    (folder / "optimizer.safetensors").unlink()
    frames_of(adapter=str(folder))
    file = folder / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="copy is damaged: adapter_model.safetensors differs"):
        frames_of(adapter=str(folder))


def test_numbers_that_explode_are_no_picture(adapter: Path, frames_of: Frames) -> None:
    """A sampling that ends in NaN or infinity says so instead of writing black frames."""
    with pytest.raises(UserError, match="not a finite number; lower lora_scale"):
        frames_of(adapter=str(adapter), lora_scale=1e30)


def test_a_controlnet_of_another_codec_is_refused(
    adapter: Path, tiny_base: Path, frames_of: Frames, stills: list[str], tmp_path: Path
) -> None:
    """Heatmaps shrink with the pictures: a ControlNet for a VAE of factor 8 does not fit one of factor 2."""
    unet = load_base(ModelConfig(base=str(tiny_base)), torch.device("cpu"), "fp32").unet
    make_controlnet(unet, factor=8).save_pretrained(tmp_path / "eight")
    (tmp_path / "points.json").write_text(json.dumps({"points": [[[8, 8], [24, 20]]]}))
    with pytest.raises(UserError, match="shrinks heatmaps 8 times, the base's VAE pictures 2 times"):
        frames_of(adapter=str(adapter), controlnet=str(tmp_path / "eight"), trajectories=str(tmp_path / "points.json"))
