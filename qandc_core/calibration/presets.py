"""How much to calibrate: three efforts that choose numbers by the model, the size of a sample and the memory.

X^T X (K, K) of a layer's inputs from M tokens is uncertain by K / M, so what counts is tokens for each input. On
correlated inputs GPTQ gains most up to M = 2 K and little beyond M = 8 K if tokens are independent; those of an image
are not, and images at several steps differ more than tokens of one do. An effort therefore asks for a number of tokens
per input and for a least number of samples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from .choice import CalibrationConfig
from .recorder import RecordingConfig

CUSTOM = "custom"
LEAST_GB = 1.5  # with which the largest models keep some inputs of every layer
ACTIVATIONS, ACTIVATIONS_SHARE = 2 * 2**30, 8


@dataclass(frozen=True)
class Effort:
    """`per_input` tokens for each input of a layer, from `least` to `most` samples of at least `trajectories`; `tokens`
    kept of a layer whose X^T X is larger, within a `memory` share of the system's; `a_run` samples of a recorded run.
    """

    per_input: int
    least: int
    most: int
    trajectories: int
    tokens: int
    memory: float
    a_run: int


EFFORTS = {
    "quick": Effort(8, 32, 96, 4, 2048, 1 / 16, 4),
    "standard": Effort(32, 96, 400, 8, 4096, 1 / 8, 8),
    "thorough": Effort(128, 256, 1600, 16, 8192, 1 / 4, 16),
}
PRESET_NAMES = (CUSTOM, *EFFORTS)


def preset_config(
    preset: str, config: CalibrationConfig, width: int, tokens: int, steps: int, memory: int
) -> CalibrationConfig:
    """The config with the numbers of a preset: for layers of `width` inputs, samples of so many tokens, runs of so many
    steps, of which a cache may reuse half, and `memory` bytes of the system. "custom" leaves it as it is.
    """
    if preset == CUSTOM:
        return config
    effort = effort_of(preset)
    samples = min(max(math.ceil(effort.per_input * width / tokens), effort.least), effort.most)
    trajectories = max(effort.trajectories, math.ceil(2 * samples / max(steps, 1)))
    return replace(config, trajectories=trajectories, samples=samples, **kept(effort, memory))


def preset_recording(preset: str, config: RecordingConfig, memory: int) -> RecordingConfig:
    """The same for recorded runs, however long and large they are."""
    if preset == CUSTOM:
        return config
    effort = effort_of(preset)
    return replace(config, samples=effort.a_run, **kept(effort, memory))


def kept(effort: Effort, memory: int) -> dict[str, Any]:
    """By the memory that there is, not by what is free: the same inputs have to give the same calibration."""
    return {
        "hessians": True,
        "tokens": effort.tokens,
        "memory_gb": max(LEAST_GB, round(effort.memory * memory / 2**30, 1)),
    }


def images_at_once(needed: float, total: int, most: int) -> int:
    """1, 2, 4, ... up to `most`: as many images of `needed` bytes of activations as take 2 GiB, or an eighth of a
    device with less than 16 GiB in `total`, beside the weights.
    """
    room = min(ACTIVATIONS, total // ACTIVATIONS_SHARE)
    fitting = min(most, max(1, int(room // max(1, needed))))
    return 1 << (fitting.bit_length() - 1)


def effort_of(preset: str) -> Effort:
    if preset not in EFFORTS:
        raise ValueError(f"preset must be one of {', '.join(PRESET_NAMES)}, got {preset!r}.")
    return EFFORTS[preset]
