"""Reports of whatever samples a model: KSampler, its halves, any guider, nodes of other packs.

A recorder is a set of wrappers on a MODEL. ComfyUI runs a sampler inside OUTER_SAMPLE, which is handed everything that
a report says: noise levels, sampler, seed, the sample's shape, and the guider, which can sample once more. The time of
a run begins at its first prediction (loading the model is not sampling), is parted by the sampler's own callbacks, and
ends with the sampler; what a preview takes in between is no part of it.

A queue keeps the output of nodes that did not change, so a record outlives the job that made it: of each sampler node
it holds the runs of the last job in which that node sampled, and forgets nodes that no longer follow its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import comfy.nested_tensor
import comfy.utils
from torch import Tensor

from ...qandc_core.sampling.report import RunReport, joined, peak_memory, reset_peak_memory
from .queue import Prompt, downstream, executing
from .sampling import Progress, sample
from .settings import Settings, parts_of
from .status import sentences, show
from .timing import CLOCK, RunClock, time_prediction, time_sampler
from .wrappers import (
    QUANTIZATION,
    REPORT,
    WRAPPERS,
    labels,
    options_of_run,
    repeated,
    reporting,
    sampler_function_name,
)

OURS, SAMPLE = "QandC_", "QandC_Sample"
PLAIN = "full precision, no cache"  # label of a model with nothing of ours on it
Key = tuple[str, int, int]  # sampler node, place in its list of inputs, number of the run within


class ReportRecorder:
    """Value of a report wire: the measurements of each sampler behind this model when it last ran.

    `node` is the id of the node that shows the words, `before` the record of samplers that the sample went through
    earlier, with another model.
    """

    def __init__(self, label: str = "", node: str | None = None, before: ReportRecorder | None = None):
        self.label, self.node, self.before = label, node, before
        self.runs: dict[Key, RunReport] = {}
        self.job: str | None = None
        self.counts: Counter[tuple[str, int]] = Counter()

    def attach(self, patcher):
        """A clone of the model that records, outside of all that is on it: what others do is part of the run."""
        clone = patcher.clone()
        for kind, wrapper in (
            (WRAPPERS.OUTER_SAMPLE, self.outer_sample),
            (WRAPPERS.SAMPLER_SAMPLE, time_sampler),
            (WRAPPERS.PREDICT_NOISE, time_prediction),
        ):
            present = clone.wrappers.get(kind, {})
            ours = [*present.get(REPORT, []), wrapper] if kind == WRAPPERS.OUTER_SAMPLE else [wrapper]
            clone.wrappers[kind] = {REPORT: ours, **{key: kept for key, kept in present.items() if key != REPORT}}
        return clone

    def outer_sample(self, executor, noise: Tensor, latent_image: Tensor, sampler, sigmas: Tensor, *args, **kwargs):
        """OUTER_SAMPLE: one run."""
        now = executing()
        if now is not None and made_by_us(*now[:2]) and repeated.get() is None:
            return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
        guider, given = executor.class_obj, named(args, kwargs)
        report = self.begin(guider, noise, sampler, sigmas, given)
        clock = RunClock(guider.model_patcher.load_device)
        args, kwargs = with_callback(args, kwargs, clock.timed)
        outer = repeated.get()
        if outer is None:
            self.keep(report, now)
        else:
            outer.append(report)
        reset_peak_memory(clock.device)
        try:
            with options_of_run(guider) as options, reporting(report):
                options[CLOCK] = (*options.get(CLOCK, ()), clock)
                out = executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
            report.finished, report.replay = True, repetition(guider, noise, latent_image, sampler, sigmas, given)
            return out
        finally:
            self.end(report, clock, guider.model_patcher)

    def begin(self, guider, noise: Tensor, sampler, sigmas: Tensor, given: Mapping[str, Any]) -> RunReport:
        patcher = guider.model_patcher
        shapes = given.get("latent_shapes") or [noise.shape]
        report = RunReport("", max(len(sigmas) - 1, 0), shapes[0][0], scale_of(guider), str(patcher.load_device))
        report.solver = sampler_function_name(sampler).removeprefix("sample_")
        report.sampler, report.sigmas = report.solver, [float(sigma) for sigma in sigmas.tolist()]
        report.seed, report.denoise, report.finished = given.get("seed"), None, False
        report.size = [list(shape[1:]) for shape in shapes]
        report.label = self.label or labels(patcher) or PLAIN
        report.quantization = patcher.model_options["transformer_options"].get(QUANTIZATION)
        return report

    def end(self, report: RunReport, clock: RunClock, patcher) -> None:
        report.seconds, report.peak_memory = clock.seconds, peak_memory(clock.device)
        if report.peak_memory is not None:
            report.peak_memory += paged_weights(patcher)
        if not report.computed:
            report.computed = [True] * (report.steps if report.finished else len(report.seconds))
        if repeated.get() is None:
            found = self.report()
            show(self.node, report_words(found) if found is not None else "")

    def keep(self, report: RunReport, now: tuple[Prompt, str, int] | None) -> None:
        """Takes in a run in place of what its sampler did in an earlier job."""
        prompt, node, place = now or (Prompt("", {}), "", 0)
        if prompt.id != self.job or now is None:
            self.job, self.counts = prompt.id, Counter()
            self.forget(prompt)
        if not self.counts[node, place]:
            self.runs = {key: run for key, run in self.runs.items() if key[:2] != (node, place)}
        report.job = prompt.id
        self.runs[node, place, self.counts[node, place]] = report
        self.counts[node, place] += 1

    def forget(self, prompt: Prompt) -> None:
        """Leaves out samplers that do not sample what this node gives them any more."""
        if self.node is not None and self.node in prompt.graph:
            follow = downstream(prompt.graph, self.node)
            # Nodes that another expanded into are named after it, with points between.
            self.runs = {key: run for key, run in self.runs.items() if key[0].split(".")[0] in follow}

    def report(self) -> RunReport | None:
        """All that its samplers did last, as one report; None before any ran."""
        earlier = self.before.report() if self.before is not None else None
        found = [*([earlier] if earlier is not None else []), *self.runs.values()]
        return replace(joined(found), label=self.label or found[-1].label) if found else None


def current_report(value: ReportRecorder | RunReport | None) -> RunReport | None:
    """The report that a wire carries, as it is now."""
    return value.report() if isinstance(value, ReportRecorder) else value


def repetition(guider, noise: Tensor, latent: Tensor, sampler, sigmas: Tensor, given: Mapping[str, Any]) -> Callable:
    """Samples once more as OUTER_SAMPLE was asked to; a guider samples any number of times."""
    shapes, mask = given.get("latent_shapes") or [], given.get("denoise_mask")

    def unpacked(values: Tensor | None) -> Any:
        if values is None or len(shapes) < 2:
            return values
        return comfy.nested_tensor.NestedTensor(comfy.utils.unpack_latents(values, shapes))

    def again(tick: Callable[[], None]) -> RunReport:
        token = repeated.set([])
        try:
            guider.sample(
                unpacked(noise),
                unpacked(latent),
                sampler,
                sigmas,
                denoise_mask=unpacked(mask),
                callback=lambda *_: tick(),
                disable_pbar=True,
                seed=given.get("seed"),
            )
            return (repeated.get() or [])[0]
        finally:
            repeated.reset(token)

    return again


def measured_sample(
    patcher, settings: Settings, latent: Tensor, noise: Tensor, seed: int, label: str, mask: Tensor | None = None
) -> tuple[Tensor, RunReport]:
    """Samples as a stock node does, with the report of the run."""
    recorder, progress = ReportRecorder(label), Progress(patcher, settings.steps)
    samples = sample(recorder.attach(patcher), settings, latent, noise, seed, progress.step, mask)
    report = recorder.report()
    if report is None:  # no step: nothing was sampled
        report = RunReport("", 0, latent.shape[0], settings.cfg, str(patcher.load_device))
        report.label = label or labels(patcher) or PLAIN
        report.size = [list(part.shape[1:]) for part in parts_of(latent)]
    report.sampler, report.cfg_scale = f"{settings.sampler_name}, {settings.scheduler}", settings.cfg
    report.seed, report.denoise = seed, settings.denoise
    return samples, report


NAMES = ("denoise_mask", "callback", "disable_pbar", "seed", "latent_shapes")  # of what OUTER_SAMPLE is given further


def named(args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {**dict(zip(NAMES, args)), **kwargs}


def with_callback(args: tuple, kwargs: dict[str, Any], change: Callable) -> tuple[tuple, dict[str, Any]]:
    """The arguments with another callback, each where it was: wrappers of other packs may count them."""
    at = NAMES.index("callback")
    if len(args) > at:
        return (*args[:at], change(args[at]), *args[at + 1 :]), kwargs
    return args, {**kwargs, "callback": change(kwargs.get("callback"))}


def scale_of(guider) -> float | None:
    """The guidance scale of a guider that has one."""
    scale = getattr(guider, "cfg", None)
    return float(scale) if isinstance(scale, (int, float)) else None


def made_by_us(prompt: Prompt, node: str) -> bool:
    """True while calibrating or fitting samples, which is no run of the user's."""
    kind = str(prompt.graph.get(node, {}).get("class_type", ""))
    return kind.startswith(OURS) and kind != SAMPLE


