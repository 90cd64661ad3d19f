"""Bounds before decoding, one view of a tar, no code that executes what it reads. Run: pytest tests/data/test_security.py

The corpus of hostile files is tests/data/hostile.py; tests/faults/test_shards.py reads all of it, with a limit on memory.
"""

import ast
import io
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from tests.data.hostile import box, clip, encode, header, members, pad, pax, record, write_tar
from toolkit.authoring.plan import PackSettings, fit
from toolkit.data import video
from toolkit.data.boxes import claimed_samples
from toolkit.data.tar import TarFault, find_header, walk_tar
from toolkit.data.video import MAX_MEMBER_PIXELS, VideoError, read_frames

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(path for folder in ("toolkit", "launch", "shards") for path in (ROOT / folder).rglob("*.py"))
CALLS = {"eval", "exec", "os.system", "os.popen", "torch.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load"}
MODULES = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
FLAGS = {"shell": True, "trust_remote_code": True, "weights_only": False, "allow_pickle": True}


def forbidden(source: str) -> list[str]:
    """What in a source may execute what it is given, found in its syntax, so that comments may speak of it."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            found += [name for name in [ast.unparse(node.func)] if name in CALLS]
            found += [
                f"{k.arg}={k.value.value}"
                for k in node.keywords
                if isinstance(k.value, ast.Constant) and k.arg in FLAGS and k.value.value is FLAGS[k.arg]
            ]
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom):
            found += [node.module for _ in [0] if node.module and node.module.split(".")[0] in MODULES]
    return found


def test_nothing_executes_what_it_reads() -> None:
    """No pickle, no shell, no eval, no remote code in toolkit/, launch/ and shards/."""
    assert len(SOURCES) > 50
    assert {path.name: found for path in SOURCES if (found := forbidden(path.read_text()))} == {}


@pytest.mark.parametrize(
    "line", ["import pickle", "from pickle import loads", "os.system(x)", "run(x, shell=True)", "eval(x)",
             "torch.load(x)", "f(weights_only=False)", "f(trust_remote_code=True)", "yaml.load(x, Loader)"],
)  # fmt: skip
def test_the_rule_sees(line: str) -> None:
    """A rule that finds nothing would always hold."""
    assert forbidden(line) and not forbidden(f"# {line}")


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_our_walk_is_the_stock_walk(tmp_path: Path, form: int) -> None:
    """Names, kinds, places and sizes are tarfile's, with long and foreign names, directories and links."""
    parts = [("a.mp4", b"x" * 700), ("empty.json", b""), ("d/" * 40 + "b.mp4", b"y" * 512)]
    if form != tarfile.USTAR_FORMAT:
        parts += [("n" * 300 + ".mp4", b"z"), ("手話 ü.mp4", b"w" * 513)]
    tar = write_tar(tmp_path / "x.tar", parts, form)
    with tarfile.open(tar, "a", format=form) as archive:
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo("other")
            info.type, info.linkname = kind, "a.mp4"
            archive.addfile(info)
        last = tarfile.TarInfo("last.mp4")
        last.size = 5
        archive.addfile(last, io.BytesIO(b"12345"))
    with tarfile.open(tar, "r:") as archive:
        stock = [(info.name, info.type, info.offset, info.offset_data, info.size) for info in archive]
    ours = [(entry.name, entry.kind, entry.header_offset, entry.offset, entry.size_bytes) for entry in walk_tar(tar)]
    assert ours == stock and len(ours) == len(parts) + 5


def test_pax_headers_name_and_no_more(tmp_path: Path) -> None:
    """A path is taken from the header before the member, other records are passed over, a global path is not taken."""
    tar = tmp_path / "x.tar"
    first = pax(record("path", "b.mp4") + record("mtime", "1.5")) + header("a.mp4", 1) + pad(b"x")
    second = pax(record("path", "c.mp4"), tarfile.XGLTYPE) + header("a.mp4", 1) + pad(b"x")
    tar.write_bytes(first + second + bytes(1024))
    assert [entry.name for entry in walk_tar(tar)] == ["b.mp4", "a.mp4"]


@pytest.mark.parametrize("key", ["size", "GNU.sparse.map", "GNU.sparse.size"])
@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_pax_headers_may_not_move_what_follows(tmp_path: Path, key: str, kind: bytes) -> None:
    """A size in a pax header would let two readers see two tars: it is refused, also where it is the true one."""
    tar = tmp_path / "x.tar"
    tar.write_bytes(pax(record(key, "1"), kind) + header("a.mp4", 1) + pad(b"x") + bytes(1024))
    with pytest.raises(TarFault, match=f"sets {key}"):
        list(walk_tar(tar))


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_extension_headers_are_few(tmp_path: Path, kind: bytes) -> None:
    """Up to eight before one member, as many bytes together as one may have; the fault is where the ninth is."""
    tar, one = tmp_path / "x.tar", header("x", 0, kind)
    tar.write_bytes(8 * one + header("a.mp4", 1) + pad(b"x") + bytes(1024))
    assert [entry.name for entry in walk_tar(tar)] == ["a.mp4"]
    tar.write_bytes(9 * one + header("a.mp4", 1) + pad(b"x") + bytes(1024))
    with pytest.raises(TarFault, match="9 extension headers") as fault:
        list(walk_tar(tar))
    assert fault.value.offset == 8 * 512
    half = pax(record("comment", "x" * 40_000))
    tar.write_bytes(2 * half + header("a.mp4", 1) + pad(b"x") + bytes(1024))
    with pytest.raises(TarFault, match="2 extension headers"):
        list(walk_tar(tar))


