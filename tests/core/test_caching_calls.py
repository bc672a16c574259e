"""apply_cache_to_dit on loops that tell it nothing: whose features a call may use, on the transformers of diffusers."""

import copy

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qandc_core import apply_cache_to_dit, fresh_caches, remove_cache
from qandc_core.caching.attach import feature_cache
from qandc_core.caching.policies import ChosenSteps, Speedup, StepCount

pytestmark = pytest.mark.usefixtures("no_grad")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def dit():
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        num_embeds_ada_norm=10,
    )  # fmt: skip


def flux():
    return diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip


def sd3():
    return diffusers.SD3Transformer2DModel(
        sample_size=8, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=32, pos_embed_max_size=8,
    )  # fmt: skip


def pixart():
    return diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        cross_attention_dim=32, caption_channels=32, use_additional_conditions=False,
    )  # fmt: skip


def wan():
    return diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=32, freq_dim=32,
        ffn_dim=48, num_layers=2,
    )  # fmt: skip


def cogvideo():
    return diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=16,
        text_embed_dim=32, num_layers=2, sample_width=8, sample_height=8, sample_frames=5, max_text_seq_length=6,
    )  # fmt: skip


def rest_of(model, prompt=1):
    """What a call takes beside sample and timestep, for a batch of two."""
    text, pooled = randn(2, 6, 32, seed=prompt), randn(2, 32, seed=prompt + 1)
    return {
        "DiTTransformer2DModel": lambda: {"class_labels": torch.tensor([prompt, prompt + 1])},
        "FluxTransformer2DModel": lambda: {
            "encoder_hidden_states": text, "pooled_projections": pooled, "txt_ids": torch.zeros(6, 3),
            "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0)),
        },
        "SD3Transformer2DModel": lambda: {"encoder_hidden_states": text, "pooled_projections": pooled},
        "PixArtTransformer2DModel": lambda: {
            "encoder_hidden_states": text,
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
        "WanTransformer3DModel": lambda: {"encoder_hidden_states": text},
        "CogVideoXTransformer3DModel": lambda: {"encoder_hidden_states": text},
    }[type(model).__name__]()  # fmt: skip


SHAPES = {flux: (2, 16, 16), wan: (2, 4, 3, 8, 8), cogvideo: (2, 3, 4, 8, 8)}
TIMESTEPS = [999, 850, 700, 520, 340, 180, 40]
FAMILIES = (dit, flux, sd3, pixart, wan, cogvideo)
LISTS = ("transformer_blocks", "single_transformer_blocks", "blocks")
everywhere = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)


def made(family):
    torch.manual_seed(0)
    model = family().eval()
    for parameter in model.parameters():  # zero-initialized tables and gates would hide the blocks
        parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
    return model


def noise_of(family, seed=0):
    return randn(*SHAPES.get(family, (2, 4, 8, 8)), seed=seed)


def predict(model, x, t, **rest):
    out = model(hidden_states=x, timestep=torch.full((2,), t), **rest).sample
    return out if out.shape == x.shape else out[:, : x.shape[1]]


def sampled(model, x, timesteps=TIMESTEPS, rest=None, calls=None):
    """Steps without noise; `calls` ends the run after so many."""
    for number, (t, following) in enumerate(zip(timesteps, [*timesteps[1:], 0])):
        if number == calls:
            raise InterruptedError
        x = x + predict(model, x, t, **(rest or rest_of(model))) * (following - t) / 1000
    return x


class ByHand:
    """Every block of a model adds at other steps what it added at every third."""

    def __init__(self, model):
        self.model, self.step, self.kept = copy.deepcopy(model), -1, {}
        for path in LISTS:
            for i, block in enumerate(getattr(self.model, path, [])):
                block.forward = self.held(block.forward, (path, i))
        self.model.register_forward_pre_hook(lambda *_: setattr(self, "step", self.step + 1))

    def held(self, forward, name):
        def held_forward(*args, **kwargs):
            streams = {"hidden_states": args[0] if args else kwargs.get("hidden_states")}
            streams["encoder_hidden_states"] = kwargs.get("encoder_hidden_states")
            if self.step % 3:
                out = [None if key is None else streams[key] + delta for key, delta in self.kept[name]]
                return out[0] if len(out) == 1 else tuple(out)
            before = {key: None if stream is None else stream.clone() for key, stream in streams.items()}
            out = forward(*args, **kwargs)
            self.kept[name] = []
            for value in out if isinstance(out, tuple) else (out,):
                alike = [k for k, s in before.items() if s is not None and value is not None and s.shape == value.shape]
                self.kept[name].append((alike[0], value - before[alike[0]]) if alike else (None, None))
            return out

        return held_forward


