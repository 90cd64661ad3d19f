"""What a checkpoint holds, which are kept, and what is refused. Run: pytest tests/run/test_checkpoint.py"""

import errno
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.checkpoints import ABOUT, KEEP_ALL, STATE, UNET, is_whole, make_tensors, make_unet, names, save, submission
from toolkit.config import CheckpointConfig
from toolkit.engine.plain import State
from toolkit.errors import UserError
from toolkit.model.formats import read_metadata
from toolkit.run.checkpoint import (
    best_checkpoint,
    check_space,
    find_best,
    list_checkpoints,
    load_checkpoint,
    newest_good,
    refuse_misfit,
    replace_text,
    save_checkpoint,
)
from toolkit.run.manifest import PACKAGES, find_fault
from toolkit.run.writer import CheckpointWriter


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    """Every tensor bit for bit, the step and the run's own facts; the adapter beside them is the masters."""
    folder = save(tmp_path, 7)
    state, tensors = load_checkpoint(folder)
    wanted = make_tensors(7)
    assert state == {"step": 7} | STATE | {
        "validation_by": "loss",
        "validation_score": None,
        "validation_clips": 8,
    } and is_whole(folder)
    assert read_metadata(folder) == ABOUT | {"step": 7}
    adapter = load_file(folder / "adapter_model.safetensors")
    masters = [saved["master"] for saved in wanted.values()]
    assert sorted(t.sum().item() for t in adapter.values()) == sorted(t.sum().item() for t in masters)
    assert (tmp_path / "LATEST").read_text() == "step_000007\n"


def test_manifest_says_what_wrote_it(tmp_path: Path) -> None:
    """Run, step, time and versions, for whoever meets the folder elsewhere."""
    manifest = json.loads((save(tmp_path / "mine", 7) / "manifest.json").read_text())
    assert (manifest["run"], manifest["step"]) == ("mine", 7) and manifest["created"].startswith("20")
    assert manifest["versions"]["torch"] == torch.__version__
    assert manifest["versions"].keys() == {"python", *PACKAGES} and {"torch", "diffusers", "av"} <= {*PACKAGES}


def lose(file: Path) -> None:
    file.unlink()


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def append(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\n")


def swap_for_a_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


@pytest.mark.parametrize("harm", [lose, cut, append, swap_for_a_pipe])
@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "adapter_config.json", "optimizer.safetensors", "state.json", "manifest.json"]
)
def test_a_changed_file_is_noticed(tmp_path: Path, harm: Callable[[Path], None], name: str) -> None:
    """Whatever happened to whichever file, the manifest among them: it is named."""
    folder = save(tmp_path, 7)
    assert find_fault(folder) is None
    harm(folder / name)
    assert name in str(find_fault(folder))


