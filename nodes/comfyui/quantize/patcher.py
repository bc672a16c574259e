"""Patchers of quantized models: what core's patcher cannot do with packed weights, and what it must not.

Each is a class made of ours and the patcher's own, given to the patchers that Quantize and Load DiT build; core's
classes stay as they are.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import comfy.hooks
import comfy.lora
import comfy.model_management as mm
import comfy.model_patcher
import comfy.utils
import torch
from torch import Tensor, nn

from ....qandc_core.quantization.formats import packed_format
from .finer import corrected_mark, decode_at_call, finer_format, finer_parts, growth, set_finer
from .weights import is_quantized


class Backup(NamedTuple):
    """ComfyUI's backup of a weight while another is in its place."""

    weight: Tensor
    inplace_update: bool


class NativePatcher:
    """Saves, merges and hooks models with weights in ComfyUI's quantized formats."""

    def clone(self, *args, **kwargs):
        return as_native(super().clone(*args, **kwargs))  # type: ignore[misc]

    def model_state_dict(self, *args, **kwargs) -> dict[str, Tensor]:
        """Without scales and marks, which are no parameters: patches, merges and hooks go through all of these."""
        found = super().model_state_dict(*args, **kwargs)  # type: ignore[misc]
        return {key: value for key, value in found.items() if has_parameter(self.model, key)}  # type: ignore[attr-defined]

    def load(self, *args, **kwargs) -> None:
        super().load(*args, **kwargs)  # type: ignore[misc]
        for module in self.model.modules():  # type: ignore[attr-defined]
            decode_at_call(module)

    def model_size(self) -> int:
        return super().model_size() + sum(self.growths().values())  # type: ignore[misc]

    def _load_list(self, *args, **kwargs) -> list[tuple]:
        """Core's list of (..., bytes, module's name, module, parameters), with the bytes that a module will have."""
        growths = self.growths()
        found = []
        for *order, size, name, module, params in super()._load_list(*args, **kwargs):  # type: ignore[misc]
            pending = growths.get(f"{name}.weight", 0) if finer_format(getattr(module, "weight", None)) else 0
            found.append((*order, size + pending, name, module, params))
        return found

    def growths(self) -> dict[str, int]:
        """Extra bytes of patched weights, by their keys; none under dynamic VRAM."""
        if getattr(self, "is_dynamic", bool)():
            return {}
        return {key: growth(self.unpatched(key)) for key in self.patches}  # type: ignore[attr-defined]

    def unpatched(self, key: str):
        backup = self.backup.get(key)  # type: ignore[attr-defined]
        return comfy.utils.get_attr(self.model, key) if backup is None else backup.weight  # type: ignore[attr-defined]

    def model_state_dict_for_saving(self, model: nn.Module | None = None, prefix: str = "") -> dict[str, Any]:
        """As core's, which asks integer codes for gradients where weights are cast at every call.

        A patched layer of few bits is saved in its finer format.
        """
        model = self.model if model is None else model  # type: ignore[attr-defined]
        replaced: dict[str, Any] = {}
        gone: set[str] = set()
        for name, module in model.named_modules():
            if is_quantized(getattr(module, "weight", None)):
                gone.update(module.weight.state_dict(f"{name}.weight"))
                replaced |= self.saved_parts(name, module, prefix)
        rest = super().model_state_dict_for_saving(WithoutTensors(model, gone | replaced.keys()), prefix)  # type: ignore[misc]
        return {**rest, **replaced}

    def saved_parts(self, name: str, module: Any, prefix: str) -> dict[str, Any]:
        """A quantized layer's weight under its names in a file, and its mark where the module's own is wrong."""
        key, weight = f"{prefix}{name}.weight", module.weight
        format = packed_format(weight)
        parts = weight.state_dict(f"{name}.weight")
        if not (getattr(module, "comfy_patched_weights", False) or key in self.backup):  # type: ignore[attr-defined]
            finer = finer_format(weight) if key in self.patches else None  # type: ignore[attr-defined]
            if finer is not None:
                format, parts = finer, {f"{name}.{part}": value for part, value in finer_parts(weight).items()}
            caster = comfy.model_patcher.LazyCastingQuantizedParam(self, key)
            parts = {part: SavedPiece(caster, prefix + part, tensor) for part, tensor in parts.items()}
        said = None if format is None else corrected_mark(module, format)
        return parts if said is None else {**parts, f"{name}.comfy_quant": said}

    def patch_weight_to_device(self, key: str, device_to=None, **how):
        """As core's, but a weight of few bits is stored in 8 while patches are on it, and a small layer that dynamic
        VRAM moves stays as it is, where core decodes it and rounds it anew, at random.
        """
        if key in self.patches:  # type: ignore[attr-defined]
            with set_finer(self.model, key):  # type: ignore[attr-defined]
                return super().patch_weight_to_device(key, device_to=device_to, **how)  # type: ignore[misc]
        weight = comfy.utils.get_attr(self.model, key)  # type: ignore[attr-defined]
        if not how.get("force_cast") or not is_quantized(weight):
            return super().patch_weight_to_device(key, device_to=device_to, **how)  # type: ignore[misc]
        moved = weight.to(device=device_to)
        if how.get("return_weight"):
            return moved
        backup = self.backup  # type: ignore[attr-defined]
        if key not in backup:
            kept = weight.to(device=self.offload_device)  # type: ignore[attr-defined]
            backup[key] = Backup(kept, inplace_update=False)
        comfy.utils.set_attr_param(self.model, key, moved)  # type: ignore[attr-defined]
        return None

    def patch_hook_weight_to_device(self, hooks, combined_patches, key, original_weights, memory_counter) -> None:
        with set_finer(self.model, key):  # type: ignore[attr-defined]
            weight, set_weight, convert = comfy.model_patcher.get_key_weight(self.model, key)  # type: ignore[attr-defined]
        if key not in combined_patches or not is_quantized(weight):
            super().patch_hook_weight_to_device(  # type: ignore[misc]
                hooks, combined_patches, key, original_weights, memory_counter
            )
            return
        self.remember_for_hooks(key, weight, memory_counter)
        decoded = convert(mm.cast_to_device(weight, weight.device, torch.float32, copy=True)).float()
        changed = comfy.lora.calculate_weight(combined_patches[key], decoded, key, original_weights=original_weights)
        del original_weights[key]
        hooked = set_weight(changed, seed=comfy.utils.string_to_seed(key), return_weight=True)
        comfy.utils.set_attr_param(self.model, key, hooked)  # type: ignore[attr-defined]
        if self.hook_mode == comfy.hooks.EnumHookMode.MaxSpeed:  # type: ignore[attr-defined]
            kept = hooked.to(device=self.hook_device(hooked, memory_counter))
            self.cached_hook_patches.setdefault(hooks, {})[key] = (kept, weight.device)  # type: ignore[attr-defined]

    def patch_cached_hook_weights(self, cached_weights: dict, key: str, memory_counter) -> None:
        weight = comfy.utils.get_attr(self.model, key)  # type: ignore[attr-defined]
        if not is_quantized(weight):
            super().patch_cached_hook_weights(cached_weights, key, memory_counter)  # type: ignore[misc]
            return
        self.remember_for_hooks(key, weight, memory_counter)
        kept, device = cached_weights[key]
        comfy.utils.set_attr_param(self.model, key, kept.to(device=device))  # type: ignore[attr-defined]

    def unpatch_hooks(self, whitelist_keys_set: set[str] | None = None) -> None:
        backup = self.hook_backup  # type: ignore[attr-defined]
        for key in [key for key in backup if not whitelist_keys_set or key in whitelist_keys_set]:
            if is_quantized(backup[key][0]):
                weight, device = backup.pop(key)
                comfy.utils.set_attr_param(self.model, key, weight.to(device=device))  # type: ignore[attr-defined]
        super().unpatch_hooks(whitelist_keys_set)  # type: ignore[misc]

    def remember_for_hooks(self, key: str, weight: Tensor, memory_counter) -> None:
        if key not in self.hook_backup:  # type: ignore[attr-defined]
            kept = weight.to(device=self.hook_device(weight, memory_counter), copy=True)
            self.hook_backup[key] = (kept, weight.device)  # type: ignore[attr-defined]

    def hook_device(self, weight: Tensor, memory_counter) -> torch.device:
        """Device for the other version of a weight: beside it while there is room."""
        fast = self.hook_mode == comfy.hooks.EnumHookMode.MaxSpeed  # type: ignore[attr-defined]
        return weight.device if fast and memory_counter.use(weight) else self.offload_device  # type: ignore[attr-defined]


