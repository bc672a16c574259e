"""Apply Cache under what other packs and samplers do to a run: pieces that move, schedules, noise.

The network is a formula, so that a run takes milliseconds; core's sampling around it is the real one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator

import torch
from cache_tools import reported
from easycache import WAN, with_windows
from families import build, conditioning
from family_list import FAMILIES
from host import Host, main, relative
from sampling import cache_policy

STEPS, CFG, SEED, FRAMES = 10, 2.0, 11, 12
UNET = FAMILIES["SD 1.5"]
MASKS = {"left half free": lambda x: x[:, :1] * 0 + (torch.arange(x.shape[-1]) < x.shape[-1] // 2)}


class Network:
    """A model of core whose network is a formula; counts its calls."""

    def __init__(self, host: Host, family=UNET):
        self.host, self.calls, self.family = host, 0, family
        self.patcher = build(family)
        self.patcher.model.diffusion_model.forward = self.forward

    def forward(self, x, timesteps=None, context=None, **kwargs):
        self.calls += 1
        prompt = context.float().mean(dim=(1, 2)).reshape(-1, *[1] * (x.ndim - 1))
        return 0.6 * torch.tanh(x + 3 * prompt) + 0.3 * x.roll(1, -1)

    def cached(self, interval: int = 2, order: int = 0, patcher=None, **choices):
        settings = cache_policy(self.host, interval, order, reuse="whole prediction", **choices)
        fast = self.host.module("nodes.comfyui.cache.attach").apply_cache(patcher or self.patcher, settings)
        return fast, reported(self.host, fast)

    def latent(self, frames: int = 2) -> torch.Tensor:
        return torch.zeros(frames, 4, 8, 8)

    def sample(self, patcher, sampler, sigmas=None, latent=None, seed: int = SEED, mask=None, cfg: float = CFG):
        import comfy.sample
        import comfy.samplers

        latent = self.latent() if latent is None else latent
        sampler = comfy.samplers.KSAMPLER(sampler) if callable(sampler) else sampler
        sampler = comfy.samplers.sampler_object(sampler) if isinstance(sampler, str) else sampler
        start = comfy.sample.prepare_noise(latent, SEED)
        torch.manual_seed(seed)  # for samplers that churn
        return comfy.sample.sample_custom(
            patcher, start, cfg, sampler,
            self.sigmas() if sigmas is None else sigmas, conditioning(self.family, 1), conditioning(self.family, 2),
            latent, noise_mask=mask, disable_pbar=True, seed=seed,
        )  # fmt: skip

    def sigmas(self, steps: int = STEPS) -> torch.Tensor:
        import comfy.samplers

        return comfy.samplers.calculate_sigmas(self.patcher.get_model_object("model_sampling"), "normal", steps)


# Noise


def sampler_kinds() -> Iterator[tuple[str, object]]:
    """Every sampler of this ComfyUI, and its variants by the options that say how much noise it adds."""
    import comfy.k_diffusion.sampling as functions
    import comfy.samplers

    for name in comfy.samplers.SAMPLER_NAMES:
        yield name, comfy.samplers.sampler_object(name)
        function = getattr(functions, f"sample_{name}", None)
        parameters = inspect.signature(function).parameters if function and name != "dpm_fast" else {}
        for option, values in {"eta": (0.0, 1.0), "s_churn": (5.0,), "s_noise": (0.0,)}.items():
            for value in values if option in parameters else ():
                yield f"{name}, {option} {value:g}", comfy.samplers.ksampler(name, {option: value})


def noise(host: Host) -> dict[str, dict]:
    """Whether another seed gives another image from the same start, which is what noise is, and what the run found."""
    network, found = Network(host), {}
    for kind, sampler in sampler_kinds():
        images = [network.sample(network.patcher, sampler, seed=seed) for seed in (1, 2)]
        fast, report = network.cached(order=1)
        out = network.sample(fast, sampler, seed=1)
        found[kind] = {
            "adds noise": relative(*images) > 1e-3, "warnings": report.warnings, "finite": bool(out.isfinite().all()),
            "forecast": any("F" in line for line in report.timeline.values()), "timeline": report.timeline,
        }  # fmt: skip
    for kind, mask in MASKS.items():
        fast, report = network.cached(order=1)
        network.sample(fast, "euler", mask=mask(network.latent()), latent=network.latent() + 0.5)
        found[kind] = {"warnings": report.warnings, "timeline": report.timeline}
    return found


def noisy_euler(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """A sampler of another pack that adds noise under a name that says nothing."""
    for i in range(len(sigmas) - 1):
        d = (x - model(x, sigmas[i] * x.new_ones(len(x)), **extra_args)) / sigmas[i]
        x = x + d * (sigmas[i + 1] - sigmas[i]) + 0.3 * sigmas[i + 1] * torch.randn(x.shape)
    return x


# Schedules


def restarting(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """Euler that goes up again twice, with noise, from the seventh level to the fourth."""
    sequence = [*sigmas[:8], *sigmas[4:8], *sigmas[4:]]
    for level, following in zip(sequence, sequence[1:]):
        if following > level:
            x = x + torch.randn(x.shape, generator=torch.Generator().manual_seed(1)) * (following**2 - level**2) ** 0.5
            continue
        d = (x - model(x, level * x.new_ones(len(x)), **extra_args)) / level
        x = x + d * (following - level)
    return x


def leaving_out(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """Euler over every step but the second and the sixth."""
    kept = [sigma for i, sigma in enumerate(sigmas) if i not in (1, 5)]
    for level, following in zip(kept, kept[1:]):
        d = (x - model(x, level * x.new_ones(len(x)), **extra_args)) / level
        x = x + d * (following - level)
    return x


def schedules(host: Host) -> dict[str, dict]:
    """What ran, what was reported, and how far the image is from the run without a cache."""
    network, found = Network(host), {}
    down = network.sigmas()
    up = down.flip(0).clone()
    up[0] = 1e-4
    runs: dict[str, tuple] = {
        "plain": ("euler", down), "restarting": (restarting, down), "leaving out": (leaving_out, down),
        "flipped": ("euler", up), "partial": ("euler", down[3:]), "one step": ("euler", down[-2:]),
        "no step": ("euler", down[-1:]), "empty": ("euler", down[:0]),
        "repeated": ("euler", torch.cat([down[:3], down[2:6], down[5:]])), "noisy of a pack": (noisy_euler, down),
    }  # fmt: skip
    for kind, (sampler, sigmas) in runs.items():
        for order in (0, 1):
            torch.manual_seed(0)
            plain = network.sample(network.patcher, sampler, sigmas, cfg=1.0)
            fast, report = network.cached(order=order)
            network.calls = 0
            torch.manual_seed(0)
            out = network.sample(fast, sampler, sigmas, cfg=1.0)
            found[f"{kind}, order {order}"] = {
                "timeline": report.timeline, "calls": network.calls, "computed": report.computed,
                "not visited": getattr(report, "not_visited", 0), "warnings": report.warnings,
                "error": relative(out, plain) if plain.norm() > 0 else 0.0,
            }  # fmt: skip
    return found


def budget(host: Host) -> dict[str, list]:
    """The error budget through a restart and backwards."""
    network, found = Network(host), {}
    up = network.sigmas().flip(0).clone()
    up[0] = 1e-4
    for kind, (sampler, sigmas) in {"restarting": (restarting, None), "flipped": ("euler", up)}.items():
        fast, report = network.cached(order=1, max_error=1.0)
        network.calls = 0
        out = network.sample(fast, sampler, sigmas, cfg=1.0)
        found[kind] = [report.computed.count(True), network.calls, bool(out.isfinite().all())]
    return found


def used_twice(host: Host) -> dict[str, bool]:
    """One guider, sampled twice, gives and reports both times what a fresh one does."""
    import comfy.sample
    import comfy.samplers

    network = Network(host)
    fast, report = network.cached()

    def guider():
        made = comfy.samplers.CFGGuider(fast)
        made.set_conds(conditioning(UNET, 1), conditioning(UNET, 2))
        made.set_cfg(CFG)
        return made

    def run(made, seed: int) -> tuple[list[float], dict[str, str], list[bool], int]:
        latent, calls, report.warnings = network.latent(), network.calls, []
        start = comfy.sample.prepare_noise(latent, seed)
        out = made.sample(start, latent, comfy.samplers.sampler_object("euler"), network.sigmas(), disable_pbar=True)
        return out.flatten().tolist(), report.timeline, report.computed, network.calls - calls

    both = guider()
    before = dict(both.model_options["transformer_options"])
    results = {f"seed {seed}": run(both, seed) == run(guider(), seed) for seed in (1, 2)}
    return {**results, "clean": both.model_options["transformer_options"] == before}


# Pieces


class Pack:
    """Stands for a pack that cuts the sample into pieces. Knows for each piece what the network last made of it."""

    def __init__(self, network: Network, cut: Callable[[int], list]):
        self.network, self.cut, self.step = network, cut, 0
        self.latest: dict = {}
        self.reused = self.foreign = 0

    def evaluate(self, call: Callable, whole: torch.Tensor, sides: list) -> torch.Tensor:
        """call(piece) -> prediction of the piece, for every piece of this step; averages where they overlap."""
        total, weight = torch.zeros_like(whole), torch.zeros_like(whole)
        for index in self.cut(self.step):
            before = self.network.calls
            out = call(index)
            if self.network.calls == before:
                self.reused += 1
                self.foreign += not torch.equal(out, self.latest.get((str(index), tuple(sides)), out + 1))
            else:
                self.latest[str(index), tuple(sides)] = out.clone()
            total[index] += out
            weight[index] += 1
        return total / weight


def batch_wrapper(pack: Pack):
    """Pieces by CALC_COND_BATCH, each condition by itself."""

    def wrapper(executor, model, conds, x_in, timestep, model_options):
        found = []
        for cond in conds:
            here = [cond]

            def call(index, here=here):
                return executor(model, here, x_in[index], timestep[: len(x_in[index])], model_options)[0]

            found.append(pack.evaluate(call, x_in, [cond[0]["uuid"]]))
        pack.step += 1
        return found

    return wrapper


def model_wrapper(pack: Pack):
    """Pieces by APPLY_MODEL, cut from a batch of both conditions."""

    def wrapper(executor, x, t, c_concat, c_crossattn, control, transformer_options, **kwargs):
        def call(index):
            return executor(x[index], t, c_concat, c_crossattn, control, transformer_options, **kwargs)

        out = pack.evaluate(call, x, transformer_options["uuids"])
        pack.step += 1
        return out

    return wrapper


def function_wrapper(pack: Pack):
    """Pieces by model_function_wrapper, as tiled samplers do."""

    def wrapper(apply_model, args):
        def call(index):
            return apply_model(args["input"][index], args["timestep"], **args["c"])

        out = pack.evaluate(call, args["input"], args["c"]["transformer_options"]["uuids"])
        pack.step += 1
        return out

    return wrapper


def frames(moving: bool, shuffled: bool) -> Callable[[int], list]:
    def cut(step: int) -> list:
        shift = step % 3 if moving else 0
        starts = [*(max(0, start - shift) for start in (0, 3, 6)), FRAMES - 4]
        order = torch.randperm(4, generator=torch.Generator().manual_seed(step)) if shuffled else torch.arange(4)
        return [slice(starts[i], starts[i] + 4) for i in order.tolist()]

    return cut


def tiles(moving: bool, shuffled: bool) -> Callable[[int], list]:
    def cut(step: int) -> list:
        edge = 2 + step % 5 if moving else 4
        pieces = [(..., slice(0, edge)), (..., slice(edge, 8))]
        return pieces[::-1] if shuffled and step % 2 else pieces

    return cut


PACKS = {
    "frames by CALC_COND_BATCH": (frames, "calc_cond_batch", batch_wrapper),
    "tiles by CALC_COND_BATCH": (tiles, "calc_cond_batch", batch_wrapper),
    "tiles by APPLY_MODEL": (tiles, "apply_model", model_wrapper),
    "tiles by model_function_wrapper": (tiles, "", function_wrapper),
}


def pieces(host: Host) -> dict[str, dict]:
    """How many pieces were reused, and how many of these got what another piece had."""
    found = {}
    for name, (cuts, kind, wrapper) in PACKS.items():
        for moving in (False, True):
            for shuffled in (False, True):
                network = Network(host)
                pack = Pack(network, cuts(moving, shuffled))
                patcher = network.patcher.clone()
                if kind:
                    patcher.add_wrapper_with_key(kind, "pack", wrapper(pack))
                else:
                    patcher.set_model_unet_function_wrapper(wrapper(pack))
                fast, report = network.cached(patcher=patcher)
                out = network.sample(fast, "euler", latent=network.latent(FRAMES))
                found[f"{name}, moving {moving}, shuffled {shuffled}"] = {
                    "reused": pack.reused, "foreign": pack.foreign, "warnings": report.warnings,
                    "finite": bool(out.isfinite().all()),
                }  # fmt: skip
    return found


def guided_by(host: Host, other: Callable) -> dict:
    """Guidance that evaluates the negative on a sample of its own making."""
    network = Network(host)

    def guide(args):
        import comfy.samplers

        (found,) = comfy.samplers.calc_cond_batch(
            args["model"], [args["uncond"]], other(args["input"]), args["sigma"], args["model_options"]
        )
        return args["denoised"] + 0.1 * (args["cond_denoised"] - found)

    patcher = network.patcher.clone()
    patcher.set_model_sampler_post_cfg_function(guide)
    fast, report = network.cached(patcher=patcher)
    network.sample(fast, "euler")
    return {"timeline": report.timeline, "warnings": report.warnings, "calls": network.calls}


def degraded(host: Host) -> dict[str, dict]:
    def unrelated(x):
        return torch.randn(x.shape, generator=torch.Generator().manual_seed(2))

    return {
        "noised": guided_by(host, lambda x: x + 0.1 * unrelated(x)),
        "scaled": guided_by(host, lambda x: 0.9 * x),
        "unrelated": guided_by(host, unrelated),
    }


def windows_that_move(host: Host) -> dict:
    """Core's uniform context windows begin elsewhere at each step."""
    import comfy.context_windows as core_windows

    network = Network(host, WAN)
    network.latent = lambda frames=0: torch.zeros(1, 16, 14, 8, 8)
    patcher = with_windows(network.patcher)
    schedule = core_windows.get_matching_context_schedule(core_windows.ContextSchedules.UNIFORM_STANDARD)
    patcher.model_options["context_handler"].context_schedule = schedule
    seen: dict = {}
    wrong = [0, 0]
    steps: list[tuple[float, set]] = []  # noise level and calls of each
    expected = 0

    def watch(executor, x, t, c_concat, c_crossattn, control, transformer_options, **kwargs):
        nonlocal expected
        before = network.calls
        out = executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)
        key = tuple(transformer_options["context_window"].index_list), tuple(transformer_options["uuids"])
        if not steps or steps[-1][0] != float(t[0]):
            steps.append((float(t[0]), set()))
        steps[-1][1].add(key)
        expected += len(steps) % 2 == 0 and key in steps[-2][1]  # every other step reuses what the one before computed
        if network.calls == before:
            wrong[0] += 1
            wrong[1] += not torch.equal(out, seen[key])
        seen[key] = out.clone()
        return out

    patcher.add_wrapper_with_key("apply_model", "watch", watch)
    fast, report = network.cached(patcher=patcher)
    network.sample(fast, "euler")
    return {
        "reused": wrong[0],
        "expected": expected,
        "foreign": wrong[1],
        "windows": len(report.timeline) // 2,
        "steps": len(report.computed),
    }


if __name__ == "__main__":
    main({
        "noise": noise, "schedules": schedules, "budget": budget, "used twice": used_twice, "pieces": pieces,
        "degraded": degraded, "windows that move": windows_that_move,
    })  # fmt: skip
