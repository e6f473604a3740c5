"""Committees: folders of members, deviations, fingerprint."""

import numpy as np
import pytest

from dpa4.potential.committee import (
    MeanAndDeviation,
    check_one_charge_spin,
    fingerprint_of_committee,
    force_deviations,
    largest_force_deviation,
    member_files,
    single_model,
)
from dpa4.potential.fingerprint import fingerprint_of
from helpers import random_potential


@pytest.fixture
def committee(tmp_path):
    for number in (0, 2, 10):
        (tmp_path / f"member-{number}").mkdir()
        (tmp_path / f"member-{number}" / "best.safetensors").touch()
    (tmp_path / "member-notes").mkdir()
    return tmp_path


def test_models_of_a_folder_are_in_the_order_of_their_numbers(committee):
    expected = [committee / f"member-{number}" / "best.safetensors" for number in (0, 2, 10)]
    assert member_files(committee) == expected
    assert member_files(expected[0]) == expected[:1]
    assert member_files(committee / "member-0") == [committee / "member-0"]  # of one run


def test_a_member_without_a_model_is_named(committee):
    (committee / "member-2" / "best.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"3 members, but there is no .*member-2/best.safetensors"):
        member_files(committee)


def test_work_for_one_model_refuses_a_folder_of_several(committee):
    with pytest.raises(ValueError, match="is a committee of 3 models; choose one, such as .*member-0"):
        single_model(committee, "choose one")


def test_deviation_of_a_force_is_the_root_mean_square_distance_from_the_mean():
    members = np.random.default_rng(0).normal(size=(4, 7, 3))
    mean, deviation = MeanAndDeviation.of(list(members))
    distances = np.linalg.norm(members - mean, axis=2)
    np.testing.assert_allclose(force_deviations(deviation), np.sqrt((distances**2).mean(axis=0)))
    assert largest_force_deviation(deviation) == force_deviations(deviation).max()
    assert largest_force_deviation(np.zeros((0, 3))) == 0


def test_fingerprint_has_the_digest_of_every_member():
    members = [random_potential(seed, n_blocks=1) for seed in (0, 1)]
    digests = [fingerprint_of(member)["model"] for member in members]
    assert fingerprint_of_committee(members)["model"] == " ".join(digests)
    assert fingerprint_of_committee(members[:1]) == fingerprint_of(members[0])


def test_members_that_read_charges_differently_are_refused():
    conditioned = random_potential(charge_spin=True, default_charge_spin=(0, 1))
    with pytest.raises(ValueError, match="differ in charge_spin"):
        check_one_charge_spin([conditioned, random_potential()])
