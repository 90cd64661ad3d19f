"""The ledger is the one state of a run's bad clips. Run: pytest tests/run/test_ledger.py"""

import json
import multiprocessing
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.launching import RECIPE, adapter_bytes, read_numbers, train_here
from toolkit.config import load_config
from toolkit.data.index import open_shards
from toolkit.data.loader import Substitution
from toolkit.engine.world import World
from toolkit.errors import UserError
from toolkit.run.doctor import examine
from toolkit.run.evaluate import load_held_out
from toolkit.run.ledger import NAME, Ledger, bad_limit, cut_ledger

ALONE = World(0, 1, torch.device("cpu"))


def row(position: int, key: str, shard: str = "train-0.tar") -> Substitution:
    return Substitution(position, key, shard, "checksum differs", "another")


def read(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / NAME).read_text().splitlines()]


def _note(run: Path, rank: int) -> None:
    ledger = Ledger(run, 100, 1)
    for i in range(200):
        ledger.note([row(4 * i + rank, "k" * (1 + i % 50)), row(4 * i + rank, "second")])


def test_rows_of_several_ranks_do_not_mix(tmp_path: Path) -> None:
    """Four processes that append at once: every row is whole, and there once."""
    with multiprocessing.get_context("fork").Pool(4) as pool:
        pool.starmap(_note, [(tmp_path, rank) for rank in range(4)])
    rows = [(entry["position"], entry["key"]) for entry in read(tmp_path)]
    assert len(rows) == len(set(rows)) == 1600


def test_resume_cuts_to_where_it_starts(tmp_path: Path) -> None:
    """Rows before the position stay, as bytes; those after it go, and so does one that a kill tore."""
    cut_ledger(tmp_path, 8)
    assert not (tmp_path / NAME).exists()
    Ledger(tmp_path, 100, 1).note([row(9, "a"), row(3, "b"), row(8, "c"), row(7, "é")])
    kept = [line for line in (tmp_path / NAME).read_bytes().splitlines() if b'"b"' in line or b"00e9" in line]
    with (tmp_path / NAME).open("a") as file:
        file.write('{"position": 1, "ke')
    cut_ledger(tmp_path, 8)
    assert (tmp_path / NAME).read_bytes().splitlines() == kept and len(kept) == 2
    cut_ledger(tmp_path, 0)
    assert read(tmp_path) == []


@pytest.mark.parametrize("torn", ['{"position": 1, "ke{"position": 2}', '{"position": 2}', "", "[]", "\udcff"])
def test_a_torn_row_is_named(tmp_path: Path, torn: str) -> None:
    """In the midst of the file no kill of ours leaves one: file and line are told, and nothing is dropped in silence."""
    ledger = Ledger(tmp_path, 100, 1)
    ledger.note([row(1, "a")])
    with (tmp_path / NAME).open("ab") as file:
        file.write(f"{torn}\n".encode("utf-8", "surrogateescape"))
    ledger.note([row(3, "b")])
    before = (tmp_path / NAME).read_bytes()
    for read_ledger in (lambda: cut_ledger(tmp_path, 8), lambda: ledger.refuse_too_many(ALONE)):
        with pytest.raises(UserError, match="substituted.jsonl holds a torn line, b.*; remove that line"):
            read_ledger()
    assert (tmp_path / NAME).read_bytes() == before


def test_bound_is_on_the_different_clips_of_the_whole_file(tmp_path: Path) -> None:
    """The same clip again is one; clips of other ranks and of before the resume count; one bad clip is always allowed."""
    before, ledger, other = (Ledger(tmp_path, 40, 0.05) for _ in range(3))
    assert ledger.allowed == 2 == bad_limit(0.05, 59) and bad_limit(0, 1000) == 1
    before.note([row(0, "a"), row(0, "a")])
    for position in range(1, 30):
        ledger.note([row(position, "a")])
        ledger.refuse_too_many(ALONE)
    other.note([row(30, "a", "train-1.tar")])  # the same name in another shard is another clip
    ledger.refuse_too_many(ALONE)
    other.note([row(31, "b")])
    with pytest.raises(
        UserError, match=r"^3 of 40 clips are bad, allowed are 2 \(a in train-0.tar: .*\), see .* or raise"
    ) as caught:
        ledger.refuse_too_many(ALONE)
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
    """Three bad clips where two are allowed: the run stops, and stops there again when it is resumed, with one ledger."""
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
    assert len(read_numbers(tmp_path / "broken")) == 3
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
