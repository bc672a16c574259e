"""The models of the speed table: one DiT with random weights, as it is, compiled, fused and in every integer format."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from qandc_core.calibration.choice import CalibrationConfig
from qandc_core.calibration.run import calibrate
from qandc_core.calibration.trajectories import DiTTrajectories
from qandc_core.diffusion.process import SamplingConfig
from qandc_core.fused.dit import FusedDiT, fuse_dit
from qandc_core.models.dit import DiT, DiTConfig, initialize_weights, sincos_positions
from qandc_core.models.layers import DIT_SKIP, named_linears
from qandc_core.quantization.model import NATIVE_SKIP, quantize_model
from qandc_core.quantization.native import NativeConfig, NativeLayer, quantize_weight

PAPER = "fp32 eager, 250 steps"  # the paper's 1x
QANDC, PACKED = "W8A8 rotated", "W4A8"


@dataclass(frozen=True)
class Subject:
    """A way to run the model; `format` is that of the products, as speed.work names it. `graph`: as CUDA graphs."""

    name: str
    format: str
    make: Callable[[DiT], DiT | FusedDiT]
    graph: bool = True
    steps: int | None = None  # instead of the setting's
    baseline: bool = False  # full precision as torch runs it
    kitchen: bool = False  # comfy-kitchen's kernels in CUDA graphs: a failed capture spoils what comes after
    essential: bool = False  # first in every setting


def random_dit(config: DiTConfig, device: torch.device | str = "cpu", seed: int = 0) -> DiT:
    """Float32 weights of the paper's initialisation, with random values where that has zeros, so that every layer acts
    and activations keep their size.
    """
    torch.manual_seed(seed)
    model = DiT(config, device=device)
    initialize_weights(model)
    for name, parameter in model.named_parameters():
        if "adaLN_modulation" in name or name.startswith("final_layer.linear"):
            nn.init.normal_(parameter, std=0.02)
    return model.eval()


def resize(model: DiT | FusedDiT, input_size: int) -> None:
    """Latents of another size, whose positions come from the same formula."""
    side = input_size // model.config.patch_size
    model.config = replace(model.config, input_size=input_size)
    model.pos_embed = sincos_positions(model.config.hidden_size, side, side, side).to(model.pos_embed)


def half_precision(device: torch.device) -> torch.dtype:
    """What everything but integers is in: CPUs multiply bfloat16 no faster."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def float_subjects(device: torch.device) -> list[Subject]:
    """The paper's baseline, and full precision from torch's plain loop to our fused one; the first plain one is what
    errors are against.
    """
    dtype = half_precision(device)
    name, format = ("bf16", "bfloat16") if dtype == torch.bfloat16 else ("fp32", "float32")

    def plain(model: DiT) -> DiT:
        return copy.deepcopy(model).to(dtype)

    def blocks_compiled(model: DiT) -> DiT:
        made = plain(model)
        for block in made.blocks:
            block.compile(dynamic=False)
        return made

    rows = [
        Subject(f"{name} eager", format, plain, graph=False, baseline=True),
        Subject(f"{name} compiled", format, blocks_compiled, graph=False, baseline=True),
    ]
    if device.type == "cuda":
        rows += [
            Subject(f"{name} CUDA graph", format, plain, baseline=True, essential=True),
            Subject(f"{name} compiled, CUDA graph", format, blocks_compiled, baseline=True, essential=True),
            Subject(PAPER, "float32", copy.deepcopy, graph=False, steps=250),
        ]
    return [*rows, Subject(f"{name} fused", format, lambda model: fuse_dit(plain(model), "reference", compile=True))]


def integer_subjects(device: torch.device, kernels: str) -> list[Subject]:
    """Per token, in ComfyUI's rotated format as Quantize makes it, static; W4A8, whose kernels are comfy-kitchen's; and
    both formats with modulations left in full precision.
    """
    made, packed = Maker(device, kernels), Maker(device, "kitchen")
    static = Maker(device, "reference" if kernels == "kitchen" else kernels)  # comfy-kitchen has no static grids
    return [
        Subject("W8A8 dynamic", "W8A8", made.per_token),
        Subject(QANDC, "W8A8", partial(made.native, format="W8A8"), essential=True),
        Subject("W8A8 static", "W8A8", static.static),
        Subject(PACKED, "W4A8", partial(packed.native, format="W4A8"), kitchen=True),
        Subject(f"{QANDC}, float modulations", "W8A8", partial(made.native, format="W8A8", skip=DIT_SKIP)),
        Subject(
            f"{PACKED}, float modulations", "W4A8", partial(packed.native, format="W4A8", skip=DIT_SKIP), kitchen=True
        ),
    ]


def kernel_subjects(device: torch.device, kernels: Sequence[str]) -> list[Subject]:
    """W8A8 with rotation on each set of kernels."""
    makers = {name: partial(Maker(device, name).native, format="W8A8") for name in kernels}
    return [
        Subject(f"{QANDC}, {name} kernels", "W8A8", make, kitchen=name == "kitchen") for name, make in makers.items()
    ]


@dataclass(frozen=True)
class Maker:
    """Fused models on one set of kernels; the reference kernels are compiled."""

    device: torch.device
    kernels: str

    def half(self, model: DiT) -> DiT:
        return copy.deepcopy(model).to(half_precision(self.device))

    def fuse(self, model: DiT, layers: dict[str, NativeLayer | None] | None = None) -> FusedDiT:
        return fuse_dit(model, self.kernels, layers, compile=self.kernels == "reference")

    def per_token(self, model: DiT) -> FusedDiT:
        half = self.half(model)
        quantize_model(half, 8, 8, DIT_SKIP)
        return self.fuse(half)

    def static(self, model: DiT) -> FusedDiT:
        """Grids of the bounds that inputs have in a short run."""
        half = self.half(model)
        runs = DiTTrajectories(half, [0, 1], SamplingConfig(steps=4, sampler="ddim"))
        everything = CalibrationConfig(2, samples=8, selection="random", hessians=False, held_out=0)
        quantize_model(half, 8, 8, DIT_SKIP, calibrate(runs, everything))
        return self.fuse(half)

    @torch.no_grad()
    def native(self, model: DiT, format: str, skip: tuple[str, ...] = NATIVE_SKIP) -> FusedDiT:
        """Layers in ComfyUI's format, rounded to nearest."""
        half, config = self.half(model), NativeConfig(format=format, clip_search=False)
        linears = named_linears(half, skip)
        layers = {name: quantize_weight(name, linear.weight, linear.bias, config) for name, linear in linears}
        return self.fuse(half, layers)


def model_bytes(model: nn.Module) -> int:
    """Of parameters and buffers, each once."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.nbytes for t in tensors.values())
