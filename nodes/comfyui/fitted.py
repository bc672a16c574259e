"""The kind of run that a variance compensation was fitted for, and the check that a run is of that kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .settings import guidance_of, sampler_options
from .wrappers import details, sampler_function_name


@dataclass(frozen=True)
class FittedFor:
    """The kind of run that a compensation belongs to; None where a file of an older version does not say."""

    sampler: str
    options: Mapping[str, Any] | None = None
    cfg: float | str | None = None
    channels: Sequence[int] | None = None
    attached: Mapping[str, str] | None = None

    @classmethod
    def from_notes(cls, notes: Mapping[str, Any]) -> FittedFor:
        """Raises ValueError where they do not name a sampler, as of a file that the command line made."""
        if "sampler_function" not in notes:
            raise ValueError("This compensation was not fitted by Variance Compensate in ComfyUI; fit one here.")
        known = (notes.get(key) for key in ("sampler_options", "cfg", "channels", "attached"))
        return cls(notes["sampler_function"], *known)

    def notes(self) -> dict[str, Any]:
        return {
            "sampler_function": self.sampler,
            "sampler_options": self.options,
            "cfg": self.cfg,
            "channels": self.channels,
            "attached": self.attached,
        }

    def check(self, guider, sampler, channels: Sequence[int]) -> None:
        """Raises ValueError where a run is of another kind."""
        name, options = sampler_function_name(sampler), sampler_options(sampler)
        if name != self.sampler:
            raise differs("with", self.sampler, "samples with", name, "choose the same sampler in both nodes")
        if self.options is not None and options != self.options:
            changed = {key for key in {*options, *self.options} if options.get(key) != self.options.get(key)}
            before, now = (", ".join(f"{key} {o.get(key)}" for key in sorted(changed)) for o in (self.options, options))
            raise differs(f"with {name} at", before, "has", now, "use the sampler's settings of the fit")
        guidance = guidance_of(guider)
        if self.cfg is not None and guidance != self.cfg:
            raise differs("with cfg", self.cfg, "is guided by", guidance, "use the fit's cfg, or fit again")
        if self.channels is not None and list(channels) != list(self.channels):
            raise differs("for channels", list(self.channels), "has", list(channels), "fit again for this model")
        if self.attached is not None and details(guider.model_patcher) != self.attached:
            raise differs(
                "with",
                words(self.attached),
                "has",
                words(details(guider.model_patcher)),
                "put Variance Compensate after the nodes that cache and quantize, and fit again",
            )


def differs(by: str, fitted: Any, verb: str, found: Any, advice: str) -> ValueError:
    return ValueError(f"The variance compensation was fitted {by} {fitted}, and this run {verb} {found}; {advice}.")


def words(attached: Mapping[str, str]) -> str:
    return ", ".join(f"{topic} {detail}" for topic, detail in attached.items()) or "no cache and no quantization"
