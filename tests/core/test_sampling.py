import json
import math
from dataclasses import replace

import diffusers.schedulers.scheduling_ddpm as diffusers_ddpm
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from qandc_core.caching.attach import apply_cache_to_dit, cache_bypassed, feature_cache
from qandc_core.diffusion.guidance import guided_prediction
from qandc_core.diffusion.noise import ImageNoise
from qandc_core.diffusion.process import SamplingConfig
from qandc_core.diffusion.schedule import from_sigmas, respaced
from qandc_core.models import DiT, DiTConfig
from qandc_core.sampling.generate import generate

CONFIG = DiTConfig(input_size=8, in_channels=4, hidden_size=32, depth=2, num_heads=2, num_classes=10)
LABELS = [3, 7]
BETAS = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "clip_sample": False}


pytestmark = pytest.mark.usefixtures("no_grad")


class GaussianDiT(DiT):
    """Random weights around the score of unit Gaussian data: samples keep unit size, so that no step's error hides."""

    def forward(self, x, timesteps, y):
        alpha_bar = (1 - torch.linspace(1e-4, 0.02, 1000)).cumprod(0)[timesteps]
        out = super().forward(x, timesteps, y)
        return torch.cat([out[:, :4] + (1 - alpha_bar).sqrt()[:, None, None, None] * x, out[:, 4:]], dim=1)


def tiny_dit(**overrides):
    torch.manual_seed(0)
    return GaussianDiT(replace(CONFIG, **overrides)).eval()


@pytest.fixture
def model():
    return tiny_dit()


