"""Products of few terms: how the terms are found, and the parts of the model that use them."""

import pytest
import torch

from dpa4.model.edges import LocalFrame
from dpa4.model.grid import Grid, couplings
from dpa4.model.so2 import DegreeProduct
from dpa4.ops.sparse_product import Terms, sparse_or_dense
from operator_table import BACKENDS, deviation, needs_cpp, normal


def test_terms_of_a_formula_are_found():
    def formula(a, b):
        return torch.stack([2 * a[:, 1] * b[0][:, 2], 0 * a[:, 0], -a[:, 0] * b[1][:, 0, 1]], dim=-1)

    terms = Terms.of_products(formula, 2, [torch.Size((3,)), torch.Size((1, 2))])
    assert terms.indices.tolist() == [[1, 0], [2, 4], [0, 2]]
    assert terms.scale.tolist() == [2, -1]


@needs_cpp
@pytest.mark.parametrize(("lmax", "mmax", "rank"), [(0, 0, None), (1, 1, 1), (2, 1, 1), (3, 2, 2), (5, 1, 2)])
def test_matrices_of_the_edges_by_kernels_and_by_plain_operations(lmax, mmax, rank):
    product = DegreeProduct(lmax, mmax, 4, rank).double()
    frame = LocalFrame(lmax, mmax, heads=2).double()
    rows = [normal(9, min(m + 1, 2), (lmax + 1) ** 2 - m * m, seed=m) for m in range(mmax + 1)]
    entries, weight = len(product.columns.unique()), normal(9, 2, seed=6)
    kernel = normal(9, entries, seed=5)

    def made() -> tuple[torch.Tensor, torch.Tensor]:
        dense = product.matrices(kernel[:, product.columns], rows)
        matrices = sparse_or_dense(
            lambda: product.entries(product.entries.joined(rows), kernel), lambda: dense, 1, *rows
        )
        return matrices, frame.weighted_back(rows, weight)

    with BACKENDS["cpp"]() as launched:
        found = made()
    assert launched == {"bilinear"}
    with BACKENDS["plain"]():
        for one, other in zip(found, made(), strict=True):
            assert deviation(one, other) < 1e-13


@needs_cpp
@pytest.mark.parametrize("symmetry", ["SO3", "O3"])
@pytest.mark.parametrize(("lmax", "kmax"), [(1, 1), (3, 1), (3, 2)])
def test_products_of_fields_by_couplings_and_on_the_grid(lmax, kmax, symmetry):
    grid = Grid(lmax, kmax, symmetry).double()
    rows = grid.evaluate.shape[1]
    assert rows == (lmax + 1) ** 2 * (kmax + 1 if symmetry == "O3" else 2 * kmax + 1)
    left, right = normal(5, rows, 16, seed=1), normal(5, rows, 16, seed=2)
    with BACKENDS["cpp"]() as launched:
        found = grid.product(left, right)
    assert launched == {"bilinear"}
    with BACKENDS["plain"]():
        expected = grid.product(left, right)
    assert deviation(found, expected) < 1e-13
    assert deviation(grid.scalar_product(left, right), expected[:, 0]) < 1e-13


def test_even_frames_have_fewer_couplings():
    all_frames, even = (len(couplings(3, 1, symmetry).scale) for symmetry in ("SO3", "O3"))
    assert (all_frames, even) == (3833, 1319)
