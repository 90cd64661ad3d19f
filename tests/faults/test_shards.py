"""Cut, flipped, half-written and hostile shards are found and named. Run: pytest tests/faults/test_shards.py

T10, T11, T17, T19 and T20; `make faults` runs the long form.
"""

import json
import multiprocessing
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from tests.data.hostile import SETTINGS, build_corpus, clip, members, write_tar
from tests.faults.conftest import Faults
from toolkit.authoring.check import check
from toolkit.authoring.repair import repair
from toolkit.data.clips import load_cached, load_clip
from toolkit.data.format import BadSample, Member, SampleRow, index_path, load_index, read_member
from toolkit.data.index import open_shards
from toolkit.data.latents import LatentsReader, pack_latents
from toolkit.data.tar import walk_tar
from toolkit.data.video import VideoError, probe, read_frames
from toolkit.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
HANG_S = 5


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tar of six real clips, with its index; read only."""
    parts = [
        part for i in range(6) for part in members(f"clip{i}", clip(frames=5 + i), frames=5 + i, source=f"{i}.mp4")
    ]
    tar = write_tar(tmp_path_factory.mktemp("shard") / "train-000000.tar", parts)
    load_index(tar)
    return tar


def ends(tar: Path) -> tuple[list[int], int]:
    """Offsets of all headers, and the end of the last member."""
    entries = list(walk_tar(tar))
    return [entry.header_offset for entry in entries], entries[-1].end


def survive(task: Callable[[int], bool], items: Sequence[int]) -> int:
    """Run a task on each item in child processes and count those that it passes; a crash or a hang passes nothing."""
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(2, context) as pool:
        futures: list[Future[bool]] = [pool.submit(_within_limit, task, item) for item in items]
        return sum(_result(future) for future in futures)


def _within_limit(task: Callable[[int], bool], item: int) -> bool:
    signal.alarm(HANG_S)  # ends this process where it hangs, in a library too
    passed = task(item)
    signal.alarm(0)
    return passed


def _result(future: Future[bool]) -> bool:
    try:
        return future.result()
    except BrokenProcessPool:
        return False


def test_truncated_tar(shard: Path, tmp_path: Path, faults: Faults) -> None:
    """Every cut is found at start, with its old index and without; what is whole before it is saved, the rest is named."""
    data, (headers, end) = shard.read_bytes(), ends(shard)
    draws = random.Random(0)
    cuts = [*headers, end, end + 512, end + 1023]
    cuts += [draws.randrange(end + 1024) for _ in range(faults.choose(short=12, long=200))]
    faults.begin("T10 truncated tar", len(cuts))
    passed = sum(_cut_is_found(shard, data[:cut], tmp_path / str(i)) for i, cut in enumerate(cuts))
    faults.end(passed)


def _cut_is_found(shard: Path, data: bytes, folder: Path) -> bool:
    folder.mkdir()
    tar = folder / shard.name
    tar.write_bytes(data)
    refused = []
    for open_tar in (load_index, lambda tar: open_shards(tar.parent, "train")):
        message = refusal_of(open_tar, tar)
        refused.append(tar.name in message and ("offset" in message or "not a plain tar" in message))
    refused += [fault.offset is not None for fault in check(folder).faults]
    shutil.copy(index_path(shard), index_path(tar))
    for open_tar in (load_index, lambda tar: open_shards(tar.parent, "train")):
        refused.append(f"{tar.name} has {len(data)} bytes" in refusal_of(open_tar, tar))
    lost = {
        row.key for row in load_index(shard).samples if any(place(m).stop > len(data) for m in row.members.values())
    }
    named = {fault.key for fault in check(folder).faults} - {None}
    report = repair(folder, folder.with_name(f"{folder.name}_out"))
    told = {fault.key for fault in report.lost} - {None}
    saved = [row.key for path in report.out.glob("*.tar") for row in load_index(path).samples]
    kept = [row.key for row in load_index(shard).samples if row.key not in lost]
    return all(refused) and named == told == lost and saved == kept and not report.faults


def place(member: Member) -> range:
    return range(member.offset, member.offset + member.size_bytes)


def refusal_of(action: Callable[[Path], object], path: Path) -> str:
    """The sentence of the UserError that an action ends in; empty where it ends in none."""
    try:
        action(path)
    except UserError as error:
        return str(error)
    return ""


def test_flips_in_a_tar(shard: Path, faults: Faults) -> None:
    """One flipped bit: its member, and no other, is refused on reading; a check finds it wherever it is."""
    bits = random.Random(1).sample(range(8 * shard.stat().st_size), faults.choose(short=60, long=1000))
    faults.begin("T11 flips in a tar", len(bits))
    faults.end(survive(partial(_flip_in_tar, shard), bits))


def _flip_in_tar(shard: Path, bit: int) -> bool:
    index = load_index(shard)
    hit = {(row.key, ext) for row in index.samples for ext, m in row.members.items() if bit // 8 in place(m)}
    with tempfile.TemporaryDirectory() as name:
        tar = Path(name) / shard.name
        tar.write_bytes(flip(shard.read_bytes(), bit))
        shutil.copy(index_path(shard), index_path(tar))
        refused = {(row.key, ext) for row in index.samples for ext in row.members if not is_read(tar, row, ext)}
        found = check(Path(name)).faults
    return refused == hit and bool(found) and {key for key, _ in hit} <= {fault.key for fault in found}


def is_read(tar: Path, row: SampleRow, extension: str) -> bool:
    try:
        read_member(tar, row, extension)
    except BadSample:
        return False
    return True


def flip(data: bytes, bit: int) -> bytes:
    flipped = bytearray(data)
    flipped[bit // 8] ^= 1 << bit % 8
    return bytes(flipped)


def test_flips_in_a_video(faults: Faults) -> None:
    """A flipped bit that no checksum stands before: frames of the size it says or a VideoError, no crash, no hang."""
    bits = random.Random(2).sample(range(8 * len(clip())), faults.choose(short=100, long=1000))
    faults.begin("T11 flips in a video", len(bits))
    faults.end(survive(_flip_in_video, bits))


def _flip_in_video(bit: int) -> bool:
    data = flip(clip(), bit)
    try:
        facts = probe(data, "mp4")
        frames_THWC = read_frames(data, [0, 2], "mp4")
        return frames_THWC.dtype == np.uint8 and frames_THWC.shape == (2, facts.height_px, facts.width_px, 3)
    except VideoError:
        return True


def test_leftovers(shard: Path, tmp_path: Path, faults: Faults) -> None:
    """What a kill may leave, put there: the start succeeds, or says what to do, and succeeds once that is done."""
    older = write_tar(tmp_path / "older.tar", members("clip0", clip()))
    load_index(older)
    whole, half = index_path(shard).read_bytes(), index_path(shard).read_bytes()[:900]
    cases: list[tuple[str, bytes, str]] = [  # a file or folder, what it holds, what the error tells to do
        (f"train-000000.index.json.{'0' * 16}.tmp", half, ""),
        (f"train-000000.tar.{'0' * 16}.tmp", shard.read_bytes()[:900], ""),
        ("train-000000.index.json", whole, ""),
        ("train-000000.index.json", half, "delete"),
        ("train-000000.index.json", b"", "delete"),
        ("train-000000.index.json", index_path(older).read_bytes(), "delete"),
        (".packing/plan.json", b"{}", "run the same"),
        (".publishing/plan.json", b"{}", "run the same"),
        (".caching/plan.json", b"{}", "run the same"),
        (".joining/plan.json", b"{}", "run the same"),
    ]
    faults.begin("T17 leftovers, put there", len(cases))
    passed = 0
    for i, (name, data, remedy) in enumerate(cases):
        path = tmp_path / str(i) / name
        path.parent.mkdir(parents=True)
        path.write_bytes(data)
        shutil.copy(shard, tmp_path / str(i))
        message = refusal_of(lambda folder: open_shards(folder, "train"), tmp_path / str(i))
        found = check(tmp_path / str(i)).faults
        if remedy == "delete":
            path.unlink()
        elif remedy:
            shutil.rmtree(path.parent)  # as the command does when it has finished
        starts = len(open_shards(tmp_path / str(i), "train")) == 6
        passed += starts and (remedy in message and bool(found) if remedy else not message and not found)
    faults.end(passed)


def test_decoding_does_not_leak(shard: Path, faults: Faults) -> None:
    """After a warm-up the memory of a process grows by less than 0.3 kB a clip, and its open files do not grow at all.

    Over few clips what the allocator takes is several kB a clip: there 10 are allowed, less than one frame that stays.
    """
    clips, limit_kb = faults.choose(short=600, long=5000), faults.choose(short=10, long=0.3)
    faults.begin("T19 leaks", clips)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        rss_kb, descriptors = pool.submit(_decode_many, shard.parent, clips).result()
    growth_kb = (rss_kb[-1] - rss_kb[0]) / clips
    passed = clips if growth_kb < limit_kb and len(set(descriptors)) == 1 else 0
    faults.end(passed, (growth_kb, set(descriptors)))


def _decode_many(folder: Path, clips: int) -> tuple[np.ndarray, np.ndarray]:
    """Resident memory in kB after each of `clips` decodes, and the number of open files, after a warm-up of half as many."""
    index, process = open_shards(folder, "train"), psutil.Process()
    rss_kb, descriptors = np.ones((2, clips), int)  # now, so that taking notes takes no memory
    for k in range(-(clips // 2), clips):
        load_clip(index, k % len(index), SETTINGS, 0, abs(k))
        if k >= 0:
            rss_kb[k], descriptors[k] = process.memory_info().rss // 1024, process.num_fds()
    return rss_kb, descriptors


def test_cached_clips_of_many_shards(tmp_path: Path, faults: Faults) -> None:
    """A process that may open 128 files reads cached clips out of 200 shards, in any order."""
    shards, draws = 200, faults.choose(short=400, long=4000)
    faults.begin("T19 cached clips of more shards than open files", draws)
    tensors = [torch.ones(1, 5, 4, 6, 8), torch.ones(1, 5, 4, 6, 8), torch.ones(1, 5, 8)]
    latents, facts = pack_latents(*tensors), members("", b"")[1][1]
    for i in range(shards):
        write_tar(tmp_path / f"train-{i:06d}.tar", [(f"{i}.safetensors", latents), (f"{i}.json", facts)])
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        faults.end(*pool.submit(_read_cached, tmp_path, draws).result())


def _read_cached(folder: Path, draws: int) -> tuple[int, list[str]]:
    """How many of so many clips are read, and what was said of the others."""
    index, reader, bad = open_shards(folder, "train"), LatentsReader(), []
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))
    order = random.Random(0)
    for k in range(draws):
        try:
            load_cached(index, k if k < len(index) else order.randrange(len(index)), SETTINGS, 0, k, reader)
        except BadSample as error:
            bad.append(str(error))
    return draws - len(bad), bad[:3]


def test_security_corpus(tmp_path: Path, faults: Faults) -> None:
    """No hostile file executes, takes 200 MB or 5 s, passes a check, or ends in anything but one sentence.

    Its repaired copy is sound, and what is printed of it commands no terminal.
    """
    build_corpus(tmp_path)
    faults.begin("T20 security corpus", len(list(tmp_path.iterdir())))
    command = [sys.executable, "-m", "tests.data.hostile", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout)
    failed = [outcome for outcome in outcomes if not _harmless(outcome)]
    assert len(outcomes) > 150
    faults.end(len(outcomes) - len(failed), failed)


def _harmless(outcome: dict[str, Any]) -> bool:
    message = outcome["message"]
    if outcome["name"].startswith("unread"):  # what nobody reads is no harm
        is_sentence = outcome["error"] == "nothing"
    else:
        is_sentence = outcome["error"] in ("UserError", "BadSample") and 0 < len(message) < 1000 and "\n" not in message
    bounded = outcome["grown_mb"] < 200 and outcome["seconds"] < HANG_S
    noticed = outcome["faults"] > 0 or outcome["name"].startswith(("yaml", "unread"))
    is_plain = outcome["printed"].isascii() and all(line.isprintable() for line in outcome["printed"].splitlines())
    return is_sentence and bounded and noticed and is_plain and not outcome["executed"] and not outcome["left"]
