"""Trains the judge of generated pictures: `python -m benchmarks.training.judge drawings.safetensors OUT FOLDS`.

It sees real pictures only. How well it knows the things themselves, rather than these drawings of them, is measured on
artists that are held out: four times a network is trained without the packages of one fold and tested on their
drawings. The network that is saved was trained on all packages. Networks whose files are there are not trained again.

A classifier that must name one of its classes is lenient: it takes a coloured cloud for the nearest thing. So there is
one more answer, "none of them", for real pictures that were spoiled: two things blended, blurred to blocks, taken
apart into tiles, or under noise of the size of a pixel or of a patch.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from qandc_core.demo.judge import PicturesJudge, classify, load_judge
from qandc_core.files import save_tensors

from .classes import CLASSES
from .drawings import Drawings, augment, balanced_draw, device_of_choice, generator_like, load_drawings, uniform
from .prepare import PACKAGES

REAL = 4000  # pictures whose features are kept, twice
# Packages in the style of one artist stay together: Google's two, Microsoft's two.
FOLDS = ((0, 1), (6, 7), (2, 5), (3, 4))


def spoiled(pictures: Tensor, labels: Tensor, generator: Generator) -> Tensor:
    """Pictures (N, 3, 32, 32) that no longer show one thing clearly, each spoiled in one of five ways."""
    device = pictures.device
    other = torch.randint(len(pictures), (len(pictures),), generator=generator, device=device)
    other = torch.where(labels[other] == labels, labels.ne(labels[:, None]).int().argmax(1), other)
    share = uniform((len(pictures), 1, 1, 1), 0.4, 0.6, generator)
    blocks = F.interpolate(F.avg_pool2d(pictures, 4), scale_factor=4.0)
    strength = uniform((len(pictures), 1, 1, 1), 0.2, 0.6, generator)
    fine = torch.randn(pictures.shape, generator=generator, device=device)
    coarse = torch.randn(len(pictures), 3, 8, 8, generator=generator, device=device)
    ways = torch.stack(
        [
            share * pictures + (1 - share) * pictures[other],
            torch.lerp(pictures, blocks, uniform((len(pictures), 1, 1, 1), 0.8, 1.0, generator)),
            shuffled_tiles(pictures, generator),
            pictures + strength * fine,
            pictures + strength * F.interpolate(coarse, scale_factor=4.0),
        ]
    )
    way = torch.randint(len(ways), (len(pictures),), generator=generator, device=device)
    return ways[way, torch.arange(len(pictures), device=device)].clamp(-1, 1)


def shuffled_tiles(pictures: Tensor, generator: Generator) -> Tensor:
    """The 16 tiles of each picture (N, C, 32, 32) in random order."""
    tiles = F.unfold(pictures, 8, stride=8)
    order = uniform((len(pictures), 1, 16), 0, 1, generator).argsort(-1)
    return F.fold(tiles.gather(2, order.expand_as(tiles)), pictures.shape[-2:], 8, stride=8)


@dataclass(frozen=True)
class JudgeConfig:
    """Each step takes `batch` pictures and `spoiled` more that were spoiled."""

    steps: int = 900
    held_out_steps: int = 300  # of each network that is trained without some of the artists
    batch: int = 80
    spoiled: int = 40
    lr: float = 3e-3
    seed: int = 0


def train_judge(drawings: Drawings, config: JudgeConfig) -> PicturesJudge:
    torch.manual_seed(config.seed)
    generator = generator_like(drawings.labels, config.seed)
    device = drawings.labels.device
    model = PicturesJudge().to(device, memory_format=torch.channels_last)  # as bfloat16, twice as fast on a CPU
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, total_steps=config.steps)
    for _ in range(config.steps):
        pictures, labels = judged_batch(drawings, config, generator)
        with torch.autocast(device.type, torch.bfloat16):
            _, logits = model(pictures.contiguous(memory_format=torch.channels_last))
        F.cross_entropy(logits.float(), labels, label_smoothing=0.05).backward()
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


def recognised(model: PicturesJudge, drawings: Drawings, repeats: int, seed: int) -> Tensor:
    """Whether each of `repeats` pictures of every drawing is taken for what it is, (repeats * N,) bool."""
    generator = generator_like(drawings.labels, seed)
    indices = torch.arange(len(drawings), device=drawings.labels.device).repeat(repeats)
    _, probabilities = classify(model, augment(drawings, indices, generator))
    return probabilities.argmax(1) == drawings.labels[indices]


def refused(model: PicturesJudge, drawings: Drawings, repeats: int, seed: int) -> Tensor:
    """Whether each of `repeats` spoiled pictures of every drawing is taken for none of the things, (repeats * N,)."""
    generator = generator_like(drawings.labels, seed)
    indices = torch.arange(len(drawings), device=drawings.labels.device).repeat(repeats)
    labels = drawings.labels[indices]
    _, probabilities = classify(model, spoiled(augment(drawings, indices, generator), labels, generator))
    return probabilities.argmax(1) == len(CLASSES)


def trained_judge(drawings: Drawings, config: JudgeConfig, path: Path) -> PicturesJudge:
    """The judge of that file, which is trained and written where it is not there."""
    if not path.exists():
        save_judge(train_judge(drawings, config), drawings, path, {})
    return load_judge(path)[0].to(drawings.labels.device)


def held_out_accuracy(drawings: Drawings, config: JudgeConfig, folder: Path) -> float:
    """Share of the pictures of artists that the network had not seen which it recognises, over all folds."""
    right, shorter = [], replace(config, steps=min(config.steps, config.held_out_steps))
    for number, fold in enumerate(FOLDS):
        unseen = torch.isin(drawings.packages, torch.tensor(fold, device=drawings.packages.device))
        model = trained_judge(drawings.where(~unseen), shorter, folder / f"fold-{number}.safetensors")
        found = recognised(model, drawings.where(unseen), 10, config.seed + 1)
        names = ", ".join(PACKAGES[number].npm for number in fold)
        print(f"not trained on {names}: recognises {100 * found.float().mean():.1f} % of {len(found)}", flush=True)
        right.append(found)
    return float(torch.cat(right).float().mean())


def real_features(model: PicturesJudge, drawings: Drawings, count: int, seed: int) -> Tensor:
    """Features (count, 64) of real pictures, every class equally often."""
    generator = generator_like(drawings.labels, seed)
    indices = balanced_draw(drawings, count, generator)
    return classify(model, augment(drawings, indices, generator))[0]


def save_judge(model: PicturesJudge, drawings: Drawings, path: Path, accuracy: dict[str, float]) -> None:
    """Weights and features in half precision."""
    real = {name: real_features(model, drawings, REAL, seed) for seed, name in enumerate(("reference", "floor"), 1000)}
    tensors = dict(model.state_dict()) | {f"real.{name}": features for name, features in real.items()}
    tensors = {key: (value.half() if value.is_floating_point() else value).cpu() for key, value in tensors.items()}
    save_tensors(tensors, path, {key: f"{value:.4f}" for key, value in accuracy.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("drawings", type=Path, help="drawings.safetensors of benchmarks.training.prepare")
    parser.add_argument("out", type=Path, help="file of the judge")
    parser.add_argument("--steps", type=int, default=JudgeConfig.steps)
    parser.add_argument("folds", type=Path, help="folder for the networks of held-out artists")
    args = parser.parse_args()
    args.folds.mkdir(parents=True, exist_ok=True)
    drawings = load_drawings(args.drawings).to(device_of_choice())
    config = JudgeConfig(steps=args.steps)
    model = trained_judge(drawings, config, args.out)
    known = float(recognised(model, drawings, 10, config.seed + 1).float().mean())
    none = float(refused(model, drawings, 10, config.seed + 2).float().mean())
    print(f"the judge, new pictures of drawings it was trained on: {100 * known:.1f} %")
    print(f"spoiled pictures, which are none of the things: {100 * none:.1f} %")
    unseen = held_out_accuracy(drawings, config, args.folds)
    print(f"held-out artists: {100 * unseen:.1f} %")
    accuracy = {"known_drawings": known, "spoiled": none, "held_out_artists": unseen}
    save_judge(model, drawings, args.out, accuracy)


if __name__ == "__main__":
    main()
