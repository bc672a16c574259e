"""Wire types and inputs that several nodes have."""

from __future__ import annotations

from collections.abc import Mapping

import comfy.samplers
from comfy_api.v0_0_2 import io

from ..qandc_core.calibration.choice import CalibrationConfig
from ..qandc_core.calibration.presets import PRESET_NAMES
from ..qandc_core.quantization.native import NATIVE_ROUNDINGS
from .comfyui.settings import AUTO, AUTO_CFG, AUTO_STEPS, LAST_STEP

Calibration = io.Custom("QANDC_CALIBRATION")
Report = io.Custom("QANDC_REPORT")

CATEGORY = "Q&C"
MAX_SEED = 0xFFFFFFFFFFFFFFFF


def conditioning(optional: bool = False) -> list[io.Input]:
    return [
        io.Conditioning.Input(
            "positive", optional=optional, tooltip="What to generate: from Class Label, or a prompt for other models."
        ),
        io.Conditioning.Input(
            "negative", optional=optional, tooltip="What guidance moves away from: no class, or a negative prompt."
        ),
    ]


def latent(tooltip: str, optional: bool = False) -> io.Input:
    return io.Latent.Input("latent_image", optional=optional, tooltip=tooltip)


def sampler_settings(purpose: str) -> list[io.Input]:
    return [
        io.Int.Input(
            "steps",
            default=AUTO_STEPS,
            min=0,
            max=1000,
            tooltip=f"Sampling steps {purpose}. 0 = the model's default; set them for turbo or lightning models.",
        ),
        io.Float.Input(
            "cfg",
            default=AUTO_CFG,
            min=AUTO_CFG,
            max=100.0,
            step=0.1,
            round=0.01,
            tooltip=f"Classifier-free guidance scale {purpose}. 1 = no guidance. -1 = the model's default; set it for "
            "turbo or lightning models.",
        ),
        io.Combo.Input(
            "sampler_name",
            options=[AUTO, *comfy.samplers.SAMPLER_NAMES],
            default=AUTO,
            tooltip=f"Sampler {purpose}. auto = the model's default.",
        ),
        io.Combo.Input(
            "scheduler",
            options=[AUTO, *comfy.samplers.SCHEDULER_NAMES],
            default=AUTO,
            tooltip=f"Noise schedule {purpose}. auto = the model's default.",
        ),
    ]


def wired_sampling() -> list[io.Input]:
    """Prompts, and what SamplerCustomAdvanced and KSampler (Advanced) take, all optional."""
    return [
        io.Conditioning.Input(
            "prompts",
            optional=True,
            tooltip="Further prompts, which take turns with the positive one. Every entry added by Conditioning "
            "(Combine) and every row of a batch is a prompt of its own.",
        ),
        io.Guider.Input(
            "guider",
            optional=True,
            tooltip="The GUIDER of SamplerCustomAdvanced. It replaces positive, negative and cfg.",
        ),
        io.Sampler.Input(
            "sampler", optional=True, tooltip="The SAMPLER of a custom sampler node, instead of sampler_name."
        ),
        io.Sigmas.Input(
            "sigmas", optional=True, tooltip="The SIGMAS of a custom sampler node, instead of steps and scheduler."
        ),
        io.Noise.Input(
            "noise",
            optional=True,
            tooltip="The NOISE of SamplerCustomAdvanced, instead of calibration_seed; further batches take the next "
            "seeds.",
        ),
        io.Int.Input(
            "start_at_step",
            default=0,
            min=0,
            max=LAST_STEP,
            optional=True,
            advanced=True,
            tooltip="As in KSampler (Advanced): the first step of this model. To continue the run of another model, "
            "also wire that one's latent and turn add_noise off.",
        ),
        io.Int.Input(
            "end_at_step",
            default=LAST_STEP,
            min=0,
            max=LAST_STEP,
            optional=True,
            advanced=True,
            tooltip="As in KSampler (Advanced): the step before which this model stops.",
        ),
        io.Boolean.Input(
            "return_with_leftover_noise",
            default=False,
            optional=True,
            advanced=True,
            label_on="enable",
            label_off="disable",
            tooltip="As in KSampler (Advanced): keep the noise that is left after end_at_step, for another model to "
            "remove.",
        ),
        io.Boolean.Input(
            "add_noise",
            default=True,
            optional=True,
            advanced=True,
            label_on="enable",
            label_off="disable",
            tooltip="As in KSampler (Advanced): turn off if the latent already contains noise from another sampler.",
        ),
        fraction(
            "denoise", 1.0, "As in KSampler: below 1, part of the input image is kept.", optional=True, advanced=True
        ),
    ]


