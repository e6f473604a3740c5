"""Create the data for starter potentials: small molecules and clusters with GFN2-xTB energies and forces.

Three steps, each of which may run on another machine::

    python scripts/make_starter_data.py molecules molecules.json.gz
    python scripts/make_starter_data.py label molecules.json.gz labels.db --jobs 16 --minutes 9
    python scripts/make_starter_data.py write molecules.json.gz labels.db starter-data

``molecules`` enumerates molecules and needs rdkit (and numpy, scipy, ase); ``label`` creates structures and labels
and needs tblite, ase, scipy and numpy; ``write`` needs tblite, for the free atoms, ase and numpy. The package dpa4 is
not needed. Same command, same result: every system has random numbers of its own, from its name. ``label`` can be
interrupted at any time; the same command continues. ``write`` writes train.xyz.xz, valid.xyz.xz, test.xyz.xz and
DATA_CARD.md from the systems that are finished.
"""

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from hashlib import sha256
from importlib.metadata import version
from itertools import islice
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any

from starter_data.storage import Database, Molecule, System, read_molecules, write_molecules

MOLECULES = {
    "diatomic": 100,
    "inorganic": 100,
    "small": 200,
    "alkane": 100,
    "hydrocarbon": 240,
    "medium": 640,
    "biomolecule": 300,
    "aromatic": 650,
    "heteroaromatic": 800,
    "aliphatic-ring": 750,
    "chain": 650,
    "heteroatom-chain": 550,
    "carbonyl": 750,
}
DIMERS, CLUSTERS, WATER = 1400, 600, 160
CONFORMERS = 2

_molecules: list[Molecule] = []  # of a worker process


def make_molecules(path: Path, share: float, jobs: int) -> None:
    """Enumerate molecules and clusters and write them."""
    from rdkit import rdBase
    from starter_data import enumeration
    from starter_data.systems import systems

    enumeration.quiet()
    counts = {family: max(1, round(share * count)) for family, count in MOLECULES.items()}
    families = enumeration.enumerate_molecules(counts)
    with ProcessPoolExecutor(jobs, get_context("spawn"), enumeration.quiet) as pool:
        found = pool.map(
            enumeration.embed, families, families.values(), [CONFORMERS] * len(families), chunksize=16
        )
        molecules = [molecule for molecule in found if molecule is not None]
    chosen = systems(molecules, *(round(share * count) for count in (DIMERS, CLUSTERS, WATER)))
    write_molecules(path, molecules, chosen)
    print(
        f"{path}: {len(molecules):,} molecules ({len(families) - len(molecules)} without conformers), "
        f"{len(chosen):,} systems, {path.stat().st_size / 1e6:.2f} MB, RDKit {rdBase.rdkitVersion}"
    )
    print(dict(Counter(system.family for system in chosen)))
    print(dict(Counter(molecule.split for molecule in molecules)))


def label(path: Path, output: Path, jobs: int, minutes: float) -> None:
    """Create and label structures of all systems that are not finished, until the time is over."""
    molecules, systems = read_molecules(path)
    database = Database(output, sha256(path.read_bytes()).hexdigest())
    finished = database.names()
    open_systems = [system for system in systems if system.name not in finished]
    print(f"{len(finished):,} of {len(systems):,} systems are finished")
    start = time.monotonic()
    frames = count = 0
    with ProcessPoolExecutor(jobs, get_context("spawn"), _start_worker, (path,)) as pool:
        for system, (found, seconds, dropped) in _results(pool, open_systems, jobs, start + 60 * minutes):
            database.add(system.name, found, seconds, dropped)
            frames += 0 if found is None else len(found.energies)
            count += 1
            if count % 100 == 0:
                _report(frames, count, start)
    _report(frames, count, start)
    left = len(open_systems) - count
    print(f"{left:,} systems are left; the same command continues" if left else "all systems are finished")
    database.close()


def write(path: Path, labels: Path, folder: Path) -> None:
    """Write the files of the splits and the data card."""
    from starter_data.card import write_splits
    from starter_data.sampling import free_atoms

    if not labels.exists():
        raise ValueError(f"{labels} does not exist; run the step label first")
    molecules, systems = read_molecules(path)
    database = Database(labels, sha256(path.read_bytes()).hexdigest())
    if not database.names():
        raise ValueError(f"{labels} has no structures yet; run the step label again")
    program = f"tblite {version('tblite')}"
    print(write_splits(folder, molecules, systems, database, free_atoms(), program))
    database.close()


def main() -> None:
    """Run one of the steps."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    steps = parser.add_subparsers(dest="step", required=True)
    cores = os.cpu_count() or 1
    step = steps.add_parser("molecules", help="enumerate molecules and clusters (rdkit)")
    step.add_argument("molecules", type=Path, help="file to write, .json.gz")
    step.add_argument(
        "--share", type=float, default=1.0, help="share of the usual number of molecules (default 1)"
    )
    step.add_argument("--jobs", type=int, default=cores, help="processes (default: all cores)")
    step = steps.add_parser("label", help="create and label structures (tblite)")
    step.add_argument("molecules", type=Path, help="file of the step molecules")
    step.add_argument("labels", type=Path, help="database to create or to continue")
    step.add_argument("--jobs", type=int, default=cores, help="processes (default: all cores)")
    step.add_argument("--minutes", type=float, default=float("inf"), help="end after this time, in order")
    step = steps.add_parser("write", help="write the data files and the data card")
    step.add_argument("molecules", type=Path, help="file of the step molecules")
    step.add_argument("labels", type=Path, help="database of the step label")
    step.add_argument("folder", type=Path, help="folder for the files")
    arguments = parser.parse_args()
    for library in ("OMP", "OPENBLAS", "MKL"):  # one thread in each of the processes to come
        os.environ[f"{library}_NUM_THREADS"] = "1"
    try:
        if arguments.step == "molecules":
            make_molecules(arguments.molecules, arguments.share, arguments.jobs)
        elif arguments.step == "label":
            label(arguments.molecules, arguments.labels, arguments.jobs, arguments.minutes)
        else:
            write(arguments.molecules, arguments.labels, arguments.folder)
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"make_starter_data.py: {error}")


def _start_worker(path: Path) -> None:
    Thread(target=_end_with_parent, daemon=True).start()
    _molecules[:] = read_molecules(path)[0]


def _end_with_parent() -> None:
    """End this process when its parent was killed; otherwise it would wait for work for ever."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _sample(system: System) -> Any:
    """Result of a system; one that fails for an unforeseen reason is counted and does not end the run."""
    from starter_data.sampling import sample

    try:
        return sample(system, _molecules)
    except Exception as error:
        return None, {}, {f"system failed ({type(error).__name__})": 1}


def _results(
    pool: ProcessPoolExecutor, systems: list[System], jobs: int, deadline: float
) -> Iterator[tuple[System, Any]]:
    """Yield results as they come; after the deadline only those that are under way."""
    waiting = iter(systems)
    running: dict[Future[Any], System] = {}
    while True:
        if time.monotonic() < deadline:
            for system in islice(waiting, 2 * jobs - len(running)):
                running[pool.submit(_sample, system)] = system
        if not running:
            return
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            yield running.pop(future), future.result()


def _report(frames: int, systems: int, start: float) -> None:
    elapsed = time.monotonic() - start
    print(
        f"{systems:,} systems, {frames:,} structures, {elapsed:.0f} s, {frames / elapsed:.1f} structures/s",
        flush=True,
    )


if __name__ == "__main__":
    main()
