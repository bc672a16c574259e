"""The whole speed measurement of a machine: ceilings, every way to run the model, single products, where time goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ...caching.schedules import CacheConfig
from ...models.dit import DiT, DiTConfig
from ...models.fused_dit import FusedDiT
from ...models.presets import preset
from ...quantization.kernels import available
from ...sampling.device_loop import DeviceLoop
from .ceilings import Ceilings, measure_ceilings
from .gemms import gemm_table
from .goals import Row, fastest, find
from .models import QANDC, Subject, float_subjects, integer_subjects, kernel_subjects, random_dit
from .profile import PRODUCTS, profile_step
from .runs import Bench, Measured, Setting, measure_setting
from .words import StepProfile, explain
from .work import StepWork, floor_seconds, product_ceiling, step_work

Note = Callable[[str], None]


@dataclass
class Machine:
    """What is measured on, with which model, until when."""

    device: torch.device
    config: DiTConfig
    note: Note
    until: float

    def __post_init__(self) -> None:
        self.source = random_dit(self.config).to(self.device)
        self.models: dict[str, DiT | FusedDiT] = {}

    def model_of(self, subject: Subject) -> DiT | FusedDiT:
        if subject.name not in self.models:
            self.models[subject.name] = subject.make(self.source)
        return self.models[subject.name]

    def more_time(self, reserve: float = 0.0) -> bool:
        return time.perf_counter() + reserve < self.until

    @property
    def kernels(self) -> str:
        return "triton" if available(self.device) else "reference"

    @property
    def all_kernels(self) -> list[str]:
        return ["kitchen", "reference", *(["triton"] if available(self.device) else [])]


def speed_table(
    config: DiTConfig,
    settings: Sequence[Setting],
    device: torch.device,
    seconds: float,
    note: Note,
    quick: bool = False,
) -> dict[str, Any]:
    """JSON of everything, the first setting in full; what the time does not suffice for is left out and noted."""
    machine = Machine(device, config, note, time.perf_counter() + seconds)
    ceilings = measure_ceilings(device, quick)
    note(f"ceilings: {ceilings}")
    floats, integers = float_subjects(device), integer_subjects(device, machine.kernels)
    rows: list[Measured] = []
    result: dict[str, Any] = {"ceilings": asdict(ceilings), "kernels": machine.kernels, "model": asdict(config)}
    for number, setting in enumerate(settings):
        bench = Bench(device, setting, longest=3.0 if number else 40.0)
        rows += measure_setting(bench, [*floats, *integers], machine.model_of, machine.more_time, note)
        if number == 0:
            rows += extras(machine, bench, floats, rows)
            result["steps"] = step_profiles(machine, bench, [*floats, *integers], rows, ceilings)
            shapes = step_work(config_for(machine, setting), 2 * setting.images, setting.steps).shapes
            result["gemms"] = gemm_table(shapes, ceilings, device, 5 if quick else 20)
    result["batch 1 over floor"] = batch_one_over_floor(machine, rows, settings, ceilings)
    return {**result, "rows": [asdict(row) for row in rows]}


def batch_one_over_floor(
    machine: Machine, rows: Sequence[Measured], settings: Sequence[Setting], ceilings: Ceilings
) -> float | None:
    """A computed W8A8 step of one image over the least that memory, arithmetic and launches allow."""
    setting = next((setting for setting in settings if setting.images == 1), None)
    if setting is None:
        return None
    row = find((asdict(row) for row in rows if row.setting == setting.label and not row.problem), QANDC)
    work = step_work(config_for(machine, setting), 2, setting.steps)
    floor = floor_seconds(work, ceilings, "W8A8", "bfloat16" if machine.device.type == "cuda" else "float32")
    return None if row is None or floor is None else row["computed"] / floor


def config_for(machine: Machine, setting: Setting) -> DiTConfig:
    return DiTConfig(**{**asdict(machine.config), "input_size": setting.pixels // 8})


def extras(machine: Machine, bench: Bench, floats: Sequence[Subject], rows: Sequence[Measured]) -> list[Measured]:
    """In the first setting: each set of kernels, FORA, and full precision with the steps that fit Q&C's time."""
    found = measure_setting(
        bench, kernel_subjects(machine.device, machine.all_kernels), machine.model_of, machine.more_time, machine.note
    )
    fused = next(subject for subject in floats if "fused" in subject.name)
    if machine.more_time():
        fora = CacheConfig(3, mode="branch")
        found.append(bench.measure(fused, machine.model_of(fused), "interval 3, FORA", fora))
        machine.note(found[-1].line())
    baseline, fast = fastest(map(asdict, rows)), find(map(asdict, rows), QANDC, "chosen steps")
    if baseline is not None and fast is not None and not fast["problem"] and machine.more_time():
        subject = next(subject for subject in floats if subject.name == baseline["subject"])
        steps = max(1, int(fast["total"] / baseline["computed"]))
        found.append(bench.measure(subject, machine.model_of(subject), f"{steps} steps in its time", None, steps))
        machine.note(found[-1].line())
    return found


