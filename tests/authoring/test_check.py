"""A check finds each fault and its place; a repair loses only what is damaged. Run: pytest tests/authoring/test_check.py"""

import gzip
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.data.hostile import clip, encode, header, members, pad, write_tar
from toolkit.authoring import check as checking
from toolkit.authoring import repair as repairing
from toolkit.authoring.check import CheckReport, Fault, check, faults_between
from toolkit.authoring.repair import repair
from toolkit.data.format import (
    ClipInfo,
    Member,
    SampleRow,
    ShardIndex,
    build_index,
    index_path,
    load_index,
    write_index,
)
from toolkit.data.index import open_shards
from toolkit.data.latents import pack_latents
from toolkit.data.tar import walk_tar
from toolkit.errors import UserError
from toolkit.parallel import Workers

ROOT = Path(__file__).resolve().parents[2]
KEYS = ("a", "b", "c")


@pytest.fixture(scope="session")
def parts() -> dict[str, list[tuple[str, bytes]]]:
    """The members of three samples."""
    return {key: members(key, clip(frames=5 + i), frames=5 + i, source=f"{key}.mp4") for i, key in enumerate(KEYS)}


@pytest.fixture
def folder(parts: dict[str, list[tuple[str, bytes]]], tmp_path: Path) -> Path:
    """Two shards, train of a and b, val of c, with their indexes; to do harm to."""
    folder = tmp_path / "shards"
    folder.mkdir()
    load_index(write_tar(folder / "train-0.tar", parts["a"] + parts["b"]))
    load_index(write_tar(folder / "val-0.tar", parts["c"]))
    return folder


