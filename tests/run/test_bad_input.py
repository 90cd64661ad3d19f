"""What a user can get wrong is told in one sentence, before any work. Run: pytest tests/run/test_bad_input.py"""

import gzip
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from launch.interpolate import interpolate as launch_interpolate
from tests.launching import RECIPE, free_port, kill_tree, launch, run, start, train_here
from toolkit.authoring.pack import pack
from toolkit.config import load_config
from toolkit.engine.world import World
from toolkit.errors import UserError
from toolkit.model.tiny import make_tiny_base
from toolkit.run.job import build_job
from toolkit.run.trainer import train


def one_sentence(done: subprocess.CompletedProcess[str]) -> str:
    """The line on stderr with which a refused command ends; the library's warnings before it do not count."""
    assert done.returncode == 2 and "Traceback" not in done.stdout + done.stderr, done.stderr
    return done.stderr.strip().splitlines()[-1]


@pytest.fixture
def mine(tiny_run: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """Overrides of a run of one process whose folder would be tmp_path/runs/mine."""
    return tiny_run | {"name": "mine", "runs_dir": str(tmp_path / "runs"), "engine.kind": "plain"}


def refused(overrides: dict[str, Any], match: str) -> None:
    """The run ends with this message and leaves no run folder."""
    with pytest.raises(UserError, match=match):
        train_here(overrides)
    assert not (Path(overrides["runs_dir"]) / "mine").exists()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("lora.rnk", 8, r"unknown key lora\.rnk; did you mean lora\.rank\?"),
        ("learning_rate_peak", 1, r"unknown key learning_rate_peak"),
        ("optimizer.lr", 7, r"optimizer\.lr is 7: .*less than or equal to 1"),
        ("lora.rank", "many", r"lora\.rank is 'many': .*integer"),
        ("data.frames", 4, r"data.frames is 4: layout spec_middle needs an odd number"),
        ("data.height", 30, r"30x32: both must be multiples of 8"),
        ("engine.micro_batch", 3, r"global_batch 4 must be a multiple of micro_batch 3"),
        ("model.attention", "flash", r"model\.attention is 'flash': .*'auto', 'xformers' or 'sdpa'"),
        ("model.attention", "xformers", r"model\.attention is xformers, but .*; use auto, which takes sdpa"),
        ("data.shards", "no/such/folder", r"there is no folder no/such/folder; pack videos into it"),
        ("engine.global_batch", 64, r"holds \d+ training clips.*, fewer than one batch \(engine\.global_batch 64\)"),
        ("name", "a/b", r"name is 'a/b': .*pattern"),
        ("lora.rank", 0, r"lora\.rank is 0: .*greater than or equal to 1"),
        ("lora.targets", "attn9", r"lora\.targets 'attn9' matches no linear layer; use spatial"),
        ("lora.init_from", "nowhere", r"no adapter at nowhere: give a run folder, a checkpoint"),
        ("diffusion.parameterization", "epsilon", r"is epsilon, but the base's scheduler says v: .*take auto"),
    ],
)
def test_wrong_setting_is_named(mine: dict[str, Any], key: str, value: Any, message: str) -> None:
    """The field, what was given, and what is allowed or meant; no run folder is left."""
    if torch.cuda.is_available() and value == "xformers":
        pytest.skip("xformers may run here")
    refused(mine | {key: value}, message)


def test_a_refusal_leaves_nothing_behind(mine: dict[str, Any]) -> None:
    """Called again in one process, as in a notebook, a training is refused for the same reason."""
    config = load_config(RECIPE, mine | {"data.shards": "no/such/folder"})
    with mock.patch.dict(os.environ):
        for _ in range(2):
            with pytest.raises(UserError, match="there is no folder no/such/folder"):
                train(config)
        dist.destroy_process_group()


