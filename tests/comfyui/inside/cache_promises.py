"""What decides the steps of Apply Cache, and what it says where something stands against it."""

from __future__ import annotations

import time
from dataclasses import replace
from types import SimpleNamespace

import torch
from easycache import logged
from families import build, empty_latent
from family_list import FAMILIES
from host import Host, main
from sampling import LABELS, STEPS, cache_policy, conditioning, demo, ksampler, schedule

INTERVAL = {"policy": "interval", "interval": 3}
TWICE = {"policy": "speedup", "speedup": 2.0}


def node(host: Host, patcher, policy: dict, calibration=None, reuse: str = "automatic", part=(0.0, 1.0)):
    return (
        host.node("QandC_ApplyCache").execute(patcher, policy, 1, *part, reuse, False, calibration=calibration).args[0]
    )


def reported(patcher) -> SimpleNamespace:
    report = SimpleNamespace(warnings=[], timeline={}, reuse="", computed=[], cache_bytes=0, cache_speedup=None)
    patcher.model_options["transformer_options"]["qandc_report"] = report
    return report


def steps_of(report) -> list[int]:
    return [step for step, computed in enumerate(report.computed) if computed]


def clocks(host: Host) -> dict[str, bool]:
    """The steps of a speedup and the image, with and without slow calls of either kind."""
    features, found = host.module("qandc_core.caching.features").FeatureCache, {}
    recall, store = features.recall, features.store

    def slow(function, seconds: float):
        def wrapped(self, *args):
            time.sleep(seconds)
            return function(self, *args)

        return wrapped

    for reuse in ("whole prediction", "blocks", "attention and MLP"):
        runs = []
        for reusing, computing in ((0, 0), (0.02, 0), (0, 0.02))[: 3 if reuse == "blocks" else 2]:
            features.recall, features.store = slow(recall, reusing), slow(store, computing)
            fast = node(host, demo(host), TWICE, reuse=reuse)
            report = reported(fast)
            runs.append((ksampler(host, fast, "euler", labels=[3]), steps_of(report), report.warnings))
        features.recall, features.store = recall, store
        first = runs[0]
        found[reuse] = [steps == first[1] and torch.equal(x, first[0]) for x, steps, _ in runs[1:]] + [first[1:]]
    return found


def sampling_of_this_run(host: Host) -> dict[str, list]:
    """Steps of an error budget with another model sampling patched on: first run, second run, and the model alone."""
    import comfy.sample
    from cache_tools import conditioning as prompts
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3

    family = FAMILIES["SDXL"]
    patcher, latent, found = build(family), empty_latent(family), {}

    def run(model, steps: int = 14) -> list[int]:
        fast = host.module("nodes.comfyui.cache.attach").apply_cache(
            model, cache_policy(host, 1, order=1, reuse="automatic", max_error=0.01)
        )
        report = reported(fast)
        comfy.sample.sample(
            fast, comfy.sample.prepare_noise(latent, 1), steps, 2.0, "euler", "normal", prompts(family, 1),
            prompts(family, 2), latent, disable_pbar=True, seed=1,
        )  # fmt: skip
        return steps_of(report)

    flow = ModelSamplingSD3().patch(patcher, 3.0)[0]
    found["plain"], found["flow"] = [run(patcher)], [run(flow), run(flow)]
    found["plain"].append(run(patcher))
    return found


def calibrated(host: Host, sampler: str = "ddim", steps: int = STEPS, patcher=None):
    (latent,) = host.nodes.EmptyLatentImage().generate(32, 32, 1)
    return host.node("QandC_TAPCalibrate").execute(
        patcher or demo(host), "new", 1, 4, steps, 1.0, sampler, "normal", 501, 1, "random", 4, 5.0, True, False,
        f"promises_{sampler}", *conditioning(host, [3]), latent, 4.0, 64, 0,
    ).args[0]  # fmt: skip


