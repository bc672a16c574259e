from __future__ import annotations

import comfy.model_management
import comfy.utils
from comfy_api.v0_0_2 import io, ui

from . import schema
from .comfyui.pictures import to_image, wanted_theme
from .comfyui.queue import executing
from .comfyui.reporting import current_report

THEMES = ("auto", "light", "dark")


class Compare(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="QandC_Compare",
            display_name="Compare",
            category=schema.CATEGORY,
            description="Compares runs side by side: gain and cost of each, images, differences from the first, "
            "which steps were computed or reused, the factors K_t, and a table of measured times, PSNR and SSIM.",
            search_aliases=["compare", "psnr", "ssim", "report", "benchmark", "side by side", "a/b", "speedup"],
            inputs=[
                io.Autogrow.Input(
                    "images",
                    template=io.Autogrow.TemplatePrefix(
                        io.Image.Input(
                            "image", tooltip="Images of one run; the first run is what others are measured against."
                        ),
                        prefix="image",
                        min=2,
                        max=8,
                    ),
                    tooltip="Images of each run, the reference first.",
                ),
                io.Autogrow.Input(
                    "reports",
                    template=io.Autogrow.TemplatePrefix(
                        schema.Report.Input(
                            "report",
                            optional=True,
                            tooltip="Report of the run of the same number, from Sample or Run Report.",
                        ),
                        prefix="report",
                        min=0,
                        max=8,
                    ),
                    tooltip="Reports of the runs, in the order of the images.",
                ),
                io.Int.Input(
                    "shown", default=8, min=1, max=64, advanced=True, tooltip="Images of each run in the figure."
                ),
                io.Float.Input(
                    "difference_gain",
                    default=4.0,
                    min=1.0,
                    max=100.0,
                    step=0.5,
                    advanced=True,
                    tooltip="Factor by which differences are amplified.",
                ),
                io.Int.Input(
                    "repeats",
                    default=0,
                    min=0,
                    max=50,
                    optional=True,
                    tooltip="Samples every run this many more times, taking turns, after one warm-up round, to "
                    "measure the range of the speedup. 0 uses the times of the runs themselves.",
                ),
                io.Combo.Input(
                    "theme",
                    options=list(THEMES),
                    default=THEMES[0],
                    optional=True,
                    advanced=True,
                    tooltip="Colours of the figure. auto follows ComfyUI's theme.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="figure", tooltip="The comparison as one image; save it with Save Image."),
                io.String.Output(display_name="table", tooltip="The table as Markdown."),
                io.Image.Output(
                    display_name="full_size",
                    tooltip="The first image of every run, pixel for pixel, above its difference from the first run's.",
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        images: dict,
        shown: int,
        difference_gain: float,
        reports: dict | None = None,
        repeats: int = 0,
        theme: str = THEMES[0],
    ) -> io.NodeOutput:
        from ..qandc_core.evaluation.comparison import (  # drawing is no part of start-up
            ComparedRun,
            run_comparison,
            sampled_in_turns,
        )
        from ..qandc_core.evaluation.figure import THEMES as COLORS
        from ..qandc_core.evaluation.frames import ImageFrames
        from ..qandc_core.evaluation.panels import full_size

        found = {key.removeprefix("report"): current_report(report) for key, report in (reports or {}).items()}
        runs = []
        for key, batch in images.items():
            number = key.removeprefix("image")
            report = found.get(number)
            label = report.label if report else f"run {int(number) + 1}"
            runs.append(ComparedRun(label, ImageFrames(batch, label), report))
        said = [*unfilled(reports or {}, found), *unequal_jobs(runs)]
        if repeats:
            said += not_repeated(runs)
            runs = sampled_in_turns(runs, repeats, Bar().show)
        colors = COLORS[wanted_theme() if theme == THEMES[0] else theme]
        figure, table = run_comparison(runs, shown, difference_gain, Bar().show, colors, said)
        whole = full_size([run.label for run in runs], [run.images[0] for run in runs], difference_gain, colors)
        output = to_image(figure)
        preview = ui.PreviewImage(output, cls=cls).as_dict()
        return io.NodeOutput(output, table, to_image(whole), ui={**preview, "text": (table,)})


def unfilled(reports: dict, found: dict) -> list[str]:
    """Reports that are wired and hold no run."""
    empty = [key for key in reports if reports[key] is not None and found[key.removeprefix("report")] is None]
    if not empty:
        return []
    return [f"{', '.join(empty)}: nothing was sampled with the model of that Run Report; put it before the sampler"]


def unequal_jobs(runs) -> list[str]:
    """Reports of samplers that this job found cached, whose times are of another moment."""
    now = executing()
    jobs = {run.report.job for run in runs if run.report is not None and run.report.job}
    if now is None or len(jobs) < 2:
        return []
    earlier = [run.label for run in runs if run.report is not None and run.report.job not in ("", now[0].id)]
    return [f"Times of an earlier job: {', '.join(earlier)}; repeats measures all of them now"] if earlier else []


def not_repeated(runs) -> list[str]:
    """Runs that cannot be sampled again here, so that no range of their speedup is known."""
    lacking = [run.label for run in runs if run.report is None or run.report.replay is None]
    return [f"Not repeated: {', '.join(lacking)}, without a finished run of Sample or Run Report"] if lacking else []


class Bar:
    """A progress bar that ends the work when it is cancelled."""

    def __init__(self) -> None:
        self.bar = comfy.utils.ProgressBar(1)

    def show(self, done: int, total: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        self.bar.update_absolute(min(done, total), total)
