"""Trains a small flow model of ComfyUI's Lumina 2 class on the built-in model's drawings, with ComfyUI's own Python:

    COMFYUI/.venv/bin/python benchmarks/caching/flow_model.py COMFYUI drawings.safetensors OUT.safetensors

`benchmarks.training.prepare` makes the drawings. A 32 x 32 picture becomes a latent (16, 16, 16) by taking every 2 x 2
pixels as twelve channels, and four that are zero, as many as the class of the model expects. One context token holds
the class. With --piece the command stops after so many seconds, and the same command goes on from there.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

WEIGHTS = Path(__file__).with_name("flow_model.safetensors")  # 40 minutes on one core of an AMD EPYC
CLASSES = 40  # and one more context for no class
LATENT = (16, 16, 16)
CONFIG = {
    "image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": 128, "cap_feat_dim": 48, "n_layers": 6,
    "n_refiner_layers": 1, "qk_norm": True, "n_heads": 4, "n_kv_heads": 4, "axes_dims": [8, 12, 12],
    "axes_lens": [64, 64, 64], "rope_theta": 10000.0, "ffn_dim_multiplier": 1.0, "multiple_of": 32,
}  # fmt: skip


def context(labels: torch.Tensor) -> torch.Tensor:
    """(N,) -> (N, 1, 48)."""
    return F.one_hot(labels, CONFIG["cap_feat_dim"]).float()[:, None]


def encode(images: torch.Tensor) -> torch.Tensor:
    """(N, 3, 32, 32) -> (N, 16, 16, 16)."""
    return F.pad(F.pixel_unshuffle(images, 2), (0, 0, 0, 0, 0, 4))


def decode(latents: torch.Tensor) -> torch.Tensor:
    return F.pixel_shuffle(latents[:, :12], 2)


def initialize(model: torch.nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.xavier_uniform_(parameter)
        else:
            torch.nn.init.constant_(parameter, float(name.endswith("weight")))
        if "adaLN_modulation" in name or name.startswith("final_layer.linear"):
            torch.nn.init.zeros_(parameter)


def train(
    drawings: str, out: Path, seconds: float, piece: float, batch: int = 64, peak: float = 2e-3, dropout: float = 0.1
) -> bool:
    """Velocity matching (arXiv 2210.02747) at logit-normal times, for so many seconds; saves the moving average.

    Stops after `piece` seconds, beside `out` what goes on from there. Returns whether the training is over.
    """
    import comfy.model_management
    from comfy.ldm.lumina.model import NextDiT
    from comfy.ops import disable_weight_init

    sys.path.insert(0, str(Path(__file__).parents[2]))
    from benchmarks.training.drawings import augment, balanced_draw, load_drawings

    comfy.model_management.in_training = True  # its fused kernels have no gradient
    known = load_drawings(drawings)
    out.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = NextDiT(**CONFIG, dtype=torch.float32, device="cpu", operations=disable_weight_init)
    initialize(model)
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=0.0)
    begun, step, running, before, kept_at = time.perf_counter(), 0, 0.0, 0.0, out.with_suffix(".part")
    if kept_at.is_file():
        part = torch.load(kept_at, weights_only=True)
        step, before = part["step"], part["seconds"]
        for target, name in ((model, "model"), (average, "average"), (optimizer, "optimizer")):
            target.load_state_dict(part[name])
    torch.manual_seed(step)
    generator = torch.Generator().manual_seed(step)
    while (done := (before + time.perf_counter() - begun) / seconds) < 1:
        if time.perf_counter() - begun > piece:
            states = {"model": model.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({"step": step, "seconds": done * seconds, **states}, kept_at)
            return False
        optimizer.param_groups[0]["lr"] = peak * min(1.0, (step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * done))
        pick = balanced_draw(known, batch, generator)
        x0, y = encode(augment(known, pick, generator)), known.labels[pick]
        y = torch.where(torch.rand(batch) < dropout, CLASSES, y)
        t, noise = torch.sigmoid(0.5 + torch.randn(batch)), torch.randn_like(x0)
        mixed = torch.lerp(x0, noise, t[:, None, None, None])
        loss = (model(mixed, t, context(y), 1) - (noise - x0)).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        for kept, new in zip(average.parameters(), model.parameters()):
            kept.lerp_(new.detach(), 1 - min(0.999, step / (step + 10)))
        running += loss.item()
        if step % 100 == 0:
            print(f"{100 * done:.0f} %  {step * batch} images  loss {running / 100:.4f}", flush=True)
            running = 0.0
    save_file({name: value.half().contiguous() for name, value in average.state_dict().items()}, out)
    kept_at.unlink(missing_ok=True)
    return True


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("comfyui")
    parser.add_argument("drawings", help="drawings.safetensors, written by: python -m benchmarks.training.prepare DIR")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=2400)
    parser.add_argument("--piece", type=float, default=float("inf"))
    args = parser.parse_args()
    sys.path.insert(0, args.comfyui)
    sys.argv = ["main.py", "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    if not train(args.drawings, args.out, args.seconds, args.piece):
        print(f"stopped after {args.piece:g} seconds; the same command goes on")