@everywhere
def test_blocks_of_every_family_are_reused_as_by_hand(family):
    model = made(family)
    x = noise_of(family)
    plain, expected = sampled(model, x), sampled(ByHand(model).model, x)
    apply_cache_to_dit(model, 3, reuse="block")
    assert torch.allclose(sampled(model, x), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, plain, rtol=1e-3, atol=1e-4)
    assert feature_cache(model).run.computed == [True, False, False] * 2 + [True]
    assert torch.equal(sampled(remove_cache(model), x), plain)


@everywhere
def test_the_default_reuses_and_interval_one_changes_no_bit(family):
    model, x = made(family), noise_of(family)
    plain = sampled(model, x)
    assert torch.equal(sampled(apply_cache_to_dit(model, 1), x), plain)
    cached = sampled(apply_cache_to_dit(model, 3), x)
    assert not torch.equal(cached, plain) and (cached - plain).norm() < 0.3 * plain.norm()
    assert feature_cache(model).reuse == ("branch" if family in (dit, pixart) else "block")


@pytest.mark.parametrize("family", [flux, sd3, wan, cogvideo], ids=lambda family: family.__name__)
def test_branches_are_refused_where_they_cannot_be_told_apart(family):
    model = made(family)
    before = [(name, set(vars(module))) for name, module in model.named_modules()]
    with pytest.raises(ValueError, match=f"cannot tell attention and MLP of {type(model).__name__} apart; use reuse="):
        apply_cache_to_dit(model, 3, reuse="branch")
    assert [(name, set(vars(module))) for name, module in model.named_modules()] == before


def test_other_transformers_are_refused_and_left_as_they_are():
    model = diffusers.AuraFlowTransformer2DModel(
        sample_size=8, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pos_embed_max_size=16,
    )  # fmt: skip
    hooks = dict(model._forward_pre_hooks)
    with pytest.raises(ValueError, match="AuraFlowTransformer2DModel"):
        apply_cache_to_dit(model, 3)
    assert feature_cache(model) is None and dict(model._forward_pre_hooks) == hooks


# Whose features


def fresh(family, interval, x, **how):
    return sampled(apply_cache_to_dit(made(family), interval), x, **how)


@pytest.mark.parametrize(("family", "calls"), [*((dit, calls) for calls in (1, 2, 3, 4)), (flux, 1), (wan, 2)])
def test_a_run_after_a_cancelled_one_is_as_if_it_were_the_first(family, calls):
    """Other conditions, or the same ones with other noise, from the same timestep or a lower one."""
    model = apply_cache_to_dit(made(family), 2)
    for timesteps in (TIMESTEPS, TIMESTEPS[2:], [998, 600, 3]):
        for prompt in (1, 4):
            with pytest.raises(InterruptedError):
                sampled(model, noise_of(family, 5), calls=calls)
            x, rest = noise_of(family, 6), rest_of(model, prompt)
            again = sampled(model, x, timesteps, rest)
            assert torch.equal(again, fresh(family, 2, x, timesteps=timesteps, rest=rest))


@given(
    st.lists(
        st.tuples(st.sets(st.integers(1, 999), min_size=1, max_size=5), st.integers(0, 6), st.integers(0, 3)),
        min_size=2, max_size=4,
    ),
    st.integers(1, 4),
)  # fmt: skip
@settings(deadline=None, max_examples=25)
def test_no_run_sees_features_of_another(runs, interval):
    """Runs of any spacing and length, one-step and cancelled ones among them, one after the other."""
    model, plain = apply_cache_to_dit(made(dit), interval), made(dit)
    for number, (levels, calls, prompt) in enumerate(runs):
        timesteps, x = sorted(levels, reverse=True), noise_of(dit, number)
        rest = rest_of(plain, prompt)
        own = apply_cache_to_dit(copy.deepcopy(plain), interval)
        if calls and calls <= len(timesteps):
            with pytest.raises(InterruptedError):
                sampled(model, x, [*timesteps, 0], rest, calls)
        else:
            assert torch.equal(sampled(model, x, timesteps, rest), sampled(own, x, timesteps, rest))


def test_a_warm_up_call_leaves_nothing():
    model = apply_cache_to_dit(made(dit), 3)
    predict(model, noise_of(dit, 8), 850, **rest_of(model))
    x = noise_of(dit, 9)
    assert torch.equal(sampled(model, x, TIMESTEPS[2:]), fresh(dit, 3, x, timesteps=TIMESTEPS[2:]))


