"""Identifies the calls of ComfyUI's own samplers: the sample, its areas and its context windows.

PREDICT_NOISE shows the sample of the sampler, CALC_COND_BATCH the conditions and what they are evaluated on. Where that
is the very tensor of the sampler, areas follow from the conditions and nothing has to be compared. Context windows of
core carry their frames. Whatever else a pack made of the sample is looked for in it (`identity.locate`).
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from comfy.samplers import add_area_dims
from torch import Tensor

from ....qandc_core.caching.frame import Frame
from ....qandc_core.caching.identity import CHANGED, WHOLE, area, is_changed, locate, signature
from ..wrappers import WRAPPERS

CACHE = "qandc_cache"
INNER = "qandc_cache_calls"  # our wrappers that have to be next to core's functions
COMPILE = "torch.compile"  # of core's compile nodes


def keep_inside(transformer_options: dict[str, Any]) -> None:
    """Puts our wrappers in their places: the prediction's around all others, those of INNER inside all others.

    Other packs add theirs when a run begins, so the order is restored before each prediction.
    """
    wrappers = transformer_options.setdefault("wrappers", {})
    predictions = wrappers.setdefault(WRAPPERS.PREDICT_NOISE, {})
    first = predictions.pop(CACHE)
    others = {key: found for key, found in predictions.items() if key != INNER}
    wrappers[WRAPPERS.PREDICT_NOISE] = {CACHE: first, **others, INNER: [keep_sample]}
    batches = wrappers.setdefault(WRAPPERS.CALC_COND_BATCH, {})
    batches.pop(INNER, None)
    batches[INNER] = [keep_frame]


def keep_sample(executor, x, timestep, model_options, seed):
    """PREDICT_NOISE: what the guider evaluates its conditions on."""
    model_options["transformer_options"][CACHE].sample = x
    return executor(x, timestep, model_options, seed)


def keep_frame(executor, model, conds, x_in, timestep, model_options):
    """CALC_COND_BATCH: which conditions are evaluated, each on an area of x_in."""
    run = model_options.get("transformer_options", {}).get(CACHE)
    if run is None:
        return executor(model, conds, x_in, timestep, model_options)
    before, run.frame = run.frame, frame_of(run.sample, conds, x_in, model_options)
    try:
        return executor(model, conds, x_in, timestep, model_options)
    finally:
        run.frame = before


def frame_of(sample: Tensor | None, conds: list, x_in: Tensor, model_options: dict[str, Any]) -> Frame:
    base = base_piece(sample, x_in, model_options["transformer_options"].get("context_window"))
    frame = Frame({}, {}, trusted="model_function_wrapper" not in model_options)
    for side, found in enumerate(conds):
        for cond in found or ():
            condition = cond.get("uuid"), side
            crop, x = cropped(cond, x_in)
            piece = None if base is None else (base, crop) if crop or base else WHOLE
            twice = condition in frame.pieces and frame.pieces[condition] != piece
            frame.pieces[condition], frame.inputs[condition] = None if twice else piece, x
    return frame


def base_piece(sample: Tensor | None, x_in: Tensor, window: Any) -> Hashable | None:
    """The piece of the sample that x_in is; None where it cannot be determined."""
    if sample is None or x_in is sample:
        return None if sample is None else WHOLE
    if window is not None and is_window(sample, x_in, window):
        anchor, guides = getattr(window, "causal_anchor_index", None), getattr(window, "guide_frames_indices", ())
        return "window", window.dim, tuple(window.index_list), anchor, tuple(guides)
    piece = locate(x_in, sample)
    return CHANGED if piece is None and is_changed(x_in, sample) else piece


def is_window(sample: Tensor, x_in: Tensor, window: Any) -> bool:
    """True if x_in can be this window of the sample: alike but along its dimension, or packed with other latents."""
    if not hasattr(window, "index_list") or x_in.ndim != sample.ndim:
        return False
    if sample.ndim == 3 and sample.shape[1] == 1 and window.dim > 1:
        return x_in.shape[:2] == sample.shape[:2]
    others = [dim for dim in range(sample.ndim) if dim != window.dim]
    return all(x_in.shape[dim] == sample.shape[dim] for dim in others)


def cropped(cond: dict[str, Any], x_in: Tensor) -> tuple[Hashable, Tensor]:
    """The area of a condition and x_in cut to it, as core does."""
    if "area" not in cond:
        return WHOLE, x_in
    dims = x_in.ndim - 2
    found = add_area_dims(list(cond["area"]), dims)
    half = len(found) // 2
    starts = found[half : half + dims]
    sizes = [min(full - at, size) for full, at, size in zip(x_in.shape[2:], starts, found[:dims])]
    x = x_in
    for i, (at, size) in enumerate(zip(starts, sizes)):
        x = x.narrow(i + 2, at, size)
    return area(sizes, starts, x_in.shape[2:]), x


def nothing_between(transformer_options: dict[str, Any]) -> bool:
    """True if the model gets from ComfyUI what our frame holds: no other pack's wrapper stands between."""
    wrappers = transformer_options.get("wrappers", {})
    outside = list(wrappers.get(WRAPPERS.APPLY_MODEL, {}))
    outside = [key for key in outside[: outside.index(CACHE)] if key != COMPILE] if CACHE in outside else outside
    return not outside and [*wrappers.get(WRAPPERS.CALC_COND_BATCH, {})][-1:] == [INNER]


def state_of(model, control: Any, transformer_options: dict[str, Any]) -> tuple:
    """The rest of a condition's key: the network, hooked weights, patches, a ControlNet.

    Hooked LoRAs change their strength in mid-run, guidance evaluates a condition again with layers replaced, and ends,
    a ControlNet ends.
    """
    hooks = getattr(model.current_patcher, "current_hooks", None)
    strengths = () if hooks is None else tuple((id(hook.hook_ref), hook.strength) for hook in hooks.hooks)
    patches = [signature(transformer_options.get(kind, {})) for kind in ("patches_replace", "patches")]
    modes = frozenset((key, value) for key, value in transformer_options.items() if isinstance(value, (bool, str)))
    return signature(model), strengths, *patches, modes, control is not None
