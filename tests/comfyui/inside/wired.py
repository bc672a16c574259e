"""TAP Calibrate on what custom sampler nodes take, against those nodes: every model input and the final latent."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from families import build, cached, empty_latent
from families import conditioning as conditioning_of
from family_list import FAMILIES
from host import Host, main, relative

STEPS, SEED, CFG = 4, 11, 2.5
PREFIX = "wired"


@dataclass
class Watched:
    """A MODEL whose predictions' inputs and whose runs' results are kept."""

    patcher: Any
    given: list[tuple[torch.Tensor, float]] = field(default_factory=list)
    results: list[torch.Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, patcher) -> Watched:
        made = cls(patcher.clone())
        made.patcher.add_wrapper_with_key("predict_noise", "watch", made.predict_noise)
        made.patcher.add_wrapper_with_key("outer_sample", "watch", made.outer_sample)
        return made

    def predict_noise(self, executor, x, timestep, *args, **kwargs):
        self.given.append((x.clone(), float(timestep.flatten()[0])))
        return executor(x, timestep, *args, **kwargs)

    def outer_sample(self, executor, *args, **kwargs):
        self.results.append(executor(*args, **kwargs))
        return self.results[-1]

    def take(self) -> tuple[list, list]:
        taken = self.given, self.results
        self.given, self.results = [], []
        return taken


def same(first: tuple[list, list], second: tuple[list, list], passes: int = 1) -> bool:
    """Whether the second runs are the first ones, bit for bit, so many times over."""
    given, results = first[0] * passes, first[1] * passes
    alike = len(given) == len(second[0]) > 0 and len(results) == len(second[1])
    alike = alike and all(torch.equal(a, b) and s == t for (a, s), (b, t) in zip(given, second[0]))
    return alike and all(torch.equal(a, b) for a, b in zip(results, second[1]))


def calibrated(host: Host, model=None, **inputs):
    """Through the node, all candidates of the first image or images, none held out."""
    given: dict[str, Any] = {"trajectories": 1, "samples": 1000, "steps": STEPS, "cfg": CFG, "sampler_name": "euler"}
    given |= {"scheduler": "simple", "selection": "random", "held_out": 0, "hessians": False, "filename_prefix": PREFIX}
    calibration = host.node("QandC_TAPCalibrate").execute(model=model, **{**given, **inputs}).args[0]
    (made,) = [path for path in (host.base / "output" / "qandc").iterdir()]
    made.unlink()
    return calibration


def saved(host: Host, prefix: str):
    """The one file that begins with this."""
    (path,) = (host.base / "output" / "qandc").glob(f"{prefix}*.safetensors")
    return host.module("qandc_core").load_calibration(path)


def custom():
    import comfy_extras.nodes_custom_sampler as nodes

    return nodes


def first(node, *args) -> Any:
    return node.execute(*args).args[0]


def prompts(family: str, *seeds: int) -> list:
    return [conditioning_of(FAMILIES[family], seed) for seed in seeds]


def guiders(host: Host) -> dict[str, tuple[str, Callable[[Any], Any]]]:
    """Name -> family and what makes the guider of a MODEL, as far as this version has it."""
    nodes, (one, two, three) = custom(), prompts("Flux", 1, 2, 3)
    dual = one, two, three, 2.0, 3.0
    found = {
        "CFGGuider": ("Flux", lambda model: first(nodes.CFGGuider, model, one, two, CFG)),
        "BasicGuider": ("Flux", lambda model: first(nodes.BasicGuider, model, one)),
        "DualCFGGuider": ("Flux", lambda model: first(nodes.DualCFGGuider, model, *dual, "regular")),
        "DualCFGGuider, nested": ("Flux", lambda model: first(nodes.DualCFGGuider, model, *dual, "nested")),
    }
    with suppress(ImportError):
        from comfy_extras.nodes_perpneg import PerpNegGuider

        found["PerpNegGuider"] = "Flux", lambda model: first(PerpNegGuider, model, one, two, three, CFG, 1.5)
    with suppress(ImportError):
        from comfy_extras.nodes_lt import LTXVDualCFGGuider

        video = prompts("LTX-AV", 1, 2)
        found["LTXVDualCFGGuider"] = "LTX-AV", lambda model: first(LTXVDualCFGGuider, model, *video, 2.0, 4.0)
    if hasattr(nodes, "DualModelGuider"):
        other = build(FAMILIES["Flux"])
        found["DualModelGuider"] = "Flux", lambda model: first(nodes.DualModelGuider, model, one, CFG, other, two)
    return found


def sources(patcher) -> dict[str, tuple[Any, Any]]:
    """SAMPLER and SIGMAS of several nodes."""
    import comfy.samplers

    nodes = custom()
    schedule = first(nodes.BasicScheduler, patcher, "beta", STEPS, 0.7)
    split = nodes.SplitSigmas.execute(first(nodes.BasicScheduler, patcher, "simple", 6, 1.0), 3).args
    return {
        "img2img": (comfy.samplers.sampler_object("dpmpp_2m"), schedule),
        "high": (comfy.samplers.ksampler("euler_ancestral", {"eta": 0.5, "s_noise": 0.9}), split[0]),
        "manual": (comfy.samplers.sampler_object("lcm"), torch.tensor([1.0, 0.6, 0.2, 0.0])),
    }


def guider_runs(host: Host) -> dict[str, Any]:
    """Each guider with each source of sigmas: the node's runs are SamplerCustomAdvanced's, and the guider stays."""
    nodes, equal, untouched = custom(), {}, {}
    for name, (family, make) in guiders(host).items():
        watched = Watched.of(build(FAMILIES[family]))
        empty = empty_latent(FAMILIES[family])
        given = {"samples": empty + 0.3}
        for source, (sampler, sigmas) in sources(watched.patcher).items():
            guider = make(watched.patcher)
            before = dict(vars(guider)), {key: list(conds) for key, conds in guider.original_conds.items()}
            noise, latent = first(nodes.RandomNoise, SEED), given if source == "img2img" else {"samples": empty}
            some = {"samples": 1} if source == "high" else {}  # few of all: sampled twice
            calibrated(host, guider=guider, sampler=sampler, sigmas=sigmas, noise=noise, latent_image=latent, **some)
            ours = watched.take()
            after = dict(vars(guider)), {key: list(conds) for key, conds in guider.original_conds.items()}
            untouched[f"{name}, {source}"] = before[0].keys() == after[0].keys() and all(
                before[0][key] is after[0][key] for key in before[0]
            ) and before[1] == after[1]  # fmt: skip
            nodes.SamplerCustomAdvanced.execute(noise, make(watched.patcher), sampler, sigmas, latent)
            equal[f"{name}, {source}"] = same(watched.take(), ours, passes=1 + len(some))
    return {"equal": equal, "untouched": untouched}


def stock_nodes(host: Host) -> dict[str, bool]:
    """KSampler with denoise and a mask, parts of KSampler (Advanced), SamplerCustom; all of two images."""
    from nodes import KSampler, KSamplerAdvanced

    watched, nodes = Watched.of(build(FAMILIES["SDXL"])), custom()
    (positive, negative), found = prompts("SDXL", 1, 2), {}
    mask = torch.zeros(1, 16, 16)
    mask[..., 8:] = 1
    image = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    latent = {"samples": image, "noise_mask": mask, "batch_index": [5, 7]}
    wires = {"positive": positive, "negative": negative, "latent_image": latent, "calibration_seed": SEED}
    two = {"trajectories": 2, "batch_size": 2, "samples": 1}

    def compare(name: str, stock: Callable[[], Any], **inputs) -> Any:
        out = stock()
        expected = watched.take()
        calibrated(host, watched.patcher, **{**wires, **two, **inputs})
        found[name] = same(expected, watched.take(), passes=2)
        return out

    def advanced(first_step: int, last: int, add: bool, leftover: bool, latent) -> Callable[[], Any]:
        switch = {True: "enable", False: "disable"}
        return lambda: KSamplerAdvanced().sample(
            watched.patcher, switch[add], SEED, 6, CFG, "euler", "normal", positive, negative, latent, first_step, last,
            switch[leftover],
        )[0]  # fmt: skip

    compare(
        "KSampler",
        lambda: KSampler().sample(
            watched.patcher, SEED, STEPS, CFG, "dpm_2", "karras", positive, negative, latent, denoise=0.6
        ),
        sampler_name="dpm_2", scheduler="karras", denoise=0.6,
    )  # fmt: skip
    empty, settings = {"samples": torch.zeros(2, 4, 16, 16)}, {"steps": 6, "scheduler": "normal"}
    half = compare(
        "first half", advanced(0, 3, True, True, empty), **settings, latent_image=empty, end_at_step=3,
        return_with_leftover_noise=True,
    )  # fmt: skip
    compare(
        "second half", advanced(3, 10000, False, False, half), **settings, latent_image=half, start_at_step=3,
        add_noise=False,
    )  # fmt: skip
    compare("without leftover noise", advanced(1, 3, True, False, latent), **settings, start_at_step=1, end_at_step=3)
    sigmas = first(nodes.KarrasScheduler, STEPS, 10.0, 0.05, 7.0)
    sampler = first(nodes.SamplerDPMPP_2M_SDE, "midpoint", 0.4, 0.9, "cpu")
    for add in (True, False):
        compare(
            f"SamplerCustom, {add}",
            lambda add=add: nodes.SamplerCustom.execute(
                watched.patcher, add, SEED, CFG, positive, negative, sampler, sigmas, latent
            ),
            sampler=sampler, sigmas=sigmas, add_noise=add,
        )  # fmt: skip
    return found


def notes(host: Host) -> dict[str, Any]:
    """What a calibration with a guider and sigmas says about its run."""
    model, nodes = build(FAMILIES["Flux"]), custom()
    sampler, sigmas = sources(model)["manual"]
    made = calibrated(
        host, guider=guiders(host)["DualCFGGuider"][1](model), sampler=sampler, sigmas=sigmas,
        noise=first(nodes.RandomNoise, SEED), latent_image={"samples": empty_latent(FAMILIES["Flux"])},
    )  # fmt: skip
    kept = ("sampler", "scheduler", "steps", "cfg", "sigmas", "sampler_function", "trajectories", "prompts")
    return {key: made.notes[key] for key in kept}


def refused(host: Host) -> dict[str, str]:
    """What does not go together, in one sentence, before the model is called."""
    nodes, model = custom(), build(FAMILIES["Flux"])
    calls: list[int] = []
    watched = model.clone()
    watched.add_wrapper_with_key("predict_noise", "count", lambda executor, *args: calls.append(1) or executor(*args))
    (one, two), empty = prompts("Flux", 1, 2), {"samples": empty_latent(FAMILIES["Flux"])}
    guider = first(nodes.CFGGuider, watched, one, two, CFG)
    sigmas = first(nodes.BasicScheduler, watched, "simple", STEPS, 1.0)
    wires = {"positive": one, "negative": two, "latent_image": empty}

    class Stranger:
        """A guider of another pack that samples in a way of its own."""

        def __init__(self, model_patcher):
            self.model_patcher = model_patcher

        def sample(self, noise, latent_image, *args, **kwargs):
            return latent_image

    class Closed(Stranger):
        model_patcher = property(lambda self: watched)

        def __init__(self):
            pass

    def said(model=None, **inputs) -> str:
        calls.clear()
        try:
            calibrated(host, model, **inputs)
        except ValueError as error:
            return f"{error} ({len(calls)} calls)"
        return "nothing was refused"

    return {
        "nothing wired": said(latent_image=empty),
        "no latent": said(guider=guider),
        "another model": said(build(FAMILIES["SDXL"]), guider=guider, latent_image=empty),
        "same model": said(watched.clone(), guider=guider, latent_image=empty),
        "part of sigmas": said(watched, **wires, sigmas=sigmas, start_at_step=1),
        "leftover of sigmas": said(watched, **wires, sigmas=sigmas, return_with_leftover_noise=True),
        "noise without noise": said(watched, **wires, noise=first(nodes.RandomNoise, SEED), add_noise=False),
        "no step": said(watched, **wires, start_at_step=STEPS),
        "no step of sigmas": said(watched, **wires, sigmas=sigmas[:1]),
        "no model": said(guider=object(), latent_image=empty),
        "stranger": said(guider=Stranger(watched), latent_image=empty),
        "closed": said(guider=Closed(), latent_image=empty),
    }


def shown(host: Host, node_id: str):
    """The node as a server runs it, and the texts that it shows."""
    texts: list[str] = []

    class PromptServer:
        instance = SimpleNamespace(client_id="1", send_progress_text=lambda text, node, sid: texts.append(text))

    sys.modules["server"] = SimpleNamespace(PromptServer=PromptServer)  # type: ignore[assignment]
    node = host.node(node_id)
    return type(node.__name__, (node,), {"hidden": SimpleNamespace(unique_id="7")}), texts


def more_prompts(family: str, lengths: tuple[int, ...]) -> list:
    """A CONDITIONING of several entries that differ in length, the last one a batch of two."""
    entries = []
    for number, length in enumerate(lengths):
        ((context, options),) = conditioning_of(FAMILIES[family], 10 + number)
        context = context[:, :1].repeat(1, length, 1)
        last = number == len(lengths) - 1
        entries.append([torch.cat([context, context + 1]) if last else context, options])
    return entries


def seen_prompts(host: Host) -> dict[str, Any]:
    """Which prompts the images of a calibration have, told apart by their first token: one positive, three entries."""
    model, (positive, negative) = build(FAMILIES["Wan 2.1"]), prompts("Wan 2.1", 1, 2)
    further = more_prompts("Wan 2.1", (5, 9, 7))
    (positive_context, _), names = positive[0], {}
    names[float(positive_context[0, 0].sum())] = "positive"
    for number, (context, _) in enumerate(further):
        names |= {float(row[0].sum()): f"entry {number}, row {i}" for i, row in enumerate(context)}
    seen: dict[str, int] = {}

    def watch(executor, x, t, c_concat, c_crossattn, control, transformer_options, **kwargs):
        for row, kind in zip(c_crossattn, transformer_options["cond_or_uncond"] * len(x)):
            if kind == 0:
                name = names[float(row[0].sum())]
                seen[name] = seen.get(name, 0) + 1
        return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)

    watched = model.clone()
    watched.add_wrapper_with_key("apply_model", "watch", watch)
    node, texts = shown(host, "QandC_TAPCalibrate")
    inputs = {"positive": positive, "negative": negative, "latent_image": {"samples": torch.zeros(1, 16, 1, 8, 8)}}
    made = node.execute(
        model=watched, trajectories=24, samples=20, steps=2, cfg=1.0, sampler_name="euler", scheduler="simple",
        batch_size=3, selection="stratified", held_out=8, hessians=False, filename_prefix="prompts", prompts=further,
        **inputs,
    ).args[0]  # fmt: skip
    held_out = {names[float(call.conditions["c_crossattn"][0, 0].sum())] for call in made.held_out}
    return {"seen": seen, "held out": sorted(held_out), "notes": [made.notes["prompts"], made.notes["trajectories"]],
            "texts": texts}  # fmt: skip


def layers_differ(found, expected) -> list[str]:
    """Layers whose statistics are not the same bit for bit."""

    def alike(a, b) -> bool:
        return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b

    return [
        name
        for name, layer in found.statistics.items()
        if not layer.count or not all(alike(value, getattr(expected.statistics[name], key)) for key, value in
                                      vars(layer).items())
    ]  # fmt: skip


def failing_above(patcher, images: int, after: int = 0):
    """The MODEL, out of memory at every call with more images than that, from a number of calls on."""
    calls = 0

    def wrapper(executor, x, *args, **kwargs):
        nonlocal calls
        calls += 1
        options = args[4] if len(args) > 4 else kwargs["transformer_options"]
        if calls > after and len(x) // len(options["cond_or_uncond"]) > images:
            raise torch.OutOfMemoryError("not enough for so many")
        return executor(x, *args, **kwargs)

    made = patcher.clone()
    made.add_wrapper_with_key("apply_model", "memory", wrapper)
    return made


def out_of_memory(host: Host) -> dict[str, Any]:
    """The node on a model that takes two images at most: from the start, from the second pass on; on one of none."""
    model, (positive, negative) = build(FAMILIES["SDXL"]), prompts("SDXL", 1, 2)
    node, texts = shown(host, "QandC_TAPCalibrate")
    empty = {"samples": torch.zeros(1, 4, 16, 16)}

    def made(patcher, batch: int):
        texts.clear()
        return node.execute(
            model=patcher, trajectories=9, samples=6, steps=3, cfg=CFG, sampler_name="euler_ancestral",
            scheduler="normal", batch_size=batch, selection="tap", clusters=3, filename_prefix=f"memory{len(texts)}",
            positive=positive, negative=negative, latent_image=empty,
        ).args[0]  # fmt: skip

    small, found = made(model, 2), {}
    for name, after in {"at once": 0, "in the second pass": 3 * 2 + 1}.items():
        big = made(failing_above(model, 2, after), 8)
        found[name] = [layers_differ(big, small), big.notes["batch_size"], texts[-1]]
    try:
        made(failing_above(model, 0), 4)
    except torch.OutOfMemoryError as error:
        found["one image"] = str(error)
    folder = host.base / "output" / "qandc"
    return {**found, "partial": [path.name for path in folder.iterdir() if path.suffix != ".safetensors"]}


def vp(x: torch.Tensor, sigma, flow: bool) -> torch.Tensor:
    return x if flow else x / (1 + sigma**2) ** 0.5


def channels_of(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(0, 1).flatten(1)


def one_step(x, denoised, sigma, following, noise):
    """Euler, or DDPM where noise is given: x = x0 + sigma eps (or (1 - sigma) x0 + sigma eps), written out."""
    if noise is None:
        return x + (x - denoised) / sigma * (following - sigma)
    eps = (x - denoised) / sigma  # the posterior of q(x_s | x_t, x0) in variance-exploding units
    mean = denoised + eps * following**2 / sigma
    return mean + following * (1 - (following / sigma) ** 2) ** 0.5 * noise if following > 0 else denoised


def by_hand(fit: dict[str, Any], flow: bool, noisy: bool, found: dict[str, Any]):
    """A sampler that fits and corrects by Eq. 9 and 10 on x itself: `fit` has what the reference's run left."""

    def sampler(model, x, sigmas, extra_args=None, callback=None, disable=None):
        draw = torch.Generator().manual_seed(extra_args["seed"] + 1)
        found["given"], found["factors"] = [], []
        for i in range(len(sigmas) - 1):
            scale = vp(torch.ones(()), sigmas[i], flow)
            if fit.get("given") is not None and i > 0:
                reference, ours = channels_of(fit["given"][i].double()), channels_of((x * scale).double())
                factor = reference.std(1) / ours.std(1)
                mean = ours.mean(1).view(1, -1, *[1] * (x.ndim - 2)).to(x)
                k = factor.view_as(mean).to(x)
                x = (mean + k * (x * scale - mean)) / scale
                found["factors"].append(factor)
            found["given"].append((x * scale).clone())
            denoised = model(x, sigmas[i] * x.new_ones(len(x)), **extra_args)
            noise = torch.randn(x.shape, generator=draw) if noisy and sigmas[i + 1] > 0 else None
            if noisy and noise is None:
                x = denoised
            else:
                x = one_step(x, denoised, sigmas[i], sigmas[i + 1], noise)
        return x

    sampler.__name__ = "sample_ddpm" if noisy else "sample_euler"  # a cache goes by what a sampler is known to do
    return sampler


