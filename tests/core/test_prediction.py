import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from qandc_core import DiT, DiTConfig, generate, load_dit, save_dit

STEPS, LABELS = 10, [1, 2, 3]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = DiT(DiTConfig(8, 2, 3, 32, 2, 4, num_classes=10, learn_sigma=False, prediction="sample")).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return model


@pytest.mark.parametrize("sampler,scheduler", [("ddpm", DDPMScheduler), ("ddim", DDIMScheduler)])
def test_a_model_that_predicts_the_clean_image_equals_diffusers(model, sampler, scheduler):
    noise = torch.randn(1 + STEPS, 3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    reference = scheduler(
        beta_start=1e-4, beta_end=0.02, clip_sample=False, prediction_type="sample", timestep_spacing="leading",
        steps_offset=0,
    )  # fmt: skip
    reference.set_timesteps(STEPS)
    x, labels = noise[0], torch.tensor(LABELS)
    for i, t in enumerate(reference.timesteps):
        with torch.no_grad():
            both = model(torch.cat([x, x]), t.expand(6), torch.cat([labels, torch.full((3,), 10)]))
        conditional, unconditional = both.chunk(2)
        guided = unconditional + 4.0 * (conditional - unconditional)
        if sampler == "ddim":
            x = reference.step(guided, t, x).prev_sample
        else:
            # The scheduler draws its noise itself; without it the step is the posterior mean.
            generator = torch.Generator().manual_seed(7)
            own = torch.randn(x.shape, generator=torch.Generator().manual_seed(7))
            std = reference._get_variance(t, variance_type="fixed_small") ** 0.5 if t > 0 else 0.0
            x = reference.step(guided, t, x, generator=generator).prev_sample - std * own + std * noise[1 + i]
    found, _ = generate(model, LABELS, STEPS, 4.0, sampler, noise=noise, spacing="leading")
    torch.testing.assert_close(found, x, rtol=1e-5, atol=1e-5 * float(x.abs().max()))


def test_the_kind_of_prediction_survives_the_file(model, tmp_path):
    save_dit(model, tmp_path / "model.safetensors")
    assert load_dit(tmp_path / "model.safetensors").config == model.config
