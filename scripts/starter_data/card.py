"""Data files by split and the data card that describes them."""

import lzma
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np
from ase.data import chemical_symbols

from starter_data.storage import FORCE_DECIMALS, POSITION_DECIMALS, SPLITS, Database, Frames, Molecule, System

PERCENTILES = (0, 1, 25, 50, 75, 99, 100)

HEAD = """\
# Starter data: small molecules and clusters with GFN2-xTB labels

Structures were enumerated, distorted and labelled by `scripts/make_starter_data.py`. No structure or label comes from
another data set. The level of theory is GFN2-xTB, a semi-empirical method, in its closed-shell form at an electronic
temperature of 300 K. A model that is trained on these data has at best the accuracy of GFN2-xTB, not of DFT.

* Energies in eV (total energies of GFN2-xTB), forces in eV/Angstrom, positions in Angstrom; no periodic cells.
* Files: extended XYZ, compressed by xz, one for each split. `config_type` is the family, `kind` the origin of the
  structure, `system` the molecule (SMILES) or the cluster.
* Split: molecules whose heavy atoms form the same graph (regardless of bond orders and hydrogen) are in one split, so
  that neither molecules of the test nor their tautomers are in the training data. Molecules with at most two heavy
  atoms are for training only. Dimers and clusters for tests consist of molecules for tests, and water. Water clusters
  for tests are unseen arrangements, not unseen molecules.
* Free atoms in their ground-state multiplicities are the first structures of `train.xyz.xz`.
* Dropped: structures without converged charges, with forces above 30 eV/Angstrom, with an energy of more than
  6 eV + 0.4 eV/atom above the lowest structure of the same system, with an orbital gap below 0.1 eV, and duplicates
  (sorted distances equal within 0.01 Angstrom RMS).
"""


def write_splits(
    folder: Path,
    molecules: list[Molecule],
    systems: list[System],
    database: Database,
    atoms: dict[str, float],
    program: str,
) -> str:
    """Write ``train.xyz.xz``, ``valid.xyz.xz``, ``test.xyz.xz`` and ``DATA_CARD.md``; return the text of the card.

    Args:
        folder: Folder for the files.
        molecules: All molecules.
        systems: All systems.
        database: Labelled structures.
        atoms: Energies of the free atoms in eV.
        program: Name and version of the program that computed the labels.
    """
    folder.mkdir(parents=True, exist_ok=True)
    by_name = {system.name: system for system in systems}
    statistics = Statistics(atoms)
    files = {split: lzma.open(folder / f"{split}.xyz.xz", "wt", preset=6) for split in SPLITS}
    for symbol, energy in atoms.items():
        files["train"].write(isolated_atom(symbol, energy))
    for name, frames, seconds, dropped in database.results():
        system = by_name[name]
        statistics.add(system, molecules, frames, seconds, dropped)
        if frames is not None:
            files[system.split].writelines(extended_xyz(system, molecules, frames))
    for file in files.values():
        file.close()
    text = HEAD + f"* Labels by {program}, accuracy 0.1.\n" + statistics.text(len(systems)) + _files(folder)
    (folder / "DATA_CARD.md").write_text(text)
    return text


def title(system: System, molecules: list[Molecule]) -> str:
    """Name of a molecule, or of a cluster with its members."""
    if len(system.members) == 1:
        return system.name
    return f"{system.name}: " + " + ".join(molecules[k].smiles for k in system.members)


def extended_xyz(system: System, molecules: list[Molecule], frames: Frames) -> Iterable[str]:
    """Yield the structures of a system as extended XYZ."""
    symbols = [chemical_symbols[z] for z in frames.numbers]
    name = title(system, molecules)
    for positions, energy, forces, kind in zip(
        frames.positions, frames.energies, frames.forces, frames.kinds, strict=True
    ):
        lines = [
            " ".join([symbol, *_digits(place, POSITION_DECIMALS), *_digits(force, FORCE_DECIMALS)])
            for symbol, place, force in zip(symbols, positions.tolist(), forces.tolist(), strict=True)
        ]
        yield (
            f"{len(symbols)}\nProperties=species:S:1:pos:R:3:forces:R:3 energy={energy:.6f} "
            f'config_type={system.family} kind={kind} system="{name}" pbc="F F F"\n' + "\n".join(lines) + "\n"
        )


def isolated_atom(symbol: str, energy: float) -> str:
    """Free atom as extended XYZ."""
    return (
        f"1\nProperties=species:S:1:pos:R:3:forces:R:3 energy={energy:.6f} config_type=IsolatedAtom "
        f'pbc="F F F"\n{symbol} 0.0 0.0 0.0 0.0 0.0 0.0\n'
    )


