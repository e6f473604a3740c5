"""Arrays of deepmd systems: checked before they are loaded, with messages that name the file."""

import io
import struct
import time

import numpy as np
import pytest

from dpa4.data import read_frames


def write_system(folder, **arrays):
    """Write a system of two frames of HD."""
    (folder / "set.000").mkdir(parents=True)
    (folder / "type.raw").write_text("0\n1\n")
    (folder / "type_map.raw").write_text("H D")
    (folder / "nopbc").touch()
    usual = {"coord": np.arange(12.0).reshape(2, 6), "energy": np.arange(2.0), "force": np.zeros((2, 6))}
    for name, array in (usual | arrays).items():
        np.save(folder / "set.000" / f"{name}.npy", array)
    return folder


def header(text: str, data: bytes = b"") -> bytes:
    """An .npy file with this header."""
    packed = text.encode() + b" " * (-len(text) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(packed)) + packed + data


def pickled() -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([{"a": 1}, None], dtype=object), allow_pickle=True)
    return file.getvalue()


def declared(shape: str, kind: str = "<f8") -> str:
    return f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}"


@pytest.mark.parametrize("name", ["coord", "energy", "force", "charge_spin", "real_atom_types"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no .npy file or a damaged one"),
        (b"nothing", "is no .npy file or a damaged one"),
        (b"\x93NUMPY\x01\x00\x10\x00((((((((((((((((", "is no .npy file or a damaged one"),
        (header("{'descr': __import__('os').system('true')}"), "is no .npy file or a damaged one"),
        (b"\x93NUMPY\x07\x07" + header(declared("(2,)"))[8:], "is no .npy file or a damaged one"),
        (pickled(), "holds values of type object, not numbers; write it with numpy.save"),
        (header(declared("(2,)", "<U9"), bytes(72)), "holds values of type <U9, not numbers"),
        (header(declared("(2,)", "<c16"), bytes(32)), "holds values of type complex128, not numbers"),
        (header(declared("(4000000000,)"), bytes(16)), r"16 bytes of data, but its header says 32,000,000,000 \(sh"),
        (header(declared(f"({2**62}, 8)"), bytes(16)), "16 bytes of data, but its header says"),
        (header(declared("(2,)"), bytes(15)), "15 bytes of data, but its header says 16"),
        (header(declared("(2,)"), bytes(24)), "24 bytes of data, but its header says 16"),
        (header(declared("(-2,)"), bytes(16)), "16 bytes of data, but its header says -16"),
        (header(declared("(5,)"), bytes(40)), r"has shape \(5,\), which does not match"),
    ],
)  # fmt: skip
def test_damaged_arrays_are_refused_before_they_are_loaded(tmp_path, name, content, message):
    write_system(tmp_path / "s")
    file = tmp_path / "s" / "set.000" / f"{name}.npy"
    file.write_bytes(content)
    start = time.monotonic()
    with pytest.raises(ValueError, match=rf"^{file}.* {message}") as caught:
        read_frames(tmp_path / "s")
    assert time.monotonic() - start < 1 and "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [0.5, 1.9, np.nan, np.inf, -2, 2, 1e30])
def test_types_are_whole_numbers_of_the_map(tmp_path, value):
    types = np.array([[0, 1], [0, value]])
    write_system(tmp_path / "s", real_atom_types=types)
    with pytest.raises(
        ValueError,
        match="real_atom_types.npy: the type of atom 1 in frame 1 is .*; allowed are .* from 0 to 1",
    ):
        read_frames(tmp_path / "s")
    np.save(tmp_path / "s/set.000/real_atom_types.npy", np.array([[0, 1], [0, -1]], dtype=np.float32))
    assert [len(f) for f in read_frames(tmp_path / "s")] == [2, 1]


@pytest.mark.parametrize("text", ["H\nD\n", "0.5 1", "0 -1", "0 99999999999"])
def test_types_of_the_system_are_numbers(tmp_path, text):
    write_system(tmp_path / "s")
    (tmp_path / "s/type.raw").write_text(text)
    with pytest.raises(
        ValueError, match=r"type.raw: the type of atom \d is '.*'; write a number, counted from 0"
    ):
        read_frames(tmp_path / "s")


@pytest.mark.parametrize("dtype", ["float32", "float64", ">f8", "int64", "float16"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_every_kind_of_number(tmp_path, dtype, order):
    write_system(tmp_path / "s", coord=np.asarray(np.arange(12).reshape(2, 6), dtype=dtype, order=order))
    assert read_frames(tmp_path / "s")[1].positions.tolist() == [[6, 7, 8], [9, 10, 11]]


def test_isotopes_and_byte_order_marks(tmp_path):
    write_system(tmp_path / "s")
    (tmp_path / "s/type.raw").write_text("0\r\n1\r\n", encoding="utf-8-sig")
    (tmp_path / "s/type_map.raw").write_text("T D", encoding="utf-16")
    assert [f.atomic_numbers.tolist() for f in read_frames(tmp_path / "s")] == [[1, 1]] * 2


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (
            {"coord": np.full((2, 6), 1e306)},
            r"set.000, frame 0: the position of atom 0 is beyond 1e\+08 Angstrom",
        ),
        ({"energy": np.array([0, np.inf])}, "set.000, frame 1: energy not finite"),
        ({"force": np.full((2, 6), np.nan)}, "set.000, frame 0: forces of atom 0 not finite"),
    ],
)
def test_values_out_of_range(tmp_path, array, message):
    with pytest.raises(ValueError, match=message):
        read_frames(write_system(tmp_path / "s", **array))
