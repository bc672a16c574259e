"""Where the time of a step goes, by kind of work, from torch's profiler."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from .clock import wall_seconds

PRODUCTS, ATTENTION, ELEMENTWISE = "matrix products", "attention", "normalisation and elementwise"
ROUNDING, DECODING, COPIES, OTHER, IDLE = "quantizing inputs", "decoding weights", "copies", "other", "idle"
GROUPS = (PRODUCTS, ATTENTION, ELEMENTWISE, ROUNDING, DECODING, COPIES, OTHER, IDLE)

# The first that is found in a kernel's name, lower case, decides. torch.compile names its kernels after all operators
# that went into them; templates' names hold those of their parts: flash attention's holds cutlass, cutlass' a copy.
KERNELS = (
    (ROUNDING, r"triton_(poi|red|per|mix)_.*_round"),
    (ELEMENTWISE, r"triton_(poi|red|per|mix)_"),
    (ATTENTION, r"flash|fmha|sdpa|attention|attn|quant_[qkv]_|softmax"),
    (DECODING, r"dequant_int4|dequantize_int4_weight|dequant_w4a8|unpack_int4"),
    (PRODUCTS, r"gemm|gemv|matmul|cutlass|wgmma|nvjet|xmma|cublas|splitk|triton_tem|_mma_|conv(olve|olution)|cudnn"),
    (ELEMENTWISE, r"dequant|adaln"),
    (ROUNDING, r"quant|convrot|hadamard"),
    (COPIES, r"memcpy|memset|copy|catarray|fill"),
    (ELEMENTWISE, r"elementwise|layer_?norm|reduce|gelu|silu|pointwise|foreach"),
)

# aten's operators, oneDNN's and what the compiler generates. In these models only rounding uses abs, amax, round, clamp
# and quotients; its zero point is added as anything is.
OPERATORS = (
    (PRODUCTS, r"::((add|_int_|_scaled_)?mm|bmm|baddbmm)$|matmul|linear|convolution|conv2d"),
    (ATTENTION, r"attention|softmax"),
    (ROUNDING, r"::(abs|amax|aminmax|round|clamp|clamp_min|clamp_max|div)_?$|quantize"),
    (COPIES, r"::(copy_|_to_copy|cat|stack|clone|contiguous|fill_|zero_|to)$"),
    (ELEMENTWISE, r"layer_norm|::(add|sub|mul|addcmul|gelu|silu|exp|sin|cos|pow|mean|sum|sqrt|rsqrt|neg|where)_?$"),
    (ELEMENTWISE, r"cpp_fused|compiledfxgraph|torch-compiled region"),
)  # fmt: skip

Rules = Iterable[tuple[str, str]]


def group_of(name: str, rules: Rules) -> str:
    """The group of a kernel's or an operator's name."""
    lower = name.lower()
    return next((group for group, pattern in rules if re.search(pattern, lower)), OTHER)


@torch.no_grad()
def profile_step(function: Callable[[], Any], device: torch.device | str, repeats: int = 3) -> dict[str, float]:
    """Seconds of a call by group, averaged over `repeats` calls: operators' own time on the CPU; kernels' on CUDA, and
    as idle what is left of the time without a profiler. A kernel that normalises and rounds counts as rounding. Empty
    where the profiler sees no kernels.
    """
    device = torch.device(device)
    function()
    names = self_seconds(function, device, repeats)
    if not names:
        return {}
    groups = grouped(names, KERNELS if device.type == "cuda" else OPERATORS)
    if device.type == "cuda":
        groups[IDLE] = max(0.0, wall_seconds(function, device, repeats) - sum(groups.values()))
    return groups


def grouped(names: dict[str, float], rules: Rules) -> dict[str, float]:
    """The sums of each group, in the order of GROUPS."""
    sums: dict[str, float] = {}
    for name, seconds in names.items():
        group = group_of(name, rules)
        sums[group] = sums.get(group, 0.0) + seconds
    return {group: sums[group] for group in GROUPS if group in sums}


def self_seconds(function: Callable[[], Any], device: torch.device, repeats: int) -> dict[str, float]:
    """Seconds of a call in each kernel (CUDA) or operator (CPU), without those it calls."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
        torch.cuda.synchronize(device)
    with profile(activities=activities) as profiler:
        for _ in range(repeats):
            function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    kind = DeviceType.CUDA if device.type == "cuda" else DeviceType.CPU
    names: dict[str, float] = {}
    for event in profiler.key_averages():
        if event.device_type == kind and not event.is_user_annotation:
            spent = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
            names[event.key] = names.get(event.key, 0.0) + spent / 1e6 / repeats
    return names
