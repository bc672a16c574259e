"""Core's EasyCache and LazyCache beside Apply Cache on the same tiny models: what each reuses, and what it reports."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from families import build, conditioning, empty_latent
from family_list import FAMILIES, Family
from host import Host, main, relative
from sampling import cache_policy

STEPS, INTERVAL, CHANGE, SEED = 12, 3, 7, 11
ALWAYS, NEVER = 3.0, 0.01  # the largest threshold that the nodes accept, and the smallest above zero
DEFAULTS = {"threshold": 0.2, "start": 0.15, "end": 0.95}
FLOW = ("Flux", "Qwen-Image", "Lumina 2")
FLUX, WAN = FAMILIES["Flux"], FAMILIES["Wan 2.1"]
LEFT, TOP = {"area": (8, 4, 0, 0), "strength": 1.0}, {"area": (4, 8, 0, 0), "strength": 1.0}
RIGHT = {"area": (8, 4, 0, 4), "strength": 1.0}


@dataclass
class Call:
    """One call of apply_model; `output` is what the network's forward returned, if that was entered."""

    sigma: float
    x: torch.Tensor  # as it was before the call
    denoised: torch.Tensor
    output: torch.Tensor | None
    computed: bool
    changed: bool  # the call wrote into the x that it was given
    window: tuple[int, ...]

    @property
    def velocity(self) -> torch.Tensor:
        """A flow model's prediction: what the network returned, or what the denoised sample shows."""
        return (self.x - self.denoised) / self.sigma if self.output is None else self.output


class Watch:
    """Records the calls of every model made from its `patcher`; one has computed where layers of the network ran."""

    def __init__(self, patcher):
        import comfy.patcher_extension

        self.patcher = patcher.clone()
        self.patcher.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.APPLY_MODEL, "watch", self.record)
        self.calls: list[Call] = []
        self.output: torch.Tensor | None = None
        self.layers = 0

    @contextmanager
    def hooks(self) -> Iterator[None]:
        network, *layers = self.patcher.model.diffusion_model.modules()
        handles = [layer.register_forward_pre_hook(self.count) for layer in layers]
        handles.append(network.register_forward_hook(self.keep))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def count(self, *_: Any) -> None:
        self.layers += 1

    def keep(self, module, args, output) -> None:
        self.output = output.float().clone() if torch.is_tensor(output) else None

    def record(self, executor, x, t, c_concat, c_crossattn, control, transformer_options, **kwargs):
        before, layers, self.output = x.clone(), self.layers, None
        out = executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)
        window = transformer_options.get("context_window")
        self.calls.append(
            Call(
                sigma=float(t[0]), x=before, denoised=out.clone(), output=self.output, computed=self.layers > layers,
                changed=not torch.equal(x, before), window=() if window is None else tuple(window.index_list),
            )
        )  # fmt: skip
        return out

    def run(self, patcher, family: Family, **how) -> list[Call]:
        """Samples with `patcher`; the calls of that run."""
        self.calls, self.layers = [], 0
        with self.hooks():
            sample(patcher, family, **how)
        return self.calls


def sample(
    patcher,
    family: Family,
    sampler: str | Callable = "euler",
    positive: list | None = None,
    latent: torch.Tensor | None = None,
    steps: int = STEPS,
):
    """Core's sampling without guidance."""
    import comfy.sample
    import comfy.samplers

    latent = empty_latent(family) if latent is None else latent
    return comfy.sample.sample_custom(
        patcher, comfy.sample.prepare_noise(latent, SEED), 1.0,
        comfy.samplers.KSAMPLER(sampler) if callable(sampler) else comfy.samplers.sampler_object(sampler),
        schedule(patcher, steps), positive or conditioning(family, 1), conditioning(family, 2), latent,
        disable_pbar=True, seed=SEED,
    )  # fmt: skip


def schedule(patcher, steps: int = STEPS) -> torch.Tensor:
    import comfy.samplers

    return comfy.samplers.calculate_sigmas(patcher.get_model_object("model_sampling"), "simple", steps)


def core(patcher, node: str = "EasyCache", threshold: float = ALWAYS, start: float = 0.0, end: float = 1.0):
    """The model behind core's node."""
    import comfy_extras.nodes_easycache as nodes

    return getattr(nodes, f"{node}Node").execute(patcher, threshold, start, end, False).args[0]


