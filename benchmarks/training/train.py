"""Trains the built-in model: `python -m benchmarks.training.train drawings.safetensors RUN`.

RUN is a folder with checkpoint.safetensors, log.txt, grids of samples, and model.safetensors (the average of the
weights in half precision, which `load_dit` reads). The same command goes on where the checkpoint stands.

- Diffusion: the linear betas of DDPM, labels dropped with probability 0.1 for classifier-free guidance.
- The model predicts the clean image. The loss is that of a velocity, with the weight SNR + 1 capped at 5 (min-SNR,
  arXiv 2303.09556): without the cap, images that are nearly clean would dominate.
- Timesteps: most at middling noise, where shapes are decided; over half of the thousand are nearly pure noise. The
  log of the signal-to-noise ratio is normal for most of a batch (EDM, arXiv 2206.00364), the rest is uniform.
- Optimizer: Muon for the matrices of the blocks, AdamW for the rest. A CPU sees few images, and Muon needs fewer.
- Learning rate: warm-up, constant, and over the last part of the run a linear fall to zero. Until the fall begins
  nothing depends on the length of the run, so it may be made longer or shorter while it goes on. The length is a number
  of images, or seconds on a machine that is lent by the minute.
- The random numbers of a step depend on the seed, the step and the kind of device alone. On a CPU a run that was
  stopped and resumed is, bit for bit, the run that was not stopped, and no generator has to be saved.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Generator, Tensor

from qandc_core.checkpoints.dit import save_dit
from qandc_core.diffusion.schedule import linear_alpha_bar
from qandc_core.models.dit import DiT, DiTConfig, initialize_weights
from qandc_core.sampling.generate import generate

from .classes import CLASSES
from .drawings import Drawings, augment, balanced_draw, device_of_choice, generator_like, load_drawings, uniform

PICTURES_CONFIG = DiTConfig(
    input_size=32,
    patch_size=4,
    in_channels=3,
    hidden_size=256,
    depth=6,
    num_heads=8,
    num_classes=len(CLASSES),
    learn_sigma=False,
    prediction="sample",
)
CHECKPOINT, LOG, WEIGHTS = "checkpoint.safetensors", "log.txt", "model.safetensors"


@dataclass(frozen=True)
class TrainConfig:
    """`images` counts repeats; `fall` is the fraction of the run over which the learning rate falls."""

    images: int = 1_500_000
    batch: int = 64
    lr: float = 1e-3
    muon_lr: float = 3e-3
    muon_decay: float = 0.03
    uniform_timesteps: float = 0.3
    warmup: int = 300
    fall: float = 0.3
    ema: float = 0.998
    label_dropout: float = 0.1
    max_weight: float = 5.0
    bf16: bool = True
    compile: bool = True
    seed: int = 0
    model: DiTConfig = field(default_factory=lambda: PICTURES_CONFIG)

    @property
    def steps(self) -> int:
        return self.images // self.batch

    def rate(self, step: int, done: float = 0.0) -> float:
        """Share of the full learning rate at a step, where a clock may say that more than these images is `done`."""
        left = 1 - max(done, step / self.steps)
        return max(0.0, min(1.0, (step + 1) / self.warmup, left / self.fall))


class Training:
    """Weights, their average and the optimizers, where the drawings are; `step` counts what is done, and `done` is the
    share of the run that is over by a clock.
    """

    def __init__(self, config: TrainConfig, drawings: Drawings):
        self.config, self.drawings, self.step, self.done = config, drawings, 0, 0.0
        self.device = drawings.labels.device
        torch.manual_seed(config.seed)
        self.model = DiT(config.model)
        initialize_weights(self.model)
        self.model.to(self.device)
        self.average = copy.deepcopy(self.model).requires_grad_(False).eval()
        self.optimizers = make_optimizers(self.model, config)
        self.alpha_bar = linear_alpha_bar().float().to(self.device)
        self.density = timestep_density(linear_alpha_bar(), config.uniform_timesteps).to(self.device)
        if config.compile:
            for block in self.model.blocks:  # all of one shape: compiled once, in seconds
                block.compile()

    def batch(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Images x (B, 3, H, W), labels with some dropped (B,), training timesteps (B,) and noise like x."""
        config = self.config
        generator = generator_like(self.drawings.labels, config.seed * 1_000_003 + self.step)
        indices = balanced_draw(self.drawings, config.batch, generator)
        x = augment(self.drawings, indices, generator)
        dropped = uniform((config.batch,), 0, 1, generator) < config.label_dropout
        y = torch.where(dropped, self.model.null_class, self.drawings.labels[indices])
        t = stratified_timesteps(config.batch, self.density, generator)
        return x, y, t, torch.randn(x.shape, generator=generator, device=self.device)

    def loss(self) -> Tensor:
        x, y, t, noise = self.batch()
        a = self.alpha_bar[t][:, None, None, None]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.bf16):
            predicted = self.model(a.sqrt() * x + (1 - a).sqrt() * noise, t, y)
        weight = (1 / (1 - a)).clamp(max=self.config.max_weight)
        return (weight * (predicted.float() - x).square()).mean()

    def advance(self) -> Tensor:
        """One step of the optimiser; returns the loss before it, which nobody has to wait for."""
        loss = self.loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer, full_rate in zip(self.optimizers, (self.config.muon_lr, self.config.lr)):
            for group in optimizer.param_groups:
                group["lr"] = full_rate * self.config.rate(self.step, self.done)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        decay = min(self.config.ema, self.step / (self.step + 9))
        torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - decay)
        return loss.detach()

    def save(self, path: Path) -> None:
        """Everything that the next step needs, in one file that an interrupted write leaves as it was."""
        tensors = {f"model.{key}": value for key, value in self.model.state_dict().items()}
        tensors |= {f"average.{key}": value for key, value in self.average.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            for optimizer in self.optimizers:
                for key, value in optimizer.state.get(parameter, {}).items():
                    tensors[f"optimizer.{key}.{name}"] = value
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            save_file(tensors, temporary, {"step": str(self.step), "config": json.dumps(asdict(self.config))})
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def load(self, path: Path) -> None:
        """Goes on where a checkpoint stands. Raises ValueError where it is of a model of another shape."""
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            saved = DiTConfig(**json.loads(metadata["config"])["model"])
            if saved != self.config.model:
                raise ValueError(f"{path} is of another model, {saved}; choose another folder or the same model.")
            tensors = {key: file.get_tensor(key).to(self.device) for key in file.keys()}
        self.step = int(metadata["step"])
        for prefix, module in (("model.", self.model), ("average.", self.average)):
            module.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
        parameters = dict(self.model.named_parameters())
        for optimizer in self.optimizers:
            mine = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            for name, parameter in parameters.items():
                if id(parameter) in mine:
                    optimizer.state[parameter] = optimizer_state(tensors, name)


def make_optimizers(model: DiT, config: TrainConfig) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """Muon (needs torch 2.9) for the matrices of the blocks and AdamW for the other parameters."""
    matrices = [p for name, p in model.named_parameters() if name.startswith("blocks.") and p.ndim == 2]
    held = set(map(id, matrices))
    others = [p for p in model.parameters() if id(p) not in held]
    muon = torch.optim.Muon(matrices, lr=config.muon_lr, weight_decay=config.muon_decay, adjust_lr_fn="match_rms_adamw")
    return muon, torch.optim.AdamW(others, lr=config.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)


def optimizer_state(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """What a checkpoint knows of one parameter: keys are optimizer.<what>.<parameter>."""
    found = {}
    for key, value in tensors.items():
        kind, what, of = (*key.split(".", 2), "", "")[:3]
        if (kind, of) == ("optimizer", name):
            found[what] = value
    return found


def timestep_density(alpha_bar: Tensor, uniform: float, mean: float = 0.0, deviation: float = 2.0) -> Tensor:
    """Probability (T,) of each timestep: `uniform` of it even, the rest normal in log(SNR)."""
    log_snr = (alpha_bar / (1 - alpha_bar)).log()
    spacing = log_snr.diff().abs()
    spacing = torch.cat([spacing, spacing[-1:]])
    normal = torch.exp(-0.5 * ((log_snr - mean) / deviation) ** 2) * spacing
    return uniform / len(alpha_bar) + (1 - uniform) * normal / normal.sum()


def stratified_timesteps(count: int, density: Tensor, generator: Generator) -> Tensor:
    """Timesteps (count,), one in each of `count` parts of equal probability: a steadier loss than independent ones."""
    position = (torch.arange(count, device=density.device) + uniform((count,), 0, 1, generator)) / count
    found = torch.searchsorted(density.cumsum(0), position.double()).clamp(max=len(density) - 1)
    return found[torch.randperm(count, generator=generator, device=density.device)]


def export(training: Training, path: Path) -> None:
    """The average in half precision, as it is shipped."""
    save_dit(copy.deepcopy(training.average).cpu().half(), path)


def sample_grid(model: DiT, columns: int = 4, steps: int = 25, cfg_scale: float = 2.0) -> Image.Image:
    """A few samples of every class: a row holds the samples of two classes side by side, twice as large as they are."""
    labels = torch.arange(model.config.num_classes).repeat_interleave(columns)
    images, _ = generate(model, labels, steps, cfg_scale, "ddim", seed=0)
    return picture_grid(images, 2 * columns)


def picture_grid(images: Tensor, columns: int, zoom: int = 2) -> Image.Image:
    """Images (N, 3, H, W) in [-1, 1] in rows of `columns`, with white lines between."""
    tiles = torch.nn.functional.pad(images.clamp(-1, 1), (1, 1, 1, 1), value=1.0)
    short = -len(tiles) % columns
    tiles = torch.cat([tiles, tiles.new_ones(short, *tiles.shape[1:])])
    rows = tiles.unflatten(0, (-1, columns)).permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)
    picture = Image.fromarray(((rows + 1) * 127.5).round().byte().cpu().numpy())
    return picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)