def test_wrong_recipe_file_is_named(mine: dict[str, Any], tmp_path: Path) -> None:
    """Not there, not YAML, not a tree."""
    for text, message in ((None, "cannot read the recipe"), ("a: [", "is not YAML"), ("words", "is not a recipe")):
        path = tmp_path / "recipe.yaml"
        if text is not None:
            path.write_text(text)
        with pytest.raises(UserError, match=message):
            load_config(path, mine)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_batch_size": 8}, r"sets train_batch_size, but batch, .* come from the recipe; take it out"),
        ({"optimizer": {"type": "Adam", "params": {"lr": 1}}}, r"sets optimizer, but .*learning rate"),
        ({"bf16": {"enabled": True}, "gradient_clipping": 1}, r"sets bf16, gradient_clipping, .*take them out"),
    ],
)
def test_deepspeed_file_may_not_set_what_the_recipe_owns(
    mine: dict[str, Any], tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    """Batch, rate, precision, clipping: each number has one owner."""
    path = tmp_path / "zero2.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}} | settings))
    refused(mine | {"engine.kind": "zero2", "engine.deepspeed": str(path)}, message)


def test_ranks_must_fit_engine_and_batch(mine: dict[str, Any]) -> None:
    """The plain engine on two ranks, and a batch that three ranks cannot share."""
    for ranks, message in ((2, "engine.kind plain runs one process, not 2"), (3, "global batch of 4 .* 3 ranks")):
        with pytest.raises(UserError, match=message):
            build_job(load_config(RECIPE, mine), World(rank=0, size=ranks, device=torch.device("cpu")), fresh=False)
    assert not Path(mine["runs_dir"]).exists()


def test_shards_that_are_none_are_named(mine: dict[str, Any], tmp_path: Path) -> None:
    """An empty folder, a text file named .tar, a gzip tar, and a tar without samples."""
    folder = tmp_path / "shards"
    folder.mkdir()
    refused(mine | {"data.shards": str(folder)}, "holds no .tar shards; pack videos into it")
    empty = io.BytesIO()
    with tarfile.open(fileobj=empty, mode="w"):
        pass
    for content in (b"these are words, not a tar\n" * 40, gzip.compress(empty.getvalue()), empty.getvalue()):
        (folder / "train-0.tar").write_bytes(content)
        refused(mine | {"data.shards": str(folder)}, r"train-0\.tar")
        for index in folder.glob("*.json"):
            index.unlink()


def test_packing_nothing_is_refused(tmp_path: Path) -> None:
    """A folder without videos, and a folder that is not there."""
    (tmp_path / "notes.txt").write_text("no video")
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=str(folder)):
            pack(folder, tmp_path / "shards")
    assert not (tmp_path / "shards").exists()


@pytest.fixture(scope="module")
def trained(tiny_run: dict[str, Any]) -> Path:
    """The run folder of two steps; read only."""
    settings = {"name": "bad_input", "engine.kind": "plain", "engine.micro_batch": 4, "schedule.steps": 2}
    return train_here(tiny_run | settings)


def test_folder_of_another_recipe_is_refused(trained: Path, tiny_run: dict[str, Any], tmp_path: Path) -> None:
    """The fields that differ are named with both values, and nothing in the folder changes."""
    folder = Path(shutil.copytree(trained, tmp_path / "bad_input"))
    before = (folder / "config.yaml").read_bytes()
    settings = {"name": "bad_input", "runs_dir": str(tmp_path), "engine.kind": "plain", "schedule.steps": 2}
    with pytest.raises(UserError, match=r"another recipe \(lora\.rank was 4, is 8; engine\.micro_batch was 4, is 1\)"):
        train_here(tiny_run | settings | {"lora.rank": 8})
    assert (folder / "config.yaml").read_bytes() == before
    with pytest.raises(UserError, match="holds files but no run"):
        (tmp_path / "full").mkdir()
        (tmp_path / "full/thesis.tex").write_text("years of work")
        train_here(tiny_run | settings | {"name": "full"})


@pytest.fixture
def still(tmp_path: Path) -> str:
    path = tmp_path / "still.png"
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(path)
    return str(path)


def interpolate(run: Path, first: str | None, last: str | None, **options: Any) -> None:
    settings = {"out": str(run.parent / "out.mp4"), "run": str(run), "first": first, "last": last, "frames": 3}
    launch_interpolate(**(settings | {"steps": 1} | options))


def test_stills_that_do_not_fit_are_refused(trained: Path, still: str, tmp_path: Path) -> None:
    """Two sizes, no picture, not there."""
    other = tmp_path / "wide.png"
    Image.fromarray(np.zeros((32, 64, 3), np.uint8)).save(other)
    with pytest.raises(UserError, match="different sizes, 32x32 and 64x32"):
        interpolate(trained, still, str(other))
    other.write_text("no picture")
    for last in (str(other), str(tmp_path / "nowhere.png")):
        with pytest.raises(UserError, match=f"cannot read {last} as a picture"):
            interpolate(trained, still, last)


