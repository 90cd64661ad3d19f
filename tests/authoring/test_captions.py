"""Words reach the video they are about, and a slip in them is a sentence. Run: pytest tests/authoring/test_captions.py"""

import unicodedata
from pathlib import Path

import pytest

from toolkit.authoring.captions import Part, Words, read_words
from toolkit.errors import UserError

NAMES = ["a.mp4", "deep/b c.mkv", "silent.mp4"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.txt").write_text("a dog,\nrunning\n")
    (tmp_path / "deep" / "b c.txt").write_bytes("\ufeffgrüß dich".encode())
    (tmp_path / "silent.txt").write_text(" \n")
    return tmp_path


def test_texts_beside_videos_and_rows_of_a_table(folder: Path) -> None:
    """A text beside a video is its caption, on one line; a row replaces it whole; what is empty says nothing."""
    assert read_words(folder, NAMES, None) == (
        {"a.mp4": Words("a dog, running"), "deep/b c.mkv": Words("grüß dich")},
        {},
        [],
    )
    table = folder / "words.csv"
    table.write_text('video,label,caption\na.mp4,dog,"he said ""sit"", twice"\nsilent.mp4,none,\n')
    assert read_words(folder, NAMES, table)[0] == {
        "a.mp4": Words('he said "sit", twice', "dog"),
        "deep/b c.mkv": Words("grüß dich"),
        "silent.mp4": Words(None, "none"),
    }
    table.write_bytes("\ufeffvideo,caption\r\na.mp4,\r\n".encode())  # as Excel writes it
    assert "a.mp4" not in read_words(folder, NAMES, table)[0]


def test_a_line_ends_only_where_csv_ends_it(folder: Path) -> None:
    """A separator of lines that only Unicode knows, and a line end in quotes, stay in the text as spaces."""
    table = folder / "words.csv"
    table.write_bytes('video,caption\r\na.mp4,one\u2028two\x0cthree\r\nsilent.mp4,"four\r\nfive"\r\n'.encode())
    words = read_words(folder, NAMES, table)
    assert words.of_videos["a.mp4"] == Words("one two three") and words.of_videos["silent.mp4"] == Words("four five")


def test_rows_about_other_videos_are_passed_over_and_named(folder: Path) -> None:
    """A table may speak of more videos than are there, but not of others alone; a table without rows says nothing."""
    table = folder / "words.csv"
    table.write_text("video,caption\nz.mp4,x\na.mp4,dog\nc.mp4,y\n")
    words, _, absent = read_words(folder, NAMES, table)
    assert words["a.mp4"] == Words("dog") and absent == ["c.mp4", "z.mp4"] and "c.mp4" not in words
    table.write_text("video,caption\n")
    assert read_words(folder, NAMES, table) == read_words(folder, NAMES, None)


def test_a_name_may_be_spelled_as_another_system_spells_it(folder: Path) -> None:
    """An umlaut is one sign or two, in the table or on the disk; of two videos that look alike, a row means its own."""
    table = folder / "words.csv"
    one, two = (unicodedata.normalize(form, "Größe ệ.mkv") for form in ("NFC", "NFD"))
    for name in (one, two):
        for row in (one, two):
            table.write_text(f"video,caption\n{row},big\n")
            assert read_words(folder, [name], table) == ({name: Words("big")}, {}, [])
        table.write_text(f"video,caption\n{one},big\n{two},large\n")
        with pytest.raises(UserError, match="line 3: .* comes twice"):
            read_words(folder, [name], table)
    assert read_words(folder, [one, two], table) == ({one: Words("big"), two: Words("large")}, {}, [])
    third = unicodedata.normalize("NFD", one[:3]) + one[3:]
    table.write_text(f"video,caption\n{one},big\n{third},huge\n")
    assert third not in (one, two) and read_words(folder, [one, two], table) == ({one: Words("big")}, {}, [third])


def test_rows_in_which_nothing_stands_say_nothing(folder: Path) -> None:
    """As Excel leaves them below a table."""
    table = folder / "words.csv"
    table.write_text("video,caption,label\na.mp4,dog,\n,,\n\n,,\n")
    assert read_words(folder, NAMES, table)[0]["a.mp4"] == Words("dog")


def test_rows_about_parts(folder: Path) -> None:
    """A video may have several, in any order; other videos have words of their own; a part needs none."""
    table = folder / "words.csv"
    table.write_text("video,start_s,end_s,label\na.mp4,2.5,3,dog\nsilent.mp4,,,none\na.mp4,0,2.5,\nz.mp4,1,2,x\n")
    assert read_words(folder, NAMES, table) == (
        {"deep/b c.mkv": Words("grüß dich"), "silent.mp4": Words(None, "none")},
        {"a.mp4": [Part(0, 2.5, Words()), Part(2.5, 3, Words(None, "dog"))]},
        ["z.mp4"],
    )
    table.write_text("end_s,video,start_s\n1,a.mp4,0.5\n")
    assert read_words(folder, NAMES, table).of_parts == {"a.mp4": [Part(0.5, 1, Words())]}


def test_a_column_may_say_what_is_held_out(folder: Path) -> None:
    """Of whole videos and of parts; nothing in it leaves that to the packing."""
    table = folder / "words.csv"
    table.write_text("video,split\na.mp4, val\nsilent.mp4,\ndeep/b c.mkv,train\n")
    assert read_words(folder, NAMES, table)[0] == {
        "a.mp4": Words(split="val"), "deep/b c.mkv": Words(split="train"),
    }  # fmt: skip
    table.write_text("video,start_s,end_s,label,split\na.mp4,0,1,dog,train\na.mp4,1,2,dog,val\n")
    assert read_words(folder, NAMES, table).of_parts == {
        "a.mp4": [Part(0, 1, Words(None, "dog", "train")), Part(1, 2, Words(None, "dog", "val"))]
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "starts with nothing"),
        ("a.mp4,dog\n", "must be video,caption,label"),
        ("video\na.mp4\n", "must be video,caption,label"),
        ("video,caption,caption\n", "must be video,caption,label"),
        ("video,caption\nc.mp4,dog\n", "c.mp4 is no video in"),
        ("video,caption\na.mp4,x\na.mp4,y\n", "line 3: a.mp4 comes twice"),
        ("video,start_s,label\na.mp4,1,x\n", "with start_s,end_s too"),
        ("video,start_s,end_s\na.mp4,1,2\na.mp4,,\n", "line 3: a.mp4 comes twice"),
        ("video,start_s,end_s,label\na.mp4,,,x\na.mp4,1,2,\n", "line 3: a.mp4 comes twice"),
        ("video,start_s,end_s\na.mp4,1,\n", "line 2: start_s or end_s is ''; give seconds"),
        ("video,start_s,end_s\na.mp4,0:01,0:02\n", "line 2: start_s or end_s is '0:01'"),
        ("video,start_s,end_s\na.mp4,-1,2\n", "line 2: start_s or end_s is '-1'"),
        ("video,start_s,end_s\na.mp4,nan,2\n", "line 2: start_s or end_s is 'nan'"),
        ("video,start_s,end_s\na.mp4,2,2\n", "line 2: a part from 2 to 2 s; give an end_s above start_s"),
        ("video,start_s,end_s\na.mp4,4,6\na.mp4,1,5\n", "parts of a.mp4 overlap, 1 to 5 s and 4 to 6 s"),
        ("video,split\na.mp4,test\n", "line 2: split is 'test'; give train, val, or nothing"),
        ("video,caption\na.mp4,a dog, running\n", "line 2: not 2 fields"),
        ("video,caption,label\na.mp4,x\n", "line 2: not 3 fields"),
        ("video,caption\n,dog\n", "line 2: names no video"),
        ('video,caption\na.mp4,"x\n', "line 2: .*save it as CSV"),
        ('video,caption\nz.mp4,x\na.mp4,"x" y\nc.mp4,z\n', "line 3: .*save it as CSV"),
        (b"video,caption\na.mp4,\xff\n", "not UTF-8"),
        ("video,caption\na.mp4," + "x" * 10_001, "10001 characters"),
    ],
)
def test_a_slip_is_a_sentence(folder: Path, content: str | bytes, message: str) -> None:
    """A wrong header, an unknown or doubled video, a stray comma, another encoding: refused with the line."""
    table = folder / "words.csv"
    table.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as refused:
        read_words(folder, NAMES, table)
    assert "words.csv" in str(refused.value)
    with pytest.raises(UserError, match="cannot read"):
        read_words(folder, NAMES, folder / "nowhere.csv")
