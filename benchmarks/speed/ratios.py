"""Speed of each part, as ratios of interleaved runs in one process: machines are noisy, ratios less so."""

from __future__ import annotations

import copy
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qandc_core.caching.attach import apply_cache_to_dit, feature_cache
from qandc_core.fused.dit import fuse_dit
from qandc_core.models import DiT, preset
from qandc_core.models.dit import initialize_weights
from qandc_core.models.layers import DIT_SKIP
from qandc_core.quantization.grids import quantize, weight_grid
from qandc_core.quantization.linear import LinearFormat, QuantizedLinear
from qandc_core.quantization.matmul import pick_backend
from qandc_core.quantization.model import linear_weight_bytes, quantize_model
from qandc_core.sampling.clock import Stopwatch
from qandc_core.sampling.generate import generate

SHAPES = ((768, 2304), (768, 768), (768, 3072), (3072, 768))


def interleaved(functions: Mapping[str, Callable[[], Any]], repeats: int = 15) -> dict[str, list[float]]:
    """Seconds of every function, called in turn so that a slow spell hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for round in range(repeats + 2):
        for name, function in functions.items():
            watch = Stopwatch(device)
            function()
            taken = watch.seconds()
            if round >= 2:
                seconds[name].append(taken)
    return seconds


def ratio(seconds: dict[str, list[float]], part: str, whole: str) -> dict[str, float]:
    """Median of the paired ratios part / whole, with their quartiles."""
    values = [a / b for a, b in zip(seconds[part], seconds[whole])]
    low, middle, high = statistics.quantiles(values, n=4)
    return {"ratio": middle, "low": low, "high": high}


def dit_b4(device: str) -> tuple[DiT, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    model = DiT(preset("DiT-B/4"), device=device).eval()
    initialize_weights(model)
    blocks: Any = model.blocks
    for block in blocks:
        nn.init.normal_(block.adaLN_modulation[1].weight, std=0.02)
    x = torch.randn(4, 4, 32, 32, device=device)
    return model, x, torch.full((4,), 500, device=device), torch.arange(4, device=device)


@torch.inference_mode()
def bench_cache(device: str) -> dict[str, Any]:
    """Cost of a cached step, and of the cache that never reuses, against the plain DiT-B/4 at batch 4."""
    plain, x, t, y = dit_b4(device)
    fora, blocks, idle = (copy.deepcopy(plain) for _ in range(3))
    apply_cache_to_dit(fora, 10**6)
    apply_cache_to_dit(blocks, 10**6, reuse="block")
    apply_cache_to_dit(idle, 1)
    clock = {"t": 999.0}

    def falling(model: DiT) -> Callable[[], Tensor]:
        def call() -> Tensor:
            clock["t"] -= 0.01  # every call is a new step of the same run
            return model(x, torch.full((4,), clock["t"], device=device), y)

        return call

    for model in (fora, blocks):
        model(x, torch.full((4,), 999.5, device=device), y)
    seconds = interleaved({
        "plain": lambda: plain(x, t, y), "fora": falling(fora), "blocks": falling(blocks), "idle": falling(idle),
    }, repeats=25)  # fmt: skip
    for model in (fora, blocks):
        cache = feature_cache(model)
        assert cache is not None and cache.run.reusing
    return {
        "full_step_seconds": statistics.median(seconds["plain"]),
        "cached_step_fora": ratio(seconds, "fora", "plain"),
        "cached_step_blocks": ratio(seconds, "blocks", "plain"),
        "machinery_at_interval_1": ratio(seconds, "idle", "plain"),
    }


@torch.inference_mode()
def bench_linear(device: str) -> dict[str, Any]:
    """Quantized linear, activations quantized on the fly, against F.linear in float32 at DiT-B shapes, 1024 tokens."""
    results: dict[str, Any] = {"backend": pick_backend(torch.device(device))}
    for width, out in SHAPES:
        x, linear = torch.randn(1024, width, device=device), nn.Linear(width, out, device=device)
        functions: dict[str, Callable[[], Any]] = {"fp32": partial(F.linear, x, linear.weight, linear.bias)}
        for label, format in (("W8A8", LinearFormat()), ("W4A8", LinearFormat(4, 8))):
            grid = weight_grid(linear.weight, format.w_bits, True)
            codes = quantize(linear.weight, grid)
            layer = QuantizedLinear.from_codes(linear, codes, grid, format, None, "auto")
            functions[label] = partial(layer, x)
        seconds = interleaved(functions)
        results[f"{width}x{out}"] = {
            "fp32_ms": 1e3 * statistics.median(seconds["fp32"]),
            **{f"{name}_speedup": ratio(seconds, "fp32", name) for name in ("W8A8", "W4A8")},
        }
    return results


@torch.inference_mode()
def bench_model(device: str) -> dict[str, Any]:
    """A whole DiT-B/4 step at batch 4, and the bytes of its quantized linear weights."""
    plain, x, t, y = dit_b4(device)
    quantized = {f"W{w}A8": quantize_model(copy.deepcopy(plain), w, 8, DIT_SKIP) for w in (8, 4)}
    functions = {name: partial(model, x, t, y) for name, model in ({"plain": plain} | quantized).items()}
    seconds = interleaved(functions)
    skipped = linear_weight_bytes(plain) - sum(
        4 * layer.in_features * layer.out_features
        for layer in quantized["W8A8"].modules() if isinstance(layer, QuantizedLinear)
    )  # fmt: skip
    full = linear_weight_bytes(plain) - skipped
    return {
        name: {
            "speedup": ratio(seconds, "plain", name),
            "weight_bytes_ratio": (linear_weight_bytes(model) - skipped) / full,
        }
        for name, model in quantized.items()
    }


def bench_fused(device: str) -> dict[str, Any]:
    """Runs of the built-in model, 50 steps, 8 images: each as its loop does them, and made ready by fuse_dit."""
    from qandc_core.checkpoints import load_dit

    def rounded() -> Any:
        return quantize_model(load_dit("demo", device=device), 8, 8, DIT_SKIP)

    def plain() -> Any:
        return load_dit("demo", device=device)

    runs: dict[str, Callable[[], Any]] = {}
    for name, make, interval in (("float32", plain, 1), ("float32, FORA, N = 3", plain, 3), ("W8A8", rounded, 1),
                                 ("W8A8, FORA, N = 3", rounded, 3)):  # fmt: skip
        for kind, model in (("", make()), (", fused", fuse_dit(make()))):
            cached: Any = apply_cache_to_dit(model, interval)
            runs[name + kind] = partial(generate, cached, list(range(8)), 50, 1.5, "ddim")
    seconds = interleaved(runs, repeats=7)
    return {
        name: {"seconds": statistics.median(seconds[name]), "speedup": ratio(seconds, name, f"{name}, fused")}
        for name in runs
        if not name.endswith("fused")
    }


def bench_import() -> dict[str, float]:
    """Seconds to import qandc_core beyond torch, in fresh processes."""

    def seconds(statement: str) -> float:
        script = f"import time, torch\nstart = time.perf_counter()\n{statement}\nprint(time.perf_counter() - start)"
        return float(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)

    return {"seconds": statistics.median(seconds("import qandc_core") for _ in range(5))}


def bench_end_to_end(device: str) -> dict[str, Any]:
    """The built-in model, 50 steps: full precision, Q&C, its parts, and fewer steps, interleaved."""
    from qandc_core.checkpoints import load_dit
    from qandc_core.evaluation.demo import DEMO_CALIBRATION, DEMO_SAMPLING, RECOMMENDED
    from qandc_core.evaluation.experiment import measure_time
    from qandc_core.evaluation.variants import Variant, Workbench

    bench = Workbench(load_dit("demo", device=device), DEMO_SAMPLING, DEMO_CALIBRATION)
    variants = [
        Variant("full precision"),
        Variant("quantization only, static", bits=(8, 8)),
        Variant("quantization only, dynamic", bits=(8, 8), static=False),
        Variant("cache only, N = 3", interval=3),
        RECOMMENDED,
    ]
    variants = [replace(variant, sampler=DEMO_SAMPLING.sampler) for variant in variants]
    timing = measure_time(bench, variants, batch=32, repeats=3)
    fewer = max(1, round(DEMO_SAMPLING.steps / timing[RECOMMENDED.name]["speedup"]))
    short = replace(variants[0], name=f"full precision, {fewer} steps", steps=fewer)
    timing[short.name] = measure_time(bench, [variants[0], short], batch=32, repeats=3)[short.name]
    return timing
