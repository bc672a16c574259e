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
REUSE = ("whole prediction", "blocks")


def build(family: Family):
    """A patcher over the real model class; every tensor that a checkpoint would hold is random."""
    import comfy.model_patcher
    import comfy.supported_models

    cpu = torch.device("cpu")
    unet = family.unet() if callable(family.unet) else family.unet
    config = getattr(comfy.supported_models, family.config)(unet)
    config.unet_config.update(unet)  # over the sizes that the class fixes
    config.set_inference_dtype(torch.float32, None)
    with ExitStack() as smaller:
        for name, arguments in family.parts.items():
            smaller.enter_context(patch(name, partial(pkgutil.resolve_name(name), **arguments)))
        model = config.get_model(family.state(), "")
    fill(model.diffusion_model)
    patcher = comfy.model_patcher.ModelPatcher(model, cpu, cpu)
    if family.patched:
        patcher.set_model_patch(lambda args: {**args, "img": 0.9 * args["img"]}, "double_block")
    return patcher


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


def control_net(shapes: dict[str, list[tuple]]):
    """Stands in for a ControlNet: what it adds after each block changes from step to step."""
    import comfy.controlnet

    generator = torch.Generator().manual_seed(3)
    added = {key: [torch.randn(shape, generator=generator) for shape in listed] for key, listed in shapes.items()}

    def get_control(x_noisy, t, *_):
        return {key: [tensor * (0.5 + t[0] % 1) for tensor in tensors] for key, tensors in added.items()}

    net = comfy.controlnet.ControlBase()
    net.get_control = get_control
    return net


def empty_latent(family: Family):
    import comfy.nested_tensor

    if isinstance(family.latent, list):
        return comfy.nested_tensor.NestedTensor([torch.zeros(shape) for shape in family.latent])
    return torch.zeros(family.latent)


def inputs(family: Family) -> tuple:
    """Noise, both conditions and the empty latent."""
    import comfy.sample

    latent, positive, negative = empty_latent(family), conditioning(family, 1), conditioning(family, 2)
    if family.control:
        positive[0][1]["control"] = negative[0][1]["control"] = control_net(family.control)
    return comfy.sample.prepare_noise(latent, SEED), positive, negative, latent


def flat(samples) -> torch.Tensor:
    tensors = samples.unbind() if samples.is_nested else [samples]
    return torch.cat([tensor.flatten() for tensor in tensors])


def sample(patcher, family: Family, callback=None) -> torch.Tensor:
    import comfy.sample

    noise, positive, negative, latent = inputs(family)
    return flat(
        comfy.sample.sample(
            patcher, noise, STEPS, CFG, "euler", "simple", positive, negative, latent, callback=callback,
            disable_pbar=True, seed=SEED,
        )
    )  # fmt: skip


def sample_apart_where_reused(patcher, family: Family) -> torch.Tensor:
    """Both conditions in one batch on computed steps and one after the other on the steps between."""
    needed = [0.0]

    def after_step(i, *_) -> None:
        needed[0] = 0.0 if (i + 1) % INTERVAL == 0 else 1e30

    with patch.object(patcher.model, "memory_required", lambda *args, **kwargs: needed[0]):
        return sample(patcher, family, after_step)


