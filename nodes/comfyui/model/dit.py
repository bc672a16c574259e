"""Our DiT as a native ComfyUI MODEL: core's operations, memory management, samplers and LoRA apply to it."""

from __future__ import annotations

import json
import logging
import os
from typing import Any

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.model_management as mm
import comfy.model_patcher
import comfy.model_sampling
import comfy.patcher_extension
import comfy.supported_models_base
import comfy.utils
import torch
from comfy.ldm.common_dit import pad_to_patch_size
from comfy_execution.utils import get_executing_context
from torch import Tensor

from ....qandc_core.calibration.file import FINGERPRINT, fingerprint_tensors
from ....qandc_core.checkpoints.dit import check_asked, dit_metadata, locate, read_dit
from ....qandc_core.checkpoints.native import holds_quantized, quantized_names
from ....qandc_core.checkpoints.prefixes import strip_prefix
from ....qandc_core.checkpoints.quantized import is_quantized, load_codes, quantized_metadata, read_quantized
from ....qandc_core.diffusion.classes import read_classes
from ....qandc_core.files import METADATA_KEY, metadata_tensor, pop_metadata, read_tensors
from ....qandc_core.models.dit import DiT, DiTConfig
from ....qandc_core.models.sizes import unlike_size
from ....qandc_core.quantization.formats import stored_format
from ....qandc_core.quantization.model import quantized_layers
from ....qandc_core.quantization.native import layer_config
from ..quantize.formats import check_supported
from ..quantize.patcher import as_paper
from ..quantize.rebuild import rebuilt
from ..status import show
from ..wrappers import reports

log = logging.getLogger(__name__)
LATENT_FORMATS = {3: comfy.latent_formats.ChromaRadiance, 4: comfy.latent_formats.SD15}


class DiffusionModel(DiT):
    """The engine's DiT behind the call that ComfyUI makes; drops learned variances, which its samplers ignore."""

    def __init__(self, dit_config: DiTConfig, dtype=None, device=None, operations=None):
        super().__init__(dit_config, dtype, device, operations)
        self.dtype = dtype

    def forward(  # type: ignore[override]  # ComfyUI's order of arguments
        self, x: Tensor, timesteps: Tensor, context=None, y=None, control=None, transformer_options=None, **kwargs
    ):
        wrappers = comfy.patcher_extension.get_all_wrappers(
            comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, transformer_options or {}
        )
        executor = comfy.patcher_extension.WrapperExecutor.new_class_executor(self.predict, self, wrappers)
        return executor.execute(x, timesteps, context, y, control, transformer_options, **kwargs)

    def predict(self, x: Tensor, timesteps: Tensor, context, y, control, transformer_options, **kwargs) -> Tensor:
        height, width = x.shape[-2:]
        p = self.config.patch_size
        out = super().forward(pad_to_patch_size(x, (p, p)), timesteps, y)
        return out[:, : self.config.in_channels, :height, :width]


class Sampling(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.EPS):
    pass


class CleanImageSampling(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.X0):
    pass


class ModelConfig(comfy.supported_models_base.BASE):
    unet_extra_config: dict[str, Any] = {}
    # ComfyUI's "sqrt_linear" is what papers call the linear schedule.
    sampling_settings = {"beta_schedule": "sqrt_linear", "linear_start": 1e-4, "linear_end": 0.02, "timesteps": 1000}
    memory_usage_factor = 0.5

    def __init__(self, dit_config: DiTConfig):
        if dit_config.in_channels not in LATENT_FORMATS:
            raise ValueError(
                f"This DiT has {dit_config.in_channels} channels; ComfyUI has a latent format for models of "
                "4 (Stable Diffusion's VAE) or 3 (pixels)."
            )
        self.latent_format = LATENT_FORMATS[dit_config.in_channels]
        super().__init__({"dit_config": dit_config})

    def get_model(self, state_dict, prefix="", device=None):
        return DiTModel(self, device)


class DiTModel(comfy.model_base.BaseModel):
    def __init__(self, model_config: ModelConfig, device=None):
        super().__init__(model_config, comfy.model_base.ModelType.EPS, device=device, unet_model=DiffusionModel)
        clean = self.diffusion_model.config.prediction == "sample"
        self.model_sampling = (CleanImageSampling if clean else Sampling)(model_config)

    def extra_conds(self, **kwargs):
        config = self.diffusion_model.config
        tokens = kwargs.pop("cross_attn", None)  # no condition of its own: lists of unequal length would not batch
        labels = read_classes(tokens, config.num_classes, config.has_null_class)
        if kwargs.get("prompt_type") == "positive" and kwargs.get("noise") is not None:
            say_size(config, kwargs["noise"].shape)
        out = super().extra_conds(**kwargs)
        # A regular condition keeps int64 (class 417 is 416 in bfloat16) and batches with the null class.
        out["y"] = comfy.conds.CONDRegular(labels)
        return out

    def state_dict_for_saving(self, unet_state_dict, *args, **kwargs):
        model = self.diffusion_model
        metadata = quantized_metadata(model) if quantized_layers(model) else dit_metadata(model.config)
        if hasattr(model, FINGERPRINT):
            metadata = {**metadata, FINGERPRINT: getattr(model, FINGERPRINT)}
        return super().state_dict_for_saving(
            {**unet_state_dict, METADATA_KEY: metadata_tensor(metadata)}, *args, **kwargs
        )


