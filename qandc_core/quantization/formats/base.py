"""The interface of ComfyUI's quantized formats: limits as data, weights to tensors and back.

Every format is int8 at heart: its codes decode to int8 weights with one scale for each row, rotated in groups of inputs
(ConvRot), and multiply 8-bit activations that are scaled anew for every token. To add one, write a module with a
subclass and one instance, and name the instance in `ALL` of formats/__init__.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..gptq import Hessian


@dataclass(frozen=True, eq=False)
class Format(ABC):
    """One format. `name` is what users choose, `stored` the checkpoint's name for it, which formats of other widths may
    share. `patched` is the format in which a file has a weight with LoRAs in it, None its own.

    A layer of N outputs and K inputs is taken where N is a multiple of `outputs` and K of `inputs`. `since` is the
    first ComfyUI that loads it, `kernel` comfy-kitchen's matmul, `layouts` the names of its tensors' layouts, `parts`
    the tensors of a layer in a file, comfy_quant aside. `keeps_shape`: the stored weight has the shape (N, K).
    `kitchen`: the first comfy-kitchen that has it; None: that of `since`.
    """

    name: str
    stored: str
    weight_bits: int
    since: str
    kernel: str
    layouts: tuple[str, ...]
    parts: tuple[str, ...]
    outputs: int = 4
    inputs: int = 4
    keeps_shape: bool = True
    patched: Format | None = None
    kitchen: str | None = None

    def takes(self, outputs: int, inputs: int) -> bool:
        return outputs % self.outputs == 0 and inputs % self.inputs == 0

    def available(self) -> bool:
        """True if the installed comfy-kitchen has the format."""
        return True

    @abstractmethod
    def bytes(self, outputs: int, inputs: int) -> int:
        """Size of the `parts` of a layer with N outputs and K inputs."""

    @abstractmethod
    def config(self, group: int) -> dict[str, Any]:
        """The comfy_quant entry of a weight rotated in groups of this size."""

    @abstractmethod
    def encode(
        self, weight: Tensor, rotated: Tensor, group: int, hessian: Hessian | None, clip_search: bool, damping: float
    ) -> dict[str, Tensor]:
        """The tensors `parts` for weight (N, K), also given rotated; hessian (K, K) of rotated inputs for GPTQ."""

    @abstractmethod
    def int8(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The operands of the kernel: the rotated weight as int8 (N, K) and its rows' scales (N,) float32."""

    def decode(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The rotated weight (N, K) that the tensors stand for, float32."""
        codes, scale = self.int8(tensors)
        return codes.float() * scale[:, None]

    @abstractmethod
    def linear(
        self, x: Tensor, tensors: Mapping[str, Tensor], config: Mapping[str, Any], bias: Tensor | None, dtype, **act
    ) -> Tensor:
        """x (..., K) -> (..., N) in dtype by comfy-kitchen's `kernel`; `act` is what it does to x before."""

    def rotation(self, config: Mapping[str, Any]) -> int | None:
        """The group in which a stored weight's inputs are rotated; None where they are not."""
        return config["convrot_groupsize"]

    def traced(self, weight: Any) -> Any:
        """A loaded weight in a layout that torch.compile can trace."""
        return weight
