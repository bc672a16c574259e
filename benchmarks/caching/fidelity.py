"""Images of the two small models under every cache against the full run: runs in ComfyUI's Python.

    OMP_NUM_THREADS=1 COMFYUI/.venv/bin/python benchmarks/caching/fidelity.py COMFYUI BASE FLOW

Called by `python -m benchmarks.caching`. BASE is a ComfyUI base directory with the pack in custom_nodes, FLOW
flow_model.safetensors. Writes results/caching.json after each setting and goes on where it stands, so that --seconds
may cut it into pieces, and --jobs share it out over cores.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import flow_model
import packs
import rivals
import shared
import torch

if TYPE_CHECKING:
    from host import Host

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
IMAGES = 16
MOST_PSNR = 150.0  # dB, of equal images


@dataclass
class Subject:
    """A model with the settings that its images are drawn with."""

    patcher: Any
    positive: Any
    negative: Any
    latent: torch.Tensor
    sampler: str
    scheduler: str
    cfg: float
    decode: Callable[[torch.Tensor], torch.Tensor]
    attention: str  # module of the first block: it runs where the network computes
    steps: int = 50

    def sigmas(self) -> torch.Tensor:
        import comfy.samplers

        sampling = self.patcher.get_model_object("model_sampling")
        return comfy.samplers.calculate_sigmas(sampling, self.scheduler, self.steps)

    def images(self, patcher, seed: int, steps: int | None = None, watch=None) -> tuple[torch.Tensor, int]:
        """Images, and how many steps computed."""
        import comfy.sample

        calls: list[int] = []
        attention = patcher.model.diffusion_model.get_submodule(self.attention)  # of a quantized model, its own
        hook = attention.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
        noise = torch.randn(self.latent.shape, generator=torch.Generator().manual_seed(seed))
        try:
            out = comfy.sample.sample(
                patcher, noise, steps or self.steps, self.cfg, self.sampler, self.scheduler, self.positive,
                self.negative, self.latent, disable_pbar=True, seed=seed, callback=watch,
            )  # fmt: skip
        finally:
            hook.remove()
        return self.decode(out), sum(calls) // (2 * IMAGES)


def labels() -> list[int]:
    """Of the images: every third class."""
    return [3 * i % flow_model.CLASSES for i in range(IMAGES)]


def built_in(host: Host, sampler: str) -> Subject:
    """The built-in model at its own guidance."""
    patcher = host.module("nodes.comfyui.model.dit").load_dit_patcher("demo")
    wanted = ",".join(map(str, labels()))
    positive, negative = host.module("nodes.class_label").ClassLabel.execute(wanted, "none").args
    guidance = host.module("nodes.comfyui.defaults").DIT.cfg
    empty = torch.zeros(IMAGES, 3, 32, 32)
    return Subject(patcher, positive, negative, empty, sampler, "normal", guidance, lambda x: x, "blocks.0.attn")


def flow(host: Host, weights: str, sampler: str, steps: int) -> Subject:
    import comfy.model_patcher
    import comfy.supported_models
    from safetensors.torch import load_file

    config = comfy.supported_models.Lumina2(dict(flow_model.CONFIG))
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "")
    model.diffusion_model.load_state_dict({key: value.float() for key, value in load_file(weights).items()})
    cpu = torch.device("cpu")
    none = torch.full((IMAGES,), flow_model.CLASSES)
    patcher = comfy.model_patcher.ModelPatcher(model, cpu, cpu)
    positive, negative = [[flow_model.context(torch.tensor(labels())), {}]], [[flow_model.context(none), {}]]
    empty = torch.zeros(IMAGES, *flow_model.LATENT)

    def decode(latent: torch.Tensor) -> torch.Tensor:
        return flow_model.decode(model.latent_format.process_in(latent))

    return Subject(patcher, positive, negative, empty, sampler, "simple", 1.5, decode, "layers.0.attention", steps)


def models(host: Host, weights: str, sampler: str, steps: int) -> dict[str, Subject]:
    return {"built-in": built_in(host, sampler), "flow": flow(host, weights, sampler, steps)}


def copied_input(patcher):
    """Saves EasyCache from writing into the sampler's tensor, which it does in float32 only."""
    from comfy.patcher_extension import WrappersMP

    clone = patcher.clone()
    clone.add_wrapper_with_key(
        WrappersMP.DIFFUSION_MODEL, "copy", lambda executor, x, *args, **kwargs: executor(x.clone(), *args, **kwargs)
    )
    return clone


