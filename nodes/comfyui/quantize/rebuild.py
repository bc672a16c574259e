"""A second model of the same family around other tensors, built as ComfyUI's loaders build one."""

from __future__ import annotations

import inspect
from typing import Any

import comfy.model_detection
import comfy.model_management as mm
import comfy.model_patcher
import comfy.utils
import torch
from torch import Tensor

from ....qandc_core.calibration.file import FINGERPRINT
from ....qandc_core.numerics import is_out_of_memory
from ..wrappers import WRAPPERS
from .beside import with_besides
from .formats import compilable
from .patcher import as_native
from .weights import base_tensors


class ReadKeys(dict):
    """A state dict that notes which entries are looked at."""

    def __init__(self, tensors: dict[str, Tensor]):
        super().__init__(tensors)
        self.seen: set[str] = set()

    def __getitem__(self, key):
        self.seen.add(key)
        return super().__getitem__(key)

    def get(self, key, default=None):
        self.seen.add(key)
        return super().get(key, default)


def shapes_read_by_detection(tensors: dict[str, Tensor]) -> set[str]:
    """Tensors whose shapes tell ComfyUI what model a file holds; packing them would make it another model."""
    noted = ReadKeys(tensors)
    comfy.model_detection.detect_unet_config(noted, "")
    return noted.seen & tensors.keys()


def quantized_config(model_config) -> Any:
    """The model's configuration again, for layers that hold quantized weights."""
    config = object.__new__(type(model_config))  # copy.copy finds every special method on it: __getattr__ answers None
    config.__dict__.update(model_config.__dict__)
    config.unet_config = dict(model_config.unet_config)
    config.quant_config, config.custom_operations = {"mixed_ops": True}, None
    cast = mm.unet_manual_cast(None, mm.get_torch_device(), config.supported_inference_dtypes)
    config.set_inference_dtype(stored_dtype(model_config), cast)
    return config


def stored_dtype(model_config) -> torch.dtype | None:
    """The precision of what is not quantized: the model's own, or that of its computations for a model in float8."""
    dtype = model_config.unet_config.get("dtype")
    if dtype is not None and dtype.itemsize > 1:
        return dtype
    return mm.unet_manual_cast(None, mm.get_torch_device(), model_config.supported_inference_dtypes)


def rebuilt(source, tensors: dict[str, Tensor], disable_dynamic: bool = False):
    """A patcher of a fresh model like that of the patcher `source`, with quantized `tensors` of its network.

    Raises ValueError where ComfyUI cannot build the family from its configuration.
    """
    model = source.model
    config, device, offload = quantized_config(model.model_config), mm.get_torch_device(), mm.unet_offload_device()
    said_in_files = model.state_dict_for_saving({})
    try:
        fresh = config.get_model({**tensors, **said_in_files}, "", device=offload)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise ValueError(
            f"ComfyUI cannot build a second {type(model).__name__} from its configuration ({error}); "
            "models of this loader cannot be quantized."
        ) from error
    # A clone that was sampled last may have left its own, such as another shift, on the model that they share.
    fresh.model_sampling = source.object_patches_backup.get("model_sampling", model.model_sampling)
    patcher_class = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    patcher = patcher_class(fresh, load_device=device, offload_device=offload)
    fresh.diffusion_model.load_state_dict(tensors, strict=False, assign=patcher.is_dynamic())
    known = getattr(model.diffusion_model, FINGERPRINT, None)
    if known is not None:
        setattr(fresh.diffusion_model, FINGERPRINT, known)
    compilable(fresh.diffusion_model)
    with_besides(fresh.diffusion_model)
    return as_native(patcher)


def rebuilt_again(patcher, disable_dynamic: bool = False):
    """Another patcher of the same quantized model, without patches: ComfyUI asks for one for hooks and compilation."""
    tensors = {name: value.cpu() for name, value in base_tensors(patcher).items()}
    copy = rebuilt(patcher, tensors, disable_dynamic)
    copy.cached_patcher_init = patcher.cached_patcher_init
    return copy


def compiled_again(patcher, source) -> None:
    """torch.compile wrappers hold the network that they compiled: compiles the same parts of the new one."""
    from comfy_api.torch_helpers.torch_compile import COMPILE_KEY, TORCH_COMPILE_KWARGS, set_torch_compile_wrapper

    found = source.get_wrappers(WRAPPERS.APPLY_MODEL, COMPILE_KEY)
    if not found:
        return
    held = inspect.getclosurevars(found[0]).nonlocals["compiled_module_dict"]
    set_torch_compile_wrapper(patcher, **source.model_options[TORCH_COMPILE_KWARGS], keys=list(held))
