"""Wan 2.2's two experts from files to files: plain, cached, calibrated from runs, quantized, saved, loaded, measured.

The workflow is the official one, on tiny files that ComfyUI's own loader recognizes: Load Diffusion Model and
ModelSamplingSD3 for each expert, KSampler (Advanced) with the first from pure noise to the middle of the schedule, and
the second from there, on leftover noise.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import families
import safetensors.torch
import stock_models
import torch
from host import Host, main, relative
from topologies import node_classes

EXPERTS = ("high", "low")
STEPS, SWITCH, CFG, SEED, SHIFT = 20, 10, 3.5, 11, 8.0
MODEL = stock_models.STOCK["Wan 2.1"]  # the experts of Wan 2.2 14B are two networks of this class
PROMPTS = ((1, 2), (3, 2), (4, 2))  # positive and negative of three runs that are recorded


class Workflow:
    """The official graph; `attach` puts nodes between an expert's ModelSamplingSD3 and its sampler."""

    def __init__(self, host: Host):
        self.host, self.classes = host, node_classes(host)

    def call(self, name: str, **inputs) -> tuple:
        from comfy_execution.utils import CurrentNodeContext

        node = self.classes[name]
        with CurrentNodeContext("two experts", f"{name} {inputs.get('start_at_step', '')}"):
            if hasattr(node, "execute"):
                return node.execute(**inputs).args
            return getattr(node(), node.FUNCTION)(**inputs)

    def load(self, file: str) -> Any:
        """A file of models/diffusion_models as the graph has it."""
        import comfy.sd

        model = comfy.sd.load_diffusion_model(str(folder(self.host) / file))
        return self.call("ModelSamplingSD3", model=model, shift=SHIFT)[0]

    def sample(self, models: dict[str, Any], prompts: tuple[int, int] = PROMPTS[0], seed: int = SEED) -> torch.Tensor:
        positive, negative = (families.conditioning(MODEL.family, prompt) for prompt in prompts)
        latent = {"samples": families.empty_latent(MODEL.family)}
        for expert, (begin, end) in zip(EXPERTS, ((0, SWITCH), (SWITCH, 10000))):
            first = expert == EXPERTS[0]
            (latent,) = self.call(
                "KSamplerAdvanced", model=models[expert], add_noise="enable" if first else "disable", noise_seed=seed,
                steps=STEPS, cfg=CFG, sampler_name="euler", scheduler="simple", positive=positive, negative=negative,
                latent_image=latent, start_at_step=begin, end_at_step=end,
                return_with_leftover_noise="enable" if first else "disable",
            )  # fmt: skip
        return families.flat(latent["samples"])


def folder(host: Host) -> Path:
    path = host.base / "models" / "diffusion_models"
    path.mkdir(parents=True, exist_ok=True)
    return path


def write_experts(host: Host) -> dict[str, str]:
    """Two files of one architecture, with weights of their own."""
    tensors = stock_models.checkpoint("Wan 2.1")
    for number, expert in enumerate(EXPERTS):
        generator = torch.Generator().manual_seed(number)
        changed = {
            key: value * (1 + 0.3 * torch.randn(value.shape, generator=generator).to(value))
            if value.ndim > 1
            else value
            for key, value in tensors.items()
        }
        safetensors.torch.save_file(changed, folder(host) / f"{expert}.safetensors")
    return {expert: f"{expert}.safetensors" for expert in EXPERTS}


def cached(host: Host, model: Any) -> Any:
    policy = {"policy": "interval", "interval": 2}
    return host.node("QandC_ApplyCache").execute(model, policy, 1).args[0]


def recording(host: Host, model: Any, expert: str, record: bool) -> tuple:
    return host.node("QandC_CalibrateFromRuns").execute(
        model=model, name=expert, record=record, samples=8, hessians=True, memory_gb=4.0, tokens=4096, held_out=4,
        reset=0,
    ).args  # fmt: skip


def quantized(host: Host, model: Any, calibration: Any) -> tuple[Any, Any]:
    native = host.module("nodes.comfyui.quantize.native")
    return native.quantize_native(model, native.NativeSettings("W8A8"), calibration)


def saved(host: Host, model: Any, expert: str) -> str:
    """Core's ModelSave, and the file where Load Diffusion Model finds it."""
    import folder_paths
    from comfy_extras.nodes_model_merging import ModelSave

    ModelSave().save(model, f"diffusion_models/{expert}_w8a8")
    (made,) = Path(folder_paths.get_output_directory(), "diffusion_models").glob(f"{expert}_w8a8_*.safetensors")
    made.rename(folder(host) / made.name)
    return made.name


def whole(host: Host) -> dict[str, Any]:
    workflow = Workflow(host)
    files = write_experts(host)
    full = {expert: workflow.load(file) for expert, file in files.items()}
    plain = workflow.sample(full)
    fast = {expert: cached(host, model) for expert, model in full.items()}
    recorders = {expert: recording(host, model, expert, True)[0] for expert, model in fast.items()}
    same = all(
        torch.equal(workflow.sample(recorders, pair, SEED + i), workflow.sample(fast, pair, SEED + i))
        for i, pair in enumerate(PROMPTS)
    )
    calibrations = {expert: recording(host, model, expert, False)[1] for expert, model in fast.items()}
    made = {expert: quantized(host, fast[expert], calibrations[expert]) for expert in EXPERTS}
    small = {expert: patcher for expert, (patcher, _) in made.items()}
    names = {expert: saved(host, patcher, expert) for expert, patcher in small.items()}
    loaded = {expert: cached(host, workflow.load(file)) for expert, file in names.items()}
    measured, report = {}, None
    for expert, model in loaded.items():
        measured[expert], report = host.node("QandC_RunReport").execute(model, "", report).args
    out, found = workflow.sample(measured), None
    found = report.report()
    cache_alone = workflow.sample(fast)
    same_model = host.module("qandc_core.calibration.fingerprint").same_model
    second = host.module("nodes.comfyui.quantize.weights").fingerprint_of(full["low"])
    return {
        "recording keeps the images": same,
        "runs": {expert: [c.recording.runs, c.recording.samples] for expert, c in calibrations.items()},
        "calibrations differ": not close(calibrations),
        "is of the second expert": [same_model(calibrations[expert].model, second) for expert in EXPERTS],
        "layers": {expert: len(report.layers) for expert, (_, report) in made.items()},
        "held out": {expert: report.model_error[0] for expert, (_, report) in made.items()},
        "loaded is the quantized one": relative(out, workflow.sample(small)),
        "cache": relative(cache_alone, plain),
        "both": relative(out, plain),
        "quantization on the cached run": relative(out, cache_alone),
        "report": [found.steps, sum(found.computed), found.parts, found.finished, found.seed],
        "time": len(found.seconds) == STEPS and min(found.seconds) > 0 and math.isfinite(sum(found.seconds)),
        "plain again": torch.equal(workflow.sample(full), plain),
    }


def close(calibrations: dict[str, Any]) -> bool:
    """Whether the two experts' layers saw the same, which no half of a schedule does."""
    first, second = (calibrations[expert].statistics for expert in EXPERTS)
    return all(relative(first[name].mean, second[name].mean) < 1e-2 for name in first)


if __name__ == "__main__":
    main({"whole": whole})