class PaperPatcher:
    """Refuses changes of the weights, which the layers of the method paper cannot take."""

    def clone(self, *args, **kwargs):
        return as_paper(super().clone(*args, **kwargs))  # type: ignore[misc]

    def add_patches(self, *args, **kwargs):
        raise ValueError(REFUSAL)

    def add_hook_patches(self, *args, **kwargs):
        raise ValueError(REFUSAL)

    def get_key_patches(self, *args, **kwargs):
        raise ValueError(REFUSAL)


REFUSAL = (
    "A model quantized by the method paper takes no LoRAs, LoRA hooks or merges afterwards; apply them before "
    "Quantize, or choose the method native."
)


class SavedPiece(getattr(comfy.model_patcher, "LazyCastingParamPiece", nn.Parameter)):  # type: ignore[misc]
    """One tensor of a packed weight, patched when the file is written; integers have no gradient to ask for."""

    def __new__(cls, caster, state_dict_key, tensor):
        return nn.Parameter.__new__(cls, tensor, requires_grad=False)


class WithoutTensors:
    """A model whose state dict lacks some entries."""

    def __init__(self, model: nn.Module, names):
        self._model, self._names = model, names

    def state_dict(self, *args, **kwargs) -> dict[str, Tensor]:
        return {key: value for key, value in self._model.state_dict().items() if key not in self._names}

    def __getattr__(self, name: str):
        return getattr(self._model, name)


def has_parameter(model: nn.Module, key: str) -> bool:
    owner, _, attribute = key.rpartition(".")
    try:
        return hasattr(comfy.utils.get_attr(model, owner) if owner else model, attribute)
    except AttributeError:
        return False


@cache
def joined(kind: type, base: type) -> type:
    return base if issubclass(base, kind) else type(f"{kind.__name__}{base.__name__}", (kind, base), {})


def as_native(patcher):
    """The patcher, of a model with weights in ComfyUI's quantized formats."""
    patcher.__class__ = joined(NativePatcher, patcher.__class__)
    return patcher


def as_paper(patcher):
    """The patcher, of a model with the paper's layers."""
    patcher.__class__ = joined(PaperPatcher, patcher.__class__)
    return patcher
