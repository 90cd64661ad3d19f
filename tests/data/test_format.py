"""Tars are read by offset, checked, and only if harmless. Run: pytest tests/data/test_format.py"""

import io
import json
import shutil
import subprocess
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import webdataset

from tests.data.conftest import encode, frame_numbers, numbered_frames
from tests.data.test_index import make_cached
from toolkit.authoring.check import check
from toolkit.data import format
from toolkit.data.format import (
    BadSample,
    build_index,
    fingerprint,
    index_path,
    load_index,
    read_member,
    scan_tar,
)
from toolkit.data.index import open_shards
from toolkit.data.video import read_frames
from toolkit.errors import UserError

FACTS = {"fps": 25, "frames": 4, "height": 48, "width": 64}


def make_tar(path: Path, members: list[tuple[str, bytes]], mode: Literal["w", "w:gz"] = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def sample(key: str) -> list[tuple[str, bytes]]:
    return [(f"{key}.mp4", b"video of " + key.encode()), (f"{key}.json", json.dumps(FACTS).encode())]


def test_stock_webdataset_reads_ours(packed: Path) -> None:
    """webdataset yields the same keys and bytes as our index, in the same order."""
    index = open_shards(packed, "train")
    urls = sorted(str(path) for path in packed.glob("train-*.tar"))
    stock = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [row["__key__"] for row in stock] == [row.key for row in index.rows]
    for i, row in enumerate(stock):
        assert row["mp4"] == index.read(i, "mp4")
        assert json.loads(row["json"])["frames"] == index.rows[i].clip.frames


def test_we_read_stock_webdataset(tmp_path: Path) -> None:
    """A shard by webdataset's TarWriter, without our fields, is indexed at first sight by probing its videos."""
    with webdataset.TarWriter(str(tmp_path / "000.tar")) as writer:
        for i in range(3):
            video = encode(numbered_frames(range(10 + i)), fps=10)
            writer.write({"__key__": f"s{i}", "mp4": video, "json": {"caption": f"word {i}"}})
    index = open_shards(tmp_path, "train")
    assert index_path(tmp_path / "000.tar").exists()
    assert [(row.clip.frames, row.clip.fps, row.clip.height, row.clip.width) for row in index.rows] == [
        (10 + i, 10.0, 48, 64) for i in range(3)
    ]
    assert index.rows[1].clip.caption == "word 1"
    assert frame_numbers(read_frames(index.read(2, "mp4"))) == list(range(12))


@pytest.mark.parametrize("form", ["gnu", "pax", "ustar"])
@pytest.mark.parametrize("whole", [True, False])
def test_we_read_plain_tar(tmp_path: Path, form: str, whole: bool) -> None:
    """A folder put together by `tar` reads as it is: any format, whole with its ./ names and folders, or by its files."""
    folder = tmp_path / "clips"
    (folder / "sub").mkdir(parents=True)
    long = "n" * 90  # over the 100 bytes of a plain header, together with its folder
    for name, frames in (("a", 7), ("b", 8), (f"sub/{'' if form == 'ustar' else 'x' * 60}{long}", 9)):
        (folder / f"{name}.mp4").write_bytes(encode(numbered_frames(range(frames))))
        (folder / f"{name}.json").write_text('{"caption": "sign"}')
    files = ["."] if whole else sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*"))
    subprocess.run(
        ["tar", f"--format={form}", "--sort=name", "-cf", tmp_path / "plain.tar", "-C", folder, *files], check=True
    )
    rows = open_shards(tmp_path, "train").rows
    stock = webdataset.WebDataset(str(tmp_path / "plain.tar"), shardshuffle=False)
    assert [row.clip.frames for row in rows] == [7, 8, 9] and rows[0].key == ("./a" if whole else "a")
    assert [row.key for row in rows] == [sample["__key__"] for sample in stock]
    assert check(tmp_path).faults == []


def test_we_read_a_stock_shard_writer(tmp_path: Path) -> None:
    """Shards by webdataset's ShardWriter, which starts another when one is full, are read in its order."""
    pattern = str(tmp_path / "train-%06d.tar")
    with webdataset.ShardWriter(pattern, maxcount=2, verbose=0) as writer:
        for i in range(5):
            writer.write({"__key__": f"s{i}", "mp4": encode(numbered_frames(range(5 + i))), "json": {"fps": 25}})
    index = open_shards(tmp_path, "train")
    assert [row.clip.frames for row in index.rows] == [5, 6, 7, 8, 9] and index.shard_sizes == (2, 2, 1)
    assert check(tmp_path).faults == []


def test_index_round_trip_and_checksum(tmp_path: Path) -> None:
    """A written index reads back equal; its rows locate and verify each member; a flipped bit is a BadSample."""
    tar = make_tar(tmp_path / "x.tar", sample("a") + sample("b"))
    index = load_index(tar)
    assert load_index(tar) == index == build_index(tar)
    member = index.samples[1].members["mp4"]
    assert read_member(tar, index.samples[1], "mp4") == b"video of b"
    assert member.crc32 == zlib.crc32(b"video of b")
    data = bytearray(tar.read_bytes())
    data[member.offset] ^= 1
    tar.write_bytes(data)
    assert read_member(tar, index.samples[0], "mp4") == b"video of a"
    with pytest.raises(BadSample, match=f"b.mp4 at offset {member.offset}: checksum"):
        read_member(tar, index.samples[1], "mp4")


@pytest.mark.parametrize(
    "name", ["/etc/a.json", "../a.json", "x/../../a.json", "a.pyd", "a.pkl", "a.pth", "a.mp4.gz", "a"]
)
def test_hostile_names_are_refused(tmp_path: Path, name: str) -> None:
    """Absolute or climbing names and extensions outside the list are refused by name."""
    tar = make_tar(tmp_path / "x.tar", [(name, b"{}")])
    with pytest.raises(UserError, match="is refused"):
        build_index(tar)


def test_a_refused_name_says_what_to_do(tmp_path: Path) -> None:
    """Foreign members are left out by a repair, which the sentence names; a camera's capitals are to be changed."""
    for name, said in (
        ("a.cls", r"extension 'cls'; allowed are mp4, .*check.py .* --repair OUT"),
        ("a.MP4", r"extension 'MP4'; name it 'mp4'"),
    ):
        with pytest.raises(UserError, match=said):
            build_index(make_tar(tmp_path / "x.tar", [(name, b"x")]))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_only_regular_members(tmp_path: Path, kind: bytes) -> None:
    """Links, devices and pipes are refused."""
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        info = tarfile.TarInfo("a.mp4")
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(UserError, match="not a regular file"):
        build_index(tmp_path / "x.tar")


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    """A compressed tar and a file that is no tar are told apart from a damaged one, with the remedy."""
    packed = make_tar(tmp_path / "gz.tar", sample("a"), "w:gz")
    text = tmp_path / "text.tar"
    text.write_text("hello" * 400)
    for path in (packed, text):
        with pytest.raises(UserError, match="uncompressed tars"):
            build_index(path)


def test_key_rules(tmp_path: Path) -> None:
    """Members of one key must be adjacent and different; a sample without a video or facts cannot be indexed."""
    a, b = sample("a"), sample("b")
    cases = {
        "not adjacent": [a[0], b[0], b[1], a[1]],
        "there twice": [a[0], a[0]],
        "sample a cannot be indexed": [("a.txt", b"x")],
        "field fps": [("a.safetensors", b"x"), ("a.json", b"{}")],
        "field frames": [a[0], ("a.json", json.dumps(FACTS | {"frames": -1}).encode())],
        "not an object": [a[0], ("a.json", b"[]")],
    }
    for i, (message, members) in enumerate(cases.items()):
        with pytest.raises(UserError, match=message):
            build_index(make_tar(tmp_path / f"{i}.tar", members))


def test_every_cut_and_damaged_header_is_found(tmp_path: Path) -> None:
    """Cutting the tar at any block, or breaking any header, is an error: webdataset drops the rest in silence."""
    whole = make_tar(tmp_path / "x.tar", sample("a") + sample("b"), "w")
    data = whole.read_bytes()
    end = max(member.offset + member.size_bytes for _, member in scan_tar(whole))
    damaged = tmp_path / "damaged.tar"
    for size in range(0, -(-end // 512) * 512 + 1024, 512):
        damaged.write_bytes(data[:size])
        with pytest.raises(UserError):
            build_index(damaged)
    headers = [member.offset - 512 for _, member in scan_tar(whole)]
    for offset in headers:
        for at in (0, 124, 148):  # name, size, checksum
            flipped = bytearray(data)
            flipped[offset + at] ^= 1
            damaged.write_bytes(flipped)
            with pytest.raises(UserError):
                build_index(damaged)
        damaged.write_bytes(data[:offset] + bytes(512) + data[offset + 512 :])
        with pytest.raises(UserError):
            build_index(damaged)


def test_stale_or_foreign_index_is_refused(tmp_path: Path) -> None:
    """An index for another size, another version, or torn, says which file to delete."""
    tar = make_tar(tmp_path / "x.tar", sample("a"))
    good = load_index(tar).model_dump_json()
    path = index_path(tar)
    for text in (good[:40], good.replace('"format_version":1', '"format_version":9')):
        path.write_text(text)
        with pytest.raises(UserError, match="x.index.json"):
            load_index(tar)
    path.write_text(good)
    make_tar(tar, sample("a") + [(f"b{i}.mp4", bytes(9000)) for i in range(3)])
    with pytest.raises(UserError, match="delete .*x.index.json"):
        load_index(tar)


@pytest.mark.parametrize(
    ("said", "change"),
    [
        ("'a' has no members", lambda row: row.update(members={})),
        ("is an absolute or climbing name", lambda row: row.update(key="../a")),
        ("is an absolute or climbing name", lambda row: row.update(key="/a")),
        (r"'\\x1b\[2Ja' is a name with control", lambda row: row.update(key="\x1b[2Ja")),
        ("is no key", lambda row: row.update(key="a.b")),
        ("greater than or equal to 0.01", lambda row: row["clip"].update(fps=5e-324)),
    ],
)  # fmt: skip
def test_an_index_names_what_a_tar_may_hold(
    tmp_path: Path, said: str, change: Callable[[dict[str, Any]], None]
) -> None:
    """By the rules for the names in a tar; a sample without members, or an endless clip, is none."""
    tar = make_tar(tmp_path / "x.tar", sample("a"))
    load_index(tar)
    tree = json.loads(index_path(tar).read_text())
    change(tree["samples"][0])
    index_path(tar).write_text(json.dumps(tree))
    with pytest.raises(UserError, match=f"{said}.*; delete .*x.index.json"):
        load_index(tar)


def test_cached_frames_are_the_clips(tmp_path: Path) -> None:
    """An index that says more frames of a clip than its latents have would be read beyond them."""
    tar = make_cached(tmp_path / "cached") / "train-000000.tar"
    load_index(tar)
    tree = json.loads(index_path(tar).read_text())
    tree["samples"][0]["clip"]["frames"] = 9
    index_path(tar).write_text(json.dumps(tree))
    with pytest.raises(UserError, match="safetensors holds other tensors"):
        load_index(tar)


def test_an_index_that_none_would_read_is_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound on reading is the bound on making."""
    tar = make_tar(tmp_path / "x.tar", sample("a") + sample("b"))
    load_index(tar)
    size_bytes = index_path(tar).stat().st_size
    monkeypatch.setattr(format, "MAX_INDEX_BYTES", size_bytes)
    load_index(tar)
    build_index(tar)
    monkeypatch.setattr(format, "MAX_INDEX_BYTES", size_bytes - 1)
    with pytest.raises(UserError, match=f"has over {size_bytes - 1} bytes; delete"):
        load_index(tar)
    with pytest.raises(UserError, match=f"would have {size_bytes} bytes, .*pack smaller shards"):
        build_index(tar)


def test_fingerprint_is_of_content_in_order(tmp_path: Path) -> None:
    """Another name keeps the fingerprint; another order, which a run would follow, content, or rows change it."""
    a = load_index(make_tar(tmp_path / "a.tar", sample("a")))
    b = load_index(make_tar(tmp_path / "b.tar", sample("b")))
    renamed = load_index(Path(shutil.copy(tmp_path / "a.tar", tmp_path / "c.tar")))
    assert fingerprint([a, b]) == fingerprint([renamed, b])
    less, caption = a.model_copy(update={"samples": ()}), a.samples[0].clip.model_copy(update={"caption": "sign"})
    other = a.model_copy(update={"samples": (a.samples[0].model_copy(update={"clip": caption}),)})
    datasets = ([a, b], [b, a], [a], [b], [less, b], [other, b])
    assert len({fingerprint(indexes) for indexes in datasets}) == len(datasets)


def test_split_is_in_the_names(packed: Path, tmp_path: Path) -> None:
    """val reads val-*.tar, train all others; missing folders, shards and splits say what to do."""
    train, val = open_shards(packed, "train"), open_shards(packed, "val")
    assert {path.name[:4] for path in val.shards} == {"val-"} and {path.name[:6] for path in train.shards} == {"train-"}
    assert len(train) == sum(train.shard_sizes) and len(train.shard_sizes) > 4
    assert train.fingerprint != val.fingerprint
    with pytest.raises(UserError, match="there is no folder"):
        open_shards(tmp_path / "none", "train")
    with pytest.raises(UserError, match=r"python shards/pack.py VIDEOS"):
        open_shards(tmp_path, "train")
    make_tar(tmp_path / "x.tar", [])
    with pytest.raises(UserError, match="no val shards"):
        open_shards(tmp_path, "val")
    with pytest.raises(UserError, match="holds no samples"):
        open_shards(tmp_path, "train")
