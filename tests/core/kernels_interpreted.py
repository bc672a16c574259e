"""Runs the Triton kernels in Triton's interpreter (TRITON_INTERPRET=1), or with the argument cuda on a GPU.

Prints how far they are from the reference: JSON, case -> {"largest", "share", "scale"} for codes or {"error"} for
products.
"""

from __future__ import annotations

import itertools
import json
import sys

import torch

from qandc_core.fused.kernels import reference, triton_ops
from qandc_core.quantization.grids import Grid

DEVICE = sys.argv[1] if len(sys.argv) > 1 else "cpu"
torch.set_default_device(DEVICE)
B, T = 3, 5
ASYMMETRIC = Grid(torch.tensor(0.021), torch.tensor(-37.0), -128, 127)
SYMMETRIC = Grid(torch.tensor(0.03), torch.tensor(0.0), -127, 127)
# Widths that are sums of two powers of two, powers of two, neither, and one group alone.
WIDTHS = [(288, None), (200, None), (1152, 64), (192, 64), (768, 256), (512, 256), (256, 256), (144, 16), (20, 4)]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GRIDS = {"rows": None, "static": ASYMMETRIC, "symmetric": SYMMETRIC}


def codes_apart(ours, expected):
    (codes, scale), (codes2, scale2) = ours, expected
    assert codes.dtype == codes2.dtype == torch.int8 and codes.shape == codes2.shape
    assert (scale is None) == (scale2 is None)
    apart = (codes.int() - codes2.int()).abs()
    relative = 0.0 if scale is None else ((scale - scale2).abs() / scale2).max().item()
    return {"largest": apart.max().item(), "share": (apart > 0).float().mean().item(), "scale": relative}


