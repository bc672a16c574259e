"""Every way to multiply a model's matrices, timed at the model's own sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qandc_core.numerics import relative_error
from qandc_core.quantization.formats.grouped import GROUP
from qandc_core.quantization.formats.w4a8 import W4A8
from qandc_core.quantization.formats.w8a8 import W8A8
from qandc_core.quantization.grids import Grid
from qandc_core.quantization.matmul import int_mm, int_mm_is_fast
from qandc_core.quantization.native import NativeConfig, weight_tensors
from qandc_core.quantization.rotation import rotation_group

from .ceilings import Ceilings, float32_products, random_codes
from .clock import median_seconds

EPS = 1e-6

Call = Callable[[], Any]


@dataclass(frozen=True)
class Problem:
    """A product of inputs (rows, inner) and weights (columns, inner) on a device."""

    rows: int
    columns: int
    inner: int
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations around quantized layers."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @cached_property
    def x(self) -> Tensor:
        return torch.randn(self.rows, self.inner, device=self.device)

    @cached_property
    def weight(self) -> Tensor:
        return torch.randn(self.columns, self.inner, device=self.device)

    @cached_property
    def inputs(self) -> Tensor:
        return self.x.to(self.dtype)

    @cached_property
    def codes(self) -> Tensor:
        return random_codes(self.rows, self.inner, self.device)

    @cached_property
    def row_scale(self) -> Tensor:
        return torch.rand(self.rows, device=self.device)

    @cached_property
    def int8(self) -> dict[str, Tensor]:
        return weight_tensors(self.weight, W8A8, NativeConfig("W8A8", "nearest", clip_search=False), None)

    @cached_property
    def w4a8(self) -> dict[str, Tensor]:
        return weight_tensors(self.weight, W4A8, NativeConfig("W4A8", "nearest"), None)

    @property
    def group(self) -> int | None:
        return rotation_group(self.inner)

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.columns * self.inner

    @property
    def rounding_bytes(self) -> int:
        """Of inputs read, codes and scales written by a quantizer of rows."""
        return self.inputs.nbytes + self.rows * (self.inner + 4)


@dataclass(frozen=True)
class Method:
    """`build` prepares the call; `ceiling` is the field of Ceilings that its operations, or bytes, are held against."""

    build: Callable[[Problem], Call]
    ceiling: str


@torch.no_grad()
def gemm_table(
    shapes: Iterable[tuple[int, int, int]], ceilings: Ceilings, device: torch.device | str, repeats: int = 20
) -> list[dict[str, Any]]:
    """One row for each (M, N, K) = (rows, columns, inner): of each method median seconds, the rate (operations/s,
    bytes/s for quantizers) and its share of the ceiling; None, its message in `error`, if it raised. On CUDA of ten
    calls after each other, whose inputs stay in the cache as a model's do, and whose weights do too; else caches are
    cold. Where Triton's kernels run, `differences` says how far they are from the reference.
    """
    device = torch.device(device)
    methods = all_methods(device)
    with float32_products("highest"):
        return [gemm_row(Problem(*shape, device), methods, ceilings, repeats) for shape in shapes]


def gemm_row(problem: Problem, methods: Mapping[str, Method], ceilings: Ceilings, repeats: int) -> dict[str, Any]:
    measured: dict[str, dict[str, float | None] | None] = {}
    errors: dict[str, str] = {}
    for name, method in methods.items():
        try:
            measured[name] = measure(problem, method, ceilings, repeats)
        except Exception as error:
            measured[name], errors[name] = None, f"{type(error).__name__}: {error}"
    size = {"rows": problem.rows, "columns": problem.columns, "inner": problem.inner}
    row = {**size, "methods": measured, "error": errors}
    if "triton_int8_matmul" in methods:
        modules = implementations(problem.device)
        row["differences"] = differences(problem, modules["triton"], modules["reference"])
    return row


def differences(problem: Problem, module: ModuleType, reference: ModuleType) -> dict[str, float]:
    """How far apart two implementations are on this device: codes in units, values relative to the second's."""
    images = 2 if problem.rows % 2 == 0 else 1
    x = problem.inputs.view(images, -1, problem.inner)
    shift, scale = torch.randn(2, images, problem.inner, device=problem.device, dtype=problem.dtype)
    residual = torch.randn(problem.rows, problem.columns, device=problem.device, dtype=problem.dtype)
    gate = torch.randn(images, problem.columns, device=problem.device, dtype=problem.dtype)
    weight, columns = problem.int8["weight"], problem.int8["weight_scale"].flatten()
    given = (problem.codes, problem.row_scale / 127, weight, columns, columns, problem.dtype)
    grid = Grid(problem.row_scale[0] + 0.01, torch.zeros((), device=problem.device), -128, 127)

    def apart(call: Callable[[ModuleType], Tensor]) -> float:
        ours, theirs = call(module), call(reference)
        if ours.dtype == torch.int8:
            return float((ours.int() - theirs.int()).abs().max())
        return relative_error(ours, theirs)

    return {
        "modulated codes": apart(lambda m: m.quantize_modulated(x, shift, scale, EPS, problem.group)[0]),
        "codes": apart(lambda m: m.quantize_rows(problem.inputs, problem.group, True)[0]),
        "product": apart(lambda m: m.int8_matmul(*given)),
        "gated product": apart(lambda m: m.int8_matmul(*given, gate=gate, residual=residual)),
        "product to codes": apart(lambda m: m.int8_matmul(*given, gelu=True, grid=grid)),
    }


