"""One model and seed of `python -m benchmarks.quantization.lora`: runs in ComfyUI's Python, prints JSON.

argv: checkout, base directory with the pack, options as JSON.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from subjects import Study, over_seeds

RANK, SIZE = 8, 0.3  # |delta| / |W|


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
    file, matrices = (lora_file(source, layers, SIZE, seed, whole) for whole in (False, True))
    full, _ = comfy.sd.load_lora_for_models(source, None, file, 1.0, 0)
    judge = judging.HeldOutError(full, study.calls, lambda: None)
    judge.prepare()
    for format in formats.BY_NAME:
        if not formats.supported(format):
            continue
        lossy = quantized(native, source, format)
        core = lossy.clone()
        core.__class__ = comfy.model_patcher.ModelPatcher  # core's own, on the same layers
        ways = {
            "baked in before": quantized(native, full, format),
            "after, LoraLoader": comfy.sd.load_lora_for_models(lossy, None, file, 1.0, 0)[0],
            "after, as a whole matrix": comfy.sd.load_lora_for_models(lossy, None, matrices, 1.0, 0)[0],
            "after, bypass": comfy.sd.load_bypass_lora_for_models(lossy, None, file, 1.0, 0)[0],
            "after, core alone": comfy.sd.load_lora_for_models(core, None, file, 1.0, 0)[0],
        }
        for way, patcher in ways.items():
            found.append({"name": f"{format}, {way}", "model": judge.of_model(patcher)[0]})
            patcher.detach()
            print(found[-1], file=sys.stderr, flush=True)
    return found


def quantized(native, patcher, format: str):
    return native.quantize_native(patcher, native.NativeSettings(format, "nearest"))[0]


if __name__ == "__main__":
    over_seeds(rows, {"rank": RANK, "size": SIZE}, held_out_runs=1)
