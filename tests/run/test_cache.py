"""A run on cached latents is the run on the videos. Run: pytest tests/run/test_cache.py"""

import errno
import gc
import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import webdataset
from safetensors.torch import load, load_file, save_file

from tests.launching import ROOT, free_port, read_numbers, run, train_here
from toolkit.authoring.synth import render_clip
from toolkit.config import ModelConfig, load_config
from toolkit.data.clips import ClipSettings, draw_crop, resize_cover
from toolkit.data.files import add_member
from toolkit.data.index import open_shards
from toolkit.data.latents import CacheInfo, read_cache_info
from toolkit.data.video import read_frames, write_video
from toolkit.engine.world import init_world
from toolkit.errors import UserError
from toolkit.model.base import load_base
from toolkit.model.encoders import embed_stills, encode_frames
from toolkit.model.weights import load_part
from toolkit.run.cache import cache_shards, encode_share, join_clips
from toolkit.run.framer import to_signed
from toolkit.run.job import build_job, make_batches

SIZE: dict[str, Any] = {"height": 32, "width": 32}


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def cached(tiny_shards: Path, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny shards as fp32 latents of the tiny base; read only."""
    out = tmp_path_factory.mktemp("cached") / "shards"
    cache_shards(str(tiny_shards), str(tiny_base), str(out), precision="fp32", **SIZE)
    return out


@pytest.mark.parametrize(
    ("layout", "frames", "tokens"),
    [("spec_middle", 3, "mean"), ("middle_in_clip", 3, "first_last"), ("framer_clip", 4, "first")],
)
def test_the_same_draws_and_losses(
    tiny_run: dict[str, Any], cached: Path, tmp_path: Path, layout: str, frames: int, tokens: str
) -> None:
    """In every layout: the same clips, noise and sigma to the bit, the same latents and losses to fp32 rounding."""
    overrides = tiny_run | {
        "diffusion.layout": layout, "data.frames": frames, "data.stride": 2, "diffusion.clip_tokens": tokens,
        "data.reverse": True, "diffusion.conditioning_dropout": 0.1, "schedule.steps": 3, "engine.kind": "plain",
        "engine.precision": "fp32", "runs_dir": str(tmp_path),
    }  # fmt: skip
    runs = {"raw": overrides, "cached": overrides | {"data.shards": str(cached)}}
    tasks: dict[str, list[Any]] = {}
    losses: dict[str, list[float]] = {}
    for name, settings in runs.items():
        config = load_config(ROOT / "launch/recipes/tiny_cpu.yaml", settings | {"name": f"{name}_tasks"})
        world = init_world(join=False)
        job = build_job(config, world, fresh=True)
        batches = list(make_batches(config, job, world))
        tasks[name] = [(batch, job.framer.prepare(batch)) for batch in batches]
        losses[name] = [job.framer.compute_loss(batch)[0].item() for batch in batches]
    assert len(tasks["raw"]) == 12
    for (raw_batch, raw), (cached_batch, other) in zip(tasks["raw"], tasks["cached"], strict=True):
        assert (raw_batch.keys, raw_batch.positions) == (cached_batch.keys, cached_batch.positions)
        assert torch.equal(raw_batch.fps_B, cached_batch.fps_B) and torch.equal(
            raw_batch.motion_B, cached_batch.motion_B
        )
        assert torch.equal(raw.noise_BTCHW, other.noise_BTCHW) and torch.equal(raw.sigma_B, other.sigma_B)
        assert torch.allclose(raw.z_BTCHW, other.z_BTCHW, atol=1e-5)
        assert torch.allclose(raw.condition.ends_B2CHW, other.condition.ends_B2CHW, atol=1e-5)
        assert torch.allclose(raw.condition.tokens_BND, other.condition.tokens_BND, atol=1e-5)
        assert torch.equal(raw.condition.ids_B3, other.condition.ids_B3)
    assert losses["raw"] == pytest.approx(losses["cached"], rel=1e-4)


def test_bf16_latents_give_the_losses_to_bf16_accuracy(
    tiny_run: dict[str, Any], tiny_shards: Path, tiny_base: Path, tmp_path: Path
) -> None:
    """The default precision of cache and run; the largest relative difference of a loss is below bf16's 2^-8."""
    out = tmp_path / "latents"
    cache_shards(str(tiny_shards), str(tiny_base), str(out), **SIZE)
    overrides = tiny_run | {"schedule.steps": 4, "engine.kind": "plain", "runs_dir": str(tmp_path)}
    raw = read_numbers(train_here(overrides | {"name": "raw"}), "loss")
    other = read_numbers(train_here(overrides | {"name": "cached", "data.shards": str(out)}), "loss")
    assert max(abs(a / b - 1) for (a,), (b,) in zip(raw, other, strict=True)) < 2**-8


def test_what_is_cached_is_what_the_encoders_say(tiny_shards: Path, tiny_base: Path, cached: Path) -> None:
    """Read by stock webdataset and safetensors: mean, std and token of each frame, beside the videos' own facts."""
    base = load_base(ModelConfig(base=str(tiny_base)), torch.device("cpu"), "fp32")
    pairs = zip(
        webdataset.WebDataset(str(tiny_shards / "train-000000.tar"), shardshuffle=False),
        webdataset.WebDataset(str(cached / "train-000000.tar"), shardshuffle=False),
        strict=True,
    )
    for raw, other in list(pairs)[:3]:
        assert raw["__key__"] == other["__key__"] and raw["json"] == other["json"]
        frames = to_signed(torch.from_numpy(read_frames(raw["mp4"], extension="mp4")))[None]
        found = load(other["safetensors"])
        mean, std = encode_frames(base.vae, frames)
        assert torch.allclose(found["mean"], mean, atol=1e-5) and torch.allclose(found["std"], std, atol=1e-5)
        assert torch.allclose(found["tokens"], embed_stills(base.image_encoder, frames), atol=1e-5)
    for name in ("val-000000.tar", "val-000000.index.json"):  # evaluation compares pictures
        assert (cached / name).read_bytes() == (tiny_shards / name).read_bytes()


def test_parts_and_ranks_give_the_same_bytes(tiny_shards: Path, tiny_base: Path, cached: Path, tmp_path: Path) -> None:
    """Two parts, in either order, and two ranks that DeepSpeed starts, all as one process."""
    for order in (["1/2", "2/2"], ["2/2", "1/2"]):
        out = tmp_path / "-".join(part[0] for part in order)
        for part in order:
            assert not (out / "cache.json").exists()
            cache_shards(str(tiny_shards), str(tiny_base), str(out), precision="fp32", part=part, **SIZE)
        assert content(out) == content(cached)
    out = tmp_path / "ranks"
    launcher = Path(sys.executable).with_name("deepspeed")
    ranks = ["--num_gpus", "2", "--master_port", str(free_port())]
    done = run([str(launcher), *ranks, *command(tiny_shards, tiny_base, out)], ranks=2)
    assert done.returncode == 0, done.stderr
    assert content(out) == content(cached)


def command(shards: Path, base: Path, out: Path) -> list[str]:
    options = {"--base": base, "--out": out, "--precision": "fp32", "--height": 32, "--width": 32}
    return ["shards/cache.py", str(shards), *(str(word) for pair in options.items() for word in pair)]


def test_killed_and_gone_on_with(tiny_shards: Path, tiny_base: Path, cached: Path, tmp_path: Path) -> None:
    """SIGKILL after a few clips; the same command keeps those, encodes the others, and ends with the same bytes."""
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, *command(tiny_shards, tiny_base, out)], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    while process.poll() is None and len(list(out.glob(".caching/*.safetensors"))) < 3:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob(".caching/*.safetensors")}
    if (out / "cache.json").exists():  # it was faster than the signal
        pytest.skip("the cache was complete before it could be killed")
    assert len(kept) >= 3
    with pytest.raises(UserError, match="is not finished"):
        open_shards(out, "train")
    cache_shards(str(tiny_shards), str(tiny_base), str(out), precision="fp32", **SIZE)
    assert content(out) == content(cached)
    again = os.path.relpath(tiny_shards)  # another spelling of the same videos
    assert "is complete" in cache_shards(again, str(tiny_base), str(out), precision="fp32", **SIZE)