def compensated_guiders(host: Host) -> dict[str, Any]:
    """Fit and corrected run through stock nodes, against a loop by hand that corrects x itself."""
    import comfy.samplers

    nodes, found = custom(), {}
    one, two, three = prompts("Flux", 1, 2, 3)
    other, nothing = prompts("SDXL", 1, 2)
    image = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))

    def dual(model):
        return first(nodes.DualCFGGuider, model, one, two, three, 2.0, 1.5, "regular")

    def single(model):
        return first(nodes.CFGGuider, model, other, nothing, CFG)

    empty = torch.zeros(2, 16, 8, 8)
    cases = {
        "flow, two guidances": ("Flux", dual, empty, [1.0, 0.8, 0.5, 0.3, 0.0], True),
        "flow, leftover noise": ("Flux", dual, empty, [0.9, 0.7, 0.4, 0.2], True),
        "eps": ("SDXL", single, 0 * image, [12.0, 6.0, 2.0, 0.7, 0.2, 0.0], True),
        "eps, second half": ("SDXL", single, 3 * image, [3.0, 1.5, 0.6, 0.2, 0.0], False),
        "ddpm, leftover noise": ("SDXL", single, 0 * image, [12.0, 6.0, 2.0, 0.7, 0.3], True),
    }
    for name, (family, make, samples, levels, adds) in cases.items():
        model, flow, noisy = build(FAMILIES[family]), family == "Flux", name.startswith("ddpm")
        fast = cached(host, model, 2, "whole prediction")
        noise = first(nodes.RandomNoise, SEED) if adds else first(nodes.DisableNoise)
        sigmas, latent = torch.tensor(levels), {"samples": samples}
        sampler = comfy.samplers.sampler_object("ddpm" if noisy else "euler")
        guider = make(build(FAMILIES[family]))
        state = dict(vars(guider))
        node, texts = shown(host, "QandC_VarianceCompensate")
        corrected = node.execute(
            fast, model, "new", 2, 20, 8.0, "heun", "karras", 1, "variance_match", 0.0, 1.0, f"by_hand_{len(found)}",
            latent_image=latent, guider=guider, sampler=sampler, sigmas=sigmas, noise=noise,
        ).args[0]  # fmt: skip
        variance = saved(host, f"by_hand_{len(found)}").variance

        def run(patcher, sampler, make=make, noise=noise, sigmas=sigmas, latent=latent) -> torch.Tensor:
            return nodes.SamplerCustomAdvanced.execute(noise, make(patcher), sampler, sigmas, latent).args[0]["samples"]

        ours, reference, hand = run(corrected, sampler), {}, {}
        run(model, comfy.samplers.KSAMPLER(by_hand({}, flow, noisy, reference)))
        wanted = run(fast, comfy.samplers.KSAMPLER(by_hand(reference, flow, noisy, hand)))
        found[name] = {
            "factors": relative(variance.factor[1:], torch.stack(hand["factors"])),
            "result": relative(ours, wanted),
            "effect": relative(run(fast, sampler), wanted),
            "guider stays": all(vars(guider)[key] is value for key, value in state.items()),
            "text": texts[-1],
        }
    return found


