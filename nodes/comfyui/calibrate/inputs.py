"""A digest of the inputs of a sampling node: models, prompts, controls, hooks, patches, settings."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Mapping
from typing import Any

import comfy.controlnet
import comfy.hooks
import comfy.model_patcher
import comfy.samplers
import comfy.utils
from torch import nn

from ....qandc_core.calibration.digest import Digest, Sampled, digest
from ..cache.calls import CACHE
from ..quantize.weights import base_tensors
from ..wrappers import REPORT, details

log = logging.getLogger(__name__)
OURS = "qandc"  # begins the names under which the pack keeps state and reports on a model
# Attributes that sampling changes, and changes back or finds anew in every run.
OF_A_RUN = {
    comfy.controlnet.ControlBase: {
        "cond_hint",
        "extra_concat",
        "timestep_range",
        "model_sampling_current",
        "multigpu_clones",
        "control_input",
    },
    comfy.hooks.Hook: {"hook_ref", "_skip_adding"},
    comfy.hooks.HookKeyframe: {"start_t"},
    comfy.hooks.HookKeyframeGroup: {
        "_current_keyframe",
        "_current_used_steps",
        "_current_index",
        "_current_strength",
        "_curr_t",
        "curr_t",
    },
    # the MODEL of a guider is told apart as such, with what the guider changes in its options
    comfy.samplers.CFGGuider: {
        "model_patcher",
        "model_options",
        "inner_model",
        "conds",
        "loaded_models",
        "uncond_inner",
        "uncond_loaded",
        "_uncond_neg",
        "_uncond_conds",
        "_v_numel",
    },
}


def digest_of_inputs(*values: Any) -> Digest:
    """Equal only for equal values, models among them, in any process; what it cannot tell makes it unique."""
    found = digest(*values, replace=StandIns())
    if not found.known:
        log.info(
            "Q&C: a cancelled run of these inputs cannot be resumed, because %s cannot be compared.",
            ", ".join(found.opaque),
        )
    return found


class StandIns:
    """Stand-ins for ComfyUI's objects: for a model what it computes with, not where its weights are at the moment."""

    def __init__(self) -> None:
        self.networks: dict[int, str] = {}
        self.models: list[Any] = []

    def __call__(self, value: Any) -> Any:
        if id(value) in self.networks:
            return self.networks[id(value)]
        if isinstance(value, comfy.model_patcher.ModelPatcher):
            return self.model(value)
        if isinstance(value, uuid.UUID):
            return "name"  # of a condition, made anew whenever a guider is
        for kind, names in OF_A_RUN.items():
            if isinstance(value, kind):
                return {name: kept for name, kept in sorted(vars(value).items()) if name not in names}
        return value

    def model(self, patcher) -> list:
        if id(patcher.model) not in self.networks:
            self.models.append(patcher.model)
            self.named(f"model {len(self.models)}", patcher)
        network = getattr(patcher.model, "diffusion_model", None)
        return [
            type(patcher.model),
            type(network),
            vars_of_config(patcher.model),
            weights(patcher) if network is not None else plain_weights(patcher.model),
            patcher.patches,
            patcher.object_patches,
            patcher.hook_patches,
            patcher.weight_wrapper_patches,
            options_of(patcher.model_options),
            without_cache(patcher.wrappers),
            patcher.callbacks,
            patcher.attachments,
            patcher.injections,
            patcher.additional_models,
            patcher.hook_mode,
            getattr(patcher, "forced_hooks", None),
            details(patcher),
            hooks_of(patcher.model),
        ]

    def named(self, name: str, patcher) -> None:
        """Parts of a network that others refer to go by their names; what is patched into it just now does not."""
        self.networks[id(patcher.model)] = name
        parts = {"": patcher.model, **{key: original(patcher, key) for key in patcher.object_patches}}
        for root, network in parts.items():
            for path, part in network.named_modules() if isinstance(network, nn.Module) else ():
                full = ".".join(filter(None, (root, path)))
                if not any(f"{full}.".startswith(f"{key}.") for key in patcher.object_patches if key != root):
                    self.networks.setdefault(id(part), f"{name}.{full}")


def original(patcher, key: str) -> Any:
    """The part of a model that a patch takes the place of, if any; it is kept aside while the model is loaded."""
    try:
        return patcher.object_patches_backup.get(key, comfy.utils.get_attr(patcher.model, key))
    except AttributeError:
        return None


def vars_of_config(model) -> list:
    """The configuration of a model, and the precision in which it computes."""
    config = getattr(model, "model_config", None)
    precision = getattr(model, "manual_cast_dtype", None), getattr(model, "model_type", None)
    return [type(config), getattr(config, "unet_config", None), getattr(config, "sampling_settings", None), *precision]


def weights(patcher) -> list:
    return [(name, Sampled(value)) for name, value in base_tensors(patcher).items()]


def plain_weights(model: nn.Module) -> list:
    return [(name, Sampled(value.detach())) for name, value in model.state_dict().items()]


def hooks_of(model: nn.Module) -> list:
    """Hooks of PyTorch that something registered on a layer."""
    layers = [(name, part._forward_pre_hooks, part._forward_hooks) for name, part in model.named_modules()]
    return [(name, [*before.values()], [*after.values()]) for name, before, after in layers if before or after]


def options_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """A model's options without what the pack itself notes and measures there; caches are among its details."""
    own = dict(options.get("transformer_options", {}))
    wrappers = without_cache(own.pop("wrappers", {}))
    kept = {name: value for name, value in own.items() if not name.startswith(OURS)}
    return {**options, "transformer_options": {**kept, "wrappers": wrappers}}


def without_cache(wrappers: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    found = {
        kind: {key: kept for key, kept in keys.items() if key not in (CACHE, REPORT) and kept}
        for kind, keys in wrappers.items()
    }
    return {kind: keys for kind, keys in found.items() if keys}
