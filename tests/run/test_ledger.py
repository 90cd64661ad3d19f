"""The ledger is the one state of a run's bad clips. Run: pytest tests/run/test_ledger.py"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.launching import RECIPE, adapter_bytes, read_numbers, train_here
from toolkit.commands.doctor import examine
from toolkit.config import load_config
from toolkit.data.index import open_shards
from toolkit.data.loader import Substitution
from toolkit.engine.world import World
from toolkit.errors import UserError
from toolkit.run.judge import load_held_out
from toolkit.run.ledger import NAME, Ledger, bad_limit, cut_ledger

ALONE = World(0, 1, torch.device("cpu"))


def row(position: int, key: str, shard: str = "train-0.tar") -> Substitution:
    return Substitution(position, key, shard, "checksum differs", "another")


def read(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / NAME).read_text().splitlines()]


def _note_as_rank(rank: int, run: Path, ranks: int) -> None:
    store = torch.distributed.FileStore(str(run / f"store{ranks}"), ranks)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    ledger = Ledger(run / str(ranks), 40, 0.2, World(rank, ranks, torch.device("cpu")))
    for step in range(3):
        own = [row(4 * step + k, f"{step}é{k}") for k in range(4) if k % ranks == rank and (step, k) != (1, 0)]
        try:
            ledger.note(own)
        except UserError as error:
            (run / f"{ranks}.{rank}.txt").write_text(f"step {step}: {error}".replace(f"/{ranks}/", "/"))
    torch.distributed.destroy_process_group()


def test_any_number_of_ranks_keeps_one_ledger(tmp_path: Path) -> None:
    """One, two and three ranks: the same file, byte by byte, by position, and on all ranks the same end at the same step."""
    for ranks in (1, 2, 3):
        (tmp_path / str(ranks)).mkdir()
        torch.multiprocessing.start_processes(_note_as_rank, (tmp_path, ranks), nprocs=ranks, start_method="fork")
    files = {(tmp_path / str(ranks) / NAME).read_bytes() for ranks in (1, 2, 3)}
    assert len(files) == 1 and [entry["position"] for entry in read(tmp_path / "2")] == [0, 1, 2, 3, *range(5, 12)]
    said = [path.read_text() for path in sorted(tmp_path.glob("*.txt"))]
    assert (
        len(said) == 6 and len(set(said)) == 1 and said[0].startswith("step 2: 11 of 40 clips are bad, allowed are 8")
    )


def test_resume_cuts_to_where_it_starts(tmp_path: Path) -> None:
    """Rows before the position stay, as bytes; those after it go, and so does one that a kill tore."""
    cut_ledger(tmp_path, 8)
    assert not (tmp_path / NAME).exists()
    Ledger(tmp_path, 100, 1, ALONE).note([row(9, "a"), row(3, "b"), row(8, "c"), row(7, "é")])
    kept = [line for line in (tmp_path / NAME).read_bytes().splitlines() if b'"b"' in line or b"00e9" in line]
    with (tmp_path / NAME).open("a") as file:
        file.write('{"position": 1, "ke')
    cut_ledger(tmp_path, 8)
    assert (tmp_path / NAME).read_bytes().splitlines() == kept and len(kept) == 2
    cut_ledger(tmp_path, 0)
    assert read(tmp_path) == []


def test_a_bad_clip_that_was_moved_is_the_same_one(tmp_path: Path) -> None:
    """A run may go on where its shards lie elsewhere: counted once more there, too few would be too many."""
    Ledger(tmp_path, 20, 0.1, ALONE).note([row(0, "a", "/here/train-0.tar"), row(1, "b", "/here/train-0.tar")])
    moved = Ledger(tmp_path, 20, 0.1, ALONE)
    moved.note([row(20, "a", "/there/train-0.tar"), row(21, "b", "/there/train-0.tar")])
    assert moved.bad == moved.allowed == 2
    with pytest.raises(UserError, match="3 of 20 clips are bad"):
        moved.note([row(22, "b", "/there/train-1.tar")])


@pytest.mark.parametrize(
    "torn", ['{"position": 1, "ke{"position": 2}', '{"position": 2}', "", "[]", "\udcff", "\0" * 99]
)
def test_a_torn_row_is_named(tmp_path: Path, torn: str) -> None:
    """In the midst of the file no kill of ours leaves one: file and line are told, and nothing is dropped in silence."""
    ledger = Ledger(tmp_path, 100, 1, ALONE)
    ledger.note([row(1, "a")])
    with (tmp_path / NAME).open("ab") as file:
        file.write(f"{torn}\n".encode("utf-8", "surrogateescape"))
    ledger.note([row(3, "b")])
    before = (tmp_path / NAME).read_bytes()
    for read_ledger in (lambda: cut_ledger(tmp_path, 8), lambda: Ledger(tmp_path, 100, 1, ALONE)):
        with pytest.raises(UserError, match="substituted.jsonl holds a torn line, b.*; remove that line"):
            read_ledger()
    assert (tmp_path / NAME).read_bytes() == before


def test_bound_is_on_the_different_clips_of_the_whole_file(tmp_path: Path) -> None:
    """The same clip again is one; clips of before the resume count; one is allowed, but of none."""
    assert bad_limit(0.05, 40) == 2 == bad_limit(0.05, 59) and bad_limit(1e-9, 1000) == 1 and bad_limit(0, 1000) == 0
    Ledger(tmp_path, 40, 0.05, ALONE).note([row(0, "a"), row(0, "a")])
    ledger = Ledger(tmp_path, 40, 0.05, ALONE)
    for position in range(1, 30):
        ledger.note([row(position, "a", "train-1.tar")])  # the same name in another shard is another clip
    with pytest.raises(
        UserError, match=r"^3 of 40 clips are bad, allowed are 2 \(a in train-0.tar: .*\), see .* or raise"
    ) as caught:
        ledger.note([row(31, "b")])
    assert str(tmp_path / NAME) in str(caught.value)


@pytest.fixture
def broken(tiny_run: dict[str, Any], tiny_shards: Path, tmp_path: Path) -> dict[str, Any]:
    """Overrides of a run in this process on shards of which three clips are damaged, so two too many."""
    folder = Path(shutil.copytree(tiny_shards, tmp_path / "shards"))
    index = open_shards(folder, "train")
    for sample in (1, 4, 7):
        with open(str(index.shards[sample]), "r+b") as file:
            file.seek(index.rows[sample].members["mp4"].offset)
            file.write(bytes(64))
    return tiny_run | {
        "name": "broken", "runs_dir": str(tmp_path), "data.shards": str(folder), "data.max_bad_fraction": 0.2,
        "data.workers": 0, "engine.kind": "plain", "schedule.steps": 3, "checkpoint.every_steps": 1,
    }  # fmt: skip


def test_run_stops_at_the_same_step_again(broken: dict[str, Any], tmp_path: Path) -> None:
    """Three bad clips where two are allowed: the run stops, and stops there again when it is resumed, with one ledger.

    Each step's row counts the different bad clips until then.
    """
    ledgers, numbers = [], []
    for _ in range(2):
        with pytest.raises(UserError, match="3 of 10 clips are bad, allowed are 2"):
            train_here(broken)
        ledgers.append(read(tmp_path / "broken"))
        numbers.append(read_numbers(tmp_path / "broken"))
    assert ledgers[0] == ledgers[1] and numbers[0] == numbers[1] and len(numbers[0]) > 0
    positions = [entry["position"] for entry in ledgers[0]]
    assert len({(entry["position"], entry["key"]) for entry in ledgers[0]}) == len(positions)
    train_here(broken | {"data.max_bad_fraction": 0.3})
    counted = read_numbers(tmp_path / "broken", "clips", "bad_clips")
    listed = [(entry["position"], (entry["shard"], entry["key"])) for entry in read(tmp_path / "broken")]
    assert counted == [(n, len({clip for k, clip in listed if k < n})) for n in (4, 8, 12)]
    assert [entry for entry in read(tmp_path / "broken") if entry["position"] <= positions[-1]] == ledgers[0]


def test_run_over_a_mix_resumes_exactly(
    tiny_run: dict[str, Any], tiny_shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Two sources in one run: resumed after two steps, it is the undisturbed one; doctor and evaluation read it."""
    other = tmp_path / "other"
    other.mkdir()
    for path in tiny_shards.glob("val-*"):
        shutil.copy(path, other / path.name.replace("val-", "train-"))
    recipe = tiny_run | {
        "runs_dir": str(tmp_path), "data.shards": None, "data.mix": {str(tiny_shards): 3, str(other): 1},
        "engine.kind": "plain", "data.workers": 0,
    }  # fmt: skip
    folder = train_here(recipe | {"name": "mixed", "schedule.steps": 4})
    numbers, adapter = read_numbers(folder), adapter_bytes(folder, 4)
    shutil.rmtree(folder / "checkpoints/step_000004")
    train_here(recipe | {"name": "mixed", "schedule.steps": 4})
    assert "resuming after step 2" in capfd.readouterr().out
    assert read_numbers(folder) == numbers and adapter_bytes(folder, 4) == adapter
    config = load_config(RECIPE, recipe)
    clips = sum(len(open_shards(folder, "train")) for folder in (tiny_shards, other))
    assert examine(config, ranks=1)["clips"] == clips and load_held_out(config, 1)
