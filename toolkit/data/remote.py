"""Shards on another machine: found, asked for their size, and read by ranges, through fsspec.

Test: pytest tests/data/test_remote.py

Only schemes that the recipe names are read. A network that fails is no bad clip: it is asked again for a minute, and
then stops the run. fsspec and its backends are imported when the first remote shard is met; they keep one client per
process and thread, so nothing of them crosses a fork.
"""

import itertools
import re
import time
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from toolkit.data.disk_cache import DiskCache
from toolkit.errors import UserError, in_one_line

SCHEMES = {"https": "aiohttp", "s3": "s3fs", "hf": "huggingface_hub"}  # and what fsspec reads them through
MAKE_INDEX = "run python shards/check.py FOLDER where the shards are, and put the index files beside the tars"
MAX_INDEX_BYTES = 256 << 20  # of a shard of this machine too
MAX_SHARDS = 100_000
WAITS_S = (1, 2, 4, 8, 16, 32)  # between two attempts
CONNECT_S, SILENCE_S, ANSWER_S = 15, 30, 300  # https: to connect, without a byte, and for a whole answer

T = TypeVar("T")


@dataclass(frozen=True)
class RemoteShard:
    """A tar at an address; str() is the address."""

    address: str
    cache: DiskCache

    @property
    def name(self) -> str:
        return self.address.rpartition("/")[2]

    def __str__(self) -> str:
        return self.address

    def size_bytes(self) -> int:
        """Ask for the size of the tar. Raises UserError."""
        return _size_bytes(self.address, f"{self.address} does not exist; correct the address")

    def read_index(self) -> bytes:
        """Fetch the index beside the tar, anew each time. Raises UserError where it is missing or too large."""
        address = self.address.removesuffix(".tar") + ".index.json"
        size_bytes = _size_bytes(
            address,
            f"{address} does not exist, and a shard is not indexed from afar; {MAKE_INDEX}",
        )
        if size_bytes > MAX_INDEX_BYTES:
            raise UserError(f"{address} has {size_bytes} bytes, allowed are {MAX_INDEX_BYTES}; pack smaller shards")
        return _fetch(address, 0, size_bytes)

    def read(self, offset: int, size_bytes: int, crc32: int) -> bytes:
        """Read a range from the cache, or fetch and keep it. Raises UserError.

        crc32  of what is cached; what was fetched is returned as it came, for the caller to check
        """
        name = f"{self.address} {offset} {size_bytes}"
        data = self.cache.read(name, crc32)
        if data is None:
            data = _fetch(self.address, offset, size_bytes)
            self.cache.write(name, data)
        return data


Shard = Path | RemoteShard


