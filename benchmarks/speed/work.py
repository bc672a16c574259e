"""The arithmetic, bytes and launches that a DiT step asks for, and the least time they can take on a machine."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from qandc_core.models.dit import FREQUENCIES, DiT, DiTConfig
from qandc_core.models.layers import DIT_SKIP, named_linears
from qandc_core.quantization.formats import BY_NAME, Format, fitting

from .ceilings import Ceilings

FLOAT_BYTES = {"float32": 4, "tf32": 4, "bfloat16": 2}
SCALE_BYTES = 4  # of a row of inputs


@dataclass(frozen=True)
class Gemm:
    """`count` products of inputs (rows, inner) and weights (columns, inner). `quantizable`: quantize_model takes the
    layer with DIT_SKIP. `feeds_product`: an element-wise function aside, only another product reads the outputs.
    """

    name: str
    rows: int
    columns: int
    inner: int
    count: int = 1
    quantizable: bool = False
    feeds_product: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        """(M, N, K)."""
        return self.rows, self.columns, self.inner

    @property
    def flops(self) -> int:
        """2 M N K for each."""
        return 2 * self.rows * self.columns * self.inner * self.count


@dataclass(frozen=True)
class AttentionWork:
    """`count` attentions of q, k and v (batch, heads, tokens, width)."""

    batch: int
    heads: int
    tokens: int
    width: int
    count: int

    @property
    def flops(self) -> int:
        """2 T T d for q k^T and again for its product with v."""
        return 4 * self.batch * self.heads * self.tokens**2 * self.width * self.count

    @property
    def values(self) -> int:
        """Entries of q, k, v and the output."""
        return 4 * self.batch * self.heads * self.tokens * self.width * self.count


@dataclass(frozen=True)
class StepWork:
    """One step. `once` are the products that a run of `steps` steps does in one go, `normalisations` the passes over
    the activations that no product can end with.
    """

    gemms: tuple[Gemm, ...]
    attention: AttentionWork
    normalisations: int
    once: tuple[Gemm, ...] = ()
    steps: int = 1

    @property
    def gemm_flops(self) -> int:
        """Of the step's own products, the patch embedding's convolution among them."""
        return sum(gemm.flops for gemm in self.gemms)

    @property
    def flops(self) -> int:
        return self.gemm_flops + self.attention.flops

    @property
    def shapes(self) -> tuple[tuple[int, int, int], ...]:
        """(M, N, K) of the products that quantization takes, each once."""
        return tuple(dict.fromkeys(gemm.shape for gemm in self.gemms if gemm.quantizable))


def step_work(config: DiTConfig, rows: int, steps: int | None = None) -> StepWork:
    """A step of `rows` latents, 2 x images with guidance. With `steps` the modulations of all of a run's steps come
    from one product for each layer, whose rows are steps x conditions, one condition for each latent.
    """
    tokens = config.side**2
    main = mark_quantizable(main_gemms(config, rows, tokens), config)
    conditions = mark_quantizable(condition_gemms(config, rows * (steps or 1), steps or rows), config)
    attention = AttentionWork(
        rows, config.num_heads, tokens, config.hidden_size // config.num_heads, config.depth
    )  # fmt: skip
    normalisations = 2 * config.depth + 1
    if steps is None:
        return StepWork((*main, *conditions), attention, normalisations)
    return StepWork(main, attention, normalisations, conditions, steps)


def main_gemms(config: DiTConfig, rows: int, tokens: int) -> list[Gemm]:
    """The products over all tokens."""
    width, depth, patch = config.hidden_size, config.depth, config.patch_size**2
    hidden, m = round(width * config.mlp_ratio), rows * tokens
    return [
        Gemm("x_embedder.proj", m, width, config.in_channels * patch),
        Gemm("attn.qkv", m, 3 * width, width, depth),
        Gemm("attn.proj", m, width, width, depth),
        Gemm("mlp.fc1", m, hidden, width, depth, feeds_product=True),
        Gemm("mlp.fc2", m, width, hidden, depth),
        Gemm("final_layer.linear", m, patch * config.out_channels, width),
    ]


def condition_gemms(config: DiTConfig, rows: int, times: int) -> list[Gemm]:
    """The products over conditions: embeddings of `times` timesteps, modulations of `rows` timesteps with classes."""
    width = config.hidden_size
    return [
        Gemm("t_embedder.mlp.0", times, width, FREQUENCIES),
        Gemm("t_embedder.mlp.2", times, width, width),
        Gemm("adaLN_modulation.1", rows, 6 * width, width, config.depth),
        Gemm("final_layer.adaLN_modulation.1", rows, 2 * width, width),
    ]


def mark_quantizable(gemms: Iterable[Gemm], config: DiTConfig) -> tuple[Gemm, ...]:
    """By the names of a model of one block without storage."""
    model = DiT(replace(config, depth=1), device="meta")
    names = {name.removeprefix("blocks.0.") for name, _ in named_linears(model, DIT_SKIP)}
    return tuple(replace(gemm, quantizable=gemm.name in names) for gemm in gemms)


# Formats: float32, tf32 or bfloat16 throughout, or W8A8 or W4A8 with everything else in the float format `rest`.


def stored_format(gemm: Gemm, format: str) -> Format | None:
    """The layer's format; None where it stays float."""
    able = fitting(BY_NAME[format], gemm.columns, gemm.inner) if format in BY_NAME and gemm.quantizable else ()
    return able[0] if able else None


