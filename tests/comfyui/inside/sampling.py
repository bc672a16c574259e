"""The nodes' models under stock samplers against the engine's own loop: relative differences."""

from __future__ import annotations

import torch
from host import Host, main, relative

STEPS, CFG, SEED = 12, 1.5, 7
LABELS = [0, 3, 5, 9]


def demo(host: Host):
    return host.module("nodes.comfyui.model.dit").load_dit_patcher("demo")


def conditioning(host: Host, labels=LABELS):
    return host.module("nodes.class_label").ClassLabel.execute(",".join(map(str, labels)), "none").args


def ksampler(host: Host, patcher, sampler: str, steps: int = STEPS, labels=LABELS, scheduler: str = "normal"):
    """Stock KSampler's samples from stock EmptyLatentImage."""
    positive, negative = conditioning(host, labels)
    (latent,) = host.nodes.EmptyLatentImage().generate(32, 32, len(labels))
    (out,) = host.nodes.common_ksampler(
        patcher, SEED, steps, CFG, sampler, scheduler, positive, negative, latent, denoise=1.0
    )
    return out["samples"]


def schedule(patcher, sampler: str, steps: int = STEPS, scheduler: str = "normal"):
    import comfy.samplers

    return comfy.samplers.KSampler(patcher, steps, patcher.load_device, sampler, scheduler).sigmas


def noise(patcher, sampler: str, steps: int = STEPS, count: int = len(LABELS)):
    """KSampler's starting noise and that of every step, (1 + steps, N, C, H, W)."""
    import comfy.k_diffusion.sampling
    import comfy.sample

    start = comfy.sample.prepare_noise(torch.zeros(count, 3, 32, 32), SEED)
    sigmas = schedule(patcher, sampler, steps)
    draw = comfy.k_diffusion.sampling.default_noise_sampler(start, seed=SEED)
    later = [draw(s, t) for s, t in zip(sigmas[:-1], sigmas[1:]) if t > 0] if sampler == "ddpm" else []
    return torch.stack([start, *later])


def engine(host: Host, model, patcher, sampler: str, compensation=None, start=None):
    core = host.module("qandc_core")
    x, report = core.generate(
        model, LABELS, cfg_scale=CFG, sampler="ddpm" if sampler == "ddpm" else "ddim",
        sigmas=schedule(patcher, sampler), noise=noise(patcher, sampler) if start is None else start,
        compensation=compensation,
    )  # fmt: skip
    return x


def plain(host: Host, sampler: str) -> float:
    patcher = demo(host)
    return relative(
        ksampler(host, patcher, sampler), engine(host, host.module("qandc_core").load_dit("demo"), patcher, sampler)
    )


def cache_policy(host: Host, interval: int, order: int = 0, reuse: str = "attention and MLP", offload=False, **choices):
    """What Apply Cache attaches."""
    policies = host.module("qandc_core.caching.policies")
    kinds = {
        "num_computed": policies.StepCount, "speedup": policies.Speedup, "max_error": policies.ErrorBudget,
        "steps": policies.ChosenSteps,
    }  # fmt: skip
    kind = next((kinds[name] for name in choices if name in kinds), policies.Interval)
    given = {"interval": interval} if kind is policies.Interval else {}
    policy = kind(**given, **choices, order=order)
    return host.module("nodes.comfyui.cache.attach").CacheSettings(policy, reuse, offload)


def cached(host: Host, order: int = 0) -> float:
    patcher, core = demo(host), host.module("qandc_core")
    policy = cache_policy(host, 3, order=order)
    fast = host.module("nodes.comfyui.cache.attach").apply_cache(patcher, policy)
    model = core.apply_cache_to_dit(core.load_dit("demo"), 3, order=order)
    return relative(ksampler(host, fast, "ddpm"), engine(host, model, patcher, "ddpm"))


def cached_split_guidance(host: Host) -> float:
    """Conditional and unconditional evaluated one after the other, as with little memory, against both at once."""
    policy = cache_policy(host, 3)
    fast = host.module("nodes.comfyui.cache.attach").apply_cache(demo(host), policy)
    together = ksampler(host, fast, "ddpm")
    fast.model.memory_required = lambda *args, **kwargs: 1e30
    calls = count_calls(fast)
    apart = ksampler(host, fast, "ddpm")
    assert len(calls) == 2 * STEPS, len(calls)
    return relative(apart, together)


