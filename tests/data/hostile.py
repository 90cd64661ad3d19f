"""A corpus of hostile shards, indexes and recipes, and a reader that meets each in a process of its own. No tests in here.

Run: python -m tests.data.hostile CORPUS reads what `build_corpus` made and prints what came of each case as JSON.
"""

import gzip
import io
import json
import os
import pickle
import resource
import shutil
import signal
import struct
import sys
import tarfile
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np

from toolkit.authoring import check as checking
from toolkit.authoring.check import check
from toolkit.authoring.repair import repair
from toolkit.data.clips import ClipSettings, load_cached, load_clip
from toolkit.data.format import BadSample, index_path, load_index
from toolkit.data.index import open_shards
from toolkit.data.latents import LatentsReader
from toolkit.data.video import write_video
from toolkit.errors import UserError

MARKER = "executed"  # a file that a payload makes in its folder
LIMIT_S = 60  # ends what hangs; what a case may take is counted in seconds of its own process
FACTS: dict[str, Any] = {"fps": 25, "frames": 5, "height": 48, "width": 64}
SETTINGS = ClipSettings(frames=3, height_px=32, width_px=32)
Members = list[tuple[str, bytes]]
# Of all encoders together; each takes what it knows.
_FAST = {
    "threads": "1",
    "preset": "ultrafast",
    "deadline": "realtime",
    "cpu-used": "8",
    "x265-params": "log-level=none",
}


def clip(frames: int = 5, height_px: int = 48, width_px: int = 64) -> bytes:
    buffer, draws = io.BytesIO(), np.random.default_rng(frames)
    write_video(buffer, draws.integers(0, 255, (frames, height_px, width_px, 3), np.uint8), 25)
    return buffer.getvalue()


def members(key: str, video: bytes, extension: str = "mp4", **facts: object) -> Members:
    return [(f"{key}.{extension}", video), (f"{key}.json", json.dumps(FACTS | facts).encode())]


