"""A calibration that grows: every run of a sampler adds what it showed, whatever its prompt, size, steps and LoRAs.

Everything kept is of a fixed size and adds up: counts, bounds, means and histograms, X^T X, inputs and held-out calls
with the lowest random keys, sums of squares of step distances. The file after k runs is what one pass over all k would
have written. So it is replaced as a whole, by an atomic rename, with the calibration of one run more; a file for each
run would take as much disk each time and say less. Whoever loaded an earlier version keeps it.

Runs of different schedules share the layer statistics. Distances between steps belong to a schedule: they are added up
for each, and the file offers those of the schedule that most runs had.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..caching.steps import step_at
from ..files import reading
from .calls import pack_calls, unpack_calls
from .file import Calibration, load_calibration, read_calibration_header
from .fingerprint import Fingerprint, same_model
from .gain import DAMPING, Moment, lowered
from .recorder import RecordingConfig
from .recording import Recording, ScheduleSums, describe
from .records import LayerRecord, RunRecord
from .statistics import LayerStatistics, check_inputs_finite
from .stream import Reservoir

SCHEDULES = 8  # of the most runs, and the latest
KINDS = ("inputs", "held_out")


@dataclass(frozen=True)
class RunSchedule:
    """The schedule of a recorded run: noise levels, sampler, whether it adds noise, whether all steps were computed."""

    sigmas: list[float]
    sampler: str
    noisy: bool
    whole: bool = True


@torch.inference_mode()
def with_run(
    old: Calibration | None,
    model: str,
    run: RunRecord,
    schedule: RunSchedule,
    config: RecordingConfig,
    device: torch.device | str = "cpu",
) -> Calibration:
    """The calibration of a model with one run more; `old` and `run` are used up. What the run adds is measured on the
    device. Raises ValueError on inputs that are not finite, or where nothing was observed.
    """
    layers = {name: record for name, record in run.layers.items() if record.statistics.count}
    if not run.samples:
        raise ValueError("none of the samples that were drawn fell on a computed step; raise samples")
    if not layers:
        raise ValueError("none of its model calls computed a layer of a block")
    check_inputs_finite({name: record.statistics for name, record in layers.items()})
    before = (old.recording if old is not None else None) or Recording()
    differences = merged_with(old, before, layers, device)
    calls = sorted(
        [*zip(before.call_keys, () if old is None else old.held_out), *run.calls], key=lambda found: found[0]
    )[: config.held_out]
    recording = Recording(
        before.runs + 1,
        before.samples + run.samples,
        plan_of(config),
        before.history + ([sum(differences) / len(differences)] if differences else []),
        schedules_with(before.schedules, distances_of(run, schedule)),
        [key for key, _ in calls],
        {f"{name}/{kind}": kept.keys for name, record in layers.items() for kind, kept in record.kept.items()},
    )
    return replace(
        placed(model, recording, schedule),
        statistics={name: finished(record) for name, record in layers.items()},
        held_out=unpack_calls(*pack_calls([call for _, call in calls])),  # copies, so that nothing holds the old file
    )


def placed(model: str, recording: Recording, latest: RunSchedule) -> Calibration:
    """A calibration with the distances of the schedule that most runs had, and notes on it."""
    most = max(recording.schedules, key=lambda schedule: schedule.runs, default=None)
    notes: dict[str, Any] = {"selection": "runs", "runs": recording.runs, "samples": recording.samples}
    if most is None:
        notes |= {"distances": "steps" if latest.whole else "cache", "sampler": latest.sampler}
        return Calibration(model, notes=notes, recording=recording)
    notes |= {
        "distances": "",
        "sampler": most.sampler,
        "sigmas": most.sigmas,
        "steps": len(most.sigmas) - 1,
        "noisy": most.noisy,
    }
    return Calibration(model, distances=most.distances(), notes=notes, recording=recording)


def merged_with(
    old: Calibration | None, recording: Recording, layers: dict[str, LayerRecord], device: torch.device | str
) -> list[float]:
    """Adds the old calibration's layers to those of a run, one by one: all of them twice would not fit the budget.

    By how much that lowered the error of the layers on which it is measured.
    """
    differences = []
    for name in sorted({*layers, *(() if old is None else old.statistics)}):
        before = taken_out(old, recording, name)
        if name not in layers and before is not None:
            layers[name] = before
        elif before is not None:
            differences += measured(before, layers[name], device)
        layers[name].kept.pop("probe", None)
    return differences


def taken_out(old: Calibration | None, recording: Recording, name: str) -> LayerRecord | None:
    """A layer's record of the old calibration, which no longer holds it afterwards."""
    if old is None or name not in old.statistics:
        return None
    layer = old.statistics.pop(name)
    kept = {}
    for kind in KINDS:
        tokens, keys = getattr(layer, kind), recording.keys.get(f"{name}/{kind}")
        if tokens is not None and keys is not None:
            if len(tokens) != len(keys):
                raise ValueError(f"the kept inputs of {name} do not fit their keys")
            kept[kind] = Reservoir(tokens, keys)
    return LayerRecord(layer.sums(), kept)


