"""The settings of a run, as any stock sampler node takes them: a guider, a sampler, noise levels and noise.

KSampler and its relatives build these four from widgets; SamplerCustomAdvanced has them wired. `Settings` holds either,
so that a run here is the run of the sampler node that it was copied from, bit for bit.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import comfy.model_patcher
import comfy.sample
import comfy.sampler_helpers
import comfy.samplers
import torch
from torch import Tensor

from ...qandc_core.calibration.choice import Batch
from ...qandc_core.diffusion.classes import is_classes
from .wrappers import sampler_function_name

AUTO = "auto"
AUTO_STEPS, AUTO_CFG = 0, -1.0
LAST_STEP = 10000  # what KSamplerAdvanced has for "to the end"
SEEDS = 2**64
Conds = list[dict[str, Any]]


@dataclass(frozen=True)
class Settings:
    """Inputs of a stock sampling node other than model, latent and seed, by their names.

    A wired `guider` has the conditioning and the guidance, `sampler` and `sigmas` stand for the names, `noise` for the
    noise of a seed. `prompts` is a CONDITIONING whose entries, each by itself, take turns with the positive one. Raises
    ValueError on a cfg that is no number, and on widgets that ask for another schedule or noise than what is wired.
    """

    positive: Any
    negative: Any
    steps: int
    cfg: float
    sampler_name: str
    scheduler: str
    denoise: float = 1.0
    start_at_step: int = 0
    end_at_step: int = LAST_STEP
    return_with_leftover_noise: bool = False
    add_noise: bool = True
    guider: Any = None
    sampler: Any = None
    sigmas: Tensor | None = None
    noise: Any = None
    prompts: Any = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.cfg) and math.isfinite(self.denoise)):
            raise ValueError(f"cfg and denoise must be finite numbers, got {self.cfg} and {self.denoise}.")
        part = (self.start_at_step, self.end_at_step, self.return_with_leftover_noise, self.denoise)
        if self.sigmas is not None and part != (0, LAST_STEP, False, 1.0):
            raise ValueError(
                "start_at_step, end_at_step, return_with_leftover_noise and denoise apply to the schedule of the "
                "widgets; split the wired sigmas with SplitSigmas instead, and reset the four to their defaults."
            )
        if self.noise is not None and not self.add_noise:
            raise ValueError("add_noise is off, but noise is wired; wire DisableNoise instead, and turn add_noise on.")

    def schedule(self, patcher) -> Tensor:
        """Noise levels (T + 1,) of the run, on the CPU; empty where there is nothing to sample."""
        if self.sigmas is not None:
            return self.sigmas.cpu()
        name = "euler" if self.sampler is not None else self.sampler_name  # KSampler leaves a level out for some
        sigmas = (
            comfy.samplers.KSampler(
                patcher, self.steps, patcher.load_device, name, self.scheduler, self.denoise, patcher.model_options
            )
            .sigmas.cpu()
            .clone()
        )
        if self.end_at_step < len(sigmas) - 1:
            sigmas = sigmas[: self.end_at_step + 1]
            if not self.return_with_leftover_noise:
                sigmas[-1] = 0
        return sigmas[self.start_at_step :] if self.start_at_step < len(sigmas) - 1 else sigmas[:0]

    def steps_on(self, patcher) -> int:
        """Number of steps of a run. Raises ValueError where there are none."""
        steps = len(self.schedule(patcher)) - 1
        if steps < 1:
            raise ValueError(
                "These settings leave no step to sample; check start_at_step, end_at_step and denoise, or the sigmas."
            )
        return steps

    def sampler_object(self) -> Any:
        return comfy.samplers.sampler_object(self.sampler_name) if self.sampler is None else self.sampler

    def noise_of(self, latent: dict[str, Any], seed: int):
        """Noise of a LATENT's shape: that of the wired NOISE with another seed, or of KSampler with this one."""
        if self.noise is not None:
            return reseeded(self.noise, seed - self.noise.seed).generate_noise(latent)
        if not self.add_noise:
            return no_noise(latent["samples"])
        return comfy.sample.prepare_noise(latent["samples"], seed, latent.get("batch_index"))

    @property
    def count(self) -> int:
        """Number of prompts that take turns."""
        return self.own + len(self.prompts or ())

    @property
    def own(self) -> int:
        """1 where there is a positive conditioning beside `prompts`."""
        return int(self.guider is not None or self.positive is not None)

    def rows(self) -> list[int]:
        """Number of prompts in each entry that takes turns: a batch in one entry has several."""
        if self.guider is None:
            own = converted(self.positive)
        else:
            own = getattr(self.guider, "original_conds", {}).get("positive", [])
        conds = [own] * self.own + [[cond] for cond in converted(self.prompts)]
        return [max(map(prompts_of, entries), default=1) for entries in conds]

    def guider_on(self, patcher, prompt: int = 0, first: int = 0) -> Any:
        """The guider that samples with this MODEL, for the images of a prompt from number `first` on."""
        positive = self.positive if prompt < self.own else [self.prompts[prompt - self.own]]
        if self.guider is None:
            guider = comfy.samplers.CFGGuider(patcher)
            guider.set_conds(positive, self.negative)
            guider.set_cfg(self.cfg)
        else:
            guider = on_model(self.guider, patcher)
            if "positive" not in guider.original_conds and self.prompts:
                raise ValueError(
                    f"The guider {type(guider).__name__} has no positive conditioning that `prompts` could take turns "
                    "with; disconnect prompts, or wire another guider."
                )
            if prompt >= self.own:
                guider.original_conds["positive"] = converted(positive)
        if first:
            guider.original_conds = {name: from_image(conds, first) for name, conds in guider.original_conds.items()}
        return guider

    def describe(self, patcher) -> dict[str, Any]:
        """Names for notes; those of the objects where they are wired."""
        sampler = self.sampler_name if self.sampler is None else sampler_function_name(self.sampler)
        scheduler = self.scheduler if self.sigmas is None else "sigmas"
        guidance = self.cfg if self.guider is None else guidance_of(self.guider)
        return {"sampler": sampler, "scheduler": scheduler, "steps": self.steps_on(patcher), "cfg": guidance}