def ours(host: Host, patcher, reuse: str, order: int, interval: int = 1, **choices):
    policies = host.module("qandc_core.caching.policies")
    if "distances" in choices:
        choices["distances"] = host.module("qandc_core.caching.runs").StepDistances(choices["distances"])
    kinds = {"num_computed": policies.StepCount, "speedup": policies.Speedup, "max_error": policies.ErrorBudget}
    kind = next((kinds[name] for name in choices if name in kinds), None)
    policy = policies.Interval(interval, order=order) if kind is None else kind(**choices, order=order)
    caching = host.module("nodes.comfyui.cache.attach")
    return caching.apply_cache(patcher, caching.CacheSettings(policy, reuse))


def preset(host: Host, patcher: Any, level: str) -> Any:
    """The model with a preset of Apply Cache."""
    presets, caching = host.module("qandc_core.caching.presets"), host.module("nodes.comfyui.cache.attach")
    return caching.apply_cache(patcher, caching.CacheSettings(presets.Preset(level=level), "automatic"))


def calibrated(host: Host, subject: Subject) -> torch.Tensor:
    """What TAP Calibrate would note of the steps: distances between predictions, on noise of its own."""
    seen: list[torch.Tensor] = []
    subject.images(subject.patcher, seed=1000, watch=lambda step, denoised, x, total: seen.append(denoised.flatten()))
    distances = host.module("qandc_core.calibration.distances").prediction_distances
    return distances(torch.stack(seen), subject.sigmas())


def papers(subject: Subject) -> dict[str, dict[float, Callable]]:
    """Method of another paper -> its setting -> (seed) -> images and calls."""
    T, where = subject.steps, rivals.sites(subject.patcher.model.diffusion_model)

    def run(plan, place, forecaster):
        def images(seed):
            rival = rivals.Rival(plan, place, forecaster)
            with rival.applied(where):
                return subject.images(subject.patcher, seed)[0], rival.calls

        return images

    noted = rivals.Magnitudes()
    run([True] * T, "residual", lambda: noted)(1000)
    series = {
        "TaylorSeer, order 1": lambda: rivals.Taylor(1),
        "TaylorSeer, order 2": lambda: rivals.Taylor(2),
        "HiCache, order 2": lambda: rivals.Hermite(2),
    }
    intervals, growths = (2, 3, 4, 5), (0.0, 0.25, 0.75, 1.5, 3.0)
    found: dict[str, dict[float, Callable]] = {
        "FORA": {n: run(rivals.every(T, n), "branches", rivals.Hold) for n in intervals},
        "MagCache": {
            t: run(rivals.magnitudes(T, noted.ratios, t, most=5), "residual", rivals.Hold)
            for t in (0.02, 0.06, 0.12, 0.24, 0.5)
        },
    }
    for name, forecaster in series.items():
        found[name] = {n: run(rivals.every(T, n, first=2), "branches", forecaster) for n in intervals}
    for name, w in {"Spectrum": 0.5, "Spectrum, regression only": 1.0}.items():
        found[name] = {
            growth: run(rivals.windows(T, growth=growth), "last", lambda w=w: rivals.Chebyshev(T, w=w))
            for growth in growths
        }
    return found


