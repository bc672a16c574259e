"""The whole speed measurement of a machine: ceilings, every way to run the model, single products, where time goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from qandc_core.caching.schedule import CacheConfig
from qandc_core.fused.dit import FusedDiT
from qandc_core.fused.kernels import available
from qandc_core.fused.loop import DeviceLoop
from qandc_core.models.dit import DiT, DiTConfig
from qandc_core.models.presets import preset

from .ceilings import best_of, measure_ceilings
from .gemms import gemm_table
from .models import (
    QANDC,
    Subject,
    float_subjects,
    half_precision,
    integer_subjects,
    kernel_subjects,
    random_dit,
    resize,
)
from .plain import loop_of
from .profile import PRODUCTS, profile_step
from .runs import ALL_STEPS, CHOSEN, Bench, Note, Row, Setting, fastest, find, measure_subject
from .words import StepProfile, explain
from .work import StepWork, floor_seconds, product_ceiling, step_work

EQUAL_TIME = "steps in the time of Q&C"
Save = Callable[[dict[str, Any]], None]


@dataclass
class Machine:
    """What is measured on, with which model, until when."""

    device: torch.device
    config: DiTConfig
    note: Note
    until: float
    quick: bool

    def __post_init__(self) -> None:
        self.source = random_dit(self.config, self.device)
        self.models: dict[str, DiT | FusedDiT] = {}
        self.ceilings = measure_ceilings(self.device, self.quick)
        self.note(f"ceilings: {self.ceilings}")

    def model_of(self, subject: Subject) -> DiT | FusedDiT:
        if subject.name not in self.models:
            self.models[subject.name] = subject.make(self.source)
        return self.models[subject.name]

    def more_time(self) -> bool:
        return time.perf_counter() < self.until

    @property
    def kernels(self) -> str:
        return "triton" if available(self.device) else "reference"

    @property
    def all_kernels(self) -> list[str]:
        return ["kitchen", "reference", *(["triton"] if available(self.device) else [])]

    @property
    def rest(self) -> str:
        """Format of what is not quantized, as speed.work names it."""
        return str(half_precision(self.device)).removeprefix("torch.")

    def work(self, setting: Setting, fused: bool = True) -> StepWork:
        config = replace(self.config, input_size=setting.pixels // 8)
        return step_work(config, 2 * setting.images, setting.steps if fused else None)

    def floor(self, setting: Setting, format: str, fused: bool = True) -> float | None:
        return floor_seconds(self.work(setting, fused), self.ceilings, format, self.rest)


def speed_table(
    config: DiTConfig, settings: Sequence[Setting], device: torch.device, seconds: float, note: Note,
    save: Save = lambda result: None, quick: bool = False, only: str = "",
) -> dict[str, Any]:  # fmt: skip
    """JSON of everything, save(result) as it grows; after `seconds` no further row begins. `only` keeps the first
    subject and those whose names hold one of its parts, which semicolons separate.
    """
    machine = Machine(device, config, note, time.perf_counter() + seconds, quick)
    subjects = named([*float_subjects(device), *integer_subjects(device, machine.kernels)], only)
    benches = {setting: Bench(device, setting, note, longest=3.0 if i else 15.0) for i, setting in enumerate(settings)}
    main, rows = benches[settings[0]], list[Row]()
    result: dict[str, Any] = {"ceilings": asdict(machine.ceilings), "kernels": machine.kernels, "rows": rows}
    for bench, subject in ordered(benches, subjects, [] if only else kernel_subjects(device, machine.all_kernels)):
        rows += measure_subject(bench, subject, machine.model_of, machine.more_time)
        save(result)
    machine.ceilings = best_of(machine.ceilings, measure_ceilings(device, quick))
    result["ceilings"] = asdict(machine.ceilings)
    result["floors"] = {setting.label: machine.floor(setting, "W8A8") for setting in settings}
    parts: dict[str, Callable[..., list]] = {"extras": extras, "gemms": products, "steps": step_profiles}
    for part, measure in parts.items():
        try:
            found = measure(machine, main, subjects, rows)
        except Exception as error:  # of any library: what was measured before must not be lost
            note(f"{part}: {type(error).__name__}: {error}")
            continue
        if part == "extras":
            rows += found
        else:
            result[part] = found
        save(result)
    return result


def named(subjects: Sequence[Subject], only: str) -> list[Subject]:
    parts = [part for part in only.split(";") if part]
    chosen = [subject for subject in subjects[1:] if not parts or any(part in subject.name for part in parts)]
    return [*subjects[:1], *chosen]


def ordered(
    benches: dict[Setting, Bench], subjects: Sequence[Subject], others: Sequence[Subject]
) -> Iterator[tuple[Bench, Subject]]:
    """The first setting, then what matters most in the others, then the rest; comfy-kitchen's in graphs last."""
    main, *more = benches.values()
    own = [subject for subject in subjects if not subject.kitchen]
    yield from ((main, subject) for subject in [*own, *others] if not subject.kitchen)
    for essential in (True, False):
        yield from ((bench, subject) for bench in more for subject in own if subject.essential == essential)
    yield from ((main, subject) for subject in [*subjects, *others] if subject.kitchen)
    yield from ((bench, subject) for bench in more for subject in subjects if subject.kitchen)