def converted(conditioning: Any) -> Conds:
    """A CONDITIONING as guiders hold it."""
    return comfy.sampler_helpers.convert_cond(conditioning or [])


def model_of(guider) -> Any:
    """The MODEL of a wired guider, with the options that it samples with. Raises ValueError where it has none."""
    patcher = getattr(guider, "model_patcher", None)
    if not isinstance(patcher, comfy.model_patcher.ModelPatcher):
        raise ValueError(f"The guider ({type(guider).__name__}) has no MODEL of its own; wire a guider of one.")
    patcher = patcher.clone()
    options = getattr(guider, "model_options", patcher.model_options)
    patcher.model_options = comfy.model_patcher.create_model_options_clone(options)
    return patcher


def on_model(guider, patcher) -> Any:
    """A copy of a guider that samples with another MODEL; the guider itself stays as it is."""
    made = copy.copy(guider)
    made.original_conds = conds = dict(getattr(guider, "original_conds", {}))
    hooked = any(comfy.sampler_helpers.cond_has_hooks([(None, cond) for cond in entries]) for entries in conds.values())
    try:
        # as CFGGuider does it where conditions have hooks
        made.model_patcher = patcher.get_non_dynamic_delegate() if hooked and patcher.is_dynamic() else patcher
        made.model_options = patcher.model_options
    except AttributeError as error:
        raise ValueError(
            f"The guider {type(guider).__name__} does not let its MODEL be exchanged ({error}); wire another guider."
        ) from error
    return made


