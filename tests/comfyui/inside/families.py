"""Apply Cache on ComfyUI's own model classes, tiny and random, against Euler steps written by hand."""

from __future__ import annotations

import pkgutil
import traceback
from contextlib import ExitStack
from functools import partial
from types import SimpleNamespace
from unittest.mock import patch

import torch
from family_list import FAMILIES, Family
from host import Host, main, relative
from sampling import cache_policy

STEPS, INTERVAL, CFG, SEED = 6, 3, 2.0, 11


def build(family: Family):
    """A patcher over the real model class; every tensor that a checkpoint would hold is random."""
    import comfy.model_patcher
    import comfy.supported_models

    cpu = torch.device("cpu")
    unet = family.unet() if callable(family.unet) else family.unet
    config = getattr(comfy.supported_models, family.config)(unet)
    config.set_inference_dtype(torch.float32, None)
    with ExitStack() as smaller:
        for name, arguments in family.parts.items():
            smaller.enter_context(patch(name, partial(pkgutil.resolve_name(name), **arguments)))
        model = config.get_model(family.state(), "")
    fill(model.diffusion_model)
    return comfy.model_patcher.ModelPatcher(model, cpu, cpu)


def fill(module) -> None:
    """Weights scaled by their inputs, so that the model neither fades out nor overflows; gains around 1."""
    generator = torch.Generator().manual_seed(5)
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point() and tensor.numel():
            gain = tensor.ndim == 1 and not name.endswith("bias")
            scale = 0.02 if tensor.ndim < 2 else tensor[0].numel() ** -0.5
            tensor.copy_(gain + scale * torch.randn(tensor.shape, generator=generator))


def conditioning(family: Family, seed: int) -> list:
    generator = torch.Generator().manual_seed(seed)

    def value(given):
        return torch.randn(given, generator=generator) if isinstance(given, tuple) else given

    return [[value(family.context), {key: value(given) for key, given in family.conds.items()}]]


def empty_latent(family: Family):
    import comfy.nested_tensor

    if isinstance(family.latent, list):
        return comfy.nested_tensor.NestedTensor([torch.zeros(shape) for shape in family.latent])
    return torch.zeros(family.latent)


def inputs(family: Family) -> tuple:
    """Noise, both conditions and the empty latent."""
    import comfy.sample

    latent = empty_latent(family)
    return comfy.sample.prepare_noise(latent, SEED), conditioning(family, 1), conditioning(family, 2), latent


def flat(samples) -> torch.Tensor:
    tensors = samples.unbind() if samples.is_nested else [samples]
    return torch.cat([tensor.flatten() for tensor in tensors])


def sample(patcher, family: Family) -> torch.Tensor:
    import comfy.sample

    noise, positive, negative, latent = inputs(family)
    return flat(
        comfy.sample.sample(
            patcher, noise, STEPS, CFG, "euler", "simple", positive, negative, latent, disable_pbar=True, seed=SEED
        )
    )


def euler_holding_the_derivative(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """Karras et al., Algorithm 2 without noise; d = (x - D) / sigma of the guided D is renewed every third step."""
    for i in range(len(sigmas) - 1):
        if i % INTERVAL == 0:
            d = (x - model(x, sigmas[i] * x.new_ones(len(x)), **extra_args)) / sigmas[i]
        x = x + d * (sigmas[i + 1] - sigmas[i])
    return x


def brute_force(patcher, family: Family) -> torch.Tensor:
    """The same run with the sampler above: it calls the model on computed steps only and knows no node."""
    import comfy.sample
    import comfy.samplers

    noise, positive, negative, latent = inputs(family)
    sampler = comfy.samplers.KSAMPLER(euler_holding_the_derivative)
    sigmas = comfy.samplers.calculate_sigmas(patcher.get_model_object("model_sampling"), "simple", STEPS)
    return flat(
        comfy.sample.sample_custom(
            patcher, noise, CFG, sampler, sigmas, positive, negative, latent, disable_pbar=True, seed=SEED
        )
    )


def attributes(patcher) -> dict[str, set[str]]:
    return {name: set(vars(module)) for name, module in patcher.model.named_modules()}


def counted(patcher, family: Family) -> tuple[torch.Tensor, int]:
    """Samples, and how often the diffusion model ran."""
    calls: list[int] = []
    handle = patcher.model.diffusion_model.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        return sample(patcher, family), len(calls)
    finally:
        handle.remove()


def cached(host: Host, patcher, interval: int):
    return host.module("nodes.comfyui.caching").apply_cache(patcher, cache_policy(host, interval))


def with_report(host: Host, patcher):
    """A cached model, and what a run of it reports."""
    report, fast = SimpleNamespace(warnings=[]), cached(host, patcher, INTERVAL)
    fast.model_options["transformer_options"][host.module("nodes.comfyui.runs").REPORT] = report
    return fast, report


def check(host: Host, family: Family) -> dict:
    patcher = build(family)
    plain, plain_calls = counted(patcher, family)
    before, options = attributes(patcher), set(patcher.model_options["transformer_options"])
    assert plain.isfinite().all() and plain.std() > 0, "the random model gives nothing to compare"
    fast, report = with_report(host, patcher)
    out, calls = counted(fast, family)
    again = sample(patcher, family)
    untouched = attributes(patcher) == before and not patcher.wrappers
    return {
        "model": type(patcher.model).__name__,
        "network": type(patcher.model.diffusion_model).__name__,
        "sampling": patcher.model.model_type.name,
        "parameters": sum(parameter.numel() for parameter in patcher.model.diffusion_model.parameters()),
        "tier": report.tier,
        "computed": sum(report.computed),
        "reused": len(report.computed) - sum(report.computed),
        "calls": [plain_calls, calls],
        "interval 1": torch.equal(sample(cached(host, patcher, 1), family), plain),
        "error": relative(out, brute_force(patcher, family)),
        "clean": bool(
            untouched and torch.equal(again, plain) and set(patcher.model_options["transformer_options"]) == options
        ),
        "effect": relative(out, plain),
    }


def result(host: Host, family: Family) -> dict:
    """What the checks found, why this ComfyUI lacks the family, or the error that it ended with."""
    import comfy.supported_models

    if not hasattr(comfy.supported_models, family.config):
        return {"absent": f"comfy.supported_models has no {family.config}"}
    try:
        return check(host, family)
    except Exception:
        return {"failed": traceback.format_exc(limit=-4)}


if __name__ == "__main__":
    main({name: lambda host, family=family: result(host, family) for name, family in FAMILIES.items()})