def calibrations(host: Host) -> dict[str, list]:
    """Computed steps and warnings of runs that the calibration is of, and of others."""
    import comfy.sample

    core, patcher, made = host.module("qandc_core"), demo(host), calibrated(host)
    positive, negative = conditioning(host, [3])
    count, found = {"policy": "number of steps", "computed": 6}, {}

    def run(
        policy=count, calibration=made, model=patcher, sampler="ddim", scheduler="normal", denoise=1.0, steps=STEPS,
        part=(0.0, 1.0),
    ):  # fmt: skip
        fast = node(host, model, policy, calibration, part=part)
        report, latent = reported(fast), torch.zeros(1, 3, 32, 32)
        comfy.sample.sample(
            fast, comfy.sample.prepare_noise(latent, 1), steps, 1.0, sampler, scheduler, positive, negative, latent,
            denoise=denoise, disable_pbar=True, seed=1,
        )  # fmt: skip
        return [steps_of(report), report.warnings]

    # An older file does not note its noise levels: those of its scheduler on this model are taken.
    older = replace(made, notes={name: value for name, value in made.notes.items() if name != "sigmas"})
    found["optimum"] = list(core.optimal_schedule(made.distances, 6, order=1))
    found["sigmas"] = made.notes["sigmas"] == schedule(patcher, "ddim").tolist()
    found["default"] = run(calibration=None)
    found["same"] = run()
    found["speedup"] = run({"policy": "speedup", "speedup": STEPS / 6})
    found["older file"], found["older file, denoise"] = run(calibration=older), run(calibration=older, denoise=0.3)
    found["denoise"], found["scheduler"] = run(denoise=0.3), run(scheduler="karras")
    eight, spread = {**count, "computed": 8}, host.module("qandc_core.caching.schedule").spread
    found["part"] = run(eight, part=(0.25, 0.75))
    found["part, default"] = run(eight, None, part=(0.25, 0.75))
    found["optimum of the part"] = sorted(spread(STEPS, 8, range(3, 9), made.distances, 1))
    found["noisy"], found["multistep"] = run(sampler="euler_ancestral"), run(sampler="dpmpp_2m")
    found["steps"] = run(steps=STEPS + 1)
    found["interval"] = run(INTERVAL)
    found["budget"] = run({"policy": "error budget", "max_error": 1.0, "max_reused": 4})[1:]
    cached = host.module("nodes.comfyui.cache.attach").apply_cache(patcher, cache_policy(host, 3))
    found["with a cache"] = run(calibration=calibrated(host, patcher=cached))
    found["dpm_fast"] = run(calibration=calibrated(host, "dpm_fast"))
    return found


def inputs(host: Host) -> dict[str, bool]:
    """Whether each policy is attached with what the node was given, all of it at other than its defaults."""
    policies, presets = (host.module(f"qandc_core.caching.{name}") for name in ("policies", "presets"))
    settings = host.module("nodes.comfyui.cache.run").CacheSettings
    rest = {"order": 0, "start": 0.2, "end": 0.9}
    expected = {
        "auto": ({}, presets.Preset("auto", **rest)),
        "fast": ({}, presets.Preset("fast", **rest)),
        "speedup": ({"speedup": 3.5}, policies.Speedup(3.5, **rest)),
        "number of steps": ({"computed": 7}, policies.StepCount(7, **rest)),
        "error budget": ({"max_error": 0.3, "max_reused": 2}, policies.ErrorBudget(0.3, 2, **rest)),
        "interval": ({"interval": 5}, policies.Interval(5, **rest)),
        "chosen steps": ({"computed_steps": "1, 4-6"}, policies.ChosenSteps(frozenset({1, 4, 5, 6}), **rest)),
    }
    found = {}
    for name, (given, policy) in expected.items():
        chosen = {"policy": name, **given}
        (fast,) = host.node("QandC_ApplyCache").execute(demo(host), chosen, 0, 0.2, 0.9, "blocks", True).args
        (wrapper,) = fast.get_wrappers("outer_sample", "qandc_cache")
        found[name] = wrapper.settings == settings(policy, "blocks", True)
    return found


