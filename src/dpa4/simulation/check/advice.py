"""Consequences of a check that failed or warned, in words: the meaning for a simulation, and a remedy."""

SHORT_RANGE = (
    "train with the default short range (model.bridging: auto); keep a model that cannot be trained again near the "
    "temperatures and densities of its data, and watch the shortest distances"
)

ADVICE = {
    "finite numbers": "the model gives no usable numbers: do not use the file",
    "batch and single": "results depend on what is computed together: do not use batches, and report the fault",
    "GPU and CPU, float64": "the GPU computes something else: compute on the CPU, and report the fault",
    'float32, "high"': "rounding is larger than usual: compute with dtype float64, and look for huge weights",
    'float32, "fast"': "precision fast is too coarse for this model: stay with high, the default",
    "compiled": "compute without compilation (slower); docs/troubleshooting.md lists the causes",
    "rotation": "energies depend on the orientation: do not use the model, and report the fault",
    "translation": "energies depend on the place: do not use the model, and report the fault",
    "permutation": "energies depend on the order of the atoms: do not use the model, and report the fault",
    "mirror images": "enantiomers differ in energy by this much; models of symmetry O3, the default, have none of it",
    "forces": "forces are not the slope of the energy: dynamics will not conserve it; report the fault",
    "virial": "stress and pressure are wrong: no relaxation of cells and no dynamics at constant pressure",
    "crossing the cutoff": "every atom that crosses the cutoff heats or cools dynamics a little; a weak thermostat "
    "hides it, constant energy shows it",
    "amplification": "forces change abruptly near the cutoff: shorten the time step, and expect phonons to be noisy",
    "wall": f"atoms can fall into each other in hot or compressed structures: {SHORT_RANGE}",
    "wells": "between the bond and the cutoff a free pair or triple is a guess where the data have no bond that "
    "breaks; near the data this is harmless; do not read dissociation energies or reaction barriers from it",
    "spikes": "the energy of a few free atoms is rougher than that of real ones, for the same reason as wells; "
    "near the data this is harmless",
    "curvature": f"a stiff spot makes dynamics unstable at usual time steps: {SHORT_RANGE}",
}
"""Texts by name of the check, for pairs and triples alike. They complete "This means: ..."."""

SEVERE = {
    "wells": f"a hole deeper than any bond: atoms that fall in never come out; {SHORT_RANGE}",
    "spikes": f"energy and force disagree in a jump: dynamics that meet it end; {SHORT_RANGE}",
}
"""Texts for a failure where they differ from those for a warning."""


def advice(name: str, failed: bool) -> str:
    """Return the meaning of a check that failed or warned; empty for a check without a text.

    Args:
        name: Name of the check, such as "pairs: wall".
        failed: The check failed; otherwise it warned.
    """
    short = name.rpartition(": ")[2]
    return (SEVERE.get(short) if failed else None) or ADVICE.get(short, "")
