"""Calibrate from Runs under every sampler node and guider, on tiny real models, against hooks written by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from cache_tools import cached
from families import build, conditioning, empty_latent, fill
from family_list import FAMILIES
from host import Host, main
from sampling import conditioning as class_labels
from sampling import demo

STEPS, CFG, SEED = 12, 2.0, 11
FLUX = FAMILIES["Flux"]
LAYERS = ("double_blocks.0.img_attn.qkv", "single_blocks.0.linear1")


def path_of(host: Host, name: str) -> Path:
    return host.module("nodes.comfyui.files").named_path(name)


def node(host: Host, patcher, name: str, **inputs):
    """The node's outputs; with samples = 4 in place of its default."""
    given = {"record": True, "samples": 4, "hessians": True, "memory_gb": 1.0, "tokens": 50, "held_out": 4, "reset": 0}
    execute = host.module("nodes.calibrate_from_runs").CalibrateFromRuns.execute
    return execute(model=patcher, name=name, **{**given, **inputs}).args


def recording(host: Host, patcher, name: str, **inputs):
    return node(host, patcher, name, **inputs)[0]


def loaded(host: Host, name: str):
    host.module("nodes.comfyui.calibrate.recording").settle()
    return host.module("qandc_core").load_calibration(path_of(host, name))


# Sampler nodes and guiders: each gives the samples of a run on one patcher.


def prompts() -> tuple:
    return conditioning(FLUX, 1), conditioning(FLUX, 2)


def latent(images: int = 2) -> dict[str, Any]:
    return {"samples": empty_latent(FLUX).repeat(images, 1, 1, 1)}


def ksampler(host: Host, patcher, steps: int = STEPS, sampler: str = "euler", images: int = 2, **options):
    (out,) = host.nodes.common_ksampler(
        patcher, SEED, steps, CFG, sampler, "simple", *prompts(), latent(images), denoise=1.0, **options
    )
    return out["samples"]