def fraction(name: str, default: float, tooltip: str, **flags: bool) -> io.Input:
    """A number from 0 to 1, such as a place in a run."""
    return io.Float.Input(name, default=default, min=0.0, max=1.0, step=0.01, tooltip=tooltip, **flags)


def label() -> io.Input:
    return io.String.Input(
        "label",
        default="",
        tooltip="Name of the run in Compare. Empty = named after the cache, quantization and compensation on the "
        "model.",
    )


def filename_prefix(default: str) -> io.Input:
    return io.String.Input(
        "filename_prefix",
        default=default,
        advanced=True,
        tooltip="Prefix of new files; the model, the date and a number are appended.",
    )


def held_out(tooltip: str, **flags: bool) -> io.Input:
    return io.Int.Input(
        "held_out", default=CalibrationConfig.held_out, min=0, max=256, advanced=True, tooltip=tooltip, **flags
    )


def hessians() -> io.Input:
    return io.Boolean.Input(
        "hessians",
        default=CalibrationConfig.hessians,
        advanced=True,
        tooltip="Collect the input Hessian (X^T X) of every layer, which GPTQ needs. Off saves memory.",
    )


def memory_gb(**flags: bool) -> io.Input:
    return io.Float.Input(
        "memory_gb",
        default=CalibrationConfig.memory_gb,
        min=0.1,
        max=1024.0,
        step=0.1,
        tooltip="Memory limit of the statistics in GiB. A lower limit keeps fewer tokens per layer.",
        **flags,
    )


def tokens(**flags: bool) -> io.Input:
    return io.Int.Input(
        "tokens",
        default=CalibrationConfig.tokens,
        min=64,
        max=1048576,
        advanced=True,
        tooltip="Maximum number of tokens kept per layer, where they take less memory than its Hessian.",
        **flags,
    )


def max_layer_error() -> io.Input:
    return io.Float.Input(
        "max_layer_error",
        default=0.1,
        min=0.0,
        max=1.0,
        step=0.01,
        round=0.001,
        tooltip="Layers with a larger relative error get the next finer format, or stay in full precision. 0 = no "
        "limit.",
    )


def skip(what: str, example: str = "") -> io.Input:
    return io.String.Input(
        "skip",
        default="",
        advanced=True,
        tooltip=f"{what} to keep as they are: parts of their names, separated by commas{example}.",
    )


def include(otherwise: str, **flags: bool) -> io.Input:
    return io.String.Input(
        "include",
        default="",
        advanced=True,
        tooltip="Layers outside the transformer blocks to quantize as well: parts of their names, separated by "
        f"commas. {otherwise}",
        **flags,
    )


def rounding(gptq: str) -> io.Input:
    return io.Combo.Input(
        "rounding", options=list(NATIVE_ROUNDINGS), default=NATIVE_ROUNDINGS[0], advanced=True, tooltip=gptq
    )


def preset(sets: str) -> io.Input:
    return io.Combo.Input("preset", options=list(PRESET_NAMES), default=PRESET_NAMES[0], optional=True, tooltip=sets)


def parse_numbers(text: str, names: Mapping[str, int] | None = None, example: str = "0-4, 8") -> tuple[int, ...]:
    """Numbers of a comma-separated list of numbers, ranges and, where given, names in lower case; else ValueError."""
    numbers: list[int] = []
    for part in filter(None, (part.strip().lower() for part in text.split(","))):
        first, dash, last = (piece.strip() for piece in part.partition("-"))
        if names and part in names:
            numbers.append(names[part])
        elif part.isdecimal():
            numbers.append(int(part))
        elif dash and first.isdecimal() and last.isdecimal() and int(first) <= int(last) < 10**6:
            numbers.extend(range(int(first), int(last) + 1))
        else:
            known = ", nor a name that is known" if names else ""
            raise ValueError(
                f"{part!r} is neither a number, nor a range such as 0-9{known}; write for example {example}."
            )
    if not numbers:
        raise ValueError(f"The list is empty; write for example {example}.")
    return tuple(numbers)
