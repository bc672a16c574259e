"""What Apply Cache costs: a wired cache that never reuses, and a reused step, against plain steps of the same run.

    COMFYUI/.venv/bin/python benchmarks/caching/overhead.py COMFYUI BASE

BASE is a ComfyUI base directory with the pack in custom_nodes. Prints what is in results/caching-overhead.json.
"""

from __future__ import annotations

import json
import platform
import random
import statistics
import sys
import time
from pathlib import Path

import flow_model
import torch

STEPS, ROUNDS = 8, 6
WIDE = {"dim": 768, "n_heads": 12, "n_kv_heads": 12, "axes_dims": [16, 24, 24], "n_layers": 8, "n_refiner_layers": 1}


def patcher_of(config: dict):
    import comfy.model_patcher
    import comfy.supported_models

    made = comfy.supported_models.Lumina2(config)
    made.set_inference_dtype(torch.float32, None)
    model = made.get_model({}, "")
    for parameter in model.diffusion_model.parameters():
        torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, cpu, cpu)


def step_time(patcher) -> float:
    """Seconds of the fastest step after the first, from callback to callback: others only add noise."""
    import comfy.sample

    ends: list[float] = []
    latent = torch.zeros(1, 16, 32, 32)
    condition = [[torch.randn(1, 16, flow_model.CONFIG["cap_feat_dim"]), {}]]
    comfy.sample.sample(
        patcher, torch.randn(latent.shape), STEPS, 2.0, "euler", "simple", condition, condition, latent,
        disable_pbar=True, seed=0, callback=lambda *_: ends.append(time.perf_counter()),
    )  # fmt: skip
    return min(after - before for before, after in zip(ends, ends[1:]))


def main() -> None:
    checkout, base = sys.argv[1:3]
    sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "comfyui" / "inside"))
    from host import Host

    host = Host(checkout, base)
    patcher = patcher_of({**flow_model.CONFIG, **WIDE})
    policies = host.module("qandc_core.caching.policies")
    caching = host.module("nodes.comfyui.cache.attach")

    def cached(reuse: str, kind: str, *values):
        policy = getattr(policies, kind)(*values, order=1)
        return caching.apply_cache(patcher, caching.CacheSettings(policy, reuse))

    variants = {
        "plain": patcher,
        "all steps planned": cached("whole prediction", "StepCount", STEPS),
        "error budget never met": cached("whole prediction", "ErrorBudget", 1e-9),
        "error budget never met, blocks": cached("blocks", "ErrorBudget", 1e-9),
        "reused, whole prediction": cached("whole prediction", "ChosenSteps", {0}),
        "reused, blocks": cached("blocks", "ChosenSteps", {0}),
    }
    times: dict[str, list[float]] = {name: [] for name in variants}
    with torch.inference_mode():
        step_time(patcher)
        for _ in range(ROUNDS):
            for name, variant in random.sample(list(variants.items()), len(variants)):
                times[name].append(step_time(variant))
    ratios = {
        name: sorted(part / plain for part, plain in zip(values, times["plain"])) for name, values in times.items()
    }
    result = {
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "model": f"Lumina 2 class, {sum(p.numel() for p in patcher.model.parameters()) / 1e6:.0f} M parameters, "
        "256 image tokens, guidance 2",
        "seconds of a plain step": statistics.median(times["plain"]),
        "ratio to plain, median and range": {
            name: [statistics.median(values), values[0], values[-1]] for name, values in ratios.items()
        },
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
