from __future__ import annotations

from comfy_api.v0_0_2 import io, ui

from ..qandc_core.quantization.model import QuantizationConfig
from .comfyui import types
from .comfyui.quantization import quantized_patcher

BITS = {"W8A8": (8, 8), "W4A8": (4, 8)}
ACTIVATIONS = {"auto": None, "static": True, "dynamic": False}


class Quantize(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="QandC_Quantize",
            display_name="Quantize",
            category=types.CATEGORY,
            description="Makes an integer copy of a DiT: 8- or 4-bit weights, 8-bit activations. What was attached, "
            "such "
            "as a cache, stays on; LoRAs become part of the weights. Save it with the stock node ModelSave.",
            search_aliases=["int8", "w8a8", "w4a8", "ptq", "gptq", "quantization"],
            inputs=[
                io.Model.Input("model", tooltip="A DiT in full precision; it stays as it is."),
                types.Calibration.Input(
                    "calibration", optional=True,
                    tooltip="From TAP Calibrate. Without it activations are scaled anew for every token.",
                ),
                io.Combo.Input(
                    "format", options=list(BITS), default="W8A8",
                    tooltip="Bits of weights and activations. W4A8 halves the size again and costs more quality.",
                ),
                io.Combo.Input(
                    "activations", options=list(ACTIVATIONS), default="auto", advanced=True,
                    tooltip="static: one calibrated scale for each layer (the paper). dynamic: one for each token. "
                    "auto: static "
                    "where a calibration is wired.",
                ),
                io.Combo.Input(
                    "rounding", options=["nearest", "gptq"], default="nearest", advanced=True,
                    tooltip="gptq chooses weights by their effect on calibrated outputs; it needs hessians in TAP "
                    "Calibrate.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The quantized model.")],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model: io.Model.Type, format: str, activations: str, rounding: str, calibration=None
    ) -> io.NodeOutput:
        config = QuantizationConfig(static=ACTIVATIONS[activations], rounding=rounding)
        quantized, report = quantized_patcher(model, *BITS[format], calibration, config)
        return io.NodeOutput(quantized, ui=ui.PreviewText(report))
