"""A CLIP whose large text encoders are in ComfyUI's quantized formats, calibrated on prompts.

ComfyUI decodes a text encoder's weights at every call and multiplies in full precision, so activations are not
quantized, and a format saves memory but no time.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import comfy.model_management as mm
from torch import Tensor

from ....qandc_core.calibration.statistics import LayerStatistics
from ....qandc_core.calibration.token_inputs import feeds_of, groups_of, statistics_of
from ....qandc_core.numerics import relative_error
from ....qandc_core.quantization.budget import Budget, LayerSource, quantize_layers
from ....qandc_core.quantization.formats import BY_NAME
from ....qandc_core.quantization.gptq import rounding_cost
from ....qandc_core.quantization.native import COLLAPSE, NativeConfig, NativeLayer
from ....qandc_core.quantization.report import (
    LayerReport,
    QuantizationReport,
    layer_reports,
    mean_error,
    percent,
    sizes,
)
from ....qandc_core.sampling.clock import Stopwatch
from ..quantize.formats import check_supported
from ..quantize.layers import all_linears, check_loras, narrower
from ..quantize.native import check_decodable, make_room, packed_sources, unmatched_parts
from ..quantize.weights import SourceWeights
from ..quantize.work import Work
from .copies import HALF, copied_clip
from .encode import Answers, tokens_of
from .found import Encoder, encoders_of, quantizable_encoders, quantizable_layers

log = logging.getLogger(__name__)
STATISTICS = 4 * 2**30  # bytes of X^T X at a time: four passes over the prompts for T5-XXL
LEAST_PROMPTS, MOST_HELD_OUT = 16, 8
KERNELS = "none, ComfyUI decodes text encoders and multiplies in full precision"


@dataclass(frozen=True)
class TextSettings:
    """Settings of the node Quantize Text Encoder; parts of names are of names such as t5xxl.encoder.block.0."""

    format: str = "W8A8"
    rounding: str = "auto"
    max_error: float | None = None
    skip: tuple[str, ...] = ()
    include: tuple[str, ...] = ()


@dataclass(frozen=True)
class Part:
    """The result for one encoder: its size in a file before and after, and its error (see QuantizationReport)."""

    name: str
    before: int
    after: int
    error: tuple[float, float, int]


@dataclass(frozen=True)
class TextReport:
    """The layers of all encoders together, each encoder, and the encoders that stay as they are with their sizes."""

    layers: QuantizationReport
    parts: list[Part]
    stay: dict[str, int]
    prompts: int

    def said(self) -> list[str]:
        """Sentences about the files, the encoders that are not quantized, and the prompts."""
        found = [
            f"{p.name}: {sizes(p.before, p.after)} with all other weights, {percent(p.error[0])} error"
            for p in self.parts
        ]
        if self.stay:
            found.append(
                "not quantized: " + ", ".join(f"{name} {size / 2**20:.0f} MiB" for name, size in self.stay.items())
            )
        return [*found, f"calibrated on {self.prompts} prompts" if self.prompts else "rounded to nearest"]


def divided(prompts: Sequence[str], more: Sequence[str]) -> tuple[list[str], list[str]]:
    """Prompts to calibrate on and prompts held out, every fourth up to 8; general ones fill up to 16."""
    own = list(dict.fromkeys(prompts))
    own += [prompt for prompt in more if prompt not in own][: max(0, LEAST_PROMPTS - len(own))]
    held_out = own[3::4][:MOST_HELD_OUT]
    return [prompt for prompt in own if prompt not in held_out], held_out


def quantize_encoders(
    clip, settings: TextSettings, prompts: Sequence[str], held_out: Sequence[str], node_id: str | None = None
) -> tuple[Any, TextReport]:
    """A CLIP with quantized encoders, which shares all other weights with the given one and leaves it as it is.

    Raises ValueError where this ComfyUI lacks the format or its loaders take none of the encoders quantized, on layers
    that are as narrow already, and where the result is far from full precision.
    """
    check_supported(settings.format)
    check_loras(clip.patcher)
    encoders = chosen_encoders(clip, settings)
    watch = Stopwatch(clip.patcher.load_device)
    used = [] if settings.rounding == "nearest" else list(prompts)
    costs = sum(rounding_cost(layer) for layers in encoders.values() for layer in layers.values())
    calls = (len(used) + len(held_out)) * (1 + len(encoders)) + 2 * len(held_out) * len(encoders)
    work = Work(clip.patcher, costs, calls, node_id)

    def tokens(prompts: Sequence[str]) -> dict[str, list[Any]]:
        return tokens_of(clip, list(encoders), prompts, lambda: work.did("calls", 1, "reading the prompts"))

    texts, others = tokens(used), tokens(held_out)
    tasks = {
        encoder.name: Task(clip, encoder, layers, texts[encoder.name], others[encoder.name], settings, work)
        for encoder, layers in encoders.items()
        if others[encoder.name]  # some run only where a prompt asks for them
    }
    exact = {name: task.outputs(clip) for name, task in tasks.items()}
    layers = {name: task.quantized() for name, task in tasks.items()}
    done = {name: {key: one for key, one in found.items() if one is not None} for name, found in layers.items()}
    if not any(done.values()):
        raise ValueError(
            f"Nothing would be quantized: in {settings.format} and every finer format all layers have a relative error "
            f"above max_layer_error = {settings.max_error or 0:g}; raise it, or set 0 for no limit."
        )
    quantized = copied_clip(clip, done)
    quantized.encode_from_tokens(quantized.tokenize(held_out[0]))  # sets its encoders as CLIP Text Encode does
    errors = {
        name: [relative_error(*pair) for pair in zip(task.outputs(quantized), exact[name])]
        for name, task in tasks.items()
    }
    report = reported(clip, quantized, settings, tasks, layers, errors, watch.seconds(), len(used))
    check_near(report, settings)
    log.info("Q&C quantization: %s; %s", report.layers.summary(), "; ".join(report.said()))
    return quantized, report


def chosen_encoders(clip, settings: TextSettings) -> dict[Encoder, dict[str, Any]]:
    """Encoders to quantize and their layers. Raises ValueError where there are none."""
    able = quantizable_encoders(clip)
    if not able:
        names = ", ".join(encoder.name for encoder in encoders_of(clip)) or type(clip.cond_stage_model).__name__
        raise ValueError(
            f"ComfyUI's loaders do not support a quantized {names}; Quantize Text Encoder is for T5, umT5, Qwen, "
            "Llama, Gemma, Mistral and their like."
        )
    found = {}
    refusal = f"This CLIP has no linear layer left to quantize with skip = {', '.join(settings.skip) or 'nothing'}."
    for encoder in able:
        layers = quantizable_layers(encoder, settings.skip, settings.include)
        if not layers:
            continue
        check_decodable(list(layers.items()), "Load CLIP")
        try:
            found[encoder] = dict(narrower(list(layers.items()), BY_NAME[settings.format]))
        except ValueError as error:
            refusal = str(error).replace("This model", encoder.name)
    if not found:
        raise ValueError(refusal)
    return found


def ignored_parts(clip, settings: TextSettings) -> list[str]:
    """A sentence for each part of `skip` and `include` that no layer's name contains."""
    names = [f"{e.name}.{name}" for e in quantizable_encoders(clip) for name in all_linears(e.network)]
    return unmatched_parts(names, settings.skip, settings.include)


