"""What LoRAs add beside a layer, against the matrices that they stand for."""

from __future__ import annotations

import pytest
import torch

from qandc_core.quantization.adapters import Beside, Kronecker, LowRank, beside, hadamard_product, placed


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def low_rank(rank: int, rows: int = 12, columns: int = 20) -> LowRank:
    return LowRank(drawn(rows, rank), drawn(rank, columns, seed=1))


@pytest.mark.parametrize(
    "term",
    [low_rank(3), Kronecker(drawn(3, 5), drawn(4, 4)), Kronecker(drawn(12, 20), drawn(1, 1))],
    ids=["low rank", "Kronecker", "Kronecker with one number"],
)
@pytest.mark.parametrize("batch", [(), (2,), (2, 3, 4)])
def test_a_term_applies_its_matrix(term, batch):
    x = drawn(*batch, 20, seed=2)
    assert torch.allclose(term(x), x @ term.dense().T)


def test_a_hadamard_product_of_low_ranks():
    first, second = low_rank(2), low_rank(3)
    product = hadamard_product(first, second)
    assert product.up.shape[1] == 6
    assert torch.allclose(product.dense(), first.dense() * second.dense())


@pytest.mark.parametrize("dim, start", [(0, 12), (0, 0), (1, 20), (1, 7)])
@pytest.mark.parametrize("term", [low_rank(3), Kronecker(drawn(3, 5), drawn(4, 4))], ids=["low rank", "Kronecker"])
def test_a_term_in_a_part_of_a_weight(term, dim, start):
    shape = (36, 20) if dim == 0 else (12, 60)
    wanted = torch.zeros(shape, dtype=torch.float64)
    wanted.narrow(dim, start, (12, 20)[dim]).copy_(term.dense())
    assert torch.allclose(placed(term, shape, dim, start).dense(), wanted)


def test_a_sum_of_terms_joins_low_ranks():
    terms = [low_rank(2), Kronecker(drawn(3, 5), drawn(4, 4)), low_rank(4)]
    found, x = beside(terms), drawn(7, 20)
    assert [type(term) for term in found.terms] == [LowRank, Kronecker]
    wanted = sum(term.dense() for term in terms)
    assert torch.allclose(found.dense(), wanted) and torch.allclose(found(x), x @ wanted.T)
    assert found.nbytes == 8 * (6 * (12 + 20) + 15 + 16)


def test_it_answers_in_the_precision_of_its_input():
    found = Beside((low_rank(2),))
    assert found(drawn(3, 20).bfloat16()).dtype == torch.bfloat16
    assert found.to(torch.device("cpu"), torch.float16).nbytes == found.nbytes // 4
