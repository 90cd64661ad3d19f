"""Remote shards read as local ones; a failing network is never a bad clip. Run: pytest tests/data/test_remote.py

The server is a real one, over TLS, on this machine; what it does wrong is set by each test.
"""

import functools
import multiprocessing
import os
import shutil
import ssl
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from tests.data.test_index import make_cached
from tests.data.test_loader import run, same
from toolkit.config import DataConfig
from toolkit.data import remote
from toolkit.data.disk_cache import DiskCache
from toolkit.data.index import open_shards, open_sources
from toolkit.data.remote import RemoteShard, find_shards
from toolkit.errors import UserError


class Server(ThreadingHTTPServer):
    """Serves a folder with ranges; `harm`, where set, may answer in its stead, and says whether it did."""

    daemon_threads = True
    folder: Path
    harm: Callable[["Handler"], bool] | None = None
    asked: list[tuple[str, str]]

    def address(self, path: str) -> str:
        return f"https://localhost:{self.server_port}/{path}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no news."""


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def log_message(self, *_: Any) -> None:
        """Not on the test's stderr."""

    def answer(self) -> None:
        self.server.asked.append((self.command, self.path))
        if self.server.harm is None or not self.server.harm(self):
            self.send_file()

    def send_file(self, cut: int | None = None, whole: bool = False, shift: int = 0) -> None:
        """Send what was asked for, or less than was promised, or all of the file, or a part that lies before it."""
        path = self.server.folder / self.path.lstrip("/")
        if not path.is_file():
            return self.send_nothing(404)
        size_bytes = path.stat().st_size
        ranged = "Range" in self.headers and not whole
        first, last = 0, size_bytes - 1
        if ranged:
            first, last = (int(at) - shift for at in self.headers["Range"].removeprefix("bytes=").split("-"))
        self.send_response(206 if ranged else 200)
        self.send_header("Content-Length", str(last - first + 1))
        if ranged:
            self.send_header("Content-Range", f"bytes {first}-{last}/{size_bytes}")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(path.read_bytes()[first : last + 1][:cut])
        if cut is not None:
            self.wfile.flush()
            self.close_connection = True

    def send_nothing(self, status: int, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": "0", **headers}.items():
            self.send_header(name, value)
        self.end_headers()


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ssl.SSLContext]:
    """A certificate for localhost that this process, and those it starts, trust."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl program to make a certificate with")
    folder = tmp_path_factory.mktemp("tls")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-days", "2",
         "-addext", "subjectAltName=DNS:localhost", "-keyout", folder / "key.pem", "-out", folder / "cert.pem"],
        check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL_CERT_FILE", str(folder / "cert.pem"))
        patch.setenv("NO_PROXY", "localhost")
        yield context


@pytest.fixture
def server(tls: ssl.SSLContext, packed: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """The packed shards, served; a client waits for nothing between its three attempts."""
    pytest.importorskip("aiohttp")
    monkeypatch.setattr(remote, "WAITS_S", (0, 0))
    open_shards(packed, "train")  # writes missing indexes
    with Server(("127.0.0.1", 0), Handler) as serving:
        serving.folder, serving.asked = packed, []
        serving.socket = tls.wrap_socket(serving.socket, server_side=True)
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield serving
        serving.shutdown()


@pytest.fixture
def data(server: Server, packed: Path, tmp_path: Path) -> DataConfig:
    """A recipe's section that reads them."""
    last = len(list(packed.glob("train-*.tar"))) - 1
    return DataConfig(
        shards=server.address(f"train-{{000000..{last:06d}}}.tar"), remote=["https"], cache_dir=str(tmp_path / "cache")
    )


def shard(server: Server, cache: Path, name: str = "train-000000.tar", limit_bytes: int = 1 << 30) -> RemoteShard:
    return RemoteShard(server.address(name), DiskCache(cache, limit_bytes))


def fetched(server: Server) -> int:
    """Members asked for since the last call."""
    count = sum(command == "GET" and path.endswith(".tar") for command, path in server.asked)
    server.asked.clear()
    return count


def test_remote_shards_are_the_local_ones(server: Server, data: DataConfig, packed: Path) -> None:
    """Same rows, fingerprint and bit-equal batches as from the folder, with workers too; the second time from the cache."""
    local, far = open_shards(packed, "train"), open_sources(data, "train")
    assert (far.rows, far.fingerprint, far.sources) == (local.rows, local.fingerprint, local.sources)
    expected = run(local)[0]
    assert fetched(server) == 0
    assert same(run(far, workers=2)[0], expected)
    assert fetched(server) > 0
    assert same(run(far, workers=2)[0], expected) and same(run(open_sources(data, "train"))[0], expected)
    assert fetched(server) == 0