def change(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def only(report: CheckReport) -> Fault:
    assert len(report.faults) == 1, report.faults
    return report.faults[0]


def keys(folder: Path) -> list[str]:
    return [row.key for tar in sorted(folder.glob("*.tar")) for row in load_index(tar).samples]


def test_whole_shards_pass_and_are_counted(folder: Path) -> None:
    """No fault, also in depth; clips and seconds are those of the indexes."""
    report = check(folder, deep=True)
    assert report.faults == [] and (report.shards, report.train, report.val) == (2, 2, 1)
    assert report.seconds == pytest.approx((5 + 6 + 7) / 25)


def test_a_damaged_member_is_named(folder: Path) -> None:
    """A flipped bit: one fault, with shard, key and the member's offset."""
    member = load_index(folder / "train-0.tar").samples[1].members["mp4"]
    data = (folder / "train-0.tar").read_bytes()
    change(folder / "train-0.tar", member.offset + 50, bytes([data[member.offset + 50] ^ 1]))
    fault = only(check(folder))
    assert (fault.shard, fault.key, fault.offset, fault.repairable) == ("train-0.tar", "b", member.offset, True)


def test_bytes_between_members_are_checked(folder: Path) -> None:
    """A change in padding is seen by the sha256, one in a header by the walk; both say so."""
    tar = folder / "train-0.tar"
    member = load_index(tar).samples[0].members["json"]
    change(tar, member.offset + member.size_bytes, b"x")
    assert "sha256" in only(check(folder)).fault
    change(tar, member.offset - 500, b"\xff")
    faults = check(folder).faults
    assert [(fault.offset, "no tar header" in fault.fault) for fault in faults] == [(member.offset - 512, True)]


def test_an_index_that_lies_is_found(folder: Path) -> None:
    """Another size than the video's, other facts than the sidecar's, an index of another tar, none without a tar."""
    path, text = index_path(folder / "val-0.tar"), index_path(folder / "val-0.tar").read_text()
    path.write_text(text.replace('"height": 48', '"height": 50'))
    assert "index says (7, 50, 64)" in only(check(folder)).fault
    path.write_text(text.replace('"source": "c.mp4"', '"source": "d.mp4"'))
    assert "other facts" in only(check(folder)).fault
    path.write_text(text.replace('"fps": 25.0', '"fps": 30.0'))
    assert "25.000 frames/s" in only(check(folder)).fault
    path.write_text(text[:100])
    assert "is not a shard index" in only(check(folder)).fault
    path.write_text(text)
    (folder / "val-0.tar").unlink()
    assert only(check(folder)).fault == "the tar is gone, but its index is there"


def test_a_shard_that_is_gone_is_named(packed: Path, tmp_path: Path) -> None:
    """By its index, or by the record of the packing; a repair lists each of its clips, or the shard, and is not whole."""
    folder = Path(shutil.copytree(packed, tmp_path / "shards"))
    assert repair(folder, tmp_path / "all").is_whole
    first, second = sorted(folder.glob("train-*.tar"))[:2]
    places = [(row.key, row.members["mp4"].offset) for row in load_index(first).samples]
    for tar in (first, second, index_path(second)):
        tar.unlink()
    faults = check(folder).faults
    assert [(fault.shard, fault.fault.split(", but ")[1]) for fault in faults] == [
        (first.name, "its index is there"), (second.name, "pack.json lists it"),
    ]  # fmt: skip
    report = repair(folder, tmp_path / "out")
    assert [(fault.shard, fault.key, fault.offset) for fault in report.lost] == [
        *((first.name, *place) for place in places), (second.name, None, None),
    ]  # fmt: skip
    assert report.faults == [] and not report.is_whole and places


def test_faults_between_shards(folder: Path, parts: dict[str, list[tuple[str, bytes]]]) -> None:
    """A key that is there twice and a video with clips in train and in val are named, and cannot be repaired."""
    write_tar(folder / "train-1.tar", parts["a"])
    write_tar(folder / "train-2.tar", members("d", clip(7), frames=7, source="c.mp4"))
    faults = check(folder).faults
    assert [(fault.shard, fault.key, fault.repairable) for fault in faults] == [
        ("train-1.tar", "a", False), ("val-0.tar", "c", False),
    ]  # fmt: skip
    assert "train-0.tar has that key too" in faults[0].fault and "of c.mp4 is in train too" in faults[1].fault


def test_parts_of_one_video_may_be_in_train_and_val_where_they_share_no_frame(folder: Path) -> None:
    """Of a video at 25 fps frames 0 to 19, 30 to 39, and 31 to 33 again are trained on; what is held out may touch none."""
    for number, (first, frames) in enumerate(((30, 10), (0, 10), (10, 10), (31, 3))):
        fields = {"frames": frames, "fps": 25.0, "source": "long.mp4", "start_s": first / 25}
        write_tar(folder / f"train-{number + 1}.tar", members(f"t{number}", clip(frames), **fields))
    for first, frames, is_shared in (
        (20, 10, False),
        (40, 5, False),
        (19, 5, True),
        (22, 9, True),
        (25, 20, True),
        (3, 4, True),
        (36, 4, True),
    ):
        fields = {"frames": frames, "fps": 25.0, "source": "long.mp4", "start_s": first / 25}
        for leftover in folder.glob("val-1*"):
            leftover.unlink()
        write_tar(folder / "val-1.tar", members("v", clip(frames), **fields))
        named = {(fault.shard, fault.key) for fault in check(folder).faults}
        assert named == ({("val-1.tar", "v")} if is_shared else set()), first


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 30), st.integers(1, 12)), max_size=8))
def test_each_clip_that_is_trained_on_too_is_named_once(spans: list[tuple[bool, int, int]]) -> None:
    """Wherever clips of a video lie: those held out that share a frame with one to train on, and no other."""
    indexes, shared = {}, set()
    for number, (is_val, first, frames) in enumerate(spans):
        info = ClipInfo(fps=25, frames=frames, height=8, width=8, source="long.mp4", start_s=first / 25)
        row = SampleRow(key=str(number), members={"mp4": Member(offset=512, size_bytes=1, crc32=0)}, clip=info)
        index = ShardIndex(format_version=1, tar_sha256="", tar_size_bytes=2048, samples=(row,))
        indexes[Path(f"{'val' if is_val else 'train'}-{number}.tar")] = index
        if is_val and any(
            not other and begin < first + frames and first < begin + length for other, begin, length in spans
        ):
            shared.add(str(number))
    named = [fault.key for fault in faults_between(indexes)]
    assert sorted(named) == sorted(shared)