def compensated_batches(host: Host) -> dict[str, Any]:
    """Of several prompts in several runs, and out of memory: channels deviate as the reference's over all of them."""
    node, texts = shown(host, "QandC_VarianceCompensate")
    model, (positive, negative) = build(FAMILIES["Wan 2.1"]), prompts("Wan 2.1", 1, 2)
    fast = cached(host, model, 2, "whole prediction")
    further = more_prompts("Wan 2.1", (5, 9))
    settings_of, sampling = host.module("nodes.comfyui.settings"), host.module("nodes.comfyui.sampling")
    latent = {"samples": torch.zeros(1, 16, 1, 8, 8)}

    def fit(fast, prefix: str):
        made = node.execute(
            fast, model, "new", 8, 5, CFG, "euler", "simple", 31, "variance_match", 0.0, 1.0, prefix, positive,
            negative, latent, prompts=further,
        ).args[0]  # fmt: skip
        return made, saved(host, prefix)

    def given(patcher, batch_size: int) -> list[torch.Tensor]:
        """What the model is given at each step, of all images."""
        plan = host.module("qandc_core.calibration.choice").CalibrationConfig(
            8, batch_size, seed=31, held_out=0, prompts=3, rows=2
        )
        settings = settings_of.Settings(positive, negative, 5, CFG, "euler", "simple", prompts=further)
        steps: list[list[torch.Tensor]] = [[] for _ in range(5)]
        for batch in plan.batches():
            watched = Watched.of(patcher)
            images = settings_of.images_of(latent, range(batch.size))
            sampling.sample_new(
                watched.patcher, settings, images, batch.seed, lambda *_: None, batch.first, batch.prompt
            )
            for step, (x, _) in zip(steps, watched.given):
                step.append(x)
        return [torch.cat(step) for step in steps]

    def worst(patcher, batch_size: int) -> float:
        pairs = zip(given(model, batch_size), given(patcher, batch_size))
        return max(float((channels_of(b).std(1) / channels_of(a).std(1) - 1).abs().max()) for a, b in pairs)

    whole, made = fit(fast, "joint")
    smaller, halved = fit(failing_above(fast, 1), "halved")
    one, factors = fit(failing_above(fast, 1), "again")
    return {
        "deviation": worst(whole, 64), "before": worst(fast, 64), "halved": worst(smaller, 1),
        "batches": [made.notes["batch_size"], halved.notes["batch_size"]],
        "prompts": made.notes["prompts"], "texts": [text for text in texts if "saved" in text],
        "same": torch.equal(factors.variance.factor, halved.variance.factor),
        "differ": not torch.equal(made.variance.factor, halved.variance.factor),
    }  # fmt: skip


