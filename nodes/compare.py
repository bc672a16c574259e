from __future__ import annotations

import comfy.model_management
import comfy.utils
from comfy_api.v0_0_2 import io, ui

from . import schema
from .comfyui.pictures import to_image


class Compare(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="QandC_Compare",
            display_name="Compare",
            category=schema.CATEGORY,
            description="Puts runs side by side: images, difference from the first, which steps were computed or "
            "reused, the "
            "factors K_t, and a table of measured time, PSNR and SSIM.",
            search_aliases=["compare", "psnr", "ssim", "report", "benchmark", "side by side"],
            inputs=[
                io.Autogrow.Input(
                    "images",
                    template=io.Autogrow.TemplatePrefix(
                        io.Image.Input("image", tooltip="Images of one run; the first run is what others are "
                        "measured against."),
                        prefix="image", min=2, max=8,
                    ),
                    tooltip="Images of each run, the reference first.",
                ),
                io.Autogrow.Input(
                    "reports",
                    template=io.Autogrow.TemplatePrefix(
                        schema.Report.Input("report", optional=True, tooltip="Report of the run of the same number, "
                        "from Sample."),
                        prefix="report", min=0, max=8,
                    ),
                    tooltip="Reports of the runs, in the order of the images.",
                ),
                io.Int.Input("shown", default=8, min=1, max=64, advanced=True, tooltip="Images of each run in the "
                "figure."),
                io.Float.Input(
                    "difference_gain", default=4.0, min=1.0, max=100.0, step=0.5, advanced=True,
                    tooltip="How much the difference is enlarged.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="figure", tooltip="The comparison as one image; save it with Save Image."),
                io.String.Output(display_name="table", tooltip="The table as Markdown."),
            ],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    def execute(cls, images: dict, shown: int, difference_gain: float, reports: dict | None = None) -> io.NodeOutput:
        from ..qandc_core.evaluation.comparison import ComparedRun, run_comparison  # drawing is no part of start-up
        from ..qandc_core.evaluation.frames import ImageFrames

        reports = {key.removeprefix("report"): report for key, report in (reports or {}).items()}
        runs = []
        for key, batch in images.items():
            number = key.removeprefix("image")
            report = reports.get(number)
            label = report.label if report else f"run {int(number) + 1}"
            runs.append(ComparedRun(label, ImageFrames(batch, label), report))
        figure, table = run_comparison(runs, shown, difference_gain, Bar().show)
        output = to_image(figure)
        preview = ui.PreviewImage(output, cls=cls).as_dict()
        return io.NodeOutput(output, table, ui={**preview, "text": (table,)})


class Bar:
    """A progress bar that ends the work when it is cancelled."""

    def __init__(self) -> None:
        self.bar = comfy.utils.ProgressBar(1)

    def show(self, done: int, total: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        self.bar.update_absolute(done, total)
