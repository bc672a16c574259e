"""What Apply Cache costs on a model of DiT-B's size: a wired cache that never reuses, and a reused step.

    OMP_NUM_THREADS=1 taskset -c 0 COMFYUI/.venv/bin/python benchmarks/caching/overhead.py COMFYUI BASE [--seconds 200]
    COMFYUI/.venv/bin/python benchmarks/caching/overhead.py COMFYUI BASE --waits

BASE is a ComfyUI base directory with the pack in custom_nodes. All variants sample at once, each in a thread, and take
turns step by step in random order, so that a pair of steps lies seconds apart; times are those that a thread had of its
processor, which other programs hardly change. A step is also split into the network and all around it: what the cache
adds is around it, where a millisecond is not lost in the noise of the network. `--waits` counts instead, on the fake
device of tests/device, how often a step waits for it (needs a CUDA build of torch and a C++ compiler, no GPU). Each
writes its part of results/caching-overhead.json.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from threading import Semaphore, Thread
from typing import Any

import flow_model
import torch

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "caching-overhead.json"
STEPS, WARM_UP, DRAWS = 400, 3, 2000  # at most so many steps; the first are not counted; bootstrap draws
DIT_B = {
    "dim": 768, "n_heads": 12, "n_kv_heads": 12, "axes_dims": [16, 24, 24], "n_layers": 12, "multiple_of": 256,
    "ffn_dim_multiplier": 0.75, "n_refiner_layers": 1, "axes_lens": [300, 512, 512],
}  # fmt: skip
SIDE, WORDS = 32, 16  # of the latent, with patches of 2; context tokens


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


def sample(patcher, steps: int, latent, positive, negative, callback: Callable[..., Any] | None = None) -> None:
    import comfy.sample

    comfy.sample.sample(
        patcher, torch.randn(latent.shape), steps, 2.0, "euler", "simple", positive, negative, latent,
        disable_pbar=True, seed=0, callback=callback,
    )  # fmt: skip


def variants_of(host, patcher, steps: int) -> dict[str, Any]:
    policies, caching = host.module("qandc_core.caching.policies"), host.module("nodes.comfyui.cache.attach")

    def cached(policy, reuse: str = "whole prediction"):
        return caching.apply_cache(patcher, caching.CacheSettings(policy, reuse))

    return {
        "plain": patcher,
        "never reusing: all steps planned": cached(policies.StepCount(steps, order=1)),
        "never reusing: error budget": cached(policies.ErrorBudget(1e-9, order=1)),
        "reused, order 0": cached(policies.ChosenSteps({0}, order=0)),
        "reused, order 1": cached(policies.ChosenSteps({0, 1}, order=1)),
        "reused, order 2": cached(policies.ChosenSteps({0, 1, 2}, order=2)),
    }


class Network:
    """Seconds in the network since `seconds` was set to zero."""

    def __init__(self, module: torch.nn.Module):
        self.seconds = self.began = 0.0
        module.register_forward_pre_hook(self.before)
        module.register_forward_hook(self.after)

    def before(self, *_: Any) -> None:
        self.began = time.thread_time()

    def after(self, *_: Any) -> None:
        self.seconds += time.thread_time() - self.began


class Ended(Exception):
    pass


class Player:
    """A run in its thread that makes a step when told to."""

    def __init__(self, patcher, network: Network):
        self.go, self.made, self.ends, self.network = Semaphore(0), Semaphore(0), False, network
        self.begun = self.seconds = 0.0
        self.thread = Thread(target=self.play, args=(patcher,), daemon=True)
        self.thread.start()

    def play(self, patcher) -> None:
        self.go.acquire()
        words = torch.randn(1, WORDS, flow_model.CONFIG["cap_feat_dim"])
        with torch.inference_mode(), contextlib.suppress(Ended):
            sample(patcher, STEPS, torch.zeros(1, 16, SIDE, SIDE), [[words, {}]], [[-words, {}]], self.stepped)
        self.made.release()

    def stepped(self, *_: Any) -> None:
        self.seconds = time.thread_time() - self.begun
        self.made.release()
        self.go.acquire()
        if self.ends:
            raise Ended
        self.begun = time.thread_time()

    def step(self) -> tuple[float, float]:
        """Seconds of a step, and those of them around the network."""
        self.network.seconds = 0.0
        self.go.release()
        self.made.acquire()
        return self.seconds, self.seconds - self.network.seconds

    def end(self) -> None:
        self.ends = True
        self.go.release()
        self.thread.join()


def rounds(host, patcher, seconds: float) -> dict[str, list[tuple[float, float]]]:
    network, random_order = Network(patcher.model.diffusion_model), random.Random(0)
    players = {name: Player(variant, network) for name, variant in variants_of(host, patcher, STEPS).items()}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in players}
    begun = time.perf_counter()
    for number in range(STEPS - 1):
        for name in random_order.sample(list(players), len(players)):
            taken = players[name].step()
            if number >= WARM_UP:
                found[name].append(taken)
        if time.perf_counter() - begun > seconds:
            break
    for player in players.values():
        player.end()
    return found


def interval(values: list[float]) -> list[float]:
    """Median, and the 95 % interval of it by bootstrap."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(DRAWS))
    return [float(f"{v:.4g}") for v in (statistics.median(values), medians[DRAWS // 40], medians[-1 - DRAWS // 40])]


def share_memory() -> None:
    """One heap for all threads: with glibc's own for each, the network's speed differs by a sixth between threads."""
    ctypes.CDLL(None).mallopt(-8, 1)  # M_ARENA_MAX


def timed(host, seconds: float) -> dict:
    patcher = patcher_of({**flow_model.CONFIG, **DIT_B})
    found = rounds(host, patcher, seconds)
    plain = found.pop("plain")
    step = statistics.median(whole for whole, _ in plain)

    def added(pairs) -> list[float]:
        return interval([100 * (around - plain_around) / step for (_, around), (_, plain_around) in zip(pairs, plain)])

    def ratio(pairs) -> list[float]:
        return interval([100 * whole / plain_whole for (whole, _), (plain_whole, _) in zip(pairs, plain)])

    return {
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} thread, pinned",
        "model": f"Lumina 2 class, {sum(p.numel() for p in patcher.model.parameters()) / 1e6:.0f} M parameters, "
        f"{(SIDE // 2) ** 2} image tokens, guidance 2, float32",
        "pairs": len(plain),
        "seconds of a plain step": interval([whole for whole, _ in plain]),
        "milliseconds of it around the network": interval([1000 * around for _, around in plain]),
        "percent of a plain step, median and 95 %": {name: ratio(pairs) for name, pairs in found.items()},
        "percent of a plain step added around the network, median and 95 %": {
            name: added(pairs) for name, pairs in found.items() if name.startswith("never")
        },
    }


def waits(checkout: str, base: str) -> dict:
    """Waits of the host for a step, beyond those that a run has once, on the fake device."""
    sys.path.insert(0, str(ROOT / "tests" / "device"))
    import fake

    with fake.device() as device, torch.no_grad():
        import comfy_kitchen
        from host import Host

        host = Host(checkout, base, ("--disable-pinned-memory", "--disable-async-offload"))
        for backend in ("cuda", "triton"):  # comfy-kitchen's own kernels need a real GPU
            comfy_kitchen.disable_backend(backend)
        patcher = host.module("nodes.comfyui.model.dit").load_dit_patcher("demo")
        positive, negative = host.module("nodes.class_label").ClassLabel.execute("3", "none").args
        found = {}
        for name in variants_of(host, patcher, 8):
            counts = []
            for steps in (8, 8, 16):
                variant = variants_of(host, patcher, steps)[name]
                device.waits.clear()
                sample(variant, steps, torch.zeros(1, 3, 32, 32), positive, negative)
                counts.append(sum(device.waits.values()))
            found[name] = (counts[2] - counts[1]) / 8
            print(name, dict(device.waits), file=sys.stderr)
    return {"host waits a step, on a fake device": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("comfyui")
    parser.add_argument("base")
    parser.add_argument("--seconds", type=float, default=200)
    parser.add_argument("--waits", action="store_true")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests" / "comfyui" / "inside"))
    torch.manual_seed(0)
    if args.waits:
        part = waits(args.comfyui, args.base)
    else:
        share_memory()
        from host import Host

        part = timed(Host(args.comfyui, args.base), args.seconds)
    known = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    text = json.dumps({**known, **part}, indent=1)
    RESULTS.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
