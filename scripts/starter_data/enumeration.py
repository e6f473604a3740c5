"""Neutral closed-shell molecules from families of our own, with conformers by RDKit.

Two kinds of families: all small graphs that obey a few rules of stability, and templates with substituents.
"""

import itertools
from collections.abc import Iterable, Iterator
from hashlib import sha256

import numpy as np
from rdkit import Chem, RDLogger
from rdkit.Chem import AllChem, rdMolHash

from starter_data.storage import Molecule, split_of

VALENCE = {"C": 4, "N": 3, "O": 2, "F": 1, "S": 2, "Cl": 1}
MAX_ATOMS = 30
COMMON = 2  # molecules with at most so many heavy atoms are always for training: they are few and the parts of clusters
BONDS = {1: Chem.BondType.SINGLE, 2: Chem.BondType.DOUBLE, 3: Chem.BondType.TRIPLE}

DIATOMIC = ["[H][H]", "N#N", "[C-]#[O+]", "F", "Cl", "FF", "ClCl", "FCl", "Br", "BrBr"]
INORGANIC = [
    *("O", "N", "S", "P", "C", "OO", "NN", "NO", "SS", "O=C=O", "S=C=S", "O=C=S", "[N-]=[N+]=O", "O=S=O"),
    *("O=S(=O)=O", "OS(=O)(=O)O", "O[N+](=O)[O-]", "ON=O", "OP(=O)(O)O", "OP(O)O", "[H]N=N[H]", "N=[N+]=[N-]"),
    *("FC(F)(F)F", "ClC(Cl)(Cl)Cl", "FP(F)F", "ClP(Cl)Cl", "FS(F)(F)(F)(F)F", "O=S(Cl)Cl", "O=P(Cl)(Cl)Cl"),
    *("FN(F)F", "FOF", "ClOCl", "OCl", "NCl", "ClSCl", "ClN(Cl)Cl", "ON", "C#N", "OC#N", "N=C=O", "N=C=S"),
]

# "{a}" and "{b}" are places of substituents; ring numbers 8 and 9 belong to the substituents.
ALKYL = ["", "(C)", "(CC)", "(C(C)C)", "(C(C)(C)C)", "(C=C)", "(C#C)", "(C8CC8)"]
POLAR = [
    *("(O)", "(OC)", "(N)", "(NC)", "(N(C)C)", "(CO)", "(CN)", "(C=O)", "(C(=O)C)", "(C(=O)O)", "(C(=O)OC)"),
    *("(C(=O)N)", "(NC(=O)C)", "(C#N)", "([N+](=O)[O-])", "(CC(=O)O)", "(C=NO)", "(N=C=O)", "(OC(=O)C)"),
]
HALOGEN_SULFUR = [
    *("(F)", "(Cl)", "(C(F)(F)F)", "(CCl)", "(CF)", "(S)", "(SC)", "(CS)", "(S(=O)C)", "(S(=O)(=O)C)"),
    *("(S(=O)(=O)N)", "(C(=O)Cl)", "(C(=S)N)", "(SF)", "(OC(F)F)"),
]
RARE = ["(Br)", "(CBr)", "(P)", "(P(C)C)", "(P(=O)(O)O)", "(OP(=O)(O)O)"]
RINGS = ["(c9ccccc9)", "(Cc9ccccc9)", "(c9ccco9)", "(c9cccs9)", "(C9CCCCC9)", "(N9CCOCC9)", "(c9ccncc9)"]
USUAL = ["", *ALKYL[1:], *POLAR, *HALOGEN_SULFUR]

