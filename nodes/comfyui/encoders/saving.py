"""Files of text encoders, one for each, under the names that ComfyUI's loaders read."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import comfy.model_management as mm
import comfy.utils
import folder_paths
from torch import Tensor

from ....qandc_core.files import written_whole
from ..quantize.weights import is_packed
from .found import Encoder, encoders_of

# Names that a loader replaces as it reads such a file.
FULL_NAMES = {"model.": "model.language_model.", "visual.": "model.visual.", "model.lm_head.": "lm_head."}


def has_quantized(encoder: Encoder) -> bool:
    return any(is_packed(getattr(module, "weight", None)) for module in encoder.network.modules())


def encoders_to_save(clip, everything: bool) -> list[Encoder]:
    """All encoders of a CLIP, or those with quantized layers. Raises ValueError where there are none."""
    found = [encoder for encoder in encoders_of(clip) if everything or has_quantized(encoder)]
    if not found:
        raise ValueError(
            "No encoder of this CLIP is quantized; wire Quantize Text Encoder's CLIP, or save all encoders."
        )
    return found


def encoder_prefix(encoders: list[Encoder], format: str) -> str:
    """Folder, encoder, format and date; several encoders' files add their names themselves."""
    name = encoders[0].name if len(encoders) == 1 else "text-encoders"
    return f"clip/{name}_{format}_{time.strftime('%Y-%m-%d')}"


def new_paths(encoders: list[Encoder], prefix: str, output: str) -> list[Path]:
    """A file for each encoder that does not exist yet, named and numbered as ComfyUI's savers do."""
    found = []
    for encoder in encoders:
        own = prefix if len(encoders) == 1 else f"{prefix}_{encoder.name}"
        folder, name, counter, *_ = folder_paths.get_save_image_path(own, output)
        found.append(Path(folder, f"{name}_{counter:05}_.safetensors"))
    return found


def tensors_of(clip) -> dict[str, Any]:
    """All tensors of a CLIP with its LoRAs in them, as CLIPSave of this ComfyUI gets them."""
    patcher = clip.load_model()
    if hasattr(clip, "state_dict_for_saving"):
        return clip.state_dict_for_saving()
    mm.load_models_gpu([patcher], force_patch_weights=True)
    return clip.get_sd()


def file_tensors(clip, encoder: Encoder, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The encoder's part of a CLIP's `tensors`, with its tokenizer where a file carries one."""
    prefix = f"{encoder.root}."
    own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    tokenizer = getattr(clip.tokenizer, encoder.name, clip.tokenizer)
    carried = {key: value for key, value in tokenizer.state_dict().items() if isinstance(value, Tensor)}
    return {**with_full_names(own), **carried}


def with_full_names(tensors: dict[str, Any]) -> dict[str, Any]:
    """Qwen 3-VL and 3.5 are recognized by longer names than ComfyUI's own."""
    replaced = "model.layers.0.linear_attn.A_log" in tensors or (
        "visual.deepstack_merger_list.0.norm.weight" in tensors
        and "model.layers.49.self_attn.q_proj.weight" not in tensors
    )
    if not replaced:
        return tensors
    found = {}
    for key, value in tensors.items():
        short = next((name for name in sorted(FULL_NAMES, key=len, reverse=True) if key.startswith(name)), "")
        found[FULL_NAMES.get(short, "") + key.removeprefix(short)] = value
    return found


def save_encoders(clip, encoders: list[Encoder], paths: list[Path], metadata: dict[str, str]) -> None:
    """Writes one file for each encoder, LoRAs on it included; a failed write leaves no file behind."""
    tensors = tensors_of(clip)
    for encoder, path in zip(encoders, paths, strict=True):
        with written_whole(path) as temporary:
            comfy.utils.save_torch_file(file_tensors(clip, encoder, tensors), str(temporary), metadata=metadata)