def say_size(config: DiTConfig, shape: torch.Size) -> None:
    """Says at the start of a run, on the node that samples and in the log, that its size is not the model's."""
    sentence = unlike_size(config, shape[-2], shape[-1])
    if sentence:
        log.warning("Q&C: %s", sentence)
        context = get_executing_context()
        show(context and context.node_id, sentence)
        for report in reports.get():
            report.warnings = [*report.warnings, sentence]


def load_dit_patcher(
    source: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    input_size: int | None = None,
    num_heads: int | None = None,
    disable_dynamic: bool = False,
):
    """A ModelPatcher of any DiT checkpoint the engine reads, quantized files included.

    `dtype` None lets ComfyUI choose. Raises FileNotFoundError or ValueError with one sentence.
    """
    path = locate(source)
    if is_quantized(path):
        tensors, header = read_quantized(path)
        patcher = quantized_dit(tensors, {"qandc": json.dumps(header)}, dtype, disable_dynamic, str(path))
        check_asked(patcher.model.diffusion_model.config, num_heads, input_size)
    else:
        tensors, config = read_dit(source, num_heads, input_size)
        patcher = new_patcher(config, dtype, tensors, disable_dynamic)
        setattr(patcher.model.diffusion_model, FINGERPRINT, fingerprint_tensors(tensors))
        if holds_quantized(path):
            patcher = native_dit(patcher, read_tensors(path)[0], disable_dynamic)
        else:
            patcher.model.load_model_weights(tensors, "", assign=patcher.is_dynamic())
    patcher.cached_patcher_init = (load_dit_patcher, (source, dtype, input_size, num_heads))
    return patcher


def native_dit(empty, packed: dict[str, Tensor], disable_dynamic: bool):
    """A patcher like that of the empty model, from a file in ComfyUI's quantized formats."""
    metadata, tensors = pop_metadata(packed), strip_prefix(packed)
    for format in formats_in(tensors):
        check_supported(format)
    if FINGERPRINT in metadata:
        setattr(empty.model.diffusion_model, FINGERPRINT, metadata[FINGERPRINT])
    return rebuilt(empty, tensors, disable_dynamic)


def formats_in(tensors: dict[str, Tensor]) -> set[str]:
    """Names of the formats of a file's layers."""
    parts: dict[str, dict[str, Tensor]] = {name: {} for name in quantized_names(tensors)}
    for key, tensor in tensors.items():
        name, _, part = key.rpartition(".")
        if name in parts:
            parts[name][part] = tensor
    found = {stored_format(layer_config(layer), layer) for layer in parts.values()}
    return {format.name for format in found if format is not None}


def quantized_dit(
    tensors: dict[str, Tensor],
    metadata: dict[str, str],
    dtype: torch.dtype | None,
    disable_dynamic: bool = False,
    name: str = "The quantized model",
):
    """A ModelPatcher of a quantized model's tensors and `quantized_metadata`; errors speak of it by `name`."""
    header = json.loads(metadata["qandc"])
    patcher = new_patcher(DiTConfig(**header["config"]), dtype, tensors, disable_dynamic)
    model = patcher.model.diffusion_model
    load_codes(model, tensors, header, name)
    model.to(dtype=model.dtype)
    return as_paper(resized(patcher))


def new_patcher(
    config: DiTConfig, dtype: torch.dtype | None, tensors: dict[str, Tensor], disable_dynamic: bool = False
):
    """A patcher of the empty model in the precision that suits the device."""
    model_config, device = ModelConfig(config), mm.get_torch_device()
    supported = model_config.supported_inference_dtypes
    if dtype is None:
        dtype = mm.unet_dtype(
            model_params=comfy.utils.calculate_parameters(tensors),
            supported_dtypes=supported,
            weight_dtype=tensors["x_embedder.proj.weight"].dtype,
        )
    model_config.set_inference_dtype(dtype, mm.unet_manual_cast(dtype, device, supported))
    offload = mm.unet_offload_device()
    model = DiTModel(model_config, device=offload)
    patcher_class = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    return patcher_class(model, load_device=device, offload_device=offload)


def resized(patcher):
    """The patcher with its size counted again, after layers were replaced."""
    patcher.size = 0
    patcher.model_size()
    return patcher


def is_dit(patcher) -> bool:
    return isinstance(patcher.model, DiTModel)