def digests(host: Host) -> dict[str, Any]:
    """Of equal inputs that are made anew, and of such as differ in one thing each."""
    nodes, run = custom(), host.module("nodes.comfyui.calibrate.run")
    settings, made = host.module("nodes.comfyui.settings"), guiders(host)
    model = build(FAMILIES["Flux"])
    one, two, three = prompts("Flux", 1, 2, 3)
    plan = run.CalibrationConfig(1, 1)

    def digest(guider=None, latent=0.0, **inputs) -> str:
        patcher = model if guider is None else settings.model_of(guider)
        given = {"steps": 6, "cfg": CFG, "sampler_name": "euler", "scheduler": "simple", **inputs}
        wired = settings.Settings(one, two, guider=guider, **given)
        found = run.digest_of(patcher, wired, {"samples": torch.full((1, 16, 8, 8), latent)}, plan)
        assert found.known, found.opaque
        return found.hex

    def cfg_guider(cfg: float, positive=one):
        return first(nodes.CFGGuider, model, positive, two, cfg)

    def sampler(eta: float):
        return first(nodes.SamplerEulerAncestral, eta, 1.0)

    import comfy.samplers

    variants: dict[str, Callable[[], str]] = {
        "plain": digest,
        "latent": lambda: digest(latent=0.1),
        "start": lambda: digest(start_at_step=1),
        "end": lambda: digest(end_at_step=3),
        "leftover": lambda: digest(end_at_step=3, return_with_leftover_noise=True),
        "no noise": lambda: digest(add_noise=False),
        "denoise": lambda: digest(denoise=0.5),
        "prompts": lambda: digest(prompts=[*three, *two]),
        "other prompts": lambda: digest(prompts=[*two, *three]),
        **{f"sigmas {top}": lambda top=top: digest(sigmas=torch.tensor([top, 0.5, 0.0])) for top in (0.9, 1.0)},
        **{f"eta {eta}": lambda eta=eta: digest(sampler=sampler(eta)) for eta in (0.4, 0.5)},
        **{f"order {n}": lambda n=n: digest(sampler=comfy.samplers.ksampler("lms", {"order": n})) for n in (2, 3)},
        **{f"noise {seed}": lambda seed=seed: digest(noise=first(nodes.RandomNoise, seed)) for seed in (1, 2)},
        "empty noise": lambda: digest(noise=first(nodes.DisableNoise)),
        **{f"cfg {cfg}": lambda cfg=cfg: digest(cfg_guider(cfg)) for cfg in (2.0, 2.1)},
        "guider's prompt": lambda: digest(cfg_guider(2.0, three)),
        **{name: lambda make=make: digest(make(model)) for name, (family, make) in made.items() if family == "Flux"},
    }
    del variants["CFGGuider"]  # of the same cfg and prompts as another guider, it is none
    found = {name: make() for name, make in variants.items()}
    guider = cfg_guider(2.0)
    (sampler_used, sigmas), noise = sources(model)["manual"], first(nodes.RandomNoise, 1)
    latent = {"samples": empty_latent(FAMILIES["Flux"])}
    nodes.SamplerCustomAdvanced.execute(noise, guider, sampler_used, sigmas, latent)
    unequal = [name for name, make in variants.items() if make() != found[name]]
    return {
        "unequal": unequal + ([] if digest(guider) == found["cfg 2.0"] else ["used before"]),
        "different": len(set(found.values())), "of": len(found),
    }  # fmt: skip


