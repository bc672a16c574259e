"""One row of inputs to int8 in one pass: LayerNorm and modulation or GELU, rotation and rounding, in registers."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

from ...quantization.grids import TINY

SMALLEST = tl.constexpr(TINY)
# Adding and taking away 1.5 * 2^23 leaves a float32 below 2^22 rounded to an integer, half to even.
ROUNDER = tl.constexpr(1.5 * 2**23)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
WARPS = (4,) if INTERPRETED else (1, 2, 4, 8)


def quick_bench(call: Callable[[], Any], quantiles: tuple[float, ...]) -> Any:
    """Milliseconds of a candidate; Triton's own default takes five times as long to tune."""
    return triton.testing.do_bench(call, warmup=3, rep=15, quantiles=quantiles)


@triton.jit
def to_codes(y, inverse_scale, zero, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Eq. 3 as whole floats: round(y / scale) + zero within [LOW, HIGH]."""
    bounded = tl.minimum(tl.maximum(y * inverse_scale, LOW - zero), HIGH - zero)
    return (bounded + ROUNDER) - ROUNDER + zero


@triton.jit
def tanh_gelu(x):
    """x (1 + tanh u) / 2 = x / (1 + exp(-2 u)) with u = sqrt(2 / pi) (x + 0.044715 x^3)."""
    return x / (1 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))


@triton.jit
def read_order(START: tl.constexpr, SIZE: tl.constexpr, LEVELS: tl.constexpr):
    """Offsets that read each group in runs of up to 8, the last run first, so that loads stay 16 bytes wide."""
    at = tl.arange(0, SIZE)
    if LEVELS > 1:
        runs: tl.constexpr = 4**LEVELS // 8
        run = at // 8
        at = (run // runs * runs + (runs - 1 - run % runs)) * 8 + at % 8
    return START + at


@triton.jit
def load(pointer, START: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, LEVELS: tl.constexpr):
    """Values START to START + SIZE of a row in float32, in read_order; 0 beyond WIDTH."""
    at = read_order(START, SIZE, LEVELS)
    if START + SIZE > WIDTH:
        return tl.load(pointer + at, mask=at < WIDTH, other=0.0).to(tl.float32)
    else:
        return tl.load(pointer + at).to(tl.float32)


@triton.jit
def modulate(normal, shift, scale, START: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, LEVELS: tl.constexpr):
    return normal * (1 + load(scale, START, SIZE, WIDTH, LEVELS)) + load(shift, START, SIZE, WIDTH, LEVELS)


@triton.jit
def rotate(y, SIZE: tl.constexpr, LEVELS: tl.constexpr):
    """y R for values in reverse: R is a Kronecker power of H4 = P (J / 2 - I), J all ones, P the reversal."""
    for level in tl.static_range(LEVELS):
        y = tl.reshape(y, (SIZE // 4 ** (level + 1), 4, 4**level))
        y = tl.reshape(0.5 * tl.sum(y, axis=1, keep_dims=True) - y, (SIZE,))
    return y


@triton.jit
def store(pointer, codes, START: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, LEVELS: tl.constexpr):
    """Stores codes in order; within the runs that read_order left in order they are reversed here, bit by bit."""
    codes = codes.to(tl.int32)  # the compiler sees that a + b - a is b only in integers
    for bit in tl.static_range(min(2 * LEVELS, 3)):
        codes = tl.reshape(codes, (SIZE // 2 ** (bit + 1), 2, 2**bit))
        codes = tl.reshape(tl.sum(codes, axis=1, keep_dims=True) - codes, (SIZE,))
    at = START + tl.arange(0, SIZE)
    if START + SIZE > WIDTH:
        tl.store(pointer + at, codes.to(tl.int8), mask=at < WIDTH)
    else:
        tl.store(pointer + at, codes.to(tl.int8))


def fitting_warps(configs: list[triton.Config], arguments: dict[str, Any], **_: Any) -> list[triton.Config]:
    """No more than 128 values for each thread, whose registers hold them all."""
    return [c for c in configs if arguments["HEAD"] + arguments["TAIL"] <= 128 * 32 * c.num_warps]


@triton.autotune(
    configs=[triton.Config({}, num_warps=warps) for warps in WARPS],
    key=["rows", "WIDTH", "LEVELS"],
    prune_configs_by={"early_config_prune": fitting_warps},
    do_bench=quick_bench,
)
@triton.jit(do_not_specialize=["rows", "tokens"])
def quantize_kernel(
    x, shift, scale, codes, row_scale, grid_scale, grid_zero,
    rows, tokens, shift_stride, scale_stride, eps,
    WIDTH: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, LEVELS: tl.constexpr, GELU: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr,
):  # fmt: skip
    """codes of one row of x (rows, WIDTH), whose image is row // tokens; shift is None without LayerNorm, grid_scale
    None for a scale of the row's own. The row is held as two parts, HEAD and TAIL wide, because widths of
    transformers are sums of two powers of two. `rows` only keys the tuning.
    """
    row = tl.program_id(0).to(tl.int64)
    head = load(x + row * WIDTH, 0, HEAD, WIDTH, LEVELS)
    tail = load(x + row * WIDTH, HEAD, TAIL, WIDTH, LEVELS)
    if shift is not None:
        mean = (tl.sum(head) + tl.sum(tail)) / WIDTH
        head -= mean
        tail = tl.where(read_order(HEAD, TAIL, LEVELS) < WIDTH, tail - mean, 0.0)
        inverse = tl.rsqrt((tl.sum(head * head) + tl.sum(tail * tail)) / WIDTH + eps)
        image = row // tokens
        shift += image * shift_stride
        scale += image * scale_stride
        head = modulate(head * inverse, shift, scale, 0, HEAD, WIDTH, LEVELS)
        tail = modulate(tail * inverse, shift, scale, HEAD, TAIL, WIDTH, LEVELS)
    if GELU:
        head, tail = tanh_gelu(head), tanh_gelu(tail)
    head, tail = rotate(head, HEAD, LEVELS), rotate(tail, TAIL, LEVELS)
    if grid_scale is None:
        absmax = tl.maximum(tl.max(tl.abs(head)), tl.max(tl.abs(tail)))
        step = tl.maximum(tl.div_rn(absmax, 127.0), SMALLEST)
        zero = 0.0
        tl.store(row_scale + row, step)
    else:
        step, zero = tl.load(grid_scale), tl.load(grid_zero)
    inverse_step = tl.div_rn(1.0, step)
    head = to_codes(head, inverse_step, zero, LOW, HIGH)
    tail = to_codes(tail, inverse_step, zero, LOW, HIGH)
    store(codes + row * WIDTH, head, 0, HEAD, WIDTH, LEVELS)
    store(codes + row * WIDTH, tail, HEAD, TAIL, WIDTH, LEVELS)


def halves(width: int, group: int) -> tuple[int, int]:
    """Powers of two, multiples of group, that hold a row: the largest below width, and one for the rest."""
    head = max(group, 1 << (width - 1).bit_length() - 1)
    return head, max(group, triton.next_power_of_2(width - head))
