"""Explanations of the checks, for readers who simulate: the trial, its consequences for a simulation, the remedy."""

from dataclasses import dataclass

_LONE_ATOMS = (
    "Free atoms meet barriers, or distances at which they rest, that real ones lack. A model that was trained on "
    "molecules or crystals never saw these atoms meet alone; its curve between the bond and the cutoff is a guess. "
    "In dense matter this rarely shows. In gases, reactions and sputtering, lone atoms may be caught or turned away "
    "where they should not."
)
_MORE_DATA = (
    "Nothing for dense matter like that of the training data. Otherwise add isolated pairs, small clusters and "
    "stretched bonds of these elements to the training data; dpa4 pairs draws every curve of two atoms."
)
_WALL = (
    "Atoms that come close may fall into each other, and a run then ends in nonsense. The risk grows with "
    "temperature, pressure and the length of a run, and in relaxations of poor structures."
)
_CONTACTS = (
    "Train with model.bridging: auto (the default), which adds the repulsion of nuclei, or add structures with close "
    "contacts to the training data."
)
_FAULTY = (
    "Do not use the model. If its file came from another program, report the check and how the file was made; "
    "dpa4 info shows the file."
)
_CURVATURE = (
    "Forces change so quickly over such a short way that a time step of 0.5 fs misses it: the energy of dynamics "
    "drifts, or the run explodes."
)


@dataclass(frozen=True)
class Explanation:
    """Sentences about a check.

    Attributes:
        tried: Description of the trial.
        failed: Consequences for a simulation if the check failed.
        warned: Consequences if the check gave a warning; empty if they are those of a failure.
        remedy: Advice.
    """

    tried: str
    failed: str
    remedy: str
    warned: str = ""


EXPLANATIONS = {
    "file": Explanation("The file was opened.", "There is nothing to simulate with.", _FAULTY),
    "finite numbers": Explanation(
        "Energies and forces of small built-in structures were computed.",
        "A run that meets such a structure ends at once.",
        _FAULTY,
    ),
    "batch and single": Explanation(
        "Every structure was computed alone and together with all others.",
        "Results depend on the other structures that are computed at the same time.",
        _FAULTY,
    ),
    "GPU and CPU, float64": Explanation(
        "The same structures were computed on the CPU and on the GPU.",
        "The GPU gives other results than the CPU.",
        "Compute with --device cpu; update the driver and PyTorch, and report the check.",
    ),
    'float32, "high"': Explanation(
        "Single precision, the default, was compared with double precision.",
        "Rounding is larger than usual and may show as noise in relaxations, vibrations and energy conservation.",
        "Simulate with --dtype float64.",
    ),
    'float32, "fast"': Explanation(
        "The fast mode (--precision fast) was compared with double precision.",
        "Results of --precision fast are too coarse for this model. Other modes are not concerned.",
        "Leave out --precision fast.",
    ),
    "compiled": Explanation(
        "Compiled code was compared with code that is not compiled.",
        "Compiled code gives other results. It is the default on a GPU in float32.",
        "Simulate with --no-compile, and report the check.",
        warned="Simulations run without compilation: results are right, but take longer on a GPU.",
    ),
    "rotation": Explanation(
        "Every structure was rotated.",
        "Energies depend on the orientation, so angular momentum is not conserved.",
        _FAULTY,
    ),
    "translation": Explanation(
        "Every structure was shifted.",
        "Energies depend on the place, so momentum is not conserved.",
        _FAULTY,
    ),
    "permutation": Explanation(
        "The atoms of every structure were listed in another order.",
        "Results depend on the order of the atoms in the file.",
        _FAULTY,
    ),
    "mirror images": Explanation(
        "Every structure was compared with its mirror image.",
        "Left- and right-handed forms of the same molecule or crystal have different energies, although the model "
        "promises equal ones.",
        "Train with model.symmetry: O3 if both hands or paths between them matter. Otherwise compare energies within "
        "one hand only.",
        warned="Left- and right-handed forms of a molecule or crystal differ in energy by more than 1 meV/atom. "
        "Racemic mixtures, and reactions that pass through a mirror plane, are affected.",
    ),
    "forces": Explanation(
        "Forces were compared with the slope of the energy.",
        "Forces are not the slope of the energy: dynamics heats up or cools down, and relaxations do not converge.",
        _FAULTY,
    ),
    "virial": Explanation(
        "The virial was compared with the change of the energy under strain.",
        "Stress and pressure are wrong: constant-pressure dynamics, relaxed cells and elastic constants, too.",
        _FAULTY,
    ),
    "crossing the cutoff": Explanation(
        "An atom was moved across the distance beyond which the model does not see it.",
        "Energy or forces jump whenever an atom crosses the cutoff, so the energy of dynamics is not conserved.",
        _FAULTY,
        warned="The repulsion of this imported model is cut off abruptly, by the small energy given above, as in "
        "deepmd-kit. Long runs at constant energy may drift a little; averages with a thermostat are not affected.",
    ),
    "amplification": Explanation(
        "All atoms were moved by a ten-millionth of an Angstrom.",
        _CURVATURE,
        "Use a shorter time step if the model is needed as it is. If the largest value is near the cutoff, train "
        "with model.edge_norm: false.",
    ),
    "pairs: wall": Explanation("Two free atoms were pushed together to 0.2 Å.", _WALL, _CONTACTS),
    "pairs: wells": Explanation(
        "Two free atoms were pushed together from the cutoff.",
        "Two atoms bind more strongly than any bond known, so atoms clump.",
        _MORE_DATA,
        warned=_LONE_ATOMS,
    ),
    "pairs: spikes": Explanation(
        "Energy and force of two free atoms were followed in small steps.",
        "The energy jumps where the force does not, so dynamics heats up or cools down.",
        _MORE_DATA,
        warned=_LONE_ATOMS,
    ),
    "pairs: curvature": Explanation(
        "The stiffness between two free atoms was measured.", _CURVATURE, _CONTACTS
    ),
    "triples: wall": Explanation("Three free atoms were pushed together to 0.2 Å.", _WALL, _CONTACTS),
    "triples: wells": Explanation(
        "Three free atoms were pushed together from the cutoff.",
        "Three atoms bind more strongly than any triatomic molecule, so atoms clump.",
        _MORE_DATA,
        warned=_LONE_ATOMS,
    ),
    "triples: spikes": Explanation(
        "Energy and force of three free atoms were followed in small steps.",
        "The energy jumps where the force does not, so dynamics heats up or cools down.",
        _MORE_DATA,
        warned=_LONE_ATOMS,
    ),
    "triples: curvature": Explanation(
        "The stiffness between three free atoms was measured.", _CURVATURE, _CONTACTS
    ),
}
