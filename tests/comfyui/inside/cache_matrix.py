"""Apply Cache on real model classes with what a workflow may do to a run, against brute force."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch
from cache_tools import (
    CASES,
    REUSE,
    SEED,
    STEPS,
    UNET,
    Holding,
    Watch,
    cached,
    computed_steps,
    family_of,
    patcher_of,
    sample,
)
from easycache import causal_window_fix, conditions, skip_layers, ten_frames, with_windows
from families import conditioning, empty_latent
from host import Host, main, relative

SAMPLERS = ("heun", "dpm_2", "dpmpp_sde", "dpmpp_2s_ancestral")
SPLIT = range(4, 7)  # steps that evaluate one condition after the other; the change comes among reused ones
ENDS = 0.5  # of the run, where the control and the first strength of the hooked LoRA end


def unchanged(patcher):
    return patcher


def padding(patcher):
    """The model with prompts padded to one length, as core does for UNets."""
    import comfy.conds

    model = patcher.model
    of_class = model.extra_conds

    def extra_conds(**kwargs) -> dict:
        found = of_class(**kwargs)
        return {**found, "c_crossattn": comfy.conds.CONDCrossAttn(found["c_crossattn"].cond)}

    model.extra_conds = extra_conds
    return patcher


def guided(patcher, family, split: range, **how) -> torch.Tensor:
    """A run in which core believes that both conditions do not fit in the `split` steps."""
    at = [0]
    patcher.model.memory_required = lambda *args, **kwargs: 1e30 if at[0] in split else 0.0
    return sample(patcher, family, callback=lambda step, *_: at.__setitem__(0, step + 1), **how)


def guidance(host: Host, name: str, reuse: str, repeats: int = 1, prepare: Callable = unchanged) -> dict[str, dict]:
    """Both conditions at once, one after the other, and changing; the negative prompt is `repeats` times as long."""
    family, watch, found = family_of(name), Watch(prepare(patcher_of(name)), name), {}
    fast, report = cached(host, watch.patcher, reuse)
    ((context, options),) = conditioning(family, 2)
    negative = [[torch.cat([context + i for i in range(repeats)], 1), options]]
    first = None
    for kind, split in {"together": range(0), "apart": range(STEPS), "changing": SPLIT}.items():
        watch.calls.clear()
        out = guided(fast, family, split, negative=negative)
        first = out if first is None else first
        timeline, calls = watch.timeline(), len(watch.calls)
        reference = guided(Holding(watch.patcher, name, reuse).patcher, family, split, negative=negative)
        found[kind] = {
            "error": relative(out, reference), "from together": relative(out, first), "calls": calls,
            "timeline": report.timeline, "recorded": timeline,
        }  # fmt: skip
    return found


def brute(
    host: Host, name: str, reuse: str, prepare: Callable = unchanged, state: Callable = lambda *_: None, **how
) -> dict:
    """A run against brute force, both on the model as `prepare` makes it."""
    watch, family = Watch(patcher_of(name), name), family_of(name)
    model = prepare(watch.patcher)
    fast, report = cached(host, model, reuse)
    out = sample(fast, family, **how)
    recorded, ran = watch.timeline(), [sorted(call.ran) for call in watch.calls]
    return {
        "error": relative(out, sample(Holding(model, name, reuse, state).patcher, family, **how)),
        "effect": relative(out, sample(model, family, **how)),
        "timeline": report.timeline, "recorded": recorded, "ran": ran, "reuse": report.reuse,
        "warnings": report.warnings,
    }  # fmt: skip


def partial(host: Host, name: str, reuse: str) -> dict:
    """An image that is changed by half of the noise."""
    shape = empty_latent(family_of(name)).shape
    latent = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    return brute(host, name, reuse, latent=latent, denoise=0.5)


def samplers(host: Host, name: str, reuse: str) -> dict[str, dict]:
    """Samplers that evaluate a step several times: what is planned, and how many evaluations ran."""
    watch, found = Watch(patcher_of(name), name), {}
    fast, report = cached(host, watch.patcher, reuse)
    for sampler in SAMPLERS:
        watch.calls.clear()
        out = sample(fast, family_of(name), sampler)
        ran = sum(call.computed for call in watch.calls)
        found[sampler] = {
            "computed": computed_steps(report), "ran": ran, "of": len(watch.calls),
            "finite": bool(out.isfinite().all()), "reuse": report.reuse,
        }  # fmt: skip
    return found


def areas(host: Host, name: str, reuse: str) -> dict:
    """Two positives on areas of two shapes."""
    frames = empty_latent(family_of(name)).shape[2:-2]
    start = (0,) * len(frames)
    left, top = ({"area": (*frames, *size, *start, 0, 0), "strength": 1.0} for size in ((8, 4), (4, 8)))
    return brute(host, name, reuse, positive=conditions(family_of(name), left, top))


def windows(host: Host, reuse: str) -> dict:
    return brute(
        host, "Wan 2.1", reuse, lambda patcher: with_windows(patcher, **causal_window_fix(False)), latent=ten_frames()
    )


def skipped_in_part(host: Host, name: str, reuse: str) -> dict:
    """Core's other skip-layer guidance: the negative itself lacks the first layers, in a part of the run."""
    import comfy_extras.nodes_slg as nodes

    def prepare(patcher):
        return nodes.SkipLayerGuidanceDiTSimple.execute(patcher, 0.2, ENDS, "0", "0").args[0]

    def skipped(options: dict, control) -> bool:
        return bool(options.get("patches_replace"))

    return brute(host, name, reuse, prepare, skipped)


