from __future__ import annotations

import json

import folder_paths
from comfy.cli_args import args
from comfy_api.v0_0_2 import io, ui

from . import schema
from .comfyui.encoders.saving import encoders_to_save, new_paths, save_encoders
from .comfyui.status import node_of, sentences, show


class SaveTextEncoder(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="QandC_SaveTextEncoder",
            display_name="Save Text Encoder",
            category=schema.CATEGORY,
            description="Writes the text encoders of a CLIP, one file for each, under the names that ComfyUI's own "
            "CLIP loaders read: also those of Qwen, Gemma and umT5, whose files CLIPSave writes in a way that they "
            "do not load.",
            search_aliases=[
                "save clip",
                "clip save",
                "clipsave",
                "text encoder",
                "t5",
                "export",
                "\u6587\u672c\u7f16\u7801\u5668",
                "\u4fdd\u5b58",  # text encoder, save
            ],
            inputs=[
                io.Clip.Input(
                    "clip", tooltip="A CLIP, such as that of Quantize Text Encoder. LoRAs on it are saved in it."
                ),
                io.String.Input(
                    "filename_prefix",
                    default="clip/text_encoder",
                    tooltip="Folder and name below ComfyUI's output folder. The CLIP loaders also list output/clip.",
                ),
                io.Combo.Input(
                    "encoders",
                    options=["quantized", "all"],
                    default="quantized",
                    tooltip="Write the encoders with quantized layers only, or all of this CLIP.",
                ),
            ],
            outputs=[],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, clip: io.Clip.Type, filename_prefix: str, encoders: str) -> io.NodeOutput:
        chosen = encoders_to_save(clip, encoders == "all")
        paths = new_paths(chosen, filename_prefix, folder_paths.get_output_directory())
        save_encoders(clip, chosen, paths, metadata_of(cls.hidden))
        text = sentences(f"{path.name}: {path.stat().st_size / 2**20:.0f} MiB" for path in paths)
        show(node_of(cls), text)
        return io.NodeOutput(ui=ui.PreviewText(text))


def metadata_of(hidden) -> dict[str, str]:
    """The metadata that ComfyUI's own savers write; none where it is disabled."""
    if args.disable_metadata:
        return {}
    workflow = getattr(hidden, "extra_pnginfo", None) or {}
    prompt = getattr(hidden, "prompt", None)
    return {
        "format": "pt",
        "prompt": json.dumps(prompt) if prompt is not None else "",
        **{key: json.dumps(value) for key, value in workflow.items()},
    }
