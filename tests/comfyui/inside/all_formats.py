"""Every format in a ComfyUI whose comfy-kitchen has all of them: samples, files, LoRAs on top, and torch.compile."""

from __future__ import annotations

from typing import Any

import torch
from host import Host, main, relative
from quantized_families import Saved, decoders_differ, load, quantize, save
from quantized_lora import FAMILY, RELATIVE, block_layers, marks, share, with_lora
from quantized_use import aot_eager, compiled
from stock_models import STOCK, run


def check(host: Host) -> dict[str, Any]:
    import comfy_kitchen

    formats = host.module("nodes.comfyui.quantize.formats")
    saved, able = Saved(), [name for name in formats.BY_NAME if formats.supported(name)]
    found = {format: one(host, format, saved) for format in able}
    saved.write(host)
    return {"kitchen": comfy_kitchen.__file__, "available": able, **found}


def one(host: Host, format: str, saved: Saved) -> dict[str, Any]:
    import comfy.sd
    import safetensors.torch

    full, model = load(host, FAMILY), STOCK[FAMILY]
    lossy, report = quantize(host, full, format, rounding="nearest")
    out, path = run(lossy, model), save(lossy, f"all-{format}")
    key = f"{FAMILY}, {format}"
    saved.outputs[key], saved.files[key] = out, path.name
    tensors, loaded = safetensors.torch.load_file(path), comfy.sd.load_diffusion_model(str(path))
    return {
        "layers": report.counts,
        "size": [report.size_before, report.size_after],
        "error": relative(out, run(full, model)),
        "loaded": relative(run(loaded, model), out),
        "decoders differ": decoders_differ(host, loaded, tensors),
        "stored": sorted({mark["format"] for mark in marks(tensors)}),
        "compiled": relative(run(compiled(lossy, aot_eager), model), out),
        "LoRAs": {name: with_loras(host, format, full, lossy, out, amount) for name, amount in RELATIVE.items()},
    }


def with_loras(host: Host, format: str, full, lossy, out: torch.Tensor, amount: float) -> dict[str, Any]:
    """A LoRA of this size kept on the quantized model: what arrives, and errors against full precision with it."""
    import comfy.sd

    names, model = block_layers(full), STOCK[FAMILY]
    (source, _), (patched, deltas) = with_lora(full, names, amount), with_lora(lossy, names, amount)
    # All LoRAs are sized by weights without any in them, so before the first run.
    bypass, matrices = with_lora(lossy, names, amount, bypass=True)[0], with_lora(lossy, names, amount, whole=True)[0]
    wanted, kept = run(source, model), run(patched, model)
    baked, _ = quantize(host, source, format, rounding="nearest")
    again = comfy.sd.load_diffusion_model(str(save(patched, f"lora-{format}")))
    return {
        "share": share(patched, lossy, deltas, names),
        "baked": relative(run(baked, model), wanted),
        "kept": relative(kept, wanted),
        "whole matrix": relative(run(matrices, model), wanted),
        "bypass": relative(run(bypass, model), wanted),
        "effect": relative(wanted, run(full, model)),
        "saved": relative(run(again, model), wanted),
        "restored": torch.equal(run(lossy, model), out),
    }


if __name__ == "__main__":
    main({"found": check})
