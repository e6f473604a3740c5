"""Spherical harmonics, edge frames and Wigner rows."""

import json

import numpy as np
import pytest
import torch

from dpa4.model.grid import lebedev, s2_grid, so3_grid
from dpa4.model.harmonics import WignerRows, coupling, edge_frame, spherical_harmonics
from dpa4.model.layers import degree_of
from dpa4.model.switches import frame_orders
from helpers import shared

AXES = np.concatenate([np.eye(3), -np.eye(3)])


def directions(n: int = 20, seed: int = 0) -> torch.Tensor:
    v = np.random.default_rng(seed).normal(size=(n, 3))
    return torch.from_numpy(np.concatenate([v / np.linalg.norm(v, axis=1, keepdims=True), AXES]))


def full_wigner(frame: torch.Tensor, lmax: int) -> list[torch.Tensor]:
    """All rows of D^l in ascending order of m."""
    rows = WignerRows(lmax, lmax).double()(frame)
    out = []
    for l in range(lmax + 1):
        own = [rows[m][:, :, l * l - m * m : (l + 1) ** 2 - m * m] for m in range(l + 1)]
        minus = [own[m][:, 0] for m in range(l, 0, -1)]
        plus = [own[m][:, 1] for m in range(1, l + 1)]
        out.append(torch.stack([*minus, own[0][:, 0], *plus], dim=1))
    return out


def test_low_degrees_in_closed_form():
    v = directions()
    x, y, z = v.numpy().T
    s = np.sqrt
    np.testing.assert_allclose(spherical_harmonics(1, v.numpy()), np.stack([y, z, -x], 1), atol=1e-14)
    second = [-s(3) * x * y, s(3) * y * z, (3 * z * z - 1) / 2, -s(3) * x * z, s(3) / 2 * (x * x - y * y)]
    np.testing.assert_allclose(spherical_harmonics(2, v.numpy()), np.stack(second, 1), atol=1e-14)
    third = [
        s(5 / 8) * y * (3 * x * x - y * y), -s(15) * x * y * z, s(3 / 8) * y * (5 * z * z - 1),
        z * (5 * z * z - 3) / 2, -s(3 / 8) * x * (5 * z * z - 1), s(15) / 2 * z * (x * x - y * y),
        -s(5 / 8) * x * (x * x - 3 * y * y),
    ]  # fmt: skip
    np.testing.assert_allclose(spherical_harmonics(3, v.numpy()), np.stack(third, 1), atol=1e-14)


def test_frame_is_a_rotation_that_takes_the_edge_to_z():
    frame = edge_frame(directions())
    identity = torch.eye(3, dtype=torch.float64).expand_as(frame)
    torch.testing.assert_close(frame @ frame.transpose(1, 2), identity, atol=1e-14, rtol=0)
    torch.testing.assert_close(torch.linalg.det(frame), torch.ones(len(frame), dtype=torch.float64))
    torch.testing.assert_close(frame[:, 1], directions()[:, [1, 2, 0]] * torch.tensor([1.0, 1.0, -1.0]))


@pytest.mark.parametrize("lmax", [1, 2, 3, 6, 8])
def test_wigner_rows_are_orthogonal_and_act_on_harmonics(lmax):
    n = directions()
    frame = edge_frame(n)
    # rows of the frame in the order (y, z, -x) back to a Cartesian rotation matrix
    rotation = frame[:, [2, 0, 1]][:, :, [2, 0, 1]] * torch.tensor([[1.0, -1, -1], [-1, 1, 1], [-1, 1, 1]])
    torch.testing.assert_close(
        (rotation @ n[:, :, None])[..., 0],
        torch.tensor([0.0, 0, 1]).double().expand_as(n),
        atol=1e-14,
        rtol=0,
    )
    points = directions(30, seed=1)
    for l, wigner in enumerate(full_wigner(frame, lmax)):
        identity = torch.eye(2 * l + 1, dtype=torch.float64).expand_as(wigner)
        torch.testing.assert_close(wigner @ wigner.transpose(1, 2), identity, atol=1e-13, rtol=0)
        rotated = torch.einsum("eij,pj->epi", rotation, points)
        expected = torch.from_numpy(spherical_harmonics(l, rotated.numpy()))
        actual = torch.einsum("emk,pk->epm", wigner, torch.from_numpy(spherical_harmonics(l, points.numpy())))
        torch.testing.assert_close(actual, expected, atol=1e-12, rtol=0)