def count_calls(patcher) -> list[int]:
    calls: list[int] = []
    patcher.model.diffusion_model.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


def interval_one_is_identical(host: Host) -> bool:
    patcher = demo(host)
    policy = cache_policy(host, 1)
    off = host.module("nodes.comfyui.cache.attach").apply_cache(patcher, policy)
    return torch.equal(ksampler(host, patcher, "ddpm"), ksampler(host, off, "ddpm"))


def nothing_is_left_on_the_module(host: Host) -> bool:
    patcher = demo(host)
    caching, policy = host.module("nodes.comfyui.cache.attach"), cache_policy(host, 3)
    before = ksampler(host, patcher, "ddpm")
    ksampler(host, caching.apply_cache(patcher, policy), "ddpm")
    blocks = patcher.model.diffusion_model.blocks
    clean = not any({"attention_branch", "mlp_branch", "forward"} & vars(block).keys() for block in blocks)
    return clean and not patcher.wrappers and torch.equal(ksampler(host, patcher, "ddpm"), before)


def with_output_cache(host: Host, patcher, policy):
    """The cache for foreign models, on ours."""
    return host.module("nodes.comfyui.cache.attach").apply_cache(patcher, policy)


def euler_holding(host: Host, patcher, computes, second_pass: float = 0.0):
    """Euler steps written by hand that hold each condition's D where `computes` is false.

    `second_pass` adds a guidance that evaluates the class again on a changed sample, as skip-layer guidance does.
    """
    sigmas, model = schedule(patcher, "euler").double(), patcher.model
    x = noise(patcher, "euler")[0].double() * (1 + sigmas[0] ** 2).sqrt()
    y = torch.tensor(LABELS)
    null = torch.full_like(y, model.diffusion_model.null_class)
    held: dict[str, torch.Tensor] = {}
    for i in range(STEPS):
        sigma = sigmas[i].float().expand(len(LABELS))

        def denoised(name, x, label, i=i, sigma=sigma):
            if computes(i):
                held[name] = model.apply_model(x.float(), sigma, y=label).double()
            return held[name]

        full, none = denoised("full", x, y), denoised("none", x, null)
        guided = none + CFG * (full - none)
        if second_pass:
            guided = guided + second_pass * (full - denoised("again", 0.9 * x, y))
        x = x + (x - guided) / sigmas[i] * (sigmas[i + 1] - sigmas[i])
    return x


def whole_output_cache(host: Host, computes=lambda i: i % 3 == 0, **choices) -> float:
    patcher = demo(host)
    fast = with_output_cache(host, patcher, cache_policy(host, 3, reuse="whole prediction", **choices))
    return relative(ksampler(host, fast, "euler"), euler_holding(host, patcher, computes))


def evaluated_twice(host: Host) -> float:
    """Guidance that evaluates a condition a second time in every prediction must not get the first pass's features."""
    import comfy.samplers

    def again(args):
        (other,) = comfy.samplers.calc_cond_batch(
            args["model"], [args["cond"]], 0.9 * args["input"], args["sigma"], args["model_options"]
        )
        return args["denoised"] + 0.5 * (args["cond_denoised"] - other)

    patcher = demo(host)
    fast = with_output_cache(host, patcher, cache_policy(host, 3, reuse="whole prediction"))
    fast.set_model_sampler_post_cfg_function(again)
    return relative(ksampler(host, fast, "euler"), euler_holding(host, patcher, lambda i: i % 3 == 0, 0.5))


def multi_evaluation_samplers(host: Host) -> dict[str, list]:
    """Samplers that evaluate a step more than once: steps computed, and how far from the plain model."""
    patcher, found = demo(host), {}
    for sampler in ("heun", "dpm_2", "dpmpp_2s_ancestral", "dpmpp_sde"):
        plain = ksampler(host, patcher, sampler)
        for order in (0, 1):
            fast = host.module("nodes.comfyui.cache.attach").apply_cache(patcher, cache_policy(host, 3, order))
            options, report = fast.model_options["transformer_options"], host.module("qandc_core").RunReport
            options["qandc_report"] = report(sampler, STEPS, len(LABELS), CFG, "cpu")
            out = ksampler(host, fast, sampler)
            assert out.isfinite().all()
            found[f"{sampler}, order {order}"] = [sum(options["qandc_report"].computed), relative(out, plain)]
    return found