@pytest.mark.parametrize("name", [".packing", ".publishing", ".caching"])
def test_an_unfinished_folder_is_named(folder: Path, name: str) -> None:
    """What a killed command left is a fault with its remedy."""
    (folder / name).mkdir()
    fault = only(check(folder))
    assert fault.shard == name and "run the same python shards/" in fault.fault and not fault.repairable


def test_deep_decodes_every_frame(folder: Path) -> None:
    """A frame that does not decode, behind a good first one, is found in depth only."""
    video = bytearray(clip(frames=30))
    at = video.index(b"mdat") + len(video) // 2
    video[at : at + 200] = bytes(200)
    write_tar(folder / "train-1.tar", members("d", bytes(video), frames=30))
    assert check(folder).faults == []
    fault = only(check(folder, deep=True))
    assert (fault.shard, fault.key) == ("train-1.tar", "d")


@pytest.mark.parametrize("name, value", [("std", -1.0), ("mean", float("nan")), ("tokens", float("inf"))])
def test_deep_reads_every_number(tmp_path: Path, name: str, value: float) -> None:
    """A cached clip with a number that no encoder makes is found in depth."""
    tensors = {"mean": torch.zeros(1, 5, 4, 6, 8), "std": torch.ones(1, 5, 4, 6, 8), "tokens": torch.zeros(1, 5, 8)}
    sidecar = members("a", b"")[1]
    write_tar(tmp_path / "x.tar", [("a.safetensors", pack_latents(*tensors.values())), sidecar])
    assert check(tmp_path, deep=True).faults == []
    tensors[name].flatten()[-1] = value
    index_path(tmp_path / "x.tar").unlink()
    write_tar(tmp_path / "x.tar", [("a.safetensors", pack_latents(*tensors.values())), sidecar])
    assert check(tmp_path).faults == []
    assert name in only(check(tmp_path, deep=True)).fault


