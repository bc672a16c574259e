"""Shared by our wrappers: one key, the state of one sampling run, and its position."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import comfy.model_patcher
import comfy.model_sampling
import comfy.patcher_extension
import torch

from ...qandc_core.sampling.report import RunReport

NOTES = "qandc"
REPORT = "qandc_report"  # key of the wrappers that record runs, and where a script puts a report into the options
QUANTIZATION = "qandc_quantization"  # where a model's options hold what Quantize measured
WRAPPERS = comfy.patcher_extension.WrappersMP
PRE_RUN = comfy.patcher_extension.CallbacksMP.ON_PRE_RUN
reports: ContextVar[tuple[RunReport, ...]] = ContextVar("reports", default=())  # of the run that goes on

# Where a run that is only repeated, for its time, reports; None in a run of the user's.
repeated: ContextVar[list[RunReport] | None] = ContextVar("repeated", default=None)


@contextmanager
def reporting(report: RunReport) -> Iterator[None]:
    """Adds a report that a run fills in as well."""
    token = reports.set((*reports.get(), report))
    try:
        yield
    finally:
        reports.reset(token)


def reports_of(options: Mapping[str, Any]) -> list[RunReport]:
    """The reports that a run with these transformer_options fills in."""
    own = options.get(REPORT)
    return [*reports.get(), *([] if own is None else [own])]


def scalar(sigma: torch.Tensor) -> float:
    return float(sigma.reshape(-1)[0])


def sampler_function_name(sampler: Any) -> str:
    return getattr(getattr(sampler, "sampler_function", None), "__name__", type(sampler).__name__)


NOISY = ("ddpm", "ancestral", "sde", "lcm", "seeds", "sa_solver")  # in the names of samplers that add noise


def declares_noise(sampler: Any) -> bool:
    """True if a sampler adds noise by its options and the defaults of its function, or by its name where it has none.

    A run sees for itself whether it does; this is for what has to be known before.
    """
    function = getattr(sampler, "sampler_function", sampler)
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    known = {p.name: p.default for p in parameters if isinstance(p.default, (int, float))}
    known |= getattr(sampler, "extra_options", {})
    if known.get("s_noise") == 0:
        return False
    if "eta" in known or "s_churn" in known:
        return bool(known.get("eta") or known.get("s_churn"))
    return any(part in sampler_function_name(sampler) for part in NOISY)


def is_flow(model) -> bool:
    """True if noise replaces the image, as in rectified flow, instead of adding to it."""
    return isinstance(model.model_sampling, comfy.model_sampling.CONST)


def samples_flow(patcher) -> bool:
    """The same of a run that has not begun: the model still holds the sampling of the run before."""
    return isinstance(patcher.get_model_object("model_sampling"), comfy.model_sampling.CONST)


@contextmanager
def options_of_run(guider) -> Iterator[dict[str, Any]]:
    """transformer_options that this run alone sees; wrappers put its state there, never into the model."""
    saved = guider.model_options
    guider.model_options = comfy.model_patcher.create_model_options_clone(saved)
    try:
        yield guider.model_options["transformer_options"]
    finally:
        guider.model_options = saved


def replace_wrapper(patcher, kind: str, key: str, wrapper) -> None:
    patcher.remove_wrappers_with_key(kind, key)
    patcher.add_wrapper_with_key(kind, key, wrapper)


def without(patcher, key: str):
    """A clone of the model without the wrappers and callbacks of this key."""
    clone = patcher.clone()
    for kind in list(clone.wrappers):
        clone.remove_wrappers_with_key(kind, key)
    for kind in list(clone.callbacks):
        clone.remove_callbacks_with_key(kind, key)
    return clone


def on_one_device(patcher) -> bool:
    """Removes the clones for other devices that core's multi-GPU node added; True if there were any."""
    clones = patcher.get_additional_models_with_key("multigpu")
    patcher.remove_additional_models("multigpu")
    return bool(clones)


def note(patcher, topic: str, text: str, detail: str = "") -> None:
    """Notes what a node attached: a text for reports, and in full what a saved compensation depends on."""
    options = patcher.model_options["transformer_options"]
    options[NOTES] = {**options.get(NOTES, {}), topic: (text, detail)}


def labels(patcher) -> str:
    """The caches, quantization and compensation that our nodes put on this model, in words."""
    noted = patcher.model_options["transformer_options"].get(NOTES, {})
    return ", ".join(text for text, _ in noted.values() if text)


def details(patcher) -> dict[str, str]:
    noted = patcher.model_options["transformer_options"].get(NOTES, {})
    return {topic: detail for topic, (_, detail) in noted.items() if detail}
