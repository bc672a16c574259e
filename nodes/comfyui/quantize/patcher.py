"""Patchers of quantized models: what core's patcher cannot do with packed weights, and what it must not.

Each is a class made of ours and the patcher's own, given to the patchers that Quantize and Load DiT build; core's
classes stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import comfy.hooks
import comfy.lora
import comfy.model_patcher
import comfy.utils
import torch
from torch import Tensor, nn

from ....qandc_core.quantization.adapters import Beside
from ....qandc_core.quantization.formats import packed_format
from .beside import BesideLayer, beside_of
from .finer import decode_at_call, file_mark, finer_format, finer_parts, for_file, growth, holds_patched, stored_patched
from .weights import is_packed

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher as Patcher
else:
    Patcher = object  # `joined` puts the patcher's own class behind ours


class Backup(NamedTuple):
    """ComfyUI's backup of a weight while another is in its place."""

    weight: Tensor
    inplace_update: bool


class NativePatcher(Patcher):
    """Saves, merges and hooks models with weights in ComfyUI's quantized formats, and takes LoRAs beside them."""

    known_besides: tuple[Any, dict[str, Beside | None]] = (None, {})  # of the patches with this id

    def clone(self, *args, **kwargs):
        copy = as_native(super().clone(*args, **kwargs))
        copy.known_besides = self.known_besides
        return copy

    def model_state_dict(self, *args, **kwargs) -> dict[str, Tensor]:
        """Without scales and marks, which are no parameters: patches, merges and hooks go through all of these."""
        found = super().model_state_dict(*args, **kwargs)
        return {key: value for key, value in found.items() if has_parameter(self.model, key)}

    def besides(self) -> dict[str, Beside | None]:
        """The patches of each layer in one of our formats that are computed beside it; None where they change
        the weight.
        """
        if self.known_besides[0] != self.patches_uuid:
            weights = {key: self.unpatched(key) for key in self.patches}
            found = {
                key: beside_of(self.patches[key], weight)
                for key, weight in weights.items()
                if packed_format(weight) is not None
            }
            self.known_besides = self.patches_uuid, found
        return self.known_besides[1]

    def layers(self) -> Iterator[tuple[str, Any]]:
        """The keys of the weights of layers that take LoRAs beside them, and these layers."""
        for name, module in self.model.named_modules():
            if isinstance(module, BesideLayer):
                yield f"{name}.weight", module

    def load(self, *args, **kwargs) -> None:
        model, besides = self.model, self.besides()
        if getattr(model, "qandc_besides", None) != self.patches_uuid:
            for key, layer in self.layers():
                layer.beside = besides.get(key)
                layer.relabel()
            model.qandc_besides = self.patches_uuid
        super().load(*args, **kwargs)
        self.settle()

    def partially_unload(self, *args, **kwargs) -> int:
        freed = super().partially_unload(*args, **kwargs)
        self.settle()
        return freed

    def settle(self) -> None:
        """Takes back what core would add to weights at calls; moves what is beside a layer to where its weight is."""
        dynamic = self.is_dynamic()
        for _, layer in self.layers():
            if layer.beside is None:
                decode_at_call(layer)
                continue
            near = dynamic or getattr(layer, "comfy_patched_weights", False)
            layer.beside = layer.beside.to(self.load_device if near else self.offload_device)
            layer.weight_lowvram_function = None
            patch = comfy.model_patcher.LowVramPatch
            layer.weight_function = [function for function in layer.weight_function if not isinstance(function, patch)]

    def unpatch_model(self, device_to=None, unpatch_weights=True) -> None:
        super().unpatch_model(device_to, unpatch_weights)
        if unpatch_weights:
            self.model.qandc_besides = None
            for _, layer in self.layers():
                layer.beside = None
                layer.relabel()

    def inject_model(self) -> None:
        super().inject_model()
        self.relabel()

    def eject_model(self) -> None:
        super().eject_model()
        self.relabel()

    def relabel(self) -> None:
        for _, layer in self.layers():
            layer.relabel()

    def model_size(self) -> int:
        return super().model_size() + sum(self.growths().values())

    def _load_list(self, *args, **kwargs) -> list[tuple]:
        """Core's list of (..., bytes, module's name, module, parameters), with the bytes that a module will have."""
        growths, found = self.growths(), []
        for *order, size, name, module, params in super()._load_list(*args, **kwargs):
            key = f"{name}.weight"
            found.append((*order, size + (growths[key] if self.is_pending(key) else 0), name, module, params))
        return found

    def is_pending(self, key: str) -> bool:
        """True if the growth of the key's layer is none of its parameters' bytes: not yet, or beside it."""
        if key not in self.growths():
            return False
        held = getattr(comfy.utils.get_attr(self.model, key), "_layout_cls", None)
        return self.besides()[key] is not None or held == self.unpatched(key)._layout_cls

    def growths(self) -> dict[str, int]:
        """Extra bytes of patched layers, by the keys of their weights; none under dynamic VRAM."""
        if self.is_dynamic():
            return {}
        return {
            key: growth(self.owner(key), self.unpatched(key)) if beside is None else beside.nbytes
            for key, beside in self.besides().items()
        }

    def unpatched(self, key: str):
        backup = self.backup.get(key)
        return comfy.utils.get_attr(self.model, key) if backup is None else backup.weight

    def model_state_dict_for_saving(self, model: nn.Module | None = None, prefix: str = "") -> dict[str, Any]:
        """As core's, which asks integer codes for gradients where weights are cast at every call.

        LoRAs are in the weights of a file: a patched layer of few bits is saved in its finer format.
        """
        model = self.model if model is None else model
        replaced: dict[str, Any] = {}
        gone: set[str] = set()
        for name, module in model.named_modules():
            key = f"{prefix}{name}.weight"
            weight: Any = self.unpatched(key) if key in self.besides() else getattr(module, "weight", None)
            if is_packed(weight):
                gone.update(weight.state_dict(f"{name}.weight"))
                replaced |= self.saved_parts(name, module, weight, prefix)
        rest = super().model_state_dict_for_saving(WithoutTensors(model, gone | replaced.keys()), prefix)
        return {**rest, **replaced}

    def saved_parts(self, name: str, module: Any, weight: Any, prefix: str) -> dict[str, Any]:
        """A quantized layer's weight under its names in a file, and its mark where it is patched."""
        key, mark = f"{prefix}{name}.weight", {}
        parts, patched = weight.state_dict(f"{name}.weight"), key in self.besides()
        if patched:
            finer, format = finer_format(weight), packed_format(weight)
            assert format is not None
            if finer is not None:
                parts = {f"{name}.{part}": value for part, value in finer_parts(weight).items()}
            mark = {f"{name}.comfy_quant": file_mark(module, weight, finer or format)}
        if patched or not (getattr(module, "comfy_patched_weights", False) or key in self.backup):
            caster = comfy.model_patcher.LazyCastingQuantizedParam(self, key)
            parts = {part: SavedPiece(caster, prefix + part, tensor) for part, tensor in parts.items()}
        return {**parts, **mark}

    def patch_weight_to_device(self, key: str, device_to=None, **how):
        """As core's, but the weight stays what it is where patches are beside it, and is not rounded as before where
        they change it. A small layer that dynamic VRAM moves stays as it is too, where core decodes it and rounds it
        anew, at random.
        """
        weight = self.unpatched(key)
        if key in self.besides() and how.get("return_weight"):
            return self.with_patches(key, device_to)
        if self.besides().get(key, weight) is None:
            with holds_patched(self.owner(key), weight):
                return super().patch_weight_to_device(key, device_to=device_to, **how)
        if not is_packed(weight) or (key in self.patches and key not in self.besides()):
            return super().patch_weight_to_device(key, device_to=device_to, **how)
        if not how.get("force_cast"):
            return weight
        moved = weight.to(device=device_to)
        if how.get("return_weight"):
            return moved
        backup = self.backup
        if key not in backup:
            kept = weight.to(device=self.offload_device)
            backup[key] = Backup(kept, inplace_update=False)
        comfy.utils.set_attr_param(self.model, key, moved)
        return None

    def with_patches(self, key: str, device: torch.device | None) -> Any:
        """The packed weight of a file with the patches in it."""
        weight = self.unpatched(key)
        decoded = weight.to(device=device or weight.device, dtype=torch.float32).dequantize()
        changed = comfy.lora.calculate_weight(self.patches[key], decoded, key)
        return for_file(weight, changed, comfy.utils.string_to_seed(key))

    def owner(self, key: str) -> Any:
        return comfy.utils.get_attr(self.model, key.rpartition(".")[0])

    def patch_hook_weight_to_device(self, hooks, combined_patches, key, original_weights, memory_counter) -> None:
        layer = self.owner(key) if key.endswith(".weight") else None
        if key not in combined_patches or not isinstance(layer, BesideLayer):
            super().patch_hook_weight_to_device(hooks, combined_patches, key, original_weights, memory_counter)
            return
        fast, packed = self.hook_mode == comfy.hooks.EnumHookMode.MaxSpeed, self.unpatched(key)
        layer.hooked = beside_of(combined_patches[key], packed)
        if layer.hooked is not None:
            layer.hooked = layer.hooked.to(self.load_device)
            layer.relabel()
            del original_weights[key]
            if fast:
                self.cached_hook_patches.setdefault(hooks, {})[key] = (layer.hooked, self.load_device)
            return
        weight = layer.weight
        self.remember_for_hooks(key, weight, memory_counter)
        decoded = decode(weight) if layer.beside is None else decode(weight) + layer.beside.to(weight.device).dense()
        changed = comfy.lora.calculate_weight(combined_patches[key], decoded, key, original_weights=original_weights)
        del original_weights[key]
        if layer.beside is not None:
            changed = changed - layer.beside.to(weight.device).dense().float()
        hooked = stored_patched(packed, changed, comfy.utils.string_to_seed(key))
        comfy.utils.set_attr_param(self.model, key, hooked)
        if fast:
            kept = hooked.to(device=self.hook_device(hooked, memory_counter))
            self.cached_hook_patches.setdefault(hooks, {})[key] = (kept, weight.device)

    def patch_cached_hook_weights(self, cached_weights: dict, key: str, memory_counter) -> None:
        layer = self.owner(key) if key.endswith(".weight") else None
        if not isinstance(layer, BesideLayer):
            super().patch_cached_hook_weights(cached_weights, key, memory_counter)
            return
        kept, device = cached_weights[key]
        beside = isinstance(kept, Beside)
        layer.hooked = kept if beside else None
        if beside:
            self.restore_from_hooks(key)
        else:
            self.remember_for_hooks(key, layer.weight, memory_counter)
            comfy.utils.set_attr_param(self.model, key, kept.to(device=device))
        layer.relabel()

    def unpatch_hooks(self, whitelist_keys_set: set[str] | None = None) -> None:
        for key, layer in self.layers():
            if not whitelist_keys_set or key in whitelist_keys_set:
                layer.hooked = None
                self.restore_from_hooks(key)
                layer.relabel()
        super().unpatch_hooks(whitelist_keys_set)

    def remember_for_hooks(self, key: str, weight: Tensor, memory_counter) -> None:
        if key not in self.hook_backup:
            kept = weight.to(device=self.hook_device(weight, memory_counter), copy=True)
            self.hook_backup[key] = (kept, weight.device)

    def restore_from_hooks(self, key: str) -> None:
        if key in self.hook_backup:
            weight, device = self.hook_backup.pop(key)
            comfy.utils.set_attr_param(self.model, key, weight.to(device=device))

    def hook_device(self, weight: Tensor, memory_counter) -> torch.device:
        """Device for the other version of a weight: beside it while there is room."""
        fast = self.hook_mode == comfy.hooks.EnumHookMode.MaxSpeed
        return weight.device if fast and memory_counter.use(weight) else self.offload_device


def decode(weight: Any) -> Tensor:
    """A weight (N, K) in float32 that may be changed."""
    wide = weight.to(dtype=torch.float32)
    return wide.dequantize() if is_packed(wide) else wide.clone()


class PaperPatcher(Patcher):
    """Refuses changes of the weights, which the layers of the method paper cannot take."""

    def clone(self, *args, **kwargs):
        return as_paper(super().clone(*args, **kwargs))

    def add_patches(self, *args, **kwargs):
        raise ValueError(REFUSAL)

    def add_hook_patches(self, *args, **kwargs):
        raise ValueError(REFUSAL)

    def get_key_patches(self, *args, **kwargs):
        raise ValueError(REFUSAL)


REFUSAL = (
    "A model quantized by the method paper does not support LoRAs, LoRA hooks or merges; apply them before "
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
