"""Recognizes files of other models, and names the stock node that loads them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress

import comfy.model_detection
from torch import Tensor

from ....qandc_core.checkpoints.dit import locate
from ....qandc_core.files import read_tensors

# What lies beside the diffusion model in a file for Load Checkpoint.
BESIDE = ("first_stage_model.", "cond_stage_model.", "conditioner.", "text_encoders.", "vae.")


def advice(path: str | os.PathLike[str]) -> str:
    """A sentence about a file that Load DiT refused; empty where ComfyUI does not know it either."""
    try:
        tensors = read_tensors(locate(path))[0]
    except (OSError, ValueError):
        return ""
    if any(".lora_" in key or key.startswith("lora_") for key in tensors):
        return "It is a LoRA: load it with the stock node Load LoRA."
    family = family_name(tensors)
    if family is None:
        return ""
    loader = "Load Checkpoint" if any(key.startswith(BESIDE) for key in tensors) else "Load Diffusion Model"
    return f"It is a model of the family {family}: load it with the stock node {loader}."


def family_name(tensors: Mapping[str, Tensor]) -> str | None:
    """ComfyUI's name for the kind of diffusion model, such as Flux, as its own loaders find it; None if it has none."""
    shapes = {key: tensor.to("meta") for key, tensor in tensors.items()}
    prefix = comfy.model_detection.unet_prefix_from_state_dict(shapes)
    inner = {key.removeprefix(prefix): value for key, value in shapes.items() if key.startswith(prefix)} or shapes
    for layout in (lambda: inner, lambda: comfy.model_detection.convert_diffusers_mmdit(inner, "")):
        with suppress(Exception):  # detection reads shapes as it goes: strange files end it in as many ways
            config = comfy.model_detection.model_config_from_unet(layout(), "")
            if config is not None:
                return type(config).__name__
    return None
