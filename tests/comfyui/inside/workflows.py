"""Every topology of the official templates with each of our nodes, against hooks and steps written by hand.

Apply Cache: Euler steps that call the model on the listed steps and extrapolate its prediction on the others take the
place of ComfyUI's function for the sampler "euler"; the workflow is otherwise the same, on models without our node.
Quantize: a hook on every quantized layer compares what it returns with int8 arithmetic on codes and inputs rotated and
rounded here.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any
from unittest.mock import patch

import families
import torch
from family_list import FAMILIES
from host import Host, main, relative
from topologies import TOPOLOGIES, Absent, Desk, Topology, experts, node_classes

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


def euler(computes: Callable[[int], bool]) -> Callable:
    """Euler's method without noise. A step that does not compute takes the line through the last two predictions."""

    def sample_euler(model, x, sigmas, extra_args=None, callback=None, disable=None, **options):
        computed: list[tuple[int, torch.Tensor]] = []
        for i in range(len(sigmas) - 1):
            if computes(i):
                denoised = model(x, sigmas[i] * x.new_ones(len(x)), **extra_args)
                computed = [*computed[-1:], (i, denoised)]
            elif len(computed) == 2:
                (a, first), (b, last) = computed
                denoised = last + (last - first) * (i - b) / (b - a)
            x = x + (x - denoised) / sigmas[i] * (sigmas[i + 1] - sigmas[i])
        return x

    return sample_euler


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
    """How far a rotated weight lies from its code, in steps of the grid; 0.5 is the most that rounding allows."""
    worst = 0.0
    for name, layer in quantized.layers.items():
        params = layer.weight._params
        weight = full.model.diffusion_model.get_submodule(name).weight.float()
        steps = rotated(weight, params.convrot_groupsize) / params.scale.reshape(-1, 1)
        worst = max(worst, float((steps - layer.weight._qdata).abs().max()))
    return worst


def check_quantize(host: Host, topology: Topology, models: list, plain: torch.Tensor) -> dict[str, Any]:
    native = host.module("nodes.comfyui.quantize.native")
    small = [native.quantize_native(model, native.NativeSettings("W8A8", rounding="nearest"), None)[0] for model in models]
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


COLUMNS: dict[str, Callable] = {"Apply Cache": check_cache, "Quantize": check_quantize}


def result(host: Host, name: str) -> dict[str, Any]:
    """Column -> what was found, or why this ComfyUI lacks the topology."""
    import comfy.supported_models

    topology, found = TOPOLOGIES[name], {}
    if not hasattr(comfy.supported_models, FAMILIES[topology.family].config):
        return {"absent": f"no {topology.family}"}
    models = experts(topology)
    try:
        plain, _ = run(host, topology, models)
    except Absent as error:
        return {"absent": f"no {error}"}
    assert plain.isfinite().all() and plain.std() > 0, "the random model gives nothing to compare"
    for column, check in COLUMNS.items():
        try:
            found[column] = check(host, topology, models, plain)
        except Exception:
            found[column] = {"failed": traceback.format_exc(limit=-4)}
    return found


if __name__ == "__main__":
    main({name: lambda host, name=name: result(host, name) for name in TOPOLOGIES})
