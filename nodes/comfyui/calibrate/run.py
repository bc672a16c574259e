"""Calibration on a MODEL's own trajectories, with its cache on: candidates, TAP, then statistics of the chosen."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import comfy.samplers
import torch
from torch import Tensor, nn

from ....qandc_core.calibration.calls import ModelCall
from ....qandc_core.calibration.file import Calibration, load_calibration
from ....qandc_core.calibration.memory import StatisticsPlan, plan_statistics
from ....qandc_core.calibration.statistics import LayerStatistics, observed
from ..model.dit import is_dit
from ..quantize.layers import check_not_quantized, quantizable
from ..quantize.weights import fingerprint_of
from ..sampling import Progress, Settings, fitted_latent, sample_new
from ..wrappers import WRAPPERS, details, replace_wrapper
from .candidates import SELECTIONS, Candidates, Choice, Collecting, Plan
from .layer_inputs import HELD_OUT_ROWS, Observing

__all__ = ["SELECTIONS", "Plan", "calibrate", "digest_of", "empty_latent"]
KEY = "qandc_calibration"
VERSION = 1  # of what a partial file notes
log = logging.getLogger(__name__)
Layers = Sequence[tuple[str, nn.Module]]


@dataclass
class Standing:
    """How far a calibration has come: what was chosen, and what `runs` sampling runs of the second pass found."""

    choice: Choice
    distances: Tensor | None
    statistics: dict[str, LayerStatistics]
    held_out: tuple[ModelCall, ...] = ()
    runs: int = 0
    sigmas: tuple[float, ...] = ()  # noise levels of the run, which distances belong to

    def result(self, model: str) -> Calibration:
        """As a calibration, with notes on what is not found in one."""
        places = {"samples": self.choice.samples.tolist(), "held_out": self.choice.held_out.tolist()}
        notes = {**places, "runs": self.runs, **({"sigmas": list(self.sigmas)} if self.sigmas else {})}
        return Calibration(model, self.statistics, distances=self.distances, notes=notes, held_out=self.held_out)


def calibrate(patcher, settings: Settings, latent: Tensor, plan: Plan, partial: Path | None = None) -> Calibration:
    """Statistics of every linear layer's input, distances between steps, and calls that are held out.

    latent is as `empty_latent` gives it. The same trajectories are sampled twice, first to find candidates and then to
    observe the chosen, so that a layer sees exactly what it sees in use: nothing on steps where the cache skips it.
    Works on any MODEL. The file `partial` keeps what is done; a later call with the same arguments goes on from there.
    """
    return Calibrating(patcher, settings, latent, plan, partial).run()


class Calibrating:
    """Both passes over one model's trajectories."""

    def __init__(self, patcher, settings: Settings, latent: Tensor, plan: Plan, partial: Path | None):
        self.patcher, self.settings, self.latent, self.plan, self.partial = patcher, settings, latent, plan, partial
        check_not_quantized(patcher.model.diffusion_model)
        self.layers = quantizable(patcher.model.diffusion_model)
        if not self.layers:
            raise ValueError(
                "This model has no linear layer of ComfyUI's within blocks, so there is nothing to calibrate."
            )
        self.space = planned(self.layers, plan)
        self.model, self.progress = fingerprint_of(patcher), Progress(patcher, 0)

    def run(self) -> Calibration:
        if self.partial is not None and self.partial.is_file():
            standing = resumed(load_calibration(self.partial), dict(self.layers), self.space)
            log.info("Q&C calibration: goes on from %s.", self.partial.name)
        else:
            standing = self.first_pass()
            self.keep(standing)
        self.second_pass(standing)
        leave_out_unseen(standing.statistics, all_run=is_dit(self.patcher))
        return standing.result(self.model)

    def first_pass(self) -> Standing:
        """Samples all trajectories and chooses; layers that never run are left out."""
        candidates, ran, batches = Candidates(), set[str](), list(self.plan.batches())
        self.progress.total = 2 * self.settings.steps * len(batches)
        for run, batch in enumerate(batches):
            with observed(self.layers, lambda name, _: ran.add(name)):
                self.sample(Collecting(candidates, run), batch)
        unused = [name for name, _ in self.layers if name not in ran]
        if unused:
            log.info("Q&C calibration: %d layers never run, such as %s; they are left out.", len(unused), unused[0])
        statistics = {name: empty_statistics(layer, self.space) for name, layer in self.layers if name in ran}
        sigmas = () if candidates.sigmas is None else tuple(candidates.sigmas.tolist())
        return Standing(candidates.choose(self.plan), candidates.distances(), statistics, sigmas=sigmas)

    def second_pass(self, standing: Standing) -> None:
        """Samples the runs that are left once more and observes what was chosen; `standing` takes it up."""
        batches, statistics = enumerate(self.plan.batches()), standing.statistics
        left = [(run, batch) for run, batch in batches if run >= standing.runs and run in standing.choice]
        self.progress.total = self.progress.done + self.settings.steps * len(left)
        layers = [(name, layer) for name, layer in self.layers if name in statistics]
        for run, batch in left:
            observing = Observing(layers, statistics, standing.choice, run, self.space.tokens, self.plan.seed)
            self.sample(observing, batch)
            standing.held_out, standing.runs = (*standing.held_out, *observing.calls), run + 1
            self.keep(standing)

    def sample(self, watch: Collecting | Observing, batch: tuple[int, int, int]) -> None:
        """One sampling run whose predictions and model calls pass through `watch`."""
        seed, size, first = batch
        watched, latent = self.patcher.clone(), self.latent[[0] * size]
        replace_wrapper(watched, WRAPPERS.PREDICT_NOISE, KEY, watch.predict_noise)
        replace_wrapper(watched, WRAPPERS.APPLY_MODEL, KEY, watch.apply_model)
        sample_new(watched, self.settings, latent, seed, self.progress.step, first)

    def keep(self, standing: Standing) -> None:
        if self.partial is not None:
            standing.result(self.model).save(self.partial)


