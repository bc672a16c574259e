from __future__ import annotations

import argparse
from pathlib import Path

from ..caching.policies import CachePolicy, ChosenSteps, Interval
from ..calibration.file import Calibration, load_calibration
from ..diffusion.process import SamplingConfig
from .common import cache_policy, load, log, sampling


def run(args: argparse.Namespace) -> None:
    from ..caching.attach import apply_cache_to_dit
    from ..evaluation.figure import to_pil
    from ..evaluation.judges import decode, load_vae
    from ..fused.dit import fuse_dit
    from ..sampling.generate import generate

    check_picture(args.out)
    policy = cache_policy(args)
    model, config = load(args), sampling(args)
    channels = model.config.in_channels
    if channels != 3 and args.vae is None:
        raise ValueError(f"This model samples latents with {channels} channels; give the VAE that decodes them: --vae.")
    vae = load_vae(args.vae, model.pos_embed.device) if channels != 3 else None
    calibration = load_calibration(args.calibration) if args.calibration else None
    if calibration is not None:
        calibration.check_model(model)
        check_run(calibration, config, policy)
        if calibration.schedule is not None and isinstance(policy, Interval):
            policy = ChosenSteps(frozenset(calibration.schedule))
    sampled = fuse_dit(model) if args.fused else model
    apply_cache_to_dit(sampled, policy)
    compensation = calibration.variance if calibration else None
    x, report = generate(
        sampled, args.classes, config.steps, config.cfg_scale, config.sampler, args.seed,
        compensation=compensation, progress=True,
    )  # fmt: skip
    images = x if vae is None else decode(vae, x)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    to_pil(images.cpu(), max(128, images.shape[-1])).save(args.out)
    log(report.summary())
    print(args.out)


def check_picture(path: Path) -> None:
    from PIL import Image

    if path.suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"--out must name a picture, such as {path.with_suffix('.png')}, got {path}.")


def check_run(calibration: Calibration, config: SamplingConfig, policy: CachePolicy) -> None:
    """A variance compensation fits the sampler and cache that it was measured with, no other."""
    if calibration.variance is None:
        return
    interval = policy.interval if isinstance(policy, Interval) else None
    made, noted = calibration.sampling, calibration.notes.get("cache_interval", interval)
    if interval is None or noted != interval or made not in (None, config):
        fitted = "" if made is None else f"--sampler {made.sampler} --steps {made.steps} --cfg {made.cfg_scale:g} "
        raise ValueError(
            f"The variance compensation of this calibration was fitted for {fitted}--cache-interval {noted}; "
            "sample with these, or calibrate again."
        )
