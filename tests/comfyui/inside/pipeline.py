"""Calibrate, quantize and compensate through the nodes, against brute force and against the engine."""

from __future__ import annotations

from pathlib import Path

import torch
from host import Host, main, relative
from sampling import CFG, LABELS, STEPS, cache_policy, conditioning, demo, engine, ksampler, noise, schedule

SETTINGS = (STEPS, CFG, "ddpm", "normal")
PAPER = "W8A8", "paper", 0.0, 0, "", "bake in"  # what Quantize takes before rounding


def cached_demo(host: Host, interval: int = 3):
    policy = cache_policy(host, interval)
    return host.module("nodes.comfyui.cache.attach").apply_cache(demo(host), policy)


def calibrate(host: Host, patcher, **plan):
    """Runs the node's function; all samples of computed steps, none held out, unless the plan says otherwise."""
    calibration, sampling = host.module("nodes.comfyui.calibrate.run"), host.module("nodes.comfyui.sampling")
    settings = sampling.Settings(*conditioning(host), *SETTINGS)
    full = calibration.CalibrationConfig(
        **{
            "trajectories": 6,
            "batch_size": 4,
            "samples": 10**6,
            "selection": "random",
            "seed": 3,
            "held_out": 0,
            **plan,
        }
    )
    return calibration.calibrate(patcher, settings, {"samples": torch.zeros(1, 3, 32, 32)}, full)


def statistics_equal_brute_force(host: Host) -> dict[str, float]:
    """All candidates chosen: counts, bounds, means and Hessians of plain hooks over the same sampling runs."""
    patcher = cached_demo(host)
    found = calibrate(host, patcher, hessians=True).statistics
    sampling = host.module("nodes.comfyui.sampling")
    settings = sampling.Settings(*conditioning(host), *SETTINGS)
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in found}
    model, computed = patcher.model.diffusion_model, []
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen[name].append(args[0].reshape(-1, args[0].shape[-1]).clone())
        )
        for name in found
    ]
    for seed, size, first in ((3, 4, 0), (4, 2, 4)):
        latent = {"samples": torch.zeros(size, 3, 32, 32)}
        sampling.sample_new(patcher, settings, latent, seed, lambda *_: computed.append(1), first)
    for handle in handles:
        handle.remove()
    worst = {"count": 0.0, "low": 0.0, "high": 0.0, "mean": 0.0, "hessian": 0.0}
    for name, layer in found.items():
        if ".attn." not in name and ".mlp." not in name:
            continue  # the brute force saw reused steps too, the plan only computed ones
        rows = torch.cat(seen[name])
        worst["count"] = max(worst["count"], abs(layer.count - len(rows)))
        worst["low"] = max(worst["low"], relative(layer.low, rows.amin(0)))
        worst["high"] = max(worst["high"], relative(layer.high, rows.amax(0)))
        worst["mean"] = max(worst["mean"], float((layer.mean - rows.mean(0)).abs().max() / rows.std()))
        worst["hessian"] = max(worst["hessian"], relative(layer.hessian, rows.T @ rows))
    return worst


