"""Apply Cache and torch.compile on real model classes, by core's own wrapper, with a backend that counts its graphs."""

from __future__ import annotations

import torch
from cache_tools import CASES, LISTS, STEPS, cached, computed_steps, patcher_of, reported, sample
from host import Host, main, relative


class Graphs:
    """A backend that runs what it is given as it is."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph, inputs):
        self.count += 1
        return graph.forward


def steady_memory() -> None:
    """Core's attention for CPUs reads the free memory, and a compiled one is compiled again where that changes."""
    import comfy.model_management

    free = 2**34
    comfy.model_management.get_free_memory = lambda dev=None, torch_free_too=False: (
        (free, free) if torch_free_too else free
    )


def compiled(patcher, graphs: Graphs, keys: list[str]):
    """A clone that core compiles as its node does."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper
    from comfy_extras.nodes_torch_compile import skip_torch_compile_dict

    clone = patcher.clone()
    options = {"guard_filter_fn": skip_torch_compile_dict}
    set_torch_compile_wrapper(clone, backend=graphs, options=options, keys=keys)
    return clone


def keys_of(name: str, blocks: bool) -> list[str]:
    if not blocks:
        return ["diffusion_model"]
    network = patcher_of(name).model.diffusion_model
    return [f"diffusion_model.{path}.{i}" for path in LISTS[name] for i in range(len(network.get_submodule(path)))]


def counted(patcher, name: str, graphs: Graphs, steps: int) -> tuple[torch.Tensor, list[int]]:
    """A run, and the graphs in all before it and after each of its steps."""
    counts = [graphs.count]
    out = sample(patcher, CASES[name], steps=steps, callback=lambda *_: counts.append(graphs.count))
    return out, counts


def checks(host: Host, name: str, reuse: str, blocks: bool) -> dict[str, dict]:
    """A compiled model without a cache, then with one attached after and before it was compiled."""
    patcher, keys = patcher_of(name), keys_of(name, blocks)
    plain = sample(patcher, CASES[name])
    torch._dynamo.reset()
    steady_memory()
    graphs = Graphs()
    model = compiled(patcher, graphs, keys)
    out, counts = counted(model, name, graphs, STEPS)
    found = {
        "no cache": {"error": relative(out, plain), "graphs": [counts, counted(model, name, graphs, 2 * STEPS)[1]]}
    }
    before, _ = cached(host, patcher, reuse)
    for order, fast in {
        "compiled first": cached(host, model, reuse)[0],
        "cached first": compiled(before, graphs, keys),
    }.items():
        report = reported(host, fast)
        out, counts = counted(fast, name, graphs, STEPS)
        reference, _ = cached(host, patcher, report.reuse.split(",")[0])
        found[order] = {
            "error": relative(out, sample(reference, CASES[name])), "effect": relative(out, plain),
            "computed": computed_steps(report), "reuse": report.reuse, "warnings": report.warnings,
            "graphs": [counts, counted(fast, name, graphs, 2 * STEPS)[1]],
        }  # fmt: skip
    found["after"] = {"error": relative(sample(patcher, CASES[name]), plain)}
    return found


if __name__ == "__main__":
    main({
        "whole model": lambda host: {
            f"{name}, {reuse}": checks(host, name, reuse, blocks=False)
            for name, reuse in (("Flux", "whole prediction"), ("Flux", "blocks"))
        },
        "blocks": lambda host: {
            f"{name}, blocks": checks(host, name, "blocks", blocks=True) for name in ("Flux", "Lumina 2")
        },
    })  # fmt: skip