def rewrite(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def harm(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        change(manifest)
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")

    return harm


@pytest.mark.parametrize(
    ("harm", "fault"),
    [
        (lambda folder: (folder / "note.txt").touch(), "note.txt is no part of it"),
        (rewrite(lambda m: m.update(step=8)), "manifest.json differs"),
        (rewrite(lambda m: m["files"].pop("state.json")), "manifest.json differs"),
        (rewrite(lambda m: m.pop("sha256")), "cannot be read"),
        (lambda folder: (folder / "manifest.json").write_text("[1]"), "cannot be read"),
        (lambda folder: (folder / "manifest.json").write_text("[" * 100_000), "cannot be read"),
        (lambda folder: (folder / "manifest.json").write_bytes(b"\xff"), "cannot be read"),
    ],
)
def test_a_changed_folder_is_noticed(tmp_path: Path, harm: Callable[[Path], object], fault: str) -> None:
    """A file too many, and a manifest that was edited, even into one that agrees with the files."""
    folder = save(tmp_path, 7)
    harm(folder)
    assert fault in str(find_fault(folder))


def test_a_renamed_checkpoint_is_noticed(tmp_path: Path) -> None:
    """The state of step 7 under the name of step 9 would be taken as two steps that never were."""
    folder = save(tmp_path, 7)
    os.replace(folder, folder.with_name("step_000009"))
    assert find_fault(folder.with_name("step_000009")) == "it is that of step 7 under another name"
    os.replace(folder.with_name("step_000009"), tmp_path / "handed over")
    assert find_fault(tmp_path / "handed over") is None


def test_the_newest_whole_one_is_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bad ones are named and, by the run itself, set aside; folders of other names are nobody's checkpoint."""
    for step in (2, 4, 6):
        save(tmp_path, step)
    cut(tmp_path / "checkpoints/step_000006/state.json")
    for name in ("step_000008.tmp", "step_x", "step_9", "notes"):
        (tmp_path / "checkpoints" / name).mkdir()
    (tmp_path / "checkpoints/step_000010").touch()
    good = tmp_path / "checkpoints/step_000004"
    assert newest_good(tmp_path, set_aside=False) == good and names(tmp_path)[-1] == "step_000006"
    assert newest_good(tmp_path, set_aside=True) == good and names(tmp_path)[-1] == "step_000004"
    said = capsys.readouterr().err
    assert said.count("step_000006 is damaged: state.json differs") == 2 and "set aside as step_000006.bad" in said


def test_none_whole_is_refused(tmp_path: Path) -> None:
    """No checkpoint yet is no fault; some and none good is, also after all were set aside."""
    assert newest_good(tmp_path, set_aside=True) is None
    cut(save(tmp_path, 2) / "manifest.json")
    for _ in range(2):
        with pytest.raises(UserError, match="none of the 1 checkpoints .* verifies; --fresh starts anew"):
            newest_good(tmp_path, set_aside=True)


def test_another_format_is_refused_and_stays(tmp_path: Path) -> None:
    """Older and newer ones are whole, so they are not set aside as damaged: one sentence says what to do."""
    folder = save(tmp_path, 2)
    files = json.loads((folder / "manifest.json").read_text())["files"]
    (folder / "manifest.json").write_text(json.dumps({"format_version": 1, "files": files}, indent=2) + "\n")
    with pytest.raises(UserError, match="is a checkpoint of format 1, .* from format 2; use the version that wrote it"):
        newest_good(tmp_path, set_aside=True)
    assert names(tmp_path) == ["step_000002"]


def test_a_reader_never_meets_one_that_is_being_pruned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a run saves and prunes without pause, the newest good one is found each time, and without a warning."""
    is_dir = Path.is_dir

    def look_late(path: Path) -> bool:
        time.sleep(0 if threading.current_thread() is threading.main_thread() else 0.05)  # on a busy machine
        return is_dir(path)

    monkeypatch.setattr(Path, "is_dir", look_late)
    keep_two, done, found = CheckpointConfig(keep=2), threading.Event(), set()
    save(tmp_path, 1)

    def read() -> None:
        while not done.is_set():
            found.add(newest_good(tmp_path, set_aside=False))

    reader = threading.Thread(target=read)
    reader.start()
    for step in range(2, 60):
        save(tmp_path, step, keep_two)
    done.set()
    reader.join()
    assert None not in found and len(found) > 2 and capsys.readouterr().err == ""


def test_which_are_kept(tmp_path: Path) -> None:
    """The newest few, every Nth, and the best by validation, which a lower score alone replaces, also in a later process."""
    settings = CheckpointConfig(keep=2, keep_every_steps=8)
    scores = {3: 0.5, 5: 0.7, 11: 0.4, 13: 0.6, 14: None}
    kept = {}
    for half in (range(1, 8), range(8, 15)):
        with closing(CheckpointWriter(tmp_path, settings)) as writer:
            for step in half:
                writer.submit(*submission(step, scores.get(step)))
                writer.wait()
                kept[step] = [int(name[-6:]) for name in names(tmp_path)]
    assert (kept[4], kept[7], kept[10], kept[14]) == ([3, 4], [3, 6, 7], [3, 8, 9, 10], [8, 11, 13, 14])
    assert best_checkpoint(tmp_path).name == "step_000011"
    assert json.loads((tmp_path / "BEST").read_text()) == {"step": 11, "by": "loss", "score": 0.4, "clips": 8}
    assert all(is_whole(folder) for folder in list_checkpoints(tmp_path))


def test_a_best_one_that_is_gone_is_none(tmp_path: Path) -> None:
    """Set aside as damaged, it gives way to the next score, however high; readers are told what is wrong."""
    with pytest.raises(UserError, match="has no best checkpoint"):
        best_checkpoint(tmp_path)
    save(tmp_path, 1)
    cut(save(tmp_path, 2, score=0.1) / "optimizer.safetensors")
    with pytest.raises(
        UserError, match=r"step_000002, the best by validation, is damaged: optimizer.safetensors differs"
    ):
        best_checkpoint(tmp_path)
    newest_good(tmp_path, set_aside=True)
    with pytest.raises(UserError, match="has no best checkpoint"):
        best_checkpoint(tmp_path)
    save(tmp_path, 2, score=0.2)
    assert best_checkpoint(tmp_path).name == "step_000002"


def test_the_best_is_what_the_checkpoints_say(tmp_path: Path) -> None:
    """A kill just before BEST is written, or the loss of it, costs no best one: the next save keeps and names it."""
    settings = CheckpointConfig(keep=2)
    save(tmp_path, 1, settings, score=0.5)
    save(tmp_path, 2, settings, score=0.1)
    (tmp_path / "BEST").write_text('{"step": 1, "by": "loss", "score": 0.5, "clips": 8}\n')
    assert best_checkpoint(tmp_path).name == "step_000002"
    for step in (3, 4, 5):
        (tmp_path / "BEST").unlink(missing_ok=True)
        save(tmp_path, step, settings, score=0.2)
    assert names(tmp_path) == ["step_000002", "step_000004", "step_000005"]
    assert json.loads((tmp_path / "BEST").read_text())["step"] == 2


def test_losses_on_other_clips_are_not_compared(tmp_path: Path) -> None:
    """After a change of how many held-out clips are scored, the best is the best since."""
    for step, loss, clips in ((1, 0.1, 8), (2, 0.5, 16), (3, 0.6, 16)):
        save_checkpoint(tmp_path, *submission(step, loss, clips), KEEP_ALL)
    assert best_checkpoint(tmp_path).name == "step_000002"


def test_scores_of_other_looks_are_not_compared(tmp_path: Path) -> None:
    """Only what was looked at as the newest was, or as is asked, counts; an older toolkit's where all it says agrees."""
    near, far, loss = ({"by": by, "validation.clips": 8} | more for by, more in (
        ("psnr", {"gap": 4}), ("psnr", {"gap": 16}), ("loss", {"seed": 0}),
    ))  # fmt: skip
    older = {"validation_by": "psnr", "validation_clips": 8}
    for step, score, says in (
        (1, 28.0, {"validation_look": near}), (2, 20.0, older), (3, 22.0, {"validation_look": far}),
        (4, 21.0, {"validation_look": far}), (5, 0.1, {"validation_look": loss}), (6, None, {"validation_look": near}),
    ):  # fmt: skip
        state = STATE | {"validation_score": score} | says
        save_checkpoint(tmp_path, step, make_tensors(step), UNET, state, ABOUT, KEEP_ALL)
        if step == 4:
            assert best_checkpoint(tmp_path).name == "step_000003"
            assert json.loads((tmp_path / "BEST").read_text()) == {"step": 3, "by": "psnr", "score": 22.0, "clips": 8}
    assert best_checkpoint(tmp_path).name == "step_000005"
    fewer = far | {"validation.clips": 4}
    found = [find_best(tmp_path, look) for look in (near, far, loss, fewer)]
    assert [best and best.step for best in found] == [1, 3, 5, None]
    shutil.rmtree(tmp_path / "checkpoints/step_000003")
    shutil.rmtree(tmp_path / "checkpoints/step_000004")
    assert find_best(tmp_path, far) == (2, "psnr", 20.0, 8), "of an older toolkit"


def test_a_text_may_have_several_writers(tmp_path: Path) -> None:
    """Each succeeds, whoever else writes it too, and whenever it is read it is one of theirs, whole."""
    path, texts = tmp_path / "sweep.json", ["é" * 5000, "o" * 9000]
    replace_text(path, texts[0])

    def write(number: int) -> bool:
        replace_text(path, texts[number % 2])
        return path.read_text() in texts

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(write, range(200)))
    assert list(tmp_path.iterdir()) == [path]


def test_a_step_that_is_saved_twice(tmp_path: Path) -> None:
    """A whole one stays as it is: nothing to gain, and a moment without it to lose; a damaged one is replaced."""
    folder = save(tmp_path, 2)
    inode = folder.stat().st_ino
    save(tmp_path, 2)
    assert folder.stat().st_ino == inode and is_whole(folder)
    cut(folder / "optimizer.safetensors")
    assert is_whole(save(tmp_path, 2)) and folder.stat().st_ino != inode
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_000002"]


@pytest.mark.parametrize("key", ["master", "exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_not_finite_is_never_saved(tmp_path: Path, key: str, value: float) -> None:
    """Refused by name before anything is written."""
    tensors = make_tensors(2)
    name = list(tensors)[-1]
    tensors[name][key].view(-1)[-1] = value
    with pytest.raises(UserError, match=f"{name}/{key} holds NaN or infinity"):
        save_checkpoint(tmp_path, 2, tensors, UNET, STATE, ABOUT, KEEP_ALL)
    assert not list(tmp_path.iterdir())


def without_a_moment(tensors: State) -> State:
    return {name: {key: t for key, t in saved.items() if key != "exp_avg"} for name, saved in tensors.items()}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda tensors: dict(list(tensors.items())[1:]),
            r"lora_A.default.weight/exp_avg has shape none there and \(2, 1024\)",
        ),
        (
            lambda tensors: tensors | {"conv_in.bias": {"master": torch.zeros(3)}},
            r"conv_in.bias/master has shape \(3,\)",
        ),
        (lambda tensors: make_tensors(1, make_unet(16)), r"has shape \(2, 16\) there and \(2, 1024\) in this run"),
        (without_a_moment, "lora_A.default.weight/exp_avg has shape none there"),
    ],
)
def test_tensors_of_another_adapter_are_refused(change: Callable[[State], State], says: str) -> None:
    """One too few, one too many, another shape, no moments: the first is named, and what to do."""
    shapes = {name: p.shape for name, p in UNET.named_parameters() if "lora_" in name}
    refuse_misfit(Path("run"), make_tensors(1), shapes)
    with pytest.raises(UserError, match=f"run is of another adapter: .*{says}.*--fresh"):
        refuse_misfit(Path("run"), change(make_tensors(1)), shapes)


