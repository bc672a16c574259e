"""Times of one model in every variant under KSampler's sampling: runs in ComfyUI's Python, prints JSON.

Called by `python -m benchmarks.comfyui`; argv: checkout, base directory with the pack, options as JSON. Prints all that
is known after each round, on a line that begins with RESULTS.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import logging
import platform
import random
import shlex
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import fidelity
import speed_models
import speed_variants
import torch
from host import Host
from inside_large import forget_peak, resident
from speed_variants import STOCK, Variant

BEGUN = time.perf_counter()
SAMPLER, SCHEDULER = "euler", "simple"
SYNCHRONIZING = "called a synchronizing CUDA operation"  # in torch's warning
PREPARING = 0.6  # of the time: no further variant is made after it
KEY = "qandc_speed"
WORDS = 400  # letters of an error message


def start(checkout: str, base: str, options: dict[str, Any]) -> Host:
    """ComfyUI, with a GPU where there is one: it reads its arguments once, before Host gives it those of the tests."""
    if options["device"] == "auto" and torch.cuda.is_available():
        sys.path.insert(0, checkout)
        sys.argv = ["main.py", "--base-directory", base, *shlex.split(options["arguments"])]
        import comfy.options

        comfy.options.enable_args_parsing()
        importlib.import_module("comfy.cli_args")
    return Host(checkout, base, dynamic=options["dynamic"])


class Watch:
    """PREDICT_NOISE: the time of every prediction of the sampler, and whether a cache answered it."""

    def __init__(self, host: Host, device: torch.device):
        self.clock = host.module("qandc_core.sampling.clock")
        self.times = self.clock.CallTimes()
        self.is_reused = host.module("nodes.comfyui.cache.attach").is_reused
        self.device = device
        self.computed: list[bool] = []

    def __call__(self, executor, x, timestep, model_options, seed):
        options = model_options["transformer_options"]
        skipped, begun = skipped_steps(options), self.clock.mark(self.device)
        out = executor(x, timestep, model_options, seed)
        reused = self.is_reused(options) or skipped_steps(options) > skipped
        self.times.add(begun, self.clock.mark(self.device), reused)
        self.computed.append(not reused)
        return out

    def step_seconds(self) -> dict[str, float | None]:
        """Medians; the first computed step is left out."""
        spans = {"computed_step": self.times.seconds(False)[1:], "reused_step": self.times.seconds(True)}
        return {name: statistics.median(values) if values else None for name, values in spans.items()}


def skipped_steps(transformer_options: dict[str, Any]) -> int:
    """How many steps EasyCache has skipped so far."""
    held = transformer_options.get("easycache")
    return 0 if held is None else held.total_steps_skipped


class Bench:
    """Runs of one subject."""

    def __init__(self, host: Host, subject: speed_models.Subject, options: dict[str, Any]):
        self.host, self.subject, self.options = host, subject, options
        self.synchronize = host.module("qandc_core.sampling.clock").synchronize
        self.report_key = host.module("nodes.comfyui.wrappers").REPORT
        self.settle = host.module("nodes.comfyui.calibrate.recording").settle
        self.given_up = GivenUp()

    def has_time(self, share: float = 1.0) -> bool:
        return time.perf_counter() - BEGUN < share * self.options["seconds"]

    def steps(self, variant: Variant) -> int:
        return self.options["steps"] // 2 if variant.halved else self.options["steps"]

    def run(self, patcher, steps: int, seed: int) -> tuple[torch.Tensor, dict[str, Any]]:
        """Latents, and what was measured; the model is loaded before the clock starts."""
        import comfy.model_management
        import comfy.sample
        from comfy.patcher_extension import WrappersMP

        subject, watch, graphs = self.subject, Watch(self.host, self.subject.device), graphs_compiled()
        watched = patcher.clone()
        watched.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, watch)
        report = self.report(steps)
        watched.model_options["transformer_options"][self.report_key] = report
        noise = comfy.sample.prepare_noise(subject.latent, seed)
        comfy.model_management.load_models_gpu([watched])
        self.synchronize(subject.device)
        begun = time.perf_counter()
        out = comfy.sample.sample(
            watched, noise, steps, self.options["cfg"], SAMPLER, SCHEDULER, subject.positive, subject.negative,
            subject.latent, disable_pbar=True, seed=seed,
        )  # fmt: skip
        self.synchronize(subject.device)
        sampled = time.perf_counter()
        self.settle()  # files of recorded runs are written
        done = time.perf_counter()
        found = {
            "seconds": done - begun,
            "writing": done - sampled,
            "computed": sum(watch.computed),
            **watch.step_seconds(),
        }
        return out, {**found, "graphs": graphs_compiled() - graphs, "warnings": report.warnings}

    def report(self, steps: int) -> Any:
        subject, run_report = self.subject, self.host.module("qandc_core").RunReport
        return run_report(SAMPLER, steps, len(subject.latent), self.options["cfg"], str(subject.device))

    def peak_bytes(self, patcher, steps: int) -> tuple[int, float | None]:
        """The model and the most that a run holds beyond what was held before it; waits of the host for each step."""
        cuda = self.subject.device.type == "cuda"
        held, peak, forget = CUDA_MEMORY if cuda else PROCESS_MEMORY
        gc.collect()
        forget()
        before = held()
        with counted_waits(cuda) as said:
            self.run(patcher, steps, seed=0)
        waits = sum(SYNCHRONIZING in str(warning.message) for warning in said) / steps if cuda else None
        return patcher.model_size() + peak() - before, waits


@contextmanager
def counted_waits(cuda: bool) -> Iterator[list[warnings.WarningMessage]]:
    """Collects torch's warnings of operations for which the host waits."""
    with warnings.catch_warnings(record=cuda) as said:
        if not cuda:
            yield []
            return
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield said
        finally:
            torch.cuda.set_sync_debug_mode("default")