def ours(host: Host, patcher):
    return host.module("nodes.comfyui.cache.attach").apply_cache(patcher, cache_policy(host, INTERVAL))


def in_bfloat16(patcher):
    """Weights and network inputs in bfloat16, the sampler in float32, as on most GPUs."""
    network = patcher.model.diffusion_model.to(torch.bfloat16)
    network.dtype = torch.bfloat16
    return patcher


def conditions(family: Family, *where: dict) -> list:
    """One random condition for each of `where`: the area and the part of the run that it holds for."""
    found = (conditioning(family, seed)[0] for seed in range(5, 5 + len(where)))
    return [[tensor, {**options, **place}] for (tensor, options), place in zip(found, where)]


def computed_steps(calls: list[Call], patcher) -> list[int]:
    sigmas = schedule(patcher).tolist()
    return sorted({sigmas.index(call.sigma) for call in calls if call.computed})


def skips(calls: list[Call]) -> list[Call]:
    return [call for call in calls if not call.computed]


@contextmanager
def logged(lines: list[str]) -> Iterator[None]:
    """Collects what is logged."""
    handler, root = logging.Handler(logging.INFO), logging.getLogger()
    handler.emit = lambda record: lines.append(record.getMessage())
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(level)


def overwritten_input(host: Host, name: str) -> dict[str, dict]:
    """In float32, of the skipped calls: how many wrote into their x, and how far denoised is from x - sigma v."""
    watch, found = Watch(build(FAMILIES[name])), {}
    for kind, fast in {"core": core(watch.patcher), "ours": ours(host, watch.patcher)}.items():
        calls = skips(watch.run(fast, FAMILIES[name]))
        found[kind] = {
            "skipped": len(calls),
            "changed": sum(call.changed for call in calls),
            "errors": [relative(call.denoised, call.x - call.sigma * call.velocity) for call in calls],
        }
    return found


def another_area(host: Host) -> dict[str, list[int]]:
    """Computed steps at a threshold that skips none; the condition of the first half has another area."""
    watch, found = Watch(build(FLUX)), {}
    halves = ({**LEFT, "end_percent": 0.5}, {"start_percent": 0.5})
    for name, where in {"one area": ({},), "another area": halves}.items():
        for kind, fast in {"core": core(watch.patcher, threshold=NEVER), "ours": ours(host, watch.patcher)}.items():
            calls = watch.run(fast, FLUX, positive=conditions(FLUX, *where))
            found[f"{kind}, {name}"] = computed_steps(calls, fast)
    return found