def test_frames_and_ending_are_refused_before_any_work(
    trained: Path, still: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--frames 4 and --out x.avi: told before the base is loaded and anything is sampled."""

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("loaded the base first")

    monkeypatch.setattr("toolkit.run.inference.load_base", never)
    with pytest.raises(UserError, match="frames is 4: .*3, 5, 9, 17"):
        interpolate(trained, still, still, frames=4)
    with pytest.raises(UserError, match=r"x\.avi: the ending must be \.mp4 or \.gif, or none for a folder"):
        interpolate(trained, still, still, out=str(tmp_path / "x.avi"))
    with pytest.raises(UserError, match="--compile is for one pair at a time.*drop --batch"):
        interpolate(trained, still, still, compile=True, batch=2)


def test_adapter_of_another_base_is_refused(trained: Path, still: str, tiny_base: Path, tmp_path: Path) -> None:
    """The values of the weights tell, whatever the folder is called; the right base is named."""
    make_tiny_base(tmp_path / tiny_base.name, seed=1)
    with pytest.raises(
        UserError, match=rf"was trained on {tiny_base}, and the weights of the base given here are others"
    ):
        interpolate(trained, still, still, base=str(tmp_path / tiny_base.name))


def test_run_without_checkpoint_is_refused(still: str, tmp_path: Path) -> None:
    """A folder that is no run."""
    with pytest.raises(UserError, match="is not a run folder"):
        interpolate(tmp_path, still, still)


@pytest.mark.launch
def test_commands_end_with_one_sentence(trained: Path, still: str, tmp_path: Path) -> None:
    """Exit code 2 and a sentence, no traceback: the real commands."""
    python, videos = sys.executable, str(tmp_path / "videos")
    Path(videos).mkdir()
    stills = ["--run", str(trained), "--first", still, "--last", still, "--out", str(tmp_path / "ab.mp4")]
    commands = {
        "no videos in": [python, "shards/pack.py", videos, str(tmp_path / "shards")],
        "unknown flag --lora_scal; did you mean --lora_scale?": [
            python, "launch/interpolate.py", *stills, "--lora_scal", "0.5",
        ],
        "unknown key lora.rnk; did you mean lora.rank?": [
            python, "launch/train.py", "--config", str(RECIPE), "--lora.rnk", "8",
        ],
        "cannot read the recipe nowhere.yaml": [python, "launch/train.py", "--config", "nowhere.yaml"],
    }  # fmt: skip
    for message, command in commands.items():
        assert message in one_sentence(run(command, timeout_s=60)), message
    assert not (tmp_path / "ab.mp4").exists() and not (tmp_path / "shards").exists()


@pytest.mark.launch
def test_every_rank_ends_when_one_refuses(mine: dict[str, Any]) -> None:
    """Two plain ranks by torchrun: each says why, none hangs, and our part of the output has no traceback."""
    done = launch("torchrun", 2, mine, timeout_s=90)
    assert done.returncode != 0 and "engine.kind plain runs one process, not 2" in done.stderr
    assert 'File "toolkit/' not in done.stderr and "/toolkit/run/" not in done.stderr
    assert not Path(mine["runs_dir"]).exists()


@pytest.mark.launch
@pytest.mark.parametrize(
    ("flag", "says"),
    [("--optimizer.lr=0.5", r"optimizer\.lr is 0\.5 there, 0\.01 on rank 0"), ("--fresh", "fresh is True there, False"),
     ("--data.shards={others}", "data_fingerprint is '.*' there, '.*' on rank 0"), ("--data.shards={same}", "")],
)  # fmt: skip
def test_ranks_that_were_started_otherwise_are_refused(
    mine: dict[str, Any], tiny_shards: Path, tmp_path: Path, flag: str, says: str
) -> None:
    """One of two machines with another rate, flag, or other clips: all say which. The same clips may lie elsewhere there."""
    same, others = (shutil.copytree(tiny_shards, tmp_path / name) for name in ("same", "others"))
    index = others / "train-000000.index.json"
    index.write_text(index.read_text().replace('"start_s": 0.0', '"start_s": 1.0'))
    flags = [f"--{name}={value}" for name, value in (mine | {"engine.kind": "zero2", "schedule.steps": 1}).items()]
    group = ["WORLD_SIZE=2", "MASTER_ADDR=127.0.0.1", f"MASTER_PORT={free_port()}"]
    ranks = [
        start(["env", *group, f"RANK={rank}", f"LOCAL_RANK={rank}", sys.executable, "launch/train.py", "--config",
               str(RECIPE), *flags, *[flag.format(same=same, others=others)] * rank])
        for rank in (0, 1)
    ]  # fmt: skip
    try:
        for process in ranks:
            stdout, stderr = process.communicate(timeout=90)
            done = subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)
            if says:
                assert re.search(f"rank 1 was started with something else than rank 0 .*{says}", one_sentence(done))
            assert (done.returncode == 2) == bool(says) == (not (Path(mine["runs_dir"]) / "mine").exists()), stderr
    finally:
        for process in ranks:
            kill_tree(process.pid)
