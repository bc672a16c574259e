from itertools import product

import numpy as np
import pytest
import torch

from qandc_core.quantization.gptq import gptq, gptq_codes, reversed_factor
from qandc_core.quantization.grids import Grid, dequantize, quantize, weight_grid

pytestmark = pytest.mark.usefixtures("no_grad")


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def problem(outputs, width, rows, seed=0, dtype=torch.float64):
    """A weight and correlated inputs of rank below the width, some of them large."""
    mix = torch.randn(max(2, width // 3), width, generator=seeded(seed + 1), dtype=dtype)
    x = torch.randn(rows, len(mix), generator=seeded(seed), dtype=dtype) @ mix
    x = x + 0.1 * torch.randn(rows, width, generator=seeded(seed + 2), dtype=dtype) + 1
    x[:, ::7] *= 5
    return torch.randn(outputs, width, generator=seeded(seed + 3), dtype=dtype), x.T @ x


def damped(hessian, damping=0.01):
    return hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=hessian.dtype)


def loss(weight, values, hessian):
    gap = (weight - values).double()
    return float(((gap @ hessian.double()) * gap).sum())


def textbook(weight, hessian, grid):
    """Algorithm 1 of the GPTQ paper: the Cholesky factor of the inverse, block size 1."""
    w, inverse = weight.clone(), torch.linalg.cholesky(torch.linalg.inv(damped(hessian)), upper=True)
    codes = torch.zeros(w.shape, dtype=torch.int8)
    for k in range(w.shape[1]):
        codes[:, k : k + 1] = quantize(w[:, k : k + 1], grid)
        rounded = grid.scale * codes[:, k : k + 1]
        w[:, k:] -= (w[:, k : k + 1] - rounded) / inverse[k, k] * inverse[k : k + 1, k:]
    return codes


@pytest.mark.parametrize("block", [1, 3, 16, 1000])
@pytest.mark.parametrize(("width", "rows"), [(1, 5), (7, 100), (60, 200), (129, 40)])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_are_those_of_the_textbook(width, rows, block, bits):
    weight, hessian = problem(9, width, rows)
    grid = weight_grid(weight, bits, True)
    assert torch.equal(gptq_codes(weight, hessian, grid, block=block), textbook(weight, hessian, grid))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float32_has_the_loss_of_float64(dtype):
    weight, hessian = problem(64, 400, 2000)
    weight = weight.to(dtype).double()
    grid = weight_grid(weight, 4, True)
    exact, single = (gptq_codes(w, hessian.float(), grid) for w in (weight, weight.to(dtype)))
    assert (exact != single).float().mean() < 0.05
    losses = [loss(weight, dequantize(codes, grid), hessian) for codes in (exact, single)]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_a_hessian_that_float32_cannot_factor():
    """Its smallest eigenvalues drown in float32."""
    weight, hessian = problem(8, 200, 20)
    grid, single = weight_grid(weight, 4, True), hessian.float()
    with pytest.raises(torch.linalg.LinAlgError):
        torch.linalg.cholesky(damped(single, 1e-9))
    codes = gptq_codes(weight.float(), hessian, grid, damping=1e-9)
    assert loss(weight, dequantize(codes, grid), hessian) < loss(
        weight, dequantize(quantize(weight, grid), grid), hessian
    )


def test_the_factor_is_unit_lower_and_gives_the_hessian_back():
    _, hessian = problem(1, 50, 200)
    factor = reversed_factor(hessian, 0.01, torch.float64)
    assert torch.equal(factor.diagonal(), torch.ones(50, dtype=torch.float64)) and torch.equal(factor, factor.tril())
    upper = factor.flip(0, 1)
    middle = torch.linalg.solve(upper, damped(hessian)) @ torch.linalg.inv(upper).T
    assert torch.allclose(middle, torch.diag(middle.diagonal()), atol=1e-6 * float(middle.abs().max()))


@pytest.mark.parametrize("seed", range(5))
def test_each_column_is_the_best_answer_to_those_before_it(seed):
    """Brute force: of all codes of a column, the later columns free to take any value, the one that costs least."""
    weight, hessian = problem(1, 4, 50, 10 * seed)
    grid, h = Grid(torch.full((1, 1), 0.7), torch.zeros(1, 1), -1, 1), damped(hessian).numpy()
    codes = gptq_codes(weight, hessian, grid)[0].numpy()
    for k in range(4):
        costs = []
        for code in (-1, 0, 1):
            fixed = weight[0, : k + 1].numpy() - grid.scale.item() * np.append(codes[:k], code)
            rest = h[k + 1 :, k + 1 :]
            free = -np.linalg.solve(rest, h[k + 1 :, : k + 1] @ fixed) if len(rest) else np.zeros(0)
            error = np.append(fixed, free)
            costs.append(error @ h @ error)
        assert costs[codes[k] + 1] == pytest.approx(min(costs), rel=1e-9)


def test_not_far_from_the_best_of_all_codes():
    ratios = []
    for seed in range(20):
        weight, hessian = problem(1, 5, 50, 10 * seed)
        grid = Grid(torch.full((1, 1), 0.8, dtype=torch.float64), torch.zeros(1, 1), -1, 1)
        found = loss(weight, dequantize(gptq_codes(weight, hessian, grid), grid), damped(hessian))
        candidates = torch.tensor(list(product((-1, 0, 1), repeat=5)))
        best = min(loss(weight, dequantize(codes[None], grid), damped(hessian)) for codes in candidates)
        assert found >= best * (1 - 1e-9)
        ratios.append(found / best)
    assert np.median(ratios) < 1.5


def test_columns_of_any_grid_and_inputs_that_never_occur():
    weight, hessian = problem(6, 40, 100)
    dead = [0, 9, 39]
    hessian[dead], hessian[:, dead] = 0, 0
    seen = {}

    def round_column(k, column):
        seen[k] = column.clone()
        return column.round().to(torch.int8), column.round()

    codes = gptq(weight, hessian, round_column)
    assert list(seen) == list(range(40)) and all(column.shape == (6,) for column in seen.values())
    assert all(torch.equal(codes[:, k], seen[k].round().to(torch.int8)) for k in range(40))
    assert all(torch.equal(seen[k], weight[:, k]) for k in dead)
    assert codes.is_contiguous() and codes.dtype == torch.int8