def test_parts_of_a_batch_may_come_in_any_order():
    """Two samples of one condition, called in turns whose order changes; each as if it were alone."""
    xs = [noise_of(dit, seed) for seed in (1, 2)]
    expected = [fresh(dit, 3, x) for x in xs]
    model, rest = apply_cache_to_dit(made(dit), 3), rest_of(made(dit))
    for number, (t, following) in enumerate(zip(TIMESTEPS, [*TIMESTEPS[1:], 0])):
        for i in (0, 1) if number % 2 else (1, 0):
            xs[i] = xs[i] + predict(model, xs[i], t, **rest) * (following - t) / 1000
    assert all(torch.equal(a, b) for a, b in zip(xs, expected))


@pytest.mark.parametrize("batched", [True, False])
def test_guidance_in_one_batch_or_in_two_calls(batched):
    """A guided step goes on from both predictions."""
    model, plain = apply_cache_to_dit(made(dit), 3), made(dit)
    x = noise_of(dit)[:1]
    for t, following in zip(TIMESTEPS, [*TIMESTEPS[1:], 0]):
        labels, two = torch.tensor([3, 10]), torch.cat([x, x])
        if batched:
            out = model(two, timestep=torch.full((2,), t), class_labels=labels).sample
        else:
            calls = [model(x, timestep=torch.tensor([t]), class_labels=label[None]).sample for label in labels]
            out = torch.cat(calls)
        one, other = out[:, :4].chunk(2)
        x = x + (other + 4.0 * (one - other)) * (following - t) / 1000
    assert feature_cache(model).run.computed == [True, False, False] * 2 + [True]
    assert not plain._forward_pre_hooks


def test_other_options_of_a_call_are_another_condition():
    """SD3's skipped layers: guidance evaluates the same prompt without some blocks."""
    model, x = made(sd3), noise_of(sd3)
    rest = rest_of(model)
    plain = [predict(model, x, 900, **rest), predict(model, x, 900, **rest, skip_layers=[1])]
    apply_cache_to_dit(model, 9)
    first = [predict(model, x, 900, **rest), predict(model, x, 900, **rest, skip_layers=[1])]
    second = [predict(model, x, 900 - 1e-3, **rest), predict(model, x, 900 - 1e-3, **rest, skip_layers=[1])]
    assert all(torch.equal(a, b) for a, b in zip(first, plain))
    assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(second, plain))
    assert (plain[0] - plain[1]).norm() > 1e-2 * plain[0].norm()


@everywhere
@pytest.mark.parametrize("policy", [Speedup(2.0), StepCount(3), ChosenSteps({0, 2, 5})])
def test_a_policy_decides_the_steps_of_any_family(family, policy):
    model = apply_cache_to_dit(made(family), policy, num_steps=len(TIMESTEPS))
    sampled(model, noise_of(family), rest=rest_of(model))
    cache = feature_cache(model)
    plan = policy.plan(len(TIMESTEPS), cost=cache.cost)
    assert 0 < cache.cost < 1 and cache.run.computed == [plan.computes(step) for step in range(len(TIMESTEPS))]


@pytest.mark.parametrize(
    "scheduler",
    ["DDIM", "DDPM", "EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete", "DPMSolverMultistep", "UniPCMultistep"],
)
def test_schedulers_of_diffusers_reuse(scheduler, steps=20):
    model = apply_cache_to_dit(made(dit), 2)
    schedule = getattr(diffusers, f"{scheduler}Scheduler")()
    schedule.set_timesteps(steps)
    x, generator = noise_of(dit) * schedule.init_noise_sigma, torch.Generator().manual_seed(0)
    takes = {"generator": generator} if scheduler in ("DDPM", "EulerAncestralDiscrete") else {}
    rest = rest_of(model)
    for t in schedule.timesteps:
        out = predict(model, schedule.scale_model_input(x, t), float(t), **rest)
        x = schedule.step(out, t, x, **takes).prev_sample
    computed = feature_cache(model).run.computed
    assert computed[0] and computed.count(False) >= 0.45 * steps
    assert x.isfinite().all()


def test_fresh_caches_begin_and_leave_no_run():
    model, x = apply_cache_to_dit(made(dit), 9), noise_of(dit)
    first = predict(model, x, 900, **rest_of(model))
    with pytest.raises(InterruptedError), fresh_caches(nn.ModuleList([model])):
        assert torch.equal(predict(model, x, 899, **rest_of(model)), predict(made(dit), x, 899, **rest_of(model)))
        assert feature_cache(model).num_bytes > 0
        raise InterruptedError
    assert feature_cache(model).num_bytes == 0 and first.isfinite().all()
