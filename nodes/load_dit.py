from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import folder_paths
import torch
from comfy_api.v0_0_2 import io

from ..qandc_core.checkpoints.dit import dit_folders, source_files
from ..qandc_core.checkpoints.recognition import may_be_dit
from ..qandc_core.files import is_text
from .comfyui.model.dit import load_dit_patcher
from .comfyui.model.others import advice
from .schema import CATEGORY

DEMO = "built-in demo"
FOLDERS = ("diffusion_models", "checkpoints")
DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SIZES = {"auto": None, "256": 32, "512": 64}


class LoadDiT(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        files = dict.fromkeys([*dit_files(), *diffusers_folders()])
        return io.Schema(
            node_id="QandC_LoadDiT",
            display_name="Load DiT (class-conditional)",
            category=CATEGORY,
            description="Loads a class-conditional diffusion transformer (DiT) as a MODEL that every stock node takes: "
            "the built-in demo, a published checkpoint, a diffusers file, or one that Quantize made.",
            search_aliases=["dit", "imagenet", "class conditional", "load diffusion model", "demo", "q&c"],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=[DEMO, *files],
                    default=DEMO,
                    tooltip="The built-in demo, a class-conditional DiT of models/diffusion_models or "
                    "models/checkpoints, or a folder of models/diffusers. Models that read text, such as Flux, are "
                    "not listed: load them with Load Diffusion Model.",
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=list(DTYPES),
                    default="auto",
                    advanced=True,
                    tooltip="Precision of the weights; auto lets ComfyUI choose what suits the device.",
                ),
                io.Combo.Input(
                    "image_size",
                    options=list(SIZES),
                    default="auto",
                    advanced=True,
                    tooltip="Image size the model was trained for. Only diffusers files without a config.json need it.",
                ),
                io.Int.Input(
                    "num_heads",
                    default=0,
                    min=0,
                    max=256,
                    optional=True,
                    advanced=True,
                    tooltip="Number of attention heads, for non-standard widths. 0 = detect.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model in full precision, or quantized if the file is.")],
        )

    @classmethod
    def validate_inputs(cls, model_name) -> bool:
        return True  # a file that is absent here is named when the node runs, with what to do

    @classmethod
    def fingerprint_inputs(cls, model_name, **kwargs):
        if model_name == DEMO:
            return DEMO
        path = find(model_name)
        if path is None:
            return None
        return [(str(file), status.st_mtime_ns, status.st_size) for file, status in stamps(path)]

    @classmethod
    def execute(cls, model_name: str, weight_dtype: str, image_size: str, num_heads: int = 0) -> io.NodeOutput:
        path = "demo" if model_name == DEMO else find(model_name)
        if path is None:
            raise FileNotFoundError(
                f"There is no model file {model_name} here; put it into models/{FOLDERS[0]} and press R to refresh, "
                "or choose another."
            )
        try:
            return io.NodeOutput(load_dit_patcher(path, DTYPES[weight_dtype], SIZES[image_size], num_heads or None))
        except ValueError as error:
            raise ValueError(f"{str(error).rstrip('.')}. {advice(path)}".rstrip()) from error


def dit_files() -> list[str]:
    """Files of the model folders that hold a class-conditional DiT."""
    names = [(folder, name) for folder in FOLDERS for name in folder_paths.get_filename_list(folder) if is_text(name)]
    paths = ((name, folder_paths.get_full_path(folder, name)) for folder, name in names)
    return [name for name, path in paths if path and may_be_dit(path)]


def find(name: str) -> str | None:
    files = (folder_paths.get_full_path(folder, name) for folder in FOLDERS)
    return diffusers_folders().get(name) or next(filter(None, files), None)


def diffusers_folders() -> dict[str, str]:
    """Pipelines of models/diffusers that hold a class-conditional transformer: choice -> path."""
    folders = [folder for root in folder_paths.get_folder_paths("diffusers") for folder in dit_folders(root)]
    return {f"diffusers/{folder.name}": str(folder) for folder in folders}


def stamps(path: str) -> Iterator[tuple[Path, os.stat_result]]:
    """Every file that the model is read from, with its time and size; absent ones are said when the node runs."""
    try:
        files = source_files(path)
    except OSError:
        return
    for file in files:
        with suppress(OSError):
            yield file, file.stat()
