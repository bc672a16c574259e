"""Wire types and inputs that several nodes have."""

from __future__ import annotations

from collections.abc import Mapping

import comfy.samplers
from comfy_api.v0_0_2 import io

Calibration = io.Custom("QANDC_CALIBRATION")
Report = io.Custom("QANDC_REPORT")

CATEGORY = "Q&C"
MAX_SEED = 0xFFFFFFFFFFFFFFFF


def conditioning(optional: bool = False) -> list[io.Input]:
    return [
        io.Conditioning.Input(
            "positive", optional=optional, tooltip="What to draw: from Class Label, or a prompt for other models."
        ),
        io.Conditioning.Input(
            "negative", optional=optional, tooltip="What guidance moves away from: no class, or a negative prompt."
        ),
    ]


def latent(tooltip: str, optional: bool = False) -> io.Input:
    return io.Latent.Input("latent_image", optional=optional, tooltip=tooltip)


def sampler_settings(purpose: str) -> list[io.Input]:
    return [
        io.Int.Input("steps", default=50, min=1, max=1000, tooltip=f"Sampling steps {purpose}."),
        io.Float.Input(
            "cfg",
            default=1.5,
            min=0.0,
            max=100.0,
            step=0.1,
            round=0.01,
            tooltip=f"Classifier-free guidance scale {purpose}; 1 is no guidance.",
        ),
        io.Combo.Input(
            "sampler_name",
            options=comfy.samplers.SAMPLER_NAMES,
            default="ddpm",
            tooltip=f"Sampler {purpose}. ddpm is the one DiT was published with.",
        ),
        io.Combo.Input(
            "scheduler",
            options=comfy.samplers.SCHEDULER_NAMES,
            default="normal",
            tooltip=f"Noise schedule {purpose}. normal gives DiT's own timesteps.",
        ),
    ]


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