TEMPLATES = {
    "aromatic": (
        ["c1ccccc1{a}", "c1ccc{a}cc1{b}", "c1cc{a}ccc1{b}", "c1cccc{a}c1{b}", "c1ccc2c{a}cccc2c1", "c1cc{a}c{b}cc1C"],
        [*USUAL, *RARE, *RINGS],
    ),
    "heteroaromatic": (
        [
            *("n1ccc{a}cc1{b}", "n1cc{a}ccc1{b}", "c1c{a}cc{b}o1", "c1c{a}cc{b}s1", "c1c{a}cc{b}[nH]1", "n1c{a}cn{b}c1"),
            *("n1cc{a}c{b}n1C", "o1cnc{a}c1{b}", "s1cnc{a}c1{b}", "n1cnc{a}cc1{b}", "n1ccnc{a}c1{b}", "n1nc{a}oc1{b}"),
            *("n1nnc{a}n1{b}", "c1c{a}c2ccccc2[nH]1", "n1cn{a}c2cncnc12", "o1nc{a}cc1{b}", "c1c{a}c2ccccc2o1"),
            *("O=c1cc{a}[nH]c(=O)[nH]1", "Nc1cc{a}[nH]c(=O)n1", "Nc1ncnc2c1ncn2{a}", "O=c1cc{a}occ1{b}"),
        ],
        [*USUAL, *RARE],
    ),
    "aliphatic-ring": (
        [
            *("C1CC1{a}{b}", "C1CC{a}C1{b}", "C1CCC{a}C1{b}", "C1CCC{a}CC1{b}", "O1CC{a}C1{b}", "O1CCC{a}C1{b}"),
            *("N1{a}CCCC1{b}", "N1{a}CCCCC1{b}", "O1CCN{a}CC1{b}", "S1CCC{a}C1{b}", "C1=CC{a}CC1{b}", "C1=CC{a}CCC1{b}"),
            *("O=C1CCC{a}C1{b}", "O=C1CCC{a}CC1", "O=C1NCC{a}C1{b}", "O=C1OCC{a}C1{b}", "C1C2CC{a}C1CC2", "O1CC1{a}{b}"),
            *("N1{a}CC1{b}", "S1CC1{a}{b}", "C1CSSC1{a}", "O1COC{a}C1{b}", "O1CCOC{a}C1{b}", "C1NC{a}CNC1{b}"),
        ],
        [*USUAL, *RARE],
    ),
    "chain": (
        [
            *("C{a}C{b}", "CC{a}C{b}", "C{a}CC{b}", "C{a}CCC{b}", "C{a}CCCC{b}", "CC{a}CC{b}C", "C{a}=C{b}", "CC{a}=C{b}"),
            *("C{a}C=CC{b}", "C{a}#C{b}", "C{a}C#CC{b}", "C{a}=CC=C{b}", "CC(C)C{a}C{b}", "CC(C)(C)C{a}", "C{a}=C=C{b}"),
        ],
        [*USUAL, *RARE, *RINGS],
    ),
    "heteroatom-chain": (
        [
            *("C{a}OC{b}", "C{a}NC{b}", "C{a}N(C)C{b}", "C{a}SC{b}", "C{a}SSC{b}", "C{a}OOC{b}", "C{a}S(=O)C{b}"),
            *("C{a}S(=O)(=O)C{b}", "C{a}OCOC{b}", "C{a}NN(C)C{b}", "C{a}ON=C{b}", "C{a}N=C{b}", "C{a}N=NC{b}"),
            *("C{a}OCCOC{b}", "C{a}S(=O)(=O)N{b}", "CC{a}OC{b}C", "C{a}ON(C)C{b}", "C{a}OP(=O)(OC)C{b}"),
        ],
        [*ALKYL, *POLAR, *HALOGEN_SULFUR],
    ),
    "carbonyl": (
        [
            *("C{a}C(=O)C{b}", "C{a}C(=O)OC{b}", "C{a}C(=O)NC{b}", "C{a}C(=O)N(C)C{b}", "C{a}C(=O)O", "C{a}C(=O)N"),
            *("C{a}C=O", "N{a}C(=O)N{b}", "N{a}C(=S)N{b}", "C{a}OC(=O)OC{b}", "C{a}OC(=O)NC{b}", "C{a}C(=O)SC{b}"),
            *("C{a}C(=O)OC(=O)C{b}", "C{a}C(=O)C(=O)C{b}", "C{a}C(=O)CC(=O)C{b}", "C=C{a}C(=O)C{b}", "O=CC{a}C=O"),
            *("C{a}C(=O)CC{b}", "OC(=O)C{a}C(=O)O", "C{a}C(=N)N{b}", "C{a}C(=O)NN{b}", "C{a}C(=O)NO", "NC(=N)N{a}C"),
        ],
        [*ALKYL, *POLAR, *HALOGEN_SULFUR],
    ),
    "biomolecule": (
        [
            *("NC{a}C(=O)O", "CC(=O)NC{a}C(=O)O", "CC(=O)NC{a}C(=O)N", "CC(=O)NC{a}C(=O)NC", "NCC(=O)NC{a}C(=O)O"),
            *("NC{a}C(=O)NCC(=O)O", "NC{a}C(=O)OC", "OCC(O)C{a}=O", "OCC(O)C(O)C{a}=O", "OC1COC{a}C1O", "OCC(=O)C{a}O"),
        ],
        [
            *("", "(C)", "(C(C)C)", "(CC(C)C)", "(C(C)CC)", "(CO)", "(C(C)O)", "(CS)", "(CCSC)", "(CC(=O)N)"),
            *("(CCC(=O)N)", "(CC(=O)O)", "(CCC(=O)O)", "(CCCCN)", "(CCCNC(=N)N)", "(Cc9ccccc9)", "(Cc9c[nH]cn9)"),
            *("(Cc9ccc(O)cc9)", "(CO)", "(CCl)", "(CF)", "(O)", "(CC)", "(CCC)", "(OC)"),
        ],
    ),
}  # fmt: skip

