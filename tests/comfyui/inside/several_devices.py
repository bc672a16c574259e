"""Core's multi-GPU sampling with our wrappers on the model: ComfyUI's own scheduler, clones and threads, on a CPU.

The second device is the CPU under another name, so that conditions are split over two clones of the model in two
threads, as they are over two GPUs. What a second device alone has, its memory and its own queue, is not there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from cache_tools import CASES, reported
from families import build
from host import Host, main, relative
from recording import latent, loaded, prompts, recording
from sampling import cache_policy

STEPS, CFG, SEED = 12, 2.0, 11
FLUX = CASES["Flux"]
SECOND = torch.device("cpu", 0)
MEETING = 30  # seconds that a call waits for one beside it, until two have met


def made():
    """What the loader of a clone makes, as core's loaders note it on their patchers."""
    patcher = build(FLUX)
    patcher.cached_patcher_init = (made, ())
    return patcher


def over_two_devices(patcher):
    """What core's MultiGPU node does where it finds a second device."""
    both = patcher.clone()
    second = both.deepclone_multigpu(new_load_device=SECOND)
    second.is_multigpu_base_clone = True
    both.set_additional_models("multigpu", [second])
    both.match_multigpu_clones()
    return both


def sample(host: Host, patcher) -> torch.Tensor:
    (out,) = host.nodes.common_ksampler(patcher, SEED, STEPS, CFG, "euler", "simple", *prompts(), latent())
    return out["samples"]


