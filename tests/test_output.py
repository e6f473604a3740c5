"""Output: locks, temporary files, full disks, encodings."""

import errno
import io
import os
import re
import stat
import subprocess
import sys
from xml.etree import ElementTree

import pytest
from ase.build import molecule
from ase.io import read

from dpa4 import output
from dpa4.data import write_structures
from dpa4.output import (
    CsvLog,
    OutputFolder,
    atomic_write,
    check_writable,
    cut_back,
    rows_until,
    tolerate_any_encoding,
    write_json,
)

# --- folders


def test_a_folder_belongs_to_one_process_at_a_time(tmp_path):
    folder = tmp_path / "run"
    with OutputFolder(folder):
        with pytest.raises(BlockingIOError, match=rf"another process is working on {folder}; wait until"):
            OutputFolder(folder)
        with OutputFolder(folder, "0-of-2"), OutputFolder(folder, "1-of-2"):  # parts have locks of their own
            (folder / "result").touch()
    assert [path.name for path in folder.iterdir()] == ["result"]
    with OutputFolder(folder):
        pass


def test_a_lock_ends_with_its_process(tmp_path):
    """The second process is refused while the first one lives, and continues after it was killed."""
    code = (
        "import sys; from pathlib import Path; from dpa4.output import OutputFolder\n"
        "folder = OutputFolder(Path(sys.argv[1])); print('locked', flush=True); sys.stdin.read()"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with owner:
        assert owner.stdout.readline() == "locked\n"
        with pytest.raises(BlockingIOError, match="another process is working on"):
            OutputFolder(tmp_path)
        owner.kill()
    assert (tmp_path / ".lock").exists()
    OutputFolder(tmp_path).close()


def test_leftovers_of_killed_writes_are_removed_and_other_files_are_not(tmp_path):
    for name in (".last.pt.123.tmp", ".last.pt.123-456.tmp", ".notes.tmp", "data.1.tmp", ".hidden"):
        (tmp_path / name).touch()
    with OutputFolder(tmp_path):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {".notes.tmp", "data.1.tmp", ".hidden"}


def test_folders_that_cannot_be_made_or_locked(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(OSError, match=f"cannot create the folder {folder}: "):
            OutputFolder(folder)
    with OutputFolder(tmp_path / "made" / "for-nothing"):
        pass
    assert not (tmp_path / "made" / "for-nothing").exists()

    def refuse(file):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(output, "_lock", refuse)
    with pytest.warns(UserWarning, match="cannot be locked .No locks available.; let no other process"):
        OutputFolder(tmp_path).close()


# --- files


@pytest.fixture
def full_disk():
    """Limit files of this process to 1000 bytes, which fails in the same place as a full disk."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_named_and_the_old_file_stays(tmp_path, full_disk):
    path = tmp_path / "results.json"
    write_json(path, [1])
    with pytest.raises(OSError, match=f"cannot write {path}: File too large"):
        write_json(path, ["long"] * 1000)
    assert path.read_text() == "[\n 1\n]\n"
    with pytest.raises(OSError, match=f"cannot write {tmp_path / 'all.xyz'}: File too large"):
        write_structures(tmp_path / "all.xyz", [molecule("C60")] * 10)
    log = CsvLog(tmp_path / "log.csv", ("step", "text"))
    with pytest.raises(OSError, match=f"cannot write {tmp_path / 'log.csv'}: File too large"):
        for step in range(100):
            log.write({"step": step, "text": "long " * 10})
    with pytest.raises(OSError, match="cannot write .*log.csv"):
        log.close()
    assert not list(tmp_path.glob(".*"))


def test_files_have_the_mode_of_the_umask_and_are_on_the_disk(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda file: flushed.append(os.fstat(file).st_ino))
    before = os.umask(0o027)
    try:
        write_json(tmp_path / "a.json", 1)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == 0o640
    assert flushed == [(tmp_path / "a.json").stat().st_ino]


def test_a_folder_that_is_gone_or_read_only(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    folder.mkdir()
    with (
        pytest.raises(FileNotFoundError, match="cannot write .*a.txt"),
        atomic_write(folder / "a.txt") as file,
    ):
        file.touch()
        file.unlink()
        folder.rmdir()
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*run; create it first"):
        check_writable(folder / "a.txt")
    with pytest.raises(IsADirectoryError, match="it is a folder; give the name of a file"):
        check_writable(tmp_path)
    (tmp_path / ".a[1].txt.123-456.tmp").touch()  # of a killed process
    check_writable(tmp_path / "a[1].txt")
    assert not list(tmp_path.iterdir())

    def read_only(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "replace", read_only)
    with pytest.raises(OSError, match=r"cannot write .*a.txt: Read-only file system"):
        write_json(tmp_path / "a.txt", 1)


def test_errors_about_other_files_keep_their_names(tmp_path):
    with pytest.raises(FileNotFoundError, match="other"), atomic_write(tmp_path / "a.txt"):
        (tmp_path / "other" / "input").read_text()


def test_cutting_back_never_extends(tmp_path):
    path, state = tmp_path / "data", tmp_path / "state.json"
    path.write_text("12345")
    cut_back(path, 3, state)
    assert path.read_text() == "123"
    for size in (4, 10**12):
        with pytest.raises(
            ValueError, match=f"data is damaged: it has 3 bytes, state.json says at least {size}"
        ):
            cut_back(path, size, state)
    assert path.read_text() == "123"
    cut_back(tmp_path / "absent", 0, state)
    with pytest.raises(ValueError, match="absent is damaged: it has 0 bytes"):
        cut_back(tmp_path / "absent", 1, state)


@pytest.mark.parametrize("text", ["a,b\n1,2\n", "step,b\nx,2\n", "b,step\n1,2\n"])
def test_tables_that_are_not_what_was_written(tmp_path, text):
    path = tmp_path / "log.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match="log.csv is damaged: "):
        rows_until(path, ("step", "b"), 10)
    assert path.read_text() == text


# --- encodings


def test_structures_are_utf_8_whatever_the_locale(tmp_path):
    code = (
        "import locale, sys; from pathlib import Path; from ase import Atoms; import dpa4.data\n"
        "assert locale.getpreferredencoding(False) == 'ANSI_X3.4-1968'\n"
        "dpa4.data.write_structures(Path(sys.argv[1]), Atoms('H', info={'name': chr(0xC5)}))"
    )
    environment = os.environ | {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    path = tmp_path / "a.xyz"
    subprocess.run([sys.executable, "-c", code, str(path)], check=True, env=environment)
    assert read(path).info["name"] == "Å"


def test_characters_that_a_terminal_cannot_show(monkeypatch):
    for encoding in ("ascii", "gbk", "cp1252"):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", stream)
        tolerate_any_encoding()
        print("1 Å³ 中 κ", flush=True)
        assert stream.buffer.getvalue().startswith(b"1 ")


# --- figures and tables


def test_svg_figures_are_dark_on_a_dark_screen_and_always_the_same():
    def drawn() -> bytes:
        figure = output.new_figure(3, 2)
        axis = figure.subplots()
        axis.plot([1, 2], [3, 4], color="C1")
        axis.set_title(output.plain_text("$no$formula$"))
        return output.svg_of(figure)

    svg = drawn()
    assert svg == drawn()
    document = ElementTree.fromstring(svg)
    head, _, body = svg.decode().partition("</style>")
    light, dark = head.split("@media (prefers-color-scheme: dark)")
    for text in (light, dark):
        assert re.search(r"--c0: #\w{6};", text) and "--c9: #" in text
    assert "--c0: #000000" in light and "--c0: #000000" not in dark
    assert "#000000" not in body and "#ff7f0e" not in body and "stroke: var(--c9)" in body
    assert len(document.findall(".//{*}metadata")) == 0


def test_figures_in_grids_within_a_grid_have_their_own_labels(tmp_path):
    """Aligned over the whole figure, the labels of all columns were at the first one."""
    figure = output.new_figure(6, 3)
    grid = figure.add_gridspec(1, 2)
    panels = [grid[0, k].subgridspec(2, 1).subplots() for k in range(2)]
    for column in panels:
        for axis, top in zip(column, (1, 1000), strict=True):
            axis.plot([0, top])
            axis.set_ylabel("E (eV)")
    output.save_figure(figure, tmp_path / "figure.png", svg=True)
    places = [[axis.yaxis.label.get_window_extent().x0 for axis in column] for column in panels]
    assert places[0][0] == pytest.approx(places[0][1]) and places[1][0] == pytest.approx(places[1][1])
    assert places[1][0] > places[0][0] + 100
    assert (tmp_path / "figure.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("ends", "labels"),
    [
        ((0.9, 2500), ["1", "10", "100", "1000"]),
        ((9, 110), ["10", "20", "50", "100"]),
        ((4e-4, 0.012), ["0.0005", "0.001", "0.002", "0.005", "0.01"]),
    ],
)
def test_logarithmic_axes_have_plain_numbers(ends, labels):
    figure = output.new_figure(3, 3)
    axis = figure.subplots()
    axis.set(yscale="log", ylim=ends)
    output.plain_ticks(axis.yaxis)
    figure.draw_without_rendering()
    low, high = ends
    assert [t.get_text() for t in axis.get_yticklabels() if low <= t.get_position()[1] <= high] == labels


def test_short_numbers():
    numbers = (0, 0.12345, 1, 17.329, 999.96, 9999.7, 123456.7, 1.5e7, 2e-5, -16.89)
    texts = ["0", "0.123", "1.000", "17.33", "1000", "10000", "123457", "1.5e+07", "2.0e-05", "-16.89"]
    assert [output.short(n) for n in numbers] == texts
    assert output.short(999.96) == "1000" and max(map(len, texts)) <= 8


def test_names_break_after_punctuation():
    assert output.wrapped("group-with_a long.name", 10) == "group-\nwith_a \nlong.name"
    assert output.wrapped("short", 10) == "short" and output.wrapped("", 10) == ""
    assert output.wrapped("a" * 25, 10) == "\n".join(["a" * 10, "a" * 10, "a" * 5])
    assert output.wrapped("Å-ß", 2).split("\n") == ["Å-", "ß"]


def test_columns_that_earlier_versions_lacked_stay_empty(tmp_path):
    log = CsvLog(tmp_path / "log.csv", ("step", "x"))
    log.write({"step": 1, "x": 5})
    log.close()
    with pytest.raises(ValueError, match="its columns are not step, x, y"):
        CsvLog(tmp_path / "log.csv", ("step", "x", "y"), resume_step=1)
    log = CsvLog(tmp_path / "log.csv", ("step", "x", "y"), resume_step=1, added=("y",))
    log.write({"step": 2, "x": 6, "y": 7})
    log.close()
    assert (tmp_path / "log.csv").read_text().split() == ["step,x,y", "1,5,", "2,6,7"]