def reseeded(noise, by: int) -> Any:
    """A copy of a NOISE, and of those that it mixes, whose seeds are this much larger."""
    made = copy.copy(noise)
    for name, value in vars(noise).items():
        if hasattr(value, "generate_noise"):
            setattr(made, name, reseeded(value, by))
        elif name == "seed":
            made.seed = (value + by) % SEEDS
    return made


def no_noise(samples) -> Any:
    """Zeros in the place of noise, nested where the samples are; older versions of ComfyUI have no function for it."""
    if samples.is_nested:
        return type(samples)([torch.zeros_like(part, device="cpu") for part in samples.unbind()])
    return torch.zeros_like(samples, device="cpu")


def prompts_of(cond: dict[str, Any]) -> int:
    """Number of images that one entry has prompts for, before it starts over."""
    context = cond.get("cross_attn")
    if not isinstance(context, Tensor) or not context.ndim:
        return 1
    return math.lcm(*context.shape[:2]) if is_classes(context) else len(context)


def from_image(conds: Conds, first: int) -> Conds:
    """Conditions of a batch whose first image is number `first`: batches of prompts and lists of classes go on where
    the batch before stopped, instead of starting again.
    """
    rotated = []
    for cond in conds:
        context: Any = cond.get("cross_attn")
        prompts = len(context) if isinstance(context, Tensor) and context.ndim else 1
        kept = {key: rolled(value, prompts, first) for key, value in cond.items()}
        if is_classes(context):
            kept["cross_attn"] = context.roll((-first, -first), (0, 1))
        rotated.append(kept)
    return rotated


def rolled(value: Any, prompts: int, first: int) -> Any:
    """A batch of as many prompts, such as their pooled outputs, with number `first` in front; all else as it is."""
    if isinstance(value, Tensor) and prompts > 1 and value.ndim and len(value) == prompts:
        return value.roll(-first, 0)
    return value


def sampler_options(sampler) -> dict[str, float]:
    """The numbers that a sampler takes, such as eta, defaults included: a node may pass what another leaves out."""
    function = getattr(sampler, "sampler_function", None)
    parameters = inspect.signature(function).parameters if function is not None else {}
    values = {name: parameter.default for name, parameter in parameters.items()} | getattr(sampler, "extra_options", {})
    # JSON has no infinity
    return {k: float(v) for k, v in values.items() if isinstance(v, (int, float)) and math.isfinite(v)}


def guidance_of(guider) -> float | str:
    """cfg, or the name and the numbers of a guider that combines its predictions in a way of its own."""
    if getattr(type(guider), "predict_noise", None) is comfy.samplers.CFGGuider.predict_noise:
        return float(guider.cfg)
    numbers = {
        name: value
        for name, value in sorted(vars(guider).items())
        if isinstance(value, (int, float)) and not name.startswith("_")
    }
    return f"{type(guider).__name__} ({', '.join(f'{name} {value:g}' for name, value in numbers.items())})"


def image_numbers(batch: Batch, prompts: int) -> list[int]:
    """Numbers of a batch's images among all, which take so many prompts in turn."""
    return [(batch.first + i) * prompts + batch.prompt for i in range(batch.size)]


def images_of(latent: dict[str, Any], numbers: Sequence[int]) -> dict[str, Any]:
    """The LATENT's images of these numbers, which start over at its end, with their masks.

    Their places in the noise too, while none comes twice: one seed has one noise for each place.
    """
    count = batch_of(latent["samples"])
    rows = [number % count for number in numbers]
    taken = {**latent, "samples": latent["samples"][rows]}
    if (mask := latent.get("noise_mask")) is not None and batch_of(mask) == count:
        taken["noise_mask"] = mask[rows]
    if (places := taken.pop("batch_index", None)) is not None and max(numbers) < count:
        taken["batch_index"] = [places[row] for row in rows]
    return taken


def parts_of(latent) -> list[Tensor]:
    """The tensors of a latent: several where it is nested, as of video and sound."""
    return latent.unbind() if latent.is_nested else [latent]


def batch_of(latent) -> int:
    return len(parts_of(latent)[0])
