"""Neutral closed-shell molecules from families of our own, with conformers by RDKit.

Two kinds of families: all small graphs that obey a few rules of stability, and templates with substituents.
"""

import itertools
from collections.abc import Iterable, Iterator
from hashlib import sha256

import numpy as np
from rdkit import Chem, RDLogger
from rdkit.Chem import AllChem, rdMolHash

from starter_data.families import DIATOMIC, INORGANIC, TEMPLATES, UNSTABLE
from starter_data.storage import Molecule, split_of

VALENCE = {"C": 4, "N": 3, "O": 2, "F": 1, "S": 2, "Cl": 1}
MAX_ATOMS = 30
TYPICAL_SIZE = 5.0  # atoms; the chance of a molecule falls by e with each so many atoms
COMMON = 2  # heavy atoms; molecules with at most so many are for training: they are few and form clusters
_UNSTABLE = [Chem.MolFromSmarts(pattern) for pattern in UNSTABLE]
BONDS = {1: Chem.BondType.SINGLE, 2: Chem.BondType.DOUBLE, 3: Chem.BondType.TRIPLE}


def enumerate_molecules(counts: dict[str, int]) -> dict[str, str]:
    """Return the family of each chosen canonical SMILES, at most ``counts[family]`` of each family."""
    families: dict[str, str] = {}
    for family, limit in counts.items():
        found = {smiles for smiles in _candidates(family) if smiles is not None} - families.keys()
        for smiles in sorted(found, key=_priority)[:limit]:
            families[smiles] = family
    return families


def canonical(text: str) -> str | None:
    """Canonical SMILES of a neutral closed-shell molecule with 2 to 30 atoms, or None for anything else."""
    molecule = Chem.MolFromSmiles(text)
    if molecule is None or Chem.GetFormalCharge(molecule) != 0 or "." in text:
        return None
    if any(atom.GetNumRadicalElectrons() for atom in molecule.GetAtoms()):
        return None
    if not 2 <= Chem.AddHs(molecule).GetNumAtoms() <= MAX_ATOMS:
        return None
    return Chem.MolToSmiles(molecule, isomericSmiles=False)


def skeleton(smiles: str) -> str:
    """Graph of the heavy atoms without bond orders and hydrogen; equal for tautomers and redox pairs."""
    return rdMolHash.MolHash(Chem.MolFromSmiles(smiles), rdMolHash.HashFunction.ElementGraph)


def small_graphs(elements: Iterable[str], size: int, orders: Iterable[int] = (1, 2, 3)) -> set[str]:
    """Canonical SMILES of all stable molecules with up to ``size`` heavy atoms, hydrogen saturating the valences."""
    elements, orders = list(elements), list(orders)
    level = {Chem.MolToSmiles(Chem.MolFromSmiles(f"[{e}H{VALENCE[e]}]")) for e in elements}
    found: set[str] = set()
    for _ in range(size - 1):
        grown = {s for smiles in sorted(level) for s in _extensions(smiles, elements, orders)}
        closed, frontier = set(grown), grown
        while frontier and len(orders) > 1:
            frontier = {s for smiles in sorted(frontier) for s in _closures(smiles)} - closed
            closed |= frontier
        level = closed
        found |= {s for s in closed if is_stable(s)}
    return found


def is_stable(smiles: str) -> bool:
    """Return True if a molecule has none of the patterns of ``UNSTABLE``."""
    molecule = Chem.MolFromSmiles(smiles)
    return not any(molecule.HasSubstructMatch(pattern) for pattern in _UNSTABLE)


def substituted(family: str) -> Iterator[str | None]:
    """Yield canonical SMILES of all templates of a family with all pairs of its substituents."""
    templates, groups = TEMPLATES[family]
    for template in templates:
        places = [place for place in ("a", "b") if "{" + place + "}" in template]
        for chosen in itertools.product(groups, repeat=len(places)):
            smiles = canonical(template.format(**dict(zip(places, chosen, strict=True))))
            yield smiles if smiles is not None and is_stable(smiles) else None


