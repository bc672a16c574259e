"""Defaults by model, for widgets of a sampler node that are set to auto: steps, cfg, sampler, scheduler, batch size.

The numbers are those of ComfyUI's official templates (comfyui-workflow-templates-json 0.1.50) for the undistilled model
of each family. Nothing in the weights tells a distilled one (turbo, lightning) from it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import comfy.model_management as mm
import torch

from ...qandc_core.calibration.choice import CalibrationConfig
from ...qandc_core.calibration.presets import CUSTOM, preset_config
from ...qandc_core.calibration.presets import images_at_once as fitting
from .making import distinct_trajectories
from .model.dit import is_dit
from .quantize.layers import calibrated
from .settings import AUTO, Settings, parts_of
from .wrappers import samples_flow

AUTO_COUNT = 0
PATCH = 4  # positions of a latent that make a token, in most families
LARGEST_BATCH, LARGEST_PAIRING = 16, 64


class Suited(NamedTuple):
    steps: int
    cfg: float
    sampler_name: str = "euler"
    scheduler: str = "simple"


DIT = Suited(50, 2.0, "ddpm", "normal")
NOISE_ADDED, FLOW = Suited(25, 8.0, "euler", "normal"), Suited(20, 4.0)
FAMILIES = {  # by the class in comfy.supported_models; a subclass takes its parent's
    "Flux": Suited(20, 1.0),
    "FluxSchnell": Suited(4, 1.0),
    "HunyuanVideo": Suited(20, 1.0),
    "SD3": Suited(20, 4.0, "euler", "sgm_uniform"),
    "WAN21_T2V": Suited(20, 3.5),
    "WAN22_T2V": Suited(20, 5.0, "uni_pc"),
    "QwenImage": Suited(20, 2.5),
    "Lumina2": Suited(30, 4.0, "res_multistep"),
    "ZImage": Suited(25, 4.0, "res_multistep"),
    "HiDream": Suited(50, 5.0, "uni_pc"),
    "Anima": Suited(30, 4.0),
    "ACEStep": Suited(50, 5.0),
    "ACEStep15": Suited(50, 6.0),
    "StableAudio": Suited(50, 5.0, "dpmpp_3m_sde_gpu", "exponential"),
}


def suited(patcher) -> Suited:
    """The usual settings of this MODEL's family."""
    if is_dit(patcher):
        return DIT
    kinds = type(getattr(patcher.model, "model_config", None)).__mro__
    known = (FAMILIES[kind.__name__] for kind in kinds if kind.__name__ in FAMILIES)
    return next(known, FLOW if samples_flow(patcher) else NOISE_ADDED)


def completed(settings: Settings, patcher) -> Settings:
    """The settings with everything that is left to the model decided."""
    found = suited(patcher)
    chosen: dict[str, Any] = {
        "steps": settings.steps or found.steps,
        "cfg": found.cfg if settings.cfg < 0 else settings.cfg,
        "sampler_name": found.sampler_name if settings.sampler_name == AUTO else settings.sampler_name,
        "scheduler": found.scheduler if settings.scheduler == AUTO else settings.scheduler,
    }
    return replace(settings, **chosen)


def images_at_once(patcher, latent: dict[str, Any], most: int = LARGEST_BATCH) -> int:
    """1, 2, 4, ...: as many images of a LATENT, with both conditions, as take 2 GiB, or an eighth of a smaller card's
    memory, by ComfyUI's own estimate.
    """
    parts = parts_of(latent["samples"])
    needed = sum(patcher.model.memory_required([2, *part.shape[1:]]) for part in parts)
    return fitting(needed, mm.get_total_memory(patcher.load_device), most)


def suited_plan(preset: str, plan: CalibrationConfig, patcher, latent: dict[str, Any], settings: Settings):
    """The plan with the numbers of a preset, no more trajectories than differ, and a batch size that fits."""
    if preset != CUSTOM:
        widths = sorted(layer.in_features for _, layer in calibrated(patcher.model.diffusion_model))
        parts = parts_of(latent["samples"])
        tokens = max(1, sum(part[0, 0].numel() for part in parts) // PATCH)
        width = widths[len(widths) // 2] if widths else 1
        memory = mm.get_total_memory(torch.device("cpu"))
        plan = replace(
            preset_config(preset, plan, width, tokens, settings.steps_on(patcher), memory), batch_size=AUTO_COUNT
        )
    trajectories = distinct_trajectories(settings, latent, plan.trajectories)
    at_once = plan.batch_size or images_at_once(patcher, latent)
    return replace(plan, trajectories=trajectories, batch_size=min(at_once, trajectories))


def pairs_of(latent: dict[str, Any]) -> int:
    """4 to 64 pairs, which is 65,536 values for each channel of the part that has fewest."""
    parts = parts_of(latent["samples"])
    return max(4, min(64, max(-(-65536 // max(1, part[0, 0].numel())) for part in parts)))