def test_a_tilde_is_the_home_of_the_user(
    tiny_shards: Path, tiny_base: Path, cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the folder of the shards and in --out."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "videos").symlink_to(tiny_shards)
    cache_shards("~/videos", str(tiny_base), "~/out", precision="fp32", **SIZE)
    assert {name: data for name, data in content(tmp_path / "out").items() if name != "cache.json"} == {
        name: data for name, data in content(cached).items() if name != "cache.json"
    }


def test_stopped_while_joining(tiny_shards: Path, tiny_base: Path, cached: Path, tmp_path: Path) -> None:
    """With all clips encoded and the joining begun, or begun by several at once, the end is the same; nothing is lost."""
    begun = tmp_path / "begun"
    cache_shards(str(tiny_shards), str(tiny_base), str(begun), precision="fp32", part="1/2", **SIZE)
    info = read_cache_info(cached)
    index, base = open_shards(tiny_shards, "train"), ModelConfig(base=str(tiny_base))
    world = init_world(join=False)
    encode_share(index, range(len(index)), info, base, begun / ".caching", world)
    stopped = Path(shutil.copytree(begun, tmp_path / "stopped"))
    (stopped / ".caching").rename(stopped / ".joining")
    shutil.copy(cached / "train-000000.tar", stopped / "train-000000.tar")  # joined, but not yet indexed
    with pytest.raises(UserError, match="holds .joining; run the same python shards/cache.py"):
        open_shards(stopped, "train")
    cache_shards(str(tiny_shards), str(tiny_base), str(stopped), precision="fp32", **SIZE)
    assert content(stopped) == content(cached)

    context = multiprocessing.get_context("fork")
    joiners = [context.Process(target=join_clips, args=(index, info, begun, tiny_shards)) for _ in range(4)]
    for joiner in joiners:
        joiner.start()
    for joiner in joiners:
        joiner.join()
    assert {joiner.exitcode for joiner in joiners} == {0} and content(begun) == content(cached)


def test_stopped_while_tidying_up(tiny_shards: Path, tiny_base: Path, cached: Path, tmp_path: Path) -> None:
    """With all joined and some clips taken away, by a process that was killed or is still at it, all is done."""
    half = Path(shutil.copytree(cached, tmp_path / "half"))
    (half / ".joining").mkdir()
    said = cache_shards(str(tiny_shards), str(tiny_base), str(half), precision="fp32", **SIZE)
    assert f"{half} is complete" in said and content(half) == content(cached) and not (half / ".joining").exists()


def test_folders_are_of_this_machine(tiny_shards: Path, tiny_base: Path, tmp_path: Path) -> None:
    """An address is refused to read from and to write to, and so is a file in the place of a folder."""
    (tmp_path / "file").touch()
    for shards, out, message in (
        ("s3://bucket/asl", None, "s3://bucket/asl is no folder of this machine"),
        (str(tiny_shards), "s3://bucket/asl", "s3://bucket/asl is no folder of this machine"),
        (
            str(tiny_shards),
            str(tmp_path / "file" / "out"),
            f"{tmp_path / 'file'} is a file, and shards lie in a folder",
        ),
    ):
        with pytest.raises(UserError, match=message):
            cache_shards(shards, str(tiny_base), out, **SIZE)


@pytest.mark.parametrize("name", ["train-000000.tar", "train-000000.index.json", "val-000000.tar"])
def test_a_finished_cache_that_lost_a_shard_is_not_called_complete(
    tiny_shards: Path, tiny_base: Path, cached: Path, tmp_path: Path, name: str
) -> None:
    """Gone or cut: the shard is named, and what to do; nothing is touched."""
    broken = Path(shutil.copytree(cached, tmp_path / "broken"))
    for spoil in (lambda path: os.truncate(path, 512), os.unlink):
        spoil(broken / name)
        before = content(broken)
        with pytest.raises(
            UserError, match=rf"but {Path(name).stem.split('.')[0]}.tar or its index .*delete {broken} to make"
        ):
            cache_shards(str(tiny_shards), str(tiny_base), str(broken), precision="fp32", **SIZE)
        assert content(broken) == before


def test_a_sidecar_that_says_fewer_frames(tiny_run: dict[str, Any], tiny_base: Path, tmp_path: Path) -> None:
    """A run on the videos draws windows from the frames that the sidecar says, so those are cached."""
    folder = tmp_path / "shards"
    folder.mkdir()
    video = io.BytesIO()
    write_video(video, render_clip(0, 0, 12, 32), 30)
    with tarfile.open(folder / "train-0.tar", "w") as tar:
        add_member(tar, "a.mp4", video.getvalue())
        add_member(tar, "a.json", b'{"fps": 30, "frames": 9, "height": 32, "width": 32}')
    cache_shards(str(folder), str(tiny_base), str(tmp_path / "latents"), **SIZE)
    assert open_shards(tmp_path / "latents", "train").rows[0].latents.frames == 9


def test_shards_without_indexes_on_a_read_only_disk(
    tiny_shards: Path, tiny_base: Path, cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are cached as any others: the index that could not be written beside the videos stands in the cache."""
    folder = Path(shutil.copytree(tiny_shards, tmp_path / "shards"))
    for path in folder.glob("*.index.json"):
        path.unlink()

    def refuse(tar: Path, index: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(tar))

    monkeypatch.setattr("toolkit.data.format.write_index", refuse)  # by which a folder's own is written at first sight
    out = tmp_path / "latents"
    assert "next: train" in cache_shards(str(folder), str(tiny_base), str(out), precision="fp32", **SIZE)
    found, wanted = content(out), content(cached)
    assert found.pop("cache.json") != wanted.pop("cache.json") and found == wanted  # it names the videos' folder
    assert not list(folder.glob("*.index.json"))


def test_a_val_shard_that_is_damaged_stops_the_joining(tiny_shards: Path, tiny_base: Path, tmp_path: Path) -> None:
    """Without it the cache would have no validation, and nobody would hear of it."""
    folder = Path(shutil.copytree(tiny_shards, tmp_path / "shards"))
    os.truncate(folder / "val-000000.tar", 5000)
    with pytest.raises(UserError, match="val-000000.tar has 5000 bytes"):
        cache_shards(str(folder), str(tiny_base), str(tmp_path / "latents"), **SIZE)
    shutil.copy(tiny_shards / "val-000000.tar", folder)
    assert "next: train" in cache_shards(str(folder), str(tiny_base), str(tmp_path / "latents"), **SIZE)


def test_a_video_that_does_not_decode_keeps_its_place(
    tiny_run: dict[str, Any], tiny_shards: Path, tiny_base: Path, tmp_path: Path
) -> None:
    """Its substitute at each position is that of a run on the videos, so the runs stay alike."""
    folder = Path(shutil.copytree(tiny_shards, tmp_path / "shards"))
    index = open_shards(folder, "train")
    with open(index.shards[1], "r+b") as file:
        file.seek(index.rows[1].members["mp4"].offset + 200)
        file.write(b"\0\0\0\0")
    out = tmp_path / "latents"
    assert "1 that do not decode" in cache_shards(str(folder), str(tiny_base), str(out), **SIZE)
    assert open_shards(out, "train").rows[1].latents is None
    overrides = tiny_run | {"schedule.steps": 3, "engine.kind": "plain", "runs_dir": str(tmp_path)}
    raw = train_here(overrides | {"name": "raw", "data.shards": str(folder)})
    other = train_here(overrides | {"name": "cached", "data.shards": str(out)})
    assert torch.allclose(torch.tensor(read_numbers(raw)), torch.tensor(read_numbers(other)), rtol=2**-8)
    ledgers = [[json.loads(line) for line in (run / "substituted.jsonl").open()] for run in (raw, other)]
    placed = [[(row["position"], row["key"], row["substitute_key"]) for row in rows] for rows in ledgers]
    assert placed[0] and placed[0] == placed[1]


def test_variants_are_drawn_and_used(
    tiny_run: dict[str, Any], tiny_shards: Path, tiny_base: Path, tmp_path: Path
) -> None:
    """Variant 0 is the plain clip, the others flips and crops of it; a run draws among them only if it augments."""
    out = tmp_path / "latents"
    drawn: dict[str, Any] = {"variants": 4, "flip": True, "random_crop": 0.3}
    cache_shards(str(tiny_shards), str(tiny_base), str(out), precision="fp32", **drawn, **SIZE)
    raw, index = open_shards(tiny_shards, "train"), open_shards(out, "train")
    settings = ClipSettings(1, 32, 32, flip=True, random_crop=0.3)
    base = load_base(ModelConfig(base=str(tiny_base)), torch.device("cpu"), "fp32")
    frames = read_frames(raw.read(0, "mp4"), [0], "mp4")
    found = load(index.read(0, "safetensors"))["mean"]
    crops = [draw_crop(settings, 0, variant, f"cache/{raw.rows[0].key}") for variant in (1, 2, 3)]
    assert len(set(crops)) == 3
    for variant, crop in enumerate(crops, 1):
        pixels = to_signed(torch.from_numpy(resize_cover(frames, 32, 32, crop)))[None]
        assert torch.allclose(found[variant, 0], encode_frames(base.vae, pixels)[0][0, 0], atol=1e-5)

    overrides = tiny_run | {"schedule.steps": 8, "engine.kind": "plain", "engine.precision": "fp32", "data.shards": str(out),
                            "data.frames": 3, "runs_dir": str(tmp_path)}  # fmt: skip
    world = init_world(join=False)
    plain = load_config(ROOT / "launch/recipes/tiny_cpu.yaml", overrides | {"name": "plain"})
    augmented = load_config(
        ROOT / "launch/recipes/tiny_cpu.yaml", overrides | {"name": "on", "data.flip": True, "data.random_crop": 0.3}
    )
    used = set()
    batches = {c.name: list(make_batches(c, build_job(c, world, fresh=True), world)) for c in (plain, augmented)}
    rows = {row.key: load(index.read(i, "safetensors"))["mean"] for i, row in enumerate(index.rows)}
    for batch in batches["plain"]:
        mean = batch.encoded.mean_BTCHW[0, 0]
        assert any(torch.equal(mean, frame) for frame in rows[batch.keys[0]][0])
    for batch in batches["on"]:
        mean = batch.encoded.mean_BTCHW[0, 0]
        used |= {v for v in range(4) if any(torch.equal(mean, frame) for frame in rows[batch.keys[0]][v])}
    assert used == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"data.height": 64}, "data.height is 64, was 32.*shards/cache.py .* --height 64"),
        ({"data.flip": True}, "data.flip is True, was False.*--variants 2 --flip"),
        ({"data.random_crop": 0.2}, "data.random_crop is 0.2, was 0.0.*--random_crop 0.2"),
        ({"diffusion.noise_augmentation": 0.02}, "noise_augmentation adds noise to the pictures"),
        ({"model.base": "tiny"}, "VAE is .*, was .*cache again"),
    ],
)
def test_a_recipe_that_the_cache_cannot_serve(
    tiny_run: dict[str, Any], cached: Path, overrides: dict[str, Any], message: str, tmp_path: Path, tiny_base: Path
) -> None:
    """Refused before anything is loaded, with the command that makes the right cache."""
    if "model.base" in overrides:
        other = Path(shutil.copytree(tiny_base, tmp_path / "base"))
        settings = other / "vae/config.json"
        settings.write_text(settings.read_text().replace('"scaling_factor": ', '"scaling_factor": 1'))
        overrides = {"model.base": str(other)}
    with pytest.raises(UserError, match=f"(?s){message}"):
        train_here(tiny_run | {"name": "refused", "data.shards": str(cached), "engine.kind": "plain"} | overrides)


def test_a_variant_of_the_base_has_a_cache_of_its_own(
    tiny_run: dict[str, Any], tiny_shards: Path, tiny_base: Path, tmp_path: Path
) -> None:
    """A recipe that reads the fp16 files is served by what they encode; the remedy for another cache names them."""
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    for part, name in (
        ("vae", "diffusion_pytorch_model"),
        ("image_encoder", "model"),
        ("unet", "diffusion_pytorch_model"),
    ):
        half = {key: value.half() for key, value in load_file(base / part / f"{name}.safetensors").items()}
        save_file(half, base / part / f"{name}.fp16.safetensors")
    for name, variant in (("half", "fp16"), ("whole", None)):
        cache_shards(str(tiny_shards), str(base), str(tmp_path / name), **SIZE, variant=variant)
    overrides = tiny_run | {"engine.kind": "plain", "schedule.steps": 1, "runs_dir": str(tmp_path)}
    overrides |= {"name": "half_run", "model.base": str(base), "model.variant": "fp16"}
    with pytest.raises(UserError, match=f"VAE is .* cache again: .*--base {base} --variant fp16 --height"):
        train_here(overrides | {"data.shards": str(tmp_path / "whole")})
    assert len(read_numbers(train_here(overrides | {"data.shards": str(tmp_path / "half")}))) == 1


def test_latents_without_their_facts_are_refused(tiny_run: dict[str, Any], cached: Path, tmp_path: Path) -> None:
    """A lost cache.json would let latents of another VAE in."""
    folder = Path(shutil.copytree(cached, tmp_path / "lost"))
    (folder / "cache.json").unlink()
    with pytest.raises(UserError, match="without cache.json; make the cache again"):
        train_here(tiny_run | {"name": "lost", "data.shards": str(folder), "engine.kind": "plain"})
    (folder / "cache.json").write_text('{"format_version": 1}')
    with pytest.raises(UserError, match="cannot be read"):
        read_cache_info(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 30}, "multiples of 8"),
        ({"variants": 3}, "variants is 3; give 2 to 64 with flip or random_crop"),
        ({"flip": True}, "variants is 1"),
        ({"random_crop": 0.7, "variants": 2}, "random_crop is 0.7"),
        ({"part": "3/2"}, "part is 3/2"),
        ({"part": "x"}, "part is x"),
        (
            {"height": 2048, "width": 2048, "variants": 64, "flip": True, "precision": "fp32"},
            "variants of .* are too large; give --variants",
        ),
    ],
)
def test_options_that_make_no_sense(tiny_shards: Path, options: dict[str, Any], message: str) -> None:
    """One sentence each, before a base is looked for."""
    with pytest.raises(UserError, match=message):
        cache_shards(str(tiny_shards), "nowhere", **(SIZE | options))


def test_foreign_folders_are_left_alone(tiny_shards: Path, tiny_base: Path, cached: Path, tmp_path: Path) -> None:
    """A cache goes into its own folder: not over files, not into one begun otherwise, not over a cache."""
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something else"):
        cache_shards(str(tiny_shards), str(tiny_base), str(tmp_path), **SIZE)
    with pytest.raises(UserError, match="holds something else"):
        cache_shards(str(tiny_shards), str(tiny_base), str(cached), **SIZE)
    with pytest.raises(UserError, match="is a cache already"):
        cache_shards(str(cached), str(tiny_base), **SIZE)
    begun = tmp_path / "begun"
    cache_shards(str(tiny_shards), str(tiny_base), str(begun), part="1/2", **SIZE)
    with pytest.raises(UserError, match="begun with other settings"):
        cache_shards(str(tiny_shards), str(tiny_base), str(begun), part="2/2", precision="fp32", **SIZE)


def test_the_key_follows_what_latents_depend_on() -> None:
    """Every field but the two names for people changes it."""
    info = CacheInfo(
        base="b", vae="1", image_encoder="2", source="s", source_fingerprint="3", height=8, width=8, variants=1,
        flip=False, random_crop=0.0, precision="bf16",
    )  # fmt: skip
    changes: dict[str, Any] = {"vae": "x", "image_encoder": "x", "source_fingerprint": "x", "height": 16, "width": 16,
                               "variants": 2, "flip": True, "random_crop": 0.1, "precision": "fp32"}  # fmt: skip
    keys = {info.model_copy(update={name: value}).key for name, value in changes.items()}
    assert len(keys | {info.key}) == len(changes) + 1
    assert info.model_copy(update={"base": "other", "source": "other"}).key == info.key


def test_a_run_on_latents_needs_no_encoders(
    tiny_run: dict[str, Any], cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads none, but for held-out videos, which it encodes at the start; identity and losses are the same to the bit.

    The other run of the comparison has them at hand, to draw its batches.
    """
    loaded: list[Any] = []

    def watch(kind: Any, *args: Any, **options: Any) -> Any:
        network = load_part(kind, *args, **options)
        loaded.append((kind.__name__, weakref.ref(network)))
        return network

    monkeypatch.setattr("toolkit.model.base.load_part", watch)
    overrides = tiny_run | {
        "engine.kind": "plain", "data.shards": str(cached), "data.frames": 5, "diffusion.layout": "middle_in_clip",
        "runs_dir": str(tmp_path), "validation.clips": 2,
    }  # fmt: skip
    world, found = init_world(join=False), {}
    for name, changes in {
        "alone": {},
        "watched": {"validation.every_steps": 1},
        "with": {"validation.every_steps": 1, "data.debug": True},
    }.items():
        loaded.clear()
        config = load_config(ROOT / "launch/recipes/tiny_cpu.yaml", overrides | changes | {"name": name})
        job = build_job(config, world, fresh=True)
        gc.collect()
        held = [kind for kind, network in loaded if network() is not None]
        read = [kind for kind, _ in loaded]
        loss = job.framer.compute_loss(next(make_batches(config, job, world)))[0].item()
        score = job.validator.measure(lambda: None).held_out if job.validator else None
        found[name] = read, held, job.framer.base.vae is None, job.identity, loss, score
    unet, encoders = ["FramerUNet"], ["AutoencoderKLTemporalDecoder", "CLIPVisionModelWithProjection"]
    assert found["alone"][:3] == (unet, unet, True)
    assert (sorted(found["watched"][0]), *found["watched"][1:3]) == (sorted(unet + encoders), unet, True)
    assert (sorted(found["with"][1]), found["with"][2]) == (sorted(unet + encoders), False)
    assert found["watched"][3:] == found["with"][3:] and found["alone"][3:5] == found["with"][3:5]


def test_a_run_on_latents_still_looks_its_base_over(
    tiny_run: dict[str, Any], cached: Path, tiny_base: Path, tmp_path: Path
) -> None:
    """A base without its VAE's or image encoder's files is refused in a sentence, as it is where they are loaded."""
    for number, (lost, message) in enumerate(
        {
            "vae": "lacks vae; a base in SVD layout holds",
            "vae/config.json": "cannot read .*vae/config.json",
            "image_encoder/model.safetensors": "image_encoder must hold its weights as",
        }.items()
    ):
        base = Path(shutil.copytree(tiny_base, tmp_path / str(number)))
        shutil.rmtree(base / lost) if (base / lost).is_dir() else (base / lost).unlink()
        with pytest.raises(UserError, match=message):
            train_here(
                tiny_run
                | {"name": "refused", "engine.kind": "plain", "data.shards": str(cached), "model.base": str(base)}
            )
