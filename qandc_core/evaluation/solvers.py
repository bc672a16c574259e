"""The solvers that a plain run could take instead: those of diffusers, around our model and its guidance."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor

from ..diffusion.guidance import guided_prediction
from ..diffusion.noise import ImageNoise
from ..diffusion.process import SamplingConfig
from ..diffusion.schedule import TRAINING_STEPS
from ..models.dit import DiT

# Both of second order, as guided sampling wants them, at the noise levels that serve each best on the built-in model:
# DPM-Solver++ (arXiv 2211.01095) at even steps of log SNR, UniPC (arXiv 2302.04867) at those of Karras et al.
SOLVERS: dict[str, Callable[..., Any]] = {
    "DPM-Solver++ 2M": partial(DPMSolverMultistepScheduler, use_lu_lambdas=True),
    "UniPC": partial(UniPCMultistepScheduler, use_karras_sigmas=True),
}


def scheduler(solver: str, prediction: str) -> Any:
    """The solver at the noise schedule that our models are trained on."""
    betas = {"num_train_timesteps": TRAINING_STEPS, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
    return SOLVERS[solver](**betas, prediction_type=prediction)


@torch.inference_mode()
def solve(model: DiT, labels: Tensor, config: SamplingConfig, solver: Any, seed: int, first_index: int = 0) -> Tensor:
    """Samples (N, C, H, W) float32 from the noise that generate() starts from; `solver` is a scheduler of diffusers."""
    device, dtype = model.pos_embed.device, model.pos_embed.dtype
    x = ImageNoise(seed, range(first_index, first_index + len(labels)), model.config.shape).draw().to(device)
    predict = partial(
        guided_prediction,
        model,
        y=labels.to(device),
        null_class=model.null_class if config.cfg_scale != 1 else -1,
        scale=config.cfg_scale,
        channels=config.guidance_channels,
        batched=config.batched_guidance,
    )
    solver.set_timesteps(config.steps)
    for timestep in solver.timesteps:
        prediction, _ = predict(x.to(dtype), torch.full((len(x),), int(timestep), device=device))
        x = solver.step(prediction.float(), timestep, x).prev_sample
    return x
