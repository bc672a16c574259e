"""The rotation of ComfyUI's quantized formats (ConvRot, after QuaRot, arXiv 2404.00456): y = (x R)(W R)^T.

R holds one Hadamard matrix for each group of inputs, so that no single input sets a scale.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

ROTATIONS = (256, 64, 16, 4)  # powers of four: other Hadamard matrices are not regular


def rotation_group(width: int) -> int | None:
    """The largest group that comfy-kitchen can rotate and that divides the number of inputs."""
    return next((group for group in ROTATIONS if width % group == 0), None)


@cache
def hadamard(group: int) -> Tensor:
    """R (group, group) of one group, symmetric and orthogonal: what comfy-kitchen decodes the identity to."""
    from comfy_kitchen.tensor import TensorWiseINT8Layout

    params = TensorWiseINT8Layout.Params(
        scale=torch.ones(group, 1),
        orig_dtype=torch.float32,
        orig_shape=(group, group),
        convrot=True,
        convrot_groupsize=group,
    )
    return TensorWiseINT8Layout.dequantize(torch.eye(group, dtype=torch.int8), params)


@cache
def hadamard_on(device: torch.device, dtype: torch.dtype, group: int) -> Tensor:
    return hadamard(group).to(device, dtype)


def rotate(x: Tensor, group: int) -> Tensor:
    """x R for the rows of x (M, K), inputs or a weight; R is its own inverse."""
    matrix = hadamard_on(x.device, x.dtype, group)
    return (x.reshape(len(x), -1, group) @ matrix.T).reshape(x.shape)


def rotate_fast(x: Tensor, group: int) -> Tensor:
    """rotate up to the last bit, faster: the largest R is side (x) side, an eighth of the arithmetic."""
    if group < 256:
        return rotate(x, group)
    side = hadamard_on(x.device, x.dtype, 16)
    return (side @ (x.reshape(len(x), -1, 16, 16) @ side)).reshape(x.shape)


def rotate_hessian(hessian: Tensor, group: int) -> Tensor:
    """R^T H R (K, K), the X^T X of rotated inputs."""
    return rotate_fast(rotate_fast(hessian, group).T, group)
