"""Some families of `python -m benchmarks.quantization.families`: runs in ComfyUI's Python, prints JSON.

argv: checkout, base directory with the pack, options as JSON: families, by their names in stock_models.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
from host import Host, relative
from quantized_families import Saved, save, slug
from quantized_use import Case, answer, aot_eager, calls_of, compiled, lora_on
from stock_models import STOCK


def offloaded(case: Case, layers: list[str]) -> dict[str, float]:
    """How far a prediction with all weights cast at every call is from one with weights in place, and with a LoRA."""
    import comfy.model_management

    x, t, conditions = calls_of(case.full, case.model)[-1]
    found = {}
    for name, patcher in (("plain", case.lossy), ("LoRA", lora_on(case.lossy, layers))):
        answers = []
        for options in ({"full_load": True}, {"lowvram_model_memory": 1}):
            comfy.model_management.unload_all_models()
            patcher.load(patcher.load_device, **options)
            answers.append(patcher.model.apply_model(x, t, **conditions))
            patcher.detach()
        found[name] = relative(answers[1], answers[0])
    return found


def row(host: Host, name: str, format: str, saved: Saved) -> dict[str, Any]:
    begun, case = time.perf_counter(), Case(host, name, format)
    layers = [layer.name for layer in case.report.layers if layer.format != "float"]
    full = lora_on(case.full, layers)
    wanted, baked = case.run(full), case.quantized(full)[0]
    path = save(case.lossy, slug("families", name, format))
    saved.outputs[f"{name}, {format}"], saved.files[f"{name}, {format}"] = case.out, path.name
    after = case.run(lora_on(case.lossy, layers))
    return {
        "family": name, "format": format, "layers": case.report.counts, "error": relative(case.out, case.before),
        "LoRA": {
            "effect": relative(wanted, case.before), "after": relative(after, wanted),
            "baked": relative(case.run(baked), wanted), "removed": torch.equal(case.run(case.lossy), case.out),
        },
        "offloaded": offloaded(case, layers),
        "compiled": answer(lambda: relative(case.run(compiled(case.lossy, aot_eager)), case.out)),
        "seconds": time.perf_counter() - begun,
    }  # fmt: skip


def main() -> None:
    checkout, base, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    host, saved, found = Host(checkout, base), Saved(), []
    formats = host.module("nodes.comfyui.quantize.formats")
    torch.manual_seed(0)
    with torch.inference_mode():
        for name in options["families"]:
            with STOCK[name].sizes():
                for format in formats.BY_NAME:
                    if formats.supported(format):
                        found.append(row(host, name, format, saved))
                        print(found[-1], file=sys.stderr, flush=True)
    saved.write(host)
    print("RESULTS " + json.dumps({"rows": found}))


if __name__ == "__main__":
    main()
