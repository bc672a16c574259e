"""Who judges the images: the digits classifier for the built-in model, the FID Inception network for ImageNet."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from .metrics import FeatureStatistics


@dataclass(frozen=True)
class Judgement:
    """features (N, F), probabilities (N, classes), and spatial features (N, S) where the judge has them."""

    features: Tensor
    probabilities: Tensor
    spatial: Tensor | None = None


@dataclass(frozen=True)
class Reference:
    """Real images as the judge sees them: statistics, and features (M, F) for precision and recall where known."""

    statistics: FeatureStatistics
    features: Tensor | None = None
    spatial: FeatureStatistics | None = None
    floor_features: Tensor | None = None  # other real images, for the distance of real from real


class Judge(Protocol):
    reference: Reference

    def decode(self, samples: Tensor) -> Tensor: ...

    def __call__(self, images: Tensor) -> Judgement: ...


class DigitsJudge:
    """Features and classes from the shipped classifier; the samples are the images."""

    def __init__(self) -> None:
        from ..demo.classifier import load_classifier

        self.model, real = load_classifier()
        held_out = real["held_out"]
        self.reference = Reference(FeatureStatistics.of(held_out), held_out, None, real["training"])

    def decode(self, samples: Tensor) -> Tensor:
        return samples

    def __call__(self, images: Tensor) -> Judgement:
        from ..demo.classifier import classify

        return Judgement(*classify(self.model, images))


def load_vae(folder: str | Path, device: torch.device) -> Any:
    # diffusers would take a folder that is not there for the name of a model to download.
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"There is no diffusers VAE in {folder}; expected a folder with config.json and weights.")
    from diffusers import AutoencoderKL

    # low_cpu_mem_usage would need accelerate, and diffusers warns where it is missing.
    vae = AutoencoderKL.from_pretrained(folder, local_files_only=True, low_cpu_mem_usage=False)
    return vae.to(device).eval()


@torch.inference_mode()
def decode(vae: Any, samples: Tensor) -> Tensor:
    """Latents (N, C, H, W) to images in [-1, 1], on the CPU."""
    scaled = samples / vae.config.scaling_factor
    return torch.cat([vae.decode(part.to(vae.device)).sample.cpu() for part in scaled.split(8)])


class InceptionJudge:
    """FID, sFID, inception score and precision as the ADM suite defines them, on images decoded by a diffusers VAE."""

    def __init__(self, inception: str | Path, vae: str | Path, reference: str | Path, device: torch.device):
        from .inception import load_inception, preprocess_adm

        self.device = device
        self.model = load_inception(inception, preprocess=preprocess_adm).to(device).eval()
        self.vae = load_vae(vae, device)
        self.reference = self.read_reference(reference)

    def decode(self, samples: Tensor) -> Tensor:
        return decode(self.vae, samples)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Judgement:
        from .inception import to_uint8

        return self.judge_uint8(to_uint8(images))

    def judge_uint8(self, images: Tensor) -> Judgement:
        parts = [self.model(part.to(self.device)) for part in images.split(32)]
        pool, spatial, probabilities = (
            torch.cat([getattr(p, key).cpu() for p in parts]) for key in ("pool", "spatial", "probabilities")
        )
        return Judgement(pool, probabilities, spatial)

    @torch.inference_mode()
    def read_reference(self, path: str | Path) -> Reference:
        """An ADM reference batch: .npz with mu, sigma, mu_s, sigma_s and, for precision and recall, images arr_0."""
        import numpy as np

        if not zipfile.is_zipfile(path):
            raise ValueError(f"There is no complete .npz file {path}; expected an ADM reference batch.")
        data = np.load(path, allow_pickle=False)
        missing = [key for key in ("mu", "sigma", "mu_s", "sigma_s") if key not in data]
        if missing:
            raise ValueError(f"{path} lacks {', '.join(missing)}; expected an ADM reference batch (.npz).")
        width = self.model.fc.in_features
        if data["mu"].shape != (width,):
            raise ValueError(f"{path} has {data['mu'].size} features, the Inception network {width}; they must match.")
        pooled, spatial = (
            FeatureStatistics(2, torch.from_numpy(data[mean]).double(), torch.from_numpy(data[cov]).double())
            for mean, cov in (("mu", "sigma"), ("mu_s", "sigma_s"))
        )
        features = None
        if "arr_0" in data:
            features = self.judge_uint8(torch.from_numpy(data["arr_0"]).permute(0, 3, 1, 2)).features
        return Reference(pooled, features, spatial)
