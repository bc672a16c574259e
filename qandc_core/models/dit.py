"""The class-conditional diffusion transformer (DiT, arXiv 2212.09748)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..values import real_number, whole_number

FREQUENCIES = 256  # width of the sinusoidal timestep embedding
PREDICTIONS = ("epsilon", "sample")


@dataclass(frozen=True)
class DiTConfig:
    """Shape of a DiT. `num_classes` leaves out the null class, which has the id `num_classes`.

    Raises ValueError on sizes that are not positive numbers and on conventions that no DiT has.
    """

    input_size: int = 32
    patch_size: int = 2
    in_channels: int = 4
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    num_classes: int = 1000
    learn_sigma: bool = True
    norm2_eps: float = 1e-6
    # diffusers spaces the 128 frequencies over 127 intervals, the original code over 128.
    frequency_shift: int = 0
    prediction: str = "epsilon"  # or "sample": the clean image; diffusers' names
    has_null_class: bool = True  # False: trained without label dropout, so there is nothing to guide away from

    def __post_init__(self) -> None:
        values = vars(self)
        for name in ("input_size", "patch_size", "in_channels", "hidden_size", "num_heads", "num_classes"):
            whole_number(values, name, 1, 2**24)
        whole_number(values, "depth", 0, 2**16)
        whole_number(values, "frequency_shift", 0, FREQUENCIES // 2 - 1)
        real_number(values, "mlp_ratio", 0, 2**16)
        real_number(values, "norm2_eps", 0, 1)
        if not isinstance(self.learn_sigma, bool) or not isinstance(self.has_null_class, bool):
            raise ValueError("learn_sigma and has_null_class are either true or false.")
        if self.prediction not in PREDICTIONS:
            raise ValueError(f"prediction is {self.prediction!r}, expected one of {', '.join(PREDICTIONS)}.")

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of an image or latent."""
        return (self.in_channels, self.input_size, self.input_size)

    @property
    def side(self) -> int:
        """Tokens in a row or column of an image."""
        return self.input_size // self.patch_size

    @property
    def num_embeddings(self) -> int:
        return self.num_classes + self.has_null_class


