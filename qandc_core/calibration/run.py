"""Calibration on a model's own trajectories, with its cache on: candidates, TAP, then statistics of the chosen.

The same trajectories are sampled twice. The first pass keeps a small picture of every sample, from which the selection
chooses, and the distances between the predictions of the steps. The second samples them again, from the same noise, and
looks into the layers on the chosen samples only. A layer therefore sees exactly what it sees in use: nothing on steps
where a cache skips it. Keeping all layer inputs of the first pass instead would take terabytes.

Where there are few candidates, all are taken: the first pass looks into the layers at once, and there is no second one.
How many there will be is estimated from the first run, whose cache tells how many of its steps are computed; so is what
will be held out.

How to sample is the host's: ComfyUI's nodes and this package's own DiT each give the trajectories of theirs.
"""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError
from torch import nn

from ..distributed import ALONE, Distributed
from .choice import Batch, CalibrationConfig, Candidates, Choice
from .file import Calibration, load_calibration
from .layer_inputs import HELD_OUT_TOKENS, Gathering, Observer, Watch
from .memory import StatisticsPlan, plan_statistics
from .state import CalibrationState, empty_statistics, leave_out_unseen, resumed, width_of
from .statistics import check_inputs_finite, observed, with_room

log = logging.getLogger(__name__)
FIRST_LOOK = 4  # fraction of the first run after which it shows how many steps a cache computes
Layers = Sequence[tuple[str, nn.Module]]


class Host(Protocol):
    """Samples the trajectories: `layers` to observe by name, the model's `fingerprint`, and the `device` that its
    layers run on. `all_run` says that every call of the model runs all of its layers, `steps` how many predictions a
    run has at least.
    """

    fingerprint: str
    device: torch.device
    all_run: bool
    steps: int

    @property
    def layers(self) -> Layers: ...

    def expect(self, steps: int) -> None:
        """The number of sampling steps still to come, for a progress bar."""

    def room(self) -> int:
        """Bytes on the device that statistics may take."""

    def collect(self, candidates: Candidates, run: int, batch: Batch, watch: Watch | None = None) -> None:
        """Samples the batch's images and adds every prediction; model calls go through the watch, if there is one."""

    def observe(self, observer: Observer, batch: Batch) -> None:
        """Samples the same images and hands every model call through the observer."""

    def ran_out_of_memory(self, error: Exception) -> bool:
        """True if fewer images at once may help; frees memory that is no longer used."""


@torch.inference_mode()
def calibrate(
    host: Host, config: CalibrationConfig | None = None, partial: Path | None = None, process: Distributed = ALONE
) -> Calibration:
    """Statistics of every layer's input, distances between steps, and calls that are held out.

    The file `partial` keeps what is done; a later call with the same arguments resumes from there. Out of memory it
    starts again with half as many images at once, which gives exactly what that batch size would have given from the
    beginning; the note `batch_size` says which it was. Raises ValueError where there is no layer, the statistics do not
    fit, or inputs are not finite.

    Several processes, each with its own `process`, share the sampling runs out and all return the result. They keep no
    partial file, and out of memory is a ValueError.
    """
    calibrating = Calibrating(host, config or CalibrationConfig(), None if process.world > 1 else partial, process)
    while True:
        try:
            return calibrating.run()
        except Exception as error:
            if host.ran_out_of_memory(error) and process.world > 1:
                size = calibrating.plan.batch_size
                raise ValueError(f"Out of memory with {size} images at once; calibrate fewer at once.") from error
            if not host.ran_out_of_memory(error) or not calibrating.halve():
                raise
        gc.collect()  # here the error no longer holds what it failed on


