"""Times a step of a model: computed, reused from the cache, and both again with quantized layers."""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ..diffusion.classes import balanced_labels
from ..diffusion.process import SamplingConfig
from ..distributed import Distributed
from ..files import save_text
from ..models.dit import DiT
from .common import add_guidance, add_model, add_number, at_least, load, log, sampling

SUMMARY = "measure computed, reused and quantized steps of a model on this machine"
PLAIN, QUANTIZED = "as loaded", "W8A8"


def add(command: argparse.ArgumentParser) -> None:
    add_model(command)
    add_number(command, "--steps", at_least(2), "steps of a run", 8)
    command.add_argument("--sampler", choices=("ddpm", "ddim"), default="ddim", help="sampler (default ddim)")
    add_guidance(command)
    add_number(command, "--cache-interval", at_least(2), "compute every N-th step", 2)
    add_number(command, "--images", at_least(1), "images at once", 8)
    command.add_argument("--out", type=Path, default=Path("out/bench"), help="folder for the JSON file")


def run(args: argparse.Namespace, process: Distributed) -> None:
    from ..evaluation.experiment import hardware

    model, config = load(args), sampling(args)
    device = model.pos_embed.device
    log(f"bench: {args.images} images, {config.steps} steps of {config.sampler} on {device}")
    labels = balanced_labels(args.images, model.config.num_classes)
    times = measure_step_times(model, labels, config, args.cache_interval)
    result = {
        "command": " ".join(["python -m qandc_core", *args.argv]),
        "hardware": hardware(),
        "images": args.images,
        "guidance": config.cfg_scale,
        "interval": args.cache_interval,
        "times": {name: asdict(found) for name, found in times.items()},
    }
    path = args.out / f"bench-{device.type}.json"
    save_text(json.dumps(result, indent=1), path)
    print("\n".join(in_words(times)))
    print(path)


@dataclass(frozen=True)
class StepTimes:
    """Median seconds of a computed and of a reused step, and the bytes of the linear layers' weights."""

    computed: float
    reused: float
    weight_bytes: int


@torch.inference_mode()
def measure_step_times(
    model: DiT, class_labels: Sequence[int] | Tensor, config: SamplingConfig, interval: int = 2, rounds: int = 3
) -> dict[str, StepTimes]:
    """Both models in turn, so that a slow moment of the machine hits them alike; a first round that is not counted
    compiles and tunes. A model that is quantized already is measured as it is. Raises ValueError where no step reuses.
    """
    from ..caching.attach import apply_cache_to_dit
    from ..models.layers import DIT_SKIP
    from ..quantization.model import linear_weight_bytes, quantize_model, quantized_layers
    from ..sampling.generate import sample_images

    if interval < 2 or config.steps < 2:
        raise ValueError(f"No step is reused with {config.steps} steps and interval {interval}; use 2 or more of both.")
    subjects: dict[str, Any] = {PLAIN: copy.deepcopy(model)}
    if not quantized_layers(model):
        subjects[QUANTIZED] = quantize_model(copy.deepcopy(model), 8, 8, DIT_SKIP)
    seconds: dict[str, dict[bool, list[float]]] = {name: {True: [], False: []} for name in subjects}
    for subject in subjects.values():
        apply_cache_to_dit(subject, interval)
    for number in range(1 + rounds):
        for name, subject in subjects.items():
            _, report = sample_images(subject, class_labels, config)
            for taken, computed in zip(report.seconds, report.computed):
                if number:
                    seconds[name][computed].append(taken)
    return {
        name: StepTimes(median(found[True]), median(found[False]), linear_weight_bytes(subjects[name]))
        for name, found in seconds.items()
    }


def in_words(times: Mapping[str, StepTimes]) -> list[str]:
    plain = times[PLAIN]
    sentences = [sentence("A step", plain)]
    if QUANTIZED in times:
        quantized = times[QUANTIZED]
        sentences.append(sentence(f"In {QUANTIZED} a step", quantized))
        sentences.append(
            f"{QUANTIZED} computes a step {plain.computed / quantized.computed:.2f} times as fast, with linear weights "
            f"of {quantized.weight_bytes / 2**20:.1f} MiB instead of {plain.weight_bytes / 2**20:.1f}."
        )
    return sentences


def sentence(subject: str, times: StepTimes) -> str:
    return (
        f"{subject} takes {1000 * times.computed:.3g} ms computed and {1000 * times.reused:.3g} ms reused "
        f"({100 * times.reused / times.computed:.0f} %)."
    )
