"""What a run of Apply Cache keeps and reports, on real model classes: memory, out of memory, times and budgets."""

from __future__ import annotations

from collections.abc import Callable

import torch
from cache_tools import (
    CASES,
    REUSE,
    STEPS,
    Watch,
    cached,
    computed_steps,
    patcher_of,
    sample,
)
from easycache import in_bfloat16, logged
from families import empty_latent
from host import Host, main

BUDGETS = (0.01, 0.1, 1.0)


def in_half(patcher):
    """In bfloat16, but for Wan's first layer, which stays in float32 in every precision."""
    network = in_bfloat16(patcher).model.diffusion_model
    if "Wan" in type(network).__name__:
        network.patch_embedding.float()
    return patcher


def kept(host: Host, name: str, reuse: str, order: int, offload: bool, half: bool = False) -> dict:
    """What a run keeps: its reported bytes, those at the peak, and what the tensors are."""
    patcher = patcher_of(name)
    watch = Watch(in_half(patcher) if half else patcher, name)
    fast, report = cached(host, watch.patcher, reuse, order=order, offload=offload)
    out = sample(fast, CASES[name])
    tensors = [tensor for call in watch.calls for tensor in call.features]
    return {
        "samples": out,
        "reported": report.cache_bytes,
        "peak": max(sum(tensor.nbytes for tensor in call.features) for call in watch.calls),
        "latent": empty_latent(CASES[name]).numel() * 4,
        "dtypes": sorted({str(tensor.dtype) for tensor in tensors}),
        "devices": sorted({str(tensor.device) for tensor in tensors}),
        "finite": bool(out.isfinite().all()),
        "reuse": report.reuse,
        "warnings": report.warnings,
    }


def memory(host: Host, name: str, reuse: str) -> dict[str, dict]:
    """By order; `offloaded` says whether features in main memory give the same image."""
    found = {}
    for order in (0, 1):
        run = kept(host, name, reuse, order, offload=False)
        other = kept(host, name, reuse, order, offload=True)
        same = torch.equal(run.pop("samples"), other.pop("samples"))
        found[f"order {order}"] = {**run, "offloaded": [same, other["devices"], other["reported"]]}
    half = kept(host, name, reuse, 0, offload=False, half=True)
    del half["samples"]
    return {**found, "bfloat16": half}


def out_of_memory(host: Host, name: str, reuse: str) -> dict[str, dict]:
    """A network that runs out of memory once, at a step: how the run goes on, or ends."""
    import comfy.model_management

    error, found = comfy.model_management.OOM_EXCEPTION, {}
    for step in (0, 3, 4):
        watch = Watch(patcher_of(name), name)
        fast, report = cached(host, watch.patcher, reuse)
        at, raised = [0], []

        def fail(*_, at=at, raised=raised, step=step):
            if at[0] == step and not raised:
                raised.append(step)
                raise error("out of memory")

        watch.patcher.model.diffusion_model.register_forward_pre_hook(fail)
        try:
            out = sample(fast, CASES[name], callback=lambda i, *_, at=at: at.__setitem__(0, i + 1))
            ended = "" if out.isfinite().all() else "not finite"
        except error:
            ended = "raised"
        found[f"step {step}"] = {
            "raised": raised, "ended": ended, "timeline": report.timeline, "recorded": watch.timeline(),
            "warnings": report.warnings,
        }  # fmt: skip
    return found


def report_of(host: Host, name: str, reuse: str, **choices) -> dict:
    """What a run says of itself, and what was recorded of it."""
    watch = Watch(patcher_of(name), name)
    fast, report = cached(host, watch.patcher, reuse, **choices)
    with logged(lines := []):
        out = sample(fast, CASES[name])
    return {
        "reuse": report.reuse, "timeline": report.timeline, "recorded": watch.timeline(), "warnings": report.warnings,
        "speedup": report.cache_speedup, "computed": computed_steps(report), "finite": bool(out.isfinite().all()),
        "log": [line for line in lines if line.startswith("Q&C cache")],
    }  # fmt: skip


def budgets(host: Host, name: str, reuse: str) -> dict[str, list]:
    """Computed steps at growing budgets, and with fewer reused in a row."""
    runs = {str(budget): {"max_error": budget} for budget in BUDGETS}
    runs["one in a row"] = {"max_error": BUDGETS[-1], "max_reused": 1}
    return {kind: report_of(host, name, reuse, **choices)["computed"] for kind, choices in runs.items()}


def everywhere(run: Callable, kinds: tuple[str, ...] = REUSE) -> Callable:
    return lambda host: {f"{name}, {reuse}": run(host, name, reuse) for name in CASES for reuse in kinds}


if __name__ == "__main__":
    main({
        "memory": everywhere(memory),
        "out of memory": everywhere(out_of_memory),
        "held": everywhere(report_of),
        "forecast": everywhere(lambda *where: report_of(*where, order=1)),
        "no reuse": everywhere(lambda *where: report_of(*where, num_computed=STEPS)),
        "attention and MLP": everywhere(report_of, ("attention and MLP",)),
        "automatic": everywhere(report_of, ("automatic",)),
        "speedup 2": everywhere(lambda *where: report_of(*where, speedup=2.0)),
        "budgets": everywhere(budgets),
    })  # fmt: skip