def test_processes_find_what_one_finds(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spread over processes, the report is the same."""
    (folder / "val-0.tar").write_bytes((folder / "val-0.tar").read_bytes()[:3000])
    alone = check(folder)
    monkeypatch.setattr(checking, "_POOL_BYTES", 0)
    assert check(folder) == alone and alone.faults


def test_command_line(folder: Path, tmp_path: Path) -> None:
    """stdout is one JSON object and nothing else; exit code 1 with faults or losses, 2 for a user's mistake."""
    change(folder / "train-0.tar", 600, b"damage")
    run = [sys.executable, ROOT / "shards/check.py", folder, "--json"]
    found = subprocess.run(run, capture_output=True, text=True)
    report = json.loads(found.stdout)
    assert found.returncode == 1
    assert list(report) == ["clips", "shards", "train", "val", "seconds", "faults"]
    assert report["faults"][0].keys() == {"shard", "key", "offset", "fault", "repairable"}
    repaired = subprocess.run([*run, "--deep", "--repair", tmp_path / "out"], capture_output=True, text=True)
    assert repaired.returncode == 1, repaired.stderr
    report = json.loads(repaired.stdout)
    assert report["faults"] == [] and [fault["key"] for fault in report["lost"]] == ["a"]
    run[2] = tmp_path / "out"
    assert subprocess.run(run, capture_output=True).returncode == 0
    refused = subprocess.run([*run, "--repair", run[2] / "in"], capture_output=True, text=True)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1, refused.stderr


def test_repair_of_whole_shards_is_a_link(folder: Path, tmp_path: Path) -> None:
    """Nothing is lost, the tars are the same files, the indexes the same bytes, and the originals are as they were."""
    before = contents(folder)
    report = repair(folder, tmp_path / "out")
    assert report.lost == report.faults == [] and contents(tmp_path / "out") == before == contents(folder)
    assert os.path.samefile(folder / "val-0.tar", tmp_path / "out/val-0.tar")


def test_a_missing_or_broken_index_is_made_anew(folder: Path, tmp_path: Path) -> None:
    """The tars are kept as they are, the originals are not indexed, and a stray index is left out, and named."""
    whole = contents(folder)
    index_path(folder / "train-0.tar").unlink()
    index_path(folder / "val-0.tar").write_text("{")
    (folder / "gone.index.json").write_text("{}")
    before = contents(folder)
    report = repair(folder, tmp_path / "out")
    assert [fault.shard for fault in report.lost] == ["gone.tar"] and report.faults == []
    assert contents(tmp_path / "out") == whole and contents(folder) == before


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_is_left_of_a_lone_sample_is_no_sample(folder: Path, tmp_path: Path) -> None:
    """Facts without their video are not kept."""
    change(folder / "val-0.tar", 0, b"\xff" * 50)
    index_path(folder / "val-0.tar").unlink()
    report = repair(folder, tmp_path / "out")
    assert report.faults == [] and keys(tmp_path / "out") == ["a", "b"] and report.lost[0].key == "c"


@pytest.mark.parametrize("indexed", [True, False])
def test_samples_behind_a_damaged_header_are_saved(folder: Path, tmp_path: Path, indexed: bool) -> None:
    """By the next header that is one; with an index, the sample whose header it was, too."""
    tar = folder / "train-0.tar"
    change(tar, load_index(tar).samples[0].members["mp4"].offset - 400, b"\xff" * 50)
    if not indexed:
        index_path(tar).unlink()
    report = repair(folder, tmp_path / "out")
    assert report.faults == [] and keys(tmp_path / "out") == (["a", "b", "c"] if indexed else ["b", "c"])
    assert [fault.key for fault in report.lost] == ([] if indexed else ["a"])


def test_only_what_is_damaged_is_lost(folder: Path, parts: dict[str, list[tuple[str, bytes]]], tmp_path: Path) -> None:
    """Foreign members go, members that are apart come together, a double and a lying sidecar are left out and named."""
    a, b, c = (parts[key] for key in KEYS)
    link = header("link.mp4", 0, tarfile.SYMTYPE)
    lying = members("d", clip(5), frames=9)
    body = b"".join(
        header(name, len(data)) + pad(data) for name, data in [a[0], *b, a[1], ("b.pkl", b"x"), *lying, b[0]]
    )
    (folder / "train-0.tar").write_bytes(link + body + bytes(1024))
    index_path(folder / "train-0.tar").unlink()
    report = repair(folder, tmp_path / "out")
    assert report.faults == [] and keys(tmp_path / "out") == ["a", "b", "c"]
    assert sorted((fault.key, fault.offset is not None) for fault in report.lost) == [
        ("b", True), ("b", True), ("d", True), ("link", True),
    ]  # fmt: skip
    assert write_tar(tmp_path / "same.tar", a + b).read_bytes() == (tmp_path / "out/train-0.tar").read_bytes()


def test_an_index_of_another_tar_damages_nothing(
    folder: Path, parts: dict[str, list[tuple[str, bytes]]], tmp_path: Path
) -> None:
    """A tar that was written anew beside its old index keeps all of its samples."""
    write_tar(folder / "train-0.tar", members("e", clip(9), frames=9) + parts["a"] + parts["b"])
    report = repair(folder, tmp_path / "out")
    assert report.lost == report.faults == [] and keys(tmp_path / "out") == ["e", "a", "b", "c"]
    os.truncate(folder / "train-0.tar", [*walk_tar(folder / "train-0.tar")][-1].end)  # its end blocks are gone
    assert repair(folder, tmp_path / "again").lost == [] and keys(tmp_path / "again") == ["e", "a", "b", "c"]


def test_a_sample_that_lost_its_facts_is_no_sample(folder: Path, tmp_path: Path) -> None:
    """Without an index, a cut between a video and its facts loses both: its source and caption are gone."""
    tar = folder / "train-0.tar"
    os.truncate(tar, load_index(tar).samples[1].members["json"].offset - 512)
    index_path(tar).unlink()
    report = repair(folder, tmp_path / "out")
    assert report.faults == [] and keys(tmp_path / "out") == ["a", "c"]
    assert [(fault.key, fault.fault) for fault in report.lost] == [("b", "its json is gone")]


def test_what_a_repair_cannot_mend_is_told(
    folder: Path, tmp_path: Path, parts: dict[str, list[tuple[str, bytes]]]
) -> None:
    """The copy is checked, and a fault between shards is still one in it."""
    load_index(write_tar(folder / "train-1.tar", parts["a"]))
    report = repair(folder, tmp_path / "out")
    assert report.lost == [] and [fault.key for fault in report.faults] == ["a"]


def test_a_shard_without_a_whole_sample_is_left_out(folder: Path, tmp_path: Path) -> None:
    """It is named, and the rest is repaired; a folder of such shards becomes an empty one."""
    (folder / "train-0.tar").write_bytes(b"no tar at all" * 100)
    report = repair(folder, tmp_path / "out")
    assert report.faults == [] and keys(tmp_path / "out") == ["c"]
    assert {fault.key for fault in report.lost} == {"a", "b", None}


def test_an_interrupted_repair_is_begun_anew(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a stopped repair left does not come into the next; a taken folder is refused."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(repairing, "check", lambda *_: stop())
        repair(folder, tmp_path / "out")
    (tmp_path / ".out.repairing/train-9.tar").write_bytes(b"half")
    assert repair(folder, tmp_path / "out").faults == [] and keys(tmp_path / "out") == ["a", "b", "c"]
    with pytest.raises(UserError, match="give a new folder"):
        repair(folder, tmp_path / "out")


def stop() -> CheckReport:
    raise KeyboardInterrupt


@pytest.mark.parametrize("where", ["it", "in it", "beside it", "linked"])
def test_a_repair_removes_nothing_but_its_own(folder: Path, tmp_path: Path, where: str) -> None:
    """A folder under the name a repair works under is not taken for its own: not the input, nor another, nor a link."""
    aside = tmp_path / ".out.repairing"
    if where == "linked":
        aside.symlink_to(folder)
    else:
        aside.mkdir()
        (aside / "thesis.tex").write_text("x")
    if where != "beside it":
        (aside / ".repairing").touch()  # not even where it looks like one that was stopped
    shards = {"it": aside, "in it": aside / "shards"}.get(where, folder)
    if shards != folder:
        shutil.copytree(folder, shards, dirs_exist_ok=True)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=r"\.out\.repairing, which is there already; give another name"):
        repair(shards, tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_that_is_not_finished_is_not_repaired(folder: Path, tmp_path: Path) -> None:
    """Its copy would pass for whole; it is refused as a run refuses it."""
    (folder / ".publishing").mkdir()
    with pytest.raises(UserError, match="holds .publishing; run the same python shards/pack.py"):
        repair(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.repairing").exists()


def put(path: Path, kind: str) -> None:
    """Something under the name of a file that is none."""
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("nothing")


@pytest.mark.parametrize("kind", ["pipe", "folder", "link"])
def test_what_is_no_file_is_no_shard(folder: Path, tmp_path: Path, kind: str) -> None:
    """A run refuses it, a check names it, a repair leaves it out: none waits for it."""
    put(folder / "train-9.tar", kind)
    assert "train-9.tar is no regular file" in only(check(folder)).fault
    with pytest.raises(UserError, match="train-9.tar is no regular file"):
        open_shards(folder, "train")
    report = repair(folder, tmp_path / "out")
    assert report.faults == [] and [fault.shard for fault in report.lost] == ["train-9.tar"]
    assert keys(tmp_path / "out") == ["a", "b", "c"]


@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_what_is_no_file_is_no_index(folder: Path, kind: str) -> None:
    """It is named, and the shard checked without it."""
    index_path(folder / "val-0.tar").unlink()
    put(index_path(folder / "val-0.tar"), kind)
    assert "val-0.index.json is no regular file" in only(check(folder)).fault
    with pytest.raises(UserError, match="val-0.index.json is no regular file, .*; delete"):
        open_shards(folder, "val")


def test_a_disk_that_fails_is_a_fault_of_its_shard(folder: Path, tmp_path: Path) -> None:
    """The others are checked, and saved, all the same."""
    (folder / "train-9.tar").symlink_to("/proc/self/mem")  # a regular file whose reading fails
    shutil.copy(index_path(folder / "train-0.tar"), index_path(folder / "train-9.tar"))
    report = check(folder)
    assert {fault.shard for fault in report.faults} == {"train-9.tar"}
    assert any("Input/output error" in fault.fault for fault in report.faults)
    report = repair(folder, tmp_path / "out")
    assert {fault.shard for fault in report.lost} == {"train-9.tar"} and keys(tmp_path / "out") == ["a", "b", "c"]


def test_what_is_printed_is_printable(folder: Path, parts: dict[str, list[tuple[str, bytes]]], tmp_path: Path) -> None:
    """Names that command a terminal, or are no text at all, are printed escaped, and stand in the JSON as they are."""
    shard = folder / os.fsdecode(b"\xff\x1b[31m.tar")
    write_tar(shard, [("\x1b]0;owned\x07b.mp4", b"x"), ("\udc80.mp4", b"x"), *parts["a"]])
    report = check(folder)
    reports = [(report, report.faults), ((repaired := repair(folder, tmp_path / "out")), repaired.lost)]
    for said, faults in reports:
        lines = said.summary().encode().decode().splitlines()
        assert len(faults) > 1 and all(line.isprintable() for line in lines), lines
        assert faults[0].shard == shard.name and json.loads(json.dumps(said.as_dict())) == said.as_dict()


def test_a_shard_is_no_folder(folder: Path) -> None:
    """Named in place of its folder, it is said to be a file."""
    with pytest.raises(UserError, match=r"val-0.tar is a file; give the folder that holds the shards"):
        check(folder / "val-0.tar")


def test_a_compressed_tar_is_named_as_such(folder: Path, tmp_path: Path) -> None:
    """By a check as well as by a run; a repair of it alone keeps nothing, and says so."""
    (folder / "train-0.tar").write_bytes(gzip.compress((folder / "train-0.tar").read_bytes()))
    index_path(folder / "train-0.tar").unlink()
    (folder / "val-0.tar").unlink()
    index_path(folder / "val-0.tar").unlink()
    assert "compressed with gzip" in only(check(folder)).fault
    with pytest.raises(UserError, match="compressed with gzip"):
        open_shards(folder, "train")
    report = repair(folder, tmp_path / "out")
    assert report.lost and not report.is_whole and not list(report.out.glob("*.tar"))


def test_a_killed_process_is_a_sentence() -> None:
    """It says what the command that asked can do."""
    with pytest.raises(UserError, match="a process was killed, .*; more memory$"), Workers(2, "more memory") as workers:
        list(workers.run(os._exit, [1, 1]))


def test_samples_need_not_be_alike(folder: Path, parts: dict[str, list[tuple[str, bytes]]], tmp_path: Path) -> None:
    """Where damage lies elsewhere, a video without facts is a whole sample, and so is one in another container."""
    a, b, c = (parts[key] for key in KEYS)
    webm = members("w", encode("libvpx-vp9", "webm", [(48, 64)]), "webm", frames=3)
    tar = write_tar(folder / "train-0.tar", [*a, *webm, *b, c[0]])
    index_path(folder / "val-0.tar").unlink()
    (folder / "val-0.tar").unlink()
    index_path(tar).unlink()
    change(tar, 0, b"\xff" * 100)  # the header of a's video
    report = repair(folder, tmp_path / "out")
    assert report.faults == [] and keys(tmp_path / "out") == ["w", "b", "c"]
    assert [fault.key for fault in report.lost] == ["a"]


def test_links_are_followed(folder: Path, tmp_path: Path) -> None:
    """The hub's folders hold links to its files: what a repair makes holds files."""
    (tmp_path / "snapshot").mkdir()
    for path in folder.iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(os.path.relpath(path, tmp_path / "snapshot"))
    report = repair(tmp_path / "snapshot", tmp_path / "out")
    assert report.is_whole and not any(path.is_symlink() for path in report.out.iterdir())
    assert contents(report.out) == contents(folder)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield tmp_path_factory.mktemp("scratch")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_ends_in_a_sound_copy(
    data: st.DataObject, parts: dict[str, list[tuple[str, bytes]]], scratch: Path
) -> None:
    """Whatever bytes are overwritten, wherever it is cut, indexed or not: 0 faults in the copy, samples as they were."""
    folder = scratch / "shards"
    for path in (folder, scratch / "out", scratch / "again"):
        shutil.rmtree(path, ignore_errors=True)
    folder.mkdir()
    tar = write_tar(folder / "x.tar", [part for key in KEYS for part in parts[key]])
    whole = load_index(tar)
    if data.draw(st.booleans(), "index is lost"):
        index_path(tar).unlink()
    size_bytes = tar.stat().st_size
    for _ in range(data.draw(st.integers(0, 3), "hits")):
        offset = data.draw(st.one_of(st.integers(0, size_bytes), st.sampled_from(headers(tar, size_bytes))))
        change(tar, min(offset, size_bytes - 1), data.draw(st.binary(min_size=1, max_size=600)))
    os.truncate(tar, data.draw(st.integers(0, size_bytes), "cut"))
    before = contents(folder)
    report = repair(folder, scratch / "out")
    assert report.faults == [] and contents(folder) == before
    repair(folder, scratch / "again")
    assert contents(scratch / "again") == contents(scratch / "out")
    if index_path(tar).exists():  # then no byte can have changed unseen
        sums = {(row.key, ext): m.crc32 for row in whole.samples for ext, m in row.members.items()}
        saved = [row for path in (scratch / "out").glob("*.tar") for row in load_index(path).samples]
        assert all(sums[row.key, ext] == m.crc32 for row in saved for ext, m in row.members.items())
        assert {row.key for row in saved} | {fault.key for fault in report.lost} >= set(KEYS)


def headers(tar: Path, size_bytes: int) -> list[int]:
    try:
        return [entry.header_offset for entry in walk_tar(tar)]
    except ValueError:
        return [0, size_bytes - 1]


def test_real_videos_check_in_depth(real_videos: Path, tmp_path: Path) -> None:
    """Shards of real videos, cut and flipped, are repaired to their whole samples."""
    parts = []
    for path in sorted((real_videos / "asl").glob("*.mkv"))[:4]:
        parts.append((f"{path.stem}.mkv", path.read_bytes()))
    tar = write_tar(tmp_path / "x.tar", parts)
    assert check(tmp_path, deep=True).faults == []
    rows = load_index(tar).samples
    os.truncate(tar, rows[3].members["mkv"].offset + 5000)
    change(tar, rows[1].members["mkv"].offset + 5000, b"damage")
    report = repair(tmp_path, tmp_path.with_name("real_out"))
    assert report.faults == [] and keys(report.out) == [rows[0].key, rows[2].key]


def test_write_index_is_what_build_index_finds(folder: Path) -> None:
    """An index that is built anew is the one that was there, byte for byte."""
    path = index_path(folder / "val-0.tar")
    text = path.read_text()
    write_index(folder / "val-0.tar", build_index(folder / "val-0.tar"))
    assert path.read_text() == text
