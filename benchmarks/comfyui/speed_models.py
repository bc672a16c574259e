"""The models that `python -m benchmarks.comfyui` samples from, for the program that runs in ComfyUI's Python."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import flow_model
import inside_large
import real_models
import torch

if TYPE_CHECKING:
    from host import Host

TRAJECTORIES, SAMPLES, CLUSTERS = 16, 96, 32  # of the calibration of a trained model
CALIBRATION_SEED = 700


@dataclass
class Subject:
    """A model, what conditions it and an empty batch; `trained` says that its errors mean something. `size` is given
    where the model has its released size.
    """

    title: str
    patcher: Any
    positive: Any
    negative: Any
    latent: torch.Tensor
    trained: bool
    size: real_models.Size | None = None

    @property
    def device(self) -> torch.device:
        return self.patcher.load_device


def dtype_of(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def load_dit(host: Host, name: str) -> Any:
    import comfy.model_management

    dtype = dtype_of(comfy.model_management.get_torch_device())
    return host.node("QandC_LoadDiT").execute(name, str(dtype).removeprefix("torch."), "auto").args[0]


def demo(host: Host, options: dict[str, Any]) -> Subject:
    positive, negative = host.node("QandC_ClassLabel").execute("0-9", "none").args
    latent = torch.zeros(options["batch"], 3, 32, 32)
    return Subject("built-in model", load_dit(host, "built-in demo"), positive, negative, latent, True)


def random_dit(host: Host, options: dict[str, Any]) -> Subject:
    """DiT-XL/2 with random weights, of a width and depth of its own."""
    width, depth = options["width"], options["depth"]
    inside_large.make(host, width, depth)
    given = inside_large.conditions(host)
    latent = given["latent_image"]["samples"].expand(options["batch"], -1, -1, -1).clone()
    title = f"DiT of {depth} blocks of width {width}, random weights, 256 px"
    return Subject(title, load_dit(host, inside_large.NAME), given["positive"], given["negative"], latent, False)


def flow(host: Host, options: dict[str, Any]) -> Subject:
    """The model of `benchmarks/caching/flow_model.py`, of ComfyUI's Lumina 2 class."""
    import comfy.model_management as mm
    import comfy.model_patcher
    import comfy.supported_models
    from safetensors.torch import load_file

    device, offload = mm.get_torch_device(), mm.unet_offload_device()
    config = comfy.supported_models.Lumina2(dict(flow_model.CONFIG))
    config.set_inference_dtype(dtype_of(device), None)
    model = config.get_model({}, "", device=offload)
    weights = {key: value.to(dtype_of(device)) for key, value in load_file(options["flow"]).items()}
    model.diffusion_model.load_state_dict(weights)
    patcher = comfy.model_patcher.ModelPatcher(model, device, offload)
    labels = torch.arange(options["batch"]) % flow_model.CLASSES
    none = torch.full((options["batch"],), flow_model.CLASSES)
    positive, negative = ([[flow_model.context(of), {}]] for of in (labels, none))
    return Subject("flow model", patcher, positive, negative, torch.zeros(options["batch"], *flow_model.LATENT), True)


def real(host: Host, options: dict[str, Any], name: str) -> Subject:
    size = real_models.SIZES[name]
    patcher = real_models.load(size, torch.bfloat16)
    positive, negative = (real_models.conditioning(size, seed) for seed in (1, 2))
    latent = torch.zeros(options["batch"], *size.latent[1:])
    return Subject(f"{size.title}, random weights", patcher, positive, negative, latent, False, size)


MODELS = {
    "demo": demo, "dit": random_dit, "flow": flow, **{name: partial(real, name=name) for name in real_models.SIZES},
}  # fmt: skip


def calibration(host: Host, subject: Subject, options: dict[str, Any]) -> Any:
    """What TAP Calibrate finds of a trained model; None of a random one, whose layers are rounded to nearest."""
    if not subject.trained:
        return None
    return host.node("QandC_TAPCalibrate").execute(
        model=subject.patcher, file="new", trajectories=TRAJECTORIES, samples=SAMPLES, steps=options["steps"],
        cfg=options["cfg"], sampler_name="euler", scheduler="simple", calibration_seed=CALIBRATION_SEED,
        batch_size=TRAJECTORIES, selection="tap", clusters=CLUSTERS, time_scale=5.0, computed_steps_only=True,
        hessians=True, filename_prefix="speed", positive=subject.positive, negative=subject.negative,
        latent_image={"samples": subject.latent[:1]},
    ).args[0]  # fmt: skip
