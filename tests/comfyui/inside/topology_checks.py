"""Every topology of the official templates with each of our nodes, against hooks and steps written by hand.

Apply Cache: Euler steps that call the model on the listed steps and extrapolate its prediction on the others take the
place of ComfyUI's function for the sampler "euler"; the workflow is otherwise the same, on models without our node.
Quantize: a hook on every quantized layer compares what it returns with int8 arithmetic on codes and inputs rotated and
rounded here.
TAP Calibrate: hooks on the layers gather the tokens that they are given while the workflow's own sampler node runs.
Variance Compensate: Euler steps that are corrected by the deviation of a second run's samples, before each step.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache
from itertools import combinations
from typing import Any
from unittest.mock import patch

import families
import torch
from family_list import FAMILIES
from host import Host, main, relative
from topologies import TOPOLOGIES, Absent, Desk, Run, Topology, experts, node_classes

INTERVAL = 3


def run(host: Host, topology: Topology, models: list) -> tuple[torch.Tensor, Desk]:
    """The samples of the last latent, flat, and the desk with what its sampler nodes were given."""
    desk = Desk(node_classes(host), topology.family, models)
    return families.flat(topology.run(desk)["samples"]), desk


@contextmanager
def counted(models: list):
    """The number of calls of each model's network, as a list that fills up."""
    calls = [0] * len(models)

    def count(number: int) -> Callable:
        return lambda *_: calls.__setitem__(number, calls[number] + 1)

    with ExitStack() as stack:
        for number, model in enumerate(models):
            hook = model.model.diffusion_model.register_forward_pre_hook(count(number))
            stack.callback(hook.remove)
        yield calls


Correct = Callable[[int, torch.Tensor, float], torch.Tensor]  # (step, sample, sigma) -> sample


def as_it_is(step: int, x: torch.Tensor, sigma: float) -> torch.Tensor:
    return x


def euler(computes: Callable[[int], bool], correct: Correct = as_it_is) -> Callable:
    """Euler's method without noise, each step from a corrected sample.

    A step that does not compute takes the line through the last two predictions. Under a mask the sample is what the
    model is given, the kept part of the image with as much noise as the step has, and only the rest is stepped.
    """

    def sample_euler(model, x, sigmas, extra_args=None, callback=None, disable=None, **options):
        computed: list[tuple[int, torch.Tensor]] = []
        given = {key: value for key, value in extra_args.items() if key != "denoise_mask"}
        mask = extra_args.get("denoise_mask")
        for i in range(len(sigmas) - 1):
            sigma = sigmas[i] * x.new_ones(len(x))
            seen = x if mask is None else x * mask + noised(model, sigma, x) * (1 - mask)
            seen = correct(i, seen, float(sigmas[i]))
            if computes(i):
                denoised = model.inner_model(seen, sigma, **given)
                computed = [*computed[-1:], (i, denoised)]
            elif len(computed) == 2:
                (a, first), (b, last) = computed
                denoised = last + (last - first) * (i - b) / (b - a)
            ratio = sigmas[i + 1] / sigmas[i]
            stepped = denoised + (seen - denoised) * ratio
            kept = None if mask is None else model.latent_image + (x - model.latent_image) * ratio
            x = stepped if mask is None else stepped * mask + kept * (1 - mask)
        return x

    return sample_euler


