from __future__ import annotations

from pathlib import Path

from comfy_api.v0_0_2 import io, ui

from ..qandc_core.quantization.formats import BY_NAME
from . import schema
from .comfyui.encoders.quantize import TextSettings, divided, ignored_parts, quantize_encoders
from .comfyui.encoders.saving import encoder_prefix, encoders_to_save
from .comfyui.pictures import report_picture, to_image
from .comfyui.status import node_of, sentences, show
from .quantize import parts

GENERAL = Path(__file__).with_name("prompts.txt")


class QuantizeTextEncoder(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="QandC_QuantizeTextEncoder",
            display_name="Quantize Text Encoder",
            category=schema.CATEGORY,
            description="Makes a smaller copy of the text encoders of a CLIP (T5, umT5, Qwen, Llama, Gemma, Mistral): "
            "8 bits or fewer for weights, calibrated on your prompts. Saves memory, not time. Save it with Save Text "
            "Encoder: ComfyUI's own loaders take the file without this pack.",
            search_aliases=[
                "text encoder",
                "clip",
                "t5",
                "t5xxl",
                "umt5",
                "qwen",
                "llama",
                "gemma",
                "quantize clip",
                "quantize",
                "quantization",
                "int8",
                "int4",
                "fp8",
                *(name.lower() for name in BY_NAME),
                "gptq",
                "smaller",
                "vram",
                "\u6587\u672c\u7f16\u7801\u5668",
                "\u91cf\u5316",
                "\u663e\u5b58",  # text encoder, quantize, VRAM
            ],
            inputs=[
                io.Clip.Input("clip", tooltip="A CLIP in full precision, with or without LoRAs. It is not changed."),
                io.Combo.Input(
                    "format",
                    options=list(BY_NAME),
                    default="W8A8",
                    tooltip="Bits of the weights: 8, 6 or 4. Fewer make the encoder smaller and cost more quality.",
                ),
                io.String.Input(
                    "prompts",
                    default="",
                    multiline=True,
                    tooltip="Prompts such as you use, one a line. Every fourth is held out to measure the error. "
                    "Fewer than 16 are filled up with general ones.",
                ),
                schema.max_layer_error(),
                schema.skip("Encoders or layers", ", such as t5xxl or t5xxl.encoder.block.0"),
                schema.include("Embeddings and norms always stay."),
                schema.rounding(
                    "gptq rounds weights so that the encoder's answers to the prompts change least; auto does too. "
                    "nearest rounds each for itself, which is quicker."
                ),
            ],
            outputs=[
                io.Clip.Output(tooltip="The CLIP with quantized text encoders."),
                io.String.Output(
                    "filename_prefix",
                    display_name="filename_prefix",
                    tooltip="Encoder, format and date, for Save Text Encoder's input of this name.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        clip: io.Clip.Type,
        format: str,
        prompts: str,
        max_layer_error: float,
        skip: str = "",
        include: str = "",
        rounding: str = "auto",
    ) -> io.NodeOutput:
        settings = TextSettings(format, rounding, max_layer_error or None, parts(skip), parts(include))
        own = [line.strip() for line in prompts.splitlines() if line.strip()]
        used, held_out = divided(own, GENERAL.read_text(encoding="utf-8").splitlines())
        warnings = ignored_parts(clip, settings)
        quantized, report = quantize_encoders(clip, settings, used, held_out, node_of(cls))
        said = sentences([*report.said(), *(f"Warning: {sentence}" for sentence in warnings)])
        show(node_of(cls), f"{sentences(report.layers.headline().splitlines())}\n{said}")
        text = f"{report.layers.summary()}\n\n{said}\n\n{report.layers.table()}"
        shown = ui.PreviewImage(to_image(report_picture(report.layers)), cls=cls).as_dict()
        prefix = encoder_prefix(encoders_to_save(quantized, False), format)
        return io.NodeOutput(quantized, prefix, ui={**shown, "text": (text,)})