def test_the_next_header_is_found(tmp_path: Path) -> None:
    """Behind damage, and not in what only looks like one."""
    almost = bytearray(header("a.mp4", 1))
    almost[0] ^= 1  # its checksum does not hold
    tar = tmp_path / "x.tar"
    tar.write_bytes(b"\xff" * 512 + bytes(almost) + header("b.mp4", 1) + pad(b"x") + bytes(1024))
    with pytest.raises(TarFault) as fault:
        list(walk_tar(tar))
    assert fault.value.offset == 0 and find_header(tar, 1) == 1024 and find_header(tar, 1025) is None
    assert [entry.name for entry in walk_tar(tar, 1024)] == ["b.mp4"]
    far = b"ustar" * (1 << 19)  # and farther than is read at once
    tar.write_bytes(far + bytes(-len(far) % 512) + header("c.mp4", 1) + pad(b"x"))
    assert find_header(tar, 0) == -(-len(far) // 512) * 512


def test_claims_are_counted() -> None:
    """As many as there are frames in an MP4; what stands in the frames themselves is not taken for a table."""
    good = clip(frames=7)
    assert claimed_samples(good) == 7
    at = good.index(b"mdat") + 100
    seeming = good[:at] + b"stsz" + bytes(8) + b"\0\0\1\0" + good[at + 16 :]
    assert claimed_samples(seeming) == 7
    assert claimed_samples(seeming + box(b"moof", b"")) == 7 + 256  # fragments may be anywhere in the file
    with pytest.raises(ValueError, match="compressed"):
        claimed_samples(box(b"moov", box(b"cmov", bytes(8))))


def test_a_window_may_not_take_long_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """The frames from the keyframe to the window's end are bounded; a window behind another keyframe is read."""
    data = clip(frames=30)
    monkeypatch.setattr(video, "MAX_DECODED_PIXELS", 48 * 64 * 14)
    assert read_frames(data, [26, 28], "mp4").shape[0] == 2
    with pytest.raises(VideoError, match="pixels are decoded"):
        read_frames(data, [0, 28], "mp4")


def test_deep_colours_count_for_their_size() -> None:
    """The bound on pixels is one on memory: 10-bit 4:4:4 has four times the bytes of 8-bit 4:2:0."""
    assert read_frames(encode("ffv1", "matroska", [(1440, 1440)]), [0], "mkv").shape == (1, 1440, 1440, 3)
    with pytest.raises(VideoError, match="48 bits a pixel"):
        read_frames(encode("ffv1", "matroska", [(1440, 1440)], "yuv444p10le"), [0], "mkv")


def test_frames_are_transformed_one_by_one() -> None:
    """A window of large frames, each made small as it arrives, never stands in memory whole."""
    data = encode("libx264", "mp4", [(1024, 1024)] * 4)

    def small(frame_HWC: np.ndarray) -> np.ndarray:
        return frame_HWC[::64, ::64].copy()

    tracemalloc.start()
    frames_THWC = read_frames(data, None, "mp4", small)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert frames_THWC.shape == (12, 16, 16, 3) and peak_bytes < 3 * 1024 * 1024 * 3
    assert np.array_equal(frames_THWC, np.stack([small(frame) for frame in read_frames(data, None, "mp4")]))


@pytest.mark.parametrize("size_px", [(2160, 3840), (4320, 7680), (480, 640), (2048, 2048), (4000, 300)])
def test_packing_makes_what_reading_takes(size_px: tuple[int, int]) -> None:
    """A large video is scaled down to what a shard may hold; one that fits keeps its size."""
    _, (height_px, width_px) = fit(*size_px, PackSettings())
    assert height_px * width_px <= MAX_MEMBER_PIXELS
    if size_px[0] * size_px[1] <= MAX_MEMBER_PIXELS:
        assert (height_px, width_px) == size_px


def test_hostile_helpers_make_good_files(tmp_path: Path) -> None:
    """The corpus starts from what is read without fault; else each case might be refused for another reason."""
    tar = write_tar(tmp_path / "x.tar", members("a", clip()))
    (tmp_path / "y.tar").write_bytes(header("a.mp4", 1) + pad(b"x") + bytes(1024))
    assert [entry.name for path in (tar, tmp_path / "y.tar") for entry in walk_tar(path)] == [
        "a.mp4",
        "a.json",
        "a.mp4",
    ]
