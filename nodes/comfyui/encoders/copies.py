"""A second CLIP that shares with the first every weight that is not quantized.

ComfyUI's loaders build a CLIP from files and keep no recipe of its class, so the model is copied module by module, and
quantized layers take their places in the copy. They are what the loaders make of a quantized file, so a saved CLIP
that is loaded again encodes as this one does, to the last bit.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from types import MethodType
from typing import Any

import comfy.model_patcher
import comfy.ops
import torch
from torch import Tensor, nn

from ....qandc_core.quantization.native import NativeLayer
from ..quantize.beside import BesideLayer, with_besides
from ..quantize.patcher import as_native
from ..quantize.weights import is_packed

HALF = torch.float16  # holds every float8 value
# What a patcher notes on modules while they are loaded: names, and how further names begin.
OF_A_PATCHER = set(
    "weight_function bias_function weight_lowvram_function bias_lowvram_function comfy_patched_weights "
    "comfy_force_cast_weights prev_comfy_cast_weights seed_key model_loaded_weight_memory lowvram_patch_counter "
    "model_lowvram current_weight_patches_uuid model_offload_buffer_memory current_patcher _v _comfy_graph beside "
    "hooked qandc_besides".split()
)
OF_DYNAMIC_MEMORY = ("_v_", "_pin", "_prefetch", "dynamic_")


def copied_clip(clip, layers: Mapping[str, Mapping[str, NativeLayer]]):
    """The CLIP with these layers of its encoders, by the encoder's name and the layer's.

    Patches on weights that are now quantized are taken to be in them, and leave.
    """
    model = copied(clip.patcher)
    for name, quantized in layers.items():
        take_quantized(model.get_submodule(name).transformer, quantized)
    with_besides(model)
    fresh = patcher_of(model, clip.patcher, clip.patcher.is_dynamic())
    fresh.cached_patcher_init = (copied_again, (fresh,))
    found = clip.clone()
    found.patcher = as_native(clip.patcher.clone(model_override=fresh.get_clone_model_override()))
    found.cond_stage_model = model
    found.patcher.cached_patcher_init = fresh.cached_patcher_init
    found.patcher.patches = {key: kept for key, kept in found.patcher.patches.items() if not replaced(key, layers)}
    found.patcher.patches_uuid = fresh.patches_uuid
    found.patcher.size = 0  # counted for the source
    found.patcher.model_size()
    return found


def replaced(key: str, layers: Mapping[str, Mapping[str, NativeLayer]]) -> bool:
    """True for a weight or bias of one of the layers."""
    encoder, _, name = key.partition(".transformer.")
    return name.rpartition(".")[0] in layers.get(encoder, ())


def copied_again(patcher, disable_dynamic: bool = False):
    """Another patcher of the same weights, without patches: ComfyUI asks for one where hooks need one."""
    found = patcher_of(copied(patcher), patcher, patcher.is_dynamic() and not disable_dynamic)
    found.cached_patcher_init = patcher.cached_patcher_init
    return found


def patcher_of(model: nn.Module, source, dynamic: bool):
    kind = comfy.model_patcher.CoreModelPatcher if dynamic else comfy.model_patcher.ModelPatcher
    model.device = source.offload_device
    return as_native(kind(model, load_device=source.load_device, offload_device=source.offload_device))


def copied(patcher) -> nn.Module:
    """The patcher's model, unloaded and without patches, in modules of its own that share the weights."""
    modules: Iterable[Any] = patcher.model.modules()
    shells: dict[int, Any] = {id(module): module.__class__.__new__(module.__class__) for module in modules}

    def weight(key: str, now: Tensor | None) -> Tensor | None:
        return None if now is None else unpatched(patcher, key, now).to(patcher.offload_device)

    for path, module in patcher.model.named_modules():
        shell, prefix = vars(shells[id(module)]), f"{path}." if path else ""
        for name, value in vars(module).items():
            if name not in OF_A_PATCHER and not name.startswith(OF_DYNAMIC_MEMORY):
                hooks = name.endswith("_hooks") and isinstance(value, dict)
                shell[name] = OrderedDict() if hooks else with_shells(value, shells)
        if "prev_comfy_cast_weights" in vars(module):
            shell["comfy_cast_weights"] = module.prev_comfy_cast_weights
        shell["_parameters"] = {name: parameter(weight(prefix + name, p)) for name, p in module._parameters.items()}
        shell["_buffers"] = {name: weight(prefix + name, value) for name, value in module._buffers.items()}
    for shell in shells.values():
        if isinstance(shell, BesideLayer):
            shell.relabel()  # as it is without LoRAs
    return shells[id(patcher.model)]


def with_shells(value: Any, shells: Mapping[int, Any]) -> Any:
    """The value with each module of the source replaced by its shell, also within containers."""
    if isinstance(value, nn.Module):
        return shells.get(id(value), value)
    if isinstance(value, MethodType) and id(value.__self__) in shells:
        return MethodType(value.__func__, shells[id(value.__self__)])
    if type(value) in (dict, OrderedDict):
        return type(value)((key, with_shells(item, shells)) for key, item in value.items())
    if type(value) in (list, tuple, set):
        return type(value)(with_shells(item, shells) for item in value)
    return value


def unpatched(patcher, key: str, now: Tensor) -> Tensor:
    """A weight or buffer without patches and hooks; `now` is what the module holds."""
    if key in patcher.backup:
        return patcher.backup[key].weight
    if key in patcher.hook_backup:
        return patcher.hook_backup[key][0]
    return getattr(patcher, "backup_buffers", {}).get(key, now)


def parameter(value: Tensor | None) -> nn.Parameter | None:
    return None if value is None else nn.Parameter(value, requires_grad=False)


def take_quantized(network: Any, layers: Mapping[str, NativeLayer]) -> None:
    """Gives an encoder's network quantized layers, of the class that ComfyUI's loader takes for them."""
    if network.dtype.itemsize == 1:
        widen(network)
    operations = comfy.ops.mixed_precision_ops({"mixed_ops": True}, network.dtype, full_precision_mm=True)
    for name, layer in layers.items():
        parent, _, attribute = name.rpartition(".")
        old = network.get_submodule(name)
        new = operations.Linear(old.in_features, old.out_features, old.bias is not None, torch.device("cpu"))
        new.load_state_dict(layer.tensors, strict=False)
        if new.bias is not None:
            new.bias_comfy_model_dtype = new.bias.dtype
        setattr(network.get_submodule(parent), attribute, new.to(next(network.parameters()).device))


def widen(network: Any) -> None:
    """Float8 weights as float16: by the type of a norm the loader chooses that to which codes are decoded."""
    for module in network.modules():
        for name, value in module._parameters.items():
            if value is not None and not is_packed(value) and value.dtype.itemsize == 1:
                module._parameters[name] = parameter(value.to(HALF))
                setattr(module, f"{name}_comfy_model_dtype", HALF)
    network.dtype = HALF
