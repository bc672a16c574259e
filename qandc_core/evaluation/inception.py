"""The InceptionV3 behind FID, sFID and IS: TensorFlow's 2015-12-05 graph under torchvision's parameter names.

Reads the state dict pt_inception-2015-12-05 of mseitzer/pytorch-fid and toshas/torch-fidelity.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..files import read_pickle, read_safetensors, reading
from ..values import check_finite

CLASSES = 1008
STEM_CHANNELS = 32
SIZE = 299
SPATIAL_CHANNELS = 7

Conv = Callable[..., nn.Module]
Preprocess = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class InceptionFeatures:
    """The metrics' inputs: pool (N, 2048) for FID, precision and recall; spatial (N, 2023) for sFID; probabilities.

    spatial is TensorFlow's "mixed_6/conv", the ReLU output of Mixed_6d.branch1x1 and not of Mixed_6e, of which ADM's
    evaluator keeps 7 channels. Its vectors run over rows, columns, channels, as mu_s and sigma_s of ADM's reference
    files do. probabilities (N, 1008) are the softmax of the logits without fc.bias, as in ADM and torch-fidelity.
    """

    pool: Tensor
    spatial: Tensor
    probabilities: Tensor


def to_uint8(images: Tensor) -> Tensor:
    """Rounds images in [-1, 1] to 0..255, as DiT's sample_ddp.py does before FID."""
    return (127.5 * images + 128).clamp(0, 255).to(torch.uint8)


def preprocess_pytorch_fid(images: Tensor) -> Tensor:
    """uint8 (N, 3, H, W) -> (N, 3, 299, 299) in [-1, 1] with half-pixel centres, as pytorch-fid."""
    resized = F.interpolate(images.float() / 255, (SIZE, SIZE), mode="bilinear", align_corners=False, antialias=False)
    return resized * 2 - 1


def resize_axis(images: Tensor, dim: int) -> Tensor:
    """TensorFlow 1's bilinear resize of one axis to 299: pixel i reads position i * size / 299."""
    size = images.shape[dim]
    position = torch.arange(SIZE, device=images.device) * torch.tensor(size / SIZE, device=images.device)
    low = position.long()
    weight = (position - low).view([-1 if d == dim else 1 for d in range(images.ndim)])
    left, right = images.index_select(dim, low), images.index_select(dim, (low + 1).clamp_max(size - 1))
    return left + (right - left) * weight


def preprocess_adm(images: Tensor) -> Tensor:
    """uint8 (N, 3, H, W) -> (N, 3, 299, 299) in [-1, 1), as the graph in ADM's evaluator: (x - 128) / 128."""
    return (resize_axis(resize_axis(images.float(), 3), 2) - 128) / 128