def write_tar(path: Path, parts: Members, form: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as archive:
        for name, data in parts:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def header(name: str, size_bytes: int, kind: bytes = tarfile.REGTYPE, size_field: bytes | None = None) -> bytes:
    """A header block with a good checksum, whatever it says."""
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, min(max(size_bytes, 0), 8**11 - 1)
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT)[-512:])
    if size_field is not None:
        block[124:136] = size_field
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def pad(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def pax(records: bytes, kind: bytes = tarfile.XHDTYPE) -> bytes:
    return header("pax", len(records), kind) + pad(records)


def record(key: str, value: str) -> bytes:
    body = f" {key}={value}\n".encode("utf-8", "surrogateescape")
    length = next(n for n in range(len(body), len(body) + 9) if n == len(body) + len(str(n)))
    return str(length).encode() + body


def box(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", 8 + len(body)) + kind + body


def with_box(mp4: bytes, kind: bytes, body: bytes) -> bytes:
    """Replace a table of an MP4's only track, and the sizes of all boxes around it."""
    data = bytearray(mp4)
    start = data.index(kind) - 4
    length = int.from_bytes(data[start : start + 4])
    data[start : start + length] = box(kind, body)
    for parent in (b"stbl", b"minf", b"mdia", b"trak", b"moov"):
        at = data.index(parent) - 4
        data[at : at + 4] = struct.pack(">I", int.from_bytes(data[at : at + 4]) + 8 + len(body) - length)
    return bytes(data)


def big_endian(*values: int) -> bytes:
    return struct.pack(f">{len(values)}I", *values)


def encode(
    codec: str, container_format: str, sizes: list[tuple[int, int]], pix_fmt: str = "yuv420p", rate: int = 25
) -> bytes:
    """Black frames in one stream, three of each size; a second size comes in mid-stream."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container_format) as container:
        stream: Any = container.add_stream(codec, rate=rate, options=_FAST)
        stream.height, stream.width, stream.pix_fmt = *sizes[0], pix_fmt
        for part, (height_px, width_px) in enumerate(sizes):
            encoder: Any = stream if part == 0 else av.CodecContext.create(codec, "w")
            if part:
                encoder.height, encoder.width, encoder.pix_fmt = height_px, width_px, pix_fmt
                encoder.time_base, encoder.options = stream.codec_context.time_base, _FAST
            frames = [av.VideoFrame.from_ndarray(np.zeros((height_px, width_px, 3), np.uint8)) for _ in range(3)]
            packets = []
            for i, frame in enumerate(frames):
                frame = frame.reformat(format=pix_fmt)
                frame.pts = 3 * part + i
                packets += encoder.encode(frame)
            for packet in packets + encoder.encode(None):
                packet.stream = stream
                container.mux(packet)
    return buffer.getvalue()


def track_of_zeros(unpacked_mb: int) -> bytes:
    """A sound VP9 clip as mkv, beside it a track whose blocks a demuxer unpacks to 10 MB each."""

    def element(kind: str, *bodies: bytes | int | str) -> bytes:
        body = b"".join(
            part if isinstance(part, bytes) else part.encode() if isinstance(part, str) else part.to_bytes(2)
            for part in bodies
        )
        return bytes.fromhex(kind) + (1 << 56 | len(body)).to_bytes(8) + body

    def track(number: int, kind: int, codec: str, *more: bytes) -> bytes:
        return element(
            "ae", element("d7", number), element("73c5", number), element("83", kind), element("86", codec), *more
        )

    def block(number: int, at_ms: int, data: bytes) -> bytes:
        return element("a3", bytes([0x80 | number]) + struct.pack(">hB", at_ms, 0x80) + data)

    with av.open(io.BytesIO(encode("libvpx-vp9", "webm", [(48, 64)]))) as webm:
        frames = [bytes(packet) for packet in webm.demux(video=0) if packet.size]
    compressed = element("6d80", element("6240", element("5034", element("4254", 0))))  # by zlib
    tracks = track(1, 1, "V_VP9", element("e0", element("b0", 64), element("ba", 48))) + track(
        2, 17, "S_TEXT/UTF8", compressed
    )
    blocks = [block(1, 40 * i, data) for i, data in enumerate(frames)]
    blocks += [block(2, 200, zlib.compress(bytes(9_900_000), 9))] * (unpacked_mb // 10)
    info = element("1549a966", element("2ad7b1", (1_000_000).to_bytes(4)))
    segment = info + element("1654ae6b", tracks) + element("1f43b675", element("e7", 0), *blocks)
    return element("1a45dfa3", element("4282", "matroska")) + element("18538067", segment)


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.command = f"touch {folder / MARKER}"

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self.command,)


def build_corpus(folder: Path) -> None:
    """Make a folder per case: a recipe.yaml, or shards. The big ones are holes on the disk."""
    good = clip()
    a = members("a", good)
    for name, build in _cases(good, a):
        case = folder / name.replace(" ", "_")
        case.mkdir(parents=True)
        build(case)


def _cases(good: bytes, a: Members) -> Iterator[tuple[str, Callable[[Path], object]]]:
    yield from _foreign_members(a)
    yield from _no_files(a)
    yield from _tars(a)
    yield from _indexes(a)
    yield from _sidecars(good)
    yield from _videos(good)
    yield from _latents()
    yield from _recipes()


def _tar(parts: Members) -> Callable[[Path], object]:
    return lambda case: write_tar(case / "x.tar", parts)


def _raw(data: bytes, size_bytes: int = 0) -> Callable[[Path], object]:
    """A tar as it is; up to size_bytes it goes on as a hole."""

    def build(case: Path) -> None:
        (case / "x.tar").write_bytes(data)
        if size_bytes:
            os.truncate(case / "x.tar", size_bytes)

    return build


def _no_files(a: Members) -> Iterator[tuple[str, Callable[[Path], object]]]:
    """Pipes, devices, folders and links where a tar or its index is looked for, and a tar of a hostile name."""
    makes: dict[str, Callable[[Path], object]] = {
        "pipe": os.mkfifo,
        "folder": Path.mkdir,
        "link to nothing": lambda path: path.symlink_to("nothing"),
        "link to itself": lambda path: path.symlink_to(path.name),
        "device without end": lambda path: path.symlink_to("/dev/zero"),
        "file that cannot be read": lambda path: path.symlink_to("/proc/self/mem"),
    }
    for kind, make in makes.items():

        def tar(case: Path, make: Callable[[Path], object] = make) -> None:
            make(case / "y.tar")
            write_tar(case / "x.tar", a)

        def index(case: Path, make: Callable[[Path], object] = make) -> None:
            make(index_path(write_tar(case / "x.tar", a)))

        yield f"tar is a {kind}", tar
        if not kind.startswith("link"):  # which is as if there were none
            yield f"index is a {kind}", index
    yield "shard name", lambda case: write_tar(case / os.fsdecode(b"\xff\x1b[31m.tar"), [*a, ("\x1b[2Jb.mp4", b"x")])


def _foreign_members(a: Members) -> Iterator[tuple[str, Callable[[Path], object]]]:
    for extension in ("pyd", "pkl", "pickle", "pth", "npy", "cbor", "mp", "ten", "tb", "mp4.gz", "py", "so"):

        def build(case: Path, extension: str = extension) -> None:
            write_tar(case / "x.tar", [*a, (f"a.{extension}", pickle.dumps(Payload(case)))])

        yield f"payload {extension}", build
    for name in ("/etc/a.mp4", "../a.mp4", "x/../../a.mp4", "a\n.mp4", "a\x1b[2J.mp4", "a\udc80.mp4", ".mp4.exe"):
        yield f"name {name.encode('utf-8', 'surrogateescape').hex()}", _tar([(name, b"x"), *a])
    yield "name twice", _tar([*a, a[0]])
    yield "key apart", _tar([*a, *members("b", a[0][1]), ("a.txt", b"x")])
    kinds = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.CONTTYPE)
    for kind in (*kinds, tarfile.GNUTYPE_SPARSE, tarfile.GNUTYPE_LONGLINK, b"M", b"V", b"X", b"D"):
        yield f"kind {kind.hex()}", _raw(header("a.mp4", 0, kind) + bytes(1024))


def _tars(a: Members) -> Iterator[tuple[str, Callable[[Path], object]]]:
    end = bytes(1024)
    body = pad(b"x")

    def bomb(case: Path) -> None:
        block = bytes(1 << 20)
        with gzip.open(case / "x.tar", "wb", compresslevel=1) as file:
            file.write(header("a.mp4", 300 << 20))
            for _ in range(300):
                file.write(block)

    yield "gzip bomb", bomb
    for kind in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE):
        yield f"extension header of 300 MB {kind.hex()}", _raw(header("x", 300_000_000, kind), 301_000_192)
        chain = header("x", 0, kind) * 5000
        yield f"chain of 5000 extension headers {kind.hex()}", _raw(chain + header("a.mp4", 300_000) + end)
    large = header("x", 60_000, tarfile.XHDTYPE) + pad(record("comment", "x" * 59_984)[:60_000])
    yield "chain of large extension headers", _raw(large * 300 + header("a.mp4", 300_000) + end)
    yield "pax size", _raw(pax(record("size", "300000000")) + header("a.mp4", 1) + body + end)
    yield (
        "pax size hides a member",
        _raw(pax(record("size", "1025")) + header("a.mp4", 1) + body + header("b.pkl", 1) + body + end),
    )
    yield "pax global size", _raw(pax(record("size", "1024"), tarfile.XGLTYPE) + header("a.mp4", 1) + body + end)
    yield "pax path climbs", _raw(pax(record("path", "../../a.mp4")) + header("a.mp4", 1) + body + end)
    yield "pax path NUL", _raw(pax(record("path", "a\0.mp4")) + header("a.mp4", 1) + body + end)
    yield "pax sparse", _raw(pax(record("GNU.sparse.map", "0,1")) + header("a.mp4", 1) + body + end)
    yield "pax length", _raw(pax(b"99999999999999999999 path=x\n") + header("a.mp4", 1) + body + end)
    yield "pax no record", _raw(pax(b"\xff" * 600) + header("a.mp4", 1) + body + end)
    yield "size negative", _raw(header("a.mp4", 0, size_field=b"\xff" * 12) + end)
    yield "size base 256", _raw(header("a.mp4", 0, size_field=b"\x80" + bytes(3) + b"\x10" + bytes(7)) + end)
    yield "size 300 MB", _raw(header("a.mp4", 300_000_000), 301_000_192)
    yield "size beyond the end", _raw(header("a.mp4", 4096) + body + end)
    yield "json of 100 MB", _raw(header("a.json", 100_000_000), 100_000_000 + 1536 + 512)
    yield "cut", _raw(header("a.mp4", 1)[:300])
    yield "nothing", _raw(b"")
    yield "text", _raw(b"hello\n" * 400)


def _indexes(a: Members) -> Iterator[tuple[str, Callable[[Path], object]]]:
    def change(**new: Any) -> Callable[[Path], object]:
        """An index of two samples; each value replaces a field of the second sample's mp4 or, by name, of the index."""

        def build(case: Path) -> None:
            tar = write_tar(case / "x.tar", [*a, *members("b", a[0][1])])
            load_index(tar)
            tree = json.loads(index_path(tar).read_text())
            first, second = tree["samples"]
            for name, value in new.items():
                if name in ("offset", "size_bytes", "crc32"):
                    second["members"]["mp4"][name] = value
                elif name in ("key", "latents", "members"):
                    second[name] = value
                elif name == "clip":
                    second["clip"] |= value
                elif name == "same":
                    second["members"] = first["members"]
                elif name == "other":
                    second["members"]["mp4"] = first["members"]["mp4"]
                elif name == "extension":
                    second["members"] = {value: second["members"]["mp4"]}
                else:
                    tree[name] = value
            index_path(tar).write_text(json.dumps(tree))

        return build

    yield "index outside", change(offset=1 << 40)
    yield "index negative", change(offset=-512)
    yield "index of another's member", change(other=True)
    yield "index of another's members", change(same=True)
    yield "index large member", change(size_bytes=1 << 40)
    yield "index overlap", change(size_bytes=10_000_000)
    yield "index key twice", change(key="a")
    yield "index without members", change(members={})
    yield "index key climbs", change(key="../../b")
    yield "index key of a terminal's commands", change(key="\x1b]0;owned\x07")
    yield "index extension", change(extension="pkl")
    yield "index offset not a number", change(offset="x" * 100)
    yield "index version", change(format_version=10**30)
    yield "index size", change(tar_size_bytes=10**30)
    yield "index frames", change(clip={"frames": 10**30})
    yield "index fps", change(clip={"fps": 0})
    yield "index fps near 0", change(clip={"fps": 5e-324})
    latents = {"dtype": "BF16", "variants": 10**9, "frames": 10**9, "latent_CHW": [4, 6, 8], "token_dim": 8}
    sums = {"offsets": {"mean": 0, "std": 0, "tokens": 0}, "frame_crc32": ""}
    yield "index latents", change(latents=latents | sums)

    def text(data: bytes, size_bytes: int = 0) -> Callable[[Path], object]:
        def build(case: Path) -> None:
            path = index_path(write_tar(case / "x.tar", a))
            path.write_bytes(data)
            if size_bytes:
                os.truncate(path, size_bytes)

        return build

    yield "index huge", text(b"{", 2 << 30)
    yield "index deep", text(b'{"samples":' + b"[" * 1_000_000)
    yield "index deep objects", text(b'{"a":' * 500_000)
    yield "index pickled", text(pickle.dumps({"format_version": 1}))
    yield "index NaN", text(b'{"format_version": NaN}')
    yield "index empty", text(b"")


def _sidecars(good: bytes) -> Iterator[tuple[str, Callable[[Path], object]]]:
    def sidecar(text: bytes) -> Callable[[Path], object]:
        return _tar([("a.mp4", good), ("a.json", text)])

    plain = json.dumps(FACTS).encode()
    yield "json deep", sidecar(b'{"a":' + b"[" * 500_000)
    yield "json NaN fps", sidecar(plain.replace(b"25", b"NaN"))
    yield "json 1e400 fps", sidecar(plain.replace(b"25", b"1e400"))
    yield "json fps 1e6", sidecar(plain.replace(b"25", b"1000000"))
    yield "json fps near 0", sidecar(plain.replace(b"25", b"5e-324"))
    yield "json infinite start", sidecar(plain.replace(b"{", b'{"start_s": Infinity, '))
    yield "json 1e30 frames", sidecar(json.dumps(FACTS | {"frames": 10**30}).encode())
    yield "json 5000 digits", sidecar(plain.replace(b"25", b"9" * 5000))
    yield "json more frames than there are", sidecar(json.dumps(FACTS | {"frames": 90_000}).encode())
    yield "json list", sidecar(b"[]")
    yield "json bytes", sidecar(b"\xff\xfe\x00")


def _videos(good: bytes) -> Iterator[tuple[str, Callable[[Path], object]]]:
    def video(data: bytes, extension: str = "mp4", facts: bool = True, **said: object) -> Callable[[Path], object]:
        return _tar(members("a", data, extension, **said) if facts else [(f"a.{extension}", data)])

    def claim(kind: bytes, body: bytes, mp4: bytes = good) -> bytes:
        return with_box(mp4, kind, body)

    for extension in ("mp4", "mkv", "webm"):
        playlist = b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/x.ts\n#EXT-X-ENDLIST\n"
        yield f"m3u8 as {extension}", video(playlist, extension)
        yield f"ffconcat as {extension}", video(b"ffconcat version 1.0\nfile /etc/passwd\n", extension)
        yield f"sdp as {extension}", video(b"v=0\nm=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n", extension)
        yield f"concat as {extension}", video(b"concat:/etc/passwd|/etc/hosts", extension)
        yield f"empty {extension}", video(b"", extension)
    square = encode("libx264", "mp4", [(8192, 8192)])
    yield "8192 x 8192", video(square)
    yield "8192 x 8192 probed", video(square, facts=False)
    yield "4096 x 2304 hevc", video(encode("libx265", "mp4", [(2304, 4096)]))
    yield "4096 x 2304 vp9", video(encode("libvpx-vp9", "webm", [(2304, 4096)]), "webm")
    yield "4:4:4 of 10 bits", video(encode("ffv1", "matroska", [(2048, 2048)], "yuv444p10le"), "mkv")
    yield "another size in mid-stream", video(encode("libvpx-vp9", "webm", [(48, 64), (96, 128)]), "webm")
    yield "a huge size in mid-stream", video(encode("libvpx-vp9", "webm", [(48, 64), (2304, 4096)]), "webm")
    yield "fps 1e6", video(encode("libx264", "mp4", [(48, 64)], rate=1_000_000), facts=False)
    yield "0 x 0", video(_zero_size(good))
    yield "codec unknown", video(good.replace(b"avc1", b"zzz1"))
    yield "codec mpeg4", video(encode("mpeg4", "mp4", [(48, 64)]))
    yield "codec raw", video(encode("rawvideo", "matroska", [(48, 64)]), "mkv")
    for count in (1_000_000, 4_000_000_000):
        yield f"{count} frames in stsz", video(claim(b"stsz", big_endian(0, 1, count)))
        chunked = claim(b"stsc", big_endian(0, 1, 1, count, 1))
        yield f"{count} frames in one chunk", video(claim(b"stsz", big_endian(0, 1, count), chunked))
        part = box(b"tfhd", big_endian(0x020000, 1)) + box(b"trun", big_endian(0, count))
        fragment = box(b"moof", box(b"mfhd", big_endian(0, 1)) + box(b"traf", part))
        yield f"{count} frames in a fragment", video(good + fragment)
    yield "unread track of 2 GB", video(track_of_zeros(2000), "mkv", frames=3)
    yield "compressed header", video(box(b"ftyp", b"isom" + bytes(4)) + box(b"moov", box(b"cmov", bytes(64))))


def _zero_size(mp4: bytes) -> bytes:
    """Set width and height to 0 wherever the container says them, and take away what the codec says."""
    data = bytearray(mp4)
    at = data.index(b"avc1") + 4 + 24
    data[at : at + 4] = bytes(4)
    at = data.index(b"avcC")
    data[at : at + 4] = b"free"
    return bytes(data)


def _latents() -> Iterator[tuple[str, Callable[[Path], object]]]:
    def tensors(tree: object, data: bytes = b"", length: int | None = None) -> Callable[[Path], object]:
        text = tree if isinstance(tree, bytes) else json.dumps(tree).encode()
        member = struct.pack("<Q", len(text) if length is None else length) + text + data
        return _tar([("a.safetensors", member), ("a.json", json.dumps(FACTS).encode())])

    def tensor(shape: list[int], begin: int = 0, end: int = 0, dtype: str = "BF16") -> dict[str, Any]:
        return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}

    huge = tensor([1 << 40, 1 << 40, 4, 6, 8])
    yield "latents header length", tensors({}, length=1 << 62)
    yield "latents header of 10 MB", tensors(b"[" * 10_000_000)
    yield "latents header deep", tensors(b'{"a":' + b"[" * 60_000)
    yield "latents shape", tensors({"mean": huge, "std": huge, "tokens": tensor([1 << 40, 1 << 40, 8])})
    empty = tensor([1 << 40, 0, 4, 6, 8])
    yield "latents empty shape", tensors({"mean": empty, "std": empty, "tokens": tensor([1 << 40, 0, 8])})
    yield "latents beyond the end", tensors({"mean": tensor([1, 5, 4, 6, 8], 0, 1 << 40)})
    yield "latents types", tensors({"mean": tensor([1, 1, 1, 1, 1], 0, 1, "I8")}, b"x")
    yield "latents names", tensors({"__metadata__": {"format": "pt"}})


def _recipes() -> Iterator[tuple[str, Callable[[Path], object]]]:
    def recipe(text: str) -> Callable[[Path], object]:
        return lambda case: (case / "recipe.yaml").write_text(text)

    laughs = "\n".join([f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)])
    yield (
        "yaml python",
        lambda case: (case / "recipe.yaml").write_text(
            f"name: !!python/object/apply:os.system ['touch {case / MARKER}']\n"
        ),
    )
    yield "yaml laughs", recipe(f"a0: &a0 [lol]\n{laughs}\nseed: *a11\n")
    yield "yaml laughs in a value", recipe("name: x\ndata: {mix: '{a: &a [1], b: [*a, *a]}'}\n")
    yield "yaml deep", recipe("[" * 60_000)
    yield "yaml deep value", recipe(f"name: x\ndata: {{mix: '{'[' * 50_000}'}}\n")
    yield "yaml recursive", recipe("a: &a [*a]\n")
    yield "yaml digits", recipe(f"seed: {'9' * 5000}\n")
    yield "yaml date", recipe("seed: 2001-99-99\n")
    yield "yaml large", recipe("# x\n" * 10_000_000)
    yield "yaml NUL", recipe("a: \0\n")
    yield "yaml infinity", recipe("name: x\ndata: {shards: x}\noptimizer: {lr: .inf}\n")