def step_profiles(
    machine: Machine, bench: Bench, subjects: Sequence[Subject], rows: Sequence[Measured], ceilings: Ceilings
) -> list[dict[str, Any]]:
    """Where a computed step spends its time, in the fastest full precision and in W8A8."""
    baseline = fastest(map(asdict, rows))
    wanted = [baseline["subject"] if baseline else "", QANDC]
    found = []
    for subject in subjects:
        measured = {
            row.schedule: row for row in rows if row.subject == subject.name and row.setting == bench.setting.label
        }
        if subject.name in wanted and measured and all(row.computed for row in measured.values()):
            profile = step_profile(machine, bench, subject, measured, ceilings, baseline)
            found.append({"subject": subject.name, **asdict(profile), "words": explain(profile)})
    return found


def step_profile(
    machine: Machine, bench: Bench, subject: Subject, rows: dict[str, Measured], ceilings: Ceilings, base: Row | None
) -> StepProfile:
    setting = bench.setting
    loop = DeviceLoop(
        machine.model_of(subject), setting.images, setting.config(), None,
        graphs=subject.graph and machine.device.type == "cuda",
    )  # fmt: skip
    loop.prepare(bench.labels, [bench.noise], None)
    groups = profile_step(in_place(loop), machine.device)
    work = step_work(
        config_for(machine, setting), 2 * setting.images, setting.steps if fused(machine, subject) else None
    )
    rest = "bfloat16" if machine.device.type == "cuda" else "float32"
    computed = min(row.computed for row in rows.values() if row.computed is not None)
    reused = min((row.reused for row in rows.values() if row.reused is not None), default=None)
    gain = base["computed"] / computed if base is not None and base["subject"] != subject.name else None
    return StepProfile(
        f"{subject.name}, {setting.label}", computed, reused, groups, achieved(work, groups),
        product_ceiling(work, ceilings, subject.format, rest), floor_seconds(work, ceilings, subject.format, rest),
        against=base["subject"] if base is not None else "", step_gain=gain,
    )  # fmt: skip


def fused(machine: Machine, subject: Subject) -> bool:
    return isinstance(machine.model_of(subject), FusedDiT)


def in_place(loop: DeviceLoop) -> Callable[[], None]:
    program = loop.program(False)

    def step() -> None:
        loop.rewind()
        program()

    return step


def achieved(work: StepWork, groups: dict[str, float]) -> float | None:
    """Operations/s of the matrix products while they run."""
    return work.gemm_flops / groups[PRODUCTS] if groups.get(PRODUCTS) else None


def bench_speed(device: str, note: Note) -> dict[str, Any]:
    """The table's first setting, of DiT-XL/2 at 256 pixels on a GPU and of a small DiT elsewhere."""
    name, setting = ("DiT-XL/2", Setting(256, 8)) if device == "cuda" else ("DiT-S/4", Setting(256, 2, steps=9))
    return {"name": name, **speed_table(preset(name), [setting], torch.device(device), 450.0, note, device == "cpu")}