def euler_growing(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """Euler that doubles the resolution before step CHANGE."""
    for i in range(len(sigmas) - 1):
        if i == CHANGE:
            x = torch.nn.functional.interpolate(x, scale_factor=2.0)
        d = (x - model(x, sigmas[i] * x.new_ones(len(x)), **extra_args)) / sigmas[i]
        x = x + d * (sigmas[i + 1] - sigmas[i])
    return x


def growing(host: Host) -> dict[str, list[int]]:
    """Computed steps at a threshold that skips none; the resolution changes."""
    watch, found = Watch(build(FLUX)), {}
    models = {node: core(watch.patcher, node, NEVER) for node in ("EasyCache", "LazyCache")}
    for kind, fast in {**models, "ours": ours(host, watch.patcher)}.items():
        for name, sampler in {"one size": "euler", "growing": euler_growing}.items():
            found[f"{kind}, {name}"] = computed_steps(watch.run(fast, FLUX, sampler=sampler), fast)
    return found


def two_areas(host: Host) -> dict[str, dict[str, int]]:
    """Calls, skipped ones and resets, with two areas of one shape, which are one batch, and of two shapes."""
    watch, found = Watch(build(FLUX)), {}
    for name, where in {"one shape": (LEFT, RIGHT), "two shapes": (LEFT, TOP)}.items():
        for kind, fast in {"core": core(watch.patcher), "ours": ours(host, watch.patcher)}.items():
            with logged(lines := []):
                calls = watch.run(fast, FLUX, positive=conditions(FLUX, *where))
            resets = sum("resetting state" in line for line in lines)
            found[f"{kind}, {name}"] = {"calls": len(calls), "skipped": len(skips(calls)), "resets": resets}
    return found


def skip_layers(patcher):
    """Core's skip-layer guidance over the whole run."""
    import comfy_extras.nodes_slg as nodes

    return nodes.SkipLayerGuidanceDiT.execute(patcher, 0.5, 0.0, 1.0, "0", "0").args[0]


def perturb_attention(patcher):
    """Core's perturbed-attention guidance, weaker than by default, for weights are random."""
    import comfy_extras.nodes_pag as nodes

    return nodes.PerturbedAttentionGuidance.execute(patcher, 0.5).args[0]


def second_pass(host: Host, name: str, guide: Callable) -> dict[str, dict[str, list]]:
    """For each step: how far the guidance's own prediction is from the plain one, and whether each computed."""
    family = FAMILIES[name]
    watch, found = Watch(build(family)), {}
    guided = guide(watch.patcher)
    for kind, fast in {
        "no cache": guided, "core": core(guided, **DEFAULTS), "core, never": core(guided, threshold=NEVER),
        "ours": ours(host, guided),
    }.items():  # fmt: skip
        calls = watch.run(fast, family)
        pairs = list(zip(calls[::2], calls[1::2], strict=True))
        found[kind] = {
            "differences": [relative(second.velocity, plain.velocity) for plain, second in pairs],
            "computed": [[plain.computed, second.computed] for plain, second in pairs],
        }
    return found


def with_windows(patcher, **choices):
    """The model with core's context windows of four frames on ten."""
    import comfy.context_windows as core_windows

    patcher = patcher.clone()
    patcher.model_options["context_handler"] = core_windows.IndexListContextHandler(
        core_windows.get_matching_context_schedule(core_windows.ContextSchedules.STATIC_STANDARD),
        core_windows.get_matching_fuse_method(core_windows.ContextFuseMethods.PYRAMID),
        context_length=4, context_overlap=1, dim=2, **choices,
    )  # fmt: skip
    return patcher


def causal_window_fix(value: bool) -> dict[str, bool]:
    """The choice of one more frame for all windows but the first, where this ComfyUI has it."""
    from comfy.context_windows import IndexListContextHandler

    known = inspect.signature(IndexListContextHandler).parameters
    return {"causal_window_fix": value} if "causal_window_fix" in known else {}


def ten_frames() -> torch.Tensor:
    return torch.zeros(1, 16, 10, 8, 8)


def context_windows(host: Host) -> dict[str, dict]:
    """Whose features skipped calls got."""
    watch, found = Watch(build(WAN)), {}
    windowed = with_windows(watch.patcher, **causal_window_fix(False))
    for kind, fast in {"core": core(windowed), "ours": ours(host, windowed)}.items():
        calls = watch.run(fast, WAN, latent=ten_frames())
        # Each holds its own thing: ours the denoised sample, core's the velocity less the sample.
        held = {"ours": lambda call: call.x - call.sigma * call.velocity, "core": lambda call: call.velocity - call.x}
        values = [held[kind](call) for call in calls]
        found[kind] = reuse_between_windows(calls, values)
    return found


def reuse_between_windows(calls: list[Call], values: list[torch.Tensor]) -> dict:
    """Errors of reused values: against the latest of their own window, None if it has none, and of any window."""
    own: dict[tuple[int, ...], torch.Tensor] = {}
    latest, errors = values[0], []
    for call, value in zip(calls, values):
        if call.computed:
            own[call.window] = latest = value
        else:
            mine = relative(value, own[call.window]) if call.window in own else None
            errors.append([mine, relative(value, latest)])
    return {"windows": len({call.window for call in calls}), "errors": errors}


def context_windows_of_two_sizes(host: Host) -> dict:
    """With core's default choice: how each run ends."""
    watch = Watch(build(WAN))
    if not causal_window_fix(True):
        return {"absent": "windows of this ComfyUI are of one size"}
    windowed = with_windows(watch.patcher, **causal_window_fix(True))
    models = {"no cache": windowed, "core": core(windowed, **DEFAULTS), "ours": ours(host, windowed)}
    return {kind: ending(watch, fast) for kind, fast in models.items()}


def ending(watch: Watch, fast) -> str | list[int]:
    try:
        return computed_steps(watch.run(fast, WAN, latent=ten_frames()), fast)
    except RuntimeError as error:
        return str(error)


def layers_run(host: Host, family: Family) -> dict[str, int]:
    """How many layers of the network ran in a run; nothing where this ComfyUI lacks the family."""
    import comfy.supported_models

    # Hunyuan3D 2.1 halves its batch, and a run without guidance has nothing to halve.
    if not hasattr(comfy.supported_models, family.config) or family.config == "Hunyuan3Dv2_1":
        return {}
    watch, found = Watch(build(family)), {}
    models = {"no cache": watch.patcher, "core": core(watch.patcher), "ours": ours(host, watch.patcher)}
    for kind, fast in models.items():
        watch.run(fast, family, steps=STEPS // 2)
        found[kind] = watch.layers
    return found


def reports(host: Host, sampler: str) -> dict[str, dict]:
    """What is reported of a run on a sampler, and how many of its evaluations ran."""
    watch = Watch(build(FLUX))
    evaluations = len(watch.run(watch.patcher, FLUX, sampler=sampler))
    found = {node: reported_by_core(watch, core(watch.patcher, node), sampler) for node in ("EasyCache", "LazyCache")}
    fast, report = ours(host, watch.patcher), SimpleNamespace(warnings=[])
    fast.model_options["transformer_options"][host.module("nodes.comfyui.wrappers").REPORT] = report
    ran = len(watch.run(fast, FLUX, sampler=sampler)) - len(skips(watch.calls))
    found["ours"] = {"skipped": report.computed.count(False), "steps": len(report.computed), "ran": ran}
    return {"evaluations": evaluations, **found}


def reported_by_core(watch: Watch, fast, sampler: str) -> dict[str, float]:
    with logged(lines := []):
        calls = watch.run(fast, FLUX, sampler=sampler)
    (claim,) = re.findall(r"skipped (\d+)/(\d+) steps \((-?[\d.]+)x speedup\)", "\n".join(lines))
    ran = len(calls) - len(skips(calls))
    return {"skipped": int(claim[0]), "steps": int(claim[1]), "speedup": float(claim[2]), "ran": ran}


def velocities(host: Host, name: str) -> dict[str, list[list[float]]]:
    """For each skipped step in bfloat16: its velocity's length along the one before, and both sigmas.

    A row is [factor, what is left after it, sigma before, sigma].
    """
    family = FAMILIES[name]
    watch, found = Watch(in_bfloat16(build(family))), {}
    models = {node: core(watch.patcher, node) for node in ("EasyCache", "LazyCache")}
    for kind, fast in {**models, "ours": ours(host, watch.patcher)}.items():
        seen: list[torch.Tensor] = []
        computed = computed_steps(watch.run(fast, family, sampler=euler_keeping(seen)), fast)
        sigmas = schedule(fast).tolist()
        found[kind] = [
            [*along(seen[i], seen[i - 1]), sigmas[i - 1], sigmas[i]] for i in range(STEPS) if i not in computed
        ]
    return found


def euler_keeping(seen: list[torch.Tensor]) -> Callable:
    """Euler that keeps the velocities that it was given."""

    def euler(model, x, sigmas, extra_args=None, callback=None, disable=None):
        for i in range(len(sigmas) - 1):
            seen.append((x - model(x, sigmas[i] * x.new_ones(len(x)), **extra_args)) / sigmas[i])
            x = x + seen[-1] * (sigmas[i + 1] - sigmas[i])
        return x

    return euler


def along(value: torch.Tensor, other: torch.Tensor) -> tuple[float, float]:
    """The factor that takes `other` closest to `value`, and how far it stays from it."""
    value, other = value.double(), other.double()
    factor = (value * other).sum() / (other * other).sum()
    return float(factor), relative(value, factor * other)


if __name__ == "__main__":
    main({
        **{f"overwritten input, {name}": lambda host, name=name: overwritten_input(host, name) for name in FLOW},
        "another area": another_area,
        "growing": growing,
        "two areas": two_areas,
        "skip-layer guidance": lambda host: second_pass(host, "Flux", skip_layers),
        "perturbed-attention guidance": lambda host: second_pass(host, "SD 1.5", perturb_attention),
        "context windows": context_windows,
        "context windows of two sizes": context_windows_of_two_sizes,
        "layers run": lambda host: {name: layers_run(host, family) for name, family in FAMILIES.items()},
        **{f"reports, {name}": lambda host, name=name: reports(host, name) for name in ("euler", "heun", "dpm_2")},
        **{f"velocities, {name}": lambda host, name=name: velocities(host, name) for name in FLOW},
    })  # fmt: skip
