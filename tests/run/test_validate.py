"""The loss on held-out clips watches a run and does not touch it. Run: pytest tests/run/test_validate.py"""

import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from tests.launching import RECIPE, adapter_bytes, launch, read_numbers, train_here
from toolkit.authoring.pack import pack
from toolkit.authoring.synth import synth
from toolkit.config import load_config
from toolkit.data.index import open_shards
from toolkit.data.loader import Batch
from toolkit.diffusion.objective import min_snr_weight
from toolkit.engine.world import init_world
from toolkit.errors import UserError
from toolkit.run.best import Best, are_alike, count_misses, look_of
from toolkit.run.cache import cache_shards
from toolkit.run.checkpoint import best_checkpoint, list_checkpoints
from toolkit.run.job import build_job, is_finished
from toolkit.run.judge import load_held_out
from toolkit.run.rows import read_rows
from toolkit.run.validate import name_overfitting

EVERY = {"validation.every_steps": 1, "validation.clips": 2}


@pytest.fixture(scope="module")
def plain(tiny_run: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Overrides of six steps in fp32 in this process, too fast a rate for the loss to fall throughout."""
    return tiny_run | {
        "engine.kind": "plain", "engine.precision": "fp32", "engine.global_batch": 2, "schedule.steps": 6,
        "model.memory": "fast", "optimizer.lr": 0.1, "checkpoint.keep": 2, "checkpoint.every_steps": 1,
        "runs_dir": str(tmp_path_factory.mktemp("validated")),
    }  # fmt: skip


@pytest.fixture(scope="module")
def validated(plain: dict[str, Any]) -> Path:
    """The folder of that run, validated after every step; read only."""
    return train_here(plain | EVERY | {"name": "validated"})


def read_best(run: Path) -> tuple[int, float]:
    best = json.loads((run / "BEST").read_text())
    return best["step"], best["score"]


def test_training_is_the_same_without_it(plain: dict[str, Any], validated: Path) -> None:
    """Losses, norms and the adapter are those of a run that never looked at the held-out clips, to the bit."""
    run = train_here(plain | {"name": "alone"})
    assert read_numbers(run) == read_numbers(validated)
    assert adapter_bytes(run, 6) == adapter_bytes(validated, 6)


def test_it_is_taken_when_due(plain: dict[str, Any], validated: Path) -> None:
    """Every so many steps and at the end, with the value that a run which takes it at every step has there.

    A step whose loss is the lowest so far is saved, though no checkpoint is due.
    """
    run = train_here(plain | EVERY | {"name": "rarely", "validation.every_steps": 4, "checkpoint.every_steps": 100})
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    wanted = dict(read_numbers(validated, "step", "validation_loss"))
    assert {row["step"]: row.get("validation_loss") for row in rows if "validation_loss" in row} == {
        step: wanted[step] for step in (4, 6)
    }
    assert [folder.name for folder in list_checkpoints(run)] == ["step_000004", "step_000006"]


def test_best_names_the_lowest_and_is_kept(validated: Path) -> None:
    """BEST is the step of the lowest loss, and its checkpoint stays beside the newest two."""
    losses = dict(read_numbers(validated, "step", "validation_loss"))
    best = min(losses, key=losses.__getitem__)
    print(losses)
    assert read_best(validated) == (best, losses[best])
    assert best < 5, "a run whose newest checkpoints are its best shows nothing"
    assert [folder.name for folder in list_checkpoints(validated)] == [f"step_{n:06d}" for n in (best, 5, 6)]
    assert best_checkpoint(validated).name == f"step_{best:06d}"


def test_a_resumed_run_keeps_its_best(plain: dict[str, Any], validated: Path, tmp_path: Path) -> None:
    """Thrown back to the best checkpoint and resumed: the same losses, the same best, and none of the worse is saved."""
    run = Path(shutil.copytree(validated, tmp_path / "validated"))
    for folder in list_checkpoints(run)[1:]:
        shutil.rmtree(folder)
    best = list_checkpoints(run)[0].name
    (run / "LATEST").write_text(f"{best}\n")
    train_here(plain | EVERY | {"name": "validated", "runs_dir": str(tmp_path), "checkpoint.every_steps": 100})
    assert read_numbers(run, "step", "loss", "validation_loss") == read_numbers(
        validated, "step", "loss", "validation_loss"
    )
    assert read_best(run) == read_best(validated)
    assert [folder.name for folder in list_checkpoints(run)] == [best, "step_000006"]


def test_scores_that_are_not_compared_are_told(
    plain: dict[str, Any], validated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A curve that jumps where the clips became others is no loss that rose; where nothing changed nothing is said."""
    shutil.copytree(validated, tmp_path / "validated")
    step, score = read_best(validated)
    told = f"loss {score:.4f} of step {step} is not compared with what comes"
    for changes in ({}, {"validation.clips": 1}):
        train_here(plain | EVERY | {"name": "validated", "runs_dir": str(tmp_path)} | changes)
        assert (told in capsys.readouterr().out) == bool(changes)


def test_patience_ends_a_run(
    plain: dict[str, Any], validated: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Two looks after the best it ends, saved, as far equal to a run without; again ends at once; with more it goes on."""
    best, _ = read_best(validated)
    assert best + 2 < 6, "a run that is over anyway shows nothing"
    overrides = plain | EVERY | {"name": "patient", "runs_dir": str(tmp_path), "validation.patience": 2}
    run = train_here(overrides)
    assert f"none better than step {best}" in capsys.readouterr().out
    assert read_numbers(run) == read_numbers(validated)[: best + 2] and read_best(run) == read_best(validated)
    assert list_checkpoints(run)[-1].name == f"step_{best + 2:06d}"
    train_here(overrides)
    assert "ended early" in capsys.readouterr().out and len(read_numbers(run)) == best + 2
    assert is_finished(load_config(RECIPE, overrides), 10)
    assert not is_finished(load_config(RECIPE, overrides | {"validation.patience": 6}), 10)
    train_here(overrides | {"validation.patience": 6})
    finished = load_config(RECIPE, overrides | {"validation.patience": 6})
    assert is_finished(finished, 10)
    (list_checkpoints(run)[-1] / "state.json").write_bytes(bytes(100))  # as a power cut may leave it
    assert not is_finished(finished, 10)
    assert read_numbers(run) == read_numbers(validated) and "ended early" not in capsys.readouterr().out


def test_patience_counts_looks(plain: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Those of this kind and no steps: a run that never looked, or looked at other clips, has missed none."""
    overrides = plain | {"name": "late", "runs_dir": str(tmp_path), "schedule.steps": 4}
    shutil.rmtree(list_checkpoints(train_here(overrides))[-1])
    looking = overrides | EVERY | {"validation.patience": 2}
    run = train_here(looking)
    assert "ended early" not in capsys.readouterr().out and list_checkpoints(run)[-1].name == "step_000004"
    state = json.loads((list_checkpoints(run)[-1] / "state.json").read_text())
    assert read_best(run)[0] == 4 and state["validation_misses"] == 0
    config = load_config(RECIPE, looking)
    assert state["validation_look"] == look_of(config)
    state["validation_misses"] = 1
    assert count_misses(state, look_of(config)) == 1
    other = look_of(load_config(RECIPE, looking | {"validation.clips": 1}))
    assert count_misses(state, other) == 0
    older = {"validation_by": "loss", "validation_clips": 2, "validation_misses": 1}  # as toolkits before wrote it
    assert (count_misses(older, look_of(config)), count_misses(older, other), count_misses({}, other)) == (1, 0, 0)
    kept = Best(config.validation)
    for step, score in enumerate((0.5, 0.4, None, float("nan"), None, 0.6), start=10):
        assert not kept.is_over
        kept.note(step, score)
    assert kept.is_over and (kept.step, kept.misses) == (11, 2)


LOSS, PSNR = {"validation.every_steps": 1}, {"validation.figures_every_steps": 1, "validation.best_by": "psnr"}


@pytest.mark.parametrize(
    ("looks", "name", "value", "counts"),
    [
        (LOSS, "validation.clips", 3, True),
        (LOSS, "diffusion.lognormal_mean", 1.0, True),
        (LOSS, "data.stride", "[2,4]", True),
        (LOSS, "model.unet_revision", "0123456789", True),
        (LOSS, "model.blocks", "stock", False),
        (LOSS, "validation.gaps", "[8]", False),
        (LOSS, "validation.sampler_steps", 3, False),
        (LOSS, "validation.every_steps", 2, False),
        (LOSS, "diffusion.min_snr_gamma", 5.0, False),
        (PSNR, "validation.best_by", "psnr_moving", True),
        (PSNR, "validation.best_by", "loss", True),
        (PSNR, "validation.clips", 3, True),
        (PSNR, "validation.gaps", "[8,4,16]", True),
        (PSNR, "validation.gaps", "[4,20]", True),  # clips of fewer frames are passed over
        (PSNR, "validation.gaps", "[4,8,16]", False),  # between the two
        (PSNR, "validation.sampler", "lcm", True),
        (PSNR, "validation.sampler_steps", 3, True),
        (PSNR, "validation.min_guidance", 2, True),
        (PSNR, "validation.max_guidance", 2, True),
        (PSNR, "data.height", 64, True),
        (PSNR, "validation.patience", 3, False),
        (PSNR, "optimizer.lr", 0.2, False),
    ],
)
def test_a_score_belongs_to_what_was_looked_at(
    plain: dict[str, Any], looks: dict[str, Any], name: str, value: Any, counts: bool
) -> None:
    """What changes a score makes it another look, and nothing else does."""
    overrides = plain | {"name": "look", "validation.every_steps": 1, "validation.gaps": "[4,16]"} | looks
    look, other = (look_of(load_config(RECIPE, overrides | changes)) for changes in ({}, {name: value}))
    assert are_alike(json.loads(json.dumps(look)), other) is not counts


@pytest.mark.parametrize("looks", [LOSS, PSNR])
def test_a_score_belongs_to_its_clips(
    plain: dict[str, Any], tiny_shards: Path, tmp_path: Path, looks: dict[str, Any]
) -> None:
    """The same held-out clips elsewhere are the same look; others there are another one, more to train on are not."""
    shards = Path(shutil.copytree(tiny_shards, tmp_path / "shards"))

    def read_look() -> dict[str, Any]:
        return look_of(load_config(RECIPE, plain | looks | {"name": "look", "data.shards": str(shards)}))

    look = look_of(load_config(RECIPE, plain | looks | {"name": "look"}))
    assert read_look() == look
    for path in tiny_shards.glob("val-000000.*"):
        shutil.copy(path, shards / path.name.replace("val-000000", "train-000009"))
    assert are_alike(read_look(), look)
    for path in tiny_shards.glob("train-000000.*"):
        shutil.copy(path, shards / path.name.replace("train-000000", "val-000009"))
    assert not are_alike(read_look(), look)


def test_a_gap_that_is_the_only_one_is_the_first(plain: dict[str, Any]) -> None:
    """Where a recipe names none it is judged at the gap that it trains on."""
    overrides = plain | PSNR | {"name": "look", "data.frames": 3, "data.stride": "[4,8]"}
    named = load_config(RECIPE, overrides | {"validation.gaps": "[8]"})
    assert look_of(load_config(RECIPE, overrides)) == look_of(named)


def test_held_out_clips_that_are_too_short_are_left_out(
    plain: dict[str, Any], tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each clip that is scored is another one that fills a window; where none does it is said before weights are read."""
    synth(tmp_path / "videos", clips=6, seconds=0.2, size=32, seed=3, kind="motion")
    pack(tmp_path / "videos", tmp_path / "short", holdout=0.5, min_frames=5)
    assert 0 < max(row.clip.frames for row in open_shards(tmp_path / "short", "val").rows) < 9
    shards = Path(shutil.copytree(tiny_shards, tmp_path / "shards"))
    for path in (tmp_path / "short").glob("val-000000.*"):
        shutil.copy(path, shards / path.name.replace("val-000000", "val-000001"))
        shutil.move(shards / path.name, shards / path.name.replace("val-000000", "val-000002"))
        shutil.copy(path, shards / path.name)  # the short ones come first
    held_out = open_shards(shards, "val")
    overrides = plain | EVERY | {"name": "mixed", "data.shards": str(shards), "data.frames": 9, "data.stride": 1}
    config = load_config(RECIPE, overrides | {"validation.clips": 10})
    validator = build_job(config, init_world(join=False), fresh=False).validator
    long = [row.key for row in held_out.rows if row.clip.frames >= 9]
    scored = [validator.batches[0][ordinal].keys[0] for ordinal in range(validator.clips[0])]
    assert scored == long and 0 < len(long) < len(held_out)
    monkeypatch.setattr("toolkit.run.job.load_base", lambda *_, **__: 1 / 0)
    for path in shards.glob("val-000002.*"):
        path.unlink()
    with pytest.raises(
        UserError, match="no held-out clip of .* has the 9 frames that data.frames 9 at data.stride 1 need"
    ):
        train_here(overrides | {"name": "none_fits"})


def test_patience_without_looks_is_refused(plain: dict[str, Any]) -> None:
    """Looks that never come, of the loss or of figures, are told with the field to set."""
    for changes, field in (
        ({"validation.patience": 2}, "give every_steps"),
        ({"validation.best_by": "psnr"} | EVERY, "give figures_every_steps"),
    ):
        with pytest.raises(UserError, match=field):
            load_config(RECIPE, plain | {"name": "blind"} | changes)


def test_clips_are_those_that_evaluate_scores(plain: dict[str, Any]) -> None:
    """The centre windows of the same held-out clips, whole and never mirrored, whatever training does to its own."""
    config = load_config(RECIPE, plain | EVERY | {"name": "centred", "data.flip": True, "data.random_crop": 0.5})
    validator = build_job(config, init_world(join=False), fresh=False).validator
    for ordinal, clip in enumerate(load_held_out(config, 2)):
        assert np.array_equal(validator.batches[0][ordinal].frames_BTHWC[0], clip.frames_THWC)


@pytest.mark.parametrize(("augmentation", "encoded"), [(0.0, 2 * 2), (0.02, 2 * 2 * 6 * 2)])
def test_clips_are_encoded_once(plain: dict[str, Any], augmentation: float, encoded: int) -> None:
    """Of both splits, whatever the levels and looks, to the same losses; where noise is laid on the pixels, each time."""
    changes = {"name": "encoded_once", "diffusion.noise_augmentation": augmentation}
    job = build_job(load_config(RECIPE, plain | EVERY | changes), init_world(join=False), fresh=False)
    validator, encoder, calls = job.validator, job.framer.base.image_encoder, []

    def score(batch: Batch) -> list[float]:
        levels = [torch.full((1,), sigma) for sigma in validator.sigmas]
        return [validator.framer.compute_loss(batch, sigma_B=sigma_B).loss_B.item() for sigma_B in levels]

    wanted = score(validator.batches[0][0])
    with encoder.register_forward_hook(lambda *_: calls.append(1)):
        looks = [validator.measure(lambda: None) for _ in range(2)]
    assert looks[0] == looks[1] and len(calls) == encoded
    assert score(validator.batches[0][0]) == wanted


def test_min_snr_weighs_gradients_alone(plain: dict[str, Any]) -> None:
    """What training lowers is a clip's loss times the weight of its noise level; what is told of it is not, nor held-out."""
    found = []
    for i, gamma in enumerate((None, 0.01)):
        overrides = plain | EVERY | {"name": f"weighed{i}", "diffusion.min_snr_gamma": gamma}
        config = load_config(RECIPE, overrides)
        job = build_job(config, init_world(join=False), fresh=False)
        scores = job.framer.compute_loss(job.validator.batches[0][0])
        found.append((scores, job.framer.weigh(scores), job.validator.measure(lambda: None).held_out))
    (plain_scores, plain_loss, plain_held_out), (scores, loss, held_out) = found
    assert torch.equal(scores.loss_B, plain_scores.loss_B) and held_out == plain_held_out
    weight_B = min_snr_weight(scores.sigma_B, config.diffusion.loss_space, 0.01)
    assert weight_B < 0.9
    torch.testing.assert_close(plain_loss, plain_scores.loss_B.mean())
    torch.testing.assert_close(loss, (plain_scores.loss_B * weight_B).mean())


def test_min_snr_trains_otherwise(plain: dict[str, Any]) -> None:
    """It reaches the optimizer: the same first loss, and another gradient."""
    runs = [
        train_here(plain | {"name": f"snr{i}", "schedule.steps": 1, "diffusion.min_snr_gamma": gamma})
        for i, gamma in enumerate((None, 0.01))
    ]
    (without,), (weighed,) = (read_numbers(run, "loss", "zero_baseline", "grad_norm") for run in runs)
    assert without[:2] == weighed[:2] and weighed[2] < 0.9 * without[2]


def test_cached_clips_give_the_same_figure(
    plain: dict[str, Any], validated: Path, tiny_shards: Path, tiny_base: Path, tmp_path: Path
) -> None:
    """Held-out clips as cached latents are scored as their videos are, to fp32 rounding."""
    cache_shards(str(tiny_shards), str(tiny_base), str(tmp_path / "cached"), precision="fp32", height=32, width=32)
    run = train_here(plain | EVERY | {"name": "cached", "data.shards": str(tmp_path / "cached"), "schedule.steps": 2})
    found, wanted = (read_numbers(folder, "validation_loss")[0][0] for folder in (run, validated))
    assert found == pytest.approx(wanted, rel=1e-4)


@pytest.mark.launch
def test_ranks_share_the_clips_out(plain: dict[str, Any], tiny_shards: Path, tmp_path: Path) -> None:
    """Two ranks find for three clips the figure of one rank, though one of them has a clip less to score."""
    shards = Path(shutil.copytree(tiny_shards, tmp_path / "shards"))
    for path in tiny_shards.glob("train-000000.*"):
        shutil.copy(path, shards / path.name.replace("train-000000", "val-000001"))
    changes = {"validation.clips": 3, "schedule.steps": 2, "optimizer.lr": 0.01, "data.shards": str(shards)}
    one = train_here(plain | EVERY | changes | {"name": "one"})
    done = launch("torchrun", 2, plain | EVERY | changes | {"name": "two", "engine.kind": "fsdp2"})
    assert done.returncode == 0, done.stderr
    found, wanted = (read_numbers(run, "validation_loss") for run in (one.with_name("two"), one))
    assert [loss for (loss,) in found] == pytest.approx([loss for (loss,) in wanted], rel=1e-6)


def test_no_held_out_clips_are_told_before_the_weights_are_read(
    plain: dict[str, Any], tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards without a validation split are refused at the start, and only where they are asked for."""
    monkeypatch.setattr("toolkit.run.job.load_base", lambda *_, **__: 1 / 0)
    shards = Path(shutil.copytree(tiny_shards, tmp_path / "shards"))
    assert len(open_shards(shards, "val")) == 2
    for path in shards.glob("val-*"):
        path.unlink()
    with pytest.raises(UserError, match="val"):
        train_here(plain | EVERY | {"name": "none", "data.shards": str(shards)})
    assert not (Path(plain["runs_dir"]) / "none").exists()
    with pytest.raises(ZeroDivisionError):
        train_here(plain | {"name": "none", "data.shards": str(shards)})


def test_levels_are_scored_apart(plain: dict[str, Any], validated: Path) -> None:
    """The loss is the mean over six noise levels, each beside its zero baseline; more noise is easier to tell from none."""
    for row in read_rows(validated / "log.jsonl"):
        by_sigma, zero = row["validation_by_sigma"], row["validation_zero_by_sigma"]
        assert len(by_sigma) == len({*by_sigma.values()}) == 6 and by_sigma.keys() == zero.keys()
        assert np.mean([*by_sigma.values()]) == pytest.approx(row["validation_loss"], rel=1e-6)
    config = load_config(RECIPE, plain | EVERY | {"name": "levels"})
    job = build_job(config, init_world(join=False), fresh=False)
    batch, sigma = job.validator.batches[0][0], job.validator.sigmas[2]
    assert 1 / 3 < (job.framer.sigma_quantiles(torch.linspace(0.01, 0.99, 99)) < sigma).float().mean() < 1 / 2
    scores = job.validator.framer.compute_loss(batch, sigma_B=torch.full((1,), sigma))
    assert scores.sigma_B.item() == pytest.approx(sigma)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="streams are a GPU's; make gpu runs this on one")
def test_levels_wait_for_nothing(plain: dict[str, Any]) -> None:
    """While the card is still busy with what came before, each level has the noise that it has on an idle one."""
    job = build_job(load_config(RECIPE, plain | EVERY | {"name": "busy"}), init_world(join=False), fresh=False)
    assert job.validator is not None
    idle = job.validator.measure(lambda: None)
    torch.cuda._sleep(2_000_000_000)  # cycles: about a second
    assert job.validator.measure(lambda: None) == idle


def test_clips_trained_on_are_scored_alike(
    plain: dict[str, Any], validated: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    """Where the held-out clips are those of training, the two losses are one, and else they are not."""
    assert all(held_out != seen for held_out, seen in read_numbers(validated, "validation_loss", "seen_loss"))
    shards = Path(shutil.copytree(tiny_shards, tmp_path / "shards"))
    for path in shards.glob("val-*"):
        path.unlink()
    for path in tiny_shards.glob("train-000000.*"):
        shutil.copy(path, shards / path.name.replace("train", "val"))
    run = train_here(plain | EVERY | {"name": "same", "data.shards": str(shards), "schedule.steps": 2})
    for held_out, seen in read_numbers(run, "validation_loss", "seen_loss"):
        assert held_out == seen


def test_overfitting_has_its_name() -> None:
    """Held-out clips worse for three looks while those trained on get better; not sooner, and not where both get worse."""
    falls = [(10, 0.5, 0.50), (20, 0.4, 0.41), (30, 0.41, 0.35), (40, 0.42, 0.30)]
    assert name_overfitting(falls) is None and name_overfitting([]) is None
    said = name_overfitting([*falls, (50, 0.45, 0.2)])
    assert said is not None and "since step 20" in said and "0.4100 to 0.2000" in said and "0.4000 to 0.4500" in said
    assert name_overfitting([*falls, (50, 0.45, 0.6)]) is None
    assert name_overfitting([*falls, (50, 0.39, 0.2)]) is None
    broken = (50, float("nan"), float("nan"))  # is no look
    assert name_overfitting([*falls, broken]) is None and name_overfitting([broken, *falls]) is None
    assert name_overfitting([broken, *falls, (60, 0.45, 0.2)]) == said


def test_losses_of_other_clips_are_not_compared(plain: dict[str, Any], tmp_path: Path) -> None:
    """With more clips to look at, a run looks for overfitting from there on; with the same ones, from the start."""
    overrides = plain | EVERY | {"name": "more", "runs_dir": str(tmp_path), "checkpoint.every_steps": 2}
    for looks, steps in (({}, 4), ({"validation.clips": 3}, 6)):
        given: list[list[int]] = []
        with mock.patch(
            "toolkit.run.monitor.name_overfitting", lambda looks, to=given: to.append([s for s, *_ in looks])
        ):
            for total in (steps - 2, steps):
                train_here(overrides | looks | {"schedule.steps": total}, allow_change=True)
        assert given[-1] == ([1, 2, 3, 4] if not looks else [5, 6])


def test_overfitting_is_said_once(plain: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """One clip, learned by heart at a fast rate: one sentence that names the step of the best, also after resuming."""
    overrides = plain | EVERY | {
        "name": "heart", "runs_dir": str(tmp_path), "schedule.steps": 12, "optimizer.lr": 0.02, "diffusion.loss_space": "v",
        "checkpoint.every_steps": 6,
    }  # fmt: skip
    with mock.patch("toolkit.run.monitor.name_overfitting", lambda looks: "overfitting" if len(looks) > 3 else None):
        train_here(overrides)
        shutil.rmtree(tmp_path / "heart/checkpoints/step_000012")
        train_here(overrides)
    assert capsys.readouterr().out.splitlines().count("overfitting") == 1
