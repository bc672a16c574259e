"""One model and seed of `python -m benchmarks.quantization.rival`: runs in ComfyUI's Python, prints JSON.

argv: checkout, base directory with the pack, options as JSON.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import fidelity
from subjects import Study, over_seeds

FORMATS = ("W8A8", "W4A8")
CALIBRATION_SEED, IMAGE_SEED = 900, 30000
OWN_CALLS, JUDGED = 8, 16


def rows(study: Study, seed: int) -> list[dict[str, Any]]:
    native, budget, judging = (
        study.host.module(name)
        for name in ("nodes.comfyui.quantize.native", "qandc_core.quantization.budget", "nodes.comfyui.quantize.judge")
    )
    source, config, found = study.subject.patcher, native.NativeConfig, []
    calibration = study.calibration(source, CALIBRATION_SEED + 10 * seed, held_out=OWN_CALLS)
    judge = judging.Judge(source, study.calls[:: len(study.calls) // JUDGED], lambda: None)
    reference, _ = study.subject.images(source, IMAGE_SEED + seed)

    def row(name: str, format: str, rounding: str, known, max_bytes: int | None = None, **how) -> dict[str, Any]:
        native.NativeConfig = partial(config, **how)
        settings = native.NativeSettings(format, rounding, budget.Budget(max_bytes=max_bytes))
        quantized, report = native.quantize_native(source, settings, known)
        native.NativeConfig = config
        images, _ = study.subject.images(quantized, IMAGE_SEED + seed)
        errors = fidelity.relative_l2(images, reference)
        result = {
            "name": name, "bytes": report.size_after, "model": judge.of_model(quantized)[0],
            "images": sum(errors) / len(errors),
        }  # fmt: skip
        found.append(result)
        print(result, file=sys.stderr, flush=True)
        return result

    for format in FORMATS:
        # comfy-kitchen's own quantizer: its scales, nearest, no calibration.
        rival = row(f"{format}, nearest", format, "nearest", None, clip_search=False, bias_correction=False)
        row(f"{format}, GPTQ", format, "gptq", calibration)
        if format == "W8A8":
            row("ladder, bytes of W8A8", "W4A8", "gptq", calibration, max_bytes=rival["bytes"])
    return found


if __name__ == "__main__":
    over_seeds(rows, {"calls": JUDGED})
