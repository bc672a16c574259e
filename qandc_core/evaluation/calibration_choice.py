"""Does it matter which samples calibrate? TAP against random and stratified draws, many draws each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..calibration.candidates import CandidatePool, collect_pool, is_cached_layer
from ..models.dit import DiT
from ..models.layers import named_linears
from ..quantization.model import quantized_layers
from ..sampling.generate import generate
from .metrics import relative_l2, standard_error
from .variants import CalibrationPlan, Variant, Workbench, balanced_labels, block_features, select

METHODS = (
    "random", "stratified", "tap", "tap@5", "tap@20", "tap-blocks@5",
    "random-computed", "stratified-computed", "tap@5-computed", "tap-blocks@5-computed",
)  # fmt: skip
BIASED_METHODS = ("random", "stratified", "tap", "tap@5", "tap-blocks@5", "tap-blocks@5-computed")
FORMATS = (
    Variant("W8A8", bits=(8, 8), interval=3),
    Variant("W4A8 GPTQ", bits=(4, 8), interval=3, rounding="gptq"),
)
TEST_SEED, IMAGE_SEED = 601, 602


@dataclass(frozen=True)
class ChoiceSizes:
    draws: int = 8
    samples: int = 128
    clusters: int = 32
    test_trajectories: int = 8
    images: int = 32


def biased(pool: CandidatePool, share: float = 0.95, seed: int = 0) -> CandidatePool:
    """A pool of at most half the size in which `share` of the samples lie in the last third of the steps."""
    generator = torch.Generator().manual_seed(seed)
    late = pool.steps >= 2 * int(pool.steps.max() + 1) / 3
    count = min(len(pool) // 2, int(late.sum() / share))
    late_count = int(share * count)
    picks = [
        group[torch.randperm(len(group), generator=generator)[:n]]
        for group, n in ((late.nonzero().flatten(), late_count), ((~late).nonzero().flatten(), count - late_count))
    ]
    return pool.subset(torch.cat(picks))


@torch.inference_mode()
def layer_error(full: DiT, quantized: DiT, test: CandidatePool, skip: Any) -> float:
    """Mean over layers of |q(x) - l(x)| / |l(x)| on inputs x of the full-precision layers l, where they run."""
    layers, replaced = dict(named_linears(full, skip)), quantized_layers(quantized)
    error: dict[str, float] = defaultdict(float)
    norm: dict[str, float] = defaultdict(float)

    def compare(name: str, x: Tensor, exact: Tensor) -> None:
        error[name] += float((replaced[name](x) - exact).square().sum())
        norm[name] += float(exact.square().sum())

    handles = [
        layer.register_forward_hook(lambda _, args, out, name=name: compare(name, args[0], out))
        for name, layer in layers.items()
        if is_cached_layer(name)
    ]
    chosen = test.subset(test.computed.nonzero().flatten())
    device = full.pos_embed.device
    for at in range(0, len(chosen), 128):
        part = chosen.subset(torch.arange(at, min(at + 128, len(chosen))))
        full(part.samples.to(device), part.timesteps.to(device), part.labels.to(device))
    for handle in handles:
        handle.remove()
    return sum((error[n] / norm[n]) ** 0.5 for n in norm) / len(norm)


def calibration_choice(bench: Workbench, sizes: ChoiceSizes, log: Callable[[str], None]) -> list[dict[str, Any]]:
    """For each pool, method and format: layer error and relative L2 to the full-precision images, over the draws."""
    base = FORMATS[0]
    plan: CalibrationPlan = replace(bench.plan, samples=sizes.samples, clusters=sizes.clusters)
    classes, config = bench.model.config.num_classes, bench.config(base)
    test = collect_pool(
        bench.cached(base), balanced_labels(sizes.test_trajectories, classes), config, seed=TEST_SEED
    )  # fmt: skip
    labels = balanced_labels(sizes.images, classes)

    def images(model: DiT) -> Tensor:
        return generate(model, labels, config.steps, config.cfg_scale, config.sampler, IMAGE_SEED)[0]

    full = images(bench.model)
    balanced = bench.pool(base)
    results = []
    for pool_name, pool, methods in (
        ("balanced", balanced, METHODS), ("95 % late steps", biased(balanced), BIASED_METHODS)
    ):  # fmt: skip
        blocks = block_features(bench.model, pool)
        for method in methods:
            errors: dict[str, list[tuple[float, float]]] = {v.name: [] for v in FORMATS}
            for draw in range(sizes.draws):
                indices = select(method, pool, plan, draw, blocks)
                calibration = bench.calibrate(FORMATS[-1], pool, indices)
                for variant in FORMATS:
                    model = bench.quantize(variant, calibration)
                    error = layer_error(bench.model, model, test, bench.skip)
                    errors[variant.name].append((error, float(relative_l2(images(model), full).mean())))
            for name, values in errors.items():
                layer, image = torch.tensor(values, dtype=torch.float64).T
                results.append({
                    "pool": pool_name, "method": method, "format": name, "draws": sizes.draws,
                    "layer_error": float(layer.mean()), "layer_error_se": standard_error(layer),
                    "relative_l2": float(image.mean()), "relative_l2_se": standard_error(image),
                })  # fmt: skip
                log(
                    f"{pool_name:16} {method:22} {name:10} layer error {layer.mean():.5f} +- "
                    f"{standard_error(layer):.5f}  relative L2 {image.mean():.4f} +- {standard_error(image):.4f}"
                )
    return results
