"""Distances between steps, which optimal_schedule minimizes: of predictions, and of the branches' outputs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from ..caching.attach import cache_bypassed
from ..diffusion.process import ReverseProcess, SamplingConfig
from ..models.dit import DiT
from ..numerics import ratios, with_float64

FARTHEST = 1e12  # from a prediction that is zero


def relative_distances(values: Tensor) -> Tensor:
    """|x_i - x_j| / |x_j| (T, T) between the rows of values (T, V); finite, as optimal_schedule requires."""
    return ratios(torch.cdist(values, values), values.norm(dim=1)[None]).clamp(max=FARTHEST)


def prediction_distances(denoised: Tensor, sigmas: Tensor) -> Tensor:
    """distances (T, T): [i, j] is what step j errs by if it uses the prediction of step i, relative to its own.

    denoised (T, V) holds the values of every step's prediction; a step from sigma to the following moves the sample by
    (1 - following / sigma) of an error in it. sigmas (T + 1,).
    """
    values, sigmas = denoised.to(with_float64(denoised.device)).double(), sigmas.cpu().double()
    relative = relative_distances(values)
    distances = relative * (1 - sigmas[1:] / sigmas[:-1]).to(values.device)[None]
    return distances.fill_diagonal_(0.0).cpu()


@torch.inference_mode()
def feature_distances(
    model: DiT, class_labels: Sequence[int] | Tensor, config: SamplingConfig, *, values: int = 4096, seed: int = 0
) -> Tensor:
    """distances (T, T), upper triangular: mean over the attention and MLP branches of |f_i - f_j| / |f_j|, i < j.

    One full trajectory for each label; of every branch a fixed random `values` of its outputs are kept for each step.
    """
    process = ReverseProcess(model, class_labels, config)
    source = process.noise_source(seed, range(len(process.labels)))
    generator, picks = torch.Generator().manual_seed(seed), dict[str, Tensor]()
    kept: dict[str, list[Tensor]] = {}

    def keep(name: str, out: Tensor) -> None:
        flat = out.flatten()
        if name not in picks:
            picks[name] = torch.randint(flat.numel(), (values,), generator=generator).to(out.device)
        kept.setdefault(name, []).append(flat[picks[name]].float().cpu())

    with ExitStack() as stack:
        stack.enter_context(cache_bypassed(model))
        for i, block in enumerate(model.blocks):
            for part in ("attn", "mlp"):
                module: nn.Module = block.get_submodule(part)
                name = f"{i}.{part}"
                stack.callback(module.register_forward_hook(lambda _, args, out, name=name: keep(name, out)).remove)
        x = source.draw().to(process.device)
        for i in range(len(process)):
            x, _ = process.step(i, x, source.draw().to(process.device) if process.needs_noise(i) else None)
    total = torch.zeros(len(process), len(process), dtype=torch.float64)
    for outputs in kept.values():
        # Split guidance runs a branch twice in a step; the conditions lie side by side.
        total += relative_distances(torch.stack(outputs).view(len(process), -1).double())
    return torch.triu(total / len(kept), diagonal=1)
