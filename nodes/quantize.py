from __future__ import annotations

from collections.abc import Mapping

from comfy_api.v0_0_2 import io, ui

from ..qandc_core.calibration.file import Calibration
from ..qandc_core.calibration.presets import CUSTOM
from ..qandc_core.quantization.budget import Budget
from ..qandc_core.quantization.formats import ALL
from ..qandc_core.quantization.model import QuantizationConfig
from . import schema
from .comfyui.pictures import report_picture, to_image
from .comfyui.quantize.names import file_prefix
from .comfyui.quantize.native import NativeSettings, ignored_patterns, quantize_native
from .comfyui.quantize.paper import quantized_patcher
from .comfyui.status import node_of, sentences, show

BITS = {format.name: (format.weight_bits, 8) for format in ALL}
PRESETS = {"quick": ("nearest", 0.1), "standard": ("auto", 0.1), "thorough": ("auto", 0.05)}
METHODS = ("native", "paper")
LORAS = {"bake in": "bake", "keep on top": "keep"}


class Quantize(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="QandC_Quantize",
            display_name="Quantize (INT8, INT4)",
            category=schema.CATEGORY,
            description="Makes an integer copy of any diffusion model: 8 bits or fewer for weights, 8 for "
            "activations, calibrated with TAP Calibrate. Caches, patches and LoRAs on the model are kept. Save "
            "it with the stock node ModelSave: ComfyUI loads the file without this pack.",
            search_aliases=[
                "int8",
                "int4",
                "fp8",
                "quantize",
                "quantization",
                "smaller",
                "compress",
                "vram",
                *(format.name.lower() for format in ALL),
                "convrot",
                "gptq",
                "ptq",
                "convert",
                "faster",
                "speed up",
                "accelerate",
                "\u91cf\u5316",
                "\u663e\u5b58",
                "\u538b\u7f29",
                "\u52a0\u901f",  # quantize, VRAM, compress, speed up
            ],
            inputs=[
                io.Model.Input("model", tooltip="A full-precision model, with or without LoRAs. It is not changed."),
                schema.Calibration.Input(
                    "calibration",
                    optional=True,
                    tooltip="A calibration of this model. Without one, weights are rounded to nearest.",
                ),
                io.Combo.Input(
                    "format",
                    options=list(BITS),
                    default="W8A8",
                    tooltip="Bits of weights and activations. Fewer make the model smaller and cost more quality.",
                ),
                io.Combo.Input(
                    "method",
                    options=list(METHODS),
                    default=METHODS[0],
                    tooltip="native: ComfyUI's own formats, for any model. paper: one calibrated activation scale "
                    "per layer, as in the Q&C paper; for Load DiT models, and its files need this pack.",
                ),
                schema.max_layer_error(),
                io.Int.Input(
                    "max_size_mb",
                    default=0,
                    min=0,
                    max=2**20,
                    advanced=True,
                    tooltip="Size limit of the quantized layers in MiB. Spare room goes to finer formats for the "
                    "layers that lose most for their size. 0 or more than their present size = no limit, no "
                    "finer formats.",
                ),
                schema.skip("Layers of the blocks"),
                io.Combo.Input(
                    "loras",
                    options=list(LORAS),
                    default="bake in",
                    advanced=True,
                    tooltip="Merge LoRAs into the weights before quantizing, or keep them beside the layers, where "
                    "their strength can still change.",
                ),
                schema.rounding(
                    "gptq rounds weights so that the calibrated outputs change least. auto uses it where the "
                    "calibration has Hessians; with the method paper, auto rounds to nearest."
                ),
                schema.include(
                    "By default embedders, timestep, label and caption layers and the last layer are kept.",
                    optional=True,
                ),
                io.Float.Input(
                    "max_model_error",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.005,
                    round=0.001,
                    optional=True,
                    tooltip="Make the model as small as possible within this relative error of its predictions, such "
                    "as 0.02: layers start in the format above, and those that cost most get finer ones. "
                    "Measured on the calibration's held-out samples. 0 = no limit.",
                ),
                schema.preset(
                    "quick rounds to nearest; standard rounds with gptq where the calibration has Hessians; thorough "
                    "also gives layers above a relative error of 0.05 the next finer format. They take the place of "
                    "rounding and max_layer_error. On a DiT of 4 blocks (one core of an AMD EPYC) quick took 0.7 to "
                    "0.8 times as long as standard, thorough as long. custom = as set."
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The quantized model."),
                io.String.Output(
                    "filename_prefix",
                    display_name="filename_prefix",
                    tooltip="Model, format and date, for ModelSave's input of this name.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: io.Model.Type,
        format: str,
        method: str,
        max_layer_error: float,
        max_size_mb: int,
        skip: str,
        loras: str,
        rounding: str,
        calibration: Calibration | None = None,
        include: str = "",
        max_model_error: float = 0.0,
        preset: str = CUSTOM,
    ) -> io.NodeOutput:
        node_id = node_of(cls)
        rounding, max_layer_error = PRESETS.get(preset, (rounding, max_layer_error))
        if method == "paper":
            config = QuantizationConfig(rounding="nearest" if rounding == "auto" else rounding)
            quantized, text = quantized_patcher(model, *BITS[format], calibration, config)
            asked = {"max_size_mb": max_size_mb, "max_model_error": max_model_error}
            text += ignored_by_paper({**asked, "skip": parts(skip), "include": parts(include)})
            show(node_id, text)
            return io.NodeOutput(quantized, file_prefix(model, format), ui=ui.PreviewText(text))
        settings = NativeSettings(
            format,
            rounding,
            Budget(max_layer_error or None, max_size_mb * 2**20 or None, max_model_error or None),
            parts(skip),
            LORAS[loras],
            parts(include),
        )
        warnings = ignored_patterns(model, settings)
        quantized, report = quantize_native(model, settings, calibration, node_id)
        warnings += report.misses(settings.budget.max_model_error)
        said = "".join(f"\n\nWarning: {sentence}." for sentence in warnings)
        show(node_id, f"{sentences(report.headline().splitlines())}{said}")
        text = f"{report.summary()}{said}\n\n{report.table()}"
        shown = ui.PreviewImage(to_image(report_picture(report)), cls=cls).as_dict()
        return io.NodeOutput(quantized, file_prefix(model, format), ui={**shown, "text": (text,)})


def ignored_by_paper(inputs: Mapping[str, object]) -> str:
    """A warning where inputs are set that only the method native reads."""
    names = [name for name, value in inputs.items() if value]
    return f"\n\nWarning: the method paper ignores {', '.join(names)}; the method native does not." if names else ""


def parts(text: str) -> tuple[str, ...]:
    """The parts between commas that are not empty."""
    return tuple(part.strip() for part in text.split(",") if part.strip())