def measure(problem: Problem, method: Method, ceilings: Ceilings, repeats: int) -> dict[str, float | None]:
    calls = 10 if problem.device.type == "cuda" else 1
    seconds = median_seconds(several(method.build(problem), calls), problem.device, repeats, cold=calls == 1) / calls
    rate = (problem.rounding_bytes if method.ceiling == "bandwidth" else problem.flops) / seconds
    ceiling = getattr(ceilings, method.ceiling)
    return {"seconds": seconds, "rate": rate, "share": None if ceiling is None else rate / ceiling}


def several(call: Call, calls: int) -> Call:
    def repeated() -> None:
        for _ in range(calls):
            call()

    return repeated


def all_methods(device: torch.device) -> dict[str, Method]:
    """Those of torch, comfy-kitchen's, and of our kernels the reference and, where it runs, Triton's."""
    methods = {
        "float32": Method(float_linear(torch.float32), "float32"),
        "bfloat16": Method(float_linear(torch.bfloat16), "bfloat16"),
        "int_mm": Method(plain_int_mm, "int8"),
        "kitchen_int8": Method(partial(kitchen_int8, rotated=False), "int8"),
        "kitchen_int8_rotated": Method(partial(kitchen_int8, rotated=True), "int8"),
        "kitchen_w4a8": Method(kitchen_w4a8, "int8"),
    }
    for name, module in implementations(device).items():
        methods |= {
            f"{name}_quantize_rows": Method(partial(quantize_rows, module), "bandwidth"),
            f"{name}_quantize_modulated": Method(partial(quantize_modulated, module), "bandwidth"),
            f"{name}_int8_matmul": Method(partial(int8_matmul, module), "int8"),
            f"{name}_int8_linear": Method(partial(int8_linear, module), "int8"),
        }
    return methods


def implementations(device: torch.device) -> dict[str, ModuleType]:
    """Modules of the same functions."""
    from qandc_core.fused.kernels import available
    from qandc_core.fused.linear import kernel_module

    names = ("reference", "triton") if available(device) else ("reference",)
    return {name: kernel_module(name) for name in names}


def check_integer_product(device: torch.device) -> None:
    if device.type == "cpu" and not int_mm_is_fast():
        raise RuntimeError("This CPU multiplies int8 matrices in a plain loop.")


def float_linear(dtype: torch.dtype) -> Callable[[Problem], Call]:
    return lambda problem: partial(F.linear, problem.x.to(dtype), problem.weight.to(dtype))


def plain_int_mm(problem: Problem) -> Call:
    check_integer_product(problem.device)
    return partial(int_mm, problem.codes, problem.int8["weight"])


def kitchen_int8(problem: Problem, rotated: bool) -> Call:
    """Rounding the inputs included."""
    import comfy_kitchen

    check_integer_product(problem.device)
    weight, scale = problem.int8["weight"], problem.int8["weight_scale"]
    rotation = {"convrot": True, "convrot_groupsize": problem.group} if rotated else {}
    return partial(comfy_kitchen.int8_linear, problem.inputs, weight, scale, out_dtype=problem.dtype, **rotation)


def kitchen_w4a8(problem: Problem) -> Call:
    """Rotating and rounding the inputs and decoding the weights included."""
    from comfy_kitchen.tensor import w4a8_int8

    check_integer_product(problem.device)
    tensors = problem.w4a8
    return partial(
        w4a8_int8.w4a8_int8_linear, problem.inputs, tensors["weight"], tensors["weight_s_rel"],
        tensors["weight_s_channel"], tensors["weight_codebook"], group_size=GROUP, convrot_groupsize=problem.group,
        out_dtype=problem.dtype,
    )  # fmt: skip


def quantize_rows(module: ModuleType, problem: Problem) -> Call:
    return partial(module.quantize_rows, problem.inputs, problem.group)


def quantize_modulated(module: ModuleType, problem: Problem) -> Call:
    """Two images where the rows allow it: each has its own shift and scale."""
    images = 2 if problem.rows % 2 == 0 else 1
    x = problem.inputs.view(images, -1, problem.inner)
    modulation = torch.randn(images, 2, problem.inner, device=problem.device, dtype=problem.dtype)
    return partial(module.quantize_modulated, x, modulation[:, 0], modulation[:, 1], EPS, problem.group)


def int8_matmul(module: ModuleType, problem: Problem) -> Call:
    """The product of codes with scales, without rounding inputs."""
    weight, scale = problem.int8["weight"], problem.int8["weight_scale"].flatten()
    return partial(module.int8_matmul, problem.codes, problem.row_scale, weight, scale, None, problem.dtype)


def int8_linear(module: ModuleType, problem: Problem) -> Call:
    """Rotating and rounding the inputs included, as kitchen_int8_rotated."""
    weight, scale = problem.int8["weight"], problem.int8["weight_scale"].flatten()

    def call() -> Tensor:
        codes, row_scale = module.quantize_rows(problem.inputs, problem.group)
        return module.int8_matmul(codes, row_scale, weight, scale, None, problem.dtype)

    return call
