"""Files: full disks, temporary files, encodings."""

import errno
import os
import stat
import subprocess
import sys

import pytest
from ase.build import molecule
from ase.io import read

from dpa4.data import write_structures
from dpa4.output import (
    CsvLog,
    atomic_write,
    check_writable,
    cut_back,
    write_json,
)


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
