"""YAML and JSON that anybody may have written: bombs, deep nesting and huge numbers are refused in one line."""

import datetime
import time
from collections import OrderedDict

import pytest
import torch

from dpa4 import parsing
from dpa4.parsing import MAX_FILE, parse_json, parse_yaml, read_yaml, shown

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefghi", "bcdefghij", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, r"line 2, column 8: aliases such as \*a are not supported"),
        ("a: &a {b: 1}\nc: {<<: *a}", r"line 2, column 9: aliases such as \*a"),
        ("[" * 500 + "]" * 500, "nested too deeply"),
        ("{a: " * 2000, "nested too deeply"),
        ("a: " + "1" * 5000, "the integer 1111111111... has 5000 digits; at most 30 are read"),
        ("a: 0x" + "f" * 5000, "has 5002 digits"),
        ("a: " + "1:" * 2000 + "1", "digits; at most 30"),
        ("a: !!int ''", "is not valid YAML: "),
        ("a: 2001-99-99", "is not valid YAML: month must be in 1..12"),
        ("a: !!python/object/apply:os.system [ls]", "line 1, column 4: could not determine a constructor"),
        ("a: [b", "line 1, column 6: expected ',' or ']'"),
        ("{[1, 2]: 3}", "unhashable key"),
        ("a: \x07", "is not valid YAML: "),
    ],
)
def test_bad_yaml_is_refused_quickly_and_in_one_line(text, message):
    start = time.monotonic()
    with pytest.raises(ValueError, match=message) as caught:
        parse_yaml(text, "run.yaml")
    assert time.monotonic() - start < 20  # two seconds on a machine without other work
    assert str(caught.value).startswith("run.yaml is not valid YAML") and "\n" not in str(caught.value)


def test_the_number_of_values_is_limited(monkeypatch):
    assert parsing.MAX_VALUES == 20_000
    monkeypatch.setattr(parsing, "MAX_VALUES", 1000)
    assert parse_yaml("[" + "1, " * 999 + "]", "x") == [1] * 999
    with pytest.raises(ValueError, match="x is not valid YAML: line 1, column 2999: more than 1,000 values"):
        parse_yaml("[" + "1, " * 1000 + "]", "x")


def test_good_yaml_is_parsed():
    text = "a: 1e-3\nb: No\nc: [1, 0x1F, true]\nd: 2026-11-30\ne: &here text\n"
    expected = {"a": 1e-3, "b": "No", "c": [1, 31, True], "d": datetime.date(2026, 11, 30), "e": "text"}
    assert parse_yaml(text, "x") == expected


def test_files_of_other_kinds_are_refused_with_their_name(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes(b"a: \xff\xfe")
    with pytest.raises(
        ValueError, match=r"run.yaml is not text in UTF-8 \(byte 3 is 0xff\); save it as UTF-8"
    ):
        read_yaml(path)
    path.write_bytes(b" " * (MAX_FILE + 1))
    with pytest.raises(ValueError, match=r"run.yaml has 1,000,001 bytes; .* at most 1,000,000"):
        read_yaml(path)
    path.write_bytes(b"\xef\xbb\xbfa: 1")  # with a byte-order mark
    assert read_yaml(path) == {"a": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [("[" * 100_000, "nested too deeply"), ("1" * 5000, "has 5000 digits"), ("{", "line 1 column 2")],
)
def test_bad_json_is_refused(text, message):
    with pytest.raises(ValueError, match=f"the entry x is not valid JSON: .*{message}"):
        parse_json(text, "the entry x")


def test_values_are_shown_in_short():
    assert shown("mini") == "'mini'"
    assert shown([1, 2.5, None, True, {"a": ("b",)}]) == "[1, 2.5, None, True, {'a': ('b',)}]"
    bomb: object = "x"
    for _ in range(50):
        bomb = OrderedDict(a=[bomb] * 9, b={"c": (bomb, bomb)})
    for value in (bomb, "x" * 10**6, 10**10_000, torch.zeros(100), [[0] * 1000] * 1000):
        assert len(shown(value)) <= 200