CALLS = {"left": -1, "made": 0}  # no part of a function, which the digest of the inputs takes apart


def counted(executor, *args):
    import comfy.model_management as mm

    CALLS["made"], CALLS["left"] = CALLS["made"] + 1, CALLS["left"] - 1
    if CALLS["left"] == 0:
        mm.interrupt_current_processing()
    return executor(*args)


def resumed(host: Host) -> dict[str, Any]:
    """Cancelled in the second pass with a guider and prompts; then with the same made anew, and with another cfg."""
    import comfy.model_management as mm

    nodes, model = custom(), build(FAMILIES["Flux"])
    one, two, three = prompts("Flux", 1, 2, 3)
    sampler, sigmas = sources(model)["high"]
    calls, watched = CALLS, model.clone()
    watched.add_wrapper_with_key("predict_noise", "stop", counted)

    def made(cfg: float = 2.0, prefix: str = "resumed"):
        calls["made"] = 0
        return host.node("QandC_TAPCalibrate").execute(
            trajectories=6, samples=7, batch_size=1, selection="random", filename_prefix=prefix, sampler=sampler,
            sigmas=sigmas, noise=first(nodes.RandomNoise, SEED), prompts=three, held_out=2,
            guider=first(nodes.CFGGuider, watched, one, two, cfg), latent_image={"samples": torch.zeros(1, 16, 8, 8)},
        ).args[0]  # fmt: skip

    expected = made(prefix="expected")
    whole = calls["made"]
    calls["left"] = whole - 1
    with suppress(mm.InterruptProcessingException):
        made()
    other = made(cfg=2.5)
    from_the_start, found = calls["made"], made()
    return {"differing": layers_differ(found, expected), "calls": [whole, from_the_start, calls["made"]],
            "other": len(layers_differ(other, expected)) > 0}  # fmt: skip