class Threads:
    """APPLY_MODEL: which threads and networks evaluate, at the same time: the first waits for the second."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.networks: set[int] = set()
        self.now = self.most = self.calls = 0
        self.lock, self.met = threading.Lock(), threading.Event()

    def __call__(self, executor, *args, **kwargs):
        with self.lock:
            self.names.add(threading.current_thread().name)
            self.networks.add(id(executor.class_obj))
            self.now, self.calls = self.now + 1, self.calls + 1
            self.most = max(self.most, self.now)
            if self.most > 1:
                self.met.set()
        if not self.met.wait(MEETING):
            self.met.set()  # there is none: the others need not wait as long
        try:
            return executor(*args, **kwargs)
        finally:
            with self.lock:
                self.now -= 1

    def on(self, patcher):
        clone = patcher.clone()
        clone.add_wrapper_with_key("apply_model", "threads", self)
        return clone


def supported() -> bool:
    import importlib.util

    return importlib.util.find_spec("comfy.multigpu") is not None


def on_both(attach: Callable, host: Host) -> dict[str, Any] | None:
    """The same graph on one and on two devices, what is attached before and after the devices are added."""
    if not supported():
        return None
    alone = attach(host, made(), "alone")
    wanted = sample(host, alone.patcher)
    found: dict[str, Any] = {}
    for order in ("attached first", "devices first"):
        threads = Threads()
        if order == "attached first":
            case = attach(host, threads.on(made()), order)
            case.patcher = over_two_devices(case.patcher)
        else:
            case = attach(host, over_two_devices(threads.on(made())), order)
        out = sample(host, case.patcher)
        again = sample(host, case.patcher)
        found[order] = {
            "same": torch.allclose(out, wanted, rtol=1e-4, atol=1e-5), "again": torch.equal(out, again),
            "networks": len(threads.networks), "at once": threads.most, "threads": len(threads.names),
            **case.facts(),
        }  # fmt: skip
    return {"alone": alone.facts(), **found}


def plain(host: Host, patcher, name: str) -> SimpleNamespace:
    return SimpleNamespace(patcher=patcher, facts=dict)


def cache_of(reuse: str) -> Callable:
    def attach(host: Host, patcher, name: str) -> SimpleNamespace:
        fast = host.module("nodes.comfyui.cache.attach").apply_cache(patcher, cache_policy(host, 3, 1, reuse=reuse))
        report = reported(host, fast)
        return SimpleNamespace(
            patcher=fast, facts=lambda: {"timeline": dict(sorted(report.timeline.items())), "warnings": report.warnings}
        )

    return attach


def recorder(host: Host, patcher, name: str) -> SimpleNamespace:
    name = f"devices {name}"

    def facts() -> dict[str, Any]:
        found = loaded(host, name)
        counts = {layer.count for key, layer in found.statistics.items() if key.endswith("img_attn.qkv")}
        return {
            "runs": found.recording.runs, "samples": found.recording.samples, "layers": len(found.statistics),
            "counts": sorted(counts), "finite": all(bool(s.finite()) for s in found.statistics.values()),
            "distances": found.distances.tolist()[0],
        }  # fmt: skip

    return SimpleNamespace(patcher=recording(host, patcher, name), facts=facts)


def both_of(host: Host, patcher, name: str) -> SimpleNamespace:
    """A cache and a recorder on one model."""
    cache = cache_of("whole prediction")(host, patcher, name)
    record = recorder(host, cache.patcher, f"cached {name}")
    return SimpleNamespace(
        patcher=record.patcher, facts=lambda: {"samples": loaded(host, f"devices cached {name}").recording.samples}
    )


def calibrated(host: Host) -> dict[str, Any] | None:
    """TAP Calibrate observes one network, so it samples on one device: the same statistics with two."""
    if not supported():
        return None
    calibrate = host.module("nodes.comfyui.calibrate.run")
    settings = host.module("nodes.comfyui.sampling").Settings(*prompts(), 6, CFG, "euler", "simple")
    plan = calibrate.CalibrationConfig(trajectories=3, batch_size=2, samples=6, selection="random", tokens=100)
    one, two = (calibrate.calibrate(p, settings, latent(1), plan) for p in (made(), over_two_devices(made())))
    counts = [{name: layer.count for name, layer in found.statistics.items()} for found in (one, two)]
    return {"same": counts[0] == counts[1], "layers": len(counts[0])}


def quantized(host: Host) -> dict[str, Any] | None:
    """Quantize before the second device is added, and after: no part of a run is computed in full precision."""
    loads = host.module("nodes.comfyui.quantize.formats").loads
    if not supported() or not loads("W8A8"):
        return None
    quantize = host.module("nodes.comfyui.quantize.native")

    def int8(patcher):
        return quantize.quantize_native(patcher, quantize.NativeSettings("W8A8"))[0]

    alone, full = sample(host, int8(made())), sample(host, made())
    threads, is_packed = Threads(), host.module("nodes.comfyui.quantize.weights").is_packed
    both = over_two_devices(threads.on(int8(made())))
    after = sample(host, both)
    networks = [both.model, *(clone.model for clone in both.get_additional_models_with_key("multigpu"))]
    before = int8(over_two_devices(made()))
    return {
        "after": relative(after, alone), "before": relative(sample(host, before), alone),
        "integers": [is_packed(n.diffusion_model.double_blocks[0].img_attn.qkv.weight) for n in networks],
        "effect": relative(alone, full), "networks": len(threads.networks),
        "left": len(before.get_additional_models_with_key("multigpu")),
    }  # fmt: skip


def interrupted(host: Host) -> dict[str, Any] | None:
    """Cancelled in a thread: nothing is added, nothing is left, and the next run is right."""
    import comfy.model_management as mm

    if not supported():
        return None
    both = over_two_devices(recording(host, made(), "devices interrupted"))
    wanted, calls = sample(host, over_two_devices(made())), [0]

    def cancel(executor, *args, **kwargs):
        calls[0] += 1
        if calls[0] == 7:
            raise mm.InterruptProcessingException()
        return executor(*args, **kwargs)

    stopping = both.clone()
    stopping.add_wrapper_with_key("apply_model", "cancel", cancel)
    ended = ""
    try:
        sample(host, stopping)
    except mm.InterruptProcessingException:
        ended = "interrupted"
    path = host.module("nodes.comfyui.files").named_path("devices interrupted")
    none = not path.exists()
    networks = [both.model, *(clone.model for clone in both.get_additional_models_with_key("multigpu"))]
    hooks = any(part._forward_pre_hooks for network in networks for part in network.modules())
    same = torch.allclose(sample(host, both), wanted, rtol=1e-4, atol=1e-5)
    return {
        "ended": ended,
        "nothing added": none,
        "hooks": hooks,
        "same": same,
        "runs": loaded(host, "devices interrupted").recording.runs,
    }


if __name__ == "__main__":
    main({
        "plain": lambda host: on_both(plain, host),
        "cache of whole prediction": lambda host: on_both(cache_of("whole prediction"), host),
        "cache of blocks": lambda host: on_both(cache_of("blocks"), host),
        "recorder": lambda host: on_both(recorder, host),
        "cache and recorder": lambda host: on_both(both_of, host),
        "calibrated": calibrated,
        "quantized": quantized,
        "interrupted": interrupted,
    })  # fmt: skip
