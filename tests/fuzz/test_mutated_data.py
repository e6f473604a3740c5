"""Damaged and hostile data in databases, archives, compressed files and formats of ASE; limits as for checkpoints."""

import bz2
import gzip
import io
import json
import lzma
import random
import zipfile

import ase.db
import ase.io
import pytest
from fuzz_workers import Target
from mutations import mutated_bytes, mutated_value
from test_mutated_files import check, file_maker, finite_labels, images

from dpa4.data import read_frames
from vasp_runs import write_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.mark.parametrize(
    ("name", "seed"),
    [("data.traj", 82), ("POSCAR", 83), ("data.cif", 84), ("data.db", 85), ("data.xyz.gz", 86), ("data.xyz.xz", 87),
     ("data.xyz.bz2", 88), ("data.zip", 89), ("data.json", 90), ("data.traj.gz", 91),
     ("OUTCAR", 95), ("vasprun.xml", 96)],
)  # fmt: skip
def test_bytes(tmp_path, name, seed):
    original = tmp_path / f"original-{name}"
    plain = tmp_path / "plain.xyz"
    ase.io.write(plain, images())
    pack = {".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress}.get(original.suffix)
    if original.suffix in (".db", ".json"):
        with ase.db.connect(original) as database:
            for atoms in images():
                database.write(atoms, config_type="known", data={"charge": 0, "spin": 1})
    elif original.suffix == ".zip":
        with zipfile.ZipFile(original, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.write(plain, "a/b.xyz")
            archive.write(plain, "c.extxyz")
    elif ".traj" in name:
        ase.io.write(original.with_suffix(".traj"), images())
        if pack:
            original.write_bytes(pack(original.with_suffix(".traj").read_bytes()))
    elif name in ("OUTCAR", "vasprun.xml"):
        write_run(tmp_path / "run", 2)
        original = tmp_path / "run" / name
    elif pack:
        original.write_bytes(pack(plain.read_bytes()))
    else:
        ase.io.write(original, images()[2], format="vasp" if name == "POSCAR" else None)
    data = original.read_bytes()

    def content(rng: random.Random) -> bytes:
        return mutated_bytes(rng, data, head=rng.choice((200, len(data))))

    check(Target(file_maker(name, content), read_frames, finite_labels), tmp_path, seed)


def test_values_of_json_databases(tmp_path):
    with ase.db.connect(tmp_path / "original.json") as database:
        for atoms in images():
            database.write(atoms, config_type="known", data={"charge": 0, "spin": 1})
    content = json.loads((tmp_path / "original.json").read_text())

    def changed(rng: random.Random) -> bytes:
        return json.dumps(mutated_value(rng, content)).encode("utf-8", "surrogatepass")

    check(Target(file_maker("data.json", changed), read_frames, finite_labels), tmp_path, 92)


def test_compressed_extended_xyz(tmp_path):
    """Text that is changed before it is packed, often to something that repeats without end."""
    stream = io.StringIO()
    ase.io.write(stream, images(), format="extxyz")
    text = stream.getvalue().encode()

    def content(rng: random.Random) -> bytes:
        changed = mutated_bytes(rng, text)
        if rng.random() < 0.2:
            at = rng.randint(0, len(changed))
            changed = changed[:at] + rng.choice((b" ", b"\n", b"9", b"\0")) * 10**6 + changed[at:]
        return gzip.compress(changed, 1)

    check(Target(file_maker("data.xyz.gz", content), read_frames, finite_labels), tmp_path, 93)
