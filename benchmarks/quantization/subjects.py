"""The two trained models, their calibrations and held-out inputs, for the programs that run in ComfyUI's Python."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import fidelity
import torch

if TYPE_CHECKING:
    from host import Host

INTERVAL = 3
SAMPLES, TRAJECTORIES = 128, 32
HELD_OUT_SEED, HELD_OUT_RUNS, HELD_OUT = 9000, 4, 8  # calls of the last image of each run


@dataclass
class Study:
    """A model with its cache, and inputs that no calibration of it has seen."""

    host: Host
    subject: fidelity.Subject
    cached: Any
    held_out_runs: int = HELD_OUT_RUNS

    def __post_init__(self) -> None:
        self.layers, self.calls = self.held_out()

    def calibration(self, patcher, seed: int, **plan):
        """A Calibration of samples of other noise for every seed."""
        module, sampling = (self.host.module(f"nodes.comfyui.{name}") for name in ("calibrate.run", "sampling"))
        s = self.subject
        settings = sampling.Settings(s.positive, s.negative, s.steps, s.cfg, s.sampler, s.scheduler)
        wanted = {"trajectories": TRAJECTORIES, "samples": SAMPLES, "hessians": True, "held_out": 0, **plan}
        chosen = module.CalibrationConfig(seed=seed, batch_size=fidelity.IMAGES, **wanted)
        return module.calibrate(patcher, settings, {"samples": s.latent[:1]}, chosen)

    def held_out(self) -> tuple[dict[str, torch.Tensor], tuple]:
        """Inputs of every layer, and calls of the model, of images with other labels."""
        found = [
            self.calibration(self.cached, HELD_OUT_SEED + 10 * run, trajectories=run + 2, held_out=HELD_OUT)
            for run in range(self.held_out_runs)
        ]
        names = found[0].statistics
        layers = {name: torch.cat([part.statistics[name].held_out for part in found]) for name in names}
        return layers, tuple(call for part in found for call in part.held_out)

    def judged(self, calibration):
        """The calibration with the held-out inputs that all are judged by."""
        statistics = {
            name: replace(layer, held_out=self.layers[name]) for name, layer in calibration.statistics.items()
        }
        return replace(calibration, statistics=statistics, held_out=self.calls)


def studies(host: Host, flow: str, only: str = "", **held_out) -> dict[str, Study]:
    import comfy.utils

    comfy.utils.PROGRESS_BAR_ENABLED = False
    subjects = {
        "built-in, ddim, 50 steps": lambda: fidelity.built_in(host, "ddim"),
        "flow, euler, 30 steps": lambda: fidelity.flow(host, flow, "euler", 30),
    }
    found = {name: make() for name, make in subjects.items() if only in name}
    return {
        name: Study(host, subject, fidelity.ours(host, subject.patcher, "automatic", 1, INTERVAL), **held_out)
        for name, subject in found.items()
    }


def over_seeds(rows: Callable[[Study, int], list[dict[str, Any]]], shared: dict[str, Any], **held_out) -> None:
    """Prints what `rows` finds of a model for each of the seeds, until the time is up.

    argv: checkout, base directory with the pack, options as JSON: subject, seeds, images, seconds, flow.
    """
    from host import Host

    checkout, base, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    host, fidelity.IMAGES = Host(checkout, base), options["images"]
    begun, runs = time.perf_counter(), []
    with torch.inference_mode():
        study = studies(host, options["flow"], only=options["subject"], **held_out)[options["subject"]]
        for seed in options["seeds"]:
            started = time.perf_counter()
            runs.append({"subject": options["subject"], "seed": seed, "rows": rows(study, seed)})
            print(f"{options['subject']}, seed {seed}", file=sys.stderr, flush=True)
            now = time.perf_counter()
            if 2 * now - started - begun > options["seconds"]:
                break
    print(
        "RESULTS "
        + json.dumps({"calls": len(study.calls), "kitchen": version("comfy-kitchen"), **shared, "runs": runs})
    )