def random_noise(steps, images=2, seed=1):
    return torch.randn(1 + steps, images, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def relative_error(a, b):
    return float((a - b).abs().max() / b.abs().max())


def recorded(model, *args, **kwargs):
    """Images, report and the callback's values of one run."""
    infos = []
    images, report = generate(model, *args, callback=infos.append, **kwargs)
    return images, report, infos


def forward_with_cfg(model, x, t, y, scale, channels):
    """The formula of facebookresearch/DiT: the first `channels` outputs are guided, the rest kept of each half."""
    half = x[: len(x) // 2]
    out = model(torch.cat([half, half]), t, y)
    eps, rest = out[:, :channels], out[:, channels:]
    cond, uncond = eps.split(len(eps) // 2)
    half_eps = uncond + scale * (cond - uncond)
    return torch.cat([torch.cat([half_eps, half_eps]), rest], dim=1)


def guided_output(model, x, t, labels, scale=4.0, channels=4):
    """Guided noise and the conditional half's variance output for one timestep, (N, out_channels, H, W)."""
    y = torch.tensor([*labels, *[model.null_class] * len(labels)])
    return forward_with_cfg(model, torch.cat([x, x]), torch.full((len(y),), int(t)), y, scale, channels)[: len(x)]


def scheduler_run(scheduler, model, steps, noise, channels=4, learned=False):
    """x after every step of a diffusers scheduler."""
    scheduler.set_timesteps(steps)
    x, visited = noise[0], []
    for t in scheduler.timesteps:
        out = guided_output(model, x, t, LABELS, channels=channels)
        x = scheduler.step(out if learned else out[:, :4], t, x).prev_sample
        visited.append(x)
    return visited


# Schedules and steps against diffusers


@pytest.mark.parametrize("spacing", ["linspace", "leading"])
def test_every_step_count_visits_the_timesteps_of_diffusers(spacing):
    scheduler = DDPMScheduler(timestep_spacing=spacing, **BETAS)
    for steps in range(1, 1001):
        scheduler.set_timesteps(steps)
        schedule = respaced(steps, spacing)
        assert list(schedule.timesteps) == scheduler.timesteps.tolist(), steps
    assert schedule.alpha_bar[-1] == 1
    torch.testing.assert_close(
        torch.tensor(schedule.alpha_bar[:-1]), scheduler.alphas_cumprod.flip(0), rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("steps", [7, 20])
@pytest.mark.parametrize("spacing", ["linspace", "leading"])
@pytest.mark.parametrize("variance", ["fixed_small", "learned_range"])
@pytest.mark.parametrize("channels", [4, 3])
def test_ddpm_run_equals_diffusers(monkeypatch, model, steps, spacing, variance, channels):
    noise = random_noise(steps)
    queue = iter(noise[1:])
    monkeypatch.setattr(diffusers_ddpm, "randn_tensor", lambda *a, **k: next(queue))
    scheduler = DDPMScheduler(variance_type=variance, timestep_spacing=spacing, **BETAS)
    expected = scheduler_run(scheduler, model, steps, noise, channels, variance == "learned_range")

    images, _, infos = recorded(
        model, LABELS, steps, noise=noise, spacing=spacing, variance=variance,
        guidance_channels=None if channels == 4 else channels,
    )  # fmt: skip
    assert len(infos) == steps
    for info, x in zip(infos, expected):
        assert relative_error(info.x, x) < 1e-5, info.index
    assert torch.equal(images, infos[-1].x)


@pytest.mark.parametrize("steps", [1, 7, 20])
def test_ddim_run_equals_diffusers(model, steps):
    noise = random_noise(0)
    scheduler = DDIMScheduler(timestep_spacing="leading", **BETAS)
    expected = scheduler_run(scheduler, model, steps, noise)
    _, _, infos = recorded(model, LABELS, steps, sampler="ddim", spacing="leading", noise=noise[0])
    assert len(infos) == steps
    for info, x in zip(infos, expected):
        assert relative_error(info.x, x) < 1e-5, info.index


def test_learned_variance_changes_the_images(model):
    # guards the comparison above against a model whose variance output has no effect
    fixed, learned = (generate(model, LABELS, 20, variance=v)[0] for v in ("fixed_small", "learned_range"))
    assert relative_error(learned, fixed) > 1e-2


@pytest.mark.parametrize("scale", [1.0, 1.5, 7.0])
def test_generate_equals_a_hand_written_loop(model, scale):
    """The posterior of DDPM, Eq. 6-7, with coefficients from float64."""
    steps, noise = 6, random_noise(6)
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    alpha_bar = (1 - beta).cumprod(0)
    timesteps = [round(999 * (steps - 1 - i) / (steps - 1)) for i in range(steps)]
    x, y, null = noise[0], torch.tensor(LABELS), torch.tensor([10, 10])
    for i, t in enumerate(timesteps):
        a, b = float(alpha_bar[t]), float(alpha_bar[timesteps[i + 1]]) if i + 1 < steps else 1.0
        tt = torch.full((2,), t)
        cond, uncond = model(x, tt, y)[:, :4], model(x, tt, null)[:, :4]
        eps = (1 - scale) * uncond + scale * cond
        x0 = (x - (1 - a) ** 0.5 * eps) / a**0.5
        beta_t = 1 - a / b
        x = b**0.5 * beta_t / (1 - a) * x0 + (a / b) ** 0.5 * (1 - b) / (1 - a) * x
        x = x + ((1 - b) / (1 - a) * beta_t) ** 0.5 * noise[i + 1]
    images, _ = generate(model, LABELS, steps, cfg_scale=scale, noise=noise)
    assert relative_error(images, x) < 1e-5


class SampleDiT(GaussianDiT):
    """The same model, saying the clean image in place of the noise."""

    def forward(self, x, timesteps, y):
        out = super().forward(x, timesteps, y)
        a = (1 - torch.linspace(1e-4, 0.02, 1000)).cumprod(0)[timesteps][:, None, None, None]
        return torch.cat([(x - (1 - a).sqrt() * out[:, :4]) / a.sqrt(), out[:, 4:]], dim=1)


@pytest.mark.parametrize("sampler, variance", [("ddim", "fixed_small"), ("ddpm", "learned_range")])
@pytest.mark.parametrize("channels", [None, 3])
def test_a_model_of_the_clean_image_gives_the_run_of_its_noise(model, sampler, variance, channels):
    twin = SampleDiT(replace(CONFIG, prediction="sample")).eval()
    twin.load_state_dict(model.state_dict())
    kwargs = {"sampler": sampler, "variance": variance, "guidance_channels": channels, "noise": random_noise(8)}
    images, other = generate(model, LABELS, 8, **kwargs)[0], generate(twin, LABELS, 8, **kwargs)[0]
    assert relative_error(other, images) < 1e-4  # float32 loses digits at t = 999, where x0 is 160 times the noise


# Guidance


@pytest.mark.parametrize("channels", [None, 3])
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("learn_sigma", [True, False])
def test_guidance_is_the_published_formula(channels, batched, learn_sigma):
    model = tiny_dit(learn_sigma=learn_sigma)
    x, t, y = random_noise(0)[0], torch.tensor([500, 500]), torch.tensor(LABELS)
    eps, v = guided_prediction(model, x, t, y, model.null_class, 4.0, channels, batched)
    expected = guided_output(model, x, 500, LABELS, channels=channels or 4)
    assert relative_error(eps, expected[:, :4]) < 1e-5
    if learn_sigma:
        assert relative_error(v, expected[:, 4:]) < 1e-5
    else:
        assert v is None


def test_three_channel_guidance_leaves_the_fourth_unguided(model):
    x, t, y = random_noise(0)[0], torch.tensor([500, 500]), torch.tensor(LABELS)
    three, _ = guided_prediction(model, x, t, y, 10, 4.0, 3, True)
    every, _ = guided_prediction(model, x, t, y, 10, 4.0, None, True)
    plain = model(x, t, y)[:, :4]
    assert torch.equal(three[:, :3], every[:, :3])
    assert relative_error(three[:, 3:], plain[:, 3:]) < 1e-5
    assert relative_error(every[:, 3:], plain[:, 3:]) > 1e-2


@pytest.mark.parametrize("variance", ["fixed_small", "learned_range"])
def test_batched_and_split_guidance_agree(model, variance):
    one, two = (generate(model, LABELS, 8, variance=variance, batched_guidance=b)[0] for b in (True, False))
    assert relative_error(one, two) < 1e-5


@pytest.mark.parametrize("scale, batched, batches", [(1.0, True, [2]), (4.0, True, [4]), (4.0, False, [2, 2])])
def test_each_condition_is_evaluated_once(model, scale, batched, batches):
    seen = []
    model.register_forward_pre_hook(lambda m, args: seen.append(len(args[0])))
    generate(model, LABELS, 3, cfg_scale=scale, batched_guidance=batched)
    assert seen == batches * 3


def test_scale_one_is_the_conditional_model(model):
    noise = random_noise(4)
    free, _ = generate(model, LABELS, 4, cfg_scale=1.0, noise=noise)
    near, _ = generate(model, LABELS, 4, cfg_scale=1 + 1e-9, noise=noise)
    assert relative_error(free, near) < 1e-5


# Noise


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_image_depends_on_seed_and_index_only(model, sampler):
    labels = [3, 7, 0, 10]
    images, _ = generate(model, labels, 5, sampler=sampler, seed=5)
    for i, label in enumerate(labels):
        alone, _ = generate(model, [label], 5, sampler=sampler, seed=5, first_index=i)
        assert relative_error(alone[0], images[i]) < 1e-4
    tail, _ = generate(model, labels[1:], 5, sampler=sampler, seed=5, first_index=1)
    assert relative_error(tail, images[1:]) < 1e-4


def test_seed_and_index_change_the_image(model):
    first, _ = generate(model, [3, 3], 3, seed=0)
    other, _ = generate(model, [3, 3], 3, seed=1)
    assert relative_error(first[1], first[0]) > 0.1
    assert relative_error(other, first) > 0.1


def test_labels_may_be_a_list_or_a_tensor(model):
    assert torch.equal(generate(model, LABELS, 2)[0], generate(model, torch.tensor(LABELS, dtype=torch.int32), 2)[0])


@pytest.mark.parametrize("cached", [False, True])
def test_a_rerun_gives_identical_images(model, cached):
    if cached:
        apply_cache_to_dit(model, 3, order=1)
    assert torch.equal(generate(model, LABELS, 7)[0], generate(model, LABELS, 7)[0])


def test_the_seeds_own_start_as_noise_changes_nothing(model):
    # the steps' noise must follow the start, not repeat it
    start = ImageNoise(9, range(4, 6), (4, 8, 8)).draw()
    expected, _ = generate(model, LABELS, 4, seed=9, first_index=4)
    assert torch.equal(generate(model, LABELS, 4, seed=9, first_index=4, noise=start)[0], expected)


def test_given_start_keeps_images_independent_of_the_batch(model):
    start = random_noise(0, images=3)[0]
    whole, _ = generate(model, [1, 2, 3], 4, noise=start)
    tail, _ = generate(model, [2, 3], 4, noise=start[1:], first_index=1)
    assert relative_error(tail, whole[1:]) < 1e-4


def test_given_noise_may_have_another_size(model):
    noise = torch.randn(2, 4, 12, 16, generator=torch.Generator().manual_seed(0))
    images, _ = generate(model, LABELS, 2, noise=noise)
    assert images.shape == noise.shape and images.isfinite().all()


# Sigmas: the variance-exploding form of k-diffusion


def karras(steps, low=0.05, high=20.0, rho=7.0):
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    return (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho


def training_sigmas():
    alpha_bar = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    return ((1 - alpha_bar) / alpha_bar).sqrt().tolist()


def ve_run(model, sigmas, noise, sampler):
    """x in VE units, x_ve = x sqrt(1 + sigma^2), by Euler steps on d = (x - D) / sigma or by the posterior of x | D."""
    levels = training_sigmas()
    scale = [(1 + float(s) ** 2) ** 0.5 for s in sigmas]
    x = noise[0] * scale[0]
    for i, (s, s_next) in enumerate(zip(sigmas.tolist(), sigmas.tolist()[1:])):
        t = min(range(1000), key=lambda k: abs(math.log(levels[k] / s)))
        denoised = x - s * guided_output(model, x / scale[i], t, LABELS)[:, :4]
        if sampler == "ddim":
            x = x + (x - denoised) / s * (s_next - s)
        else:
            kept = s_next**2 / s**2
            x = kept * x + (1 - kept) * denoised + s_next * (1 - kept) ** 0.5 * noise[i + 1]
    return x / scale[-1]


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@pytest.mark.parametrize("end", [0.0, 0.7])
def test_sigmas_are_the_steps_of_k_diffusion(model, sampler, end):
    sigmas = torch.cat([karras(8, low=0.9), torch.tensor([end], dtype=torch.float64)])
    noise = random_noise(8)
    images, report = generate(model, LABELS, sampler=sampler, sigmas=sigmas, noise=noise)
    assert report.steps == 8
    assert relative_error(images, ve_run(model, sigmas, noise, sampler)) < 1e-5


def test_without_steps_there_are_50(model):
    assert generate(model, LABELS, cfg_scale=1.0)[1].steps == 50


@pytest.mark.parametrize("steps", [3, 50])
def test_steps_beside_sigmas_are_refused(model, steps):
    with pytest.raises(ValueError, match="`steps` and `sigmas` both say how many steps"):
        generate(model, LABELS, steps, sigmas=[5.0, 2.0, 0.5, 0.0])


@pytest.mark.parametrize("beside", [{"steps": 9}, {"spacing": "trailing"}])
def test_settings_of_sigmas_have_no_other_schedule(beside):
    sigmas = (5.0, 2.0, 0.5, 0.0)
    assert SamplingConfig(sigmas=sigmas).steps == 3
    assert replace(SamplingConfig(sigmas=sigmas), cfg_scale=1.0).steps == 3
    with pytest.raises(ValueError, match="`sigmas` is the whole schedule"):
        SamplingConfig(sigmas=sigmas, **beside)


def test_sigmas_of_a_schedule_give_the_schedule(model):
    schedule = respaced(9)
    again = from_sigmas(schedule.sigmas)
    assert again.timesteps == schedule.timesteps
    assert again.alpha_bar == pytest.approx(schedule.alpha_bar, rel=1e-9)
    by_steps, by_sigmas = generate(model, LABELS, 9)[0], generate(model, LABELS, sigmas=list(schedule.sigmas))[0]
    assert relative_error(by_sigmas, by_steps) < 1e-5


@given(st.lists(st.floats(1e-3, 200), min_size=2, max_size=12, unique=True))
@settings(deadline=None, max_examples=50)
def test_from_sigmas_keeps_the_noise_levels(values):
    sigmas = sorted(values, reverse=True)
    schedule = from_sigmas(sigmas)
    assert schedule.sigmas == pytest.approx(sigmas, rel=1e-6)
    assert list(schedule.timesteps) == sorted(schedule.timesteps, reverse=True)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.49, 0.51, 0.75])
def test_a_level_between_two_training_steps_is_the_nearer_in_log_sigma(share):
    """As in ComfyUI's ModelSamplingDiscrete and k-diffusion; low levels are so far apart that linear differs."""
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    table = np.log((1 - alpha_bar) / alpha_bar) / 2
    levels = np.exp(table[:-1] + share * np.diff(table))
    nearer = np.arange(999) + (share > 0.5)
    assert from_sigmas(levels[::-1].tolist()).timesteps == tuple(nearer[:0:-1])


def test_cache_counts_steps_that_share_a_timestep(model):
    # all of these lie below the lowest training noise level, so every step is timestep 0
    sigmas = [0.009, 0.007, 0.005, 0.003, 0.001, 0.0]
    assert set(from_sigmas(sigmas).timesteps) == {0}
    apply_cache_to_dit(model, 2)
    for batched in (True, False):
        _, report = generate(model, LABELS, sigmas=sigmas, batched_guidance=batched)
        assert report.computed == [True, False, True, False, True]


# Callback, report, errors


def test_callback_runs_once_per_step(model):
    apply_cache_to_dit(model, 2)
    noise = random_noise(5)
    images, report, infos = recorded(model, LABELS, 5, sampler="ddim", noise=noise[0])
    schedule = respaced(5)
    assert [info.index for info in infos] == [0, 1, 2, 3, 4]
    assert tuple(info.timestep for info in infos) == schedule.timesteps
    assert [info.computed for info in infos] == report.computed == [True, False, True, False, True]
    assert [info.seconds for info in infos] == report.seconds and min(report.seconds) > 0
    assert torch.equal(infos[-1].x, images)
    a, b = schedule.alpha_bar[2:4]
    # DDIM goes from x_2 to x_3 along the line through the predicted clean image
    eps = (infos[1].x - a**0.5 * infos[2].denoised) / (1 - a) ** 0.5
    assert relative_error(b**0.5 * infos[2].denoised + (1 - b) ** 0.5 * eps, infos[2].x) < 1e-5


def test_report_without_cache(model):
    _, report = generate(model, LABELS, 4, sampler="ddim", cfg_scale=2.0)
    assert (report.sampler, report.steps, report.images, report.cfg_scale, report.device) == ("ddim", 4, 2, 2.0, "cpu")
    assert report.computed == [True] * 4 and len(report.seconds) == 4
    assert report.cache_bytes == 0
    assert report.total_seconds == pytest.approx(sum(report.seconds))
    assert "4 steps computed and 0 reused" in report.summary()


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize(
    "chosen, computed",
    [({"cache_interval": 3}, {0, 3, 6}), ({}, {0, 3, 6}), ({"steps": [2, 5]}, {0, 2, 5}), ({"steps": []}, {0})],
)
def test_report_with_cache(model, chosen, computed, batched):
    apply_cache_to_dit(model, **chosen)
    _, report = generate(model, LABELS, 7, batched_guidance=batched)
    assert report.computed == [i in computed for i in range(7)]
    assert report.computed_steps == len(computed)
    # attention and MLP outputs of 2 blocks, 2 conditions, 2 images, 16 tokens of 32 float32
    assert report.cache_bytes == 2 * 2 * 2 * 2 * 16 * 32 * 4


def test_report_is_json(model):
    apply_cache_to_dit(model, 2)
    _, report = generate(model, LABELS, 3)
    values = json.loads(json.dumps(report.to_dict()))
    assert values["steps"] == 3 and values["computed"] == [True, False, True] and values["computed_steps"] == 2
    assert len(values["seconds"]) == 3 and values["total_seconds"] == pytest.approx(report.total_seconds)
    assert values["cache_bytes"] == report.cache_bytes > 0


@pytest.mark.parametrize(
    "labels, kwargs, message",
    [
        ([3, 11], {}, "class id 11 is out of range.*0 to 9"),
        ([-1], {}, "class id -1 is out of range"),
        ([], {}, "class_labels must be a non-empty list"),
        ([1.5], {}, "class_labels must be a non-empty list of integer"),
        (LABELS, {"sampler": "euler"}, "sampler must be one of ddpm, ddim, got 'euler'"),
        (LABELS, {"spacing": "trailing"}, "spacing must be one of linspace, leading, got 'trailing'"),
        (LABELS, {"variance": "learned"}, "variance must be one of fixed_small, learned_range, got 'learned'"),
        (LABELS, {"steps": 0}, "steps must be between 1 and 1000, got 0"),
        (LABELS, {"steps": 2.5}, "steps must be between 1 and 1000, got 2.5"),
        (LABELS, {"cfg_scale": float("nan")}, "cfg_scale is 'nan', expected a number between"),
        (LABELS, {"cfg_scale": float("inf")}, "cfg_scale is 'inf', expected a number between"),
        (LABELS, {"cfg_scale": "4"}, "cfg_scale is '4', expected a number between"),
        (
            LABELS,
            {"noise": torch.full((len(LABELS), 4, 8, 8), float("nan"))},
            "noise contains values that are not finite",
        ),
        (LABELS, {"steps": 1001}, "steps must be between 1 and 1000, got 1001"),
        (LABELS, {"sigmas": [1.0, 2.0, 0.0]}, "sigmas must be a falling sequence"),
        (LABELS, {"sigmas": [1.0]}, "sigmas must be a falling sequence of at least two"),
        (LABELS, {"sigmas": [2.0, 1.0, -1.0]}, "sigmas must be a falling sequence.*0 or above"),
        (LABELS, {"sigmas": [2.0, float("nan"), 0.0]}, "sigmas must be a falling sequence"),
        (LABELS, {"sigmas": [float("inf"), 1.0, 0.0]}, "sigmas must be a falling sequence"),
        (LABELS, {"noise": torch.zeros(3, 4, 8, 8)}, "noise must be .* for 2 images.*got \\(3, 4, 8, 8\\)"),
        (LABELS, {"noise": torch.zeros(2, 3, 8, 8)}, "noise must be .* 4 channels.*got \\(2, 3, 8, 8\\)"),
        (LABELS, {"noise": torch.zeros(4, 8, 8)}, "noise must be"),
    ],
)
def test_bad_input_is_one_clear_sentence(model, labels, kwargs, message):
    with pytest.raises(ValueError, match=message) as caught:
        generate(model, labels, **(kwargs if "sigmas" in kwargs else {"steps": 3, **kwargs}))
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


def test_learned_variance_needs_a_model_that_predicts_it():
    with pytest.raises(ValueError, match="learned_range.*fixed sigma"):
        generate(tiny_dit(learn_sigma=False), LABELS, 3, variance="learned_range")


def test_fixed_sigma_model_samples(model):
    images, _ = generate(tiny_dit(learn_sigma=False), LABELS, 3)
    assert images.shape == (2, 4, 8, 8) and images.isfinite().all()


def test_exception_in_the_callback_leaves_the_cache_reset(model):
    apply_cache_to_dit(model, 3)
    expected, _ = generate(model, LABELS, 5)

    def interrupt(info):
        assert feature_cache(model).num_bytes > 0
        if info.index == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(model, LABELS, 5, callback=interrupt)
    assert feature_cache(model).num_bytes == 0 and feature_cache(model).run.step == -1
    assert torch.equal(generate(model, LABELS, 5)[0], expected)


def test_generate_with_the_cache_bypassed(model):
    expected, _ = generate(model, LABELS, 4)
    apply_cache_to_dit(model, 3)
    with cache_bypassed(model):
        images, report = generate(model, LABELS, 4)
    assert torch.equal(images, expected)
    assert report.computed == [True] * 4 and report.cache_bytes == 0


def test_progress_does_not_change_the_images(model, capsys):
    shown, _ = generate(model, LABELS, 3, progress=True)
    assert "3/3" in capsys.readouterr().err
    assert torch.equal(shown, generate(model, LABELS, 3)[0])
    assert capsys.readouterr() == ("", "")