def presets(host: Host) -> dict[str, list]:
    """Computed steps, warnings and whether the image is the plain one, by preset, sampler, steps and cfg."""
    import comfy.sample

    positive, negative = conditioning(host, [3])
    patcher, latent, found = demo(host), torch.zeros(1, 3, 32, 32), {}
    noise = comfy.sample.prepare_noise(latent, 1)

    def sample(model, sampler: str, steps: int, cfg: float):
        return comfy.sample.sample(
            model, noise, steps, cfg, sampler, "normal", positive, negative, latent, disable_pbar=True, seed=1
        )

    for case in (
        ("auto", "euler", 20, 1.5), ("auto", "deis", 8, 1.5), ("auto", "uni_pc", 4, 1.5), ("fast", "euler", 8, 1.5),
        ("auto", "euler", 8, 1.0), ("balanced", "euler", 12, 1.0), ("fast", "ddpm", 30, 1.5),
    ):  # fmt: skip
        level, sampler, steps, cfg = case
        fast = node(host, patcher, {"policy": level})
        report = reported(fast)
        same = torch.equal(sample(fast, sampler, steps, cfg), sample(patcher, sampler, steps, cfg))
        found[f"{level} {sampler} {steps} {cfg:g}"] = [len(steps_of(report)), report.warnings, same]
    return found


def last_block(host: Host) -> list:
    """What a run that forecasts the last block's feature says, and by how much it differs from the plain run."""
    from host import relative

    fast = node(host, demo(host), {"policy": "interval", "interval": 2}, reuse="last block")
    report = reported(fast)
    found = ksampler(host, fast, "euler", steps=30, labels=LABELS[:1])
    plain = ksampler(host, demo(host), "euler", steps=30, labels=LABELS[:1])
    return [report.reuse, len(steps_of(report)), report.warnings, relative(found, plain)]


def most_in_a_row(host: Host) -> dict[str, str]:
    """Steps of an error budget that never ends, by max_reused of the node."""
    found = {}
    for most in (1, 2):
        fast = node(host, demo(host), {"policy": "error budget", "max_error": 1e6, "max_reused": most})
        report = reported(fast)
        ksampler(host, fast, "euler", labels=LABELS[:1])
        found[str(most)] = "".join("C" if computed else "R" for computed in report.computed)
    return found


def another_model(host: Host) -> list[str]:
    """A calibration that names other weights, at every policy."""
    made, patcher, said = replace(calibrated(host), model="0" * 32), demo(host), []
    for policy in (
        TWICE, INTERVAL, {"policy": "number of steps", "computed": 5},
        {"policy": "chosen steps", "computed_steps": "0"},
        {"policy": "error budget", "max_error": 0.1, "max_reused": 4},
    ):  # fmt: skip
        try:
            node(host, patcher, policy, made)
            said.append("")
        except ValueError as error:
            said.append(str(error))
    return said


def rivals(host: Host) -> dict[str, list[str]]:
    """Warnings beside caches of core and caches built as other packs build them, and beside what only sounds alike."""
    from comfy.patcher_extension import WrappersMP as kinds
    from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode

    def through(executor, *args, **kwargs):
        return executor(*args, **kwargs)

    class TeaCache:
        def __call__(self, apply_model, values):
            return apply_model(values["input"], values["timestep"], **values["c"])

    def wrapped(kind: str, key: str, module: str = __name__):
        def wrapper(executor, *args, **kwargs):
            return through(executor, *args, **kwargs)

        clone, wrapper.__module__ = demo(host).clone(), module
        clone.add_wrapper_with_key(kind, key, wrapper)
        return clone

    def function(wrapper):
        clone = demo(host).clone()
        clone.set_model_unet_function_wrapper(wrapper)
        return clone

    def option(name: str, value):
        clone = demo(host).clone()
        clone.model_options["transformer_options"][name] = value
        return clone

    models = {
        "EasyCache": EasyCacheNode.execute(demo(host), 0.0, 0.15, 0.95, False).args[0],
        "LazyCache": LazyCacheNode.execute(demo(host), 0.0, 0.15, 0.95, False).args[0],
        "wrapper": wrapped(kinds.DIFFUSION_MODEL, "fbcache"),
        "function": function(TeaCache()),
        "option": option("magcache_thresh", 0.2),
        "nothing": demo(host),
        "off": option("enable_teacache", False),
        "exact": option("kv_cache", {}),
        "a wrapper": wrapped(kinds.APPLY_MODEL, "preview"),
        "module": wrapped(kinds.APPLY_MODEL, "preview", "packs.teacache_nodes"),
        "module alone": wrapped(kinds.APPLY_MODEL, "preview", "packs.cache_tools"),
    }
    others = host.module("nodes.comfyui.cache.others").other_caches
    found = {name: others(fast, fast.model_options) for name, fast in cached(host, models).items()}
    fast, lines = node(host, models["EasyCache"], INTERVAL), []
    report = reported(fast)
    with logged(lines):
        ksampler(host, fast, "euler", steps=2, labels=[3])
    found["run"] = [text for text in report.warnings if "another cache" in text]
    found["log"] = [line for line in lines if "another cache" in line]
    return found


