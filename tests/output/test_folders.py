"""Folders of results: locks, leftovers, results that stay."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from dpa4.output import (
    OutputFolder,
    already_there,
    check_replaceable,
    folders,
)

ROOT = Path(__file__).resolve().parents[2]


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

    monkeypatch.setattr(folders, "_lock", refuse)
    with pytest.warns(UserWarning, match="cannot be locked .No locks available.; let no other process"):
        OutputFolder(tmp_path).close()


def test_one_wording_for_results_that_are_not_replaced(tmp_path):
    file = tmp_path / "a.xyz"
    check_replaceable(file, overwrite=False)
    file.touch()
    check_replaceable(file, overwrite=True)
    with pytest.raises(
        FileExistsError, match="a.xyz already exists; replace it with --overwrite, or choose another name"
    ):
        check_replaceable(file, overwrite=False)
    ends = "replace it with --overwrite, or choose another folder"
    assert (
        str(already_there(tmp_path, "a run"))
        == f"{tmp_path} already holds a run; continue it with --resume, {ends}"
    )
    assert str(already_there(tmp_path, "a run", resumable=False)) == f"{tmp_path} already holds a run; {ends}"


def test_no_other_wording():
    """Errors of this kind come from `already_there` alone."""
    found = [path.name for path in (ROOT / "src").rglob("*.py") if "FileExistsError(" in path.read_text()]
    assert found == ["folders.py"]
