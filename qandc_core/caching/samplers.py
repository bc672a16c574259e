"""Whether reuse pays with a sampler: how strongly its step responds to an error in the newest prediction.

A multistep formula extrapolates predictions itself, so it multiplies what a forecast errs by: Adams-Bashforth weighs
the newest prediction by 3/2, 23/12 and 55/24 for two, three and four of them, where Euler has 1. Samplers of higher
order, whether by several predictions or by two model calls a step, also need few steps for a good image, so that a
cache has to beat more. CFG++ steps along the unconditional prediction, whose error guidance does not damp.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, inf

ONE_CALL = ("euler", "ddim", "exp_heun_2_x0", "ddpm", "euler_ancestral", "lcm")
TWO_CALLS = ("heun", "heunpp2", "dpm_2")
SECOND_ORDER = ("dpmpp_2m", "res_multistep")
CORRECTED = ("uni_pc", "uni_pc_bh2", "unipc", "unipc_bh2")
HIGHER_ORDER = ("deis", "lms", "ipndm", "ipndm_v", "gradient_estimation")

NEVER = 10**9
# Computed steps below which reuse was no better than a run of as many steps, or was not seen to be: chosen on the
# built-in model, where it pays least, by eight samplers at 12, 20 and 30 steps; the others take the number of their
# kind. On the flow model reuse was better with all that were tried. benchmarks/caching/samplers.py measures all.
FEWEST = {
    **dict.fromkeys(ONE_CALL, 5),
    **dict.fromkeys(SECOND_ORDER, 7),
    **dict.fromkeys(CORRECTED, 13),
    **dict.fromkeys(TWO_CALLS, 15),
    **dict.fromkeys(HIGHER_ORDER, 20),
    **dict.fromkeys(("dpm_fast_function", "dpm_adaptive_function"), NEVER),  # they do not follow the schedule
}
CFG_PP, NOISY, UNKNOWN = 10, 4, 20
# With noise, three predictions deep: 4 of 8 steps were worse than 4 steps, on the flow model 6 of 12 and 10 of 20 too.
NOISY_MULTISTEP = {"dpmpp_3m_sde": 13}
# At 2.5 (20 of 50 steps) ipndm and ipndm_v were worse than as many steps, at 2 better. With noise, two deep,
# 10 of 20 and 10 of 30 steps were worse on the flow model and half of them equal on both, two of three better.
LARGEST = dict.fromkeys(HIGHER_ORDER, 2.0) | dict.fromkeys(("dpmpp_2m_sde", "dpmpp_2m_sde_heun"), 1.5)
# CFG++ on a flow model leaves the formulas of several predictions no nearer to a solution with more steps, and reuse no
# better than fewer of them.
FLOW_CFG_PP = ("euler_cfg_pp", "euler_ancestral_cfg_pp")


@dataclass(frozen=True)
class SamplerFacts:
    """A sampler's name, whether it adds noise, below how many computed steps fewer steps are as good as reuse, and the
    speedup beyond which they are."""

    name: str = "this sampler"
    noisy: bool = False
    fewest: int = UNKNOWN
    largest: float = inf

    @classmethod
    def named(cls, name: str, noisy: bool | None = None, flow: bool = False) -> SamplerFacts:
        """By its name in k-diffusion and ComfyUI, without "sample_"; "" where that is not known. `flow` says that the
        model is one of rectified flow."""
        shown = name.replace("unipc", "uni_pc").removesuffix("_function") or "this sampler"
        noisy = name == "ddpm" if noisy is None else noisy
        known = name.removesuffix("_gpu")
        if flow and known.endswith("_cfg_pp") and known not in FLOW_CFG_PP:
            return cls(shown, noisy, NEVER)
        if noisy:
            return cls(shown, noisy, NOISY_MULTISTEP.get(known, NOISY), LARGEST.get(known, inf))
        kind = known.removesuffix("_cfg_pp")
        fewest = max(FEWEST.get(kind, UNKNOWN), CFG_PP * known.endswith("cfg_pp"))
        return cls(shown, noisy, fewest, LARGEST.get(kind, inf))

    def enough(self, total: int, num_computed: int) -> int:
        """As many computed steps of so many, or more where fewer steps are as good as that."""
        return max(num_computed, self.fewest, ceil(total / self.largest))