def is_remote(source: str) -> bool:
    """Whether a source is more than a path: anything that WebDataset would take for an address or a command."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*:(//|:)|(pipe|file|https?):", source) is not None


def find_shards(source: str, allowed: Sequence[str], cache: DiskCache) -> list[Shard]:
    """Name the tars of an address, by name: braces are expanded, folders are listed (not over https).

    allowed  data.remote, the schemes that the recipe lets in
    raises   UserError for another scheme, or an address with a password or a query
    """
    scheme = _check_address(source, allowed)
    tars: list[str] = []
    for address in _expand(source):
        if address.endswith(".tar"):
            tars.append(address)
        elif scheme == "https":
            raise UserError(
                f"{address} is no .tar, and https has no folders; name the shards: {address.rstrip('/')}/"
                "train-{000000..000011}.tar"
            )
        else:
            tars += [f"{scheme}://{name}" for name in _list_names(address) if name.endswith(".tar")]
    return [RemoteShard(address, cache) for address in sorted(set(tars))]


def _check_address(source: str, allowed: Sequence[str]) -> str:
    scheme = source.partition(":")[0]
    if scheme not in SCHEMES:
        raise UserError(
            f"{source}: {scheme}: is not read; shards are in a folder of this machine, or at an address of "
            f"{', '.join(SCHEMES)}"
        )
    try:
        parts = urllib.parse.urlsplit(source)
    except ValueError as error:
        raise UserError(f"{source} is no address ({in_one_line(error)}); correct it") from None
    if parts.username or parts.password or parts.query or parts.fragment:
        raise UserError(
            f"{scheme}://{parts.hostname}{parts.path}: an address may hold no password and no query, because it is kept "
            f"with the run; {_TOKENS}"
        )
    if scheme not in allowed:
        raise UserError(f"{source} is on another machine; allow that with --data.remote [{scheme}]")
    return scheme


def _expand(source: str) -> list[str]:
    from braceexpand import braceexpand  # webdataset's own

    if set(re.sub(r"\{[^{}]*\}", "", source)) & {"{", "}"}:
        raise UserError(f"{source}: a brace is not closed, or within another; write train-{{000000..000011}}.tar")
    ranges = re.findall(r"\{(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?\}", source)
    are_short = all(len(number) < 10 for numbers in ranges for number in numbers)
    if are_short and sum(abs(int(last) - int(first)) for first, last, _ in ranges) <= MAX_SHARDS:
        addresses = list(itertools.islice(braceexpand(source, escape=False), MAX_SHARDS + 1))
        if len(addresses) <= MAX_SHARDS:
            return addresses
    raise UserError(f"{source} names more than {MAX_SHARDS} shards; pack larger ones")


def _list_names(address: str) -> list[str]:
    return _persist(address, lambda: _backend(address).ls(address, detail=False), f"{address} does not exist")


def _size_bytes(address: str, missing: str) -> int:
    size_bytes = _persist(address, lambda: _backend(address).info(address).get("size"), missing)
    if size_bytes is None:
        raise UserError(f"the server of {address} does not say its size; serve it as a plain file")
    return size_bytes


def _fetch(address: str, offset: int, size_bytes: int) -> bytes:
    # hf alone reads ahead, by megabytes, where it is not told otherwise
    options = {"cache_type": "none"} if address.startswith("hf:") else {}

    def ask() -> bytes:
        data = _backend(address).cat_file(address, offset, offset + size_bytes, **options)
        if len(data) != size_bytes:
            raise OSError(f"{len(data)} bytes came of {size_bytes}")
        return data

    return _persist(address, ask, f"{address} does not exist any more; put it back")


def _persist(address: str, ask: Callable[[], T], missing: str) -> T:
    """Ask until there is an answer, with growing pauses; what asking again would not mend is raised at once."""
    for wait_s in (*WAITS_S, None):
        try:
            return ask()
        except Exception as error:  # each backend has its own kinds
            # fsspec says of whatever keeps it from an https address that the file is not found, of a timeout nothing
            cause = error.__cause__ if isinstance(error, FileNotFoundError) or not str(error) else None
            fault = cause if isinstance(cause, Exception) else error
        if isinstance(fault, UserError):
            raise fault
        if isinstance(fault, FileNotFoundError):
            raise UserError(missing)
        if isinstance(fault, PermissionError):
            raise UserError(f"{address}: access is refused ({in_one_line(fault)}); {_TOKENS}")
        if wait_s is not None:
            time.sleep(wait_s)
    raise UserError(
        f"{address} could not be read in {len(WAITS_S) + 1} attempts with {sum(WAITS_S)} s of pauses, the last time "
        f"because of {type(fault).__name__}: {in_one_line(fault)}; when it can be reached, start the same command again"
    )


def _backend(address: str) -> Any:
    scheme = address.partition(":")[0]
    try:
        import fsspec

        if scheme == "https":
            return fsspec.filesystem("https", get_client=_open_session, allow_redirects=False)
        return fsspec.filesystem(scheme)
    except ImportError as error:
        raise UserError(
            f"{scheme}:// is read through {SCHEMES[scheme]}, which cannot be imported ({in_one_line(error)}): pip install "
            f"{SCHEMES[scheme]}"
        ) from error


async def _open_session(**_: Any) -> Any:
    import ssl

    import aiohttp

    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(ssl=ssl.create_default_context()),
        timeout=aiohttp.ClientTimeout(total=ANSWER_S, sock_connect=CONNECT_S, sock_read=SILENCE_S),
        headers={"Accept-Encoding": "identity"},  # ranges are of the file, not of its compressed form
        trust_env=True,  # HTTPS_PROXY and ~/.netrc
        raise_for_status=_check_answer,
    )


async def _check_answer(response: Any) -> None:
    """Refuse, before any of it is read, an answer that is not what was asked for."""
    asked = response.request_info.headers.get("Range")
    fault = _find_fault(str(response.url), response.status, asked, response.headers)
    if fault is not None:
        response.close()
        raise fault


def _find_fault(url: str, status: int, asked: str | None, headers: Mapping[str, str]) -> Exception | None:
    if 300 <= status < 400:
        return UserError(
            f"{url} answers with a redirect to {headers.get('Location')}, which is not followed; if you trust that address, "
            "name it in the recipe"
        )
    if status in (404, 410):
        return FileNotFoundError(url)
    if status in (401, 403):
        return PermissionError(f"HTTP {status}")
    if status >= 400:
        return OSError(f"HTTP {status}")
    if asked is None:
        return None
    if status != 206:
        return UserError(
            f"the server of {url} answers a range request with the whole file (HTTP {status}); use a server that knows "
            "ranges, or copy the shards here"
        )
    first, last = map(int, asked.removeprefix("bytes=").split("-"))
    came = headers.get("Content-Range", ""), headers.get("Content-Length")
    if not came[0].startswith(f"bytes {first}-{last}/") or came[1] != str(last - first + 1):
        return OSError(f"bytes {first} to {last} were asked for, {came[0] or 'others'} came, {came[1]} long")
    return None


_TOKENS = (
    "give tokens where the backend looks for them: ~/.netrc for https, AWS_ACCESS_KEY_ID ... for s3, HF_TOKEN for hf"
)
