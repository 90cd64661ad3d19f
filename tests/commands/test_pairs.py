"""A table of pairs becomes a folder of videos. Run: pytest tests/commands/test_pairs.py"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import toolkit.commands.pairs as pairs_module
from launch.interpolate import interpolate
from tests.launching import train_here
from toolkit.data.video import write_video
from toolkit.errors import UserError

SIZE_PX = 32
HOW = {"frames": 3, "steps": 1}


@pytest.fixture(scope="module")
def trained(tiny_run: dict[str, Any]) -> Path:
    """A run of one step; read only."""
    settings = {"name": "pairs", "engine.kind": "plain", "engine.micro_batch": 4, "schedule.steps": 1}
    return train_here(tiny_run | settings | {"diffusion.layout": "middle_in_clip"})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures and a film of them."""
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (SIZE_PX, SIZE_PX, 3), np.uint8) for _ in range(3)]
    (tmp_path / "deep").mkdir()
    for name, picture in zip(("a.png", "b.png", "deep/c.png"), pictures, strict=True):
        Image.fromarray(picture).save(tmp_path / name)
    write_video(tmp_path / "film.mp4", np.stack(pictures), 25)
    return tmp_path


@pytest.fixture
def fill(trained: Path, folder: Path) -> Callable[..., dict[str, bytes]]:
    """Make the videos of a table with these rows; returns what is in the folder then."""

    def make(*rows: str, header: str = "first,last,name", **flags: Any) -> dict[str, bytes]:
        (folder / "pairs.csv").write_text("\n".join([header, *rows]))
        interpolate(str(folder / "out"), run=str(trained), pairs=str(folder / "pairs.csv"), **(HOW | flags))
        return {path.name: path.read_bytes() for path in (folder / "out").iterdir()}

    return make


def alone(trained: Path, folder: Path, first: str, last: str, **flags: Any) -> bytes:
    out = folder / f"alone{len([*folder.iterdir()])}.mp4"
    interpolate(str(out), run=str(trained), first=str(folder / first), last=str(folder / last), **(HOW | flags))
    return out.read_bytes()


@pytest.mark.parametrize("flags", [{}, {"frames": 5, "batch": 2, "seed": 7, "fps": 12.0}], ids=str)
def test_each_row_is_what_it_is_alone(
    trained: Path, folder: Path, fill: Callable[..., dict[str, bytes]], flags: dict[str, Any]
) -> None:
    """To the byte, of pictures and of videos, by the name that the row gives, or that its stills have."""
    made = fill("a.png,b.png,", f"b.png,{folder}/deep/c.png,one.mp4", "film.mp4,a.png,two", **flags)
    assert made == {
        "a-b.mp4": alone(trained, folder, "a.png", "b.png", **flags),
        "one.mp4": alone(trained, folder, "b.png", "deep/c.png", **flags),
        "two.mp4": alone(trained, folder, "film.mp4", "a.png", **flags),
    }
    assert len({*made.values()}) == 3


def test_what_is_there_is_not_made_again(
    folder: Path,
    fill: Callable[..., dict[str, bytes]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The same command makes what is missing; where nothing is, it loads nothing."""
    rows = ("a.png,b.png", "b.png,a.png")
    whole = fill(*rows, header="first,last")
    (folder / "out/a-b.mp4").write_bytes(b"mine")
    (folder / "out/b-a.mp4").unlink()
    assert fill(*rows, header="first,last") == whole | {"a-b.mp4": b"mine"}
    assert "1 of 2 videos are to be made" in capsys.readouterr().out
    monkeypatch.setattr(pairs_module, "load_framer", lambda *given: 1 / 0)
    fill(*rows, header="first,last")
    assert "all 2 videos are in" in capsys.readouterr().out


def test_parts_make_all_of_them(fill: Callable[..., dict[str, bytes]]) -> None:
    """Each its own rows."""
    rows = [f"a.png,b.png,{i}" for i in range(3)]
    assert fill(*rows, part="2/2").keys() == {"1.mp4"}
    assert fill(*rows, part="1/2").keys() == {"0.mp4", "1.mp4", "2.mp4"}


def test_a_row_that_gives_no_video_costs_no_other(
    folder: Path, fill: Callable[..., dict[str, bytes]], capsys: pytest.CaptureFixture[str]
) -> None:
    """It is named, and once it is mended the same command makes it."""
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / "small.png")
    (folder / "torn.png").write_bytes((folder / "a.png").read_bytes()[:100])
    rows = ("torn.png,b.png,x", "a.png,b.png,y", "a.png,small.png,z")
    with pytest.raises(UserError, match="2 of 3 rows gave no video, for what is said above; mend these"):
        fill(*rows)
    said = capsys.readouterr().err
    assert "pairs.csv, line 2: cannot read" in said and "line 4: the stills have different sizes" in said
    assert [path.name for path in (folder / "out").iterdir()] == ["y.mp4"]
    for name in ("torn.png", "small.png"):
        (folder / name).write_bytes((folder / "a.png").read_bytes())
    assert fill(*rows).keys() == {"x.mp4", "y.mp4", "z.mp4"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a.png,b.png\n", "starts with a.png, b.png; its first line must be first,last or first,last,name"),
        ("first,last\n", "has no rows"),
        ("first,last\na.png,\n", "line 2: a pair has two stills"),
        (
            "first,last\na.png,x.png\ny.png,b.png\n",
            r"line 2: there is no .*x\.png; .*line 3: there is no .*y\.png; give",
        ),
        ("first,last\na.png,b.png\ndeep/../a.png,b.png\n", "line 3: a-b comes twice, before in .*line 2"),
        ("first,last,name\na.png,b.png,../x\n", "line 2: no video can be called '../x'"),
        ("first,last,name\na.png,b.png,.x\n", "line 2: no video can be called '.x'"),
        (f"first,last,name\na.png,b.png,{'ü' * 101}\n", "a name of 200 bytes at most"),
    ],
)
def test_slips_in_a_table(
    trained: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, content: str, message: str
) -> None:
    """Each is a sentence, before anything is loaded."""
    monkeypatch.setattr(pairs_module, "load_framer", lambda *given: 1 / 0)
    (folder / "pairs.csv").write_text(content)
    with pytest.raises(UserError, match=message):
        interpolate(str(folder / "out"), run=str(trained), pairs=str(folder / "pairs.csv"), **HOW)
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"first": "a.png", "last": "b.png"}, "are three ways to name stills; give one"),
        ({"stills": "a.png,b.png"}, "are three ways to name stills; give one"),
        ({"seed": (1, 2)}, "--pairs takes one --seed for all"),
        ({"trajectories": "x.json", "controlnet": "y"}, "no trajectories but auto"),
        ({"part": "3/2"}, "part is 3/2; give i/N"),
        ({"out": "x.mp4"}, "--out is x.mp4; for --pairs give a folder"),
        ({"pairs": None, "part": "1/2"}, "--part is for --pairs"),
    ],
)
def test_flags_that_do_not_go_with_pairs(
    trained: Path, monkeypatch: pytest.MonkeyPatch, flags: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(pairs_module, "load_framer", lambda *given: 1 / 0)
    with pytest.raises(UserError, match=message):
        interpolate(**({"out": "out", "run": str(trained), "pairs": "pairs.csv"} | HOW | flags))