def forget_process_peak() -> None:
    """Also gives freed memory back to the system, which would else not count when it is used again."""
    ctypes.CDLL(None).malloc_trim(0)
    forget_peak()


Memory = tuple[Callable[[], int], Callable[[], int], Callable[[], None]]  # held now, peak, forget the peak
CUDA_MEMORY: Memory = (
    torch.cuda.memory_allocated, torch.cuda.max_memory_allocated, torch.cuda.reset_peak_memory_stats
)  # fmt: skip
PROCESS_MEMORY: Memory = (lambda: resident("VmRSS"), lambda: resident("VmHWM"), forget_process_peak)


class GivenUp(logging.Handler):
    """Counts the functions that torch.compile leaves as they are, because they had too many graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        logging.getLogger("torch._dynamo.convert_frame").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.count += "recompile_limit" in record.getMessage()


def graphs_compiled() -> int:
    """Graphs that torch.compile made in this process."""
    if "torch._dynamo.utils" not in sys.modules:
        return 0
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def failure(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:WORDS]


class Row:
    """A variant's measurements, up to the error that ends them."""

    def __init__(self, bench: Bench, workshop: speed_variants.Workshop, variant: Variant):
        self.bench, self.variant, self.patcher = bench, variant, None
        self.found: dict[str, Any] = {"variant": variant.name, "steps": bench.steps(variant), "rounds": []}
        self.attempt(lambda: self.prepare(workshop))

    @property
    def fails(self) -> bool:
        return "fails" in self.found

    def attempt(self, call: Callable[[], Any]) -> Any:
        """What the call returns; None where it raises, which ends the row and becomes its result."""
        try:
            return call()
        except Exception as error:
            self.found["fails"] = failure(error)
            self.log(f"fails: {self.found['fails']}")
            return None

    def log(self, text: str) -> None:
        print(f"{self.variant.name}: {text}", file=sys.stderr, flush=True)

    def prepare(self, workshop: speed_variants.Workshop) -> None:
        """Makes the model and runs it once with whatever happens on first use, and once for its memory and waits."""
        self.patcher = workshop.make(self.variant)
        steps = min(self.bench.options["warm"] or self.found["steps"], self.found["steps"])
        before = self.bench.given_up.count
        first = self.bench.run(self.patcher, steps, seed=0)[1]
        self.found |= {"first_seconds": first["seconds"], "first_graphs": first["graphs"]}
        self.found["peak_bytes"], self.found["waits"] = self.bench.peak_bytes(self.patcher, steps)
        self.found["model_bytes"] = self.patcher.model_size()
        self.found["made"] = workshop.made.get(self.variant.format)
        self.found["given_up"] = self.bench.given_up.count - before
        report = self.patcher.model_options["transformer_options"].get("qandc_quantization")
        if report is not None:
            self.found |= {"layers": report.counts, "backend": report.backend}
        self.log(f"first run {self.found['first_seconds']:.2f} s")

    def measure(self, seed: int) -> tuple[torch.Tensor, dict[str, Any]] | None:
        return self.attempt(lambda: self.bench.run(self.patcher, self.found["steps"], seed))

    def add(self, made: tuple[torch.Tensor, dict[str, Any]], stock: tuple[torch.Tensor, dict[str, Any]]) -> None:
        """A round, with its speedup and error against stock in the same round."""
        (latents, found), (wanted, plain) = made, stock
        error = statistics.mean(fidelity.relative_l2(latents.float(), wanted.float()))
        self.found["rounds"].append({**found, "speedup": plain["seconds"] / found["seconds"], "error": error})
        self.log(f"{found['seconds']:.3f} s, {found['computed']} steps computed")


