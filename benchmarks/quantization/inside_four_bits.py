"""One model and seed of `python -m benchmarks.quantization.four_bits`: runs in ComfyUI's Python, prints JSON.

argv: checkout, base directory with the pack, options as JSON.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import fidelity
import torch
from host import Host
from subjects import Study, over_seeds
from torch import Tensor, nn

CALIBRATION_SEED, IMAGE_SEED = 1100, 40000
JUDGED, DAMPING = 16, 0.07  # as Quantize's with as many samples as inputs
PLAN = {"trajectories": 8, "samples": 64}
GROUP = 64  # of awq_w4a16, or the largest half of it that divides a layer's inputs
MODULATIONS = "adaLN"
Answer = Callable[[Tensor], Tensor]


class Rounding:
    """What one layer answers with its weight in each format."""

    def __init__(self, host: Host, module: nn.Module, hessian: Tensor):
        self.weight, self.bias, self.hessian = module.weight.detach().float(), module.bias, hessian
        self.grids, self.gptq, rotation = (
            host.module(f"qandc_core.quantization.{name}") for name in ("grids", "gptq", "rotation")
        )
        self.group = rotation.rotation_group(self.weight.shape[1])
        self.rotate, self.rotate_hessian = rotation.rotate, rotation.rotate_hessian

    def rotated(self, weight_bits: int, input_bits: int, gptq: bool) -> Answer:
        """convrot_w4a4's arithmetic at any widths: one scale for each row of rotated weights and of rotated inputs."""
        grids, group = self.grids, self.group
        weight = self.rotate(self.weight, group)
        grid = grids.weight_grid(weight, weight_bits, symmetric=True)
        codes = grids.quantize(weight, grid)
        if gptq:
            codes = self.gptq.gptq_codes(weight, self.rotate_hessian(self.hessian, group), grid, DAMPING)
        rounded = grids.dequantize(codes, grid)

        def answer(x: Tensor) -> Tensor:
            x = self.rotate(x.float(), group)
            tokens = grids.token_grid(x, input_bits)
            return grids.dequantize(grids.quantize(x, tokens), tokens) @ rounded.T

        return answer

    def awq(self, gptq: bool) -> Answer:
        """awq_w4a16's arithmetic: groups of inputs with a scale and a zero point, inputs as they are."""
        grids, group = self.grids, GROUP
        while self.weight.shape[1] % group:
            group //= 2
        parts = self.weight.unflatten(1, (-1, group))
        low, high = parts.amin(2), parts.amax(2)
        scale = ((high - low) / 15).clamp(min=grids.TINY)
        if not gptq:
            codes = ((parts - low[..., None]) / scale[..., None]).round()
            rounded = (codes * scale[..., None] + low[..., None]).flatten(1)
        else:
            rounded = torch.empty_like(self.weight)

            def round_column(number: int, column: Tensor) -> tuple[Tensor, Tensor]:
                s, least = scale[:, number // group], low[:, number // group]
                codes = ((column - least) / s).round().clamp(0, 15)
                rounded[:, number] = codes * s + least
                return codes.to(torch.int8), rounded[:, number]

            self.gptq.gptq(self.weight, self.hessian, round_column, DAMPING)
        return lambda x: x.float() @ rounded.T


@contextmanager
def answering(network: nn.Module, answers: dict[str, tuple[Answer, Tensor | None]]) -> Iterator[None]:
    """While it lasts, these layers answer what the functions make of their inputs."""

    def hook_of(answer: Answer, bias: Tensor | None):
        def hook(_: nn.Module, args: tuple, output: Tensor) -> Tensor:
            y = answer(args[0].flatten(0, -2))
            return (y if bias is None else y + bias).view(output.shape).to(output.dtype)

        return hook

    handles = [network.get_submodule(name).register_forward_hook(hook_of(*pair)) for name, pair in answers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def check_kernels(layers: dict[str, Rounding]) -> int:
    """Layers of sizes that comfy-kitchen's convrot_w4a4 takes, whose kernel answers the same."""
    from comfy_kitchen.tensor.convrot_w4a4 import convrot_w4a4_linear, quantize_convrot_w4a4_weight

    same = 0
    for layer in layers.values():
        if layer.weight.shape[1] % 64 == 0:
            x = torch.randn(8, layer.weight.shape[1], generator=torch.Generator().manual_seed(1))
            packed, scale = quantize_convrot_w4a4_weight(layer.weight, layer.group)
            exact = convrot_w4a4_linear(x, packed, scale, None, layer.group)
            assert torch.allclose(layer.rotated(4, 4, gptq=False)(x), exact, rtol=1e-3, atol=1e-3 * float(exact.std()))
            same += 1
    return same


def rows(study: Study, seed: int) -> list[dict[str, Any]]:
    native, judging = (study.host.module(f"nodes.comfyui.quantize.{name}") for name in ("native", "judge"))
    source = study.subject.patcher
    calibration = study.calibration(source, CALIBRATION_SEED + 10 * seed, **PLAN)
    judge = judging.HeldOutError(source, study.calls[:: len(study.calls) // JUDGED], lambda: None)
    reference, _ = study.subject.images(source, IMAGE_SEED + seed)
    network, found = source.model.diffusion_model, []
    names = native.chosen_layers(source, native.NativeSettings("W4A8"))
    layers = {
        name: Rounding(study.host, network.get_submodule(name), seen.second_moment(torch.device("cpu")))
        for name, seen in calibration.statistics.items()
        if name in names
    }

    def row(name: str, only: str, make: Callable[[Rounding], Answer]) -> None:
        chosen = {key: (make(layer), layer.bias) for key, layer in layers.items() if only in key}
        with answering(network, chosen):
            images, _ = study.subject.images(source, IMAGE_SEED + seed)
            error = judge.of_model(source)[0]
        errors = fidelity.relative_l2(images, reference)
        found.append({"name": name, "layers": len(chosen), "model": error, "images": sum(errors) / len(errors)})
        print(found[-1], file=sys.stderr, flush=True)

    judge.prepare()
    for rounding, gptq in (("nearest", False), ("GPTQ", True)):
        row(f"convrot_w4a4, {rounding}", "", lambda layer, g=gptq: layer.rotated(4, 4, g))
        row(f"the same weights with 8-bit inputs, {rounding}", "", lambda layer, g=gptq: layer.rotated(4, 8, g))
        row(f"awq_w4a16 of modulations, {rounding}", MODULATIONS, lambda layer, g=gptq: layer.awq(g))
        row(f"W8A8 of modulations, {rounding}", MODULATIONS, lambda layer, g=gptq: layer.rotated(8, 8, g))
    assert check_kernels(layers) > 0
    return found


if __name__ == "__main__":
    over_seeds(rows, {"calls": JUDGED, **PLAN})