def test_space_is_asked_for_before_it_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked for suffices for the checkpoint that follows, and where it is not there nothing is written."""
    unet = make_unet(100_000)
    tensors = make_tensors(1, unet)
    shapes = {name: saved["master"].shape for name, saved in tensors.items()}
    folder = save_checkpoint(tmp_path, 1, tensors, unet, STATE, ABOUT, KEEP_ALL)
    used_bytes = sum(p.stat().st_blocks * 512 for p in folder.iterdir())
    spare_bytes = 1 << 20
    usage = shutil.disk_usage(tmp_path)
    for free_bytes, fits in ((used_bytes - 1, False), (used_bytes + spare_bytes, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda place, free=free_bytes: usage._replace(free=free))
        if fits:
            check_space(tmp_path / "not/yet", unet, shapes)
            continue
        with pytest.raises(
            UserError, match=r"1 checkpoint of 4.1 MiB does not fit on the disk of .* which has 3.1 MiB free"
        ):
            save_checkpoint(tmp_path, 2, tensors, unet, STATE, ABOUT, KEEP_ALL)
        with pytest.raises(UserError, match=r"2 checkpoints of 4.1 MiB do not fit on the disk of .*/not/yet, which"):
            check_space(tmp_path / "not/yet", unet, shapes, 2)
    assert names(tmp_path) == ["step_000001"] and len(list((tmp_path / "checkpoints").iterdir())) == 1


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """submit returns while the disk is at work, the next one waits for it, and nothing is visible before it is whole."""
    disk, sync = threading.Event(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (disk.wait(), sync(descriptor)))
    with closing(CheckpointWriter(tmp_path, KEEP_ALL)) as writer:
        writer.submit(*submission(1))
        assert names(tmp_path) == []
        threading.Timer(0.05, disk.set).start()
        writer.submit(*submission(2))
        assert names(tmp_path)[0] == "step_000001"
        writer.wait()
    assert names(tmp_path) == ["step_000001", "step_000002"] and all(map(is_whole, list_checkpoints(tmp_path)))


def test_a_failed_write_costs_that_checkpoint_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Told in one line, counted, and made good by the next; the run may not end on it."""
    broken = make_tensors(2)
    next(iter(broken.values()))["master"][:] = float("nan")
    with closing(CheckpointWriter(tmp_path, KEEP_ALL)) as writer:
        writer.submit(*submission(1))
        writer.submit(2, broken, UNET, STATE, ABOUT)
        writer.submit(*submission(3))
        writer.wait()
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "the newest whole one is step_000001" in said
        writer.submit(4, broken, UNET, STATE, ABOUT)
        with pytest.raises(
            UserError, match=r"saving the checkpoint of step 4 failed: .* holds NaN .* one is step_000003"
        ):
            writer.wait()
    assert names(tmp_path) == ["step_000001", "step_000003"]


def test_a_mistake_in_the_code_is_no_failed_write(tmp_path: Path) -> None:
    """What no disk could cause is raised where the next checkpoint is handed over, with its traceback."""
    with closing(CheckpointWriter(tmp_path, KEEP_ALL)) as writer:
        writer.submit(1, make_tensors(1), UNET, {"a": object()}, ABOUT)
        with pytest.raises(TypeError, match="not JSON serializable"):
            writer.submit(*submission(2))
    assert not list((tmp_path / "checkpoints").iterdir())


def test_a_disk_that_cannot_be_read_now_condemns_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that may pass, as a network disk has, is told, and no checkpoint is set aside for it."""
    folder = save(tmp_path, 7)
    for method in ("is_file", "read_bytes"):
        with monkeypatch.context() as patch:
            patch.setattr(Path, method, lambda path: (_ for _ in ()).throw(OSError(errno.ESTALE, "Stale file handle")))
            with pytest.raises(UserError, match="step_000007 cannot be read now .*nothing was changed"):
                newest_good(tmp_path, set_aside=True)
    assert newest_good(tmp_path, set_aside=True) == folder