def methods(host: Host, subject: Subject, order: int) -> dict[str, dict[float, Callable]]:
    """Method -> setting -> (seed) -> images and calls; `order` is what Apply Cache uses with the sampler."""
    import comfy_extras.nodes_easycache as core

    T, patcher = subject.steps, subject.patcher
    counts = [round(T / s) for s in (1.5, 2, 2.5, 3, 4)]
    thresholds = (0.002, 0.005, 0.01, 0.02, 0.05, 0.2)

    def run(made):
        return lambda seed: subject.images(made, seed)

    def peer(node, mended=False):
        start = copied_input(patcher) if mended else patcher
        return {t: run(node.execute(start, t, 0.15, 0.95, False).args[0]) for t in thresholds}

    kinds = {"whole prediction": "prediction", "blocks": "blocks"}
    flowing = host.module("nodes.comfyui.wrappers").is_flow(patcher.model)
    if not flowing:
        kinds["attention and MLP"] = "FORA"
    found: dict[str, dict[float, Callable]] = {
        "fewer steps": {n: lambda seed, n=n: subject.images(patcher, seed, n) for n in counts},
        "core EasyCache": peer(core.EasyCacheNode),
        "core LazyCache": peer(core.LazyCacheNode),
        "interval, held": {k: run(ours(host, patcher, "whole prediction", 0, k)) for k in (2, 3, 4)},
    }
    if flowing:
        found["core EasyCache, input copied"] = peer(core.EasyCacheNode, mended=True)
    found |= papers(subject)
    found["Q&C prediction, order 0"] = {
        n: run(ours(host, patcher, "whole prediction", 0, num_computed=n)) for n in counts
    }
    for reuse, name in kinds.items():
        found[f"Q&C {name}, order 1"] = {n: run(ours(host, patcher, reuse, 1, num_computed=n)) for n in counts}
    distances = calibrated(host, subject)
    found["Q&C prediction, calibrated"] = {
        n: run(ours(host, patcher, "whole prediction", order, num_computed=n, distances=distances)) for n in counts
    }
    if order:
        found["Q&C prediction, calibrated, order 2"] = {
            n: run(ours(host, patcher, "whole prediction", 2, num_computed=n, distances=distances)) for n in counts
        }
    found["Q&C presets"] = {level: run(preset(host, patcher, level)) for level in ("safe", "balanced", "fast")}
    found["Q&C error budget"] = {
        e: run(ours(host, patcher, "whole prediction", order, max_error=e)) for e in (0.003, 0.01, 0.02, 0.05, 0.1)
    }
    return found


def relative_l2(images: torch.Tensor, reference: torch.Tensor) -> list[float]:
    return ((images - reference).flatten(1).norm(dim=1) / reference.flatten(1).norm(dim=1)).tolist()


class Measures:
    """How far images are from others, by image: relative L2, PSNR in dB, and a perceptual distance.

    The latter is that of LPIPS (arXiv 1801.03924, Eq. 1) with all its weights 1 and the convolutions of the built-in
    model's judge in the place of AlexNet's: squared differences of features of unit length, mean over the places of a
    layer, summed over the six layers.
    """

    def __init__(self, host: Host):
        self.psnr = host.module("qandc_core.evaluation.metrics").psnr
        judge, _ = host.module("qandc_core.demo.judge").load_judge()
        self.layers = [layer for stage in judge.body[:3] for layer in stage]

    def features(self, images: torch.Tensor) -> list[torch.Tensor]:
        found, x = [], images
        for layer in self.layers:
            x = layer(x)
            if isinstance(layer, torch.nn.ReLU):
                found.append(torch.nn.functional.normalize(x, dim=1))
        return found

    def perceptual(self, images: torch.Tensor, reference: torch.Tensor) -> list[float]:
        pairs = zip(self.features(images), self.features(reference))
        return sum((a - b).square().sum(dim=1).mean(dim=(1, 2)) for a, b in pairs).tolist()

    def __call__(self, images: torch.Tensor, reference: torch.Tensor) -> dict[str, list[float]]:
        found = {
            "errors": relative_l2(images, reference),
            "psnr": self.psnr(images, reference).clamp(max=MOST_PSNR).tolist(),
            "perceptual": self.perceptual(images, reference),
        }
        return {name: [float(f"{value:.4g}") for value in values] for name, values in found.items()}


