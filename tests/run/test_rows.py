"""What a kill or a power cut leaves of a file of rows ends no resume. Run: pytest tests/run/test_rows.py"""

import json
from pathlib import Path

import pytest
import torch

from toolkit.engine.world import World
from toolkit.run.monitor import FIGURES_LOG, LOG, Monitor
from toolkit.run.rows import cut_rows, read_rows
from toolkit.run.skips import NAME, cut_skips

WHOLE = [b'{"step": 1, "loss": 0.1}\n', b'{"loss": 1e-05, "step": 3}\n', b'{"step":2}\n']
HARM = {
    "zeros in place of a row": b"\0" * 300 + b"\n",
    "zeros over its start": b"\0" * 30 + b'"step": 2}\n',
    "zeros over its end": b'{"step": 2, "lo' + b"\0" * 30 + b"\n",
    "bytes of something else": b"\xff\xfe\x80\n",
    "half a row with another's end": b'{"step": 2, "lo{"step": 3}\n',
    "nothing": b"\n",
    "no object": b"[2]\n",
}


@pytest.mark.parametrize("harm", HARM.values(), ids=[*HARM])
def test_what_is_no_row_is_passed_over(tmp_path: Path, harm: bytes) -> None:
    """Read or cut, it is as if it were not there, and the rows that are kept stay byte for byte."""
    path = tmp_path / "rows.jsonl"
    for place in range(4):
        path.write_bytes(b"".join([*WHOLE[:place], harm, *WHOLE[place:], b"\0" * 100]))
        assert read_rows(path) == [json.loads(line) for line in WHOLE]
        cut_rows(path, lambda row: row["step"] <= 2)
        assert path.read_bytes() == WHOLE[0] + WHOLE[2] and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("length", range(1, len(WHOLE[1])))
def test_a_row_that_a_kill_tore_is_none(tmp_path: Path, length: int) -> None:
    """Also one that lacks its end of line alone: what is appended later would stand on its line."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(WHOLE[0] + WHOLE[1][:length])
    assert read_rows(path) == [{"step": 1, "loss": 0.1}]
    cut_rows(path, lambda row: True)
    assert path.read_bytes() == WHOLE[0]


def test_no_file_has_no_rows(tmp_path: Path) -> None:
    """And is not made by a cut."""
    assert read_rows(tmp_path / "rows.jsonl") == []
    cut_rows(tmp_path / "rows.jsonl", lambda row: True)
    assert not list(tmp_path.iterdir())


def test_a_run_goes_on_after_a_power_cut(tmp_path: Path) -> None:
    """Each list of a run is cut back to the step that it goes on from, whatever of it was lost."""
    for name in (LOG, FIGURES_LOG, NAME):
        (tmp_path / name).write_bytes(WHOLE[0] + HARM["zeros in place of a row"] + WHOLE[1] + WHOLE[2])
    cut_skips(tmp_path, 2)
    Monitor(tmp_path, 2, 0, 10, 1, 1, [0.5, 123.0], None, {}, {}, World(0, 1, torch.device("cpu"))).close()
    for name in (LOG, FIGURES_LOG, NAME):
        assert (tmp_path / name).read_bytes() == WHOLE[0] + WHOLE[2], name