class Calibrating:
    """Both passes over one model's trajectories."""

    def __init__(self, host: Host, plan: CalibrationConfig, partial: Path | None, process: Distributed = ALONE):
        self.host, self.layers, self.plan, self.partial = host, host.layers, plan, partial
        self.process = process
        self.space = memory_plan(self.layers, plan)

    def run(self) -> Calibration:
        state = self.interrupted()
        if state is None:
            state = self.first_pass()
            self.keep(state)
        self.second_pass(state)
        leave_out_unseen(state.statistics, self.host.all_run)
        return state.result(self.host.fingerprint)

    def halve(self) -> bool:
        """Plans batches of half the size; whether there are smaller ones."""
        largest = max(batch.size for batch in self.plan.batches())
        if largest == 1:
            return False
        self.plan = replace(self.plan, batch_size=largest // 2)
        log.warning("Q&C calibration: out of memory with %d images at once, continuing with %d.", largest, largest // 2)
        if self.partial is not None:
            self.partial.unlink(missing_ok=True)
        return True

    def interrupted(self) -> CalibrationState | None:
        """The state of an interrupted calibration. A damaged file is set aside, with a warning."""
        if self.partial is None or not self.partial.is_file():
            return None
        try:
            found = load_calibration(self.partial)
            found.check_fingerprint(self.host.fingerprint)
            state = resumed(found, dict(self.layers), self.space)
            self.plan = replace(self.plan, batch_size=state.batch_size)
        except Exception as error:  # a damaged file fails in as many ways as it has fields
            aside = self.partial.with_name(f"{self.partial.name}.damaged")
            log.warning("Q&C calibration: %s is damaged (%s); starting over.", self.partial.name, error)
            os.replace(self.partial, aside)
            return None
        log.info("Q&C calibration: resumes from %s.", self.partial.name)
        return state

    def share(self) -> list[tuple[int, Batch]]:
        """The sampling runs of this process, with their numbers."""
        runs = list(enumerate(self.plan.batches()))
        return [runs[i] for i in self.process.shard(len(runs))]

    def first_pass(self) -> CalibrationState:
        """Samples all trajectories and chooses; layers that never run are left out."""
        own, found, share = Candidates(), set[str](), self.share()
        gathering, holding_out = self.gathering(own), dict[int, Observer | None]()
        few = self.host.steps * self.plan.images <= 2 * self.plan.most
        self.host.expect(self.host.steps * len(share) * (1 if few else 2))
        for run, batch in share:
            watch: Watch | None = gathering
            if run >= self.plan.shared_runs:
                watch = holding_out[run] = self.holding_out(run, gathering, own)
            with observed(self.layers, lambda name, _: found.add(name)):
                self.host.collect(own, run, batch, watch)
        candidates = Candidates.joined(self.process.gathered(own))
        ran = set[str]().union(*self.process.gathered(found))
        unused = [name for name, _ in self.layers if name not in ran]
        if unused:
            log.info("Q&C calibration: %d layers never run, such as %s; they are excluded.", len(unused), unused[0])
        choice = self.process.shared(lambda: candidates.choose(self.plan))
        missing, batch_size = candidates.missing(), self.plan.batch_size
        state = CalibrationState(choice, candidates.distances(), {}, missing=missing, batch_size=batch_size)
        if self.took_all(gathering, candidates):
            state.statistics = {name: layer for name, layer in gathering.result().items() if name in ran}
            state.runs = self.plan.shared_runs
            check_inputs_finite(state.statistics)
            self.take_held_out(state, holding_out)
        else:
            gathering.forget()  # makes room for those of the chosen ones
            layers = [(name, layer) for name, layer in self.layers if name in ran]
            state.statistics = {name: empty_statistics(layer, self.space) for name, layer in layers}
        return state

    def gathering(self, candidates: Candidates) -> Gathering:
        """Looks into the layers in the first pass, as long as so few candidates are expected that all are taken."""
        plan, steps = self.plan, self.host.steps
        enough = steps * min(plan.batch_size, plan.images) / FIRST_LOOK

        def wanted() -> bool:
            share, images = candidates.least_share(plan), plan.images - plan.apart
            return len(candidates) < enough or share * steps * images <= plan.most

        statistics = {name: empty_statistics(layer, self.space) for name, layer in self.layers}
        room = self.host.room()
        for layer in statistics.values():
            room -= layer.settle(self.host.device, room)
        return Gathering(self.layers, statistics, plan.seed, wanted, plan.computed_only)

    def holding_out(self, run: int, gathering: Gathering, candidates: Candidates) -> Observer | None:
        """Observes what of a run will be held out if it goes as the first one."""
        if not gathering.statistics or not len(candidates):
            return None
        choice = Choice(torch.empty(0, 4).long(), candidates.foreseen(self.plan))
        return Observer(self.layers, gathering.statistics, choice, run, 0, self.plan.seed)

    def take_held_out(self, state: CalibrationState, holding_out: Mapping[int, Observer | None]) -> None:
        """Takes up what was held out, if it is what is chosen; else the second pass samples those runs again."""
        chosen = state.choice.held_out
        observers = [found for found in holding_out.values() if found is not None]
        as_chosen = len(observers) == len(holding_out) and all(
            torch.equal(observer.held_out, chosen[chosen[:, 0] == run]) for run, observer in zip(holding_out, observers)
        )
        if all(self.process.gathered(as_chosen)):
            state.runs += self.plan.apart
            state.held_out = tuple(call for observer in observers for call in observer.calls)
            return
        for layer in state.statistics.values():
            if layer.held_out is not None:
                layer.held_out = with_room(layer.held_out)[:0]

    def took_all(self, gathering: Gathering, candidates: Candidates) -> bool:
        """True if all candidates are taken and every process gathered the inputs of its own."""
        going = all(self.process.gathered(bool(gathering.statistics)))
        return going and int(candidates.allowed(self.plan).sum()) <= self.plan.most

    def second_pass(self, state: CalibrationState) -> None:
        """Samples the runs that are left once more and observes what was chosen; `state` takes it up."""
        statistics = state.statistics
        left = [(run, batch) for run, batch in self.share() if run >= state.runs and run in state.choice]
        self.host.expect(self.host.steps * len(left))
        layers, room = [(name, layer) for name, layer in self.layers if name in statistics], self.host.room()
        for layer in statistics.values():
            room -= layer.settle(self.host.device, room)
        for run, batch in left:
            observer = Observer(layers, statistics, state.choice, run, self.space.tokens, self.plan.seed)
            self.host.observe(observer, batch)
            check_inputs_finite(statistics)
            state.held_out, state.runs = (*state.held_out, *observer.calls), run + 1
            self.keep(state)
        for layer in statistics.values():
            layer.fetch()
            layer.sum_over(self.process)
        calls = self.process.gathered(state.held_out)
        state.held_out, state.runs = sum(calls, ()), max(self.process.gathered(state.runs))

    def keep(self, state: CalibrationState) -> None:
        """Saves how far it has come; where the disk is full, a cancelled calibration starts afresh."""
        if self.partial is None:
            return
        try:
            state.result(self.host.fingerprint).save(self.partial)
        except (OSError, SafetensorError) as error:
            log.warning(
                "Q&C calibration: cannot be resumed if it is cancelled, %s is not saved (%s).", self.partial.name, error
            )
            self.partial = None


def memory_plan(layers: Layers, plan: CalibrationConfig) -> StatisticsPlan:
    """The memory plan of all layers' statistics. Raises ValueError where they do not fit."""
    widths, budget = [width_of(layer) for _, layer in layers], int(plan.memory_gb * 2**30)
    tokens, held_out = plan.tokens if plan.hessians else 0, HELD_OUT_TOKENS if plan.held_out else 0
    space = plan_statistics(widths, budget, tokens, held_out)
    blocks = {block_of(name) for name, _ in layers} - {""}
    kept = f", {space.tokens} tokens each" if plan.hessians else ""
    log.info(
        "Q&C calibration: %d blocks, %d layers: %.2f GiB of statistics%s",
        len(blocks),
        len(layers),
        space.bytes / 2**30,
        kept,
    )
    return space


def block_of(name: str) -> str:
    """double_blocks.3 of double_blocks.3.img_attn.qkv."""
    parts = name.split(".")
    return next((".".join(parts[: i + 1]) for i, part in enumerate(parts) if part.isdecimal()), "")
