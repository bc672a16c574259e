"""Runs ComfyUI with the pack on the fake device: a program for ComfyUI's own Python, with a CUDA build of torch.

argv: checkout, base directory, mode. "half" is what ComfyUI chooses for this device, "low" leaves nearly all weights on
the host as where the model does not fit. Prints one JSON object: check -> value.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "comfyui" / "inside")]
import fake  # noqa: E402
import host  # noqa: E402

COMMON = ("--disable-pinned-memory", "--disable-async-offload")
FLAGS = {"half": COMMON, "low": ("--force-fp32", *COMMON)}
STEPS = 4


def kernels_of_torch() -> None:
    """comfy-kitchen's own kernels need a real GPU."""
    import comfy_kitchen

    for backend in ("cuda", "triton"):
        comfy_kitchen.disable_backend(backend)


def short_of_memory() -> None:
    import comfy.model_management as mm

    mm.get_free_memory = lambda dev=None, torch_free_too=False: (2**20, 2**20) if torch_free_too else 2**20
    mm.minimum_inference_memory = lambda: 0
    mm.vram_state = mm.set_vram_to = mm.VRAMState.LOW_VRAM


def main() -> None:
    checkout, base, mode = sys.argv[1:]
    with fake.device() as device:
        h = host.Host(checkout, base, FLAGS[mode])
        kernels_of_torch()
        if mode == "low":
            short_of_memory()
        print("RESULTS " + json.dumps(checks(h, device)))


def checks(h: host.Host, device: fake.FakeDevice) -> dict:
    import comfy.model_management as mm

    node = h.node
    positive, negative = node("QandC_ClassLabel").execute("0,3", "none").args
    (latent,) = h.nodes.EmptyLatentImage().generate(32, 32, 2)

    def sample(model, steps=STEPS):
        out, _ = node("QandC_Sample").execute(
            model, positive=positive, negative=negative, latent_image=latent, seed=7, steps=steps, cfg=1.5,
            sampler_name="euler", scheduler="normal", denoise=1.0, label="",
        ).args  # fmt: skip
        return out["samples"]

    def waits_for_a_prediction(model):
        """Beyond those that a run has once; by kind and place on stderr."""
        counts = []
        for steps in (STEPS, 2 * STEPS):
            device.waits.clear()
            sample(model, steps)
            counts.append(sum(device.waits.values()))
        print(dict(device.waits), file=sys.stderr)
        return (counts[1] - counts[0]) / STEPS

    plain = node("QandC_LoadDiT").execute("built-in demo", "auto", "auto").args[0]
    cached = node("QandC_ApplyCache").execute(plain, {"policy": "interval", "interval": 2}, 1).args[0]
    x = sample(plain)
    found = {"device": str(mm.get_torch_device()), "finite": bool(x.isfinite().all())}
    found["waits"] = {"plain": waits_for_a_prediction(plain), "cached": waits_for_a_prediction(cached)}
    found["offloaded"] = offloaded(node, sample, plain)
    for method in ("paper", "native"):
        quantized = node("QandC_Quantize").execute(plain, "W8A8", method, 0.3, 0, "", "bake in", "auto").args[0]
        found[method] = host.relative(sample(quantized).cpu(), x.cpu())
    return found


def offloaded(node, sample, plain) -> dict:
    """Where a run keeps its features with the node's offload off and on, and how far the second image is away."""
    images, found = [], {}
    for offload in (False, True):
        devices = set()

        def look(
            executor, x, t, c_concat, c_crossattn, control, transformer_options, devices=devices, **kwargs
        ):  # fmt: skip
            out = executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)
            runs = [cache.run for cache in transformer_options["qandc_cache"].caches.values()]
            devices.update(kept.device.type for run in runs for history in run.features.values() for _, kept in history)
            return out

        watched = plain.clone()
        watched.add_wrapper_with_key("apply_model", "look", look)
        policy = {"policy": "interval", "interval": 2}
        fast = node("QandC_ApplyCache").execute(watched, policy, 1, offload=offload).args[0]
        images.append(sample(fast).cpu())
        found["on" if offload else "off"] = sorted(devices)
    return {**found, "difference": host.relative(images[1], images[0])}


if __name__ == "__main__":
    main()
