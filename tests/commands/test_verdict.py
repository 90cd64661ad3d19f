"""The doctor's report comes at once where it would be the same. Run: pytest tests/commands/test_verdict.py"""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.launching import HEAVY, RECIPE, TINY, run
from toolkit.commands import doctor, verdict
from toolkit.commands.verdict import MOST_FILES, stamp_files
from toolkit.config import load_config
from toolkit.errors import UserError
from toolkit.model.sources import TINY_FOLDER


def edit(file: Path) -> None:
    """Change a byte of a file whose size and time of change stay as they were."""
    before = file.stat()
    content = bytearray(file.read_bytes())
    content[10] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.launch
def test_a_second_doctor_says_the_same_without_pytorch() -> None:
    """The report of the first, in another process, which loads no library that takes seconds."""
    first = verdict.report(load_config(RECIPE, {}), 2)
    look = f"""if True:
        import runpy, sys
        sys.argv = ["launch/doctor.py", "--config", {str(RECIPE)!r}, "--ranks", "2", "--json"]
        runpy.run_path("launch/doctor.py", run_name="__main__")
        print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"""
    second = run([sys.executable, "-c", look])
    assert second.returncode == 0 and json.loads(second.stdout) == first
    assert second.stderr == "[]\n"


def test_the_doctor_looks_again_where_something_changed(
    tiny_base: Path, tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once for each number of ranks and each state of the files; a refusal is found anew each time."""
    looks: list[int] = []
    examine = doctor.examine
    monkeypatch.setattr(doctor, "examine", lambda config, ranks: looks.append(ranks) or examine(config, ranks))
    base, shards = shutil.copytree(tiny_base, tmp_path / "base"), shutil.copytree(tiny_shards, tmp_path / "shards")
    config = load_config(RECIPE, TINY | {"model.base": str(base), "data.shards": str(shards)})
    reports = [verdict.report(config, ranks) for ranks in (1, 1, 2, 1, 2)]
    assert looks == [1, 2] and reports[0] == reports[1] == reports[3] and reports[2] == reports[4]
    assert reports[0] == examine(config, 1) and reports[2] == examine(config, 2)
    edit(base / "unet/diffusion_pytorch_model.safetensors")
    for _ in range(2):
        with pytest.raises(UserError, match="cannot read"):
            verdict.report(config, 1)
    shutil.copytree(tiny_base, base, dirs_exist_ok=True)
    assert verdict.report(config, 1) == reports[0] and looks == [1, 2, 1, 1, 1]
    (shards / ".packing").touch()
    with pytest.raises(UserError, match="is not finished"):
        verdict.report(config, 1)


@pytest.mark.parametrize(
    ("field", "place", "file"),
    [
        ("model.base", "base", "base/unet/model.safetensors"),
        ("model.unet", "base/unet", "base/unet/model.safetensors"),
        ("model.unet", "base/unet/model.safetensors", "base/unet/model.safetensors"),
        ("model.unet", "base/unet/model.safetensors", "base/unet/config.json"),
        ("model.base", "linked", "base/unet/config.json"),
        ("model.controlnet", "control", "control/config.json"),
        ("lora.init_from", "run", "run/checkpoints/step_000002/adapter_config.json"),
        ("engine.deepspeed", "mine.json", "mine.json"),
        ("validation.lpips", "lpips.safetensors", "lpips.safetensors"),
        ("data.shards", "shards", "shards/a.index.json"),
    ],
)
def test_every_file_has_its_stamp(field: str, place: str, file: str, tmp_path: Path) -> None:
    """An edit that leaves size and time as they were, a new neighbour, and a loss: each makes other stamps."""
    for name in (file, "base/unet/model.safetensors", "other.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("some content")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/unet").symlink_to(tmp_path / "base/unet")
    config = load_config(RECIPE, {field: str(tmp_path / place)})
    stamps: list[Any] = [stamp_files(config)]
    assert stamps[0] and stamp_files(config) == stamps[0]
    edit(tmp_path / file)
    stamps.append(stamp_files(config))
    (tmp_path / file).with_name("new").touch()
    stamps.append(stamp_files(config))
    (tmp_path / file).rename(tmp_path / "gone")
    stamps.append(stamp_files(config))
    assert all(stamps[i] != stamps[j] for i in range(4) for j in range(i))


def test_what_no_file_can_tell_is_looked_up_each_time(tmp_path: Path) -> None:
    """A base on the hub, shards elsewhere, a link to nothing, and more files than are stamped in a moment."""
    assert stamp_files(load_config(RECIPE, {"model.base": "framer"})) is not None
    for changes in ({"model.base": "owner/name"}, {"model.unet": "owner/name"}, {"data.shards": "https://host/a.tar"}):
        assert stamp_files(load_config(RECIPE, {"data.remote": ["https"], **changes})) is None
    config = load_config(RECIPE, {"data.shards": str(tmp_path)})
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    assert stamp_files(config) is None
    (tmp_path / "link").unlink()
    for number in range(MOST_FILES - 1 - sum(1 for _ in TINY_FOLDER.rglob("*")) - 1):
        (tmp_path / str(number)).touch()
    assert len(stamp_files(config) or ()) == MOST_FILES
    (tmp_path / "one more").touch()
    assert stamp_files(config) is None
