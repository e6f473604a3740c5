"""Cache of code: only this user can write to it, and what is incomplete or foreign is not used."""

import logging
import os
import stat
import tempfile
import threading
import time
from pathlib import Path

import pytest

from dpa4 import code_cache

pytestmark = pytest.mark.skipif(os.name != "posix", reason="owners and modes are those of POSIX")
as_root = pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root can give files away")


@pytest.fixture
def base(tmp_path, monkeypatch):
    """Folder for caches of the user."""
    path = tmp_path / "caches"
    monkeypatch.setenv("XDG_CACHE_HOME", str(path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code_cache._temporary_folder.cache_clear(), code_cache._warn.cache_clear()
    yield path
    code_cache._temporary_folder.cache_clear(), code_cache._warn.cache_clear()


def mode(path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o022])
def test_the_folder_belongs_to_the_user_alone(base, umask):
    before = os.umask(umask)
    try:
        folder = code_cache.folder()
        with code_cache.locked(folder / "one" / "code"), code_cache.write(folder / "one" / "code") as path:
            path.write_bytes(b"code")
    finally:
        os.umask(before)
    assert folder == base / "dpa4"
    assert [mode(p) for p in (base, folder, folder / "one", folder / "one" / "code")] == [0o700] * 3 + [0o600]
    assert code_cache.read(folder / "one" / "code") == b"code"


def test_a_folder_that_others_can_read_becomes_private(base):
    code_cache.folder().chmod(0o755)
    assert mode(code_cache.folder()) == 0o700


@pytest.mark.parametrize("where", ["dpa4", "."])
def test_a_folder_that_others_can_write_to_is_not_used(base, where, caplog):
    code_cache.folder()
    (base / where).chmod(0o777)
    found = code_cache.folder()
    assert not found.is_relative_to(base) and mode(found) == 0o700
    assert code_cache.folder() == found
    (record,) = caplog.records
    assert f"other users can write to {(base / where).resolve()}" in record.getMessage()


@as_root
@pytest.mark.parametrize("where", ["dpa4", "."])
def test_a_folder_of_another_user_is_not_used(base, where, caplog):
    code_cache.folder()
    os.chown(base / where, 65534, 65534)
    assert not code_cache.folder().is_relative_to(base)
    assert "belongs to another user (65534)" in caplog.text


@as_root
def test_a_link_of_another_user_is_not_followed(base, tmp_path):
    base.symlink_to(tmp_path / "caches of mine")
    (tmp_path / "caches of mine").mkdir(mode=0o700)
    assert code_cache.folder() == base / "dpa4"
    os.chown(base, 65534, 65534, follow_symlinks=False)
    assert not code_cache.folder().is_relative_to(base)


def test_folders_above_that_are_sticky_are_accepted(base):
    base.mkdir()
    base.chmod(0o1777)  # like /tmp
    assert code_cache.folder() == base / "dpa4"


def test_the_group_of_the_user_alone_is_accepted(base, monkeypatch):
    base.mkdir()
    base.chmod(0o775)
    monkeypatch.setattr(code_cache, "_is_own_group", lambda gid: True)
    assert code_cache.folder() == base / "dpa4"
    monkeypatch.setattr(code_cache, "_is_own_group", lambda gid: False)
    assert code_cache.folder() != base / "dpa4"


@pytest.mark.parametrize("home", ["missing", None])
def test_without_a_home_a_temporary_folder_is_used(base, tmp_path, monkeypatch, home, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    if home is None:

        def no_home():
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(Path, "home", no_home)
    else:
        monkeypatch.setenv("HOME", str(tmp_path / home))
    found = code_cache.folder()
    assert found.parent == tmp_path and found.name.startswith("dpa4-") and mode(found) == 0o700
    assert not (tmp_path / "missing").exists()
    assert len(caplog.records) == 1


def test_the_home_is_the_default(base, tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert code_cache.folder() == tmp_path / ".cache" / "dpa4"


def write(content: bytes = b"code"):
    file = code_cache.folder() / "sub" / "file"
    with code_cache.write(file) as path:
        path.write_bytes(content)
    return file


@pytest.mark.parametrize("length", [0, 2, 3])
def test_a_cut_file_is_not_used(base, length):
    os.truncate(write(), length)
    assert code_cache.read(base / "dpa4" / "sub" / "file") is None
    assert code_cache.read(write()) == b"code"


def test_a_file_without_its_digest_is_not_used(base):
    """A process that is killed between the two writes leaves such a file."""
    file = write()
    (digest,) = file.parent.glob("file.sha256")
    digest.write_text("")
    assert code_cache.read(file) is None
    digest.unlink()
    assert code_cache.read(file) is None


@pytest.mark.parametrize("where", ["sub", "sub/file"])
def test_a_file_that_others_could_have_written_is_not_used(base, where):
    write()
    (base / "dpa4" / where).chmod(0o777)
    assert code_cache.read(base / "dpa4" / "sub" / "file") is None


@as_root
@pytest.mark.parametrize("where", ["sub", "sub/file"])
def test_a_file_of_another_user_is_not_used(base, where):
    write()
    os.chown(base / "dpa4" / where, 65534, 65534)
    assert code_cache.read(base / "dpa4" / "sub" / "file") is None


def test_a_write_that_fails_leaves_the_file_as_it_was(base):
    file = write()
    with pytest.raises(OSError, match="full"), code_cache.write(file) as path:
        path.write_bytes(b"c")
        raise OSError("disk full")
    assert code_cache.read(file) == b"code"
    assert not list(file.parent.glob(".*.tmp"))


def test_threads_wait_for_each_other(base, monkeypatch):
    file, inside, most = code_cache.folder() / "file", [], []

    def work():
        with code_cache.locked(file):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.02)
            inside.pop()

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1]
    monkeypatch.setattr(code_cache, "LOCK_SECONDS", 0.1)
    with code_cache.locked(file), code_cache.locked(file):
        pass  # a process that hangs does not stop others for ever


def test_the_cache_of_the_compiler_is_moved_unless_the_user_chose_one(base, monkeypatch, tmp_path):
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    for absent in (None, default_cache_dir()):  # PyTorch sets the variable to its default at first use
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
        if absent:
            monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", absent)
        code_cache.confine_inductor()
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(base / "dpa4" / "inductor")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "chosen"))
    code_cache.confine_inductor()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "chosen")


def test_warnings_are_given_once(base, caplog):
    base.mkdir()
    base.chmod(0o777)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            code_cache.folder()
    assert len(caplog.records) == 1
