from __future__ import annotations

from pathlib import Path

import comfy.model_management as mm
import torch
from comfy_api.v0_0_2 import io
from comfy_execution.graph_utils import ExecutionBlocker

from ..qandc_core.calibration.file import load_calibration
from ..qandc_core.calibration.growth import check_recording
from ..qandc_core.calibration.presets import CUSTOM
from ..qandc_core.calibration.presets import preset_recording as recorded_by
from ..qandc_core.calibration.recorder import RecordingConfig
from ..qandc_core.calibration.recording import describe
from . import schema
from .comfyui.calibrate.recording import RECORDING, RunRecorder, record_runs, settle
from .comfyui.files import check_writable, file_state, named_path
from .comfyui.quantize.weights import fingerprint_of
from .comfyui.status import node_of, show
from .comfyui.wrappers import without


class CalibrateFromRuns(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="QandC_CalibrateFromRuns",
            display_name="Calibrate from Runs",
            category=schema.CATEGORY,
            description="Adds every run that samples with this model to a calibration: any sampler, guider, prompt, "
            "size and LoRA, without sampling twice. Each queued run adds to the file; the node says when there "
            "are enough.",
            search_aliases=["calibration", "record", "ptq", "gptq", "statistics", "any sampler"],
            inputs=[
                io.Model.Input("model", tooltip="The full-precision model, with the cache that will be used."),
                io.String.Input(
                    "name",
                    default="runs",
                    tooltip="Calibration to add the runs to: the file of this name in output/qandc. Each expert of a "
                    "two-expert model needs its own name.",
                ),
                io.Boolean.Input(
                    "record",
                    default=True,
                    tooltip="On: add runs. Off: pass the model on unchanged and output the recorded calibration.",
                ),
                io.Int.Input(
                    "samples",
                    default=RecordingConfig.samples,
                    min=1,
                    max=1024,
                    tooltip="Calibration samples per run, spread over its steps, prompts and images; at most a tenth "
                    "of the run, at least one.",
                ),
                schema.hessians(),
                schema.memory_gb(advanced=True),
                schema.tokens(),
                schema.held_out("Model calls held out of the runs for Quantize to measure its error on. 0 = none."),
                io.Int.Input(
                    "reset",
                    default=RecordingConfig.reset,
                    min=0,
                    max=2**31,
                    advanced=True,
                    tooltip="Change this number to start the calibration over with the next run.",
                ),
                schema.preset(
                    "quick, standard and thorough choose samples, hessians, memory_gb and tokens for the memory of "
                    "this machine. custom = as set."
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The model; wire it to any sampler or guider."),
                schema.Calibration.Output(
                    "calibration",
                    display_name="calibration",
                    tooltip="The recorded calibration, once record is off. Until then, nodes that need it do not run.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, name, record, **kwargs):
        if record:
            return ""
        settle()
        return file_state(named_path(name).name)

    @classmethod
    def execute(
        cls,
        model: io.Model.Type,
        name: str,
        record: bool,
        samples: int,
        hessians: bool,
        memory_gb: float,
        tokens: int,
        held_out: int,
        reset: int,
        preset: str = CUSTOM,
    ) -> io.NodeOutput:
        path, node_id = named_path(name), node_of(cls)
        config = RecordingConfig(samples, hessians, memory_gb, tokens, held_out, reset)
        config = recorded_by(preset, config, mm.get_total_memory(torch.device("cpu")))
        if not record:
            return io.NodeOutput(without(model, RECORDING), recorded_calibration(path, model, node_id))
        recorder = RunRecorder(path, config, fingerprint_of(model), node_id)
        made = record_runs(model, recorder)
        check_writable()
        begun = check_recording(path, recorder.fingerprint, config)
        show(node_id, f"{path.name}: {'no runs yet' if begun is None else describe(begun)}")
        return io.NodeOutput(made, ExecutionBlocker(None))


def recorded_calibration(path: Path, model, node_id: str | None):
    """The calibration that runs of this model made, or what blocks nodes that need it."""
    settle()
    if not path.is_file():
        return ExecutionBlocker(f"There is no {path.name} in output/qandc yet; set record to on and sample.")
    calibration = load_calibration(path)
    calibration.check_fingerprint(fingerprint_of(model))
    if calibration.recording is None:
        raise ValueError(f"{path.name} was not made by Calibrate from Runs; pick it in TAP Calibrate instead.")
    show(node_id, f"{path.name}: {calibration.recording.describe()}")
    return calibration
