"""Dynamic VRAM on the fake device: pages in place of those of comfy-aimdo's library, which need a real driver.

With it ComfyUI leaves weights on the host and asks for a layer's pages at every use. Where they are granted it fills
them once and goes on using them; a refusal, as of a device that is short, makes it cast the layer for one call. Pages
lie outside torch's allocator, so `FakeDevice.held` does not count them. What is refused is evicted as well: it holds
NaN until ComfyUI fills it again, which shows whoever kept a view of it.
"""

from __future__ import annotations

import ctypes
from collections import Counter

import fake
import torch
from torch import Tensor


class Pages:
    """The pages of one model, an allocation for each layer; every `refuse`-th request for any is refused, none at 0."""

    refuse = 0
    requests: Counter = Counter()

    def __init__(self, size: int, device: int):
        self.offset = 0
        self.memory: dict[int, Tensor] = {}
        self.evictions: Counter[int] = Counter()
        self.resident: set[int] = set()

    def alloc(self, size: int) -> tuple[Pages, int, int]:
        at, self.offset = self.offset, self.offset + size
        with torch.inference_mode(False):
            self.memory[at] = fake.DeviceTensor(torch.full((size,), 0xFF, dtype=torch.uint8), self)
        return self, at, size

    def fault(self, at: int, size: int):
        """The signature of what lies there, the same for as long as it stays; None where refused."""
        self.requests["all"] += 1
        if self.refuse and self.requests["all"] % self.refuse == 0:
            self.requests["refused"] += 1
            self.evict(at)
            return None
        self.resident.add(at)
        return (ctypes.c_uint32 * 1)(self.evictions[at])

    def evict(self, at: int) -> int:
        if at not in self.resident:
            return 0
        self.resident.remove(at)
        self.evictions[at] += 1
        self.requests["evicted"] += 1
        fake.fill(self.memory[at].inner)
        return self.memory[at].nbytes

    def free_memory(self, size: float) -> int:
        return sum(map(self.evict, list(self.resident)))

    def loaded_size(self) -> int:
        return sum(self.memory[at].nbytes for at in self.resident)

    def prioritize(self, *_) -> None: ...
    def unpin(self, at: int, size: int) -> None: ...


class HostBuffer:
    """Pinned memory, of which there is none."""

    def __init__(self, *_):
        self.size = 0


def enable(refuse: int = 0) -> None:
    """What main.py does where comfy-aimdo works."""
    import comfy.memory_management
    import comfy.model_patcher
    import comfy.utils
    import comfy_aimdo.host_buffer
    import comfy_aimdo.model_vbar
    import comfy_aimdo.torch

    Pages.refuse = refuse
    comfy_aimdo.model_vbar.ModelVBAR = Pages
    comfy_aimdo.host_buffer.HostBuffer = HostBuffer
    comfy_aimdo.torch.aimdo_to_tensor = lambda place, device: place[0].memory[place[1]]
    comfy.utils.load_safetensors = load_safetensors
    comfy.memory_management.aimdo_enabled = True
    comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic


def load_safetensors(path: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Without comfy-aimdo's map of the file."""
    import safetensors

    with safetensors.safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()
