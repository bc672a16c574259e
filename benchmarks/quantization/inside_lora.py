"""One model and seed of `python -m benchmarks.quantization.lora`: runs in ComfyUI's Python, prints JSON.

argv: checkout, base directory with the pack, options as JSON.
"""

from __future__ import annotations

import sys
from typing import Any

import fidelity
import torch
from subjects import Study, over_seeds

IMAGE_SEED, JUDGED = 50000, 16
RANK, SIZES = 8, (0.3,)  # |delta| / |W|


def lora_file(patcher, layers: list[str], size: float, seed: int, whole: bool) -> dict[str, torch.Tensor]:
    """A LoRA for the layers, as its factors or as the matrices themselves."""
    generator, found = torch.Generator().manual_seed(seed), {}
    for name in layers:
        weight = patcher.model.diffusion_model.get_submodule(name).weight.detach().float()
        up, down = (
            torch.randn(*shape, generator=generator) for shape in ((len(weight), RANK), (RANK, weight.shape[1]))
        )
        up *= size * weight.norm() / (up @ down).norm()
        parts = {"diff": up @ down} if whole else {"lora_B.weight": up, "lora_A.weight": down}
        found |= {f"diffusion_model.{name}.{part}": value for part, value in parts.items()}
    return found


def rows(study: Study, seed: int) -> list[dict[str, Any]]:
    import comfy.model_patcher
    import comfy.sd

    native, judging, formats = (
        study.host.module(f"nodes.comfyui.quantize.{name}") for name in ("native", "judge", "formats")
    )
    source, found = study.subject.patcher, []
    layers = native.chosen_layers(source, native.NativeSettings("W8A8"))
    calls = study.calls[:: len(study.calls) // JUDGED]
    able = [format for format in formats.BY_NAME if formats.supported(format)]
    lossy = {format: quantized(native, source, format) for format in able}

    for size in SIZES:
        file = lora_file(source, layers, size, seed, whole=False)
        matrices = lora_file(source, layers, size, seed, whole=True)
        full, _ = comfy.sd.load_lora_for_models(source, None, file, 1.0, 0)
        judge = judging.Judge(full, calls, lambda: None)
        reference, _ = study.subject.images(full, IMAGE_SEED + seed)
        for format in able:
            model, core = lossy[format], lossy[format].clone()
            core.__class__ = comfy.model_patcher.ModelPatcher  # core's own, on the same layers
            ways = {
                "baked in before": quantized(native, full, format),
                "after, LoraLoader": comfy.sd.load_lora_for_models(model, None, file, 1.0, 0)[0],
                "after, as a whole matrix": comfy.sd.load_lora_for_models(model, None, matrices, 1.0, 0)[0],
                "after, bypass": comfy.sd.load_bypass_lora_for_models(model, None, file, 1.0, 0)[0],
                "after, core alone": comfy.sd.load_lora_for_models(core, None, file, 1.0, 0)[0],
            }
            for way, patcher in ways.items():
                error = judge.of_model(patcher)[0]
                images, _ = study.subject.images(patcher, IMAGE_SEED + seed)
                patcher.detach()
                errors = fidelity.relative_l2(images, reference)
                name = f"{format}, LoRA of {size:g}, {way}"
                found.append({"name": name, "model": error, "images": sum(errors) / len(errors)})
                print(found[-1], file=sys.stderr, flush=True)
    return found


def quantized(native, patcher, format: str):
    return native.quantize_native(patcher, native.NativeSettings(format, "nearest"))[0]


if __name__ == "__main__":
    over_seeds(rows, {"calls": JUDGED, "rank": RANK})