def test_every_early_close_is_noticed(server: Server, packed: Path, tmp_path: Path) -> None:
    """38 cuts of an answer, up to its last byte: each is asked for again, and the run stops where it stays cut."""
    tar = packed / "train-000000.tar"
    size_bytes = tar.stat().st_size - 512
    whole = tar.read_bytes()[512:]
    cuts = [*range(1, 10), *(size_bytes * i // 29 for i in range(1, 29)), size_bytes - 1]
    assert len(set(cuts)) == 38
    for cut in cuts:
        pending = [cut]

        def once(handler: Handler, pending: list[int] = pending) -> bool:
            if pending:
                handler.send_file(cut=pending.pop())
                return True
            return False

        server.harm = once
        assert shard(server, tmp_path / "none", limit_bytes=0).read(512, size_bytes, 0) == whole and not pending
        server.harm = lambda handler, cut=cut: handler.send_file(cut=cut) is None
        with pytest.raises(UserError, match="train-000000.tar could not be read in 3 attempts"):
            shard(server, tmp_path / "none", limit_bytes=0).read(512, size_bytes, 0)


def answer(status: int, **headers: str) -> Callable[[Handler], bool]:
    return lambda handler: handler.send_nothing(status, **headers) is None


@pytest.mark.parametrize(
    ("harm", "said", "attempts"),
    [
        (answer(404), "train-000000.tar does not exist any more", 1),
        (answer(403), "access is refused .HTTP 403.; give tokens", 1),
        (answer(401), "access is refused .HTTP 401.; give tokens", 1),
        (answer(500), "3 attempts .* HTTP 500; when it can be reached", 3),
        (answer(429), "3 attempts .* HTTP 429", 3),
        (answer(302, Location="https://elsewhere.example/x.tar"), "a redirect to https://elsewhere.example/x.tar", 1),
        (answer(301, Location="/val-000000.tar"), "a redirect to /val-000000.tar, which is not followed", 1),
        (lambda handler: handler.send_file(whole=True) is None, "answers a range request with the whole file", 1),
        (lambda handler: handler.send_file(shift=512) is None, "bytes 512 to 611 were asked for, bytes 0-99/.* came", 3),
        (answer(206), "bytes 512 to 611 were asked for, others came, 0 long", 3),
        (lambda handler: threading.Event().wait(2) or False, "3 attempts .* [tT]imeout", 3),
    ],
    ids=["404", "403", "401", "500", "429", "redirect away", "redirect", "no ranges", "wrong range", "no range", "slow"],
)  # fmt: skip
def test_what_a_server_does_wrong_is_a_sentence(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: Any, said: str, attempts: int
) -> None:
    """The address, the reason and what to do; asked again only where that can help; the body is not read first."""
    if "imeout" in said:
        monkeypatch.setattr(remote, "SILENCE_S", 0.2)
    server.harm = harm
    with pytest.raises(UserError, match=said) as caught:
        # a thread of its own has a client of its own, and so the times above
        in_thread(lambda: shard(server, tmp_path).read(512, 100, 0))
    assert server.address("") in str(caught.value) and "\n" not in str(caught.value)
    assert len(server.asked) == attempts and not list(tmp_path.iterdir())


def in_thread(function: Callable[[], Any]) -> Any:
    client = fsspec.get_filesystem_class("https")
    client.clear_instance_cache()
    try:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(function).result()
    finally:
        client.clear_instance_cache()  # a later thread may have the same number


def test_nobody_there_is_a_sentence(tls: ssl.SSLContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A port that nobody listens on, and a certificate that nobody vouches for."""
    pytest.importorskip("aiohttp")
    monkeypatch.setattr(remote, "WAITS_S", (0,))
    absent = RemoteShard("https://localhost:1/train-000000.tar", DiskCache(tmp_path, 0))
    with pytest.raises(UserError, match="localhost:1/.* 2 attempts .*onnect"):
        absent.size_bytes()


def test_a_failing_network_is_no_bad_clip(server: Server, data: DataConfig) -> None:
    """A server that fails in mid-run stops it, from a worker too: no clip is replaced."""
    index = open_sources(data, "train")
    server.harm = answer(503)
    for workers in (0, 2):
        with pytest.raises(UserError, match="3 attempts .* HTTP 503"):
            run(index, workers=workers)


def test_a_damaged_remote_clip_is_replaced(server: Server, data: DataConfig, packed: Path, tmp_path: Path) -> None:
    """A flipped bit in the server's tar is found by its crc32, as in a local one, and never cached."""
    index = open_sources(data, "train")
    folder = Path(shutil.copytree(packed, tmp_path / "damaged"))
    member = index.rows[2].members["mp4"]
    path = folder / index.shards[2].name
    content = bytearray(path.read_bytes())
    content[member.offset + 100] ^= 1
    path.write_bytes(content)
    server.folder = folder
    rows = [row for batch in run(index)[0] for row in batch.substitutes]
    assert {row.key for row in rows} == {index.rows[2].key} and {row.shard for row in rows} == {str(index.shards[2])}
    server.folder = packed
    assert not [row for batch in run(index)[0] for row in batch.substitutes]


def test_index_comes_from_the_server(server: Server, data: DataConfig, packed: Path, tmp_path: Path) -> None:
    """It is not made from afar; one that is missing, no index, too large, or of another tar is refused."""
    folder = server.folder = Path(shutil.copytree(packed, tmp_path / "served"))
    path = folder / "train-000001.index.json"
    text = path.read_bytes()
    with (folder / "train-000001.tar").open("ab") as tar:
        tar.write(bytes(512))
    with pytest.raises(UserError, match="train-000001.tar has .* bytes, its index was made for .*shards/check.py"):
        open_sources(data, "train")
    path.write_bytes(b"{")
    with pytest.raises(UserError, match="the index of https://.*train-000001.tar is not a shard index"):
        open_sources(data, "train")
    path.unlink()
    with pytest.raises(UserError, match="train-000001.index.json does not exist, .* run python shards/check.py"):
        open_sources(data, "train")
    with path.open("wb") as file:
        file.write(text)
        file.truncate(remote.MAX_INDEX_BYTES + 1)
    with pytest.raises(UserError, match="index.json has 268435457 bytes, allowed are"):
        open_sources(data, "train")


def test_cache_names_do_not_collide(server: Server, packed: Path, tmp_path: Path) -> None:
    """a/000.tar and b/000.tar, other offsets and other sizes are other copies."""
    folder = server.folder = tmp_path / "served"
    for i, name in enumerate(("a", "b")):
        (folder / name).mkdir(parents=True)
        (folder / name / "000.tar").write_bytes(bytes([i]) * 40)
    for name, offset, size_bytes in [("a", 0, 20), ("b", 0, 20), ("a", 1, 20), ("a", 0, 21)]:
        content = bytes([name == "b"]) * size_bytes
        for _ in range(2):
            assert (
                shard(server, tmp_path / "cache", f"{name}/000.tar").read(offset, size_bytes, zlib.crc32(content))
                == content
            )
    assert fetched(server) == len(list((tmp_path / "cache").iterdir())) == 4


@pytest.mark.parametrize("harm", [lambda data: data[:-1], lambda data: data[:5] + b"!" + data[6:], lambda data: b""])
def test_torn_or_edited_copies_are_fetched_again(
    server: Server, tmp_path: Path, harm: Callable[[bytes], bytes]
) -> None:
    """A copy that is not what was put there is no copy."""
    content = (server.folder / "train-000000.tar").read_bytes()[:1000]
    read = functools.partial(shard(server, tmp_path).read, 0, 1000, zlib.crc32(content))
    assert read() == content
    (copy,) = tmp_path.iterdir()
    copy.write_bytes(harm(content))
    assert read() == content and copy.read_bytes() == content and fetched(server) == 2


def test_cache_keeps_what_was_used_last(tmp_path: Path) -> None:
    """Over its bound the copies unused for longest go; what is larger than the bound is not kept; 0 keeps nothing."""
    cache = DiskCache(tmp_path, 1000)
    contents = {str(i): bytes([i]) * 100 for i in range(30)}
    for name, content in contents.items():
        cache.write(name, content)
        assert cache.read("0", zlib.crc32(contents["0"]))  # used all the time
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 1000
    kept = [name for name, content in contents.items() if cache.read(name, zlib.crc32(content))]
    assert kept[0] == "0" and kept[1:] == [str(i) for i in range(31 - len(kept), 30)] and len(kept) > 5
    cache.write("large", bytes(1001))
    assert cache.read("large", zlib.crc32(bytes(1001))) is None
    DiskCache(tmp_path / "none", 0).write("x", b"x")
    assert not (tmp_path / "none").exists()


def test_cache_is_of_use_to_several_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies are as readable as what their writer writes elsewhere, and are read by whoever may not date them anew."""
    cache = DiskCache(tmp_path / "cache", 1000)
    cache.write("x", b"x")
    (copy,) = (tmp_path / "cache").iterdir()
    (tmp_path / "plain").touch()
    assert copy.stat().st_mode == (tmp_path / "plain").stat().st_mode

    def refuse(*_: Any) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "utime", refuse)
    assert cache.read("x", zlib.crc32(b"x")) == b"x"


def test_cache_touches_only_its_own(tmp_path: Path) -> None:
    """What else lies in its folder, old and large, is neither counted nor removed; what a killed writer left is."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "train-000000.tar").write_bytes(bytes(5000))
    (tmp_path / "thesis.tex").write_bytes(bytes(3000))
    (tmp_path / ("a" * 64)).symlink_to(tmp_path / "thesis.tex")
    left = tmp_path / f"{'0' * 64}.x1y2z3.tmp"
    left.write_bytes(bytes(900))
    users = {"sub", "train-000000.tar", "thesis.tex", "a" * 64}
    for path in tmp_path.iterdir():
        os.utime(path, (1, 1), follow_symlinks=False)
    cache = DiskCache(tmp_path, 1000)
    for i in range(30):
        cache.write(str(i), bytes(100))
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= users and left.name not in names and len(names) > len(users) + 5


def _write_and_read(folder: Path, writer: int) -> int:
    """Write copies that others write too, and read them all the while; returns how many were read whole."""
    cache, found = DiskCache(folder, 20_000), 0
    for i in range(300):
        name = str((7 * i + writer) % 40)
        content = name.encode() * 500
        data = cache.read(name, zlib.crc32(content))
        if data is None:
            cache.write(name, content)
        else:
            assert data == content
            found += 1
    return found


def test_cache_is_shared_by_processes(tmp_path: Path) -> None:
    """Four processes that write, read and remove the same copies: no error, no wrong byte, nothing left aside."""
    with multiprocessing.get_context("fork").Pool(4) as pool:
        found = pool.starmap(_write_and_read, [(tmp_path, writer) for writer in range(4)])
    assert all(found) and not list(tmp_path.glob("*.tmp"))
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 20_000


def test_cache_on_a_full_or_forbidden_disk_is_a_sentence(tmp_path: Path) -> None:
    """The recipe's field is named, and nothing is left behind."""
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data.cache_dir .*file/cache cannot be written: .*data.cache_gb"):
        DiskCache(tmp_path / "file/cache", 100).write("x", b"x")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("http://host/train-0.tar", "http: is not read; .* https, s3, hf"),
        ("file:///shards/train-0.tar", "file: is not read"),
        ("ftp://host/train-0.tar", "ftp: is not read"),
        ("pipe:cat train-0.tar", "pipe: is not read"),
        ("pipe:curl -s https://host/x.tar; touch marker", "pipe: is not read"),
        ("gs://bucket/train-0.tar", "gs: is not read"),
        ("simplecache::https://host/train-0.tar", "simplecache: is not read"),
        ("https+pipe://host/train-0.tar", "https.pipe: is not read"),
        ("HTTPS://host/train-0.tar", "HTTPS: is not read"),
        ("https://host/{0..99999}/train-{0..99999}.tar", "more than 100000 shards"),
        ("hf://me:secret@datasets/a/b/", "an address may hold no password"),
        ("hf://datasets/a/b/", "another machine; allow that with --data.remote .hf."),
        ("https://me:secret@host/train-0.tar", "an address may hold no password"),
        ("https://host/train-0.tar?X-Amz-Signature=secret", "an address may hold no password"),
        ("https://host/asl/", "https has no folders; name the shards: https://host/asl/train-{000000..000011}.tar"),
        ("https://host/train-{0..3.tar", "a brace is not closed"),
        (f"https://host/{'{' * 3000}a{'}' * 3000}.tar", "a brace is not closed, or within another"),
        ("https://host/train-{-1..30000000}.tar", "more than 100000 shards"),
        ("https://host/train-{30000000..-1..2}.tar", "more than 100000 shards"),
        (f"https://host/train-{{1..{'9' * 5000}}}.tar", "more than 100000 shards"),
        (f"https://host/train-{{1..2..{'9' * 5000}}}.tar", "more than 100000 shards"),
        (f"https://host/{'{1,2}' * 40}.tar", "more than 100000 shards"),
        ("https://[::1/train-0.tar", "is no address"),
        ("https://host/train-{000000000..999999999}.tar", "more than 100000 shards"),
    ],
)  # fmt: skip
def test_other_addresses_are_refused_by_name(source: str, said: str) -> None:
    """One sentence before anything is asked of a network, and no password in it."""
    data = DataConfig(shards=source, remote=["https", "s3"])
    with pytest.raises(UserError, match=said) as caught:
        open_sources(data, "train")
    assert "secret" not in str(caught.value) and "\n" not in str(caught.value)


def test_missing_backend_names_the_command(tmp_path: Path) -> None:
    """s3 needs s3fs, which few have."""
    if "s3fs" in sys.modules or shutil.which("s3fs"):
        pytest.skip("s3fs is there")
    with pytest.raises(UserError, match="s3:// is read through s3fs, .*: pip install s3fs"):
        find_shards("s3://bucket/asl/", ["s3"], DiskCache(tmp_path, 0))


@pytest.fixture
def store(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The packed shards in s3://bucket/asl/: fsspec's own store in memory, whose interface is that of s3's and hf's."""
    memory = MemoryFileSystem()
    for path in packed.iterdir():
        memory.pipe_file(f"/bucket/asl/{path.name}", path.read_bytes())
    monkeypatch.setattr(remote, "_backend", lambda address: Stripped(memory))
    monkeypatch.setattr(remote, "WAITS_S", (0,))


def test_folders_are_listed(store: None, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """s3:// and hf:// name a folder, whose tars are found, and split, by name; what is read is kept in the user's own."""
    monkeypatch.setenv("HOME", str(tmp_path))
    data = DataConfig(shards="s3://bucket/asl/", remote=["s3"], cache_dir="~/kept")
    for split in ("train", "val"):
        assert open_sources(data, split).fingerprint == open_shards(packed, split).fingerprint
    assert str(open_sources(data, "val").shards[0]) == "s3://bucket/asl/val-000000.tar"
    open_sources(data, "val").read(0, "mp4")
    assert any((tmp_path / "kept").iterdir())


def test_short_answer_of_a_store_is_noticed(store: None, packed: Path, tmp_path: Path) -> None:
    """Fewer bytes than were asked for, without an error of the backend's, are asked for again and then refused."""
    size_bytes = (packed / "train-000000.tar").stat().st_size
    far = RemoteShard("s3://bucket/asl/train-000000.tar", DiskCache(tmp_path, 1000))
    with pytest.raises(UserError, match="in 2 attempts .* 20 bytes came of 30"):
        far.read(size_bytes - 20, 30, 0)
    assert not list(tmp_path.iterdir())


def test_latents_from_afar_are_refused(store: None, tmp_path: Path) -> None:
    """They are mapped from a local disk."""
    cached = make_cached(tmp_path / "cached")
    open_shards(cached, "train")
    for path in cached.iterdir():
        MemoryFileSystem().pipe_file(f"/bucket/latents/{path.name}", path.read_bytes())
    with pytest.raises(UserError, match="s3://bucket/latents/train-000000.tar holds latents, .* copy the shards"):
        open_sources(DataConfig(shards="s3://bucket/latents/", remote=["s3"]), "train")


class Stripped:
    """A store that takes its addresses with their scheme, as those of s3 and hf do."""

    def __init__(self, store: Any) -> None:
        self.store = store

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(address: str, *args: Any, **kwargs: Any) -> Any:
            answer = getattr(self.store, name)(address.removeprefix("s3://"), *args, **kwargs)
            return [path.lstrip("/") for path in answer] if name == "ls" else answer

        return call


def test_local_shards_need_none_of_it(packed: Path) -> None:
    """A fresh process that reads a batch of local clips has imported no client."""
    code = (
        "import sys\n"
        "from toolkit.config import DataConfig\n"
        "from toolkit.data.clips import ClipSettings\n"
        "from toolkit.data.index import open_sources\n"
        "from toolkit.data.loader import make_loader\n"
        f"index = open_sources(DataConfig(shards={str(packed)!r}), 'train')\n"
        "next(make_loader(index, index.order(0), ClipSettings(3, 24, 32), start_step=0, stop_step=1, global_batch=1, "
        "micro_batch=1))\n"
        "assert not {'aiohttp', 's3fs', 'huggingface_hub', 'fsspec.implementations.http', 'braceexpand'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_resumed_remote_run_equals_the_tail(server: Server, data: DataConfig) -> None:
    """Starting at a later step gives what an uninterrupted run reads there."""
    index = open_sources(data, "train")
    assert same(run(index, start=4)[0], run(index)[0][16:])