@dataclass(frozen=True)
class Outcome:
    """What came of a case: the error and its sentence, and what a child of this process needed more than it had.

    printed  what a check and a repair print of it
    left     faults in the repaired copy
    """

    name: str
    error: str = "killed"
    message: str = ""
    seconds: float = LIMIT_S
    grown_mb: float = 0.0
    executed: bool = False
    faults: int = 0
    printed: str = ""
    left: int = 0


def meet(case: Path) -> Outcome:
    """Open and read a case as training does, then check and repair it, in a forked child that LIMIT_S ends."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        signal.alarm(LIMIT_S)
        with open(writer, "w") as pipe:
            json.dump(asdict(_read(case)), pipe)
            pipe.flush()
            os._exit(0)
    os.close(writer)
    with open(reader) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    executed = (case / MARKER).exists()
    return Outcome(**json.loads(text) | {"executed": executed}) if text else Outcome(case.name, executed=executed)


def _read(case: Path) -> Outcome:
    before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    error, message, faults, printed, left = "nothing", "", 0, "", 0
    try:
        if (case / "recipe.yaml").exists():
            from toolkit.config import load_config

            load_config(case / "recipe.yaml")
        else:
            index = open_shards(case, "train")
            for i, row in enumerate(index.rows):
                if row.latents is not None:
                    load_cached(index, i, SETTINGS, 0, 0, LatentsReader())
                for k in range(3):
                    load_clip(index, i, SETTINGS, 0, k)
    except (UserError, BadSample) as refused:
        error, message = type(refused).__name__, str(refused)
    except BaseException as other:
        error, message = f"unexpected {type(other).__name__}", str(other)[:300]
    if list(case.glob("*.tar")):
        report = check(case)
        repaired = repair(case, out := case.with_name(f"{case.name}.out"))
        shutil.rmtree(out)
        faults, left = len(report.faults), len(repaired.faults)
        printed = "\n".join([report.summary(), repaired.summary()])
    grown_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb) / 1024
    return Outcome(case.name, error, message, time.process_time(), grown_mb, False, faults, printed, left)


def main(folder: Path) -> None:
    checking._POOL_BYTES = sys.maxsize  # what a case needs is to be seen in its own process
    normal = folder / "normal"
    if not normal.exists():
        normal.mkdir()
        write_tar(normal / "x.tar", members("a", clip()))
    index = open_shards(normal, "train")
    load_clip(index, 0, SETTINGS, 0, 0)  # the libraries are warm before the first case, and their memory is counted
    assert check(normal).faults == []
    cases = sorted(path for path in folder.iterdir() if path.is_dir() and path != normal)
    print(json.dumps([asdict(meet(case)) for case in cases]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