def products(
    machine: Machine, bench: Bench, subjects: Sequence[Subject], rows: Sequence[Row]
) -> list[dict[str, Any]]:  # fmt: skip
    repeats = 5 if machine.quick else 20
    return gemm_table(machine.work(bench.setting).shapes, machine.ceilings, machine.device, repeats)


def extras(machine: Machine, bench: Bench, subjects: Sequence[Subject], rows: Sequence[Row]) -> list[Row]:
    """FORA, and full precision with the steps that fit Q&C's time."""
    fused = next(subject for subject in subjects if "fused" in subject.name)
    found = [bench.measure(fused, machine.model_of, "interval 3, FORA", CacheConfig(3, reuse="branch"))]
    here = [row for row in rows if row["setting"] == bench.setting.label]
    baseline, fast = fastest(here), find(here, QANDC, CHOSEN)
    if baseline is not None and fast is not None and not fast["problem"]:
        fewer = max(1, int(fast["total"] / per_step(baseline)))
        subject = next(subject for subject in subjects if subject.name == baseline["subject"])
        found.append(bench.measure(subject, machine.model_of, f"{fewer} {EQUAL_TIME}", None, fewer))
    return found


def step_profiles(
    machine: Machine, bench: Bench, subjects: Sequence[Subject], rows: Sequence[Row]
) -> list[dict[str, Any]]:
    """Where a computed step spends its time, in the fastest full precision and in W8A8."""
    rows = [row for row in rows if row["setting"] == bench.setting.label]
    baseline, found = fastest(rows), []
    for name in dict.fromkeys([baseline["subject"] if baseline else QANDC, QANDC]):
        row = find(rows, name)
        if row is not None and not row["problem"]:
            subject = next(subject for subject in subjects if subject.name == name)
            profile = step_profile(machine, bench, subject, row, baseline)
            cached = find(rows, name, CHOSEN)
            profile = replace(profile, reused=None if cached is None else cached["reused"])
            found.append({"subject": name, **asdict(profile), "words": explain(profile)})
    return found


def step_profile(machine: Machine, bench: Bench, subject: Subject, row: Row, base: Row | None) -> StepProfile:
    setting, model = bench.setting, machine.model_of(subject)
    graphs = subject.graph and machine.device.type == "cuda"
    resize(model, setting.pixels // 8)
    loop = loop_of(model, setting.images, setting.config(), graphs=graphs)
    loop.prepare(bench.labels, [bench.noise], None)
    groups = profile_step(in_place(loop), machine.device)
    fused = isinstance(model, FusedDiT)
    work = machine.work(setting, fused)
    gains = base is not None and base["subject"] != subject.name
    return StepProfile(
        f"{subject.name}, {setting.label}", per_step(row), None, groups, achieved(work, groups),
        product_ceiling(work, machine.ceilings, subject.format, machine.rest),
        machine.floor(setting, subject.format, fused), against=base["subject"] if base else "",
        step_gain=per_step(base) / per_step(row) if base is not None and gains else None,
    )  # fmt: skip


def per_step(row: Row) -> float:
    """Of a run whose steps all compute: steadier than a few steps on their own."""
    assert row["schedule"] == ALL_STEPS
    return row["total"] / row["steps"]


def in_place(loop: DeviceLoop) -> Callable[[], None]:
    program = loop.program(False)

    def step() -> None:
        loop.rewind()
        program()

    return step


def achieved(work: StepWork, groups: dict[str, float]) -> float | None:
    """Operations/s of the matrix products while they run."""
    return work.gemm_flops / groups[PRODUCTS] if groups.get(PRODUCTS) else None


def default_run(device: torch.device) -> tuple[str, list[Setting]]:
    """The paper's model on a GPU, in all settings; elsewhere a small one."""
    if device.type != "cuda":
        return "DiT-S/4", [Setting(256, 2, steps=20)]
    return "DiT-XL/2", [Setting(pixels, images) for pixels in (256, 512) for images in (8, 1, 32)]


def bench_speed(device: str, note: Note) -> dict[str, Any]:
    """The first setting alone."""
    name, settings = default_run(torch.device(device))
    found = speed_table(preset(name), settings[:1], torch.device(device), 420.0, note, quick=device == "cpu")
    return {"name": name, **found}
