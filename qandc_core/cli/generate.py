from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..caching.policies import CachePolicy, ChosenSteps, Interval, Speedup, StepCount
from ..caching.presets import LEVELS, Preset
from ..calibration.file import Calibration, load_calibration
from ..diffusion.process import SamplingConfig
from ..distributed import Distributed
from ..files import written_whole
from .common import CACHE_INTERVAL, add_model, add_number, add_sampling, at_least, class_id, finite, load, log, sampling

if TYPE_CHECKING:
    from ..sampling.report import RunReport

SUMMARY = "sample images of given classes"


def add(command: argparse.ArgumentParser) -> None:
    add_model(command)
    add_sampling(command)
    add_policy(command)
    command.add_argument("--classes", type=class_id, nargs="+", required=True, help="class ids, one for each image")
    command.add_argument("--seed", type=at_least(0), default=0, help="seed of the noise (default 0)")
    command.add_argument(
        "--calibration", type=Path, help="calibration file; brings its computed steps and variance compensation"
    )
    command.add_argument("--vae", help="folder of a diffusers VAE, for models that sample latents")
    command.add_argument(
        "--fused", action="store_true", help="sample with fuse_dit(): the same pictures, on a GPU from CUDA graphs"
    )
    command.add_argument("--out", type=Path, default=Path("out/images.png"), help="picture to write")


def add_policy(command: argparse.ArgumentParser) -> None:
    """Which steps compute; each of these replaces the steps of a calibration."""
    policies = command.add_mutually_exclusive_group()
    replaces = "; replaces the steps of a calibration"
    interval = f"compute every N-th step, 1 caches nothing{replaces} (default {CACHE_INTERVAL} without them)"
    add_number(policies, "--cache-interval", at_least(1), interval)
    add_number(policies, "--speedup", finite, f"target speedup of the model calls{replaces}", metavar="X")
    add_number(policies, "--computed-steps", at_least(1), f"compute N steps, denser towards the end{replaces}")
    by_sampler = "choose the steps by sampler and number of steps, more where fewer steps are as good"
    policies.add_argument("--preset", choices=LEVELS, help=f"{by_sampler}{replaces}")


def run(args: argparse.Namespace, process: Distributed) -> None:
    from ..evaluation.figure import to_pil

    format = picture_format(args.out)
    images, report = sampled_images(args, process)
    if process.rank:
        return
    picture = to_pil(images, max(128, images.shape[-1]))
    with written_whole(args.out) as temporary:
        picture.save(temporary, format)
    log(report.summary())
    print(args.out)


def sampled_images(args: argparse.Namespace, process: Distributed) -> tuple[Tensor, RunReport]:
    """The images of all processes (N, C, H, W) on the CPU, in the order of the classes, and this one's report."""
    from ..caching.attach import apply_cache_to_dit
    from ..evaluation.judges import decode, load_vae
    from ..fused.dit import fuse_dit
    from ..sampling.generate import sample_images

    asked = asked_policy(args)
    model, config = load(args), sampling(args)
    channels = model.config.in_channels
    if channels != 3 and args.vae is None:
        raise ValueError(f"This model samples latents with {channels} channels; give the VAE that decodes them: --vae.")
    if channels == 3 and args.vae is not None:
        raise ValueError("This model samples images, which no VAE decodes; leave out --vae.")
    vae = load_vae(args.vae, model.pos_embed.device) if args.vae is not None else None
    calibration = load_calibration(args.calibration) if args.calibration else None
    if calibration is not None:
        calibration.check_model(model)
        check_run(calibration, config, asked)
    sampled = fuse_dit(model) if args.fused else model
    apply_cache_to_dit(sampled, asked or found_policy(calibration))
    compensation = calibration.variance if calibration else None
    if len(args.classes) < process.world:
        raise ValueError(f"{len(args.classes)} images cannot be shared by {process.world} processes; start fewer.")
    share = process.shard(len(args.classes))
    x, report = sample_images(
        sampled,
        args.classes[share.start : share.stop],
        config,
        args.seed,
        compensation=compensation,
        first_index=share.start,
        progress=process.rank == 0,
    )
    images = x if vae is None else decode(vae, x)
    if not images.isfinite().all():
        raise ValueError(
            "The images contain values that are not finite; sample with a smaller --cfg, or another model."
        )
    whole = torch.cat(process.gathered(images.cpu()))
    return whole, replace(report, images=len(whole))


def picture_format(path: Path) -> str:
    """Pillow's name of the format that the ending of `path` stands for. Raises ValueError where there is none."""
    from PIL import Image

    format = Image.registered_extensions().get(path.suffix.lower())
    if format not in Image.SAVE:
        raise ValueError(f"--out must name a picture, such as {path.with_suffix('.png')}, got {path}.")
    return format


def asked_policy(args: argparse.Namespace) -> CachePolicy | None:
    """The policy that the options name. Raises ValueError on a number out of range."""
    if args.preset is not None:
        return Preset(level=args.preset)
    if args.speedup is not None:
        return Speedup(args.speedup)
    if args.computed_steps is not None:
        return StepCount(args.computed_steps)
    return None if args.cache_interval is None else Interval(args.cache_interval)


def found_policy(calibration: Calibration | None) -> CachePolicy:
    """The default policy: the steps of the calibration, or else the default interval."""
    if calibration is not None and calibration.schedule is not None:
        return ChosenSteps(frozenset(calibration.schedule))
    return Interval()


def check_run(calibration: Calibration, config: SamplingConfig, asked: CachePolicy | None) -> None:
    """Computed steps and a variance compensation fit the sampler, steps and guidance that they were measured with.

    `asked` None follows the calibration's own steps where it has any. Raises ValueError on another run.
    """
    follows = calibration.schedule is not None and asked is None
    if calibration.variance is None and not follows:
        return
    made, noted = calibration.sampling, calibration.notes.get("cache_interval")
    policy = asked or found_policy(calibration)
    interval = policy.interval if isinstance(policy, Interval) else None
    cached = follows or (calibration.schedule is None and interval is not None and noted in (None, interval))
    sampled = made == config if made is not None else fits_steps(calibration, config.steps)
    if not cached or not sampled:
        fitted = "" if made is None else f"--sampler {made.sampler} --steps {made.steps} --cfg {made.cfg_scale:g} "
        fitted += f"--cache-interval {noted}" if calibration.schedule is None else "without --cache-interval"
        part = "computed steps of this calibration were chosen"
        if calibration.variance is not None:
            part = "variance compensation of this calibration was fitted"
        raise ValueError(f"The {part} for {fitted}; sample with these, or calibrate again.")


def fits_steps(calibration: Calibration, steps: int) -> bool:
    """True if a calibration without sampling settings can be one of `steps` steps."""
    if calibration.distances is not None:
        return len(calibration.distances) == steps
    return calibration.schedule is None or max(calibration.schedule) < steps