def euler_holding_the_derivative(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """Karras et al., Algorithm 2 without noise; d = (x - D) / sigma of the guided D is renewed every third step."""
    for i in range(len(sigmas) - 1):
        if i % INTERVAL == 0:
            d = (x - model(x, sigmas[i] * x.new_ones(len(x)), **extra_args)) / sigmas[i]
        x = x + d * (sigmas[i + 1] - sigmas[i])
    return x


def sample_by(function, patcher, family: Family) -> torch.Tensor:
    """The same run with a sampler of ours; it calls the model and knows no node."""
    import comfy.sample
    import comfy.samplers

    noise, positive, negative, latent = inputs(family)
    sampler = comfy.samplers.KSAMPLER(function)
    sigmas = comfy.samplers.calculate_sigmas(patcher.get_model_object("model_sampling"), "simple", STEPS)
    return flat(
        comfy.sample.sample_custom(
            patcher, noise, CFG, sampler, sigmas, positive, negative, latent, disable_pbar=True, seed=SEED
        )
    )


def brute_force(patcher, family: Family) -> torch.Tensor:
    """Euler steps that call the model on computed steps only."""
    return sample_by(euler_holding_the_derivative, patcher, family)


class HeldBlocks:
    """Blocks that add again what they added in the last computed step, one by one; it knows the nodes' lists only."""

    def __init__(self, network, lists):
        self.network = network
        self.blocks = [block for path in lists for block in members(network.get_submodule(path))]
        self.step, self.condition = 0, -1
        self.added: dict[tuple[int, int], list] = {}

    def __enter__(self) -> HeldBlocks:
        self.stack = ExitStack()
        self.stack.callback(self.network.register_forward_pre_hook(self.count).remove)
        for number, block in enumerate(self.blocks):
            forward = partial(self.forward, number, block.forward)
            self.stack.enter_context(patch.object(block, "forward", forward))
        return self

    def __exit__(self, *error) -> None:
        self.stack.close()

    def count(self, *_) -> None:
        self.condition += 1  # each condition is one call, always in the same order

    def forward(self, number: int, forward, *args, **kwargs):
        given = tensors(args, kwargs)
        key = self.condition, number
        if self.step % INTERVAL == 0:
            given = [tensor.clone() for tensor in given]
            out = forward(*args, **kwargs)
            self.added[key] = [difference(given, value) for value in (out if isinstance(out, tuple) else [out])]
            self.added[key].append(isinstance(out, tuple))
            return out
        *parts, several = self.added[key]
        out = tuple(None if part is None else given[part[0]] + part[1] for part in parts)
        return out if several else out[0]

    def euler(self, model, x, sigmas, extra_args=None, callback=None, disable=None):
        for self.step in range(len(sigmas) - 1):
            self.condition = -1
            sigma = sigmas[self.step]
            d = (x - model(x, sigma * x.new_ones(len(x)), **extra_args)) / sigma
            x = x + d * (sigmas[self.step + 1] - sigma)
        return x


def members(blocks) -> list:
    return list(blocks.values() if hasattr(blocks, "values") else blocks)


def tensors(args, kwargs) -> list[torch.Tensor]:
    """The tensors among a block's arguments; video and audio come as one tuple."""
    values = [(value if isinstance(value, (tuple, list)) else [value]) for value in (*args, *kwargs.values())]
    return [tensor for several in values for tensor in several if isinstance(tensor, torch.Tensor)]


def difference(given: list[torch.Tensor], out: torch.Tensor | None) -> tuple[int, torch.Tensor] | None:
    """Which argument an output continues, by its shape, and what the block added to it."""
    if out is None:
        return None
    at = next(i for i, tensor in enumerate(given) if tensor.shape == out.shape)
    return at, out - given[at]


def brute_force_blocks(patcher, family: Family, lists) -> torch.Tensor:
    """Euler steps with the blocks above, one condition at a time."""
    apart = patch.object(patcher.model, "memory_required", lambda *args, **kwargs: 1e30)
    with apart, HeldBlocks(patcher.model.diffusion_model, lists) as held:
        return sample_by(held.euler, patcher, family)


def attributes(patcher) -> dict[str, set[str]]:
    return {name: set(vars(module)) for name, module in patcher.model.named_modules()}


class Work:
    """Counts calls of the network, and of what is in its blocks: a reused block is called but runs nothing inside."""

    def __init__(self, network, lists):
        inside = [
            module
            for path in lists
            for block in members(network.get_submodule(path))
            for module in block.modules()
            if module is not block
        ]
        self.watched = {"whole prediction": [network], "blocks": inside}
        self.calls = dict.fromkeys(self.watched, 0)

    def count(self, kind: str, *_) -> None:
        self.calls[kind] += 1

    def of(self, run) -> tuple[torch.Tensor, dict[str, int]]:
        """What `run` returns, and the calls that it made."""
        self.calls = dict.fromkeys(self.watched, 0)
        with ExitStack() as stack:
            for kind, modules in self.watched.items():
                for module in modules:
                    stack.callback(module.register_forward_pre_hook(partial(self.count, kind)).remove)
            return run(), self.calls


def cached(host: Host, patcher, interval: int = INTERVAL, reuse: str = "automatic", **choices):
    policy = cache_policy(host, interval, reuse=reuse, **choices)
    return host.module("nodes.comfyui.cache.attach").apply_cache(patcher, policy)


def with_report(host: Host, patcher, reuse: str, **choices):
    """A cached model, and what a run of it reports."""
    report, fast = SimpleNamespace(warnings=[]), cached(host, patcher, reuse=reuse, **choices)
    fast.model_options["transformer_options"][host.module("nodes.comfyui.wrappers").REPORT] = report
    return fast, report


def never_reuses(host: Host, patcher, family: Family, reuse: str, plain: torch.Tensor) -> bool:
    """A cache that is on and computes every step, whether it keeps features for the next step or not."""
    for choices in ({"num_computed": STEPS}, {"max_error": 1e-12}):
        fast, report = with_report(host, patcher, reuse, **choices)
        if not torch.equal(sample(fast, family), plain) or sum(report.computed) != STEPS:
            return False
    return True


def check_reuse(host: Host, family: Family, patcher, reuse: str, plain: torch.Tensor, plain_calls: dict) -> dict:
    before, options = attributes(patcher), set(patcher.model_options["transformer_options"])
    lists = host.module("qandc_core.caching.families").block_lists(patcher.model.diffusion_model)
    fast, report = with_report(host, patcher, reuse)
    out, calls = Work(patcher.model.diffusion_model, lists).of(lambda: sample(fast, family))
    used = report.reuse.partition(",")[0]
    left = attributes(patcher) == before and not patcher.wrappers
    left = left and set(patcher.model_options["transformer_options"]) == options
    by_hand = brute_force_blocks(patcher, family, lists) if used == "blocks" else brute_force(patcher, family)
    return {
        "reuse": report.reuse,
        "computed": sum(report.computed),
        "reused": len(report.computed) - sum(report.computed),
        "calls": [plain_calls[used], calls[used]],
        "never reused": never_reuses(host, patcher, family, reuse, plain),
        "error": relative(out, by_hand),
        "apart": relative(sample_apart_where_reused(fast, family), by_hand),
        "clean": bool(left and torch.equal(sample(patcher, family), plain)),
        "effect": relative(out, plain),
    }


def check(host: Host, family: Family) -> dict:
    patcher = build(family)
    network = patcher.model.diffusion_model
    lists = host.module("qandc_core.caching.families").block_lists(network)
    plain, calls = Work(network, lists).of(lambda: sample(patcher, family))
    assert plain.isfinite().all() and plain.std() > 0, "the random model gives nothing to compare"
    return {
        "model": type(patcher.model).__name__,
        "network": type(network).__name__,
        "sampling": patcher.model.model_type.name,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "lists": {path: len(network.get_submodule(path)) for path in lists},
        "interval 1": torch.equal(sample(cached(host, patcher, 1), family), plain),
        "no error": torch.equal(sample(cached(host, patcher, max_error=0.0), family), plain),
        "kinds": {reuse: check_reuse(host, family, patcher, reuse, plain, calls) for reuse in REUSE},
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