def low_rank(patcher, name: str) -> dict[str, torch.Tensor]:
    """A LoRA of every matrix in the blocks."""
    generator, lora = torch.Generator().manual_seed(4), {}
    state = patcher.model.state_dict()
    inside = tuple(f"diffusion_model.{path.rsplit('.', 1)[0]}." for path in Holding(patcher, name, REUSE[0]).blocks)
    for key in (key for key in state if key.startswith(inside) and key.endswith(".weight") and state[key].ndim == 2):
        out, into = state[key].shape
        base = key.removesuffix(".weight")
        lora[f"{base}.lora_up.weight"] = torch.randn(out, 2, generator=generator) * into**-0.5
        lora[f"{base}.lora_down.weight"] = torch.randn(2, into, generator=generator)
    return lora


def hooked(host: Host, name: str, reuse: str) -> dict:
    """A LoRA on the positive whose strength changes in mid-run."""
    import comfy.hooks

    hooks = comfy.hooks.create_hook_lora(low_rank(patcher_of(name), name), 1.0, 1.0)
    keyframes = comfy.hooks.HookKeyframeGroup()
    keyframes.add(comfy.hooks.HookKeyframe(strength=1.0, start_percent=0.0))
    keyframes.add(comfy.hooks.HookKeyframe(strength=-1.0, start_percent=ENDS))
    hooks.set_keyframes_on_hooks(keyframes)
    positive = comfy.hooks.set_hooks_for_conditioning(conditioning(family_of(name), 1), hooks)

    def strength(options: dict, control) -> float | None:
        return positive[0][1]["hooks"].hooks[0].strength if options["cond_or_uncond"] == [0] else None

    return brute(host, name, reuse, state=strength, positive=positive)


def controlled(host: Host, name: str, reuse: str) -> dict:
    """A control that ends in mid-run."""
    import comfy.controlnet

    class Control(comfy.controlnet.ControlBase):
        def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
            generator = torch.Generator().manual_seed(6)
            part = torch.randn(1, 16, 64, generator=generator)
            return {"input": [part], "output": [part]} if float(t[0]) > self.timestep_range[1] else None

    control = Control()
    control.timestep_percent_range = (0.0, ENDS)
    both = ([[c, {**o, "control": control}] for c, o in conditioning(family_of(name), seed)] for seed in (1, 2))
    positive, negative = both

    def ended(options: dict, control) -> bool:
        return control is not None

    return brute(host, name, reuse, state=ended, positive=positive, negative=negative)


def two_runs(host: Host, name: str, reuse: str) -> dict[str, bool]:
    """Runs of one cached model after each other, each against a model that never ran."""
    family = family_of(name)
    fast, _ = cached(host, patcher_of(name), reuse)

    def fresh(**how) -> torch.Tensor:
        return sample(cached(host, patcher_of(name), reuse)[0], family, **how)

    first, other, again = (sample(fast, family, seed=seed) for seed in (SEED, SEED + 1, SEED))
    large = torch.nn.functional.interpolate(first.flatten(0, -4), scale_factor=2.0).reshape(*first.shape[:-2], 16, 16)
    second = sample(fast, family, latent=large, denoise=0.5)
    return {
        "first": torch.equal(first, fresh()),
        "another seed": torch.equal(other, fresh(seed=SEED + 1)),
        "first again": torch.equal(again, first),
        "larger": torch.equal(second, fresh(latent=large, denoise=0.5)),
    }