def cached(host: Host, models: dict) -> dict:
    return {name: node(host, patcher, INTERVAL) for name, patcher in models.items()}


def two_models(host: Host) -> dict[str, list[str]]:
    """A guider with two models and the cache on either or both: what the log says."""
    import comfy.samplers

    try:
        from comfy_extras.nodes_custom_sampler import Guider_DualModel
    except ImportError:
        return {}
    positive, negative = conditioning(host, [3])
    plain, fast, slow = demo(host), node(host, demo(host), INTERVAL), node(host, demo(host), TWICE)
    found = {}
    for name, pair in {
        "main": (fast, plain), "negative": (plain, fast), "both": (slow, fast), "the same": (fast, fast),
    }.items():  # fmt: skip
        guider = Guider_DualModel(*pair)
        guider.set_conds(positive, negative)
        guider.set_cfg(1.5)
        lines: list[str] = []
        with logged(lines):
            guider.sample(
                torch.randn(1, 3, 32, 32), torch.zeros(1, 3, 32, 32), comfy.samplers.sampler_object("euler"),
                schedule(plain, "euler"), disable_pbar=True, seed=1,
            )  # fmt: skip
        found[name] = [line for line in lines if "instead of its own" in line]
    return found


def a_call_without_a_run(host: Host) -> bool:
    """The wrappers of a cached model in a call that no sampler made: computed as without them."""
    patcher, x, sigma = demo(host), torch.randn(1, 3, 32, 32), torch.tensor([1.0])
    options = node(host, patcher, INTERVAL).model_options["transformer_options"]
    label = torch.tensor([3])
    with torch.inference_mode():
        plain = patcher.model.apply_model(x, sigma, y=label)
        return all(
            torch.equal(patcher.model.apply_model(x, sigma, transformer_options=options, y=label), plain)
            for _ in range(2)
        )


def compensations(host: Host) -> dict[str, str]:
    """Whether Variance Compensate may follow a policy: its steps are fixed, or it says which others are."""
    vary, found = host.module("nodes.comfyui.cache.attach").steps_vary, {}
    for policy in (TWICE, INTERVAL, {"policy": "error budget", "max_error": 0.1, "max_reused": 4}):
        found[policy["policy"]] = vary(node(host, demo(host), policy))
    return found


def promises(host: Host) -> dict[str, list[str]]:
    """Warnings of runs that cannot be as fast as asked."""
    found = {}
    for name, (policy, part, steps) in {
        "part": (TWICE, (0.4, 0.6), 30),
        "few": (TWICE, (0.0, 1.0), 4),
        "kept": (TWICE, (0.0, 1.0), 20),
    }.items():
        fast = node(host, demo(host), policy, part=part)
        report, lines = reported(fast), []
        with logged(lines):
            ksampler(host, fast, "euler", steps=steps, labels=LABELS[:1])
        found[name] = report.warnings
        assert all(any(text in line for line in lines) for text in report.warnings)
    return found


if __name__ == "__main__":
    main({
        "clocks": clocks,
        "sampling of this run": sampling_of_this_run,
        "calibrations": calibrations,
        "inputs": inputs,
        "presets": presets,
        "last block": last_block,
        "most in a row": most_in_a_row,
        "another model": another_model,
        "other caches": rivals,
        "two models": two_models,
        "a call without a run": a_call_without_a_run,
        "compensations": compensations,
        "promises": promises,
    })  # fmt: skip
