"""Forecasting the last block's feature against forecasting the prediction, at equal computed steps.

    COMFYUI/.venv/bin/python benchmarks/caching/feature_forecasts.py COMFYUI BASE FLOW

BASE is a ComfyUI base directory with the pack in custom_nodes, FLOW flow_model.safetensors. A feature is what the last
block returns, as in Spectrum (arXiv 2603.01623), or what all blocks add to their stream; the layers after it see the
present input either way. A forecast is the pack's of order 1, or Spectrum's: a ridge regression (0.1) of Chebyshev
polynomials up to degree 4 over all computed steps, blended half and half with the line through the last two. Writes
results/caching-features.json and .md.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

import fidelity
import torch

RESULTS = Path(__file__).parents[1] / "results"
IMAGES, DEGREE, RIDGE = 6, 4, 0.1
KINDS = {"prediction": "whole prediction", "sum of the blocks": "blocks", "last block": "blocks"}
FORECASTS = {"order 1": 1, "Chebyshev": 1}
SHARES = (1.5, 2, 3)


def chebyshev_weights(known: list[float], at: float, total: int) -> torch.Tensor:
    """Coefficients of the values at the known steps in the blended regression at step `at`."""

    def basis(steps) -> torch.Tensor:
        angle = torch.acos((2 * torch.tensor(steps, dtype=torch.float64) / max(total - 1, 1) - 1).clamp(-1, 1))
        return torch.cos(angle[:, None] * torch.arange(DEGREE + 1))

    fitted = basis(known)
    inverse = torch.linalg.inv(fitted.T @ fitted + RIDGE * torch.eye(DEGREE + 1, dtype=torch.float64))
    weights = 0.5 * (basis([at]) @ inverse @ fitted.T)[0]
    along = (at - known[-2]) / (known[-1] - known[-2])
    weights[-2] += 0.5 * (1 - along)
    weights[-1] += 0.5 * along
    return weights


def keep_all(features, total: int) -> tuple:
    """Makes every cache forecast by the regression; returns what it was before."""
    cache = features.FeatureCache
    before = cache.store, cache.forecast

    def store(self, branch, value):
        run = self.run
        for condition, part in zip(run.conditions, value.chunk(max(len(run.conditions), 1))):
            run.features.setdefault((condition, branch), []).append((run.position, part))

    def forecast(self, condition, branch):
        history = self.run.features[condition, branch]
        if len(history) < 2:
            return history[-1][1]
        weights = chebyshev_weights([at for at, _ in history], self.run.position, total)
        return sum(weight * value for weight, (_, value) in zip(weights.float(), history))

    cache.store, cache.forecast = store, forecast
    return before


def keep_last(blocks) -> tuple:
    """Makes the block cache keep what the last block returned instead of what all add."""
    call = blocks.BlockCall
    before = call.accumulate, call.moved

    def accumulate(self, part, streams, after):
        self.sums[part] = [None if value is None else value.float() for value in after]

    call.accumulate = accumulate
    call.moved = lambda self, name, stream: stream if stream is None else self.cache.recall(name).to(stream.dtype)
    return before


def main() -> None:
    checkout, base, weights = sys.argv[1:4]
    sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "comfyui" / "inside"))
    from host import Host

    host = Host(checkout, base)
    fidelity.IMAGES = IMAGES
    features, blocks = host.module("qandc_core.caching.features"), host.module("qandc_core.caching.blocks")
    rows = []
    with torch.inference_mode():
        for name, subject in {
            "built-in, ddim, 50 steps": fidelity.built_in(host, "ddim"),
            "flow, euler, 50 steps": fidelity.flow(host, weights, "euler", 50),
            "flow, dpmpp_2m, 30 steps": fidelity.flow(host, weights, "dpmpp_2m", 30),
        }.items():
            full = subject.images(subject.patcher, 0)[0]
            for kind, reuse in KINDS.items():
                for forecast, order in FORECASTS.items():
                    for share in SHARES:
                        count = int(subject.steps / share)
                        saved = features.FeatureCache.store, features.FeatureCache.forecast
                        added = blocks.BlockCall.accumulate, blocks.BlockCall.moved
                        if forecast == "Chebyshev":
                            keep_all(features, subject.steps)
                        if kind == "last block":
                            keep_last(blocks)
                        made = fidelity.ours(host, subject.patcher, reuse, order, num_computed=count)
                        images = subject.images(made, 0)[0]
                        features.FeatureCache.store, features.FeatureCache.forecast = saved
                        blocks.BlockCall.accumulate, blocks.BlockCall.moved = added
                        found = fidelity.relative_l2(images, full)
                        row = {"subject": name, "kept": kind, "forecast": forecast, "computed": count}
                        rows.append({**row, "errors": found})
                        print(name, kind, forecast, count, statistics.mean(found), file=sys.stderr, flush=True)
    (RESULTS / "caching-features.json").write_text(json.dumps(rows, indent=0) + "\n", encoding="utf-8")
    (RESULTS / "caching-features.md").write_text(report(rows), encoding="utf-8")


def report(rows: list[dict]) -> str:
    lines = [
        "# What to forecast", "",
        f"Relative L2 to the full run, mean and standard error over {IMAGES} images with their own noise,",
        "the same computed steps for all (the default spacing). Made by `benchmarks/caching/feature_forecasts.py`.",
        "",
    ]  # fmt: skip
    for subject in dict.fromkeys(row["subject"] for row in rows):
        own = [row for row in rows if row["subject"] == subject]
        counts = sorted({row["computed"] for row in own}, reverse=True)
        lines += [f"## {subject}", "", "| kept | forecast | " + " | ".join(f"{n} computed" for n in counts) + " |"]
        lines.append("|---|---|" + "---|" * len(counts))
        for kept, forecast in dict.fromkeys((row["kept"], row["forecast"]) for row in own):
            cells = [
                next(r["errors"] for r in own if (r["kept"], r["forecast"], r["computed"]) == (kept, forecast, n))
                for n in counts
            ]
            texts = (f"{statistics.mean(c):.5f} +- {statistics.stdev(c) / len(c) ** 0.5:.5f}" for c in cells)
            lines.append(f"| {kept} | {forecast} | " + " | ".join(texts) + " |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
