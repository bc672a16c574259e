"""Integer matrix products, fastest first, each tried on worst-case codes before it is trusted."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

BACKENDS = ("auto", "simulated", "int_mm", "kitchen")


def simulated_matmul(a: Tensor, b: Tensor) -> Tensor:
    """a (M, K) int8 times b (N, K) int8 transposed; float32 is exact over parts of 1024 columns."""
    parts = zip(a.split(1024, dim=1), b.split(1024, dim=1))
    products = [F.linear(x.float(), y.float()).to(torch.int32) for x, y in parts]
    return products[0] if len(products) == 1 else torch.stack(products).sum(0, dtype=torch.int32)


INT_MM_ROWS = 17  # torch._int_mm on CUDA takes no fewer rows, and multiples of 8 in the other two sizes


def int_mm(a: Tensor, b: Tensor) -> Tensor:
    """The same product by torch._int_mm, padded with zeros to the sizes that it needs on CUDA."""
    if not a.is_cuda:
        return torch._int_mm(a, b.t())
    rows, columns, inner = max(0, INT_MM_ROWS - len(a)), -len(b) % 8, -a.shape[1] % 8
    if rows or inner:
        a = F.pad(a, (0, inner, 0, rows))
    if columns or inner:
        b = F.pad(b, (0, inner, 0, columns))
    y = torch._int_mm(a, b.t())
    return y[: len(y) - rows, : y.shape[1] - columns] if rows or columns else y


def kitchen_mm(a: Tensor, b: Tensor) -> Tensor:
    import comfy_kitchen

    return comfy_kitchen.mm_int8(a, b.t().contiguous())


def worst_case_codes() -> tuple[Tensor, Tensor]:
    """Codes at the ends of their ranges, where 16-bit intermediate sums would saturate."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(32, 64, generator=generator) < 0.2 for _ in range(2))
    return torch.where(a, -128, 127).to(torch.int8), torch.where(b, -127, 127).to(torch.int8)


@cache
def int_mm_is_fast() -> bool:
    """torch._int_mm is fast only through oneDNN's VNNI kernels; without them it is a plain loop, or saturates where
    ONEDNN_MAX_CPU_ISA hides VNNI from oneDNN alone.
    """
    supported = getattr(torch.cpu, "_is_vnni_supported", None)
    if supported is None or not supported():
        return False
    a, b = worst_case_codes()
    return bool((int_mm(a, b) == simulated_matmul(a, b)).all())


@cache
def kitchen_is_available() -> bool:
    try:
        import comfy_kitchen
    except ImportError:
        return False
    return hasattr(comfy_kitchen, "mm_int8") and hasattr(comfy_kitchen, "int8_linear")  # since 0.2.24


def backend_for(backend: str, device: torch.device) -> str:
    """The backend that was asked for, or the device's own where that one has no kernels for it."""
    if backend == "auto" or (backend == "int_mm" and device.type not in ("cpu", "cuda")):
        return pick_backend(device)
    return backend


def pick_backend(device: torch.device) -> str:
    """The fastest exact integer product here: comfy-kitchen on CUDA, VNNI on CPU, else simulated."""
    if device.type == "cuda" and kitchen_is_available():
        return "kitchen"
    return "int_mm" if device.type == "cpu" and int_mm_is_fast() else "simulated"
