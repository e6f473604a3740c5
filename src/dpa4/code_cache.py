"""Cache of compiled and traced code, in a folder to which only this user can write.

Code that is found in the cache runs in this process, so it must come from this user. The folder is ``dpa4`` in
``$XDG_CACHE_HOME`` or ``~/.cache``. If another user could change it or one of the folders above it, a temporary
folder takes its place. Every file has a digest beside it: files that are incomplete or were replaced are not used.
"""

import atexit
import hashlib
import logging
import os
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import IO

from dpa4.output import atomic_write

_IS_POSIX = os.name == "posix"
if _IS_POSIX:
    import fcntl
    import grp
    import pwd

LOCK_SECONDS = 900.0
"""Longest wait for another process, which may compile for minutes; afterwards both do the work."""

_LOG = logging.getLogger(__name__)
_ONCE = threading.Lock()


def folder() -> Path:
    """Folder of cached code; created if it is missing.

    If it is not safe or cannot be written, a warning gives the reason, and a temporary folder is returned, which is
    deleted when the process ends.
    """
    try:
        chosen = _user_cache() / "dpa4"
        _create(chosen)
        if (reason := _danger(chosen)) is None:
            return chosen
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        reason = str(error)
    with _ONCE:
        _warn(reason)
        return _temporary_folder(os.getpid())


def confine_inductor() -> None:
    """Move the cache of PyTorch's compiler into `folder`, unless the user has set TORCHINDUCTOR_CACHE_DIR.

    The compiler's own default is a folder of predictable name in the system's temporary folder. It reads the variable
    whenever it opens its cache, and sets it to the default if it is absent. Call this function before the compiler is
    imported, since that already reads a file of its cache.
    """
    if chosen := os.environ.get("TORCHINDUCTOR_CACHE_DIR"):
        from torch._inductor.runtime.cache_dir_utils import default_cache_dir

        if os.path.abspath(chosen) != default_cache_dir():
            return
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder() / "inductor")


def read(file: Path) -> bytes | None:
    """Content of a cached file; None if it is missing or incomplete, or another user could have written it."""
    try:
        if reason := _exposure(file.parent) or _exposure(file):
            _LOG.info("cached code is not used: %s", reason)
            return None
        content, expected = (
            file.read_bytes(),
            _digest_file(file).read_text(encoding="ascii", errors="replace"),
        )
    except OSError:
        return None
    if expected.split()[:1] != [hashlib.sha256(content).hexdigest()]:
        _LOG.info("cached code is not used: %s does not have the digest with which it was written", file)
        return None
    return content


@contextmanager
def write(file: Path) -> Iterator[Path]:
    """Yield a temporary path; the file there becomes the cached file, with its digest, unless the block raises."""
    _create(file.parent)
    with atomic_write(file) as temporary:
        yield temporary
        temporary.chmod(0o600)
        digest = hashlib.sha256(temporary.read_bytes()).hexdigest()
    with atomic_write(_digest_file(file)) as temporary:
        temporary.write_text(f"{digest}  {file.name}\n", encoding="ascii")  # as sha256sum writes it


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Exclude other threads and processes that want to produce the same cached file.

    After `LOCK_SECONDS`, or where files cannot be locked, the block runs all the same: writes are atomic.
    """
    with ExitStack() as opened:
        try:
            _create(file.parent)
            _lock(opened.enter_context(file.with_name(f".{file.name}.lock").open("w")))
        except OSError as error:  # some network file systems have no locks
            _LOG.info("%s is not locked: %s", file, error)
        yield  # closing the lock file unlocks it


def _lock(opened: IO[str]) -> None:
    deadline = time.monotonic() + LOCK_SECONDS
    while _IS_POSIX and time.monotonic() < deadline:
        try:
            return fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # another thread or process has the lock
            time.sleep(0.05)


def _digest_file(file: Path) -> Path:
    return file.with_name(f"{file.name}.sha256")


def _user_cache() -> Path:
    """Folder of the user for caches (XDG base directory specification, where a relative path is ignored)."""
    chosen = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if chosen.is_absolute():
        return chosen
    home = Path.home().absolute()
    if not home.is_dir():
        raise FileNotFoundError(f"the home folder {home} does not exist")
    return home / ".cache"


def _create(wanted: Path) -> None:
    """Create a folder and its parents, all with mode 0700."""
    missing = [p for p in (wanted, *wanted.parents) if not p.exists()]
    for path in reversed(missing):
        path.mkdir(mode=0o700, exist_ok=True)


def _danger(chosen: Path) -> str | None:
    """Way in which another user could change the files of a folder; None if there is none.

    As in SSH, the folders above count as well: whoever can write to one of them can exchange what is in it. The
    folder itself becomes unreadable for others.
    """
    if reason := _exposure(chosen):
        return reason
    above = {*chosen.parents, *chosen.resolve().parents}
    if reason := next((found for p in sorted(above) if (found := _exposure(p, sticky=True))), None):
        return reason
    if _IS_POSIX and stat.S_IMODE(chosen.stat().st_mode) != 0o700:
        chosen.chmod(0o700)
    return None if os.access(chosen, os.W_OK) else f"{chosen} cannot be written"


def _exposure(path: Path, sticky: bool = False) -> str | None:
    """Way in which another user could change a file or the entries of a folder; None if there is none.

    Args:
        path: File, folder or symbolic link; of a link, its owner counts.
        sticky: Accept folders whose entries only their owners can rename and delete, such as /tmp.
    """
    if not _IS_POSIX:  # on Windows the profile of a user is private
        return None
    status = path.lstat()
    if status.st_uid not in (0, os.geteuid()):
        return f"{path} belongs to another user ({status.st_uid})"
    if stat.S_ISLNK(status.st_mode) or (sticky and status.st_mode & stat.S_ISVTX):
        return None
    group = status.st_mode & stat.S_IWGRP and not _is_own_group(status.st_gid)
    return f"other users can write to {path}" if group or status.st_mode & stat.S_IWOTH else None


@cache
def _is_own_group(gid: int) -> bool:
    """Return whether a group is the private group of this user, as many Linux distributions create it."""
    try:
        user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(gid)
    except KeyError:
        return False
    return gid == user.pw_gid and group.gr_name == user.pw_name and set(group.gr_mem) <= {user.pw_name}


@cache
def _warn(reason: str) -> None:
    _LOG.warning("compiled code is not kept for later runs, since %s; make that folder yours alone", reason)


@cache
def _temporary_folder(process: int) -> Path:
    """Private temporary folder of this process, deleted at its end; the number keys the cache after a fork."""
    found = Path(tempfile.mkdtemp(prefix="dpa4-"))

    def remove() -> None:
        if os.getpid() == process:
            shutil.rmtree(found, ignore_errors=True)

    atexit.register(remove)
    return found
