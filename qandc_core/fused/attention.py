"""Which of torch's attention kernels is the fastest for a run's shapes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..numerics import relative_error
from ..sampling.clock import mark, span

FUSED = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
AGREES = 0.02  # relative difference from the plain formula, above which a kernel is not trusted
REPEATS = 20
SPIN = 5_000_000  # cycles


@contextmanager
def fastest_attention(batch: int, heads: int, tokens: int, width: int, like: Tensor) -> Iterator[None]:
    """Prefers, for as long as the context lasts, the kernel that was fastest here; on CPUs torch's own choice."""
    if like.device.type != "cuda":
        yield
        return
    first = measured_attention(batch, heads, tokens, width, like.dtype, like.device)
    others = [backend for backend in (*FUSED, SDPBackend.MATH) if backend != first]
    with sdpa_kernel([first, *others], set_priority=True):
        yield


@cache
def measured_attention(
    batch: int, heads: int, tokens: int, width: int, dtype: torch.dtype, device: torch.device
) -> SDPBackend:
    """The fastest that takes these sizes and agrees with the plain formula, which is the last resort."""
    generator = torch.Generator(device).manual_seed(0)
    values = torch.randn(batch, tokens, 3, heads, width, dtype=dtype, device=device, generator=generator)
    qkv = values.permute(2, 0, 3, 1, 4)
    with sdpa_kernel(SDPBackend.MATH):
        exact = F.scaled_dot_product_attention(*qkv[:, :1])
    seconds = {}
    for backend in FUSED:
        with sdpa_kernel(backend):
            try:
                found = F.scaled_dot_product_attention(*qkv)
            except RuntimeError:  # this kernel does not take these sizes
                continue
            if relative_error(found[:1], exact) < AGREES:
                seconds[backend] = elapsed(qkv)
    return min(seconds, key=lambda backend: seconds[backend], default=SDPBackend.MATH)


def elapsed(qkv: Tensor) -> float:
    """Seconds of some calls; the device spins while they are queued, or Python's time would be measured."""
    torch.cuda._sleep(SPIN)
    begun = mark(qkv.device)
    for _ in range(REPEATS):
        F.scaled_dot_product_attention(*qkv)
    return span(begun, mark(qkv.device))
