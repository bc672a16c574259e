"""Classifier-free guidance (arXiv 2207.12598)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def guided_prediction(
    model: nn.Module,
    x: Tensor,
    t: Tensor,
    y: Tensor,
    null_class: int,
    scale: float,
    channels: int | None,
    batched: bool,
) -> tuple[Tensor, Tensor | None]:
    """Guided noise (N, C, H, W), and the variance output of the conditional half where the model has one.

    x (N, C, H, W), t and y (N,). Guides the first `channels` channels, all where None; `batched` evaluates both
    conditions in one call, the conditional half first.
    """
    if scale == 1:
        return split_variance(model(x, t, y), x.shape[1])
    null = torch.full_like(y, null_class)
    if batched:
        both = model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null]))
        conditional, unconditional = both.chunk(2)
    else:
        conditional, unconditional = model(x, t, y), model(x, t, null)
    return guide(conditional, unconditional, x.shape[1], scale, channels)


def guide(
    conditional: Tensor, unconditional: Tensor, width: int, scale: float, channels: int | None
) -> tuple[Tensor, Tensor | None]:
    """Both predictions (N, width or 2 width, H, W) -> guided noise and the conditional variance output."""
    eps, v = split_variance(conditional, width)
    eps_null, _ = split_variance(unconditional, width)
    guided = eps_null + scale * (eps - eps_null)
    if channels is not None:
        guided = torch.cat([guided[:, :channels], eps[:, channels:]], dim=1)
    return guided, v


def split_variance(output: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
    return (output, None) if output.shape[1] == channels else (output[:, :channels], output[:, channels:])
