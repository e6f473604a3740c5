"""Compressed data: every kind is read; what unpacks to far more than structures is refused while it is unpacked."""

import bz2
import gzip
import lzma
import resource
import zipfile

import ase.io
import pytest
from ase.build import bulk, molecule

from dpa4.data import read_frames, unpacking

PACKERS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize("name", ["a.xyz", "a.extxyz", "a.traj", "POSCAR", "a.json"])
def test_every_compression(tmp_path, name, suffix):
    images = [bulk("Cu"), bulk("Al")][: 1 if name == "POSCAR" else 2]
    ase.io.write(tmp_path / name, images)
    packed = tmp_path / (name + suffix)
    packed.write_bytes(PACKERS[suffix]((tmp_path / name).read_bytes()))
    assert [f.atomic_numbers.tolist() for f in read_frames(packed)] == [[29], [13]][: len(images)]


@pytest.fixture
def small_limit(monkeypatch):
    monkeypatch.setattr(unpacking, "ALWAYS_ALLOWED", 2**16)


def blanks(frames: int) -> bytes:
    return (b"1\n" + b" " * 5000 + b"\nH 0 0 0\n") * frames


@pytest.mark.parametrize("suffix", PACKERS)
def test_bombs_are_refused_while_they_are_unpacked(tmp_path, small_limit, suffix):
    path = tmp_path / f"a.xyz{suffix}"
    path.write_bytes(PACKERS[suffix](blanks(2000)))
    with pytest.raises(
        ValueError, match="a.xyz.* unpacks to more than .* bytes, far more than structures do; if it"
    ):
        read_frames(path)


def test_members_of_an_archive_are_limited_together(tmp_path, small_limit):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for k in range(20):
            archive.writestr(f"{k}.xyz", blanks(100))
    with pytest.raises(ValueError, match=r"a.zip, \d+.xyz.* unpacks to more than .* bytes"):
        read_frames(path)


def test_a_line_of_gigabytes_is_not_collected(tmp_path):
    """Six megabytes of an archive would become six gigabytes of blanks."""
    path = tmp_path / "a.xyz.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("a.xyz", "w") as member:
            for _ in range(100):
                member.write(b" " * 2**20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="a line is longer than 33,554,432 characters"):
        read_frames(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000  # kB


def test_names_in_an_archive_write_nothing(tmp_path):
    """Members with absolute names, names outside of the folder, and links are read as texts."""
    inner = tmp_path / "inner"
    inner.mkdir()
    ase.io.write(tmp_path / "water.xyz", molecule("H2O"))
    with zipfile.ZipFile(inner / "a.zip", "w") as archive:
        for name in ("../outside.xyz", "/tmp/dpa4-outside.xyz", "a/../../b.xyz"):
            archive.write(tmp_path / "water.xyz", name)
    before = sorted(tmp_path.rglob("*"))
    assert len(read_frames(inner / "a.zip")) == 3
    assert sorted(tmp_path.rglob("*")) == before
    link = zipfile.ZipInfo("link.xyz")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(inner / "link.zip", "w") as archive:
        archive.writestr(link, str(tmp_path / "water.xyz"))
    with pytest.raises(
        ValueError, match="link.zip, link.xyz, frame 0: its first line must be the number of atoms"
    ):
        read_frames(inner / "link.zip")


@pytest.mark.parametrize("suffix", PACKERS)
def test_damaged_files_are_named(tmp_path, suffix):
    ase.io.write(tmp_path / "a.xyz", [molecule("C6H6")] * 50)
    packed = PACKERS[suffix]((tmp_path / "a.xyz").read_bytes())
    path = tmp_path / f"a.xyz{suffix}"
    for content in (packed[: len(packed) // 2], b"nothing"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"a.xyz\.\w+.* cannot be read by ASE: "):
            read_frames(path)
