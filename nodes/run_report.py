from __future__ import annotations

from comfy_api.v0_0_2 import io

from . import schema
from .comfyui.reporting import ReportRecorder
from .comfyui.status import node_of


class RunReport(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="QandC_RunReport",
            display_name="Run Report",
            category=schema.CATEGORY,
            description="Measures any run that samples the model: time of every step, which steps were computed or "
            "reused, memory. Put it in front of any sampler or guider; the node shows the measurements, and "
            "Compare sets runs side by side. The images do not change.",
            search_aliases=["report", "benchmark", "timing", "speed", "seconds per step", "profile", "memory"],
            inputs=[
                io.Model.Input("model", tooltip="The MODEL to measure, on its way to a sampler or guider."),
                schema.label(),
                schema.Report.Input(
                    "report",
                    optional=True,
                    tooltip="Report of the model that samples before this one, where two models share the steps. The "
                    "two are joined.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The same model, measured when it samples."),
                schema.Report.Output(
                    "report",
                    display_name="report",
                    tooltip="For Compare, beside the images of the same run. Filled in when the sampler has finished.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            not_idempotent=True,  # ComfyUI must not give one node what another with the same inputs made
        )

    @classmethod
    def execute(cls, model: io.Model.Type, label: str, report=None) -> io.NodeOutput:
        recorder = ReportRecorder(label, node_of(cls), report)
        return io.NodeOutput(recorder.attach(model), recorder)
