"""API prompts on the built-in demo model, kept to seconds."""

from __future__ import annotations

import copy
import itertools
from typing import Any

Link = list  # [node id, output index]
DEMO = "built-in demo"
SAMPLING = {"steps": 4, "cfg": 1.5, "sampler_name": "ddpm", "scheduler": "normal"}
RENEWALS = itertools.count(1)


class Graph(dict):
    """A prompt in the making; every method adds one node and returns the link to its first output."""

    def __init__(self, classes: str = "0-9", batch_size: int = 2):
        self.labels = self.add("QandC_ClassLabel", classes=classes, imagenet_class="none")
        self.latent = self.add("EmptyLatentImage", width=32, height=32, batch_size=batch_size)
        self.vae: Link | None = None

    def add(self, class_type: str, **inputs: Any) -> Link:
        name = str(len(self) + 1)
        self[name] = {"class_type": class_type, "inputs": inputs}
        return [name, 0]

    @property
    def wires(self) -> dict[str, Link]:
        return {"positive": self.labels, "negative": [self.labels[0], 1], "latent_image": self.latent}

    def load(self, model_name: str = DEMO) -> Link:
        return self.add("QandC_LoadDiT", model_name=model_name, weight_dtype="auto", image_size="auto")

    def cache(self, model: Link, interval: int = 2, order: int = 0) -> Link:
        policy = {"policy": "interval", "policy.interval": interval}
        return self.add("QandC_ApplyCache", model=model, **policy, order=order)

    def calibrate(self, model: Link, wired: bool = True, **inputs: Any) -> Link:
        defaults = {
            "file": "new", "trajectories": 4, "samples": 16, "calibration_seed": 501, "batch_size": 2,
            "selection": "tap", "clusters": 4, "time_scale": 5.0, "computed_steps_only": True, "hessians": False,
            "filename_prefix": "calibration",
        }  # fmt: skip
        wires = self.wires if wired else {}
        return self.add("QandC_TAPCalibrate", model=model, **{**wires, **SAMPLING, **defaults, **inputs})

    def quantize(self, model: Link, calibration: Link | None = None, **inputs: Any) -> Link:
        defaults = {
            "format": "W8A8", "method": "paper", "max_layer_error": 0.1, "max_size_mb": 0, "skip": "",
            "loras": "bake in", "rounding": "auto",
        }  # fmt: skip
        wires = {} if calibration is None else {"calibration": calibration}
        return self.add("QandC_Quantize", model=model, **wires, **{**defaults, **inputs})

    def compensate(self, model: Link, reference: Link, wired: bool = True, **inputs: Any) -> Link:
        defaults = {
            "file": "new", "pairs": 4, "calibration_seed": 502, "method": "variance_match", "start_percent": 0.0,
            "end_percent": 1.0, "filename_prefix": "compensation",
        }  # fmt: skip
        wires = {"reference": reference, **(self.wires if wired else {})}
        return self.add("QandC_VarianceCompensate", model=model, **{**wires, **SAMPLING, **defaults, **inputs})

    def sample(self, model: Link, **inputs: Any) -> Link:
        defaults = {**SAMPLING, "seed": 0, "denoise": 1.0, "label": ""}
        return self.add("QandC_Sample", model=model, **{**self.wires, **defaults, **inputs})

    def stock_sample(self, model: Link, **inputs: Any) -> Link:
        return self.add("KSampler", model=model, **{**self.wires, **SAMPLING, "seed": 0, "denoise": 1.0, **inputs})

    def save(self, latent: Link) -> str:
        """Node id of a Save Latent: its file has every bit of the result."""
        return self.add("SaveLatent", samples=latent, filename_prefix="latents/run")[0]

    def picture(self, model: Link, **inputs: Any) -> str:
        return self.save(self.sample(model, **inputs))

    def decode(self, latent: Link) -> Link:
        self.vae = self.vae or self.add("VAELoader", vae_name="pixel_space")
        return self.add("VAEDecode", samples=latent, vae=self.vae)

    def compare(self, *runs: Link) -> Link:
        images = {f"images.image{i}": self.decode(run) for i, run in enumerate(runs)}
        reports = {f"reports.report{i}": [run[0], 1] for i, run in enumerate(runs)}
        return self.add("QandC_Compare", **images, **reports, shown=2, difference_gain=4.0)

    def save_model(self, model: Link, prefix: str) -> str:
        return self.add("ModelSave", model=model, filename_prefix=f"diffusion_models/{prefix}")[0]


def renewed(prompt: dict) -> dict:
    """The same work for ComfyUI to do again: class lists with other spaces behind them miss its cache of outputs, and
    files of another prefix are not found as those of the same inputs.
    """
    changed, number = copy.deepcopy(dict(prompt)), next(RENEWALS)
    for node in changed.values():
        if node["class_type"] == "QandC_ClassLabel":
            node["inputs"]["classes"] = node["inputs"]["classes"].rstrip() + " " * number
        if "filename_prefix" in node["inputs"] and node["class_type"].startswith("QandC_"):
            node["inputs"]["filename_prefix"] += f"-{number}"
    return changed