class Task:
    """Quantizing one encoder of a CLIP: statistics on the tokens `texts`, errors on those held out."""

    def __init__(self, clip, encoder: Encoder, layers, texts, held_out, settings: TextSettings, work: Work):
        self.clip, self.encoder, self.layers, self.settings, self.work = clip, encoder, layers, settings, work
        self.texts, self.held_out = texts, held_out
        stored = HALF if encoder.network.dtype.itemsize == 1 else None
        self.weights = SourceWeights(clip.patcher, True, stored, encoder.root)
        self.answers = Answers(clip, encoder)
        self.errors: dict[str, float] = {}

    def outputs(self, clip) -> list[Tensor]:
        """The encoder's answers to held-out prompts as it is in this CLIP."""
        model = clip.cond_stage_model.get_submodule(self.encoder.name)
        answers, found = Answers(clip, Encoder(self.encoder.name, model)), []
        with answers.ready():
            for tokens in self.held_out:
                found.append(answers.output(tokens))
                self.work.did("calls", 1, "measuring the text encoder's error")
        return found

    def quantized(self) -> dict[str, NativeLayer | None]:
        """Layers that the prompts run, by their names in a file; None where one stays as it is."""
        with self.answers.ready():
            feeds = feeds_of(self.layers, lambda: self.answers.run(self.held_out[0]))
        settings, device = self.settings, mm.get_torch_device()
        size = self.weights.bytes(feeds)
        config = NativeConfig(settings.format, settings.rounding, rounds_inputs=False)
        found: dict[str, NativeLayer | None] = {}
        groups = groups_of(feeds, STATISTICS)
        for group in groups:
            statistics = self.statistics(feeds, group, len(groups))
            make_room([self.layers[name] for name in group], device)
            sources = [LayerSource(name, partial(self.weights.layer, name, device), size[name]) for name in group]
            found |= quantize_layers(sources, config, statistics, Budget(settings.max_error), self.rounded)
        return found

    def statistics(self, feeds, group: Sequence[str], groups: int) -> dict[str, LayerStatistics]:
        room = mm.get_free_memory(self.clip.patcher.load_device) // 2

        def settle(statistics: LayerStatistics) -> None:
            nonlocal room
            room -= statistics.settle(self.clip.patcher.load_device, room)

        def run(tokens: Any) -> None:
            try:
                self.answers.run(tokens)
            finally:
                self.work.did("calls", 1 / groups, "calibrating")

        with self.answers.ready():
            return statistics_of(
                self.layers, feeds, group, run, self.texts, self.held_out, self.answers.counted, settle
            )

    def rounded(self, name: str, error: float) -> None:
        self.errors[name] = error
        words = f"{self.encoder.name}, layer {len(self.errors)} of {len(self.layers)}"
        cost = rounding_cost(self.layers[name])
        self.work.did("rounding", cost, words)