def seconds_of(run: Callable, seeds: list[int]) -> tuple[float, list]:
    """CPU seconds, which other programs on the machine hardly change."""
    begun = time.process_time()
    results = [run(seed) for seed in seeds]
    return time.process_time() - begun, results


def subjects(host: Host, weights: str) -> dict[str, Callable[[], Subject]]:
    return {
        "built-in, ddim, 50 steps": lambda: built_in(host, "ddim"),
        "built-in, ddpm, 50 steps": lambda: built_in(host, "ddpm"),
        "flow, euler, 50 steps": lambda: flow(host, weights, "euler", 50),
        "flow, euler, 20 steps": lambda: flow(host, weights, "euler", 20),
        "flow, dpmpp_2m, 30 steps": lambda: flow(host, weights, "dpmpp_2m", 30),
    }


def rows_of(name: str, subject: Subject, method: str, settings: dict, full, measures) -> Iterator[dict]:
    """Every setting of a method, after a full run that its time is compared with."""
    seconds, _ = seconds_of(lambda seed: subject.images(subject.patcher, seed), list(full))
    for setting, run in settings.items():
        taken, results = seconds_of(run, list(full))
        row = {"subject": name, "steps": subject.steps, "method": method, "setting": setting}
        row |= {"seconds": round(taken, 4), "full seconds": round(seconds, 4)}
        row["calls"] = [calls for _, calls in results for _ in range(IMAGES)]
        images, reference = torch.cat([r for r, _ in results]), torch.cat([*full.values()])
        yield {**row, **measures(images, reference)}


def row_key(row: dict) -> tuple:
    return row["subject"], row["method"], row["setting"]


def main() -> None:
    parser = shared.options(__doc__ or "", RESULTS / "caching.json")
    parser.add_argument("--seeds", type=int, default=1, help=f"of {IMAGES} images each")
    parser.add_argument("--methods", default="", help="parts of the methods' names")
    parser.add_argument("--packs", default="", help="folders of other packs (packs.py), separated by semicolons")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests" / "comfyui" / "inside"))
    from host import Host

    host = Host(args.comfyui, args.base)
    from comfy.samplers import sampler_object

    declares_noise = host.module("nodes.comfyui.wrappers").declares_noise
    model_run = host.module("nodes.comfyui.cache.run").ModelRun
    watches, measures = model_run.look, Measures(host)
    done = {row_key(row) for row in shared.read(args.out)}
    made = {name: make() for name, make in subjects(host, str(args.flow)).items() if shared.chosen(name, args.only)}
    noisy = {name: declares_noise(sampler_object(subject.sampler)) for name, subject in made.items()}

    def known(name: str) -> dict[str, dict[float, Callable]]:
        found = methods(host, made[name], order=0 if noisy[name] else 1)
        for folder in filter(None, args.packs.split(";") if name.startswith("flow") else ()):
            found |= packs.methods(host, folder, subjects(host, str(args.flow))[name])
        return {method: left(name, method, runs) for method, runs in found.items()}

    def left(name: str, method: str, runs: dict[float, Callable]) -> dict[float, Callable]:
        return {setting: run for setting, run in runs.items() if (name, method, setting) not in done}

    @cache
    def full(name: str) -> dict[int, torch.Tensor]:
        return {seed: made[name].images(made[name].patcher, seed)[0] for seed in range(args.seeds)}

    def work(unit: tuple[str, str]) -> None:
        name, method = unit
        # Measures also the forecasts that Apply Cache ends.
        model_run.look = (lambda self, x: None) if noisy[name] else watches
        for row in rows_of(name, made[name], method, to_do[name][method], full(name), measures):
            shared.keep(args.out, [row], row_key)

    with torch.inference_mode():
        to_do = {name: known(name) for name in made}
        units = [
            (name, method)
            for name, found in to_do.items()
            for method, runs in found.items()
            if runs and shared.chosen(method, args.methods)
        ]
        shared.in_turns(units, work, args.jobs, args.seconds)


if __name__ == "__main__":
    main()
