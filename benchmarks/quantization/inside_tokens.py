"""Held-out errors of W4A8 layers by how much of their inputs GPTQ knows: one model and seed of
`python -m benchmarks.quantization.tokens`, in ComfyUI's Python; prints JSON.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from host import Host
from subjects import INTERVAL, SAMPLES, Study, over_seeds

TOKENS = (64, 128, 256, 512, 1024, 2048, 4096)
NUMBERS = (8, 32, 128, 256)
SEED = 700


def keep_both(host: Host) -> None:
    """Makes calibration keep rows of every layer beside X^T X, so that one calibration serves all numbers of rows."""
    module = host.module("qandc_core.calibration.run")
    plan = host.module("qandc_core.calibration.memory").StatisticsPlan

    class Both(plan):
        def hessian(self, width: int) -> bool:
            return True

        def inputs(self, width: int) -> int:
            return self.tokens

    module.plan_statistics = lambda widths, budget, tokens, held_out: Both(tokens, held_out, 0)


def with_rows(statistics: dict[str, Any], tokens: int, seed: int) -> dict[str, Any]:
    """Statistics that know only so many of the kept rows, drawn at random."""

    def drawn(rows: torch.Tensor) -> torch.Tensor:
        return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:tokens]]

    return {name: replace(layer, hessian=None, inputs=drawn(layer.inputs)) for name, layer in statistics.items()}


def errors(study: Study, calibration, rounding: str = "gptq") -> dict[str, float]:
    """Mean held-out errors of all layers in W4A8, and of those of the largest width."""
    native, network = study.host.module("qandc_core.quantization.native"), study.subject.patcher.model.diffusion_model
    config = native.NativeConfig("W4A8", rounding, bias_correction=True)
    found, widths = {}, {}
    for name, statistics in study.judged(calibration).statistics.items():
        layer = network.get_submodule(name)
        found[name] = native.quantize_weight(name, layer.weight, layer.bias, config, statistics).error
        widths[name] = layer.in_features
    widest = max(widths.values())
    groups = {"all layers": list(found), f"width {widest}": [name for name in found if widths[name] == widest]}
    means = {group: sum(found[name] for name in names) / len(names) for group, names in groups.items()}
    return means if len(set(widths.values())) > 1 else {"all layers": means["all layers"]}


def measured(study: Study, seed: int) -> Iterator[tuple[str, Any, dict[str, float]]]:
    """Every number of samples, and of the usual number every number of inputs."""
    for samples in NUMBERS:
        calibration = study.calibration(study.cached, seed, samples=samples)
        whole = errors(study, calibration)
        yield "samples", samples, whole
        if samples != SAMPLES:
            continue
        yield "tokens", "nearest", errors(study, calibration, "nearest")
        for tokens in TOKENS:
            known = with_rows(calibration.statistics, tokens, seed)
            yield "tokens", tokens, errors(study, replace(calibration, statistics=known))
        yield "tokens", "X^T X", whole


def rows(study: Study, seed: int) -> list[dict[str, Any]]:
    keep_both(study.host)
    found = []
    for kind, value, error in measured(study, SEED + 10 * seed):
        found.append({"kind": kind, "value": value, "errors": error})
        print(found[-1], file=sys.stderr, flush=True)
    return found


if __name__ == "__main__":
    over_seeds(rows, {"interval": INTERVAL, "samples": SAMPLES})