@dataclass(frozen=True)
class Reporting:
    """Seconds between checkpoints and between grids of samples, steps between log lines."""

    checkpoint: float = 240.0
    grid: float = 1800.0
    log: int = 100


def train(
    drawings: Drawings,
    folder: Path,
    config: TrainConfig,
    reporting: Reporting = Reporting(),
    until: int | None = None,
    seconds: float = math.inf,
) -> Training:
    """Trains to the end, after `seconds` at the latest, or to step `until`, resuming the run in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, training = folder / CHECKPOINT, Training(config, drawings)
    if checkpoint.is_file():
        training.load(checkpoint)
    parameters = sum(p.numel() for p in training.model.parameters())
    log(folder, f"from step {training.step} of {config.steps}; {parameters / 1e6:.2f} M parameters; {config}")
    started = saved = drawn = time.monotonic()
    end = started + seconds
    losses: list[Tensor] = []
    seen = 0
    while training.step < min(config.steps, until or config.steps) and training.done < 1:
        training.done = 1 - (end - time.monotonic()) / seconds if seconds < math.inf else 0.0
        losses.append(training.advance())
        seen += config.batch
        if len(losses) == reporting.log:
            now = time.monotonic()
            log(folder, f"step {training.step}  images {training.step * config.batch}  "
                f"loss {torch.stack(losses).mean():.4f}  rate {config.rate(training.step, training.done):.3f}  "
                f"{seen / (now - started):.1f} images/s")  # fmt: skip
            losses, seen, started = [], 0, now
        if time.monotonic() - saved > reporting.checkpoint:
            training.save(checkpoint)
            saved = time.monotonic()
        if time.monotonic() - drawn > reporting.grid:
            export(training, folder / WEIGHTS)
            sample_grid(training.average).save(folder / f"grid-{training.step:06d}.png")
            drawn = time.monotonic()
    training.save(checkpoint)
    export(training, folder / WEIGHTS)
    return training


def log(folder: Path, line: str) -> None:
    line = f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {line}"
    print(line, flush=True)
    with open(folder / LOG, "a") as file:
        file.write(line + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("drawings", type=Path, help="drawings.safetensors of benchmarks.training.prepare")
    parser.add_argument("folder", type=Path, help="folder of the run")
    parser.add_argument("--images", type=int, default=TrainConfig.images, help="images to train on, repeats counted")
    parser.add_argument("--batch", type=int, default=TrainConfig.batch)
    parser.add_argument("--until", type=int, help="stop at this step")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="let the run end after this time, if not before"
    )
    parser.add_argument("--float32", action="store_true", help="no bfloat16 autocast")
    parser.add_argument("--no-compile", action="store_true", help="skip torch.compile (needs a C++ compiler on CPU)")
    args = parser.parse_args()
    config = TrainConfig(images=args.images, batch=args.batch, bf16=not args.float32, compile=not args.no_compile)
    drawings = load_drawings(args.drawings).to(device_of_choice())
    training = train(drawings, args.folder, config, until=args.until, seconds=args.seconds)
    sample_grid(training.average).save(args.folder / f"grid-{training.step:06d}.png")


if __name__ == "__main__":
    main()