def empty_latent(patcher, latent: dict[str, Any]) -> Tensor:
    """One empty latent of the LATENT's shape; a nested one of video and sound stays nested."""
    return fitted_latent(patcher, {**latent, "samples": latent["samples"] * 0})[:1].float()


def planned(layers: Layers, plan: Plan) -> StatisticsPlan:
    """What each layer's statistics keep. Raises ValueError where the plan's memory does not hold them."""
    widths, budget = [layer.in_features for _, layer in layers], int(plan.memory_gb * 2**30)
    tokens, held_out = plan.tokens if plan.hessians else 0, HELD_OUT_ROWS if plan.held_out else 0
    space = plan_statistics(widths, budget, tokens, held_out)
    blocks = {block_of(name) for name, _ in layers} - {""}
    kept = f", {space.tokens} tokens each" if plan.hessians else ""
    log.info(
        "Q&C calibration: %d blocks, %d layers: %.2f GiB of statistics%s", len(blocks), len(layers),
        space.bytes / 2**30, kept,
    )  # fmt: skip
    return space


def block_of(name: str) -> str:
    """double_blocks.3 of double_blocks.3.img_attn.qkv."""
    parts = name.split(".")
    return next((".".join(parts[: i + 1]) for i, part in enumerate(parts) if part.isdecimal()), "")


def empty_statistics(layer: nn.Module, space: StatisticsPlan) -> LayerStatistics:
    width = layer.in_features
    return LayerStatistics.empty(width, space.hessian(width), space.rows(width), space.held_out)


def resumed(found: Calibration, layers: Mapping[str, nn.Module], space: StatisticsPlan) -> Standing:
    """What an interrupted calibration came to; its statistics have room for more."""
    statistics = {}
    for name in list(found.statistics):
        # Taken out one by one: all of them twice would not fit the budget.
        layer, room = found.statistics.pop(name), empty_statistics(layers[name], space)
        if layer.rows is not None:
            room.keep_rows(layer.rows)
        if layer.held_out is not None:
            room.keep_held_out(layer.held_out)
        statistics[name] = replace(layer, rows=room.rows, held_out=room.held_out)
    samples, held_out = (torch.tensor(found.notes[key]).long().reshape(-1, 4) for key in ("samples", "held_out"))
    runs, sigmas = found.notes["runs"], tuple(found.notes.get("sigmas", ()))
    return Standing(Choice(samples, held_out), found.distances, statistics, found.held_out, runs, sigmas)


def leave_out_unseen(statistics: dict[str, LayerStatistics], all_run: bool) -> None:
    """Takes out layers without inputs: experts to which no token went, and what a network runs once and remembers.

    Raises ValueError where none is left, or on any in a network whose calls run all of its layers.
    """
    unseen = [name for name, layer in statistics.items() if layer.count == 0]
    if unseen and (all_run or len(unseen) == len(statistics)):
        raise ValueError(
            f"No chosen sample lies on a step that runs {unseen[0]} ({len(unseen)} layers in all); choose more samples."
        )
    if unseen:
        log.warning(
            "Q&C calibration: the chosen samples run %s on no input; %d such layers get no statistics.", unseen[0],
            len(unseen),
        )  # fmt: skip
    for name in unseen:
        del statistics[name]


def digest_of(patcher, settings: Settings, latent: Tensor, plan: Plan) -> str:
    """8 hex digits that are equal only for equal inputs of `calibrate`: weights, LoRAs, conditions, cache, schedule,
    plan.
    """
    found, sampling = hashlib.sha256(), patcher.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, settings.scheduler, settings.steps)
    shapes = [tuple(part.shape) for part in (latent.unbind() if latent.is_nested else [latent])]
    given = (VERSION, settings.describe(), settings.positive, settings.negative, shapes, repr(plan))
    for part in leaves((fingerprint_of(patcher), patcher.patches, details(patcher), sigmas, *given)):
        found.update(part)
    return found.hexdigest()[:8]


def leaves(value: Any) -> Iterator[bytes]:
    """What tells a nested value from others; of objects the class and, where they are LoRAs, the weights."""
    if isinstance(value, Tensor):
        yield f"{value.dtype}{tuple(value.shape)}".encode()
        yield value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    elif isinstance(value, Mapping):
        yield from leaves([part for item in value.items() for part in item])
    elif isinstance(value, (list, tuple)):
        yield f"[{len(value)}".encode()
        for part in value:
            yield from leaves(part)
    elif value is None or isinstance(value, (bool, int, float, str)):
        yield repr(value).encode()
    else:
        yield type(value).__name__.encode()
        yield from leaves(getattr(value, "weights", None))
