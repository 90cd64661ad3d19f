"""What took seconds to count is counted once, and never believed too long. Run: pytest tests/run/test_recall.py"""

from pathlib import Path

import pytest

from toolkit.run import recall as module
from toolkit.run.recall import recall


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the answers are kept: nowhere yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "framer-toolkit/answers"


def refuse() -> int:
    raise AssertionError("counted again")


def test_a_question_is_counted_once(folder: Path) -> None:
    """The same question gives the kept answer; another one is another."""
    assert recall({"size": [1, 2]}, lambda: {"bytes": 7}) == {"bytes": 7} == recall({"size": (1, 2)}, refuse)
    assert recall({"size": [2, 1]}, lambda: 8) == 8 == recall({"size": [2, 1]}, refuse)
    assert recall({"size": [1, 2]}, refuse) == {"bytes": 7} and len(list(folder.iterdir())) == 2


def test_what_changed_is_counted_again(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Other witnesses, other code or another library: nothing is believed, and the new answer takes the old one's file."""
    assert recall("q", lambda: 1, witness=["a"]) == 1 == recall("q", refuse, witness=["a"])
    assert recall("q", lambda: 2, witness=["b"]) == 2 == recall("q", refuse, witness=["b"])
    before = module.fingerprint_code()
    monkeypatch.setattr(module, "version", lambda name: "0")
    module.fingerprint_code.cache_clear()
    assert module.fingerprint_code() != before
    assert recall("q", lambda: 3, witness=["b"]) == 3
    monkeypatch.undo()
    module.fingerprint_code.cache_clear()
    assert module.fingerprint_code() == before
    copy = tmp_path / "copy"
    for name in ("toolkit/run/recall.py", "toolkit/model/unet.py", "ds_configs/zero2.json"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_text("old")
    monkeypatch.setattr(module, "__file__", str(copy / "toolkit/run/recall.py"))
    seen = set()
    for name in ("toolkit/run/recall.py", "toolkit/model/unet.py", "ds_configs/zero2.json"):
        (copy / name).write_text("new")
        module.fingerprint_code.cache_clear()
        seen.add(module.fingerprint_code())
    module.fingerprint_code.cache_clear()
    assert len(seen) == 3


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"seen": 1}', b"\xff", b"[" * 100_000], ids=range(7))
def test_a_damaged_answer_is_none(folder: Path, content: bytes) -> None:
    """What is torn, empty or of another kind is counted again and written anew."""
    recall("q", lambda: 1)
    [file] = folder.iterdir()
    file.write_bytes(content)
    assert recall("q", lambda: 2) == 2 == recall("q", refuse)


def test_a_changed_answer_is_none(folder: Path) -> None:
    """One flipped digit of an answer, in a file that is whole otherwise, is not believed."""
    recall("q", lambda: 123456)
    [file] = folder.iterdir()
    file.write_text(file.read_text().replace("123456", "123457"))
    assert recall("q", lambda: 123456) == 123456 == recall("q", refuse)


def test_nobodys_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the user has no folder of their own nothing is kept, and none named ~ is made."""
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    monkeypatch.chdir(tmp_path)
    assert [recall("q", lambda value=value: value) for value in (1, 2)] == [1, 2] and not [*tmp_path.iterdir()]


def test_nothing_depends_on_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing can be kept, each answer is counted."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert [recall("q", lambda n=n: n) for n in (1, 2)] == [1, 2]
