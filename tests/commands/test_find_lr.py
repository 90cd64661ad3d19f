"""A rate is found on a curve that only the weights change. Run: pytest tests/commands/test_find_lr.py"""

import json
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.find_lr import find_lr as command
from tests.faults.test_checkpoints import fill, small_disk
from tests.launching import RECIPE, train_here
from toolkit.commands import find_lr as module
from toolkit.commands.find_lr import HIGHEST, LOWEST, WORSE, Trial, draw, find_lr, tell, try_rates
from toolkit.config import load_config
from toolkit.data.index import open_sources
from toolkit.errors import UserError
from toolkit.run.rows import read_rows

STEPS = 16


@pytest.fixture(scope="module")
def settings(tiny_run: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Overrides of a run in fp32; its engine is one that find_lr does not use."""
    return tiny_run | {
        "engine.precision": "fp32", "engine.micro_batch": 2, "runs_dir": str(tmp_path_factory.mktemp("rates")),
    }  # fmt: skip


@pytest.fixture(scope="module")
def found(settings: dict[str, Any]) -> dict[str, Any]:
    """What is found for an adapter."""
    return find_lr(str(RECIPE), STEPS, settings | {"name": "lora"})


def losses_of(report: dict[str, Any]) -> list[float]:
    return [loss for _, loss in report["trials"]]


def test_the_rate_rises_by_a_factor_until_the_loss_does(found: dict[str, Any]) -> None:
    """From the lowest, towards the highest, evenly by its logarithm; it ends once the loss is some times the best."""
    rates = [rate for rate, _ in found["trials"]]
    expected = torch.logspace(*torch.tensor([LOWEST, HIGHEST]).log10().tolist(), STEPS, dtype=torch.float64)
    assert rates == pytest.approx(expected[: len(rates)].tolist(), rel=1e-6)
    losses = losses_of(found)
    assert all(loss <= WORSE * min([found["start_loss"], *losses[:i]]) for i, loss in enumerate(losses[:-1]))
    assert len(rates) == STEPS or losses[-1] > WORSE * min(losses)


def test_only_the_weights_change_the_loss(found: dict[str, Any], settings: dict[str, Any]) -> None:
    """At rates that move nothing the loss stays as it began, to a part in ten thousand; later it falls.

    What steps of training itself score on their own clips is hundreds of times as unsteady: none could be read from that.
    """
    still = [loss for rate, loss in found["trials"] if rate < 1e-5]
    assert len(still) >= 3 and still == pytest.approx([found["start_loss"]] * len(still), rel=1e-4)
    assert min(losses_of(found)) < 0.995 * found["start_loss"]
    run = train_here(settings | {"name": "own", "engine.kind": "plain", "optimizer.lr": 1e-6, "schedule.steps": 4})
    own = torch.tensor([row["loss"] for row in read_rows(run / "log.jsonl")])
    assert own.std() / own.mean() > 100 * torch.tensor(still).std() / found["start_loss"]


def test_the_suggestion_is_a_tenth_of_the_lowest(found: dict[str, Any], settings: dict[str, Any]) -> None:
    """Said with its reason, in a file, and as a command that trains with it; the two files do not keep it from starting."""
    rate, loss = min(found["trials"], key=lambda trial: trial[1])
    assert found["lowest"] == {"rate": rate, "loss": loss} and found["suggested"] == pytest.approx(rate / 10, rel=0.05)
    folder = Path(settings["runs_dir"]) / "lora"
    assert json.loads((folder / "find_lr.json").read_text()) == json.loads(json.dumps(found))
    assert sorted(path.name for path in folder.iterdir()) == ["find_lr.json", "find_lr.svg"]
    program, script, *words = shlex.split(found["command"])
    given = dict(zip((word.removeprefix("--") for word in words[::2]), words[1::2], strict=True))
    assert program == "deepspeed" and Path(script).is_file() and given["optimizer.lr"] == f"{found['suggested']:.1e}"
    expected = load_config(RECIPE, settings | {"name": "lora", "optimizer.lr": found["suggested"]})
    assert load_config(given.pop("config"), given) == expected
    assert f"suggested: optimizer.lr {found['suggested']:.1e}, a tenth of that" in tell(found)
    short = {"engine.kind": "plain", "schedule.steps": 1, "optimizer.lr": found["suggested"]}
    assert train_here(settings | short | {"name": "lora"}) == folder


def test_the_same_again(found: dict[str, Any], settings: dict[str, Any]) -> None:
    """To the bit: nothing is carried from one to the next; and whole weights have a rate as well, a lower one.

    Where a run is there already, the command sets it aside: it was trained at another rate.
    """
    config = load_config(RECIPE, settings | {"name": "again", "engine.kind": "plain"})
    trials = [
        trial for trial, _ in zip(try_rates(config, open_sources(config.data, "train"), STEPS), range(6), strict=False)
    ]
    assert trials == [Trial(0.0, found["start_loss"]), *(Trial(*trial) for trial in found["trials"][:5])]
    (Path(settings["runs_dir"]) / "full").mkdir()
    (Path(settings["runs_dir"]) / "full/config.yaml").touch()
    full = find_lr(str(RECIPE), STEPS, settings | {"name": "full", "tuning": "full"})
    assert full["start_loss"] == pytest.approx(found["start_loss"], rel=1e-5)
    assert full["command"].endswith(" --fresh") and "--fresh" not in found["command"]
    assert min(losses_of(full)) < 0.99 * full["start_loss"] and full["suggested"] < found["suggested"]


def test_what_is_still_and_what_explodes(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """No rate that lowers the loss is a sentence, and the curve is there; a loss that is no number ends it."""

    def made(*losses: float) -> None:
        monkeypatch.setattr(module, "try_rates", lambda *_: (Trial(1e-6 * n, loss) for n, loss in enumerate(losses)))

    made(0.1, 0.1, 0.09995, 0.5)
    with pytest.raises(UserError, match="no rate from 1e-06 to 3e-06 lowered the loss, 0.10000 .* by 0.1%"):
        find_lr(str(RECIPE), 10, settings | {"name": "still"})
    report = json.loads((Path(settings["runs_dir"]) / "still/find_lr.json").read_text())
    assert report["suggested"] is None and (Path(settings["runs_dir"]) / "still/find_lr.svg").exists()
    made(0.1)
    with pytest.raises(UserError, match="made the loss no number"):
        find_lr(str(RECIPE), 10, settings | {"name": "still"})
    made(0.1, 0.09, 0.08)  # and then no number: a higher rate will not do
    assert "highest rate" not in tell(find_lr(str(RECIPE), 10, settings | {"name": "still"}))
    monkeypatch.setattr(module, "HIGHEST", 2e-6)
    assert "still falling at the highest rate" in tell(find_lr(str(RECIPE), 10, settings | {"name": "still"}))
    # the rise at the end does not flatten the fall before it
    assert (
        draw(0.1, [Trial(1e-6, 0.1), Trial(1e-3, 0.09), Trial(1e-2, 50.0), Trial(0.1, 0.1)]).count("<circle") == 2 + 2
    )


def test_what_a_run_would_refuse_is_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    """Before any weight is read, and nothing is written."""
    own = settings | {"name": "x", "runs_dir": str(tmp_path)}
    for changes, words in (
        ({"lora.rnak": 3}, "did you mean lora.rank"),
        ({"data.shards": "nowhere"}, "there is no folder nowhere"),
        ({"engine.global_batch": 64}, "training clips"),
        ({"lora.targets": "nothing.*"}, "nothing"),
    ):
        with pytest.raises(UserError, match=words):
            command(str(RECIPE), **own | changes)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("harm", ["full", "read-only"])
def test_a_place_that_takes_no_file_is_refused_first(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: str
) -> None:
    """A full disk, and one that can only be read, though the run's folder is there: not one step is taken."""
    monkeypatch.setattr(module, "try_rates", lambda *_: pytest.fail("begun all the same"))
    with small_disk(tmp_path / "disk") as disk:
        own = settings | {"name": "x", "runs_dir": str(disk)}
        (disk / "x").mkdir()
        if harm == "full":
            fill(disk, 1000)
        else:
            subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(UserError, match=rf"cannot write to {disk}/x: .*; free some space, or choose another"):
            command(str(RECIPE), **own)
        assert not list((disk / "x").iterdir())