def measured(before: LayerRecord, run: LayerRecord, device: torch.device | str) -> list[float]:
    """Merges both in `run`. By how much that lowers the layer's error on the run's inputs, where it is measured."""
    probe = run.kept.get("probe")
    old = moment_of(before) if probe is not None else None
    run.merge(before)
    new = moment_of(run) if probe is not None else None
    if probe is None or old is None or new is None:
        return []
    try:
        return [lowered(old, new, probe.tokens.to(device))]
    except RuntimeError:  # no factor, or no memory for one: the run is added all the same
        return []


def moment_of(record: LayerRecord) -> Moment | None:
    """X^T X of a layer and the damping that GPTQ adds to it."""
    layer = finished(record)
    moment = layer.second_moment()
    return None if moment is None else (moment, DAMPING + layer.sampling_damping)


def finished(record: LayerRecord) -> LayerStatistics:
    inputs, held_out = (record.kept[kind].tokens.clone() if kind in record.kept else None for kind in KINDS)
    return replace(record.statistics, inputs=inputs, held_out=held_out)


def distances_of(run: RunRecord, schedule: RunSchedule) -> ScheduleSums | None:
    """The distances between the run's steps; None where a step was not computed, or its predictions are not finite."""
    sigmas, steps = schedule.sigmas, len(schedule.sigmas) - 1
    if any(after >= before for before, after in zip(sigmas, sigmas[1:])):
        return None  # a schedule that rises, as of unsampling
    by_step: dict[int, Tensor] = {}
    for level, values in run.predictions:
        by_step.setdefault(step_at(sigmas, level), values)
    found = [by_step[step] for step in range(steps) if step in by_step]
    if not schedule.whole or not steps or len(found) < steps or len({len(values) for values in found}) > 1:
        return None
    if not all(bool(values.isfinite().all()) for values in found):
        return None
    return ScheduleSums.of(schedule.sigmas, schedule.sampler, schedule.noisy, found)


def schedules_with(known: list[ScheduleSums], new: ScheduleSums | None) -> list[ScheduleSums]:
    """The sums with one run more; the newest comes last, and of too many the one with the fewest runs goes."""
    if new is None:
        return [s.copied() for s in known]
    same = [s for s in known if s.like(new)]
    others = [s.copied() for s in known if not any(s is found for found in same)]
    merged = [same[0].plus(new) if same else new]
    if len(others) >= SCHEDULES:
        others.remove(min(others, key=lambda s: s.runs))
    return [*others, *merged]


def add_run(
    path: Path,
    model: str,
    run: RunRecord,
    schedule: RunSchedule,
    config: RecordingConfig,
    device: torch.device | str = "cpu",
) -> Recording:
    """Replaces the file by one with this run more, atomically; any error leaves it as it was."""
    grown = with_run(grown_from(path, model, config), model, run, schedule, config, device)
    grown.save(path)
    assert grown.recording is not None
    return grown.recording


def grown_from(path: Path, model: str, config: RecordingConfig) -> Calibration | None:
    """The calibration that the next run adds to; None where it begins. Raises ValueError on another file."""
    if check_recording(path, model, config) is None:
        return None
    return load_calibration(path)


def check_recording(path: Path, model: str, config: RecordingConfig) -> Mapping[str, Any] | None:
    """The recording in the file's header; None where there is no file, or one with another `reset`.

    Raises ValueError in one sentence on a file that runs of this model cannot be added to.
    """
    if not path.is_file():
        return None
    header = read_calibration_header(path)
    recording = header.get("recording")
    if recording is None:
        raise ValueError(f"{path.name} was not made by Calibrate from Runs; choose another name.")
    with reading(path, "choose another name, or delete it"):
        describe(recording)
        begun, wanted = dict(recording["plan"]), plan_of(config)
        begun = {key: begun[key] for key in wanted}
    if begun.pop("reset") != wanted.pop("reset"):
        return None
    if not same_model(Fingerprint(header["model"], header.get("sketch", "")), model):
        raise ValueError(
            f"{path.name} holds runs of another model (fingerprint {header['model'][:8]}, this model has {model[:8]}); "
            "choose another name, or change reset to start over."
        )
    if begun != wanted:
        settings = ", ".join(f"{key} = {value}" for key, value in begun.items())
        raise ValueError(f"{path.name} was started with {settings}; use these settings, or change reset to start over.")
    return recording


def plan_of(config: RecordingConfig) -> dict[str, Any]:
    """Properties that all runs of a file share, so that their statistics add up."""
    return {key: getattr(config, key) for key in ("hessians", "memory_gb", "tokens", "reset")}