def never_reuses(host: Host, name: str, reuse: str) -> dict[str, list]:
    """Whatever reuses nothing: bits as without it, and its warnings."""
    patcher, family = patcher_of(name), family_of(name)
    plain, found = sample(patcher, family), {}
    for kind, choices in {
        "interval 1": {"interval": 1}, "all steps": {"num_computed": STEPS}, "no error": {"max_error": 1e-9},
        "no part of the run": {"start": 0.5, "end": 0.5}, "none in a row": {"max_error": 1.0, "max_reused": 0},
    }.items():  # fmt: skip
        fast, report = cached(host, patcher, reuse, **choices)
        found[kind] = [torch.equal(sample(fast, family), plain), report.warnings]
    return found


def is_clean(patcher, before: SimpleNamespace) -> bool:
    return vars(snapshot(patcher)) == vars(before)


def snapshot(patcher) -> SimpleNamespace:
    return SimpleNamespace(
        attributes={name: set(vars(module)) for name, module in patcher.model.named_modules()},
        options={name: sorted(map(str, value)) for name, value in patcher.model_options.items() if value},
        transformer=set(patcher.model_options["transformer_options"]),
    )


def clones(host: Host, name: str, reuse: str) -> dict:
    """A cached clone of a cached clone, one without, and the original."""
    patcher, family = patcher_of(name), family_of(name)
    plain = sample(patcher, family)
    before = snapshot(patcher)
    third, third_report = cached(host, patcher, reuse)
    second, second_report = cached(host, third.clone(), reuse, interval=2)
    none, _ = cached(host, second, reuse, interval=1)
    images = [sample(model, family) for model in (second, third)]
    return {
        "computed": [computed_steps(second_report), computed_steps(third_report)],
        "differ": relative(*images),
        "plain": torch.equal(sample(patcher, family), plain) and torch.equal(sample(none, family), plain),
        "wrappers": [sum(len(kind) for kind in model.wrappers.values()) for model in (patcher, none, third, second)],
        "clean": is_clean(patcher, before),
    }


def broken_off(host: Host, name: str, reuse: str) -> dict[str, list[bool]]:
    """Runs that end in an error, of the sampler's callback and of a block: what is left, and the next run."""
    patcher, family = patcher_of(name), family_of(name)
    fast, _ = cached(host, patcher, reuse)
    whole = sample(fast, family)
    left, found = (snapshot(patcher), snapshot(fast)), {}
    block = next(iter(Holding(patcher, name, reuse).blocks.values()))

    def from_callback() -> None:
        def stop(step, *_):
            if step == 4:
                raise InterruptedError

        sample(fast, family, callback=stop)

    def from_block() -> None:
        calls: list[int] = []

        def stop(*_):
            calls.append(1)
            if len(calls) == 3:
                raise InterruptedError

        handle = block.register_forward_pre_hook(stop)
        try:
            sample(fast, family)
        finally:
            handle.remove()

    for kind, run in {"callback": from_callback, "block": from_block}.items():
        ended = False
        try:
            run()
        except InterruptedError:
            ended = True
        clean = is_clean(patcher, left[0]) and is_clean(fast, left[1])
        found[kind] = [ended, clean, torch.equal(sample(fast, family), whole)]
    return found


EVERYWHERE = {
    "guidance": guidance,
    "longer negative": lambda host, name, reuse: guidance(host, name, reuse, 2),
    "denoise 0.5": partial,
    "samplers": samplers,
    "areas": areas,
    "hooks": hooked,
    "two runs": two_runs,
    "clones": clones,
    "broken off": broken_off,
    "never reuses": never_reuses,
}
SOMEWHERE = {
    "control": (("Flux",), controlled),
    "skipped layers": (("Flux", "SD 3.5"), lambda host, name, reuse: brute(host, name, reuse, skip_layers)),
    "skipped in part": (("Flux", "SD 3.5"), skipped_in_part),
    "padded negative": (("Flux", "Wan 2.1"), lambda host, name, reuse: guidance(host, name, reuse, 2, padding)),
    "windows": (("Wan 2.1",), lambda host, name, reuse: windows(host, reuse)),
}
CHECKS = {check: (tuple(CASES), run) for check, run in EVERYWHERE.items()} | SOMEWHERE


if __name__ == "__main__":
    main({
        check: lambda host, names=names, run=run: {
            f"{name}, {reuse}": run(host, name, reuse) for name in names for reuse in REUSE
        }
        for check, (names, run) in CHECKS.items()
    } | {"padding of core": lambda host: {f"{UNET}, {REUSE[0]}": guidance(host, UNET, REUSE[0], 2)}})  # fmt: skip
