"""Other people's caches as they are: packs from their folders, in the process that measures ours.

Known are ComfyUI-Spectrum (judian17) and ComfyUI-TeaCache (welltop-cn), which patch ComfyUI's NextDiT (Z-Image, Lumina
2). Both change the network that they are given, so each gets one of its own. Spectrum runs unchanged. TeaCache was
written for ComfyUI before 0.8: it imports a function of the LTX model that is gone, embeds the context before
patchify_and_embed, which does so itself since, and expects five values of it instead of six. This is supplied here, or
it would not run; its cache is its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from fidelity import Subject
    from host import Host

RAMPS = (0.0, 0.25, 0.75, 1.5, 3.0)  # Spectrum's flex_window, 0.75 by default; the rest as the node has it
# TeaCache's, 0.4 by default: its polynomial was fitted on Lumina 2, and on the small model 0.4 computes 2 of 50 steps.
THRESHOLDS = (0.001, 0.003, 0.006, 0.012, 0.025, 0.05, 0.1, 0.4)


def methods(host: Host, folder: str, make: Callable[[], Subject]) -> dict[str, dict[float, Callable]]:
    """Method -> setting -> (seed) -> images and calls, of the pack in a folder."""
    import comfy.ldm.lightricks.model as ltx

    if not hasattr(ltx, "precompute_freqs_cis"):
        ltx.precompute_freqs_cis = None  # only its LTX node calls it
    path = str(Path(folder).resolve())
    if not asyncio.run(host.nodes.load_custom_node(path)):
        raise ValueError(f"{folder} did not load as a pack of ComfyUI.")
    nodes = host.nodes.NODE_CLASS_MAPPINGS
    if Path(path).name == "ComfyUI-Spectrum":
        return {"ComfyUI-Spectrum, the pack": {ramp: spectrum(nodes["Spectrum"], make(), ramp) for ramp in RAMPS}}
    if Path(path).name == "ComfyUI-TeaCache":
        return {"ComfyUI-TeaCache, the pack": {t: teacache(nodes["TeaCache"], make(), t) for t in THRESHOLDS}}
    raise ValueError(f"{Path(path).name} is not known here; expected ComfyUI-Spectrum or ComfyUI-TeaCache.")


def spectrum(node: Any, subject: Subject, ramp: float) -> Callable:
    settings = {"w": 0.5, "M": 4, "lam": 0.1, "warmup_steps": 3, "window_size": 2.0, "max_w": 0.8, "verbose": False}
    with quiet():
        patcher = node.execute(subject.patcher, flex_window=ramp, **settings).args[0]
    subject.attention = subject.attention.replace("layers.0.", "layers.0.original_layer.")  # each block is wrapped

    def images(seed: int):
        with quiet():
            return subject.images(patcher, seed)

    return images


def teacache(node: Any, subject: Subject, threshold: float) -> Callable:
    network = subject.patcher.model.diffusion_model
    network.patchify_and_embed = as_before(network)
    (patcher,) = node().apply_teacache(subject.patcher, "lumina_2", threshold, 0.0, 1.0, "cpu")
    return lambda seed: subject.images(patcher, seed)


def as_before(network: Any) -> Callable:
    """NextDiT's patchify_and_embed as it was: five values, of a context that has been embedded."""
    function, embedder = network.patchify_and_embed, network.cap_embedder

    def patchify(*args: Any) -> tuple:
        network.cap_embedder = torch.nn.Identity()
        try:
            return function(*args)[:5]
        finally:
            network.cap_embedder = embedder

    return patchify


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what the pack prints."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