def float_format(format: str, rest: str) -> str:
    return rest if format in BY_NAME else format


def product_format(gemm: Gemm, format: str, rest: str) -> str:
    """Which ceiling the product is held to."""
    return float_format(format, rest) if stored_format(gemm, format) is None else "int8"


def weight_bytes(gemm: Gemm, format: str, rest: str = "bfloat16") -> int:
    """Weights with their scales, without biases."""
    stored = stored_format(gemm, format)
    if stored is None:
        return FLOAT_BYTES[float_format(format, rest)] * gemm.columns * gemm.inner * gemm.count
    return stored.bytes(gemm.columns, gemm.inner) * gemm.count


def activation_bytes(gemm: Gemm, format: str, rest: str = "bfloat16") -> int:
    """Inputs read once and outputs written once by an ideal fused product: codes in and, where only a quantized product
    follows, out; a float32 scale for each row of inputs.
    """
    size = FLOAT_BYTES[float_format(format, rest)]
    quantized = stored_format(gemm, format) is not None
    inputs = gemm.rows * (gemm.inner + SCALE_BYTES if quantized else size * gemm.inner)
    outputs = gemm.rows * gemm.columns * (1 if quantized and gemm.feeds_product else size)
    return (inputs + outputs) * gemm.count


def attention_bytes(attention: AttentionWork, format: str, rest: str = "bfloat16") -> int:
    """q, k, v read and the output written, each once."""
    return attention.values * FLOAT_BYTES[float_format(format, rest)]


def launches(work: StepWork, format: str) -> int:
    """Kernels of an ideal fused step: products, attentions, normalisations (which round too), and where formats are
    quantized one rounding of each attention's output.
    """
    roundings = work.attention.count if format in BY_NAME else 0
    return sum(gemm.count for gemm in work.gemms) + work.attention.count + work.normalisations + roundings


def gemm_floor(gemm: Gemm, ceilings: Ceilings, format: str, rest: str) -> float | None:
    """max(2 M N K / ceiling, bytes of weights, inputs and outputs / bandwidth) in seconds."""
    rate = ceilings.rate(product_format(gemm, format, rest))
    moved = weight_bytes(gemm, format, rest) + activation_bytes(gemm, format, rest)
    return None if rate is None else max(gemm.flops / rate, moved / ceilings.bandwidth)


def attention_floor(attention: AttentionWork, ceilings: Ceilings, format: str, rest: str) -> float | None:
    """max(FLOPs / ceiling of the float format, bytes / bandwidth) in seconds."""
    rate = ceilings.rate(float_format(format, rest))
    moved = attention_bytes(attention, format, rest)
    return None if rate is None else max(attention.flops / rate, moved / ceilings.bandwidth)


def floor_seconds(work: StepWork, ceilings: Ceilings, format: str, rest: str = "bfloat16") -> float | None:
    """sum over products and attention of max(operations / ceiling, bytes / bandwidth) + launches x launch seconds, and
    the step's share of what a run does once. Normalisations count as launches alone. None where a ceiling is unknown.
    """
    parts = [gemm_floor(gemm, ceilings, format, rest) for gemm in work.gemms]
    parts.append(attention_floor(work.attention, ceilings, format, rest))
    once = [gemm_floor(gemm, ceilings, format, rest) for gemm in work.once]
    known, shared = [p for p in parts if p is not None], [p for p in once if p is not None]
    if len(known) + len(shared) < len(parts) + len(once):
        return None
    return sum(known) + sum(shared) / work.steps + launches(work, format) * (ceilings.launch or 0.0)


def product_ceiling(work: StepWork, ceilings: Ceilings, format: str, rest: str = "bfloat16") -> float | None:
    """Operations/s of all the step's products were each at the ceiling of its format."""
    seconds = 0.0
    for gemm in work.gemms:
        rate = ceilings.rate(product_format(gemm, format, rest))
        if rate is None:
            return None
        seconds += gemm.flops / rate
    return work.gemm_flops / seconds


def step_weight_bytes(work: StepWork, format: str, rest: str = "bfloat16") -> int:
    """Of the weights that a step reads."""
    return sum(weight_bytes(gemm, format, rest) for gemm in work.gemms)


def step_activation_bytes(work: StepWork, format: str, rest: str = "bfloat16") -> int:
    """Of the activations that a step reads and writes, attention's included."""
    moved = sum(activation_bytes(gemm, format, rest) for gemm in work.gemms)
    return moved + attention_bytes(work.attention, format, rest)
