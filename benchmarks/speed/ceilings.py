"""The best rates that a machine is measured to reach: what a model's own rates are held against."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from qandc_core.quantization.matmul import int_mm, int_mm_is_fast

from .clock import best_seconds

SIZES = {"cpu": (1024, 2048), "cuda": (4096, 8192)}
COPY_BYTES = {"cpu": 2**28, "cuda": 2**30}
SLOW = 0.5  # seconds of a product after which no larger one is tried
GRAPH_KERNELS = 1000


@dataclass(frozen=True)
class Ceilings:
    """Operations/s of dense matrix products (2 M N K each) by format, bytes/s read and written by a large copy, and
    seconds of one tiny kernel in a CUDA graph. None: not there on this device.
    """

    float32: float | None
    tf32: float | None
    bfloat16: float | None
    int8: float | None
    bandwidth: float
    launch: float | None

    def rate(self, format: str) -> float | None:
        """Operations/s of products in float32, tf32, bfloat16 or int8."""
        return getattr(self, format)


def best_of(first: Ceilings, second: Ceilings) -> Ceilings:
    """The better of two measurements: a busy moment hides what a machine can do."""
    better: dict[str, Any] = {}
    for name, a in vars(first).items():
        found = [value for value in (a, getattr(second, name)) if value is not None]
        better[name] = (min if name == "launch" else max)(found, default=None)
    return Ceilings(**better)


@torch.no_grad()
def measure_ceilings(device: torch.device | str, quick: bool = False) -> Ceilings:
    """Seconds to minutes; `quick` takes smaller matrices and fewer repeats, and finds slightly lower rates."""
    device = torch.device(device)
    cuda = device.type == "cuda"
    sizes = SIZES[device.type][: 1 if quick else None]
    repeats = (5 if quick else 20) if cuda else (3 if quick else 7)
    with float32_products("highest"):
        float32 = best_rate(float_product(torch.float32), sizes, device, repeats)
    tf32 = None
    if has_tf32(device):
        with float32_products("high"):
            tf32 = best_rate(float_product(torch.float32), sizes, device, repeats)
    return Ceilings(
        float32,
        tf32,
        best_rate(float_product(torch.bfloat16), sizes, device, repeats),
        int8_rate(sizes, device, repeats) if cuda or int_mm_is_fast() else None,
        copy_bandwidth(device, COPY_BYTES[device.type] // (4 if quick else 1), repeats),
        launch_seconds(device, repeats) if cuda else None,
    )


@contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """How float32 matrices are multiplied: highest is float32, high is TF32 where the device has it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def has_tf32(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


Product = Callable[[int, torch.device], Callable[[], Any]]  # of two square matrices, ready to be called


def best_rate(product: Product, sizes: tuple[int, ...], device: torch.device, repeats: int) -> float | None:
    """Operations/s of the fastest of some square products; None where the device has no such product."""
    best = None
    for size in sizes:
        try:
            seconds = best_seconds(product(size, device), device, repeats)
        except (RuntimeError, NotImplementedError):
            break
        best = max(best or 0.0, 2 * size**3 / seconds)
        if seconds > SLOW:
            break
    return best


def float_product(dtype: torch.dtype) -> Product:
    def product(size: int, device: torch.device) -> Callable[[], Any]:
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        return lambda: torch.mm(a, b.t())

    return product


def random_codes(rows: int, columns: int, device: torch.device) -> Tensor:
    return torch.randint(-127, 128, (rows, columns), dtype=torch.int8, device=device)


def int8_rate(sizes: tuple[int, ...], device: torch.device, repeats: int) -> float | None:
    """The better of both layouts of the second matrix."""

    def columns_first(size: int, device: torch.device) -> Callable[[], Any]:
        a, b = (random_codes(size, size, device) for _ in range(2))
        return lambda: int_mm(a, b)

    def rows_first(size: int, device: torch.device) -> Callable[[], Any]:
        a, b = (random_codes(size, size, device) for _ in range(2))
        return lambda: torch._int_mm(a, b)

    rates = [best_rate(product, sizes, device, repeats) for product in (columns_first, rows_first)]
    return max((rate for rate in rates if rate is not None), default=None)


def copy_bandwidth(device: torch.device, size: int, repeats: int) -> float:
    """Bytes/s read and written by copies of `size` bytes, more than any cache holds, between buffers in turn."""
    values = torch.randn(size // 4, device=device)
    buffers = [values, values.clone(), values.clone()]
    turns = cycle(zip(buffers, buffers[1:] + buffers[:1]))

    def copy() -> None:
        source, target = next(turns)
        target.copy_(source)

    return 2 * values.nbytes / best_seconds(copy, device, repeats)


def launch_seconds(device: torch.device, repeats: int) -> float:
    """Seconds of each of many tiny kernels, every one waiting for the one before, in a replayed CUDA graph."""
    with torch.cuda.device(device):
        value = torch.zeros(1, device=device)
        value.add_(1)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(GRAPH_KERNELS):
                value.add_(1)
    return best_seconds(graph.replay, device, repeats) / GRAPH_KERNELS