def inpainting(host: Host, patcher):
    """A part of the schedule, on a part of the images."""
    images = torch.randn(latent()["samples"].shape, generator=torch.Generator().manual_seed(3))
    mask = torch.zeros(2, 1, *images.shape[-2:])
    mask[..., : images.shape[-1] // 2] = 1
    given = {"samples": images, "noise_mask": mask}
    (out,) = host.nodes.common_ksampler(
        patcher, SEED, STEPS, CFG, "euler", "simple", *prompts(), given, denoise=0.6
    )  # fmt: skip
    return out["samples"]


def halves(host: Host, first, second=None):
    """KSamplerAdvanced twice: half of the steps with one model, the rest with the same or another."""
    sample, (positive, negative) = host.nodes.KSamplerAdvanced().sample, prompts()
    common = {"noise_seed": SEED, "steps": STEPS, "cfg": CFG, "sampler_name": "euler", "scheduler": "simple"}
    common |= {"positive": positive, "negative": negative}
    (half,) = sample(
        first, add_noise="enable", latent_image=latent(), start_at_step=0, end_at_step=STEPS // 2,
        return_with_leftover_noise="enable", **common,
    )  # fmt: skip
    (out,) = sample(
        second or first, add_noise="disable", latent_image=half, start_at_step=STEPS // 2, end_at_step=10000,
        return_with_leftover_noise="disable", **common,
    )  # fmt: skip
    return out["samples"]


def custom(host: Host, patcher):
    import comfy_extras.nodes_custom_sampler as nodes

    sampler, sigmas = parts(patcher)
    positive, negative = prompts()
    return nodes.SamplerCustom.execute(patcher, True, SEED, CFG, positive, negative, sampler, sigmas, latent()).args[0][
        "samples"
    ]


def parts(patcher):
    import comfy_extras.nodes_custom_sampler as nodes

    sampler = nodes.KSamplerSelect.execute("heun").args[0]
    return sampler, nodes.BasicScheduler.execute(patcher, "simple", STEPS, 1.0).args[0]


def advanced(host: Host, patcher, guider: str, *arguments):
    import comfy_extras.nodes_custom_sampler as nodes
    import comfy_extras.nodes_perpneg as others

    made = getattr(nodes, guider, None) or getattr(others, guider)
    made = made.execute(patcher, *arguments).args[0]
    noise = nodes.RandomNoise.execute(SEED).args[0]
    return nodes.SamplerCustomAdvanced.execute(noise, made, *parts(patcher), latent()).args[0]["samples"]


def guided(guider: str) -> Callable:
    positive, negative = prompts()
    arguments = {
        "BasicGuider": (positive,),
        "CFGGuider": (positive, negative, CFG),
        "DualCFGGuider": (positive, conditioning(FLUX, 3), negative, 3.0, 2.0, "regular"),
        "PerpNegGuider": (positive, negative, conditioning(FLUX, 3), CFG, 1.0),
    }[guider]
    return lambda host, patcher: advanced(host, patcher, guider, *arguments)


RUNS: dict[str, Callable] = {
    "KSampler": ksampler,
    "KSampler, ancestral": lambda host, patcher: ksampler(host, patcher, sampler="euler_ancestral"),
    "KSamplerAdvanced halves": halves,
    "SamplerCustom": custom,
    "inpainting": inpainting,
    **{name: guided(name) for name in ("BasicGuider", "CFGGuider", "DualCFGGuider", "PerpNegGuider")},
}


# Hooks written by hand: of every model call that reaches the recorder, what two layers see and which rows were taken.


class Watch:
    def __init__(self, host: Host, patcher):
        self.strata = host.module("qandc_core.calibration.stream").Strata
        self.network = patcher.model.diffusion_model
        self.takes: list[tuple[list[int], list[int]]] = []
        self.calls: list[dict[str, torch.Tensor]] = []
        self.rows: list[int] = []

    @contextmanager
    def around(self) -> Iterator[None]:
        took = self.strata.take

        def take(strata, count: int):
            self.takes.append(took(strata, count))
            self.calls.append({})
            self.rows.append(count)
            return self.takes[-1]

        def see(name: str, x: torch.Tensor) -> None:
            if self.calls and name not in self.calls[-1]:
                self.calls[-1][name] = x.clone()

        with ExitStack() as stack:
            stack.enter_context(patch.object(self.strata, "take", take))
            for name in LAYERS:
                layer = self.network.get_submodule(name)
                stack.callback(layer.register_forward_pre_hook(lambda _, args, name=name: see(name, args[0])).remove)
            yield

    def inputs(self, name: str) -> torch.Tensor:
        """All inputs (M, K) of the chosen rows."""
        found = []
        for seen, (chosen, _), rows in zip(self.calls, self.takes, self.rows):
            if name in seen:
                found.append(seen[name].reshape(rows, -1, seen[name].shape[-1])[chosen].flatten(0, 1))
        return torch.cat(found)


def differing(calibration, watches: list[Watch]) -> list[str]:
    """Layers whose statistics are not those of the hooks."""
    wrong = []
    for name in LAYERS:
        x, layer = torch.cat([watch.inputs(name) for watch in watches]), calibration.statistics[name]
        same = layer.count == len(x) and torch.equal(layer.low, x.amin(0)) and torch.equal(layer.high, x.amax(0))
        same = same and torch.allclose(layer.mean, x.mean(0), rtol=1e-3, atol=1e-4)
        if layer.hessian is not None:
            moment = x.T @ x
            same = same and float((layer.hessian - moment).abs().max()) < 1e-4 * float(moment.abs().max())
        wrong += [] if same else [name]
    return wrong


def clean(patcher) -> bool:
    return not any(part._forward_pre_hooks or part._forward_hooks for part in patcher.model.modules())


def state_of(patcher) -> str:
    return repr((patcher.wrappers, patcher.callbacks, patcher.model_options, patcher.patches))


def topology(host: Host, run: Callable) -> dict[str, Any]:
    """A plain run, then two that are recorded, the second at another size of batch or with the same settings."""
    patcher, name = build(FLUX), f"topology {len(list(path_of(host, 'x').parent.glob('*')))}"
    before, plain = state_of(patcher), run(host, patcher)
    watched, watches, same = recording(host, patcher, name), [], []
    for _ in range(2):
        watches.append(Watch(host, patcher))
        with watches[-1].around():
            same.append(torch.equal(run(host, watched), plain))
    found = loaded(host, name)
    return {
        "same": all(same), "runs": found.recording.runs, "samples": found.recording.samples,
        "taken": sum(len(chosen) for watch in watches for chosen, _ in watch.takes),
        "rows": sum(sum(watch.rows) for watch in watches), "differing": differing(found, watches),
        "schedules": [[len(s.sigmas) - 1, s.runs] for s in found.recording.schedules],
        "distances": found.distances is not None, "held out": len(found.held_out), "clean": clean(patcher),
        "unchanged": state_of(patcher) == before, "layers": len(found.statistics),
    }  # fmt: skip


def two_experts(host: Host) -> dict[str, Any]:
    """Two models of one queue, each with a name of its own, as a graph that loads both."""
    high, low = build(FLUX), build(FLUX)
    with torch.no_grad():
        for parameter in low.model.diffusion_model.parameters():
            parameter.mul_(0.9)
    plain = halves(host, high, low)
    names = ("expert high", "expert low")
    watches = [Watch(host, patcher) for patcher in (high, low)]
    recorded = [recording(host, patcher, name) for patcher, name in zip((high, low), names)]
    with watches[0].around():
        # One strata class serves both runs: the first expert's calls come first, and each hook is on its own network.
        out = halves(host, *recorded)
    runs = [loaded(host, name) for name in names]
    fingerprint = host.module("nodes.comfyui.quantize.weights").fingerprint_of
    takes = watches[0].takes
    half = len(takes) // 2
    return {
        "same": torch.equal(out, plain),
        "own model": [run.model == fingerprint(p) for run, p in zip(runs, (high, low))],
        "runs": [run.recording.runs for run in runs],
        "samples": [run.recording.samples for run in runs],
        "taken": [sum(len(c) for c, _ in part) for part in (takes[:half], takes[half:])],
        "levels": [[run.sigmas[0], run.sigmas[-1]] for run in runs],
        "differing": differing(runs[0], [watches[0]]),
        "mixed": refusal(lambda: recording(host, low, names[0])),
    }


def refusal(attempt: Callable) -> str:
    try:
        attempt()
    except ValueError as error:
        return str(error)
    return ""


def interrupted(host: Host) -> dict[str, Any]:
    """Cancelled in mid-run: the file is as it was, nothing is left on the model, and the next run is added."""
    import comfy.model_management as mm

    patcher, name = build(FLUX), "interrupted"
    watched = recording(host, patcher, name)
    plain = ksampler(host, patcher)
    ksampler(host, watched)
    loaded(host, name)
    before, calls = path_of(host, name).read_bytes(), []

    def cancel(executor, *args):
        calls.append(1)
        if len(calls) == 7:
            mm.interrupt_current_processing()
        return executor(*args)

    stopping = watched.clone()
    stopping.add_wrapper_with_key("predict_noise", "interrupt", cancel)
    try:
        ksampler(host, stopping)
        ended = "not interrupted"
    except mm.InterruptProcessingException:
        ended = ""
    same = path_of(host, name).read_bytes() == before
    again = torch.equal(ksampler(host, watched), plain)
    found = loaded(host, name).recording.runs
    files = [file.name for file in path_of(host, name).parent.iterdir() if file.name.startswith((".", "interrupted"))]
    return {"ended": ended, "as it was": same, "clean": clean(patcher), "again": again, "runs": found, "files": files}


def with_a_cache(host: Host, tier: str, first: str) -> dict[str, Any]:
    """Apply Cache on the same model, before or after: layers are seen on computed steps alone."""
    name, patcher = f"cache {tier} {first}", build(FLUX)
    plain, report = cached(host, patcher, tier, interval=3)
    wanted = ksampler(host, plain)
    if first == "cache":
        made, report = cached(host, patcher, tier, interval=3)
        made = recording(host, made, name)
    else:
        made, report = cached(host, recording(host, patcher, name), tier, interval=3)
    watch = Watch(host, patcher)
    with watch.around():
        out = ksampler(host, made)
    found = loaded(host, name)
    return {
        "same": torch.equal(out, wanted), "computed": sum(report.computed), "calls": len(watch.takes),
        "differing": differing(found, [watch]), "missing": found.notes["distances"],
        "samples": found.recording.samples, "taken": sum(len(chosen) for chosen, _ in watch.takes),
    }  # fmt: skip


def runs_of_many_kinds(host: Host) -> dict[str, Any]:
    """Prompts, sizes, steps, samplers and a LoRA, all in one file, and what other nodes make of it."""
    import comfy.sd

    patcher, name = build(FLUX), "many kinds"
    watched = recording(host, patcher, name, samples=8)
    lora = {
        "diffusion_model.double_blocks.0.img_attn.proj.lora_B.weight": torch.ones(64, 1),
        "diffusion_model.double_blocks.0.img_attn.proj.lora_A.weight": torch.ones(1, 64),
    }
    bent, _ = comfy.sd.load_lora_for_models(watched, None, lora, 0.1, 0)
    ksampler(host, watched, 20)
    ksampler(host, watched, 20, images=1)
    ksampler(host, bent, 10)
    before, _ = comfy.sd.load_lora_for_models(patcher, None, lora, -0.1, 0)
    ksampler(host, recording(host, before, name, samples=8), 10)
    guided("BasicGuider")(host, watched)
    for seed in range(3):
        ksampler(host, watched, 20, images=seed + 1)
    found, again = loaded(host, name), node(host, patcher, name, record=False)[1]
    tap, held_out = host.module("nodes.tap_calibrate"), None
    if formats(host):
        quantize = host.module("nodes.comfyui.quantize.native")
        _, report = quantize.quantize_native(patcher, quantize.NativeSettings(formats(host)[-1]), again)
        held_out = report.model_error[2]
    policies = host.module("qandc_core.caching.policies")
    placed, warnings = host.module("nodes.comfyui.cache.placing").placing(patcher, found)
    run = policies.StepCount(10, distances=placed).plan(20, True, sigmas=found.sigmas, noisy=False)
    return {
        "runs": found.recording.runs, "again": again.recording.runs,
        "listed": f"{path_of(host, name).name}" in host.module("nodes.comfyui.files").calibration_files(),
        "tap": tap.loaded(path_of(host, name), patcher).recording.runs,
        "held-out calls": held_out,
        "steps": found.notes["steps"],
        "schedules": [[len(s.sigmas) - 1, s.runs] for s in found.recording.schedules],
        "history": len(found.recording.history), "text": found.recording.describe(), "warnings": warnings,
        "placed": type(run).__name__, "noisy": placed.noisy,
        "detached": "RunRecorder" not in state_of(node(host, watched, name, record=False)[0]),
    }  # fmt: skip


def refused(host: Host) -> dict[str, str]:
    """What is said where runs cannot be added, by the node and by a run that began differently."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    patcher, found = build(FLUX), {}
    other = build(FLUX)
    fill(other.model.diffusion_model.double_blocks[0])
    with torch.no_grad():
        other.model.diffusion_model.img_in.weight.mul_(2)
    ksampler(host, recording(host, patcher, "refused"))
    found["other model"] = refusal(lambda: recording(host, other, "refused"))
    found["other plan"] = refusal(lambda: recording(host, patcher, "refused", tokens=64))
    compiled = patcher.clone()
    set_torch_compile_wrapper(compiled, backend="inductor")
    found["compiled"] = refusal(lambda: recording(host, compiled, "compiled"))
    later = recording(host, patcher, "compiled")
    set_torch_compile_wrapper(later, backend="inductor")
    found["compiled later"] = refusal(lambda: ksampler(host, later))
    if formats(host):
        quantize = host.module("nodes.comfyui.quantize.native")
        settings = quantize.NativeSettings(formats(host)[0])
        quantized, _ = quantize.quantize_native(recording(host, patcher, "quantized"), settings)
        found["quantized later"] = refusal(lambda: ksampler(host, quantized))
        found["quantized"] = refusal(lambda: recording(host, quantized, "quantized"))
    host.module("qandc_core.calibration.file").Calibration("m").save(path_of(host, "tap"))
    found["other kind"] = refusal(lambda: recording(host, patcher, "tap"))
    found["no layers"] = refusal(lambda: recording(host, without_layers(), "none"))
    found["memory"] = refusal(lambda: recording(host, patcher, "little", memory_gb=1e-4))
    blocked = node(host, patcher, "absent", record=False)[1]
    found["absent"] = blocked.message
    found["waiting"] = str(node(host, patcher, "absent")[1].message)
    return found


def formats(host: Host) -> list[str]:
    """Of Quantize, those that this version has."""
    supported = host.module("nodes.comfyui.quantize.formats").supported
    return [name for name in ("W8A8", "W4A8") if supported(name)]


def without_layers():
    patcher = build(FLUX)
    for module in patcher.model.diffusion_model.modules():
        if hasattr(module, "comfy_cast_weights") and isinstance(module, torch.nn.Linear):
            module.__class__ = torch.nn.Linear
    return patcher


def two_models_in_a_guider(host: Host) -> dict[str, Any] | None:
    """DualModelGuider: each model's calls are its own runs; the second one's only where the first has a node too."""
    import comfy_extras.nodes_custom_sampler as nodes

    if not hasattr(nodes, "DualModelGuider"):
        return None
    main_model, second = build(FLUX), build(FLUX)
    positive, negative = prompts()

    def run(first, other, cfg=CFG):
        guider = nodes.DualModelGuider.execute(first, positive, cfg, other, negative).args[0]
        noise = nodes.RandomNoise.execute(SEED).args[0]
        return nodes.SamplerCustomAdvanced.execute(noise, guider, *parts(first), latent()).args[0]["samples"]

    with torch.no_grad():
        second.model.diffusion_model.double_blocks[0].img_attn.qkv.weight.mul_(1.1)
    plain, watch = run(main_model, second), Watch(host, main_model)
    with watch.around():
        out = run(recording(host, main_model, "dual"), second)
    lines = logged(lambda: run(main_model, recording(host, second, "dual second")))
    host.module("nodes.comfyui.calibrate.recording").settle()
    none = path_of(host, "dual second").exists()
    nodes_of_both = recording(host, main_model, "dual"), recording(host, second, "dual second")
    watches = [Watch(host, patcher) for patcher in (main_model, second)]
    with watches[0].around(), watches[1].around():
        both = run(*nodes_of_both)
    first, other = loaded(host, "dual"), loaded(host, "dual second")
    alone = logged(lambda: run(*nodes_of_both, cfg=1.0))  # without the second one
    fingerprint = host.module("nodes.comfyui.quantize.weights").fingerprint_of
    return {
        "same": torch.equal(out, plain) and torch.equal(both, plain), "none": none,
        "said": [[line for line in part if "main model needs" in line] for part in (lines, alone)],
        "runs": [loaded(host, name).recording.runs for name in ("dual", "dual second")],
        "distances": other.distances is not None,
        "own model": [found.model == fingerprint(p) for found, p in ((first, main_model), (other, second))],
        "differing": differing(first, [watch, watches[0]]) + differing(other, watches[1:]),
        "warned": [line for line in alone if "not added" in line],
    }  # fmt: skip


def logged(work: Callable) -> list[str]:
    import logging

    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    try:
        work()
    finally:
        logging.getLogger().removeHandler(handler)
    return lines


def beside(host: Host) -> dict[str, Any]:
    """Runs that wait for no addition: it happens in a thread, which the next run and the node wait for."""
    module, patcher = host.module("nodes.comfyui.calibrate.recording"), build(FLUX)
    watched, plain = recording(host, patcher, "beside"), ksampler(host, patcher)
    with patch.object(module, "WAIT", -1.0):
        same = [torch.equal(ksampler(host, watched), plain) for _ in range(4)]
    return {"same": all(same), "runs": node(host, patcher, "beside", record=False)[1].recording.runs}


def built_in(host: Host) -> dict[str, Any]:
    """The built-in model, whose layers are all observed, with its stock sampler and a cache of its branches."""
    patcher = demo(host)
    (empty,) = host.nodes.EmptyLatentImage().generate(32, 32, 4)

    def run(model):
        (out,) = host.nodes.common_ksampler(model, SEED, 20, 1.5, "ddpm", "normal", *class_labels(host), empty)
        return out["samples"]

    same = torch.equal(run(recording(host, patcher, "pictures")), run(patcher))
    found = loaded(host, "pictures")
    return {"same": same, "layers": len(found.statistics), "sampler": found.notes["sampler"]}


if __name__ == "__main__":
    main({
        **{name: lambda host, run=run: topology(host, run) for name, run in RUNS.items()},
        "two experts": two_experts,
        "interrupted": interrupted,
        **{
            f"cache of {tier}, {first} first": lambda host, tier=tier, first=first: with_a_cache(host, tier, first)
            for tier in ("whole prediction", "blocks") for first in ("cache", "recording")
        },
        "many kinds": runs_of_many_kinds,
        "refused": refused,
        "two models in a guider": two_models_in_a_guider,
        "beside": beside,
        "built-in": built_in,
    })  # fmt: skip
