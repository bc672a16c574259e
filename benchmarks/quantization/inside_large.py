"""One phase of `python -m benchmarks.quantization.large`: runs in ComfyUI's Python, prints JSON.

argv: checkout, base directory with the pack, options as JSON with the phase.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from host import Host

INTERVAL, HEAD = 3, 72  # width of an attention head of DiT-XL/2
NAME = "large.safetensors"


def resident(key: str) -> int:
    """VmRSS, the bytes of this process in memory, or VmHWM, the most since `forget_peak`."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith(key)))


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def make(host: Host, width: int, depth: int) -> dict[str, Any]:
    """A checkpoint whose every layer acts: the paper's initialisation, with random values where that has zeros."""
    dit, presets, checkpoints = (
        host.module(f"qandc_core.{name}") for name in ("models.dit", "models.presets", "checkpoints")
    )
    torch.manual_seed(0)
    config = presets.preset("DiT-XL/2", hidden_size=width, depth=depth, num_heads=width // HEAD)
    model = dit.DiT(config)
    dit.initialize_weights(model)
    for name, parameter in model.named_parameters():
        if "adaLN_modulation" in name or name.startswith("final_layer.linear"):
            torch.nn.init.normal_(parameter, std=0.02)
    folder = Path(host.base, "models", "diffusion_models")
    checkpoints.save_dit(model.bfloat16(), folder / NAME)
    return {}


def conditions(host: Host) -> dict[str, Any]:
    positive, negative = host.node("QandC_ClassLabel").execute("0-999", "none").args
    return {"positive": positive, "negative": negative, "latent_image": {"samples": torch.zeros(1, 4, 32, 32)}}


def calibrate(host: Host, model, options: dict[str, Any]) -> None:
    cached = host.node("QandC_ApplyCache").execute(model, {"policy": "interval", "interval": INTERVAL}, 1).args[0]
    host.node("QandC_TAPCalibrate").execute(
        model=cached, file="new", trajectories=options["trajectories"], samples=options["samples"],
        steps=options["steps"], cfg=options["cfg"], sampler_name="ddim", scheduler="normal", calibration_seed=501,
        batch_size=4, selection="tap", clusters=50, time_scale=5.0, computed_steps_only=True, hessians=True,
        filename_prefix="large", memory_gb=options["memory_gb"], preset=options["preset"], **conditions(host),
    )  # fmt: skip


def quantize(host: Host, model, format: str, preset: str) -> Any:
    (file,) = Path(host.base, "output", "qandc").glob("large*.safetensors")
    calibration = host.module("qandc_core.calibration.file").load_calibration(file)
    return host.node("QandC_Quantize").execute(
        model=model, format=format, method="native", max_layer_error=0.0, max_size_mb=0, skip="", loras="bake in",
        rounding="auto", calibration=calibration, preset=preset,
    )  # fmt: skip


def tell_tenths(phase: str) -> None:
    """Prints the seconds at every tenth of what ComfyUI's progress bar counts."""
    import comfy.utils

    begun, told = time.perf_counter(), [0]

    def tell(value: int, total: int, *_: Any, **__: Any) -> None:
        if total and 10 * value // total > told[0]:
            told[0] = 10 * value // total
            print(f"{phase} {10 * told[0]} % {time.perf_counter() - begun:.0f} s", file=sys.stderr, flush=True)

    comfy.utils.set_progress_bar_global_hook(tell)


def measured(host: Host, options: dict[str, Any]) -> dict[str, Any]:
    """Seconds of the phase, and peak memory beyond the model that is loaded before and what Python had."""
    before = resident("VmRSS")
    model = host.node("QandC_LoadDiT").execute(NAME, "float32", "auto").args[0]
    size = model.model_size()
    forget_peak()
    tell_tenths(options["phase"])
    begun, cpu = time.perf_counter(), time.process_time()
    if options["phase"] == "calibrate":
        kept = calibrate(host, model, options)
    else:
        kept = quantize(host, model, options["phase"], options["preset"])
    seconds, peak = time.perf_counter() - begun, resident("VmHWM")
    found = {
        "seconds": seconds,
        "cpu": time.process_time() - cpu,
        "model": size,
        "before": before,
        "peak": peak,
        "beyond": peak - before - size,
    }
    if kept is not None:
        found["report"] = kept.ui["text"][0].splitlines()[0]
    return found


def main() -> None:
    checkout, base, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    host = Host(checkout, base)
    with torch.inference_mode():
        if options["phase"] == "make":
            found = make(host, options["width"], options["depth"])
        else:
            found = measured(host, options)
    print("RESULTS " + json.dumps({"interval": INTERVAL, "measured": found}))


if __name__ == "__main__":
    main()
