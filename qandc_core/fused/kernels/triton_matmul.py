"""int8 matrix product whose epilogue rescales, adds the bias and applies GELU, quantizes or adds a gated residual."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .triton_quantize import INTERPRETED, quick_bench, tanh_gelu, to_codes


def tile(m: int, n: int, k: int, warps: int, stages: int) -> triton.Config:
    return triton.Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}, num_warps=warps, num_stages=stages)


# wgmma multiplies 64 rows at a time with 4 warps; the tiles below 64 rows are for a few rows against a large weight.
TILES = [
    tile(128, 256, 128, 8, 4),
    tile(256, 128, 128, 8, 4),
    tile(128, 128, 256, 8, 3),
    tile(128, 128, 128, 8, 3),
    tile(128, 64, 128, 4, 3),
    tile(64, 128, 128, 4, 3),
    tile(64, 64, 256, 4, 3),
    tile(64, 64, 128, 4, 4),
    tile(32, 64, 128, 4, 4),
    tile(16, 64, 256, 4, 4),
]
FEWEST, MOST = 32, 1024  # programs that are worth a try: fewer leave processors idle, more begin too often
if INTERPRETED:
    TILES = [tile(64, 256, 64, 4, 1)]


def shared_bytes(tile: triton.Config) -> int:
    """Upper bound of the shared memory for the pipelined tiles of both operands."""
    sizes = tile.kwargs
    return (sizes["BLOCK_M"] + sizes["BLOCK_N"]) * sizes["BLOCK_K"] * tile.num_stages


def sums_per_thread(tile: triton.Config) -> int:
    return tile.kwargs["BLOCK_M"] * tile.kwargs["BLOCK_N"] // (32 * tile.num_warps)


def fitting_tiles(tiles: list[triton.Config], rows: int, shared: int, wgmma: bool) -> list[triton.Config]:
    """Tiles of a height near that of the product that fit a device's shared memory, in bytes, and its registers:
    wgmma reads its operands from shared memory, mma.sync needs registers for them.
    """
    tallest = max(16, triton.next_power_of_2(rows))
    return [
        tile
        for tile in tiles
        if min(64, tallest // 2) <= tile.kwargs["BLOCK_M"] <= tallest
        and shared_bytes(tile) <= shared
        and sums_per_thread(tile) <= (128 if wgmma else 64)
    ]


def prune(tiles: list[triton.Config], arguments: dict[str, Any], **_: Any) -> list[triton.Config]:
    device, rows, columns = arguments["a"].device, arguments["M"], arguments["N"]
    shared = triton.runtime.driver.active.utils.get_device_properties(device.index)["max_shared_mem"]
    able = fitting_tiles(tiles, rows, shared, wgmma=torch.cuda.get_device_capability(device)[0] == 9)
    return [tile for tile in able if FEWEST <= programs_of(tile, rows, columns) <= MOST] or able


def programs_of(tile: triton.Config, rows: int, columns: int) -> int:
    return triton.cdiv(rows, tile.kwargs["BLOCK_M"]) * triton.cdiv(columns, tile.kwargs["BLOCK_N"])


@triton.autotune(
    configs=TILES, key=["M", "N", "K", "GELU"], prune_configs_by={"early_config_prune": prune}, do_bench=quick_bench
)
@triton.heuristics(
    {
        "EVEN_K": lambda arguments: arguments["K"] % arguments["BLOCK_K"] == 0,
        "ONE_IMAGE": lambda arguments: arguments["gate"] is None or arguments["tokens"] % arguments["BLOCK_M"] == 0,
    }
)
@triton.jit(do_not_specialize=["M", "tokens"])
def int8_matmul_kernel(
    a, row_scale, b, column_scale, bias, grid_scale, grid_zero, gate, residual, out,
    M, N, K, tokens, gate_stride,
    GELU: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    ONE_IMAGE: tl.constexpr,
):  # fmt: skip
    """One tile of out (M, N) from a (M, K) and b (N, K), both read along K as wgmma wants them for int8."""
    m, n = tile_position(M, N, BLOCK_M, BLOCK_N)
    row, column = m * BLOCK_M, n * BLOCK_N
    product = integer_product(a, b, row, column, M, N, K, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K)
    finish(
        product, row, column, row_scale, column_scale, bias, grid_scale, grid_zero, gate, residual, out,
        M, N, tokens, gate_stride, GELU, LOW, HIGH, BLOCK_M, BLOCK_N, ONE_IMAGE,
    )  # fmt: skip


@triton.jit
def finish(
    product, row, column, row_scale, column_scale, bias, grid_scale, grid_zero, gate, residual, out,
    M, N, tokens, gate_stride,
    GELU: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ONE_IMAGE: tl.constexpr,
):  # fmt: skip
    """The epilogue of the integer matmul, for the tile of out that begins at row and column. Wide tiles are done in
    halves, one after the other: both at once do not fit the registers.
    """
    if BLOCK_N > 64:
        left, right = tl.split(tl.permute(tl.reshape(product, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
        finish(
            left, row, column, row_scale, column_scale, bias, grid_scale, grid_zero, gate, residual, out,
            M, N, tokens, gate_stride, GELU, LOW, HIGH, BLOCK_M, BLOCK_N // 2, ONE_IMAGE,
        )  # fmt: skip
        finish(
            right, row, column + BLOCK_N // 2, row_scale, column_scale, bias, grid_scale, grid_zero, gate, residual,
            out, M, N, tokens, gate_stride, GELU, LOW, HIGH, BLOCK_M, BLOCK_N // 2, ONE_IMAGE,
        )  # fmt: skip
        return
    rows, columns = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
    y = product.to(tl.float32)
    if row_scale is not None:
        y *= tl.load(row_scale + rows, mask=rows < M, other=0.0)[:, None]
    y *= tl.load(column_scale + columns, mask=columns < N, other=0.0)[None, :]
    if bias is not None:
        y += tl.load(bias + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    if GELU:
        y = tanh_gelu(y)
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    # One offset of the tile in 64 bits, and those within it in 32, which take half the registers.
    corner = row.to(tl.int64) * N + column
    at = tl.arange(0, BLOCK_M)[:, None] * N + tl.arange(0, BLOCK_N)[None, :]
    if grid_scale is not None:
        y = to_codes(y, tl.div_rn(1.0, tl.load(grid_scale)), tl.load(grid_zero), LOW, HIGH)
    elif residual is not None:
        if ONE_IMAGE:
            gate += (row // tokens).to(tl.int64) * gate_stride
            y *= tl.load(gate + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
        else:
            gate += (rows // tokens).to(tl.int64)[:, None] * gate_stride + columns[None, :]
            y *= tl.load(gate, mask=inside, other=0.0).to(tl.float32)
        y += tl.load(residual + corner + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + corner + at, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def tile_position(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Row and column of this program's tile; 8 rows of tiles go together, whose weights stay in the L2 cache."""
    tall, wide = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    program = tl.program_id(0)
    first = program // (8 * wide) * 8
    height = min(tall - first, 8)
    inside = program % (8 * wide)
    return first + inside % height, inside // height


@triton.jit
def integer_product(
    a, b, row, column, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """int32 (BLOCK_M, BLOCK_N). Rows and columns beyond the end repeat the last one: no masks within the loop."""
    steps = tl.arange(0, BLOCK_K)
    rows, columns = tl.minimum(row + tl.arange(0, BLOCK_M), M - 1), tl.minimum(column + tl.arange(0, BLOCK_N), N - 1)
    a += rows.to(tl.int64)[:, None] * K + steps[None, :]
    b += columns.to(tl.int64)[None, :] * K + steps[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            left, right = tl.load(a), tl.load(b)
        else:
            left = tl.load(a, mask=steps[None, :] < K - start, other=0)
            right = tl.load(b, mask=steps[:, None] < K - start, other=0)
        total = tl.dot(left, right, total, out_dtype=tl.int32)
        a += BLOCK_K
        b += BLOCK_K
    return total
