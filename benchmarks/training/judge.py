"""Trains the judge of generated pictures: `python -m benchmarks.training.judge drawings.safetensors OUT`.

It sees real pictures only. How well it knows the things themselves, rather than these drawings of them, is measured on
artists that are held out: four times a network is trained without the packages of one fold and tested on their
drawings. The network that is saved was trained on all packages.

A classifier that must name one of its classes is lenient: it takes a coloured cloud for the nearest thing. So there is
one more answer, "none of them", for real pictures that were spoiled: two things blended, blurred to blocks, taken
apart into tiles, or under noise of the size of a pixel or of a patch.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Generator, Tensor, nn

from .classes import CLASSES
from .drawings import Drawings, augment, balanced_draw, load_drawings, uniform
from .prepare import PACKAGES

FEATURES = 64
# Packages in the style of one artist stay together: Google's two, Microsoft's two.
FOLDS = ((0, 1), (6, 7), (2, 5), (3, 4))


class PicturesJudge(nn.Module):
    """Pictures (N, 3, 32, 32) in [-1, 1] -> features (N, 64) and logits (N, answers): the classes, then "none"."""

    def __init__(self, answers: int = len(CLASSES) + 1) -> None:
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


def spoiled(pictures: Tensor, labels: Tensor, generator: Generator) -> Tensor:
    """Pictures (N, 3, 32, 32) that no longer show one thing clearly, each spoiled in one of five ways."""
    other = torch.randint(len(pictures), (len(pictures),), generator=generator)
    other = torch.where(labels[other] == labels, labels.ne(labels[:, None]).int().argmax(1), other)
    share = uniform((len(pictures), 1, 1, 1), 0.4, 0.6, generator)
    blocks = F.interpolate(F.avg_pool2d(pictures, 4), scale_factor=4.0)
    strength = uniform((len(pictures), 1, 1, 1), 0.2, 0.6, generator)
    fine = torch.randn(pictures.shape, generator=generator)
    coarse = F.interpolate(torch.randn(len(pictures), 3, 8, 8, generator=generator), scale_factor=4.0)
    ways = torch.stack(
        [
            share * pictures + (1 - share) * pictures[other],
            torch.lerp(pictures, blocks, uniform((len(pictures), 1, 1, 1), 0.8, 1.0, generator)),
            shuffled_tiles(pictures, generator),
            pictures + strength * fine,
            pictures + strength * coarse,
        ]
    )
    way = torch.randint(len(ways), (len(pictures),), generator=generator)
    return ways[way, torch.arange(len(pictures))].clamp(-1, 1)


def shuffled_tiles(pictures: Tensor, generator: Generator) -> Tensor:
    """The 16 tiles of each picture (N, C, 32, 32) in random order."""
    tiles = F.unfold(pictures, 8, stride=8)
    order = torch.rand(len(pictures), 1, 16, generator=generator).argsort(-1)
    return F.fold(tiles.gather(2, order.expand_as(tiles)), pictures.shape[-2:], 8, stride=8)


@dataclass(frozen=True)
class JudgeConfig:
    """Each step takes `batch` pictures and `spoiled` more that were spoiled."""

    steps: int = 900
    batch: int = 80
    spoiled: int = 40
    lr: float = 3e-3
    seed: int = 0


def train_judge(drawings: Drawings, config: JudgeConfig) -> PicturesJudge:
    torch.manual_seed(config.seed)
    generator = Generator().manual_seed(config.seed)
    model = PicturesJudge()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, total_steps=config.steps)
    for _ in range(config.steps):
        pictures, labels = judged_batch(drawings, config, generator)
        _, logits = model(pictures)
        F.cross_entropy(logits, labels, label_smoothing=0.05).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval()


def judged_batch(drawings: Drawings, config: JudgeConfig, generator: Generator) -> tuple[Tensor, Tensor]:
    """Real pictures and spoiled ones, and the right answer to each."""
    indices = balanced_draw(drawings, config.batch + config.spoiled, generator)
    pictures, labels = augment(drawings, indices, generator), drawings.labels[indices]
    pictures[config.batch :] = spoiled(pictures, labels, generator)[config.batch :]
    labels[config.batch :] = len(CLASSES)
    return pictures, labels


@torch.inference_mode()
def classify(model: PicturesJudge, images: Tensor, batch: int = 250) -> tuple[Tensor, Tensor]:
    """Features (N, 64) and the probability of each answer (N, answers)."""
    parts = [model(part) for part in images.split(batch)]
    return torch.cat([f for f, _ in parts]), torch.cat([logits for _, logits in parts]).softmax(dim=1)


def recognised(model: PicturesJudge, drawings: Drawings, repeats: int, seed: int) -> Tensor:
    """Whether each of `repeats` pictures of every drawing is taken for what it is, (repeats * N,) bool."""
    generator = Generator().manual_seed(seed)
    indices = torch.arange(len(drawings)).repeat(repeats)
    _, probabilities = classify(model, augment(drawings, indices, generator))
    return probabilities.argmax(1) == drawings.labels[indices]


def refused(model: PicturesJudge, drawings: Drawings, repeats: int, seed: int) -> Tensor:
    """Whether each of `repeats` spoiled pictures of every drawing is taken for none of the things, (repeats * N,)."""
    generator = Generator().manual_seed(seed)
    indices = torch.arange(len(drawings)).repeat(repeats)
    labels = drawings.labels[indices]
    _, probabilities = classify(model, spoiled(augment(drawings, indices, generator), labels, generator))
    return probabilities.argmax(1) == len(CLASSES)


def held_out_accuracy(drawings: Drawings, config: JudgeConfig) -> float:
    """Share of the pictures of artists that the network had not seen which it recognises, over all folds."""
    right = []
    for fold in FOLDS:
        unseen = torch.isin(drawings.packages, torch.tensor(fold))
        found = recognised(train_judge(drawings.where(~unseen), config), drawings.where(unseen), 10, config.seed + 1)
        names = ", ".join(PACKAGES[number].npm for number in fold)
        print(f"not trained on {names}: recognises {100 * found.float().mean():.1f} % of {len(found)}", flush=True)
        right.append(found)
    return float(torch.cat(right).float().mean())


def save_judge(model: PicturesJudge, path: Path, accuracy: dict[str, float]) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    save_file(dict(model.state_dict()), temporary, {key: f"{value:.4f}" for key, value in accuracy.items()})
    os.replace(temporary, path)


def load_judge(path: str | Path) -> PicturesJudge:
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    model = PicturesJudge(len(tensors["head.bias"]))
    model.load_state_dict(tensors)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("drawings", type=Path, help="drawings.safetensors of benchmarks.training.prepare")
    parser.add_argument("out", type=Path, help="file of the judge")
    parser.add_argument("--steps", type=int, default=JudgeConfig.steps)
    args = parser.parse_args()
    drawings, config = load_drawings(args.drawings), JudgeConfig(steps=args.steps)
    unseen = held_out_accuracy(drawings, config)
    model = train_judge(drawings, config)
    known = float(recognised(model, drawings, 10, config.seed + 1).float().mean())
    none = float(refused(model, drawings, 10, config.seed + 2).float().mean())
    print(f"held-out artists: {100 * unseen:.1f} %")
    print(f"the judge, new pictures of drawings it was trained on: {100 * known:.1f} %")
    print(f"spoiled pictures, which are none of the things: {100 * none:.1f} %")
    save_judge(model, args.out, {"held_out_artists": unseen, "known_drawings": known, "spoiled": none})


if __name__ == "__main__":
    main()
