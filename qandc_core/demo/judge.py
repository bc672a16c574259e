"""The judge of the built-in model: a small convolutional network trained on real pictures, never on generated ones.

Its answers are the classes, and one more where it also learned from pictures that were spoiled: "none of them". The
scripts that drew the pictures and train a judge are in benchmarks/training.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from . import CLASS_NAMES

WEIGHTS = Path(__file__).with_name("pictures_judge.safetensors")
FEATURES = 64


class PicturesJudge(nn.Module):
    """Pictures (N, 3, 32, 32) in [-1, 1] -> features (N, 64) and logits (N, answers): the classes, then "none"."""

    def __init__(self, answers: int = len(CLASS_NAMES) + 1) -> None:
        super().__init__()
        widths = (3, 32, 64, 128)
        stages = [stage(before, after) for before, after in zip(widths, widths[1:])]
        self.body = nn.Sequential(*stages, nn.Flatten(), nn.Linear(widths[-1] * 16, FEATURES))
        self.head = nn.Linear(FEATURES, answers)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(x)
        return features, self.head(F.relu(features))


def stage(before: int, after: int) -> nn.Sequential:
    """Two convolutions at one size, which is then halved."""
    layers: list[nn.Module] = []
    for width in (before, after):
        layers += [nn.Conv2d(width, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.MaxPool2d(2))


@torch.inference_mode()
def classify(model: PicturesJudge, images: Tensor, batch: int = 250) -> tuple[Tensor, Tensor]:
    """Features (N, 64) and the probability of each answer (N, answers)."""
    parts = [model(part) for part in images.split(batch)]
    return torch.cat([f for f, _ in parts]), torch.cat([logits for _, logits in parts]).softmax(dim=1)


def load_judge(path: str | Path = WEIGHTS) -> tuple[PicturesJudge, dict[str, Tensor]]:
    """The judge, and the features (M, 64) of two disjoint draws of real pictures: reference and floor."""
    tensors = {key: value.float() if value.is_floating_point() else value for key, value in load_file(path).items()}
    real = {key.removeprefix("real."): tensors.pop(key) for key in list(tensors) if key.startswith("real.")}
    model = PicturesJudge(len(tensors["head.bias"]))
    model.load_state_dict(tensors)
    return model.eval(), real
