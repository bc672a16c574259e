"""Quantize on checkpoints that ComfyUI's own loader reads: what becomes of each family, and files for stock_load."""

from __future__ import annotations

import json
import sys
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from host import Host, main, relative
from stock_models import STOCK, StockModel, configured, run, write

FORMATS = ("W8A8", "W6A8", "W4A8")
CALIBRATED = ("Flux", "Lumina 2")
OUTPUTS = "quantized.safetensors"  # in the base directory: what the saved models answered here


def available(host: Host) -> tuple[str, ...]:
    formats = host.module("nodes.comfyui.quantize.formats")
    return tuple(format for format in FORMATS if formats.supported(format))


def load(host: Host, name: str):
    """A family's model in full precision, from a file of its own."""
    import comfy.sd

    folder = host.base / "models" / "diffusion_models"
    folder.mkdir(parents=True, exist_ok=True)
    return comfy.sd.load_diffusion_model(write(name, folder))


def quantize(host: Host, patcher, format: str, calibration=None, **settings):
    """The quantized model and its report."""
    quantization = host.module("nodes.comfyui.quantize.native")
    return quantization.quantize_native(patcher, quantization.NativeSettings(format, **settings), calibration)


def save(patcher, name: str) -> Path:
    """Where core's ModelSave wrote the model."""
    import folder_paths
    from comfy_extras.nodes_model_merging import ModelSave

    ModelSave().save(patcher, f"diffusion_models/{name}")
    folder = Path(folder_paths.get_output_directory(), "diffusion_models")
    return max(folder.glob(f"{name}_*.safetensors"))


def slug(*words: str) -> str:
    return "-".join(words).replace(" ", "-").replace(".", "_").lower()


def calibrate(host: Host, patcher, model: StockModel):
    """What TAP Calibrate finds on two short trajectories."""
    import families

    _, positive, negative, latent = families.inputs(model.family)
    return host.node("QandC_TAPCalibrate").execute(
        model=patcher, positive=positive, negative=negative, latent_image={"samples": latent}, file="new",
        trajectories=2, samples=6, steps=3, cfg=2.0, sampler_name="euler", scheduler="simple", calibration_seed=1,
        batch_size=1, selection="tap", clusters=3, time_scale=5.0, computed_steps_only=True, hessians=True,
        held_out=2, filename_prefix="calibration",
    ).args[0]  # fmt: skip


def decoders_differ(host: Host, patcher, tensors: dict[str, torch.Tensor]) -> list[str]:
    """Layers of a saved file that the engine's decoder and comfy-kitchen's read differently in any bit."""
    import comfy.model_detection

    native = host.module("qandc_core.quantization.native")
    prefix = comfy.model_detection.unet_prefix_from_state_dict(tensors)
    layers: dict[str, dict] = {}
    for key, value in tensors.items():
        name, _, part = key.removeprefix(prefix).rpartition(".")
        layers.setdefault(name, {})[part] = value
    different = []
    for name, parts in layers.items():
        if "comfy_quant" not in parts:
            continue
        ours = native.dequantize(parts)
        theirs = patcher.model.diffusion_model.get_submodule(name).weight.dequantize()
        if not torch.equal(ours, theirs.float()):
            different.append(f"{name}: {relative(ours, theirs)}")
    return different


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    def raw(tensor):
        return tensor.dtype, tuple(tensor.shape), tensor.contiguous().flatten().view(torch.uint8).tolist()

    return a.keys() == b.keys() and all(raw(a[key]) == raw(b[key]) for key in a)


def check(host: Host, name: str, format: str, calibrated: bool) -> tuple[dict, torch.Tensor]:
    """What quantizing, sampling, saving and loading again gave, and the samples."""
    import comfy.sd
    import safetensors.torch

    model, full = STOCK[name], load(host, name)
    before = run(full, model)
    calibration = calibrate(host, full, model) if calibrated else None
    rounding = "gptq" if calibrated else "nearest"
    lossy, report = quantize(host, full, format, calibration, rounding=rounding)
    out = run(lossy, model)
    path = save(lossy, slug(name, format, "calibrated" if calibrated else "plain"))
    tensors, loaded = safetensors.torch.load_file(path), comfy.sd.load_diffusion_model(str(path))
    return {
        "file": path.name,
        "layers": Counter(layer.format for layer in report.layers),
        "largest layer error": max(layer.error for layer in report.layers),
        "held out": report.model_error,
        "bytes": [Path(write(name, host.base / "models" / "diffusion_models")).stat().st_size, path.stat().st_size],
        "reported": [report.size_before, report.size_after],
        "error": relative(out, before),
        "configured": configured(full, model) and configured(loaded, model),
        "source stays": torch.equal(run(full, model), before),
        "loaded here": relative(run(loaded, model), out),
        "decoders differ": decoders_differ(host, loaded, tensors),
        "saved again": same_bits(safetensors.torch.load_file(save(loaded, slug(name, format, "again"))), tensors),
    }, out  # fmt: skip


@dataclass
class Saved:
    """What stock_load has to find again: family and format -> samples, and the file."""

    outputs: dict[str, torch.Tensor] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)

    def write(self, host: Host) -> int:
        import safetensors.torch

        safetensors.torch.save_file(self.outputs, host.base / OUTPUTS, {"files": json.dumps(self.files)})
        return len(self.files)


def result(host: Host, name: str, saved: Saved) -> dict:
    """Format -> what the check found, or the error that it ended with."""
    found = {}
    with STOCK[name].sizes():
        for format in available(host):
            for calibrated in (False, True) if name in CALIBRATED else (False,):
                key = f"{format}, calibrated" if calibrated else format
                try:
                    found[key], saved.outputs[f"{name}, {key}"] = check(host, name, format, calibrated)
                    saved.files[f"{name}, {key}"] = found[key]["file"]
                except Exception:
                    found[key] = {"failed": traceback.format_exc(limit=-4)}
    return found


if __name__ == "__main__":
    saved = Saved()
    chosen = [name for name in STOCK if name in sys.argv[3:]] or list(STOCK)
    main({
        **{name: lambda host, name=name: result(host, name, saved) for name in chosen},
        "written": saved.write,
    })  # fmt: skip
