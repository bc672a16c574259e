"""What calibrating and quantizing take of a card of 12 GiB on models in their released sizes, whose tensors need no
memory here: by the layers of ComfyUI's own classes and by its own estimate of activations.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from host import Host, main
from quantized_families import load, quantize

sys.path.append(str(Path(__file__).parents[3] / "benchmarks" / "comfyui"))
import real_models  # noqa: E402

CARD, SYSTEM = 12 * 2**30, 64 * 2**30
CONTEXT = 2**29  # of CUDA itself
QWEN = real_models.Size(
    "Qwen-Image", "QwenImage", {"image_model": "qwen_image", "in_channels": 64, "num_layers": 60}, (1, 16, 1, 128, 128),
    (1, 256, 3584),
)  # fmt: skip
MODELS = {"Flux.1": real_models.SIZES["flux-dev"], "Qwen-Image": QWEN}
TEXT = 512  # tokens
SIDES = (128, 256)  # of the latent: 1024 x 1024 and 2048 x 2048
W4A8 = 0.29  # of the bytes of 16 bits


def built(size: real_models.Size) -> Any:
    import comfy.supported_models

    config = getattr(comfy.supported_models, size.config)(dict(size.unet))
    config.unet_config.update(size.unet)
    config.set_inference_dtype(torch.bfloat16, None)
    return config.get_model({}, "", device=torch.device("meta"))


def bytes_of(model: Any) -> int:
    """Of its weights in 16 bits."""
    return sum(2 * value.numel() for value in model.diffusion_model.state_dict().values())


def on_a_card(free: int = CARD - CONTEXT) -> ExitStack:
    """ComfyUI takes its device for a card with flash attention while it lasts."""
    import comfy.model_management as mm

    stack = ExitStack()
    for name, value in {
        "get_total_memory": lambda *_, **__: CARD,
        "get_free_memory": lambda *_, **__: free,
        "pytorch_attention_flash_attention": lambda: True,
    }.items():
        stack.enter_context(patch.object(mm, name, value))
    return stack


def room(host: Host, patcher: Any) -> int:
    """Bytes of the card for statistics."""
    run = host.module("nodes.comfyui.calibrate.run")
    return run.SamplingHost.room(SimpleNamespace(patcher=patcher, device=patcher.load_device))


def patcher_of(model: Any, weights: int, loaded: int = 0) -> Any:
    return SimpleNamespace(
        model=model, load_device=torch.device("cpu"), model_size=lambda: weights, loaded_size=lambda: loaded
    )


def taken(host: Host, size: real_models.Size) -> dict[str, Any]:
    """Bytes of the largest layer's rounding, and side of the latent and preset -> those of calibrating."""
    import comfy.model_management as mm

    defaults, layers = (host.module(f"nodes.comfyui.{name}") for name in ("defaults", "quantize.layers"))
    native = host.module("qandc_core.quantization.native")
    presets, memory, choice, statistics = (
        host.module(f"qandc_core.calibration.{name}") for name in ("presets", "memory", "choice", "statistics")
    )
    model = built(size)
    shapes = [(layer.out_features, layer.in_features) for _, layer in layers.quantizable(model.diffusion_model)]
    weights = bytes_of(model)
    patcher = patcher_of(model, weights)
    widths = [inputs for _, inputs in shapes]
    found: dict[str, Any] = {
        "layers": len(shapes), "weights": weights, "rounding": max(native.working_bytes(*shape) for shape in shapes)
    }  # fmt: skip
    with on_a_card():
        free = room(host, patcher)
        for side in SIDES:
            latent = torch.empty(*size.latent[:-2], side, side, device="meta")
            images = defaults.images_at_once(patcher, {"samples": latent})
            tokens = side * side // 4 + TEXT
            for preset in presets.EFFORTS:
                plan = presets.preset_config(preset, choice.CalibrationConfig(), 3072, tokens, 20, SYSTEM)
                space = memory.plan_statistics(widths, int(plan.memory_gb * 2**30), plan.tokens, 256)
                kept = [width for width in widths if space.hessian(width)]
                found[f"{side}, {preset}"] = {
                    "images": images,
                    "activations": images * model.memory_required([2, *latent.shape[1:]]),
                    "inputs": 2 * images * tokens * max(widths),  # of the chosen samples together, in bfloat16
                    "parts": 3 * 4 * statistics.PART + 4 * max(kept, default=0) ** 2,
                    "statistics": min(free, space.bytes),
                    "reserve": CONTEXT + mm.extra_reserved_memory(),
                }
    return found


def loaded(host: Host) -> dict[str, int]:
    """Beside Flux.1 in W4A8, loaded whole: room for statistics, and where only the memory for inference is free."""
    import comfy.model_management as mm

    weights = int(W4A8 * bytes_of(built(MODELS["Flux.1"])))
    patcher = patcher_of(None, weights, weights)
    with on_a_card(CARD - CONTEXT - weights):
        beside = room(host, patcher)
    with on_a_card(mm.minimum_inference_memory()):
        least = room(host, patcher)
    return {"weights": weights, "room": beside, "least": least}


def freed(host: Host) -> dict[str, int]:
    """The most memory that quantizing a small model has freed before it begins, and what its largest layer takes."""
    import comfy.model_management as mm

    native = host.module("qandc_core.quantization.native")
    asked, free = [], mm.free_memory

    def watched(memory, *args, **kwargs):
        asked.append(memory)
        return free(memory, *args, **kwargs)

    with patch.object(mm, "free_memory", watched):
        lossy, report = quantize(host, load(host, "Flux"), "W8A8", rounding="nearest")
    modules = [lossy.model.diffusion_model.get_submodule(layer.name) for layer in report.layers]
    needed = max(native.working_bytes(module.out_features, module.in_features) for module in modules)
    return {"asked": int(max(asked)), "needed": needed, "reserve": CONTEXT + mm.extra_reserved_memory()}


if __name__ == "__main__":
    main({
        **{name: lambda host, size=size: taken(host, size) for name, size in MODELS.items()},
        "loaded": loaded,
        "freed": freed,
    })  # fmt: skip
