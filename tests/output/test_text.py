"""Numbers, names and encodings."""

import io
import sys

from dpa4.output import (
    counted,
    short,
    tolerate_any_encoding,
    wrapped,
    wrapped_path,
)


def test_characters_that_a_terminal_cannot_show(monkeypatch):
    for encoding in ("ascii", "gbk", "cp1252"):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", stream)
        tolerate_any_encoding()
        print("1 Å³ 中 κ", flush=True)
        assert stream.buffer.getvalue().startswith(b"1 ")


def test_numbers_of_things():
    assert [counted(n, "structure") for n in (0, 1, 1200)] == [
        "0 structures",
        "1 structure",
        "1,200 structures",
    ]


def test_short_numbers():
    numbers = (0, 0.12345, 1, 17.329, 999.96, 9999.7, 123456.7, 1.5e7, 2e-5, -16.89)
    texts = ["0", "0.123", "1.000", "17.33", "1000", "10000", "123457", "1.5e+07", "2.0e-05", "-16.89"]
    assert [short(n) for n in numbers] == texts
    assert short(999.96) == "1000" and max(map(len, texts)) <= 8


def test_paths_break_after_folders():
    assert wrapped_path("strained/07/vasprun.xml, 0", 18) == "strained/07/\nvasprun.xml, 0"
    assert wrapped_path("surface-100/a.xml", 30) == "surface-100/a.xml" and wrapped_path("", 5) == ""
    assert wrapped_path("a/group-with_a long.name", 10) == "a/\ngroup-\nwith_a \nlong.name"


def test_names_break_after_punctuation():
    assert wrapped("group-with_a long.name", 10) == "group-\nwith_a \nlong.name"
    assert wrapped("short", 10) == "short" and wrapped("", 10) == ""
    assert wrapped("a" * 25, 10) == "\n".join(["a" * 10, "a" * 10, "a" * 5])
    assert wrapped("Å-ß", 2).split("\n") == ["Å-", "ß"]
