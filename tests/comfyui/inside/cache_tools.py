"""What the programs about Apply Cache share: tiny real models, runs of them, a record of the work, and brute force."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import family_configs as unets
import torch
from families import build, conditioning, empty_latent
from family_list import FAMILIES, Family
from host import Host
from sampling import cache_policy

STEPS, INTERVAL, CFG, SEED = 9, 3, 2.0, 11
PLANNED = [0, 3, 6]
REUSE = ("whole prediction", "blocks")
SIDES = ("positive", "negative")
CASES: dict[str, Family] = {
    "Flux": replace(FAMILIES["Flux"], unet=unets.flux(image_model="flux", depth=2, depth_single_blocks=2)),
    "SD 3.5": replace(FAMILIES["SD 3.5"], unet={**unets.sd35(), "num_blocks": 2}),
    "Lumina 2": replace(FAMILIES["Lumina 2"], unet=unets.lumina(n_layers=2)),
    "Wan 2.1": FAMILIES["Wan 2.1"],
    "Qwen-Image": FAMILIES["Qwen-Image"],
}
UNET = "SD 1.5"  # its prompts are padded to one length, by repetition
LISTS = {
    "Flux": ("double_blocks", "single_blocks"),
    "SD 3.5": ("joint_blocks",),
    "Lumina 2": ("layers",),
    "Wan 2.1": ("blocks",),
    "Qwen-Image": ("transformer_blocks",),
    UNET: ("input_blocks", "output_blocks"),
}
# Arguments of the blocks that they hand on, in the order in which they return them.
HANDED_ON: dict[str, tuple[str | int, ...]] = {
    "double_blocks": ("img", "txt"),
    "single_blocks": (0,),
    "joint_blocks": (0, 1),
    "layers": (0,),
    "blocks": (0,),
    "transformer_blocks": ("encoder_hidden_states", "hidden_states"),
}


def sample(
    patcher,
    family: Family,
    sampler: str = "euler",
    positive: list | None = None,
    negative: list | None = None,
    latent: torch.Tensor | None = None,
    seed: int = SEED,
    denoise: float = 1.0,
    steps: int = STEPS,
    callback: Callable | None = None,
) -> torch.Tensor:
    """What KSampler does."""
    import comfy.sample

    latent = empty_latent(family) if latent is None else latent
    return comfy.sample.sample(
        patcher, comfy.sample.prepare_noise(latent, seed), steps, CFG, sampler, "simple",
        positive or conditioning(family, 1), negative or conditioning(family, 2), latent, denoise=denoise,
        disable_pbar=True, callback=callback, seed=seed,
    )  # fmt: skip


def cached(host: Host, patcher, reuse: str, interval: int = INTERVAL, order: int = 0, **choices):
    """A caching clone, and the report that its runs fill in."""
    fast = host.module("nodes.comfyui.cache.attach").apply_cache(
        patcher, cache_policy(host, interval, order, reuse=reuse, **choices)
    )
    return fast, reported(host, fast)


def reported(host: Host, patcher) -> SimpleNamespace:
    report = SimpleNamespace(warnings=[], timeline={}, reuse="", computed=[], cache_bytes=0, cache_speedup=None)
    patcher.model_options["transformer_options"][host.module("nodes.comfyui.wrappers").REPORT] = report
    return report


def computed_steps(report: SimpleNamespace) -> list[int]:
    return [step for step, computed in enumerate(report.computed) if computed]


def blocks_of(patcher, name: str) -> dict[str, torch.nn.Module]:
    """The blocks of a network by their paths."""
    network = patcher.model.diffusion_model
    return {f"{path}.{i}": block for path in LISTS[name] for i, block in enumerate(network.get_submodule(path))}


def wrapped(patcher, wrapper: Callable):
    """A clone whose model calls go through `wrapper` first."""
    import comfy.patcher_extension

    clone = patcher.clone()
    clone.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.APPLY_MODEL, "check", wrapper)
    return clone


@dataclass
class Call:
    """One model call: which sides of guidance it held, and the blocks that ran."""

    sigma: float
    sides: tuple[int, ...]
    ran: set[str]
    features: list[torch.Tensor]  # that the run kept when the call had ended

    @property
    def computed(self) -> bool:
        return bool(self.ran)


class Watch:
    """Records the calls of every model made from its `patcher`. A block has run where its first layer did."""

    def __init__(self, patcher, name: str):
        self.patcher = wrapped(patcher, self.record)
        self.calls: list[Call] = []
        self.ran: set[str] = set()
        for path, block in blocks_of(patcher, name).items():
            for layer in block.modules():
                if not list(layer.children()):
                    layer.register_forward_pre_hook(lambda *_, path=path: self.ran.add(path))

    def record(self, executor, x, t, c_concat, c_crossattn, control, transformer_options, **kwargs):
        self.ran.clear()
        out = executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)
        run = transformer_options.get("qandc_cache")
        features = [] if run is None else kept_tensors(run)
        self.calls.append(Call(float(t[0]), tuple(transformer_options["cond_or_uncond"]), {*self.ran}, features))
        return out

    def timeline(self) -> dict[str, str]:
        """A letter per step for every condition, by its side and its turn in the step, of a run on Euler."""
        sigmas = list(dict.fromkeys(call.sigma for call in self.calls))
        lines: dict[str, list[str]] = {}
        for step, sigma in enumerate(sigmas):
            turns = Counter()
            for call in (call for call in self.calls if call.sigma == sigma):
                for side in call.sides:
                    turns[side] += 1
                    name = SIDES[side] + (f" #{turns[side]}" if turns[side] > 1 else "")
                    lines.setdefault(name, ["."] * len(sigmas))[step] = "C" if call.computed else "R"
        return {name: "".join(line) for name, line in lines.items()}


def kept_tensors(run) -> list[torch.Tensor]:
    histories = [history for cache in run.caches.values() for history in cache.run.features.values()]
    return [tensor for history in histories for _, tensor in history]


class Holding:
    """Brute force on Euler: computes every third step, and else gives each condition what it had; knows no node.

    A condition is told by its side and its turn in the step, which core never changes. `state` adds what it also
    belongs to; a condition that has nothing kept since the latest computed step computes.
    """

    def __init__(self, patcher, name: str, reuse: str, state: Callable[[dict, Any], Hashable] = lambda *_: None):
        self.patcher, self.state, self.whole = wrapped(patcher, self.call), state, reuse == REUSE[0]
        self.network = patcher.model.diffusion_model
        self.blocks = blocks_of(patcher, name)
        self.kept: dict[Hashable, Any] = {}
        self.kept_at: dict[Hashable, int] = {}
        self.sigma, self.step, self.turns = -1.0, -1, Counter()

    def call(self, executor, x, t, c_concat, c_crossattn, control, transformer_options, **kwargs):
        if float(t[0]) != self.sigma:
            self.sigma, self.step, self.turns = float(t[0]), self.step + 1, Counter()
        keys = [
            self.key(side, transformer_options, control, c_crossattn) for side in transformer_options["cond_or_uncond"]
        ]
        since = self.step - self.step % INTERVAL  # what the latest computed step did not evaluate is too old
        reuse = since < self.step and all(self.kept_at.get(key, -1) >= since for key in keys)
        if not reuse:
            self.kept_at.update(dict.fromkeys(keys, self.step))

        def compute() -> torch.Tensor:
            return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)

        return self.prediction(keys, reuse, compute) if self.whole else self.added(keys, reuse, compute)

    def key(self, side: int, transformer_options: dict, control: Any, context: torch.Tensor) -> Hashable:
        self.turns[side] += 1
        tokens = 0 if self.whole else context.shape[1]
        return side, self.turns[side], tokens, self.state(transformer_options, control)

    def prediction(self, keys: list[Hashable], reuse: bool, compute: Callable) -> torch.Tensor:
        if not reuse:
            self.kept.update(zip(keys, compute().chunk(len(keys))))
        return torch.cat([self.kept[key] for key in keys])

    def added(self, keys: list[Hashable], reuse: bool, compute: Callable) -> torch.Tensor:
        """Every block adds what it added when it was computed."""
        parts = [self.kept[key] for key in keys] if reuse else [{} for _ in keys]
        for path, block in self.blocks.items():
            block.forward = HeldBlock(block, path, parts, reuse)
        try:
            out = compute()
        finally:
            for block in self.blocks.values():
                del block.forward
        self.kept.update(zip(keys, parts))
        return out


class HeldBlock:
    """The forward of one block: `parts` holds for each condition what the blocks add, and whether they return it."""

    def __init__(self, block: torch.nn.Module, path: str, parts: list[dict], reuse: bool):
        self.forward, self.path, self.parts, self.reuse = block.forward, path, parts, reuse
        self.handed_on = HANDED_ON[path.split(".")[0]]

    def __call__(self, *args, **kwargs):
        streams = [args[at] if isinstance(at, int) else kwargs[at] for at in self.handed_on]
        if self.reuse:
            return self.packed([self.plus(i, stream) for i, stream in enumerate(streams)])
        before = [stream.clone() for stream in streams]
        out = self.forward(*args, **kwargs)
        after = out if isinstance(out, tuple) else (out,)
        for i, (new, old) in enumerate(zip(after, before, strict=True)):
            deltas = [None] * len(self.parts) if new is None else (new - old).chunk(len(self.parts))
            for part, delta in zip(self.parts, deltas, strict=True):
                part[self.path, i] = delta
        return out

    def plus(self, i: int, stream: torch.Tensor) -> torch.Tensor | None:
        deltas = [part[self.path, i] for part in self.parts]
        return None if deltas[0] is None else stream + torch.cat(deltas)

    def packed(self, streams: list):
        return streams[0] if len(streams) == 1 else tuple(streams)


def family_of(name: str) -> Family:
    return CASES.get(name) or FAMILIES[name]


def patcher_of(name: str):
    return build(family_of(name))