def reported(clip, quantized, settings, tasks, layers, errors, seconds: float, prompts: int) -> TextReport:
    rows: list[LayerReport] = []
    sources: Counter[str] = Counter()
    for name, task in tasks.items():
        sources.update(packed_sources(task.encoder.network, list(layers[name])))
        rows += layer_reports(layers[name], task.weights.bytes(layers[name]), f"{name}.")
    after = {encoder.name: encoder.bytes for encoder in encoders_of(quantized)}
    parts = [Part(name, task.encoder.bytes, after[name], mean_error(errors[name])) for name, task in tasks.items()]
    whole = mean_error([sum(each) / len(each) for each in zip(*errors.values())])
    subject = "text encoder" if len(parts) == 1 else "text encoders"
    report = QuantizationReport(
        settings.format, rows, seconds, KERNELS, whole, dict(sources), subject=subject, sample="prompt"
    )
    stay = {encoder.name: encoder.bytes for encoder in encoders_of(clip) if encoder.name not in tasks}
    return TextReport(report, parts, stay, prompts)


def check_near(report: TextReport, settings: TextSettings) -> None:
    for part in report.parts:
        if not part.error[0] < COLLAPSE:
            raise ValueError(
                f"{part.name} in {settings.format} is {part.error[0]:.2f} away from full precision on held-out "
                f"prompts, the worst layer is {report.layers.worst.name}; set max_layer_error, skip layers, or "
                "use W8A8."
            )