def defaults(host: Host) -> dict[str, Any]:
    """What is left to the model, on several families; and the names of the table that this version has."""
    import comfy.samplers
    import comfy.supported_models
    from sampling import demo

    table = host.module("nodes.comfyui.defaults")
    settings = host.module("nodes.comfyui.settings").Settings(None, None, 0, -1.0, "auto", "auto")
    found = {}
    for name in ("Flux", "SDXL", "Wan 2.1", "SD 1.5", "Chroma"):
        patcher = build(FAMILIES[name])
        chosen = table.completed(settings, patcher)
        empty = {"samples": empty_latent(FAMILIES[name])}
        large = {"samples": torch.zeros(1, 16, 21, 128, 128)}
        found[name] = [chosen.steps, chosen.cfg, chosen.sampler_name, chosen.scheduler]
        assert table.images_at_once(patcher, empty) == 16 and table.images_at_once(patcher, large) == 1
    chosen = table.completed(settings, demo(host))
    found["DiT"] = [chosen.steps, chosen.cfg, chosen.sampler_name, chosen.scheduler]
    given = host.module("nodes.comfyui.settings").Settings(None, None, 7, 0.0, "heun", "karras")
    suited = [*table.FAMILIES.values(), table.DIT, table.FLOW, table.NOISE_ADDED]
    return {
        "found": found, "given": table.completed(given, demo(host)) == given,
        "unknown": [name for name in table.FAMILIES if not hasattr(comfy.supported_models, name)],
        "samplers": all(s.sampler_name in comfy.samplers.SAMPLER_NAMES for s in suited),
        "schedulers": all(s.scheduler in comfy.samplers.SCHEDULER_NAMES for s in suited),
        "pairs": [table.pairs_of({"samples": torch.zeros(1, 4, side, side)}) for side in (16, 32, 64, 128, 256)],
    }  # fmt: skip


if __name__ == "__main__":
    main({
        "guiders": guider_runs,
        "stock nodes": stock_nodes,
        "notes": notes,
        "refused": refused,
        "prompts": seen_prompts,
        "memory": out_of_memory,
        "compensated": compensated_guiders,
        "batches": compensated_batches,
        "digests": digests,
        "resumed": resumed,
        "defaults": defaults,
    })  # fmt: skip
