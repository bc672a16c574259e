"""Who judges the images: a small network for the built-in model, the FID Inception network for ImageNet."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..files import reading
from ..values import check_finite
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


class BuiltInJudge:
    """Features and classes from the shipped network; the samples are the images."""

    def __init__(self) -> None:
        from ..demo.judge import load_judge

        self.model, real = load_judge()
        self.reference = Reference(FeatureStatistics.of(real["reference"]), real["reference"], None, real["floor"])

    def decode(self, samples: Tensor) -> Tensor:
        return samples

    def __call__(self, images: Tensor) -> Judgement:
        from ..demo.judge import classify

        return Judgement(*classify(self.model, images))


def load_vae(folder: str | Path, device: torch.device) -> Any:
    # diffusers would take a folder that is not there for the name of a model to download.
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"There is no diffusers VAE in {folder}; expected a folder with config.json and weights.")
    from diffusers import AutoencoderKL

    with reading(folder):
        # low_cpu_mem_usage would need accelerate, and diffusers warns where it is missing.
        vae = AutoencoderKL.from_pretrained(folder, local_files_only=True, low_cpu_mem_usage=False)
        check_finite(vae.state_dict())
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
        width = self.model.fc.in_features
        with reading(path):
            arrays = read_arrays(path)
            if arrays["mu"].shape != (width,):
                found = arrays["mu"].numel()
                raise ValueError(f"{path} has {found} features, the Inception network {width}; they must match.")
            pooled, spatial = (
                FeatureStatistics(2, arrays[mean].double(), arrays[covariance].double())
                for mean, covariance in (("mu", "sigma"), ("mu_s", "sigma_s"))
            )
            images = arrays.get("arr_0")
            features = None if images is None else self.judge_uint8(images.permute(0, 3, 1, 2)).features
        return Reference(pooled, features, spatial)


def read_arrays(path: str | Path) -> dict[str, Tensor]:
    """The arrays of an ADM reference batch. Raises ValueError on shapes and types that those do not have."""
    import numpy as np

    if not zipfile.is_zipfile(path):
        raise ValueError(f"There is no complete .npz file {path}; expected an ADM reference batch.")
    with reading(path), np.load(path, allow_pickle=False) as data:
        missing = [key for key in ("mu", "sigma", "mu_s", "sigma_s") if key not in data]
        if missing:
            raise ValueError(f"{path} lacks {', '.join(missing)}; expected an ADM reference batch (.npz).")
        kept = [key for key in ("mu", "sigma", "mu_s", "sigma_s", "arr_0") if key in data]
        arrays = {key: torch.from_numpy(data[key]) for key in kept}
        check_arrays(arrays)
    return arrays


def check_arrays(arrays: dict[str, Tensor]) -> None:
    for mean, covariance in (("mu", "sigma"), ("mu_s", "sigma_s")):
        size = arrays[mean].numel()
        if arrays[mean].shape != (size,) or arrays[covariance].shape != (size, size):
            raise ValueError(f"{covariance} has the shape {tuple(arrays[covariance].shape)}, expected {(size, size)}")
    check_finite(arrays)
    images = arrays.get("arr_0")
    if images is None:
        return
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[-1] != 3 or not len(images):
        raise ValueError(f"arr_0 is {tuple(images.shape)} of {images.dtype}, expected images (N, H, W, 3) in bytes")