class BasicConv2d(nn.Module):
    """Convolution, batch norm, ReLU. Channel counts are those of the full network, divided by `divisor`."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        kernel: int | tuple[int, int],
        stride: int = 1,
        padding: int | str = "same",
        divisor: int = 1,
        operations: Any = nn,
    ):
        super().__init__()
        self.conv = operations.Conv2d(c_in // divisor, c_out // divisor, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out // divisor, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


def average_pool(x: Tensor) -> Tensor:
    # TensorFlow leaves the padding out of the mean.
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class InceptionA(nn.Module):
    def __init__(self, c_in: int, pool_features: int, conv: Conv):
        super().__init__()
        self.branch1x1 = conv(c_in, 64, 1)
        self.branch5x5_1 = conv(c_in, 48, 1)
        self.branch5x5_2 = conv(48, 64, 5)
        self.branch3x3dbl_1 = conv(c_in, 64, 1)
        self.branch3x3dbl_2 = conv(64, 96, 3)
        self.branch3x3dbl_3 = conv(96, 96, 3)
        self.branch_pool = conv(c_in, pool_features, 1)

    def forward(self, x: Tensor) -> Tensor:
        branch5x5 = self.branch5x5_2(self.branch5x5_1(x))
        branch3x3dbl = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), branch5x5, branch3x3dbl, self.branch_pool(average_pool(x))], 1)


class InceptionB(nn.Module):
    def __init__(self, c_in: int, conv: Conv):
        super().__init__()
        self.branch3x3 = conv(c_in, 384, 3, stride=2, padding=0)
        self.branch3x3dbl_1 = conv(c_in, 64, 1)
        self.branch3x3dbl_2 = conv(64, 96, 3)
        self.branch3x3dbl_3 = conv(96, 96, 3, stride=2, padding=0)

    def forward(self, x: Tensor) -> Tensor:
        branch3x3dbl = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), branch3x3dbl, F.max_pool2d(x, 3, stride=2)], 1)


class InceptionC(nn.Module):
    def __init__(self, c_in: int, c7: int, conv: Conv):
        super().__init__()
        self.branch1x1 = conv(c_in, 192, 1)
        self.branch7x7_1 = conv(c_in, c7, 1)
        self.branch7x7_2 = conv(c7, c7, (1, 7))
        self.branch7x7_3 = conv(c7, 192, (7, 1))
        self.branch7x7dbl_1 = conv(c_in, c7, 1)
        self.branch7x7dbl_2 = conv(c7, c7, (7, 1))
        self.branch7x7dbl_3 = conv(c7, c7, (1, 7))
        self.branch7x7dbl_4 = conv(c7, c7, (7, 1))
        self.branch7x7dbl_5 = conv(c7, 192, (1, 7))
        self.branch_pool = conv(c_in, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        branch7x7 = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        branch7x7dbl = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        branch7x7dbl = self.branch7x7dbl_5(self.branch7x7dbl_4(branch7x7dbl))
        return torch.cat([self.branch1x1(x), branch7x7, branch7x7dbl, self.branch_pool(average_pool(x))], 1)


class InceptionD(nn.Module):
    def __init__(self, c_in: int, conv: Conv):
        super().__init__()
        self.branch3x3_1 = conv(c_in, 192, 1)
        self.branch3x3_2 = conv(192, 320, 3, stride=2, padding=0)
        self.branch7x7x3_1 = conv(c_in, 192, 1)
        self.branch7x7x3_2 = conv(192, 192, (1, 7))
        self.branch7x7x3_3 = conv(192, 192, (7, 1))
        self.branch7x7x3_4 = conv(192, 192, 3, stride=2, padding=0)

    def forward(self, x: Tensor) -> Tensor:
        branch3x3 = self.branch3x3_2(self.branch3x3_1(x))
        branch7x7x3 = self.branch7x7x3_2(self.branch7x7x3_1(x))
        branch7x7x3 = self.branch7x7x3_4(self.branch7x7x3_3(branch7x7x3))
        return torch.cat([branch3x3, branch7x7x3, F.max_pool2d(x, 3, stride=2)], 1)


class InceptionE(nn.Module):
    def __init__(self, c_in: int, pool: Callable[[Tensor], Tensor], conv: Conv):
        super().__init__()
        self.pool = pool
        self.branch1x1 = conv(c_in, 320, 1)
        self.branch3x3_1 = conv(c_in, 384, 1)
        self.branch3x3_2a = conv(384, 384, (1, 3))
        self.branch3x3_2b = conv(384, 384, (3, 1))
        self.branch3x3dbl_1 = conv(c_in, 448, 1)
        self.branch3x3dbl_2 = conv(448, 384, 3)
        self.branch3x3dbl_3a = conv(384, 384, (1, 3))
        self.branch3x3dbl_3b = conv(384, 384, (3, 1))
        self.branch_pool = conv(c_in, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        branch3x3 = self.branch3x3_1(x)
        branch3x3dbl = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        branches = [self.branch1x1(x), self.branch3x3_2a(branch3x3), self.branch3x3_2b(branch3x3)]
        branches += [self.branch3x3dbl_3a(branch3x3dbl), self.branch3x3dbl_3b(branch3x3dbl)]
        return torch.cat([*branches, self.branch_pool(self.pool(x))], 1)


class Inception(nn.Module):
    """InceptionV3 of FID. `divisor` (1, 2, 4, 8 or 16) thins every layer, for tests; 1008 classes stay.

    `operations` holds the classes of its layers, as for the DiT.
    """

    def __init__(self, divisor: int = 1, preprocess: Preprocess = preprocess_pytorch_fid, operations: Any = nn):
        super().__init__()
        conv = partial(BasicConv2d, divisor=divisor, operations=operations)
        self.preprocess = preprocess
        self.Conv2d_1a_3x3 = conv(3 * divisor, STEM_CHANNELS, 3, stride=2, padding=0)
        self.Conv2d_2a_3x3 = conv(32, 32, 3, padding=0)
        self.Conv2d_2b_3x3 = conv(32, 64, 3)
        self.Conv2d_3b_1x1 = conv(64, 80, 1)
        self.Conv2d_4a_3x3 = conv(80, 192, 3, padding=0)
        self.Mixed_5b = InceptionA(192, 32, conv)
        self.Mixed_5c = InceptionA(256, 64, conv)
        self.Mixed_5d = InceptionA(288, 64, conv)
        self.Mixed_6a = InceptionB(288, conv)
        self.Mixed_6b = InceptionC(768, 128, conv)
        self.Mixed_6c = InceptionC(768, 160, conv)
        self.Mixed_6d = InceptionC(768, 160, conv)
        self.Mixed_6e = InceptionC(768, 192, conv)
        self.Mixed_7a = InceptionD(768, conv)
        self.Mixed_7b = InceptionE(1280, average_pool, conv)
        # The graph takes the maximum here, against the paper; FID keeps the quirk.
        self.Mixed_7c = InceptionE(2048, partial(F.max_pool2d, kernel_size=3, stride=1, padding=1), conv)
        self.fc = operations.Linear(2048 // divisor, CLASSES)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> InceptionFeatures:
        """Features of images (N, 3, H, W) in uint8, of any size; `to_uint8` makes them from [-1, 1]."""
        if images.dtype != torch.uint8:
            raise ValueError(f"Inception reads uint8 images, not {images.dtype}; to_uint8 converts from [-1, 1].")
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(self.preprocess(images))))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, stride=2))))
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))
        spatial = self.Mixed_6d.branch1x1(x)[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        x = self.Mixed_7a(self.Mixed_6e(self.Mixed_6d(x)))
        pool = self.Mixed_7c(self.Mixed_7b(x)).mean((2, 3))
        return InceptionFeatures(pool, spatial, F.linear(pool, self.fc.weight).softmax(1))


def read_state(path: str | Path) -> dict[str, Tensor]:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There are no Inception weights at {path}.")
    return read_safetensors(path)[0] if path.suffix == ".safetensors" else read_pickle(path)


def check_state(state: dict[str, Tensor], model: Inception, path: str | Path) -> None:
    expected = {name: value.shape for name, value in model.state_dict().items() if "num_batches" not in name}
    faults = {
        "missing": sorted(expected.keys() - state.keys()),
        "unexpected": sorted(state.keys() - expected.keys()),
        "of another shape": sorted(n for n in expected.keys() & state.keys() if expected[n] != state[n].shape),
    }
    found = [f"{len(names)} keys {fault} (first: {names[0]})" for fault, names in faults.items() if names]
    if found:
        raise ValueError(f"{path} is not an InceptionV3 state dict as pytorch-fid publishes it: {', '.join(found)}.")


def load_inception(path: str | Path, preprocess: Preprocess = preprocess_pytorch_fid) -> Inception:
    """Reads a .pth or .safetensors state dict of the published names; the thinning follows from the first layer.

    Raises ValueError where keys are missing, unexpected or of another shape.
    """
    with reading(path):
        # pytorch-fid's file has num_batches_tracked, the one that torch-fidelity converts has not; inference needs
        # neither.
        state = {name: value for name, value in read_state(path).items() if "num_batches" not in name}
        stem = state.get("Conv2d_1a_3x3.conv.weight", torch.empty(STEM_CHANNELS))
        channels = len(stem) if stem.ndim and len(stem) else STEM_CHANNELS
        model = Inception(max(1, STEM_CHANNELS // channels), preprocess)
        check_state(state, model, path)
        check_finite(state)
        model.load_state_dict(state, strict=False)
    return model