Save = Callable[[list[Row]], None]


def measure(
    bench: Bench, workshop: speed_variants.Workshop, variants: list[Variant], save: Save = lambda rows: None
) -> list[Row]:
    """Every round runs all variants once, in random order, from noise of its own. The first variant is stock, and first
    in each round, so that whatever was run before the time ended has something to be compared with.
    """
    rows = prepared(bench, workshop, variants)
    order = random.Random(0)
    for seed in range(bench.options["rounds"]):
        live = [row for row in rows if not row.fails]
        made: dict[Variant, Any] = {}
        for row in [*live[:1], *order.sample(live[1:], len(live) - 1)]:
            if seed and not bench.has_time():
                break
            made[row.variant] = row.measure(seed)
        if rows[0].fails:  # as after an error that leaves the GPU unusable
            break
        for row in live:
            if made.get(row.variant) is not None:
                row.add(made[row.variant], made[STOCK])
        save(rows)
    for row in rows:
        if not row.found["rounds"]:
            row.found.setdefault("fails", f"stock ended first: {rows[0].found.get('fails')}")
    return rows


def prepared(bench: Bench, workshop: speed_variants.Workshop, variants: list[Variant]) -> list[Row]:
    """As many of the variants as there is time for."""
    rows: list[Row] = []
    for variant in variants:
        if rows and not bench.has_time(PREPARING):
            print(f"no time for {variant.name} and what follows", file=sys.stderr, flush=True)
            break
        rows.append(Row(bench, workshop, variant))
    return rows


def measure_all(bench: Bench, workshop: speed_variants.Workshop, variants: list[Variant], save: Save) -> list[Row]:
    """Variants that would run the graphs of others are measured beside stock alone, after torch forgot those."""
    rows = measure(bench, workshop, [variant for variant in variants if not variant.alone], save)
    for variant in variants:
        if variant.alone:
            torch.compiler.reset()
            rows += measure(bench, workshop, [STOCK, variant])[1:]
    return sorted(rows, key=lambda row: variants.index(row.variant))


def backends() -> dict[str, str]:
    """Of comfy-kitchen: whether each runs here, or why not."""
    import comfy_kitchen

    return {
        name: "disabled" if state["disabled"] else "available" if state["available"] else state["unavailable_reason"]
        for name, state in sorted(comfy_kitchen.list_backends().items())
    }


def described(subject: speed_models.Subject) -> dict[str, Any]:
    device, network = subject.device, subject.patcher.model.diffusion_model
    return {
        "title": subject.title, "trained": subject.trained, "latent": list(subject.latent.shape),
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "dtype": str(speed_models.dtype_of(device)).removeprefix("torch."), "backends": backends(),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__, "python": platform.python_version(), "comfy_kitchen": version("comfy-kitchen"),
    }  # fmt: skip


def main() -> None:
    checkout, base, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    host, begun = start(checkout, base, options), time.perf_counter()
    import comfy.utils

    comfy.utils.PROGRESS_BAR_ENABLED = False
    variants = speed_variants.chosen(options["model"], options["only"], options["compiles"])
    with torch.inference_mode():
        subject = speed_models.MODELS[options["model"]](host, options)
        workshop = speed_variants.Workshop(host, subject, options)

        def save(rows: list[Row]) -> None:
            found = {**described(subject), "took": time.perf_counter() - begun, "rows": [row.found for row in rows]}
            print("RESULTS " + json.dumps(found), flush=True)

        save(measure_all(Bench(host, subject, options), workshop, variants, save))


if __name__ == "__main__":
    main()