class Statistics:
    """Counts and distributions for the data card."""

    def __init__(self, atoms: dict[str, float]) -> None:
        """Start with the energies of the free atoms in eV."""
        self.atoms = atoms
        self.systems: Counter[tuple[str, str]] = Counter()
        self.frames: Counter[tuple[str, str]] = Counter()
        self.kinds: Counter[tuple[str, str]] = Counter()
        self.seconds: dict[str, dict[str, float]] = {"family": defaultdict(float), "kind": defaultdict(float)}
        self.dropped: Counter[str] = Counter()
        self.elements: Counter[str] = Counter()
        self.values: dict[tuple[str, str], list[float]] = defaultdict(list)

    def add(
        self,
        system: System,
        molecules: list[Molecule],
        frames: Frames | None,
        seconds: dict[str, float],
        dropped: dict[str, int],
    ) -> None:
        """Count the result of a system."""
        self.dropped.update(dropped)
        for kind, time in seconds.items():
            self.seconds["family"][system.family] += time
            self.seconds["kind"][kind] += time
        if frames is None:
            return
        self.systems[system.family, system.split] += 1
        self.frames[system.family, system.split] += len(frames.energies)
        symbols = [chemical_symbols[z] for z in frames.numbers]
        for symbol in set(symbols):
            self.elements[symbol] += len(frames.energies)
        free = sum(self.atoms[symbol] for symbol in symbols)
        norms = np.linalg.norm(frames.forces, axis=-1)
        energies = (frames.energies - free) / len(symbols)
        excess = (frames.energies - frames.energies.min()) / len(symbols)
        for k, kind in enumerate(frames.kinds):
            self.kinds[kind, system.split] += 1
            for group in ("all", system.family, kind):
                self.values["size", group].append(len(symbols))
                self.values["energy relative to free atoms (eV/atom)", group].append(energies[k])
                self.values["energy above the lowest of the system (eV/atom)", group].append(excess[k])
                self.values["RMS force (eV/Angstrom)", group].append(np.sqrt((norms[k] ** 2).mean()))
                self.values["largest force (eV/Angstrom)", group].append(norms[k].max())
                self.values["orbital gap (eV)", group].append(float(frames.gaps[k]))

    def text(self, planned: int) -> str:
        """Tables in Markdown."""
        total = sum(self.frames.values())
        families = sorted({family for family, _ in self.frames})
        kinds = sorted({kind for kind, _ in self.kinds})
        parts = [
            f"\n{total:,} structures of {sum(self.systems.values()):,} systems; {planned:,} systems are planned.\n",
            "\n## Families\n\n",
            _table(
                ("family", "systems", *SPLITS, "structures", "median atoms", "ms per structure"),
                [self._row(family, self.frames, self.seconds["family"], True) for family in families],
            ),
            "\n## Kinds of structures\n\n",
            _table(
                ("kind", *SPLITS, "structures", "median atoms", "ms per structure"),
                [self._row(kind, self.kinds, self.seconds["kind"], False) for kind in kinds],
            ),
            "\n## Distributions\n\n",
            _table(("quantity", *(f"{p} %" for p in PERCENTILES)), self._distributions("all")),
            "\n### Energy above the lowest structure of the system, by kind (eV/atom)\n\n",
            _table(("kind", *(f"{p} %" for p in PERCENTILES)), self._by(kinds, "energy above the lowest")),
            "\n### Largest force, by kind (eV/Angstrom)\n\n",
            _table(("kind", *(f"{p} %" for p in PERCENTILES)), self._by(kinds, "largest force")),
            "\n## Elements\n\n",
            _table(
                ("element", "structures", "energy of the free atom (eV)"),
                [
                    (symbol, f"{self.elements[symbol]:,}", f"{energy:.6f}")
                    for symbol, energy in self.atoms.items()
                ],
            ),
            "\n## Dropped\n\n",
            _table(
                ("reason", "structures"), [(reason, f"{n:,}") for reason, n in self.dropped.most_common()]
            ),
            f"\nCost: {sum(self.seconds['kind'].values()) / 3600:.2f} core-hours.\n",
        ]
        return "".join(parts)

    def _row(
        self, group: str, counts: Counter[tuple[str, str]], seconds: dict[str, float], with_systems: bool
    ) -> tuple[str, ...]:
        frames = [counts[group, split] for split in SPLITS]
        systems = (f"{sum(self.systems[group, split] for split in SPLITS):,}",) if with_systems else ()
        return (
            group,
            *systems,
            *(f"{n:,}" for n in frames),
            f"{sum(frames):,}",
            f"{np.median(self.values['size', group]):.0f}",
            f"{1000 * seconds[group] / sum(frames):.0f}",
        )

    def _distributions(self, group: str) -> list[tuple[str, ...]]:
        names = [name for name, of in self.values if of == group]
        return [(name, *_percentiles(self.values[name, group])) for name in names]

    def _by(self, groups: Sequence[str], beginning: str) -> list[tuple[str, ...]]:
        (name,) = {name for name, _ in self.values if name.startswith(beginning)}
        return [(group, *_percentiles(self.values[name, group])) for group in groups]


def _digits(vector: Iterable[float], decimals: int) -> list[str]:
    return [f"{value:.{decimals}f}" for value in vector]


def _percentiles(values: Sequence[float]) -> tuple[str, ...]:
    return tuple(f"{value:.3g}" for value in np.percentile(values, PERCENTILES))


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [" | ".join(head), " | ".join("---" for _ in head), *(" | ".join(row) for row in rows)]
    return "".join(f"| {line} |\n" for line in lines)


def _files(folder: Path) -> str:
    rows = []
    for split in SPLITS:
        content = (folder / f"{split}.xyz.xz").read_bytes()
        rows.append((f"{split}.xyz.xz", f"{len(content) / 1e6:.2f}", sha256(content).hexdigest()))
    return "\n## Files\n\n" + _table(("file", "MB", "SHA-256"), rows)
