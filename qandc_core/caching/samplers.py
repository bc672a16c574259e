"""What of a sampler decides whether reuse pays: how strongly a step answers to an error in its newest prediction.

A multistep formula extrapolates predictions itself, so it multiplies what a forecast errs by: Adams-Bashforth weighs
the newest prediction by 3/2, 23/12 and 55/24 for two, three and four of them, where Euler has 1. Such a sampler also
needs few steps for a good image, so that a cache has to beat more. Both grow together, and one number stands for them.

The least numbers of computed steps were chosen on exact denoisers of random Gaussian mixtures
(`benchmarks/caching/mixture.py`), and are judged on trained models.
"""

from __future__ import annotations

from dataclasses import dataclass

# Weight of the newest prediction in a step; of samplers that are not listed nothing is known.
WEIGHTS = {
    **dict.fromkeys(("euler", "ddim", "heun", "heunpp2", "exp_heun_2_x0", "dpm_2"), 1.0),
    **dict.fromkeys(("euler_cfg_pp", "ddpm", "euler_ancestral", "euler_ancestral_cfg_pp", "lcm"), 1.0),
    **dict.fromkeys(("dpmpp_2m", "dpmpp_2m_cfg_pp", "res_multistep", "res_multistep_cfg_pp"), 1.5),
    **dict.fromkeys(("uni_pc", "uni_pc_bh2", "unipc", "unipc_bh2"), 1.5),
    **dict.fromkeys(("deis", "lms"), 23 / 12),
    **dict.fromkeys(("gradient_estimation", "gradient_estimation_cfg_pp"), 2.0),
    **dict.fromkeys(("ipndm", "ipndm_v"), 55 / 24),
}


@dataclass(frozen=True)
class SamplerFacts:
    """A sampler: its name, whether it adds noise, and the weight of the newest prediction (infinite: not known)."""

    name: str = "this sampler"
    noisy: bool = False
    weight: float = float("inf")

    @classmethod
    def named(cls, name: str, noisy: bool | None = None) -> SamplerFacts:
        """By its name in k-diffusion and ComfyUI, without "sample_"; "" where that is not known."""
        shown = name.replace("unipc", "uni_pc") or "this sampler"
        return cls(shown, name == "ddpm" if noisy is None else noisy, WEIGHTS.get(name, float("inf")))

    @property
    def fewest(self) -> int:
        """Computed steps below which reuse is no better than a run of as many steps."""
        if self.noisy:
            return 4
        return 5 if self.weight <= 1 else 6 if self.weight <= 1.5 else 20
