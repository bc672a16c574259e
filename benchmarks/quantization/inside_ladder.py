"""One model and seed of `python -m benchmarks.quantization.ladder`: runs in ComfyUI's Python, prints JSON."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from typing import Any

from subjects import Study, over_seeds

SINGLE = ("W4A8", "W6A8", "W8A8")
CALIBRATION_SEED = 700
OWN_CALLS = 8  # held out of the calibration, for the shares
JUDGED = 16  # calls that all rows are judged by


def rows(study: Study, seed: int) -> list[dict[str, Any]]:
    """Single widths, and ladders of all formats with as many bytes, or with as large an error."""
    native, budget, judging = (
        study.host.module(name)
        for name in ("nodes.comfyui.quantize.native", "qandc_core.quantization.budget", "nodes.comfyui.quantize.judge")
    )
    source = study.subject.patcher
    calibration = study.calibration(source, CALIBRATION_SEED + 10 * seed, held_out=OWN_CALLS)
    calls = study.calls[:: len(study.calls) // JUDGED]
    judge, found = judging.HeldOutError(source, calls, lambda: None), []

    def row(name: str, format: str, calibration, **limits) -> dict[str, Any]:
        started = time.perf_counter()
        settings = native.NativeSettings(format, "gptq", budget.Budget(**limits))
        quantized, report = native.quantize_native(source, settings, calibration)
        result = {
            "name": name, "bytes": report.size_after, "layers": report.counts, "own": report.model_error,
            "seconds": time.perf_counter() - started, "error": judge.of_model(quantized)[0],
        }  # fmt: skip
        found.append(result)
        print(result, file=sys.stderr, flush=True)
        return result

    single = {format: row(format, format, calibration) for format in SINGLE}
    blind = replace(calibration, held_out=())
    for format in SINGLE[1:]:
        size = single[format]["bytes"]
        row(f"ladder, bytes of {format}", "W4A8", calibration, max_bytes=size)
        row(f"ladder without shares, bytes of {format}", "W4A8", blind, max_bytes=size)
    row("ladder, error of W6A8", "W4A8", calibration, max_model_error=single["W6A8"]["own"][0])
    return found


if __name__ == "__main__":
    over_seeds(rows, {"calls": JUDGED})
