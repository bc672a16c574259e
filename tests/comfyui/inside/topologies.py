"""The ways in which official templates sample, each built by calling ComfyUI's own node classes on tiny real models.

A topology is a function of a `Desk`: it calls nodes by name and returns the last latent. What a check puts on the
models, or watches, is none of its business.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import families
import torch
from family_list import FAMILIES
from host import Host

STEPS, CFG, SEED = 9, 2.0, 11
MODULES = ("custom_sampler", "flux", "ideogram4", "lt", "model_advanced")  # of comfy_extras, with the nodes below
SAMPLERS = ("KSampler", "KSamplerAdvanced", "SamplerCustom", "SamplerCustomAdvanced")


class Absent(Exception):
    """This ComfyUI has no node of this name."""


def node_classes(host: Host) -> dict[str, Any]:
    found = dict(host.nodes.NODE_CLASS_MAPPINGS)
    for name in MODULES:
        with suppress(ImportError):
            module = importlib.import_module(f"comfy_extras.nodes_{name}")
            found |= {key: value for key, value in vars(module).items() if isinstance(value, type)}
    return found


@dataclass(frozen=True)
class Run:
    """One call of a sampler node."""

    node: str
    inputs: dict[str, Any]

    @property
    def model(self) -> Any:
        return self.inputs["model"] if "model" in self.inputs else self.inputs["guider"].model_patcher

    def as_wired(self) -> dict[str, Any]:
        """The same wires and settings for a node that samples by itself: TAP Calibrate, Variance Compensate."""
        given = {key: value for key, value in self.inputs.items() if key not in ("seed", "noise_seed", "model")}
        for name in ("add_noise", "return_with_leftover_noise"):
            if name in given:
                given[name] = given[name] in (True, "enable")
        if "noise" not in given:
            given["calibration_seed"] = self.inputs["seed" if "seed" in self.inputs else "noise_seed"]
        return given


@dataclass
class Desk:
    """Models, prompts and an empty latent of one family, and nodes to call; every call of a sampler node is noted."""

    classes: dict[str, Any]
    family: str
    models: list[Any]
    runs: list[Run] = field(default_factory=list)
    guiders: list[tuple[Any, str, dict[str, Any]]] = field(default_factory=list)  # each with what made it

    def __call__(self, name: str, **inputs) -> Any:
        """The node's first output."""
        from comfy_execution.utils import CurrentNodeContext

        node = self.classes.get(name)
        if node is None:
            raise Absent(name)
        if name in SAMPLERS:
            self.runs.append(Run(name, inputs))
        with CurrentNodeContext(f"job {id(self)}", f"{name} {len(self.runs)}"):  # as the executor of a queue does
            made = node.execute(**inputs).args if hasattr(node, "execute") else getattr(node(), node.FUNCTION)(**inputs)
        if name.endswith("Guider"):
            self.guiders.append((made[0], name, inputs))
        return made[0]

    def again(self, run: Run, model: Any) -> torch.Tensor:
        """The samples of one noted run, flat, with another model in its place."""
        inputs = {**run.inputs, "model": model} if "model" in run.inputs else dict(run.inputs)
        if "guider" in inputs:
            name, made_of = next((name, given) for made, name, given in self.guiders if made is inputs["guider"])
            inputs["guider"] = self(name, **{**made_of, "model": model})
        return families.flat(self(run.node, **inputs)["samples"])

    def prompt(self, seed: int) -> list:
        return families.conditioning(FAMILIES[self.family], seed)

    @property
    def empty(self) -> dict[str, Any]:
        return {"samples": families.empty_latent(FAMILIES[self.family])}

    @property
    def image(self) -> dict[str, Any]:
        empty = self.empty["samples"]
        return {"samples": torch.randn(empty.shape, generator=torch.Generator().manual_seed(3))}

    def ksampler(self, latent: dict, denoise: float = 1.0, seed: int = SEED, steps: int = STEPS) -> dict:
        return self(
            "KSampler", model=self.models[0], seed=seed, steps=steps, cfg=CFG, sampler_name="euler", scheduler="simple",
            positive=self.prompt(1), negative=self.prompt(2), latent_image=latent, denoise=denoise,
        )  # fmt: skip

    def advanced(self, model: Any, latent: dict, start: int, end: int, first: bool, steps: int) -> dict:
        return self(
            "KSamplerAdvanced", model=model, add_noise="enable" if first else "disable", noise_seed=SEED, steps=steps,
            cfg=CFG, sampler_name="euler", scheduler="simple", positive=self.prompt(1), negative=self.prompt(2),
            latent_image=latent, start_at_step=start, end_at_step=end,
            return_with_leftover_noise="enable" if first else "disable",
        )  # fmt: skip

    def custom(self, sigmas: torch.Tensor) -> dict:
        return self(
            "SamplerCustom", model=self.models[0], add_noise=True, noise_seed=SEED, cfg=CFG, positive=self.prompt(1),
            negative=self.prompt(2), sampler=self("KSamplerSelect", sampler_name="euler"), sigmas=sigmas,
            latent_image=self.empty,
        )  # fmt: skip

    def guided(self, guider: Any, sigmas: torch.Tensor, latent: dict | None = None, noise: bool = True) -> dict:
        return self(
            "SamplerCustomAdvanced", noise=self("RandomNoise", noise_seed=SEED) if noise else self("DisableNoise"),
            guider=guider, sampler=self("KSamplerSelect", sampler_name="euler"), sigmas=sigmas,
            latent_image=self.empty if latent is None else latent,
        )  # fmt: skip

    def basic(self) -> torch.Tensor:
        return self("BasicScheduler", model=self.models[0], scheduler="simple", steps=STEPS, denoise=1.0)

    def cfg(self) -> Any:
        return self(
            "CFGGuider", model=self.models[0], positive=self.prompt(1), negative=self.prompt(2), cfg=CFG
        )  # fmt: skip


