"""Measured times of a step as sentences; what was not measured is not spoken of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .profile import ATTENTION, COPIES, DECODING, ELEMENTWISE, IDLE, OTHER, PRODUCTS, ROUNDING

SHARES = {
    ATTENTION: "attention",
    ELEMENTWISE: "normalisation and other elementwise work",
    ROUNDING: "rounding inputs to 8 bits",
    DECODING: "decoding 4-bit weights",
    COPIES: "copying",
    OTHER: "other work",
    IDLE: "waiting for the next kernel",
}
LEAST_SHARE = 0.005  # of the step; less is not worth a word


@dataclass(frozen=True)
class StepProfile:
    """Seconds of a computed and of a reused step and by group (profile_step); operations/s that the matrix products
    achieve and their ceiling; the least seconds of the step (floor_seconds); how many times faster than
    `against` the whole step is. None or empty: not measured.
    """

    label: str
    computed: float
    reused: float | None = None
    groups: Mapping[str, float] = field(default_factory=dict)
    achieved: float | None = None
    ceiling: float | None = None
    floor: float | None = None
    against: str = "float32"
    step_gain: float | None = None

    def share(self, *groups: str) -> float:
        """Of the time that the profiler saw, 0 to 1."""
        total = sum(self.groups.values())
        return sum(self.groups.get(group, 0.0) for group in groups) / total if total else 0.0

    @property
    def product_share(self) -> float | None:
        """How close the matrix products come to the ceiling, 0 to 1."""
        return None if self.achieved is None or self.ceiling is None else self.achieved / self.ceiling


def explain(result: StepProfile) -> list[str]:
    """What a step costs, what of it is reused, how far it is from the machine's limits, and what would help most."""
    sentences = [computed_sentence(result), reused_sentence(result), floor_sentence(result), gain_sentence(result)]
    return [sentence for sentence in (*sentences, help_sentence(result)) if sentence is not None]


def computed_sentence(result: StepProfile) -> str:
    start = f"{result.label}: a computed step" if result.label else "A computed step"
    parts = ", ".join(share_phrases(result))
    return f"{start} takes {duration(result.computed)}" + (f"; {parts}." if parts else ".")


def share_phrases(result: StepProfile) -> list[str]:
    """Of each group that matters, products first: "71 % of it multiplies matrices", "12 % is attention", "9 % ..."."""
    phrases, verbs = [], ["is "]
    if result.share(PRODUCTS) >= LEAST_SHARE:
        phrases.append(f"{percent(result.share(PRODUCTS))} of it multiplies matrices{reach(result.product_share)}")
    else:
        verbs = ["of it is "]
    for group, words in SHARES.items():
        if result.share(group) >= LEAST_SHARE:
            phrases.append(f"{percent(result.share(group))} {verbs.pop() if verbs else ''}{words}")
    return phrases


def reach(share: float | None) -> str:
    if share is None:
        return ""
    if share >= 0.995:
        return ", as fast as this machine can"
    return f", at {percent(share)} of what this machine reaches"


def reused_sentence(result: StepProfile) -> str | None:
    if result.reused is None:
        return None
    return f"A reused step takes {percent(result.reused / result.computed)} of a computed one."


def floor_sentence(result: StepProfile) -> str | None:
    if result.floor is None:
        return None
    return (
        f"Computing a step takes this machine at least {duration(result.floor)}, with arithmetic and memory at their "
        f"measured best; the measured step is {times(result.computed / result.floor)} as long."
    )


def gain_sentence(result: StepProfile) -> str | None:
    if result.step_gain is None:
        return None
    return f"Against {result.against} the whole step is {compared(result.step_gain)}."


def help_sentence(result: StepProfile) -> str | None:
    """The largest part of the step that could be saved; a group whose limit is unknown counts where it is larger than
    all that is known.
    """
    known = savings(result)
    if not known:
        return None
    advice = max(known, key=lambda name: known[name])
    if result.share(ATTENTION) > max(known[advice], 0.5):
        share = percent(result.share(ATTENTION))
        return f"What would help most: a faster attention, {share} of the step; how fast it could be was not measured."
    if known[advice] < 0.05:
        return "No single change would save more than 5 % of the step."
    return f"What would help most: {advice}, at most {percent(known[advice])} of the step."


def savings(result: StepProfile) -> dict[str, float]:
    """Share of the step that each kind of change could save at most."""
    if not result.groups:
        return {}
    shares = {
        "fusing element-wise work, rounding and copies into the matrix products": result.share(
            ELEMENTWISE, ROUNDING, COPIES
        ),
        "leaving the device no time to wait (a CUDA graph, or a larger batch)": result.share(IDLE),
        "W8A8, whose weights need no decoding": result.share(DECODING),
    }
    if result.product_share is not None:
        shares["matrix products nearer to what this machine reaches"] = result.share(PRODUCTS) * max(
            0.0, 1 - result.product_share
        )
    return shares


def compared(gain: float) -> str:
    """1.9 -> "1.9x faster", 0.8 -> "1.2x slower"."""
    if 0.95 < gain < 1.05:
        return "as fast"
    return f"{times(gain if gain > 1 else 1 / gain)} {'faster' if gain > 1 else 'slower'}"


def times(ratio: float) -> str:
    return f"{ratio:.1f}x" if ratio < 10 else f"{ratio:.0f}x"


def percent(share: float) -> str:
    """Whole percents; below one a tenth."""
    if share < 0.0005:
        return "less than 0.1 %"
    return f"{100 * share:.1f} %" if share < 0.00995 else f"{100 * share:.0f} %"


def duration(seconds: float) -> str:
    """Two or three digits in the unit that fits: "1.2 s", "812 ms", "450 us"."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= 0.9995 * size or unit == "us":
            break
    value = seconds / size
    return f"{value:.1f} {unit}" if value < 9.95 else f"{value:.0f} {unit}"