def noised(model, sigma: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The image to keep, at a noise level."""
    sampling = model.inner_model.inner_model.model_sampling
    return sampling.noise_scaling(sigma.reshape(-1, *[1] * (x.ndim - 1)), model.noise, model.latent_image)


def sampled_by_hand(host: Host, topology: Topology, models: list, computes: Callable[[int], bool]) -> torch.Tensor:
    import comfy.k_diffusion.sampling

    with patch.object(comfy.k_diffusion.sampling, "sample_euler", euler(computes)):
        return run(host, topology, models)[0]


def check_cache(host: Host, topology: Topology, models: list, plain: torch.Tensor) -> dict[str, Any]:
    node, policy = host.node("QandC_ApplyCache"), {"policy": "interval", "interval": INTERVAL}
    fast = [node.execute(model, policy, 1).args[0] for model in models]
    with counted(models) as all_calls:
        again = run(host, topology, models)[0]
    with counted(models) as calls:
        out = run(host, topology, fast)[0]
    with counted(models) as calls_by_hand:
        by_hand = sampled_by_hand(host, topology, models, lambda i: i % INTERVAL == 0)
    every_step = sampled_by_hand(host, topology, models, lambda i: True)
    return {
        "error": relative(out, by_hand),
        "effect": relative(out, plain),
        "plain": relative(every_step, plain),
        "calls": calls,
        "calls by hand": calls_by_hand,
        "of": all_calls,
        "clean": torch.equal(again, plain) and torch.equal(run(host, topology, models)[0], plain),
    }


@cache
def rotation(group: int) -> torch.Tensor:
    """The regular Hadamard matrix of the formats, a power of the one of four, scaled to be orthogonal."""
    four = torch.tensor([[1.0, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]) / 2
    return four if group == 4 else torch.kron(rotation(group // 4), four)


def rotated(x: torch.Tensor, group: int) -> torch.Tensor:
    return (x.reshape(-1, group) @ rotation(group)).reshape(x.shape)


class Int8Layers:
    """Hooks on the quantized layers of a model: each call's result against arithmetic by hand, the worst of all."""

    def __init__(self, model: Any):
        self.layers = {
            name: layer
            for name, layer in model.model.diffusion_model.named_modules()
            if hasattr(getattr(layer, "weight", None), "_qdata")
        }
        self.error, self.calls = 0.0, 0

    def __enter__(self) -> Int8Layers:
        self.hooks = [layer.register_forward_hook(self.compare) for layer in self.layers.values()]
        return self

    def __exit__(self, *error) -> None:
        for hook in self.hooks:
            hook.remove()

    def compare(self, layer, args, out: torch.Tensor) -> None:
        codes, params = layer.weight._qdata, layer.weight._params
        x = rotated(args[0].float().reshape(-1, codes.shape[1]), params.convrot_groupsize)
        step = (x.abs().amax(1, keepdim=True) / 127).clamp(min=1e-30)
        by_hand = ((x / step).round().double() @ codes.double().T) * step * params.scale.reshape(1, -1)
        if layer.bias is not None:
            by_hand = by_hand + layer.bias
        self.error = max(self.error, relative(out.reshape(by_hand.shape), by_hand))
        self.calls += 1


def largest_rounding(quantized: Int8Layers, full: Any) -> float:
    """How far a rotated weight within the grid lies from its code, in steps; 0.5 is the most that rounding allows."""
    worst = 0.0
    for name, layer in quantized.layers.items():
        params = layer.weight._params
        weight = full.model.diffusion_model.get_submodule(name).weight.float()
        steps = rotated(weight, params.convrot_groupsize) / params.scale.reshape(-1, 1)
        worst = max(worst, float((steps.clamp(-127, 127) - layer.weight._qdata).abs().max()))
    return worst


def check_quantize(host: Host, topology: Topology, models: list, plain: torch.Tensor) -> dict[str, Any]:
    native, formats = (host.module(f"nodes.comfyui.quantize.{name}") for name in ("native", "formats"))
    if not formats.supported("W8A8"):
        return {"absent": "this ComfyUI has no W8A8"}
    small = [
        native.quantize_native(model, native.NativeSettings("W8A8", rounding="nearest"), None)[0] for model in models
    ]
    with ExitStack() as stack:
        watched = [stack.enter_context(Int8Layers(model)) for model in small]
        out = run(host, topology, small)[0]
    return {
        "error": max(one.error for one in watched),
        "rounding": max(largest_rounding(one, model) for one, model in zip(watched, models)),
        "layers": sum(len(one.layers) for one in watched),
        "layer calls": [one.calls for one in watched],
        "effect": relative(out, plain),
        "clean": torch.equal(run(host, topology, models)[0], plain),
    }


class Rows:
    """Hooks that gather what some layers of a model are given, as rows."""

    def __init__(self, model: Any, names: list[str]):
        network = model.model.diffusion_model
        self.layers = {name: network.get_submodule(name) for name in names}
        self.rows: dict[str, list[torch.Tensor]] = {name: [] for name in names}

    def __enter__(self) -> Rows:
        self.hooks = [
            layer.register_forward_pre_hook(
                lambda _, args, name=name: self.rows[name].append(args[0].reshape(-1, args[0].shape[-1]).clone())
            )
            for name, layer in self.layers.items()
        ]
        return self

    def __exit__(self, *error) -> None:
        for hook in self.hooks:
            hook.remove()

    def differ(self, statistics: dict[str, Any]) -> float:
        """The largest relative difference of any statistic of any layer; infinite where the numbers of rows differ."""
        worst = 0.0
        for name, kept in self.rows.items():
            rows, found = torch.cat(kept).double(), statistics[name]
            if found.count != len(rows):
                return float("inf")
            pairs = [(found.low, rows.amin(0)), (found.high, rows.amax(0))]
            pairs += [] if found.hessian is None else [(found.hessian, rows.T @ rows)]
            spread = float((found.mean.double() - rows.mean(0)).norm() / rows.std(0).norm().clamp(min=1e-30))
            worst = max(worst, spread, *(relative(ours, by_hand) for ours, by_hand in pairs))
        return worst


def calibrated(host: Host, run: Run):
    """All model calls of one run, through the node."""
    wired = run.as_wired()
    return host.node("QandC_TAPCalibrate").execute(
        model=None if "guider" in wired else run.model, file="new", trajectories=1, samples=10**6, batch_size=1,
        selection="random", held_out=0, filename_prefix="workflows", **wired,
    ).args[0]  # fmt: skip


def check_tap(host: Host, topology: Topology, models: list, plain: torch.Tensor) -> dict[str, Any]:
    """A calibration for every run of a sampler node: two experts, or two stages, give two."""
    _, desk = run(host, topology, models)
    errors, layers = [], []
    for one in list(desk.runs):
        statistics = calibrated(host, one).statistics
        with Rows(one.model, list(statistics)) as rows:
            desk.again(one, one.model)
        errors.append(rows.differ(statistics))
        layers.append(len(statistics))
    return {
        "error": max(errors),
        "layers": layers,
        "clean": torch.equal(run(host, topology, models)[0], plain),
    }


class MatchedDeviation:
    """Corrects each channel of a sample to deviate from its mean as the sample of a reference run does."""

    def __init__(self, shapes: list[tuple[int, ...]], flow: bool):
        self.shapes, self.flow, self.seen = shapes, flow, []

    def look(self, step: int, x: torch.Tensor, sigma: float) -> torch.Tensor:
        self.seen.append(x.clone())
        return x

    def correct(self, step: int, x: torch.Tensor, sigma: float) -> torch.Tensor:
        if step == 0:  # both begin with the same noise
            return x
        parts = [self.matched(*pair) for pair in zip(self.parts(x), self.parts(self.seen[step]))]
        return torch.cat([part.flatten(1) for part in parts], 1).reshape(x.shape)

    def parts(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The parts of a packed latent, (N, C, ...) each."""
        sizes = [torch.Size(shape[1:]).numel() for shape in self.shapes]
        return [part.reshape(len(x), *shape[1:]) for part, shape in zip(x.flatten(1).split(sizes, 1), self.shapes)]

    def matched(self, x: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        rows, wanted = (values.double().transpose(0, 1).flatten(1) for values in (x, reference))
        middle, factor = rows.mean(1, keepdim=True), wanted.std(1, keepdim=True) / rows.std(1, keepdim=True)
        return (middle + factor * (rows - middle)).reshape(x.transpose(0, 1).shape).transpose(0, 1).to(x)


def check_compensation(host: Host, topology: Topology, models: list, plain: torch.Tensor) -> dict[str, Any]:
    """For every run of a sampler node, on a model with a cache, fitted and sampled with one noise."""
    import comfy.k_diffusion.sampling

    apply, policy = host.node("QandC_ApplyCache"), {"policy": "interval", "interval": INTERVAL}
    _, desk = run(host, topology, models)
    errors, effects = [], []
    for one in list(desk.runs):
        (fast,) = apply.execute(one.model, policy, 1).args
        wired = one.as_wired()
        (compensated,) = host.node("QandC_VarianceCompensate").execute(
            model=fast, reference=one.model, file="new", pairs=1, method="variance_match", start_percent=0.0,
            end_percent=1.0, filename_prefix="workflows_vc", **{**SETTINGS, **wired},
        ).args  # fmt: skip
        out = desk.again(one, compensated)
        hand = MatchedDeviation(shapes_of(one.inputs["latent_image"]["samples"]), is_flow(one.model))
        for function in (euler(lambda i: True, hand.look), euler(lambda i: i % INTERVAL == 0, hand.correct)):
            with patch.object(comfy.k_diffusion.sampling, "sample_euler", function):
                by_hand = desk.again(resampled(desk, one), one.model)
        errors.append(relative(out, by_hand))
        effects.append(relative(out, desk.again(one, fast)))
    return {
        "error": max(errors),
        "runs": len(errors),
        "effect": min(effects),
        "clean": torch.equal(run(host, topology, models)[0], plain),
    }


SETTINGS = {"steps": 0, "cfg": -1.0, "sampler_name": "auto", "scheduler": "auto", "calibration_seed": 0}


def resampled(desk: Desk, one: Run) -> Run:
    """The run with its SAMPLER chosen anew, which looks up ComfyUI's function again."""
    if "sampler" not in one.inputs:
        return one
    return replace(one, inputs={**one.inputs, "sampler": desk("KSamplerSelect", sampler_name="euler")})


def shapes_of(latent: torch.Tensor) -> list[tuple[int, ...]]:
    return [tuple(part.shape) for part in (latent.unbind() if latent.is_nested else [latent])]


def is_flow(model: Any) -> bool:
    return model.model.model_type.name in ("FLOW", "FLUX")


class SampleRows(Rows):
    """The same, apart for every sample of every model call: image and condition."""

    def __init__(self, model: Any, names: list[str]):
        super().__init__(model, names)
        self.samples: list[dict[str, torch.Tensor]] = []
        self.model = model.clone()
        self.model.add_wrapper_with_key("apply_model", "check", self.call)

    def call(self, executor, x, *args, **kwargs):
        self.rows = {name: [] for name in self.layers}
        out = executor(x, *args, **kwargs)
        ran = {name: kept for name, kept in self.rows.items() if kept}
        for i in range(len(x) if ran else 0):  # none did in a call of a guider's other model
            self.samples.append(
                {name: torch.cat([rows.chunk(len(x))[i] for rows in kept]) for name, kept in ran.items()}
            )
        return out

    def nearest(self, statistics: dict[str, Any], count: int) -> float:
        """The difference to the statistics of those `count` samples that come nearest."""
        found = float("inf")
        for chosen in combinations(self.samples, count):
            self.rows = {name: [sample[name] for sample in chosen] for name in self.layers}
            first = next(iter(self.layers))
            if relative(statistics[first].high, torch.cat(self.rows[first]).amax(0)) < 1e-5:
                found = min(found, self.differ(statistics))
        return found


def check_recording(host: Host, topology: Topology, models: list, plain: torch.Tensor) -> dict[str, Any]:
    """Every run of a sampler node recorded into a file of its own, as two experts are; the images stay the same."""
    load = host.module("qandc_core.calibration.file").load_calibration
    recorder = host.module("qandc_core.calibration.recorder")
    recorder.FEWEST = recorder.MOST = 10**9  # all tokens enter the sums, so that they can be added up by hand
    _, desk = run(host, topology, models)
    errors, samples, same = [], [], True
    for number, one in enumerate(list(desk.runs)):
        name = f"workflow_{list(TOPOLOGIES.values()).index(topology)}_{number}"
        (recording, _) = host.node("QandC_CalibrateFromRuns").execute(
            model=one.model, name=name, record=True, samples=8, hessians=True, memory_gb=4.0, tokens=4096, held_out=2,
            reset=0,
        ).args  # fmt: skip
        layers = [name for name, layer in one.model.model.diffusion_model.named_modules() if is_linear(layer)]
        with SampleRows(recording, layers) as rows:
            same = same and torch.equal(desk.again(one, rows.model), desk.again(one, one.model))
        host.module("nodes.comfyui.calibrate.recording").settle()
        calibration = load(host.base / "output" / "qandc" / f"{name}.safetensors")
        rows.layers = {name: layer for name, layer in rows.layers.items() if name in calibration.statistics}
        errors.append(rows.nearest(calibration.statistics, calibration.recording.samples))
        samples.append([calibration.recording.samples, len(rows.samples)])
    return {
        "error": max(errors),
        "samples": samples,
        "same images": same,
        "clean": torch.equal(run(host, topology, models)[0], plain),
    }


def is_linear(layer: torch.nn.Module) -> bool:
    return getattr(layer, "weight", None) is not None and layer.weight.ndim == 2 and hasattr(layer, "in_features")


def check_report(host: Host, topology: Topology, models: list, plain: torch.Tensor) -> dict[str, Any]:
    """A cached run measured, against the calls of the networks and what the sampler functions were handed."""
    import comfy.k_diffusion.sampling

    policy, before, fast, measured = {"policy": "interval", "interval": INTERVAL}, None, [], []
    for model in models:
        (cached,) = host.node("QandC_ApplyCache").execute(model, policy, 1).args
        watched, before = host.node("QandC_RunReport").execute(cached, "measured", before).args
        fast.append(cached)
        measured.append(watched)
    handed: list[torch.Tensor] = []
    stock = comfy.k_diffusion.sampling.sample_euler

    def sample_euler(model, x, sigmas, *args, **kwargs):
        handed.append(sigmas)
        return stock(model, x, sigmas, *args, **kwargs)

    with counted(models) as all_calls:
        run(host, topology, models)
    begun = time.perf_counter()
    with counted(models) as calls, patch.object(comfy.k_diffusion.sampling, "sample_euler", sample_euler):
        out, desk = run(host, topology, measured)
    taken, report = time.perf_counter() - begun, before.report()
    by_hand = [i % INTERVAL == 0 for sigmas in handed for i in range(len(sigmas) - 1)]
    return {
        "steps": [report.steps, len(by_hand)],
        "computed": report.computed == by_hand,
        "calls": [sum(calls) * len(by_hand), sum(all_calls) * sum(by_hand)],
        "runs": [report.parts, len(desk.runs)],
        "size": [
            report.size,
            [list(shape[1:]) for shape in shapes_of(desk.runs[-1].inputs["latent_image"]["samples"])],
        ],
        "seconds": len(report.seconds) == len(by_hand) and min(report.seconds) > 0 and sum(report.seconds) < taken,
        "finished": report.finished,
        "same images": torch.equal(out, run(host, topology, fast)[0]),
        "clean": torch.equal(run(host, topology, models)[0], plain),
    }


COLUMNS: dict[str, Callable] = {
    "Apply Cache": check_cache,
    "Calibrate from Runs": check_recording,
    "TAP Calibrate": check_tap,
    "Quantize": check_quantize,
    "Variance Compensate": check_compensation,
    "Run Report": check_report,
}


def result(host: Host, name: str) -> dict[str, Any]:
    """Column -> what was found, or why this ComfyUI lacks the topology."""
    import comfy.supported_models

    topology, found = TOPOLOGIES[name], {"nodes": TOPOLOGIES[name].nodes, "family": TOPOLOGIES[name].family}
    if not hasattr(comfy.supported_models, FAMILIES[topology.family].config):
        return {"absent": f"this ComfyUI has no {topology.family}"}
    models = experts(topology)
    try:
        plain, _ = run(host, topology, models)
    except Absent as error:
        return {"absent": f"this ComfyUI has no node {error}"}
    assert plain.isfinite().all() and plain.std() > 0, "the random model gives nothing to compare"
    for column, check in CHOSEN.items():
        try:
            found[column] = check(host, topology, models, plain)
        except Exception:
            found[column] = {"failed": traceback.format_exc(limit=-4)}
    return found


# Arguments after the first two choose columns and rows.
CHOSEN = {name: check for name, check in COLUMNS.items() if name in sys.argv[3:]} or COLUMNS
ROWS = [name for name in TOPOLOGIES if name in sys.argv[3:]] or list(TOPOLOGIES)

if __name__ == "__main__":
    main({name: lambda host, name=name: result(host, name) for name in ROWS})