def test_coupling_is_sparse_and_reproduces_harmonics():
    v = directions().numpy()
    for l in range(2, 9):
        lower, vector = spherical_harmonics(l - 1, v), spherical_harmonics(1, v)
        product = (lower[:, :, None] * vector[:, None]).reshape(len(v), -1)
        np.testing.assert_allclose(product @ coupling(l).numpy(), spherical_harmonics(l, v), atol=1e-13)


def test_geometry_differentiates_twice():
    def rows(v):
        orders = WignerRows(3, 2).double()(edge_frame(v / v.norm(dim=-1, keepdim=True)))
        return torch.cat([r.flatten(1) for r in orders], dim=1)

    v = directions()[:1].mul(1.7).requires_grad_()
    assert torch.autograd.gradcheck(rows, v)
    assert torch.autograd.gradgradcheck(rows, v)


def test_golden_wigner_rows():
    golden = json.loads(shared("reference/vectors/A_testvec.json").read_text())["base"]
    v = torch.tensor([golden["edge_vec_1to0"]], dtype=torch.float64)
    rows = WignerRows(2, 1).double()(edge_frame(v / v.norm()))
    expected = torch.tensor(golden["D_l2_row_m0"], dtype=torch.float64)
    torch.testing.assert_close(rows[0][0, 0, 4:], expected, atol=1e-10, rtol=0)
    # the frame may be rolled about the edge: the golden row m = +1 lies in the plane of ours
    pair = rows[1][0, :, 3:]
    plus = torch.tensor(golden["D_l2_row_mp1"], dtype=torch.float64)
    torch.testing.assert_close((pair @ plus).norm(), torch.tensor(1.0).double(), atol=1e-10, rtol=0)


@pytest.mark.parametrize("lmax", range(7))
def test_s2_grid_is_exact(lmax):
    evaluate, analyse = s2_grid(lmax)
    identity = torch.eye((lmax + 1) ** 2, dtype=torch.float64)
    torch.testing.assert_close(analyse @ evaluate, identity, atol=1e-13, rtol=0)


@pytest.mark.parametrize("symmetry", ["SO3", "O3"])
@pytest.mark.parametrize("lmax,kmax", [(0, 0), (1, 1), (2, 1), (3, 1), (3, 2), (5, 1), (4, 0)])
def test_so3_grid_is_exact_on_live_slots(lmax, kmax, symmetry):
    evaluate, analyse = so3_grid(lmax, kmax, symmetry)
    frame = torch.tensor(frame_orders(kmax, symmetry)).abs()
    live = (frame[None, :] <= degree_of(lmax)[:, None]).flatten().double()
    torch.testing.assert_close(analyse @ evaluate, torch.diag(live), atol=1e-13, rtol=0)


@pytest.mark.parametrize("lmax,kmax", [(2, 1), (3, 2)])
def test_products_of_even_frames_keep_parity(lmax, kmax):
    """Even fields couple only if l + l' + l'' is even; with odd frames, two vectors give their cross product."""

    def odd_couplings(symmetry):
        evaluate, analyse = so3_grid(lmax, kmax, symmetry)
        degree = degree_of(lmax).repeat_interleave(len(frame_orders(kmax, symmetry)))
        total = degree[:, None, None] + degree[:, None] + degree
        return torch.einsum("kg,gi,gj->kij", analyse, evaluate, evaluate)[total % 2 == 1].abs().max()

    assert odd_couplings("O3") < 1e-13
    assert odd_couplings("SO3") > 0.1


def test_lebedev_sizes_and_exactness():
    # points per degree
    assert [len(lebedev(3 * l)[1]) for l in range(1, 9)] == [6, 26, 38, 74, 86, 146, 170, 230]
    points, weights = lebedev(9)
    assert weights.sum() == pytest.approx(1.0, abs=1e-14)
    assert (weights @ points[:, 2] ** 8) == pytest.approx(1 / 9, abs=1e-13)