@dataclass(frozen=True)
class Topology:
    """`experts` is how many models it takes, with weights of their own."""

    nodes: str
    family: str
    run: Callable[[Desk], dict]
    experts: int = 1


def text_to_image(desk: Desk) -> dict:
    return desk.ksampler(desk.empty)


def image_to_image(desk: Desk) -> dict:
    return desk.ksampler(desk.image, denoise=0.6)


def inpaint(desk: Desk) -> dict:
    image = desk.image
    mask = torch.zeros(1, *image["samples"].shape[-2:])
    mask[..., : mask.shape[-1] // 2] = 1
    return desk.ksampler(desk("SetLatentNoiseMask", samples=image, mask=mask), denoise=0.8)


def enlarged(desk: Desk) -> dict:
    small = desk.ksampler(desk.empty)
    large = desk("LatentUpscaleBy", samples=small, upscale_method="bilinear", scale_by=1.5)
    return desk.ksampler(large, denoise=0.5, seed=SEED + 1)


def two_experts(desk: Desk) -> dict:
    first, second = desk.models
    half = desk.advanced(first, desk.empty, 0, 7, True, 14)
    return desk.advanced(second, half, 7, 10000, False, 14)


def base_and_rest(desk: Desk) -> dict:
    half = desk.advanced(desk.models[0], desk.empty, 0, 8, True, 12)
    return desk.advanced(desk.models[0], half, 8, 10000, False, 12)


def custom(desk: Desk) -> dict:
    return desk.custom(desk.basic())


def custom_manual(desk: Desk) -> dict:
    return desk.custom(desk("ManualSigmas", sigmas="1, 0.97, 0.92, 0.84, 0.73, 0.6, 0.44, 0.25, 0"))


def custom_ltxv(desk: Desk) -> dict:
    return desk.custom(
        desk("LTXVScheduler", steps=STEPS, max_shift=2.05, base_shift=0.95, stretch=True, terminal=0.1)
    )  # fmt: skip


def basic_guider(desk: Desk) -> dict:
    return desk.guided(desk("BasicGuider", model=desk.models[0], conditioning=desk.prompt(1)), desk.basic())


def flux2(desk: Desk) -> dict:
    return desk.guided(desk.cfg(), desk("Flux2Scheduler", steps=STEPS, width=1024, height=768))


def split(desk: Desk) -> dict:
    sigmas = desk("BasicScheduler", model=desk.models[0], scheduler="simple", steps=14, denoise=1.0)
    high, low = desk.classes["SplitSigmas"].execute(sigmas, 6).args
    return desk.guided(desk.cfg(), low, desk.guided(desk.cfg(), high), noise=False)


def dual_cfg(desk: Desk, style: str) -> dict:
    guider = desk(
        "DualCFGGuider", model=desk.models[0], cond1=desk.prompt(1), cond2=desk.prompt(2), negative=desk.prompt(3),
        cfg_conds=2.0, cfg_cond2_negative=1.5, style=style,
    )  # fmt: skip
    return desk.guided(guider, desk.basic())


def two_models(desk: Desk) -> dict:
    guider = desk(
        "DualModelGuider", model=desk.models[0], model_negative=desk.models[1], positive=desk.prompt(1),
        negative=desk.prompt(2), cfg=CFG,
    )  # fmt: skip
    return desk.guided(guider, desk("Ideogram4Scheduler", steps=STEPS, width=1024, height=1024, mu=0.0, std=1.75))


def video_and_sound(desk: Desk) -> dict:
    def guider() -> Any:
        return desk(
            "LTXVDualCFGGuider", model=desk.models[0], positive=desk.prompt(1), negative=desk.prompt(2), video_cfg=3.0,
            audio_cfg=4.0,
        )  # fmt: skip

    first = desk.guided(guider(), desk("ManualSigmas", sigmas="1, 0.98, 0.95, 0.9, 0.8, 0.7, 0.6, 0.4, 0.2, 0"))
    return desk.guided(guider(), desk("ManualSigmas", sigmas="0.85, 0.725, 0.6, 0.42, 0.2, 0"), first)


def cfg_guider(desk: Desk) -> dict:
    return desk.guided(desk.cfg(), desk.basic())


TOPOLOGIES: dict[str, Topology] = {
    "text to image": Topology("KSampler", "Qwen-Image", text_to_image),
    "image to image": Topology("KSampler, denoise 0.6", "SD 3.5", image_to_image),
    "inpaint": Topology("SetLatentNoiseMask, KSampler, denoise 0.8", "Flux", inpaint),
    "two stages, enlarged between": Topology("KSampler twice, LatentUpscaleBy between", "SDXL", enlarged),
    "two parts of one schedule": Topology("KSamplerAdvanced twice, leftover noise", "SD 1.5", base_and_rest),
    "two experts": Topology("KSamplerAdvanced twice, two models", "Wan 2.1", two_experts, 2),
    "custom sampler": Topology("SamplerCustom, BasicScheduler", "Lumina 2", custom),
    "sigmas by hand": Topology("SamplerCustom, ManualSigmas", "Chroma", custom_manual),
    "sigmas of LTX": Topology("SamplerCustom, LTXVScheduler", "LTXV", custom_ltxv),
    "one prompt": Topology("SamplerCustomAdvanced, BasicGuider, BasicScheduler", "Flux", basic_guider),
    "two prompts": Topology("SamplerCustomAdvanced, CFGGuider, BasicScheduler", "Z-Image", cfg_guider),
    "sigmas of Flux 2": Topology("SamplerCustomAdvanced, CFGGuider, Flux2Scheduler", "Flux 2", flux2),
    "split sigmas": Topology("SamplerCustomAdvanced twice, CFGGuider, SplitSigmas, DisableNoise", "Wan 2.2", split),
    "three prompts": Topology("SamplerCustomAdvanced, DualCFGGuider, BasicScheduler", "OmniGen2",
                              lambda desk: dual_cfg(desk, "regular")),
    "three prompts, nested": Topology("SamplerCustomAdvanced, DualCFGGuider (nested), BasicScheduler", "OmniGen2",
                                      lambda desk: dual_cfg(desk, "nested")),
    "two models": Topology("SamplerCustomAdvanced, DualModelGuider, Ideogram4Scheduler", "Ideogram 4", two_models, 2),
    "video and sound": Topology("SamplerCustomAdvanced twice, LTXVDualCFGGuider, ManualSigmas", "LTX-AV",
                                video_and_sound),
    "video and sound, one stage": Topology("SamplerCustomAdvanced, CFGGuider, BasicScheduler", "MiniMax H3",
                                           cfg_guider),
}  # fmt: skip


def experts(topology: Topology) -> list[Any]:
    """One patcher over a random model for each expert; no two are alike."""
    found = [families.build(FAMILIES[topology.family]) for _ in range(topology.experts)]
    for number, patcher in enumerate(found[1:], 1):
        generator = torch.Generator().manual_seed(number)
        for parameter in patcher.model.diffusion_model.parameters():
            if parameter.ndim > 1 and parameter.is_floating_point():
                parameter.mul_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))
    return found