def inputs(width, dtype):
    """Tokens with outliers and a large mean, one of them zero, and strided rows of a modulation."""
    generator = torch.Generator(DEVICE).manual_seed(width)
    x = torch.randn(B, T, width, generator=generator) * 2 + 10
    x[..., width // 3] *= 30
    x[1, 2] = 0
    modulation = torch.randn(B, 6, width, generator=generator)
    return x.to(dtype), modulation[:, 1].to(dtype), modulation.to(dtype)[:, 4]


def quantizer_cases():
    for (width, group), (dtype, kind) in zip(WIDTHS, itertools.cycle(itertools.product(DTYPES, GRIDS))):
        x, shift, scale = inputs(width, dtype)
        signs = 1 - 2 * (torch.arange(width) % 2).to(dtype)
        for name, arguments in {
            "quantize_modulated": (x, shift, scale, 1e-6, group, GRIDS[kind]),
            "quantize_rows": (x.flatten(0, 1), group, False, GRIDS[kind]),
            "rows gelu": (x.flatten(0, 1) * signs / 5, group, True, GRIDS[kind]),
        }.items():
            function = "quantize_rows" if name == "rows gelu" else name
            ours, expected = getattr(triton_ops, function)(*arguments), getattr(reference, function)(*arguments)
            yield f"{name}, {width}, {group}, {dtype}, {kind}", codes_apart(ours, expected)


def random_codes(rows, width, extreme=False):
    generator = torch.Generator(DEVICE).manual_seed(rows * width)
    if extreme:
        return torch.where(torch.rand(rows, width, generator=generator) < 0.1, -128, 127).to(torch.int8)
    return torch.randint(-127, 128, (rows, width), dtype=torch.int8, generator=generator)


def exact_cases():
    """Against int64, in float32 with scales 1, so that equal is equal but for float32's rounding of the sum."""
    for rows, columns, width in [(70, 200, 144), (64, 128, 64), (1, 432, 288), (130, 72, 4608), (600, 264, 64)]:
        for extreme in (False, True):
            a, b = random_codes(rows, width, extreme), random_codes(columns, width, extreme)
            expected = (a.cpu().numpy().astype("int64") @ b.cpu().numpy().astype("int64").T).astype("float32")
            ours = triton_ops.int8_matmul(a, None, b, torch.ones(columns), None, torch.float32)
            error = (ours.cpu() - torch.from_numpy(expected)).abs().max().item()
            yield f"exact, {rows}, {columns}, {width}, {'extreme' if extreme else 'random'}", {"error": error}


def product_cases():
    """Relative to the largest value. 6 images of 17 tokens, where tiles hold several images, and 2 of 64."""
    for images, tokens, columns, width, dtype in [
        (6, 17, 432, 144, torch.float32),
        (2, 64, 200, 288, torch.bfloat16),
        (2, 64, 128, 128, torch.float32),
        (1, 20, 72, 64, torch.float16),
    ]:
        rows = images * tokens
        a, b = random_codes(rows, width), random_codes(columns, width)
        row_scale, column_scale = torch.rand(rows) / 127, torch.rand(columns) / 127
        bias, residual = torch.randn(columns).to(dtype), torch.randn(rows, columns).to(dtype)
        gate = torch.randn(images, 6, columns).to(dtype)[:, 2]
        for name, options in {
            "plain": {},
            "product gelu": {"gelu": True},
            "codes": {"grid": ASYMMETRIC},
            "gelu codes": {"gelu": True, "grid": SYMMETRIC},
            "residual": {"gate": gate, "residual": residual},
        }.items():
            for scales, offset in [(row_scale, bias), (None, None)]:
                arguments = (a, scales, b, column_scale if scales is not None else column_scale / 500, offset, dtype)
                ours, expected = (module.int8_matmul(*arguments, **options) for module in (triton_ops, reference))
                assert ours.dtype == expected.dtype and ours.shape == expected.shape
                case = f"{name}, {rows}, {columns}, {width}, {dtype}, {'rows' if scales is not None else 'no rows'}"
                if "grid" in options:
                    yield case, codes_apart((ours, None), (expected, None))
                else:
                    apart = (ours.double() - expected.double()).abs().max() / expected.double().abs().max()
                    yield case, {"error": apart.item(), "dtype": str(dtype)}


def layout_cases():
    """Operands whose values lie column by column, as the tokens of one image do after a transposition."""
    dtype, (tokens, columns, width) = torch.float32, (20, 72, 64)
    for images in (1, 3):
        rows = images * tokens
        a, b, bias = random_codes(rows, width), random_codes(columns, width), torch.randn(2, columns)[:, :].t()[:, 0]
        x, shift, scale = torch.randn(images, tokens, width), torch.randn(images, width), torch.randn(images, width)
        row_scale, column_scale = torch.rand(2, rows).t()[:, 1] / 127, torch.rand(columns) / 127
        options = {"gate": torch.randn(images, columns), "residual": torch.randn(rows, columns)}
        turned = {name: value.t().contiguous().t() for name, value in options.items()}
        expected = reference.int8_matmul(a, row_scale, b, column_scale, bias, dtype, **options)
        for module in (triton_ops, reference):
            given = (a.t().contiguous().t(), row_scale, b.t().contiguous().t(), column_scale, bias, dtype)
            apart = (module.int8_matmul(*given, **turned) - expected).abs().max() / expected.abs().max()
            yield f"residual, turned, {images}, {module.__name__}", {"error": apart.item(), "dtype": str(dtype)}
        given = (x.transpose(1, 2).contiguous().transpose(1, 2), *(v.t().contiguous().t() for v in (shift, scale)))
        ours, expected_codes = (
            triton_ops.quantize_modulated(*given, 1e-6),
            reference.quantize_modulated(x, shift, scale, 1e-6),
        )
        yield f"quantize_modulated, turned, {images}, rows", codes_apart(ours, expected_codes)


def check_operators():
    """torch's own checks of a custom operator: nothing mutated or aliased, shapes as registered."""
    x, shift, scale = inputs(192, torch.float32)
    tests = ("test_schema", "test_faketensor")
    for grid in (None, SYMMETRIC):
        given = (x.flatten(0, 1), shift, scale, 1e-6, 3, False, *triton_ops.flat(grid))
        torch.library.opcheck(triton_ops.quantize_op, given, test_utils=tests)
        a, b = random_codes(20, 64), random_codes(72, 64)
        given = (a, None, b, torch.ones(72), None, torch.bfloat16, True, *triton_ops.flat(grid), None, None)
        torch.library.opcheck(triton_ops.int8_matmul_op, given, test_utils=tests)


def check_compiled():
    """The functions stay in one graph of torch.compile, with a grid and without."""

    def layer(x, shift, scale, weight, residual, gate, grid):
        codes, rows = triton_ops.quantize_modulated(x, shift, scale, 1e-6, 64)
        hidden = triton_ops.int8_matmul(codes, rows, weight, ones, None, x.dtype, gelu=True, grid=grid)
        codes, rows = triton_ops.quantize_rows(hidden.float(), 64)
        return triton_ops.int8_matmul(codes, rows, weight, ones, None, x.dtype, gate=gate, residual=residual)

    x, shift, scale = inputs(192, torch.float32)
    weight, ones = random_codes(192, 192), torch.full((192,), 1e-3)
    given = (x, shift, scale, weight, x.flatten(0, 1), shift, SYMMETRIC)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*given), layer(*given))


if __name__ == "__main__":
    torch.set_num_threads(1)
    check_operators()
    check_compiled()
    cases = itertools.chain(quantizer_cases(), exact_cases(), product_cases(), layout_cases())
    json.dump(dict(cases), sys.stdout)
