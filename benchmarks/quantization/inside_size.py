"""One phase of `python -m benchmarks.quantization.size`: runs in ComfyUI's Python, prints JSON.

argv: checkout, base directory with the pack, options as JSON with the phase.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from family_configs import flux
from host import Host
from inside_large import forget_peak, resident

NAME = "flux-random.safetensors"
WIDTH, HEADS, POOLED, TEXT, TOKENS = 3072, 24, 768, 4096, 64
SIDE, STEPS = 16, 2  # of the latent, whose 64 tokens and the text's keep a processor busy enough; of a trajectory
WHOLE = {"double_blocks": 19, "single_blocks": 38}  # FLUX.1
STD = 0.02


def make(host: Host, options: dict[str, Any]) -> dict[str, Any]:
    """FLUX.1's network in its published width with fewer blocks, as a file in bfloat16."""
    import comfy.ldm.flux.model
    import comfy.ops
    import safetensors.torch

    config = flux(
        vec_in_dim=POOLED, context_in_dim=TEXT, hidden_size=WIDTH, mlp_ratio=4.0, num_heads=HEADS,
        depth=options["double"], depth_single_blocks=options["single"], axes_dim=[16, 56, 56],
    )  # fmt: skip
    network = comfy.ldm.flux.model.Flux(
        image_model="flux", dtype=torch.bfloat16, device="meta", operations=comfy.ops.disable_weight_init, **config
    )
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, value in network.state_dict().items():
        scale = torch.ones(value.shape, dtype=torch.bfloat16) if name.endswith("scale") else None
        # uniform, which a generator draws in a third of the time
        drawn = torch.empty(value.shape, dtype=torch.bfloat16).uniform_(-STD, STD, generator=generator)
        tensors[name] = drawn if scale is None else scale
    safetensors.torch.save_file(tensors, Path(host.base, "models", "diffusion_models", NAME))
    return {"parameters": sum(value.numel() for value in tensors.values())}


def conditions() -> dict[str, Any]:
    def condition(seed: int) -> list:
        generator = torch.Generator().manual_seed(seed)
        text = torch.randn(1, TOKENS, TEXT, generator=generator)
        return [[text, {"pooled_output": torch.randn(1, POOLED, generator=generator), "guidance": 3.5}]]

    return {
        "positive": condition(1),
        "negative": condition(2),
        "latent_image": {"samples": torch.zeros(1, 16, SIDE, SIDE)},
    }


def calibrated(host: Host, model, options: dict[str, Any]) -> Any:
    return host.node("QandC_TAPCalibrate").execute(
        model=model, file="new", trajectories=2, samples=STEPS, steps=STEPS, cfg=1.0, sampler_name="euler",
        scheduler="simple", calibration_seed=501, batch_size=1, selection="tap", clusters=2, time_scale=5.0,
        computed_steps_only=True, hessians=True, filename_prefix="size", memory_gb=options["memory_gb"], held_out=1,
        **conditions(),
    ).args[0]  # fmt: skip


def quantized(host: Host, model, options: dict[str, Any], calibration) -> dict[str, Any]:
    """Seconds of each layer by its name: of all of them, or of the first block of each kind with gptq."""
    budget = host.module("qandc_core.quantization.budget")
    seconds, last, tell = {}, [0.0], budget.Search.tell

    def timed(search, name, layer) -> None:
        seconds[name], last[0] = time.perf_counter() - last[0], time.perf_counter()
        print(f"{name} {seconds[name]:.1f} s", file=sys.stderr, flush=True)
        tell(search, name, layer)

    gptq = calibration is not None
    made = {"double_blocks": options["double"], "single_blocks": options["single"]}
    skip = ", ".join(f"{kind}.{i}." for kind, count in made.items() for i in range(1, count)) if gptq else ""
    budget.Search.tell, last[0] = timed, time.perf_counter()
    try:
        result = host.node("QandC_Quantize").execute(
            model=model, format=options["phase"], method="native", max_layer_error=0.0, max_size_mb=0, skip=skip,
            loras="bake in", rounding="auto", calibration=calibration,
        )  # fmt: skip
    finally:
        budget.Search.tell = tell
    return {"layers": seconds, "report": result.ui["text"][0].splitlines()[0]}


def measured(host: Host, options: dict[str, Any]) -> dict[str, Any]:
    """Seconds, and the most memory that the process had: the model included, whose file is mapped into it."""
    (model,) = host.nodes.UNETLoader().load_unet(NAME, "default")
    forget_peak()
    begun = time.perf_counter()
    calibration = calibrated(host, model, options) if options["phase"] == "W4A8" else None
    calibrating = time.perf_counter() - begun
    found = quantized(host, model, options, calibration)
    return {
        **found,
        "seconds": time.perf_counter() - begun,
        "calibrating": calibrating,
        "model": model.model_size(),
        "peak": resident("VmHWM"),
    }


def main() -> None:
    checkout, base, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    host = Host(checkout, base)
    with torch.inference_mode():
        found = make(host, options) if options["phase"] == "make" else measured(host, options)
    print("RESULTS " + json.dumps({"measured": found, "whole": WHOLE}))


if __name__ == "__main__":
    main()
