"""The drawings that training starts from, and the pictures that augmentation makes of them.

Forty things in about eight drawings each are no distribution, so a picture is a drawing bent, turned, moved, resized,
recoloured and put on a coloured ground. All of it happens at twice the size of the picture, which then averages 2 x 2.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Generator, Tensor

from .classes import CLASSES


@dataclass(frozen=True)
class Drawings:
    """pictures (N, 4, 64, 64) uint8, colour premultiplied by alpha; labels (N,) and packages (N,) int64."""

    pictures: Tensor
    labels: Tensor
    packages: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def where(self, mask: Tensor) -> Drawings:
        return Drawings(self.pictures[mask], self.labels[mask], self.packages[mask])

    def to(self, device: torch.device | str) -> Drawings:
        """Generators of what is made of them have to be of the same device."""
        return Drawings(*(tensor.to(device) for tensor in vars(self).values()))


def device_of_choice() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def generator_like(like: Tensor, seed: int) -> Generator:
    return Generator(like.device).manual_seed(seed)


def save_drawings(drawings: Drawings, path: Path, metadata: dict[str, str]) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    save_file(dict(vars(drawings)), temporary, metadata)
    os.replace(temporary, path)


def load_drawings(path: str | Path) -> Drawings:
    with safe_open(path, "pt") as file:
        return Drawings(**{name: file.get_tensor(name) for name in ("pictures", "labels", "packages")})


def balanced_draw(drawings: Drawings, count: int, generator: Generator) -> Tensor:
    """Indices (count,) of drawings: every class equally likely, and within it every drawing."""
    weight = 1 / drawings.labels.bincount(minlength=len(CLASSES))[drawings.labels].double()
    return torch.multinomial(weight, count, replacement=True, generator=generator)


def augment(drawings: Drawings, indices: Tensor, generator: Generator) -> Tensor:
    """Pictures (B, 3, 32, 32) in [-1, 1] of the drawings at `indices`, each bent, recoloured and put on a ground."""
    colour, alpha = warped(drawings, indices, generator)
    return on_ground(colour, alpha, contrasting_ground(colour, alpha, generator))


def warped(drawings: Drawings, indices: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """Premultiplied colour (B, 3, 32, 32) and alpha (B, 1, 32, 32) in [0, 1] of drawings, bent and recoloured."""
    labels = drawings.labels[indices]
    layers = F.grid_sample(drawings.pictures[indices].float() / 255, warp(labels, generator), align_corners=False)
    layers = F.avg_pool2d(layers, 2)
    return recolour(layers[:, :3], layers[:, 3:], labels, generator), layers[:, 3:]


def on_ground(colour: Tensor, alpha: Tensor, ground: Tensor) -> Tensor:
    """Pictures in [-1, 1] of drawings on grounds in [0, 1] that broadcast to them."""
    return ((colour + (1 - alpha) * ground) * 2 - 1).clamp(-1, 1)


def uniform(shape: tuple[int, ...], low: float, high: float, generator: Generator) -> Tensor:
    return torch.rand(shape, generator=generator, device=generator.device) * (high - low) + low


def warp(labels: Tensor, generator: Generator) -> Tensor:
    """Where each pixel is read from, (B, 64, 64, 2): an affine map of each picture, and a smooth bend."""
    count = len(labels)
    may_flip = torch.tensor([thing.flip for thing in CLASSES], device=labels.device)[labels]
    flip = torch.where(may_flip & (uniform((count,), 0, 1, generator) < 0.5), -1.0, 1.0)
    angle = uniform((count,), -0.2, 0.2, generator)
    # Reading from a wider field makes the drawing smaller: 0.85 to 1.06 of its size, and up to 6 % of stretch.
    size = uniform((count,), 0.94, 1.18, generator)
    stretch = uniform((count,), -0.06, 0.06, generator).exp()
    shift = uniform((count, 2), -0.12, 0.12, generator)
    cos, sin = size * angle.cos(), size * angle.sin()
    rows = [flip * stretch * cos, -flip * stretch * sin, shift[:, 0], sin / stretch, cos / stretch, shift[:, 1]]
    grid = F.affine_grid(torch.stack(rows, 1).view(count, 2, 3), [count, 1, 64, 64], align_corners=False)
    bend = uniform((count, 2, 4, 4), -0.09, 0.09, generator)
    return grid + F.interpolate(bend, 64, mode="bicubic", align_corners=True).permute(0, 2, 3, 1)


def recolour(colour: Tensor, alpha: Tensor, labels: Tensor, generator: Generator) -> Tensor:
    """Turns the hue as far as the class allows, and changes contrast and brightness by up to 12 %."""
    count = len(labels)
    reach = torch.tensor([thing.hue for thing in CLASSES], device=labels.device)[labels]
    turn = 2 * math.pi * reach * uniform((count,), -1, 1, generator)
    turned = torch.einsum("bij,bjhw->bihw", hue_rotation(turn), colour)
    gain = uniform((count, 1, 1, 1), 0.88, 1.06, generator)
    lift = uniform((count, 1, 1, 1), 0.0, 0.06, generator)
    # Colour is premultiplied: what is drawn cannot be brighter than its alpha.
    return torch.minimum((turned * gain + lift * alpha).clamp_min(0), alpha)


def hue_rotation(turn: Tensor) -> Tensor:
    """Matrices (B, 3, 3) that rotate RGB about the grey axis by `turn` (B,) radians (Rodrigues' formula)."""
    cos, sin = turn.cos()[:, None, None], turn.sin()[:, None, None] / math.sqrt(3)
    cross = turn.new_tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]])
    return cos * torch.eye(3, device=turn.device) + (1 - cos) / 3 + sin * cross


def contrasting_ground(colour: Tensor, alpha: Tensor, generator: Generator) -> Tensor:
    """Of three pastels for each picture the one farthest from the drawing's mean colour, (B, 3, 1, 1)."""
    mean = colour.sum(dim=(2, 3)) / alpha.sum(dim=(2, 3)).clamp_min(1e-3)
    grounds = pastel(3 * len(colour), generator).view(len(colour), 3, 3)
    farthest = (grounds - mean[:, None]).square().sum(-1).argmax(1)
    return grounds[torch.arange(len(colour), device=colour.device), farthest][:, :, None, None]


def pastel(count: int, generator: Generator) -> Tensor:
    """Light colours (count, 3) of any hue."""
    hue = uniform((count, 1), 0, 1, generator)
    hue = hue + hue.new_tensor([0.0, 1 / 3, 2 / 3])
    full = (2 + 2 * (2 * math.pi * hue).cos()).clamp(0, 3) / 3
    saturation, value = uniform((count, 1), 0.1, 0.42, generator), uniform((count, 1), 0.88, 1.0, generator)
    return value * (1 - saturation * (1 - full))
