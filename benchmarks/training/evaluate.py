"""How good a trained model is, the shipped one or another: `python -m benchmarks.training.evaluate OUT`.

Prints how many generated pictures the judge takes for their class, and, given the drawings, how much is copied: a
picture is compared with many augmentations of every drawing of its class, put on its own ground. Real pictures
that were made anew, and pictures of drawings left out of the comparison, say what a copy and an original measure.
Writes grid.png (generated pictures of every class) and nearest.png (generated above, nearest real picture below).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from qandc_core.checkpoints.dit import DEMO, load_dit
from qandc_core.demo.judge import WEIGHTS, PicturesJudge, classify, load_judge
from qandc_core.files import save_tensors
from qandc_core.models.dit import DiT
from qandc_core.sampling.generate import generate

from .classes import CLASSES
from .drawings import Drawings, augment, device_of_choice, generator_like, load_drawings, on_ground, warped
from .train import picture_grid

BORDER = 2  # pixels at the edge whose median is taken for the ground


def sampled(
    model: DiT, rounds: Iterable[int], steps: int, cfg_scale: float, sampler: str, folder: Path
) -> tuple[Tensor, Tensor]:
    """A picture of every class for each of `rounds`, in order of class, and their labels. Every round is written into
    `folder`, and not sampled again where it is there.
    """
    device, classes = model.pos_embed.device, model.config.num_classes
    images = []
    for number in rounds:
        path = folder / f"pictures-{sampler}-{steps}-{cfg_scale:g}-{number}.safetensors"
        if not path.exists():
            made, _ = generate(model, range(classes), steps, cfg_scale, sampler, seed=1, first_index=number * classes)
            save_tensors({"images": made.clamp(-1, 1).cpu()}, path, {})
        images.append(load_file(path)["images"].to(device))
    return torch.stack(images, 1).flatten(0, 1), torch.arange(classes, device=device).repeat_interleave(len(images))


def share_recognised(judge: PicturesJudge, images: Tensor, labels: Tensor) -> Tensor:
    """Of the pictures of every class the share that the judge takes for it, (classes,)."""
    answers = classify(judge, images)[1].argmax(1)
    right = (answers == labels).double()
    return torch.stack([right[labels == c].mean() for c in range(len(CLASSES))])


def report_recognised(name: str, shares: Tensor, count: int) -> None:
    print(f"{name}: recognises {100 * shares.mean():.1f} % of {count}")
    worst = sorted((round(100 * float(share)), thing.name) for share, thing in zip(shares, CLASSES))
    print("  worst: " + ", ".join(f"{thing} {share} %" for share, thing in worst[:10]))


def recognised_by_all(paths: list[Path], images: Tensor, labels: Tensor) -> Tensor:
    """The mean over several judges."""
    judges = [load_judge(path)[0].to(images.device) for path in paths]
    return torch.stack([share_recognised(judge, images, labels) for judge in judges]).mean(0)


class Bank:
    """Many augmentations of every drawing, without their ground."""

    def __init__(self, drawings: Drawings, repeats: int, seed: int):
        self.indices = torch.arange(len(drawings), device=drawings.labels.device).repeat_interleave(repeats)
        generator = generator_like(drawings.labels, seed)
        parts = [warped(drawings, part, generator) for part in self.indices.split(1000)]
        self.colour, self.alpha = (torch.cat(layers) for layers in zip(*parts))
        self.labels = drawings.labels[self.indices]

    def nearest(self, image: Tensor, label: int, without: int | None = None) -> tuple[float, Tensor]:
        """Root mean square distance and picture of the nearest of that class; `without` leaves a drawing out."""
        of_class = self.labels == label
        if without is not None:
            of_class &= self.indices != without
        pictures = on_ground(self.colour[of_class], self.alpha[of_class], ground_of(image))
        distance = (pictures - image).square().mean(dim=(1, 2, 3)).sqrt()
        best = int(distance.argmin())
        return float(distance[best]), pictures[best]


def ground_of(image: Tensor) -> Tensor:
    """The ground of a picture (3, H, W) in [-1, 1], as a colour (3, 1, 1) in [0, 1]."""
    edge = torch.ones(image.shape[1:], dtype=torch.bool, device=image.device)
    edge[BORDER:-BORDER, BORDER:-BORDER] = False
    return (image[:, edge].median(dim=1).values[:, None, None] + 1) / 2


def report_copied(drawings: Drawings, images: Tensor, labels: Tensor, repeats: int) -> list[Tensor]:
    """Prints median distances; returns the nearest real picture of each."""
    bank = Bank(drawings, repeats, seed=2)
    found = [bank.nearest(image, int(label)) for image, label in zip(images, labels)]
    generator = generator_like(images, 3)
    fresh = torch.randint(len(drawings), (len(images),), generator=generator, device=images.device)
    real = augment(drawings, fresh, generator)
    known, new = ([
        bank.nearest(image, int(drawings.labels[i]), int(i) if leave_out else None)[0] for image, i in zip(real, fresh)
    ] for leave_out in (False, True))  # fmt: skip
    for name, values in (("generated", [d for d, _ in found]), ("real, drawing known", known),
                         ("real, drawing left out", new)):  # fmt: skip
        low, middle, high = torch.tensor(values).quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
        print(f"distance to the nearest real picture, {name}: median {middle:.3f} ({low:.3f} to {high:.3f})")
    return [picture for _, picture in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for pictures and grids")
    parser.add_argument("--model", type=Path, default=DEMO, help="weights of a run instead of the shipped ones")
    parser.add_argument("--judge", type=Path, default=WEIGHTS)
    parser.add_argument("--drawings", type=Path, help="without it nothing is said of copies")
    parser.add_argument("--each", type=int, default=10, help="pictures of every class")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--cfg", type=float, nargs="+", default=[2.0], help="guidance; pictures are of the first")
    parser.add_argument("--folds", type=Path, nargs="*", default=[], help="judges that never saw some of the artists")
    parser.add_argument("--sampler", default="ddpm")
    parser.add_argument("--bank", type=int, default=100, help="augmentations of every drawing to look for copies in")
    parser.add_argument("--only", type=int, nargs="+", help="only sample these rounds, for a run of all that follows")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    device = device_of_choice()
    model = load_dit(args.model, dtype=torch.float32, device=device)
    for scale in reversed(args.cfg):
        images, labels = sampled(model, args.only or range(args.each), args.steps, scale, args.sampler, args.out)
        if args.only:
            continue
        report_recognised(f"guidance {scale:g}", recognised_by_all([args.judge], images, labels), len(images))
        if args.folds:
            shares = recognised_by_all(args.folds, images, labels)
            report_recognised(f"guidance {scale:g}, judges without some artists", shares, len(images))
    if args.only:
        return
    picture_grid(images, 2 * args.each).save(args.out / "grid.png")
    if args.drawings is None:
        return
    drawings = load_drawings(args.drawings).to(device)
    some = torch.arange(0, len(images), max(1, args.each // 2), device=device)
    nearest = report_copied(drawings, images[some], labels[some], args.bank)
    pairs = torch.stack([images[some], torch.stack(nearest)], 1)
    rows = [torch.cat([part[:, 0], part[:, 1]]) for part in pairs.split(20)]
    picture_grid(torch.cat(rows), 20).save(args.out / "nearest.png")


if __name__ == "__main__":
    main()