def embed(smiles: str, family: str, conformers: int) -> Molecule | None:
    """Molecule with up to ``conformers`` conformers, relaxed by a force field (MMFF94, otherwise UFF)."""
    graph = Chem.AddHs(Chem.MolFromSmiles(smiles))
    seed = int.from_bytes(sha256(smiles.encode()).digest()[:3], "big")
    numbers = [atom.GetAtomicNum() for atom in graph.GetAtoms()]
    if len(numbers) == 2:
        table = Chem.GetPeriodicTable()
        length = sum(table.GetRcovalent(z) for z in numbers)
        shapes = [np.array([[0.0, 0.0, 0.0], [0.0, 0.0, length]])]
    else:
        found = AllChem.EmbedMultipleConfs(
            graph, conformers, randomSeed=seed, pruneRmsThresh=0.3, maxAttempts=20
        )
        if not list(found):
            return None
        relax = (
            AllChem.MMFFOptimizeMoleculeConfs
            if AllChem.MMFFHasAllMoleculeParams(graph)
            else AllChem.UFFOptimizeMoleculeConfs
        )
        relax(graph, numThreads=1, maxIters=500)
        shapes = [conformer.GetPositions() for conformer in graph.GetConformers()]
    bonds = [[b.GetBeginAtomIdx(), b.GetEndAtomIdx(), b.GetBondTypeAsDouble()] for b in graph.GetBonds()]
    heavy = sum(number > 1 for number in numbers)
    split = "train" if heavy <= COMMON else split_of(skeleton(smiles))
    return Molecule(smiles, family, split, numbers, bonds, [np.round(s, 3).tolist() for s in shapes])


def quiet() -> None:
    """Switch off RDKit's messages; SMILES that are chemically impossible are expected here."""
    RDLogger.DisableLog("rdApp.*")


def _candidates(family: str) -> Iterable[str | None]:
    if family == "diatomic":
        return map(canonical, DIATOMIC)
    if family == "inorganic":
        return map(canonical, INORGANIC)
    if family == "alkane":
        return map(canonical, small_graphs(["C"], 9, [1]))
    if family == "small":
        return map(canonical, small_graphs(VALENCE, 3))
    if family == "medium":
        return map(canonical, small_graphs(VALENCE, 4))
    if family == "hydrocarbon":
        return map(canonical, small_graphs(["C"], 6))
    return substituted(family)


def _priority(smiles: str) -> float:
    """Random number that depends on the SMILES only, tends to be low for small molecules, and orders the choice."""
    uniform = (1 + int.from_bytes(sha256(smiles.encode()).digest()[:6], "big")) / 2**48
    atoms = Chem.AddHs(Chem.MolFromSmiles(smiles)).GetNumAtoms()
    return -np.log(uniform) * np.exp(atoms / TYPICAL_SIZE)


def _extensions(smiles: str, elements: list[str], orders: list[int]) -> Iterator[str]:
    """Yield molecules with one more heavy atom."""
    molecule = Chem.MolFromSmiles(smiles)
    for atom, element, order in itertools.product(molecule.GetAtoms(), elements, orders):
        if atom.GetTotalNumHs() >= order <= VALENCE[element]:
            grown = Chem.RWMol(molecule)
            Chem.Kekulize(grown, clearAromaticFlags=True)
            grown.AddBond(atom.GetIdx(), grown.AddAtom(Chem.Atom(element)), BONDS[order])
            yield from _sanitised(grown)


def _closures(smiles: str) -> Iterator[str]:
    """Yield molecules with one more ring of single bonds."""
    molecule = Chem.MolFromSmiles(smiles)
    for i, j in itertools.combinations(range(molecule.GetNumAtoms()), 2):
        free = all(molecule.GetAtomWithIdx(k).GetTotalNumHs() for k in (i, j))
        if free and molecule.GetBondBetweenAtoms(i, j) is None:
            grown = Chem.RWMol(molecule)
            Chem.Kekulize(grown, clearAromaticFlags=True)
            grown.AddBond(i, j, BONDS[1])
            yield from _sanitised(grown)


def _sanitised(molecule: Chem.RWMol) -> Iterator[str]:
    for atom in molecule.GetAtoms():
        atom.SetNoImplicit(False)
        atom.SetNumExplicitHs(0)
    if Chem.SanitizeMol(molecule, catchErrors=True) == Chem.SanitizeFlags.SANITIZE_NONE:
        yield Chem.MolToSmiles(molecule)