# Patterns of molecules that fall apart or that a semi-empirical method describes badly.
UNSTABLE = [
    Chem.MolFromSmarts(pattern)
    for pattern in [
        "[#7,#8,#16;!+]~[#7,#8,#16;!+]~[#7,#8,#16;!+]",  # chain of three heteroatoms
        "[F,Cl,Br]~[#7,#8,#16;!v4;!v6]",  # halogen on a heteroatom
        "[R]#[R]",
        "[R]=[R]=*",
        "*=[r3]=*",
        "[r3]=[r3]",
        "[r4]=[r4]-[r4]=[r4]",
        "C=C=C=C",
        "[#6]=[#6]=[#7,#8,#16]",  # ketenes and relatives dimerise
        "C(=[O,N,S])=[C,N,S]-[N,O,S]",
        "[OX2][OX2][OX2]",
        "[CX3](=[CX3])-[OX2H][OX2H]",
        "[r3](~[r3])(~[r3])~[r3]",
    ]
]


def enumerate_molecules(counts: dict[str, int]) -> dict[str, str]:
    """Return the families of canonical SMILES, at most ``counts[family]`` of each; the choice depends on nothing else."""
    families: dict[str, str] = {}
    for family, limit in counts.items():
        found = {smiles for smiles in _candidates(family) if smiles is not None} - families.keys()
        for smiles in sorted(found, key=_shuffled)[:limit]:
            families[smiles] = family
    return families


def molecules(families: dict[str, str], conformers: int) -> Iterator[Molecule | None]:
    """Yield the molecules in the order of ``families``, None for those that RDKit cannot embed."""
    for smiles, family in families.items():
        yield embed(smiles, family, conformers)


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
    """Return whether a molecule has none of the patterns of ``UNSTABLE``."""
    molecule = Chem.MolFromSmiles(smiles)
    return not any(molecule.HasSubstructMatch(pattern) for pattern in UNSTABLE)


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
        bond = AllChem.GetPeriodicTable()
        length = sum(bond.GetRcovalent(z) for z in numbers)
        shapes = [np.array([[0.0, 0.0, 0.0], [0.0, 0.0, length]])]
    else:
        found = AllChem.EmbedMultipleConfs(graph, conformers, randomSeed=seed, pruneRmsThresh=0.3, maxAttempts=20)
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


def _shuffled(smiles: str) -> bytes:
    return sha256(smiles.encode()).digest()


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
