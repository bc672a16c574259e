"""The nodes' models under stock samplers against the engine's own loop: relative differences."""

from __future__ import annotations

import torch
from host import Host, main, relative

STEPS, CFG, SEED = 12, 1.5, 7
LABELS = [0, 3, 5, 9]


def demo(host: Host):
    return host.module("nodes.comfyui.dit_model").load_dit_patcher("demo")


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


def cached(host: Host, order: int = 0) -> float:
    patcher, core = demo(host), host.module("qandc_core")
    config = host.module("qandc_core.caching.schedules").CacheConfig(3, order=order)
    fast = host.module("nodes.comfyui.caching").apply_cache(patcher, config)
    model = core.apply_cache_to_dit(core.load_dit("demo"), 3, order=order)
    return relative(ksampler(host, fast, "ddpm"), engine(host, model, patcher, "ddpm"))


def cached_split_guidance(host: Host) -> float:
    """Conditional and unconditional evaluated one after the other, as with little memory, against both at once."""
    config = host.module("qandc_core.caching.schedules").CacheConfig(3)
    fast = host.module("nodes.comfyui.caching").apply_cache(demo(host), config)
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
    config = host.module("qandc_core.caching.schedules").CacheConfig(1)
    off = host.module("nodes.comfyui.caching").apply_cache(patcher, config)
    return torch.equal(ksampler(host, patcher, "ddpm"), ksampler(host, off, "ddpm"))


def nothing_is_left_on_the_module(host: Host) -> bool:
    patcher = demo(host)
    caching, config = host.module("nodes.comfyui.caching"), host.module("qandc_core.caching.schedules").CacheConfig(3)
    before = ksampler(host, patcher, "ddpm")
    ksampler(host, caching.apply_cache(patcher, config), "ddpm")
    blocks = patcher.model.diffusion_model.blocks
    clean = not any({"attention_branch", "mlp_branch", "forward"} & vars(block).keys() for block in blocks)
    return clean and not patcher.wrappers and torch.equal(ksampler(host, patcher, "ddpm"), before)


def whole_output_cache(host: Host) -> float:
    """The cache for foreign models against Euler steps written by hand that hold d = (x - D) / sigma."""
    patcher = demo(host)
    caching, runs = host.module("nodes.comfyui.caching"), host.module("nodes.comfyui.runs")
    config = host.module("qandc_core.caching.schedules").CacheConfig(3)
    fast = caching.apply_cache(patcher, config)
    runs.replace_wrapper(fast, runs.WRAPPERS.APPLY_MODEL, caching.KEY, caching.output_wrapper)
    out = ksampler(host, fast, "euler")
    sigmas, model = schedule(patcher, "euler").double(), patcher.model
    x = noise(patcher, "euler")[0].double() * (1 + sigmas[0] ** 2).sqrt()
    y, null = torch.tensor(LABELS), torch.full((len(LABELS),), 10)
    for i in range(STEPS):
        if i % 3 == 0:
            sigma = sigmas[i].float().expand(len(LABELS))
            full, none = (model.apply_model(x.float(), sigma, y=label).double() for label in (y, null))
            d = (x - (none + CFG * (full - none))) / sigmas[i]
        x = x + d * (sigmas[i + 1] - sigmas[i])
    return relative(out, x)


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
    name = "sample_ddpm" if sampler == "ddpm" else "sample_euler"
    corrected = host.module("nodes.comfyui.compensation").attach_compensation(patcher, table, name)
    x = engine(host, host.module("qandc_core").load_dit("demo"), patcher, sampler, table)
    assert relative(x, engine(host, host.module("qandc_core").load_dit("demo"), patcher, sampler)) > 0.01
    return relative(ksampler(host, corrected, sampler), x)


def identity_compensation_is_identical(host: Host) -> bool:
    patcher = demo(host)
    sigmas = schedule(patcher, "ddpm")
    ones = host.module("qandc_core").VarianceCompensation(
        sigmas[:-1].double(), torch.zeros(STEPS, 3), torch.ones(STEPS, 3)
    )
    corrected = host.module("nodes.comfyui.compensation").attach_compensation(patcher, ones, "sample_ddpm")
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
        **{f"compensated {s}": lambda host, s=s: compensated(host, s) for s in ("ddpm", "ddim", "euler")},
        "K = 1 is identical": identity_compensation_is_identical,
        "Sample equals KSampler": sample_node_equals_ksampler,
    })  # fmt: skip
