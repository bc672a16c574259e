from __future__ import annotations

import argparse

from torch import Tensor

from .common import load, log, sampling


def run(args: argparse.Namespace) -> None:
    from ..caching.attach import apply_cache_to_dit
    from ..calibration.file import load_calibration
    from ..evaluation.figure import to_pil
    from ..sampling.generate import generate

    model, config = load(args), sampling(args)
    calibration = load_calibration(args.calibration) if args.calibration else None
    if calibration is not None:
        calibration.check_model(model)
    apply_cache_to_dit(model, args.cache_interval, steps=calibration.schedule if calibration else None)
    compensation = calibration.variance if calibration else None
    x, report = generate(
        model, args.classes, config.steps, config.cfg_scale, config.sampler, args.seed,
        compensation=compensation, progress=True,
    )  # fmt: skip
    images = decode(x, args.vae)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    to_pil(images.cpu(), max(128, images.shape[-1])).save(args.out)
    log(report.summary())
    print(args.out)


def decode(x: Tensor, vae: str | None) -> Tensor:
    if x.shape[1] == 3:
        return x
    if vae is None:
        raise ValueError(
            f"This model samples latents with {x.shape[1]} channels; give the VAE that decodes them: --vae."
        )
    from diffusers import AutoencoderKL

    decoder = AutoencoderKL.from_pretrained(vae).to(x.device).eval()
    return decoder.decode(x / decoder.config.scaling_factor).sample