def cached_layers_see_computed_steps_only(host: Host) -> dict[str, int]:
    """With all steps allowed, a layer in a cached branch still counts 4 of 12 steps, the embedder all of them."""
    found = calibrate(host, cached_demo(host), trajectories=2, batch_size=2, computed_only=False).statistics
    tokens = (32 // 4) ** 2  # of the built-in model
    return {
        "branch": found["blocks.0.mlp.fc1"].count // (2 * 2 * tokens),
        "output": found["final_layer.linear"].count // (2 * 2 * tokens),
    }


def distances_between_steps(host: Host) -> dict[str, float | bool]:
    """Against predictions that a callback saw; and a model with a cache has none."""
    sampling = host.module("nodes.comfyui.sampling")
    patcher, seen = demo(host), []
    found = calibrate(host, patcher, trajectories=2, batch_size=2).distances
    settings = sampling.Settings(*conditioning(host), *SETTINGS)
    sampling.sample_new(
        patcher,
        settings,
        {"samples": torch.zeros(2, 3, 32, 32)},
        3,
        lambda step, denoised, x, total: seen.append(denoised.double()),
    )
    sigmas, worst = schedule(patcher, "ddpm").double(), 0.0
    for i in range(STEPS):
        for j in range(i + 1, STEPS):
            expected = relative(seen[i], seen[j]) * float(1 - sigmas[j + 1] / sigmas[j])
            worst = max(worst, abs(float(found[i, j]) - expected))
    cached = calibrate(host, cached_demo(host), trajectories=1, batch_size=1)
    return {"error": worst, "with a cache": cached.distances is None}


def calibrated_steps_are_computed(host: Host) -> bool:
    """TAP Calibrate's file, wired to Apply Cache, gives the optimum of its distances."""
    core, wires = host.module("qandc_core"), dict(zip(("positive", "negative"), conditioning(host)))
    (wires["latent_image"],) = host.nodes.EmptyLatentImage().generate(32, 32, 2)
    made = host.node("QandC_TAPCalibrate").execute(
        demo(host), "new", 2, 8, *SETTINGS, 501, 2, "random", 8, 5.0, True, False, "steps", **wires
    )
    policy = {"policy": "number of steps", "computed": 5}
    (fast,) = host.node("QandC_ApplyCache").execute(demo(host), policy, 1, calibration=made.args[0]).args
    options = fast.model_options["transformer_options"]
    report = options["qandc_report"] = core.RunReport("ddpm", STEPS, len(LABELS), CFG, "cpu")
    ksampler(host, fast, "ddpm")
    computed = tuple(i for i, ran in enumerate(report.computed) if ran)
    return computed == tuple(core.optimal_schedule(made.args[0].distances, 5))


def hooks_are_gone(host: Host) -> bool:
    patcher = cached_demo(host)
    calibrate(host, patcher, trajectories=2, batch_size=2, selection="tap", samples=8, clusters=2)
    return not any(m._forward_pre_hooks or m._forward_hooks for m in patcher.model.modules())


def pipeline(host: Host, gptq: bool = False) -> dict[str, float | list[float]]:
    """The nodes' whole chain against the engine fed with the nodes' files: images in [0, 1], largest difference."""
    core = host.module("qandc_core")
    positive, negative = conditioning(host)
    (latent,) = host.nodes.EmptyLatentImage().generate(32, 32, len(LABELS))
    wires = {"positive": positive, "negative": negative, "latent_image": latent}
    reference, cached = demo(host), cached_demo(host)
    (calibration,) = (
        host.node("QandC_TAPCalibrate")
        .execute(cached, "new", 8, 64, *SETTINGS, 501, 8, "tap", 8, 5.0, True, gptq, "inside", **wires)
        .args
    )
    rounding = "gptq" if gptq else "nearest"
    quantized, *_ = host.node("QandC_Quantize").execute(cached, *PAPER, rounding, calibration).args
    (compensated,) = (
        host.node("QandC_VarianceCompensate")
        .execute(quantized, reference, "new", 8, *SETTINGS, 502, "variance_match", 0.0, 1.0, "inside_vc", **wires)
        .args
    )
    files = sorted(Path(host.base, "output", "qandc").glob("inside_*.safetensors"), key=lambda p: p.stat().st_mtime)
    saved, variance = core.load_calibration(files[-2]), core.load_calibration(files[-1]).variance
    config = host.module("qandc_core.quantization.model").QuantizationConfig(rounding=rounding)
    model = core.apply_cache_to_dit(core.load_dit("demo"), 3)
    core.quantize_model(model, 8, 8, host.module("qandc_core.models.layers").DIT_SKIP, saved, config)
    watch = Watch()
    compensated.add_wrapper_with_key("predict_noise", "watch", watch)
    ours = ksampler(host, compensated, "ddpm")
    chain, start = {"compensation": variance, "sampler": "ddpm"}, noise(reference, "ddpm")
    theirs, *nudged = (engine(host, model, reference, **chain, start=x) for x in (start, *changed(start, 1e-6)))
    return {
        "every step": step_differences(host, model, reference, watch),
        "images": each(ours, theirs),
        "engine against itself, noise changed by 1e-6": max(max(each(x, theirs)) for x in nudged),
        "from full precision": relative(ours, ksampler(host, reference, "ddpm")),
    }


def each(images, expected) -> list[float]:
    return [relative(a, b) for a, b in zip(images, expected)]


def changed(x, share: float, times: int = 3) -> list[torch.Tensor]:
    """x with every value changed by about this share of it, each in its own way."""
    generator = torch.Generator().manual_seed(0)
    return [x * (1 + share * torch.randn(x.shape, generator=generator)) for _ in range(times)]


def step_differences(host: Host, model, patcher, watch: Watch) -> list[float]:
    """The engine's prediction at every step of a run in ComfyUI, given that run's sample."""
    process = host.module("qandc_core.diffusion.process")
    sigmas = schedule(patcher, "ddpm")
    config = process.SamplingConfig(cfg_scale=CFG, sigmas=tuple(sigmas.tolist()))
    reverse, found = process.ReverseProcess(model, LABELS, config), []
    host.module("qandc_core").reset_all_caches(model)
    for i, sigma in enumerate(sigmas[:-1].tolist()):
        x = watch.given[sigma] / (1 + sigma**2) ** 0.5
        _, denoised = reverse.step(i, x, torch.zeros_like(x))
        found.append(relative(denoised, watch.returned[sigma]))
    return found


def inputs_stay_as_they_are(host: Host) -> dict[str, bool]:
    """Weights, options, wrappers and output of the models given to Quantize and Variance Compensate."""
    reference, cached = demo(host), cached_demo(host)
    before, images = snapshot(cached), ksampler(host, cached, "ddpm")
    quantized, *_ = host.node("QandC_Quantize").execute(cached, *PAPER, "nearest").args
    wires = dict(zip(("positive", "negative"), conditioning(host)))
    wires["latent_image"] = host.nodes.EmptyLatentImage().generate(32, 32, 1)[0]
    host.node("QandC_VarianceCompensate").execute(
        quantized, reference, "new", 4, *SETTINGS, 502, "paper", 0.0, 1.0, "inside_vc", **wires
    )
    return {
        "same": snapshot(cached) == before and torch.equal(ksampler(host, cached, "ddpm"), images),
        "quantized differs": not torch.equal(ksampler(host, quantized, "ddpm"), images),
        "cache kept": quantized.get_wrappers("outer_sample", "qandc_cache") != [],
        "reference clean": not reference.wrappers,
    }


def what_paper_says(host: Host) -> dict[str, str]:
    """The text of Quantize with the method paper: without limits, and with limits that only native reads."""
    node, limits = host.node("QandC_Quantize"), {"max_size_mb": 1, "skip": " mlp,", "max_model_error": 0.02}
    plain = {"max_size_mb": 0, "skip": " ,", "loras": "bake in", "rounding": "auto"}
    asked = {"plain": plain, "limited": {**plain, **limits}}
    made = {name: node.execute(demo(host), "W8A8", "paper", 0.1, **inputs) for name, inputs in asked.items()}
    return {name: found.ui.as_dict()["text"][0] for name, found in made.items()}


def snapshot(patcher) -> tuple:
    state = host_hash(patcher.model.diffusion_model.state_dict())
    options = {k: str(v) for k, v in patcher.model_options["transformer_options"].items()}
    return state, str(options), {k: list(v) for k, v in patcher.wrappers.items()}.__str__(), list(patcher.patches)


def host_hash(tensors) -> float:
    return sum(float(v.double().abs().sum()) * (i + 1) for i, v in enumerate(tensors.values()))


def corrected_samples_have_the_reference_deviation(host: Host) -> float:
    """What the fit promises (Eq. 9): after correction every channel deviates as the reference's does, at every step."""
    compensation, sampling = host.module("nodes.comfyui.compensation"), host.module("nodes.comfyui.sampling")
    settings = sampling.Settings(*conditioning(host), *SETTINGS)
    latent = {"samples": torch.zeros(8, 3, 32, 32)}
    reference, fast = demo(host), cached_demo(host)
    plan = host.module("qandc_core.calibration.choice").CalibrationConfig(8, 8, seed=5, held_out=0)
    variance, fitted, _ = compensation.fit_compensation(
        reference, fast, settings, latent, plan, method="variance_match", start=0.0, end=1.0
    )
    wanted, seen = Watch(), Watch()
    for patcher, watch in (
        (reference, wanted),
        (compensation.attach_compensation(fast, variance, fitted), seen),
    ):
        watched = patcher.clone()
        watched.add_wrapper_with_key("predict_noise", "watch", watch)
        sampling.sample_new(watched, settings, latent, 5, lambda *_: None)
    channels = lambda x: x.transpose(0, 1).flatten(1).std(1)  # noqa: E731
    assert wanted.given.keys() == seen.given.keys() and len(wanted.given) == STEPS
    return max(relative(channels(seen.given[s]), channels(wanted.given[s])) for s in wanted.given)


class Watch:
    """PREDICT_NOISE inside the compensation: what the model is given and what it returns, by sigma."""

    def __init__(self) -> None:
        self.given: dict[float, torch.Tensor] = {}
        self.returned: dict[float, torch.Tensor] = {}

    def __call__(self, executor, x, timestep, *args):
        sigma = float(timestep[0])
        self.given[sigma] = x.clone()
        self.returned[sigma] = executor(x, timestep, *args)
        return self.returned[sigma].clone()


def schedule_is_dit_s(host: Host) -> list[int]:
    """KSampler's scheduler "normal" visits the published respaced timesteps."""
    patcher = demo(host)
    return [round(float(patcher.model.model_sampling.timestep(s))) for s in schedule(patcher, "ddpm", 50)[:-1]]


if __name__ == "__main__":
    main({
        "statistics": statistics_equal_brute_force,
        "steps seen": cached_layers_see_computed_steps_only,
        "distances": distances_between_steps,
        "calibrated steps": calibrated_steps_are_computed,
        "hooks are gone": hooks_are_gone,
        "pipeline": pipeline,
        "pipeline, gptq": lambda host: pipeline(host, True),
        "paper says": what_paper_says,
        "inputs stay": inputs_stay_as_they_are,
        "deviation": corrected_samples_have_the_reference_deviation,
        "timesteps": schedule_is_dit_s,
    })  # fmt: skip
