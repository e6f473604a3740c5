"""Electronic convergence and unfinished steps of VASP outputs, and what reading does with them."""

import gzip

import numpy as np
import pytest

from dpa4.data import read_frames
from dpa4.data.convergence import ionic_steps
from vasp_runs import write_run

FILES = ["OUTCAR", "vasprun.xml"]
REASON = "electronic loop not converged (60 of 60 steps)"


@pytest.mark.parametrize("name", FILES)
def test_converged_run(tmp_path, name):
    images = write_run(tmp_path / "run", 3)
    assert ionic_steps(tmp_path / "run" / name) == ({}, None)
    frames = read_frames(tmp_path / "run" / name)
    for frame, atoms in zip(frames, images, strict=True):
        assert frame.energy == pytest.approx(atoms.get_potential_energy(), abs=1e-7)
        np.testing.assert_allclose(frame.forces, atoms.get_forces(), rtol=0, atol=1e-6)
        stress = -atoms.get_volume() * atoms.get_stress(voigt=False)
        np.testing.assert_allclose(frame.virial, stress, rtol=0, atol=1e-5)
        np.testing.assert_allclose(frame.positions, atoms.positions, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("pack", [False, True])
def test_unconverged_steps_are_left_out_with_a_warning(tmp_path, name, pack):
    images = write_run(tmp_path / "run", 4, unconverged=frozenset({0, 2}))
    path = tmp_path / "run" / name
    if pack:
        packed = path.with_name(f"{name}.gz")
        packed.write_bytes(gzip.compress(path.read_bytes()))
        path = packed
    assert ionic_steps(path) == ({0: REASON, 2: REASON}, None)
    with pytest.warns(UserWarning) as caught:
        frames = read_frames(path)
    assert [str(w.message) for w in caught] == [f"left out: {path}, frames 0, 2: {REASON}"]
    assert [f.energy for f in frames] == pytest.approx(
        [images[k].get_potential_energy() for k in (1, 3)], abs=1e-7
    )
    assert [f.origin.rpartition(", ")[2] for f in frames] == ["frame 1", "frame 3"]


@pytest.mark.parametrize("name", FILES)
def test_killed_run(tmp_path, name):
    write_run(tmp_path / "run", 4, killed=True)
    path = tmp_path / "run" / name
    assert ionic_steps(path) == ({}, "the file ends within ionic step 4")
    with pytest.warns(UserWarning, match=f"^left out: {path}: the file ends within ionic step 4$"):
        assert len(read_frames(path)) == 3


def test_last_step_before_the_kill_counts_if_it_is_complete(tmp_path):
    write_run(tmp_path / "run", 2)
    path = tmp_path / "run/vasprun.xml"
    text = path.read_text()
    for end in ("</calculation>", '<structure name="finalpos">'):
        path.write_text(text.rpartition(end)[0])
        assert ionic_steps(path) == ({}, None)
        assert len(read_frames(path)) == 2


@pytest.mark.parametrize("name", FILES)
def test_run_without_a_converged_step(tmp_path, name):
    """An error alone, a warning among other runs."""
    write_run(tmp_path / "1", 2, unconverged=frozenset({0, 1}), only=name)
    path = tmp_path / "1" / name
    lost = f"left out: {path}, frames 0, 1: {REASON}"
    with pytest.raises(ValueError) as caught:
        read_frames(path)
    assert str(caught.value) == f"no structure to use in {path}; {lost}"
    write_run(tmp_path / "2", 2, seed=5)
    with pytest.warns(UserWarning) as warned:
        assert len(read_frames(tmp_path)) == 2
    assert [str(w.message) for w in warned] == [lost]


def test_a_run_that_cannot_be_read_is_an_error_with_advice(tmp_path):
    write_run(tmp_path / "1", 2)
    (tmp_path / "2").mkdir()
    (tmp_path / "2/OUTCAR").write_text(" vasp.6.0.0, killed before the first step\n")
    advice = "; remove the file, or let dpa4 data collect leave out what is unusable"
    with pytest.raises(
        ValueError, match=f"2/OUTCAR, frame 0 cannot be read by ASE: .*Incomplete OUTCAR{advice}$"
    ):
        read_frames(tmp_path)
    with pytest.raises(ValueError, match="2/OUTCAR, frame 0 cannot be read by ASE: .*Incomplete OUTCAR$"):
        read_frames(tmp_path / "2/OUTCAR")


def test_version_5_tells_by_the_number_of_steps_only(tmp_path):
    """VASP 5 writes that EDIFF is reached although the loop has used all of its steps."""
    write_run(tmp_path / "run", 3, unconverged=frozenset({1}))
    path = tmp_path / "run/OUTCAR"
    text = path.read_text().replace("EDIFF was not reached (unconverged)", "because EDIFF is reached")
    path.write_text(text)
    assert ionic_steps(path).unconverged == {}  # version 6, which converged in the very last step
    path.write_text(text.replace("vasp.6.0.0", "vasp.5.4.4"))
    assert ionic_steps(path).unconverged == {1: REASON}


def test_one_electronic_step_is_no_loop(tmp_path):
    write_run(tmp_path / "run", 2)
    path = tmp_path / "run/vasprun.xml"
    text = path.read_text()
    path.write_text(text.replace('name="NELM">    60', 'name="NELM">     3'))
    assert list(ionic_steps(path).unconverged) == [0, 1]
    path.write_text(text.replace('name="NELM">    60', 'name="NELM">     1'))
    assert ionic_steps(path).unconverged == {}


def test_damaged_output_is_reported_by_its_reader(tmp_path):
    for name in FILES:
        (tmp_path / name).write_bytes(b"\xff\xfe\x00 no output")
        with pytest.raises(ValueError, match=f"{name}.* cannot be read by ASE|{name}.* is not a text"):
            read_frames(tmp_path / name)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "   ions per type =      400000000",
            "400,000,000 atoms, k-points or bands are declared, more than the file can",
        ),
        ("   k-points  NKPTS = 99999999  NBANDS = 4\n", "99,999,999 atoms, k-points or bands"),
    ],
)
def test_absurd_sizes_are_refused_before_memory_is_allocated(tmp_path, line, message):
    write_run(tmp_path / "run", 1)
    path = tmp_path / "run/OUTCAR"
    path.write_text(path.read_text().replace("   ISPIN", f"{line}\n   ISPIN"))
    with pytest.raises(ValueError, match=f"OUTCAR, frame 0 cannot be read by ASE: {message}"):
        read_frames(path)