def timestep_embedding(t: Tensor, shift: int = 0) -> Tensor:
    """Sinusoidal embedding of timesteps (N,) -> (N, 256) in float32, which holds t = 999 exactly."""
    half = FREQUENCIES // 2
    exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / (half - shift)
    angle = t.float()[:, None] * exponent.exp()[None]
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def sincos_positions(width: int, rows: int, cols: int, base: int) -> Tensor:
    """Fixed 2-D sine-cosine position embedding (1, rows * cols, width), columns first as in the original."""

    def axis(positions: Tensor) -> Tensor:
        omega = 1.0 / 10000 ** (torch.arange(width // 4, dtype=torch.float64) / (width / 4))
        angle = positions.flatten()[:, None] * omega[None]
        return torch.cat([angle.sin(), angle.cos()], dim=1)

    y = torch.arange(rows, dtype=torch.float64) * (base / rows)
    x = torch.arange(cols, dtype=torch.float64) * (base / cols)
    grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
    return torch.cat([axis(grid_x), axis(grid_y)], dim=1).float()[None]


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale[:, None]) + shift[:, None]


class PatchEmbed(nn.Module):
    def __init__(self, config: DiTConfig, operations: Any, **factory: Any):
        super().__init__()
        p = config.patch_size
        self.proj = operations.Conv2d(config.in_channels, config.hidden_size, kernel_size=p, stride=p, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> tokens (N, T, D), row-major: every block adds to this layout and normalizes along D."""
        return self.proj(x).flatten(2).transpose(1, 2).contiguous()


class TimestepEmbedder(nn.Module):
    def __init__(self, config: DiTConfig, operations: Any, **factory: Any):
        super().__init__()
        width = config.hidden_size
        self.shift = config.frequency_shift
        self.mlp = nn.Sequential(
            operations.Linear(FREQUENCIES, width, **factory), nn.SiLU(), operations.Linear(width, width, **factory)
        )

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        return self.mlp(timestep_embedding(t, self.shift).to(dtype))


class LabelEmbedder(nn.Module):
    def __init__(self, config: DiTConfig, operations: Any, **factory: Any):
        super().__init__()
        self.embedding_table = operations.Embedding(config.num_embeddings, config.hidden_size, **factory)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class Attention(nn.Module):
    def __init__(self, config: DiTConfig, operations: Any, **factory: Any):
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = operations.Linear(config.hidden_size, 3 * config.hidden_size, **factory)
        self.proj = operations.Linear(config.hidden_size, config.hidden_size, **factory)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, config: DiTConfig, operations: Any, **factory: Any):
        super().__init__()
        hidden = round(config.hidden_size * config.mlp_ratio)
        self.fc1 = operations.Linear(config.hidden_size, hidden, **factory)
        self.fc2 = operations.Linear(hidden, config.hidden_size, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class DiTBlock(nn.Module):
    """adaLN-Zero block. The two branches are methods because they are what FORA caches: outputs before the gate."""

    def __init__(self, config: DiTConfig, operations: Any, **factory: Any):
        super().__init__()
        width = config.hidden_size
        self.norm1 = operations.LayerNorm(width, elementwise_affine=False, eps=1e-6, **factory)
        self.attn = Attention(config, operations, **factory)
        self.norm2 = operations.LayerNorm(width, elementwise_affine=False, eps=config.norm2_eps, **factory)
        self.mlp = Mlp(config, operations, **factory)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), operations.Linear(width, 6 * width, **factory))

    def attention_branch(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return self.attn(modulate(self.norm1(x), shift, scale))

    def mlp_branch(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return self.mlp(modulate(self.norm2(x), shift, scale))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_a[:, None] * self.attention_branch(x, shift_a, scale_a)
        return x + gate_m[:, None] * self.mlp_branch(x, shift_m, scale_m)


class FinalLayer(nn.Module):
    def __init__(self, config: DiTConfig, operations: Any, **factory: Any):
        super().__init__()
        width = config.hidden_size
        self.norm_final = operations.LayerNorm(width, elementwise_affine=False, eps=1e-6, **factory)
        self.linear = operations.Linear(width, config.patch_size**2 * config.out_channels, **factory)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), operations.Linear(width, 2 * width, **factory))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


SIZES_KEPT = 4  # position embeddings of other sizes than the model's own that stay on the device


class PatchGrid(nn.Module):
    """A model of tokens that are patches of a latent; `pos_embed` (1, T, D) holds the positions of its own size."""

    config: DiTConfig
    pos_embed: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.other_positions: dict[tuple, Tensor] = {}

    @property
    def null_class(self) -> int:
        """Raises ValueError where the model has none."""
        if not self.config.has_null_class:
            raise ValueError(
                f"This model has {self.config.num_classes} classes and none for no class, so there is nothing to guide "
                "away from; sample it with guidance scale 1."
            )
        return self.config.num_classes

    def positions(self, rows: int, cols: int, like: Tensor | None = None) -> Tensor:
        """(1, rows * cols, D) in the device and dtype of `like`; other sizes than the model's own are computed once."""
        side, like = self.config.side, self.pos_embed if like is None else like
        if (rows, cols) == (side, side):
            return self.pos_embed.to(like)
        key = rows, cols, like.device, like.dtype
        if key not in self.other_positions:
            with torch.inference_mode(False):  # a later call may be one that autograd records
                found = sincos_positions(self.config.hidden_size, rows, cols, side).to(self.pos_embed.dtype).to(like)
            while len(self.other_positions) >= SIZES_KEPT:
                self.other_positions.pop(next(iter(self.other_positions)))
            self.other_positions[key] = found
        return self.other_positions[key]

    def unpatchify(self, x: Tensor, rows: int, cols: int) -> Tensor:
        p = self.config.patch_size
        x = x.unflatten(1, (rows, cols)).unflatten(-1, (p, p, -1))
        return torch.einsum("nhwpqc->nchpwq", x).reshape(len(x), -1, rows * p, cols * p)


def check_open(model: nn.Module, what: str) -> None:
    """Raises ValueError on a FusedDiT, which has layers but none to be changed or observed."""
    refuse = getattr(model, "refuse", None)
    if refuse is not None:
        refuse(what)


class DiT(PatchGrid):
    """Class-conditional DiT with adaLN-Zero blocks (arXiv 2212.09748, section 3.2).

    Layer classes come from `operations` (default torch.nn), so a host can pass its own.
    Parameter names are those of the published checkpoints.
    """

    def __init__(
        self,
        config: DiTConfig,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        operations: Any = nn,
    ):
        super().__init__()
        self.config = config
        factory: dict[str, Any] = {"dtype": dtype, "device": device}
        self.x_embedder = PatchEmbed(config, operations, **factory)
        self.t_embedder = TimestepEmbedder(config, operations, **factory)
        self.y_embedder = LabelEmbedder(config, operations, **factory)
        self.blocks = nn.ModuleList(DiTBlock(config, operations, **factory) for _ in range(config.depth))
        self.final_layer = FinalLayer(config, operations, **factory)
        positions = sincos_positions(config.hidden_size, config.side, config.side, config.side)
        self.register_buffer("pos_embed", positions.to(**factory))

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor) -> Tensor:
        """Predicts the noise (or the clean image), and with `learn_sigma` the variance channels after it.

        x (N, C, H, W); timesteps (N,) in training steps 0..999; y (N,) int64 class ids -> (N, out_channels, H, W).
        """
        p = self.config.patch_size
        rows, cols = x.shape[-2] // p, x.shape[-1] // p
        x = self.x_embedder(x)
        x = x + self.positions(rows, cols, x)
        c = self.t_embedder(timesteps, x.dtype) + self.y_embedder(y).to(x.dtype)
        for block in self.blocks:
            x = block(x, c)
        return self.unpatchify(self.final_layer(x, c), rows, cols)


def initialize_weights(model: DiT) -> None:
    """Initialisation of the DiT paper: xavier linears, adaLN and output layers zero (adaLN-Zero)."""
    layers: Any = model  # nn.Module types its attributes too loosely to index them
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.xavier_uniform_(layers.x_embedder.proj.weight.flatten(1))
    nn.init.zeros_(layers.x_embedder.proj.bias)
    nn.init.normal_(layers.y_embedder.embedding_table.weight, std=0.02)
    for layer in (layers.t_embedder.mlp[0], layers.t_embedder.mlp[2]):
        nn.init.normal_(layer.weight, std=0.02)
    zero = [block.adaLN_modulation[1] for block in layers.blocks]
    zero += [layers.final_layer.adaLN_modulation[1], layers.final_layer.linear]
    for layer in zero:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
