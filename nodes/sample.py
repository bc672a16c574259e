from __future__ import annotations

import comfy.sample
from comfy_api.v0_0_2 import io

from . import schema
from .comfyui.defaults import completed
from .comfyui.reporting import measured_sample
from .comfyui.sampling import fitted_latent
from .comfyui.settings import Settings


class Sample(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="QandC_Sample",
            display_name="Sample",
            category=schema.CATEGORY,
            description="KSampler with a report of the run: the time of every step, which steps were computed or "
            "reused, memory. Gives the same images as KSampler.",
            search_aliases=["ksampler", "report", "benchmark", "timing"],
            inputs=[
                io.Model.Input("model", tooltip="The model that denoises."),
                *schema.conditioning(),
                schema.latent("The latent to denoise: empty, or an encoded image."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=schema.MAX_SEED,
                    control_after_generate=io.ControlAfterGenerate.fixed,
                    tooltip="Seed of the noise. Runs with the same seed can be compared.",
                ),
                *schema.sampler_settings("of the run"),
                schema.fraction("denoise", 1.0, "Below 1, part of the input image is kept."),
                schema.label(),
            ],
            outputs=[
                io.Latent.Output(display_name="latent", tooltip="The denoised latent."),
                schema.Report.Output(
                    "report", display_name="report", tooltip="The measurements of the run, for Compare."
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: io.Model.Type,
        positive,
        negative,
        latent_image,
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        denoise: float,
        label: str,
    ) -> io.NodeOutput:
        settings = completed(Settings(positive, negative, steps, cfg, sampler_name, scheduler, denoise), model)
        latent = fitted_latent(model, latent_image)
        noise = comfy.sample.prepare_noise(latent, seed, latent_image.get("batch_index"))
        samples, report = measured_sample(model, settings, latent, noise, seed, label, latent_image.get("noise_mask"))
        kept = {key: value for key, value in latent_image.items() if not key.startswith("downscale_ratio")}
        return io.NodeOutput({**kept, "samples": samples}, report)
