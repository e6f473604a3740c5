"""Curves of diatomic molecules: windows, references, non-finite values, files."""

import json

import numpy as np
import pytest
from ase.calculators.lj import LennardJones

from bench_cases import POTENTIAL, command, rows, saved_model
from dpa4.leaderboards import run_diatomics, score_diatomics
from dpa4.leaderboards.diatomics import (
    SCORED,
    element_metrics,
    evaluation_window,
    homonuclear_curve,
    read_reference,
)
from dpa4.leaderboards.diatomics_metrics import Curve
from dpa4.simulation import DPA4Calculator


def test_curves_of_a_potential(tmp_path):
    calculator = DPA4Calculator(POTENTIAL, device="cpu", dtype="float64")
    assert run_diatomics(["H", "O"], calculator, tmp_path, progress=False)[:3] == (2, 0, False)
    score = score_diatomics(tmp_path)
    assert score.coverage == 2 / 87 and len(SCORED) == 87
    # forces are derivatives: only the error of differences on a logarithmic grid (3 % apart) remains
    forces = [abs(float(row["force"])) for row in rows(tmp_path / "curves.csv")]
    assert score.metrics["conservation_deviation"] < 0.05 * max(forces)
    assert np.isnan(score.CDS) and "pbe_energy_mae" not in score.metrics
    assert {row["element"] for row in rows(tmp_path / "metrics.csv")} == {"H", "O"}
    assert (tmp_path / "diatomics.png").stat().st_size > 1000
    again = score_diatomics(tmp_path, {"O": curve_of(tmp_path, "O")})
    assert again.metrics["pbe_energy_mae"] == 0  # compared with itself
    assert again.metrics["tortuosity"] == score.metrics["tortuosity"]


def curve_of(folder, element) -> Curve:
    found = [r for r in rows(folder / "curves.csv") if r["element"] == element]
    return Curve(*(np.array([float(r[c]) for r in found]) for c in ("distance", "energy", "force")))


def parabola(r, k: float = 50.0, r0: float = 1.2) -> Curve:
    return Curve(r, k * (r - r0) ** 2, 2 * k * (r - r0))


def test_the_wall_is_looked_for_below_the_window_of_the_other_metrics():
    """For oxygen, 0.9 covalent radii are 0.594 Angstrom, 0.8 are 0.528."""
    r = np.linspace(0.5, 6.0, 5501)
    curve, reference = parabola(r, k=45), parabola(r)
    found = element_metrics("O", curve, reference)
    # at 0.594 Angstrom the reference is 18.4 eV high, at 0.528 22.6 eV: 20 eV counts, 50 eV does not
    walls = [(E / 45) ** 0.5 - (E / 50) ** 0.5 for E in (1, 5, 10, 20)]
    assert found["pbe_wall_dist_mae"] == pytest.approx(np.mean(walls), abs=1e-4)  # linear between points
    assert found["force_total_variation"] == pytest.approx(90 * (4.65 - 0.594), abs=0.2)  # two points of 0.09


def test_a_reference_counts_as_far_as_the_window_whatever_the_points_of_the_curve():
    """The window of oxygen ends at 4.65 Angstrom; the curve's last point in it is 4.6, the reference's 4.65."""
    curve, reference = parabola(np.linspace(0.6, 6, 55)), parabola(np.linspace(0.6, 4.65, 406))
    found = element_metrics("O", curve, reference)
    assert found["pbe_well_depth_error"] == pytest.approx(50 * ((4.65 - 1.2) ** 2 - (4.6 - 1.2) ** 2))


def test_references_from_a_file(tmp_path):
    curve = {"distances": [2.0, 1.0, 3.0], "energies": [0.0, 1.0, 0.5]}
    forces = [[[f, 0, 0], [-f, 0, 0]] for f in (0.0, -1.0, 1.0)]
    (tmp_path / "dft.json").write_text(json.dumps({"PBE": {"O-O": curve, "H-H": curve | {"forces": forces}}}))
    found = read_reference(tmp_path / "dft.json")
    assert found["H"].distances.tolist() == [1, 2, 3] and found["H"].forces.tolist() == [-1, 0, 1]
    assert found["O"].energies.tolist() == [1, 0, 0.5] and np.isnan(found["O"].forces).all()
    with pytest.raises(ValueError, match="has no curves of r2SCAN; it has PBE"):
        read_reference(tmp_path / "dft.json", "r2SCAN")


def test_forces_are_not_compared_with_a_reference_that_has_none(tmp_path):
    run_diatomics(["O"], LennardJones(rc=20), tmp_path, progress=False)
    score_diatomics(tmp_path)
    own = curve_of(tmp_path, "O")
    without = Curve(own.distances, own.energies, np.full_like(own.forces, np.nan))
    found = score_diatomics(tmp_path, {"O": without})
    assert "pbe_energy_mae" in found.metrics and "pbe_force_mae" not in found.metrics and np.isnan(found.CDS)


def test_command_without_the_curves_of_dft(tmp_path):
    arguments = (saved_model(tmp_path), "--data", tmp_path, "--elements", "O", "-o", tmp_path / "run")
    output = command("diatomics", *arguments, "--device", "cpu")
    assert "no comparison with DFT: diatomics-dft.json.gz is missing" in output
    assert "1 curves, none failed" in output and "coverage 0.011" in output


def test_rough_references_are_not_compared_with():
    r = np.linspace(1.0, 4.0, 40)
    smooth = Curve(r, (r - 2) ** 2, 2 * (r - 2))
    rough = Curve(r, (r - 2) ** 2 + 0.5 * (-1.0) ** np.arange(40), smooth.forces)
    assert "pbe_energy_mae" in element_metrics("O", smooth, smooth)
    assert "pbe_energy_mae" not in element_metrics("O", smooth, rough)
    with pytest.raises(ValueError, match="O has 3 points in its window; 5 are needed"):
        element_metrics("O", Curve(r[:3], smooth.energies[:3], smooth.forces[:3]))


def test_windows_and_points_that_are_not_finite(tmp_path):
    low, high = evaluation_window("O", 6.0)
    assert (low, high) == (pytest.approx(0.9 * 0.66), pytest.approx(3.1 * 1.50))
    assert evaluation_window("O", 6.0, 0.8)[0] == pytest.approx(0.8 * 0.66)
    assert evaluation_window("Cs", 6.0)[1] == 6.0

    class Broken(LennardJones):
        beyond, below = 10.0, 0.3

        def calculate(self, atoms=None, *arguments):
            super().calculate(atoms, *arguments)
            distance = atoms.get_distance(0, 1)
            if distance < self.below or distance > self.beyond:
                self.results["energy"] = np.nan

    found = homonuclear_curve("O", Broken(rc=20))
    assert found["distances"][0] >= 0.3 and len(found["distances"]) < 119
    calculator = Broken(rc=20)
    calculator.below = 0.56  # between 0.8 and 0.9 covalent radii, where the wall is searched
    with pytest.raises(ValueError, match=r"not finite at \[0.529, 0.548\]"):
        homonuclear_curve("O", calculator)
    calculator = Broken(rc=20)
    calculator.beyond = 4.4
    with pytest.raises(ValueError, match=r"not finite at \[4.546\]"):
        homonuclear_curve("O", calculator)
    assert run_diatomics(["O"], calculator, tmp_path, progress=False)[:3] == (0, 1, False)
    assert "not finite" in score_diatomics(tmp_path).failed["O"]
    with pytest.raises(ValueError, match="'Xx' is not an element from H to U"):
        run_diatomics(["Xx"], calculator, tmp_path, progress=False)