def empty_schedule(host: Host) -> bool:
    """A run of no steps, as SplitSigmas leaves at its end, is no error."""
    return cache_policy(host, 3, num_computed=5).policy.plan(0).computes(0)


def compensation_table(host: Host, sigmas):
    generator = torch.Generator().manual_seed(1)
    steps = len(sigmas) - 1
    factor = 1 + 0.1 * (torch.rand(steps, 3, generator=generator) - 0.5)
    mean = 0.2 * torch.randn(steps, 3, generator=generator)
    core = host.module("qandc_core")
    return core.VarianceCompensation(sigmas[:-1].double(), mean, factor)


def compensated(host: Host, sampler: str) -> float:
    patcher = demo(host)
    table = compensation_table(host, schedule(patcher, sampler))
    compensation = host.module("nodes.comfyui.compensation")
    fitted = compensation.FittedFor("sample_ddpm" if sampler == "ddpm" else "sample_euler")
    corrected = compensation.attach_compensation(patcher, table, fitted)
    x = engine(host, host.module("qandc_core").load_dit("demo"), patcher, sampler, table)
    assert relative(x, engine(host, host.module("qandc_core").load_dit("demo"), patcher, sampler)) > 0.01
    return relative(ksampler(host, corrected, sampler), x)


def identity_compensation_is_identical(host: Host) -> bool:
    patcher = demo(host)
    sigmas = schedule(patcher, "ddpm")
    ones = host.module("qandc_core").VarianceCompensation(
        sigmas[:-1].double(), torch.zeros(STEPS, 3), torch.ones(STEPS, 3)
    )
    compensation = host.module("nodes.comfyui.compensation")
    corrected = compensation.attach_compensation(patcher, ones, compensation.FittedFor("sample_ddpm"))
    return torch.equal(ksampler(host, corrected, "ddpm"), ksampler(host, patcher, "ddpm"))


def sample_node_equals_ksampler(host: Host) -> bool:
    patcher = demo(host)
    positive, negative = conditioning(host)
    (latent,) = host.nodes.EmptyLatentImage().generate(32, 32, len(LABELS))
    out, report = (
        host.node("QandC_Sample")
        .execute(patcher, positive, negative, latent, SEED, STEPS, CFG, "ddpm", "normal", 1.0, "")
        .args
    )
    assert len(report.seconds) == report.steps == STEPS and report.computed == [True] * STEPS, report
    return torch.equal(out["samples"], ksampler(host, patcher, "ddpm"))


if __name__ == "__main__":
    main({
        **{f"plain {s}": lambda host, s=s: plain(host, s) for s in ("ddpm", "ddim", "euler")},
        "cached": cached,
        "cached, order 1": lambda host: cached(host, 1),
        "cached, split guidance": cached_split_guidance,
        "interval 1 is identical": interval_one_is_identical,
        "nothing is left on the module": nothing_is_left_on_the_module,
        "whole-output cache": whole_output_cache,
        "whole-output cache, 5 steps": lambda host: whole_output_cache(
            host, lambda i: i in {0, 4, 7, 9, 11}, num_computed=5
        ),
        "whole-output cache, from 0.25 to 0.75": lambda host: whole_output_cache(
            host, lambda i: i < 3 or i >= 9 or i % 3 == 0, start=0.25, end=0.75
        ),
        "evaluated twice": evaluated_twice,
        "multi-evaluation samplers": multi_evaluation_samplers,
        "empty schedule": empty_schedule,
        **{f"compensated {s}": lambda host, s=s: compensated(host, s) for s in ("ddpm", "ddim", "euler")},
        "K = 1 is identical": identity_compensation_is_identical,
        "Sample equals KSampler": sample_node_equals_ksampler,
    })  # fmt: skip
