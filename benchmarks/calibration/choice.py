"""Does it matter which samples calibrate? TAP against random and stratified draws, many draws each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qandc_core.caching.attach import cache_bypassed
from qandc_core.calibration.choice import CalibrationConfig
from qandc_core.calibration.file import Calibration, fingerprint
from qandc_core.calibration.selection import random_select, stratified_select
from qandc_core.calibration.statistics import observed
from qandc_core.calibration.tap import tap_select
from qandc_core.evaluation.metrics import relative_l2, standard_error
from qandc_core.evaluation.variants import Variant, Workbench, balanced_labels
from qandc_core.models.dit import DiT
from qandc_core.models.layers import named_linears
from qandc_core.quantization.model import quantized_layers
from qandc_core.sampling.generate import generate

from .pool import CandidatePool, collect_pool, collect_statistics, is_cached_layer

SELECTIONS = ("random", "stratified", "tap", "tap-blocks")
METHODS = (
    "random", "stratified", "tap", "tap@5", "tap@20", "tap-blocks@5",
    "random-computed", "stratified-computed", "tap@5-computed", "tap-blocks@5-computed",
)  # fmt: skip
BIASED_METHODS = ("random", "stratified", "tap", "tap@5", "tap-blocks@5", "tap-blocks@5-computed")
FORMATS = (
    Variant("W8A8", bits=(8, 8), interval=3),
    Variant("W4A8 GPTQ", bits=(4, 8), interval=3, rounding="gptq"),
)
POOL_SEED, TEST_SEED, IMAGE_SEED = 501, 601, 602


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


def block_features(model: DiT, pool: CandidatePool, batch: int = 128) -> Tensor:
    """Token means of the input of every block's attention (N, depth * width): what the layers see, not the pixels."""
    blocks: Any = model.blocks
    seen: list[Tensor] = []
    means = []
    layers = [(f"blocks.{i}.attn.qkv", block.attn.qkv) for i, block in enumerate(blocks)]
    with torch.inference_mode(), cache_bypassed(model), observed(layers, lambda _, x: seen.append(x.mean(1))):
        for at in range(0, len(pool), batch):
            part = pool.subset(torch.arange(at, min(at + batch, len(pool))))
            device = model.pos_embed.device
            model(part.samples.to(device, model.pos_embed.dtype), part.timesteps.to(device), part.labels.to(device))
            means.append(torch.cat(seen, dim=1).float().cpu())
            seen.clear()
    features = torch.cat(means)
    return (features - features.mean(0)) / features.std(0).clamp(min=1e-6)


def split_selection(method: str) -> tuple[str, float]:
    """Kind and TAP time scale of a method that select() takes; ValueError for any other."""
    kind, at, scale = method.removesuffix("-computed").partition("@")
    try:
        number = float(scale) if at else 1.0
    except ValueError:
        number = 0.0
    if kind not in SELECTIONS or not 0 < number < float("inf") or (at and not kind.startswith("tap")):
        raise ValueError(
            f"selection must be one of {', '.join(SELECTIONS)}, for tap with @ and a time scale in steps, with "
            f"-computed at the end for computed steps only (tap@5-computed, say); got {method!r}."
        )
    return kind, number


def select(
    method: str, pool: CandidatePool, config: CalibrationConfig, seed: int = 0, blocks: Tensor | None = None
) -> Tensor:
    """Indices into the pool: random, stratified, tap, or tap-blocks, which clusters the block features `blocks`.

    "@s" sets TAP's time scale to s steps; "-computed" restricts any method to the steps that the cache computes.
    """
    if method.endswith("-computed"):
        kept = pool.computed.nonzero().flatten()
        part = None if blocks is None else blocks[kept]
        return kept[select(method.removesuffix("-computed"), pool.subset(kept), config, seed, part)]
    kind, scale = split_selection(method)
    if kind == "random":
        return random_select(len(pool), config.samples, seed)
    if kind == "stratified":
        return stratified_select(pool.steps, config.samples, seed)
    features = {"tap": pool.features, "tap-blocks": blocks}[kind]
    assert features is not None
    return tap_select(features, pool.steps, config.samples, config.clusters, time_scale=scale, seed=seed).indices


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
    settings = replace(bench.calibration_config, samples=sizes.samples, clusters=sizes.clusters)
    classes, config = bench.model.config.num_classes, bench.config(base)
    test = collect_pool(
        bench.cached(base), balanced_labels(sizes.test_trajectories, classes), config, seed=TEST_SEED
    )  # fmt: skip
    labels = balanced_labels(sizes.images, classes)

    def images(model: DiT) -> Tensor:
        return generate(model, labels, config.steps, config.cfg_scale, config.sampler, IMAGE_SEED)[0]

    full = images(bench.model)
    pooled = balanced_labels(settings.trajectories, classes)
    balanced = collect_pool(
        bench.cached(base), pooled, config, batch_size=settings.batch_size, seed=POOL_SEED
    )  # fmt: skip
    results = []
    for pool_name, pool, methods in (
        ("balanced", balanced, METHODS), ("95 % late steps", biased(balanced), BIASED_METHODS)
    ):  # fmt: skip
        blocks = block_features(bench.model, pool)
        for method in methods:
            errors: dict[str, list[tuple[float, float]]] = {v.name: [] for v in FORMATS}
            for draw in range(sizes.draws):
                chosen = pool.subset(select(method, pool, settings, draw, blocks))
                statistics = collect_statistics(
                    bench.cached(base), chosen, cfg_scale=config.cfg_scale, skip_patterns=bench.skip, hessians=True
                )
                calibration = Calibration(fingerprint(bench.model), statistics)
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


def choice_table(results: list[dict[str, Any]]) -> str:
    lines = [
        "| pool | method | format | layer error | relative L2 |",
        "|---|---|---|---|---|",
    ]
    for r in results:
        lines.append(
            f"| {r['pool']} | {r['method']} | {r['format']} | {r['layer_error']:.5f} +- {r['layer_error_se']:.5f} "
            f"| {r['relative_l2']:.4f} +- {r['relative_l2_se']:.4f} |"
        )
    return "\n".join(lines)


def markdown(result: dict[str, Any]) -> str:
    hardware, rows = result["hardware"], result["rows"]
    parts = [
        "# Which samples calibrate",
        f"`{result['command']}`",
        f"{hardware['device']}, {hardware['threads']} threads, torch {hardware['torch']}. Built-in model, "
        f"ddpm 50 steps, guidance 2; {rows[0]['draws']} draws each, standard errors over draws.",
        *([result["note"]] if "note" in result else []),
        choice_table(rows),
    ]
    return "\n\n".join(parts) + "\n"
