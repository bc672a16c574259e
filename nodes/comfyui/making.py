"""Shared by the nodes that sample to make a file: the inputs they need, and the words on the node meanwhile."""

from __future__ import annotations

import logging
import math
from pathlib import Path

from ...qandc_core.calibration.choice import CalibrationConfig
from ...qandc_core.sampling.remaining import duration
from .files import NEW
from .quantize.weights import fingerprint_of
from .settings import Settings, batch_of, model_of, parts_of
from .status import node_of, show
from .wrappers import declares_noise, details

log = logging.getLogger(__name__)


def require_sampling(file: str, model, latent_image, sampling: Settings) -> None:
    """Raises ValueError naming what is not wired: conditioning comes from the guider where there is one."""
    if sampling.guider is not None:
        return require_wires(file, latent_image=latent_image)
    positive = sampling.prompts if sampling.positive is None else sampling.positive
    return require_wires(file, model=model, positive=positive, negative=sampling.negative, latent_image=latent_image)


def require_wires(file: str, **inputs) -> None:
    """Raises ValueError naming the inputs that making a new file needs."""
    absent = [name for name, value in inputs.items() if value is None]
    if not absent:
        return
    reason = (
        "To calibrate again" if file == NEW else f"The file {Path(file).name} is not in output/qandc here; to make it"
    )
    raise ValueError(f"{reason}, connect {', '.join(absent)}, or pick another file.")


def guided_model(guider, wired):
    """The MODEL of a guider, which goes before a wired one. Raises ValueError where that is another network."""
    model = model_of(guider)
    if wired is not None and not model.is_clone(wired) and fingerprint_of(model) != fingerprint_of(wired):
        raise ValueError(
            "`model` and the guider's model are different ones; disconnect `model`, the guider has its own."
        )
    if wired is not None and details(wired) != details(model):
        log.warning("Q&C: caches and patches on `model` are not used; those of the guider's model are.")
    return model


def distinct_trajectories(settings: Settings, latent, wanted: int) -> int:
    """As many trajectories as differ: without new noise they repeat with the latent's images and the prompts."""
    noise = settings.noise_of(latent, settings.noise.seed if settings.noise is not None else 0)
    if any(part.any() for part in parts_of(noise)) or declares_noise(settings.sampler_object()):
        return wanted
    distinct = math.lcm(batch_of(latent["samples"]), settings.count * math.lcm(*settings.rows()))
    if distinct < wanted:
        log.info("Q&C: without new noise only %d trajectories differ; a latent with more images gives more.", distinct)
    return min(wanted, distinct)


def teller(cls):
    """Says something in the log and on the node."""

    def tell(text: str) -> None:
        log.info("Q&C: %s", text)
        show(node_of(cls), text)

    return tell


def done(what: str, count: int, prompts: int, plan: CalibrationConfig, at_once: int, seconds: float, name: str) -> str:
    of = f" of {prompts} prompts" if prompts > 1 else ""
    fewer = f", {at_once} at once because more did not fit" if at_once < plan.batch_size else ""
    return f"{count} {what}{of}, {duration(seconds)}{fewer}, saved as {name}"