def paged_weights(patcher) -> int:
    """Bytes of weights on the device that dynamic VRAM keeps outside torch's allocator."""
    if not getattr(patcher, "is_dynamic", bool)():
        return 0
    return max(0, patcher.loaded_size() - patcher.model.model_loaded_weight_memory)


def report_words(report: RunReport) -> str:
    """The report in the lines that a node shows, two of which it shows without being made larger."""
    steps = f"{report.computed_steps} of {report.computed_steps + report.reused_steps} steps computed"
    runs = f" in {report.parts} runs" if report.parts > 1 else ""
    per_step = f", {1000 * report.total_seconds / len(report.seconds):.0f} ms a step" if report.seconds else ""
    size = " + ".join("x".join(map(str, shape)) for shape in report.size)
    about = [f"{report.images} x {size}", report.sampler, "" if report.seed is None else f"seed {report.seed}"]
    lines = [
        "" if report.finished else "The run did not end.",
        f"{report.total_seconds:.2f} s{per_step}",
        f"{steps}{runs}",
        *(f"Warning: {text}" for text in report.warnings),
        ", ".join(filter(None, about)),
        f"cache {report.cache_bytes / 2**20:.1f} MiB" if report.cache_bytes else "",
        f"peak memory {report.peak_memory / 2**20:.0f} MiB"
        if report.peak_memory and "cpu" not in report.device
        else "",
    ]
    return sentences(lines)
