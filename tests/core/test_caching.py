import copy
from dataclasses import replace
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qandc_core.caching.attach import (
    apply_cache_to_dit,
    cache_bypassed,
    feature_cache,
    remove_cache,
    reset_all_caches,
)
from qandc_core.caching.features import FeatureCache
from qandc_core.caching.schedule import CacheConfig, optimal_schedule
from qandc_core.models import DiT, DiTConfig
from qandc_core.models.dit import timestep_embedding
from qandc_core.sampling.generate import generate

CONFIG = DiTConfig(input_size=8, in_channels=4, hidden_size=32, depth=2, num_heads=2, num_classes=10)
LABELS = [3, 7]
TIMESTEPS = [900, 750, 600, 450, 300, 150, 20]
SCHEDULES = [{"cache_interval": 3}, {"cache_interval": 2}, {"steps": [0, 1, 4]}]
ALL_REUSE = [(reuse, order) for reuse in ("branch", "block") for order in (0, 1)]


pytestmark = pytest.mark.usefixtures("no_grad")


def tiny_dit(**overrides):
    torch.manual_seed(0)
    return DiT(replace(CONFIG, **overrides)).eval()


def tiny_diffusers(classes=10):
    torch.manual_seed(0)
    return DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        num_embeds_ada_norm=classes,
    ).eval()  # fmt: skip


MODELS = {"ours": tiny_dit, "diffusers": tiny_diffusers}


@pytest.fixture
def model():
    return tiny_dit()


@pytest.fixture(params=MODELS)
def any_model(request):
    return MODELS[request.param]()


def start(images=2, seed=1, size=8):
    return torch.randn(images, 4, size, size, generator=torch.Generator().manual_seed(seed))


def call(model, x, t, labels=LABELS):
    out = model(x, torch.full((len(x),), t), torch.tensor(labels))
    return out if isinstance(out, torch.Tensor) else out.sample


def trajectory(predict, timesteps=TIMESTEPS, x=None):
    """Outputs along a toy sampling loop, in which an error at one step reaches all later ones."""
    x, outputs = start() if x is None else x, []
    for t in timesteps:
        outputs.append(predict(x, t))
        x = x - 0.3 * outputs[-1][:, :4]
    return outputs


def assert_same(outputs, expected, equal=torch.equal):
    assert len(outputs) == len(expected)
    for i, (a, b) in enumerate(zip(outputs, expected)):
        assert equal(a, b), f"step {i}: largest difference {(a - b).abs().max():.3g}"


def close(a, b):
    return torch.allclose(a, b, rtol=1e-4, atol=1e-5)


# Brute force: the whole forward written again, each feature stored or recalled by hand


class Store:
    """Features by name with the step that computed them; order 1 extrapolates over the last two."""

    def __init__(self, computed, order=0):
        self.computed, self.order, self.step, self.features = computed, order, 0, {}

    def __call__(self, name, compute):
        if self.step in self.computed:
            self.features.setdefault(name, []).append((self.step, compute()))
            return self.features[name][-1][1]
        if self.order == 0 or len(self.features[name]) == 1:
            return self.features[name][-1][1]
        (s0, f0), (s1, f1) = self.features[name][-2:]
        return f1 + (f1 - f0) * (self.step - s1) / (s1 - s0)


def our_forward(model, x, t, y, store, reuse):
    w = model.state_dict()

    def linear(name, v):
        return F.linear(v, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(v, shift, scale):
        return F.layer_norm(v, (32,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    def attention(i, v):
        q, k, v = linear(f"blocks.{i}.attn.qkv", v).reshape(len(v), -1, 3, 2, 16).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(len(x), -1, 32)
        return linear(f"blocks.{i}.attn.proj", out)

    def mlp(i, v):
        return linear(f"blocks.{i}.mlp.fc2", F.gelu(linear(f"blocks.{i}.mlp.fc1", v), approximate="tanh"))

    h = F.conv2d(x, w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=2).flatten(2).transpose(1, 2)
    h = h + w["pos_embed"]
    c = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", timestep_embedding(t))))
    c = c + w["y_embedder.embedding_table.weight"][y]
    for i in range(2):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = linear(
            f"blocks.{i}.adaLN_modulation.1", F.silu(c)
        ).chunk(6, dim=1)  # fmt: skip
        if reuse == "branch":
            h = h + gate_a[:, None] * store((i, "a"), lambda i=i, h=h: attention(i, norm(h, shift_a, scale_a)))  # noqa: B023
            h = h + gate_m[:, None] * store((i, "m"), lambda i=i, h=h: mlp(i, norm(h, shift_m, scale_m)))  # noqa: B023
        else:
            out = h + gate_a[:, None] * attention(i, norm(h, shift_a, scale_a))
            out = out + gate_m[:, None] * mlp(i, norm(out, shift_m, scale_m))
            residual = store(i, lambda out=out, h=h: out - h)
            h = out if store.step in store.computed else h + residual
    shift, scale = linear("final_layer.adaLN_modulation.1", F.silu(c)).chunk(2, dim=1)
    h = linear("final_layer.linear", norm(h, shift, scale))
    return h.reshape(len(x), 4, 4, 2, 2, 8).permute(0, 5, 1, 3, 2, 4).reshape(len(x), 8, 8, 8)


def diffusers_forward(model, x, t, y, store, reuse):
    h = model.pos_embed(x)
    for i, block in enumerate(model.transformer_blocks):
        if reuse == "branch":
            normed, gate_a, shift_m, scale_m, gate_m = block.norm1(h, t, y, hidden_dtype=h.dtype)
            h = gate_a.unsqueeze(1) * store((i, "a"), lambda b=block, n=normed: b.attn1(n)) + h
            normed = block.norm3(h) * (1 + scale_m[:, None]) + shift_m[:, None]
            h = gate_m.unsqueeze(1) * store((i, "m"), lambda b=block, n=normed: b.ff(n)) + h
        else:
            out = block(h, timestep=t, class_labels=y)
            residual = store(i, lambda out=out, h=h: out - h)
            h = out if store.step in store.computed else h + residual
    c = model.transformer_blocks[0].norm1.emb(t, y, hidden_dtype=h.dtype)
    shift, scale = model.proj_out_1(F.silu(c)).chunk(2, dim=1)
    h = model.proj_out_2(model.norm_out(h) * (1 + scale[:, None]) + shift[:, None])
    return h.reshape(len(x), 4, 4, 2, 2, 8).permute(0, 5, 1, 3, 2, 4).reshape(len(x), 8, 8, 8)


def brute_force(model, computed, reuse="branch", order=0, labels=LABELS, timesteps=TIMESTEPS):
    """predict(x, t) for trajectory(), with features computed at the listed step indices only."""
    forward = our_forward if isinstance(model, DiT) else diffusers_forward
    store = Store(computed, order)

    def predict(x, t):
        store.step = timesteps.index(t)
        return forward(model, x, torch.full((len(x),), t), torch.tensor(labels), store, reuse)

    return predict


def computed_steps(schedule):
    return schedule["steps"] if "steps" in schedule else range(0, len(TIMESTEPS), schedule["cache_interval"])


def test_the_references_without_reuse_are_the_models(any_model):
    predict = brute_force(any_model, computed=range(len(TIMESTEPS)))
    assert_same(trajectory(predict), trajectory(lambda x, t: call(any_model, x, t)))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("reuse", ["branch", "block"])
def test_cache_equals_brute_force_bit_for_bit(any_model, schedule, reuse):
    plain = trajectory(lambda x, t: call(any_model, x, t))
    expected = trajectory(brute_force(any_model, computed_steps(schedule), reuse))
    apply_cache_to_dit(any_model, **schedule, reuse=reuse)
    outputs = trajectory(lambda x, t: call(any_model, x, t))
    assert_same(outputs, expected)
    assert not close(outputs[-1], plain[-1])  # the reuse is visible, so equality says something


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("reuse", ["branch", "block"])
def test_forecast_equals_brute_force(any_model, schedule, reuse):
    held = trajectory(brute_force(any_model, computed_steps(schedule), reuse))
    expected = trajectory(brute_force(any_model, computed_steps(schedule), reuse, order=1))
    apply_cache_to_dit(any_model, **schedule, reuse=reuse, order=1)
    outputs = trajectory(lambda x, t: call(any_model, x, t))
    assert_same(outputs, expected, close)
    assert not close(outputs[-1], held[-1])


@pytest.mark.parametrize("reuse, order", ALL_REUSE)
def test_interval_one_is_bit_identical(any_model, reuse, order):
    expected = trajectory(lambda x, t: call(any_model, x, t))
    apply_cache_to_dit(any_model, 1, reuse=reuse, order=order)
    assert_same(trajectory(lambda x, t: call(any_model, x, t)), expected)


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("reuse, order", ALL_REUSE)
def test_interval_one_generates_the_same_images(model, reuse, order, batched):
    expected, _ = generate(model, LABELS, 5, batched_guidance=batched)
    apply_cache_to_dit(model, 1, reuse=reuse, order=order)
    images, report = generate(model, LABELS, 5, batched_guidance=batched)
    assert torch.equal(images, expected)
    assert report.computed == [True] * 5


def test_listed_steps_equal_the_same_interval(any_model):
    apply_cache_to_dit(any_model, 3)
    expected = trajectory(lambda x, t: call(any_model, x, t))
    apply_cache_to_dit(any_model, steps=range(0, len(TIMESTEPS), 3))
    assert_same(trajectory(lambda x, t: call(any_model, x, t)), expected)


# What a reused step runs


def layers(model):
    """A layer inside the attention, inside the MLP, the modulation, and the last layer."""
    if isinstance(model, DiT):
        block = model.blocks[1]
        return block.attn.qkv, block.mlp.fc1, block.adaLN_modulation[1], model.final_layer.linear
    block = model.transformer_blocks[1]
    return block.attn1.to_q, block.ff.net[0], block.norm1.linear, model.proj_out_2


@pytest.mark.parametrize("reuse, modulation", [("branch", 7), ("block", 3)])
def test_reused_steps_skip_the_layers(any_model, reuse, modulation):
    counts = [0, 0, 0, 0]

    def counter(i):
        def count(*_):
            counts[i] += 1

        return count

    for i, layer in enumerate(layers(any_model)):
        layer.register_forward_hook(counter(i))
    apply_cache_to_dit(any_model, 3, reuse=reuse)
    trajectory(lambda x, t: call(any_model, x, t))
    assert counts == [3, 3, modulation, 7]


@pytest.mark.parametrize(
    "reuse, order, tensors", [("branch", 0, 4), ("branch", 1, 8), ("block", 0, 2), ("block", 1, 4)]
)
def test_num_bytes_counts_the_stored_features(any_model, reuse, order, tensors):
    apply_cache_to_dit(any_model, 3, reuse=reuse, order=order)
    cache = feature_cache(any_model)
    assert cache.num_bytes == 0
    trajectory(lambda x, t: call(any_model, x, t))
    assert cache.num_bytes == tensors * 2 * 16 * 32 * 4  # 2 images, 16 tokens of 32 float32
    reset_all_caches(any_model)
    assert cache.num_bytes == 0


def test_nothing_is_stored_that_no_step_reads(model):
    apply_cache_to_dit(model, steps=[0, 1, 2, 3, 4, 5, 6, 7])
    trajectory(lambda x, t: call(model, x, t))
    assert feature_cache(model).num_bytes == 0


# Forecasting


class ToyBlock(nn.Module):
    def __init__(self, feature):
        super().__init__()
        self.feature = feature

    def attention_branch(self, x):
        return self.feature(x)

    def mlp_branch(self, x):
        return -2 * self.feature(x)


class Toy(nn.Module):
    """Blocks whose features are a given function of the step index; timestep = 100 - index."""

    def __init__(self, feature):
        super().__init__()
        self.blocks = nn.ModuleList([ToyBlock(lambda x: feature(self.index))])

    def forward(self, x, timesteps, y=None):
        self.index = 100 - int(timesteps[0])
        return torch.stack([self.blocks[0].attention_branch(x), self.blocks[0].mlp_branch(x)])


def toy_run(feature, **cache):
    toy = apply_cache_to_dit(Toy(feature), **cache)
    return [toy(start(), torch.tensor([100 - i])) for i in range(14)]


@given(st.sets(st.integers(1, 11), min_size=1), st.integers(0, 2**31))
@settings(deadline=None, max_examples=40)
def test_forecast_is_exact_on_features_linear_in_the_step(steps, seed):
    generator = torch.Generator().manual_seed(seed)
    offset, slope = torch.randn(2, 3, 5, dtype=torch.float64, generator=generator)
    outputs = toy_run(lambda i: offset + slope * i, steps=steps, order=1)
    for i in range(min(steps), 14):  # two steps are computed from here on
        expected = offset + slope * i
        torch.testing.assert_close(outputs[i], torch.stack([expected, -2 * expected]), rtol=1e-10, atol=1e-10)


@given(st.sets(st.integers(1, 11)), st.integers(0, 2**31))
@settings(deadline=None, max_examples=40)
def test_forecast_is_the_line_through_the_last_two_computed_steps(steps, seed):
    features = torch.randn(14, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    outputs = toy_run(lambda i: features[i], steps=steps, order=1)
    computed = [0]
    for i in range(14):
        if i in steps:
            computed.append(i)
        expected = features[computed[-1]]
        if len(computed) > 1:
            a, b = computed[-2:]
            expected = features[b] + (i - b) / (b - a) * (features[b] - features[a])
        torch.testing.assert_close(outputs[i][0], expected, rtol=1e-9, atol=1e-9)


@given(st.sets(st.integers(1, 11)))
@settings(deadline=None, max_examples=40)
def test_order_zero_holds_the_last_computed_step(steps):
    outputs = toy_run(lambda i: torch.tensor([float(i)]), steps=steps)
    held = [max(s for s in steps | {0} if s <= i) for i in range(14)]
    assert [int(out[0]) for out in outputs] == held


# Guidance branches


def fading(i):
    """A sample that goes on from step to step, whatever the model says."""
    return (1 - 0.1 * i) * start()


def guided_features(model, batched, order):
    """Stored conditional features and the conditional outputs along fixed samples."""
    apply_cache_to_dit(model, 2, order=order)
    y, null = torch.tensor(LABELS), torch.tensor([10, 10])
    outputs, features = [], []
    for i, t in enumerate(TIMESTEPS):
        x, tt = fading(i), torch.tensor([t, t])
        if batched:
            outputs.append(model(torch.cat([x, x]), torch.cat([tt, tt]), torch.cat([y, null])).chunk(2))
        else:
            outputs.append((model(x, tt, y), model(x, tt, null)))
        stored = feature_cache(model).run.features
        features += [v[:2].clone() for (c, _), history in sorted(stored.items()) if c == 0 for _, v in history]
    conditional, unconditional = zip(*outputs)
    return conditional, unconditional, features


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("batched", [True, False])
def test_unconditional_branch_never_reaches_the_conditional_features(batched, order):
    model, other = tiny_dit(), tiny_dit()
    other.y_embedder.embedding_table.weight[10] += 3
    outputs, null_outputs, features = guided_features(model, batched, order)
    other_outputs, other_null_outputs, other_features = guided_features(other, batched, order)
    assert features and outputs
    assert_same(other_features, features)
    assert_same(other_outputs, outputs)
    assert not any(torch.equal(a, b) for a, b in zip(null_outputs, other_null_outputs))


def test_each_split_branch_equals_its_own_brute_force():
    model = tiny_dit()
    outputs, null_outputs, _ = guided_features(model, batched=False, order=0)
    for labels, cached in ((LABELS, outputs), ([10, 10], null_outputs)):
        predict = brute_force(remove_cache(model), [0, 2, 4, 6], labels=labels)
        assert_same(cached, [predict(fading(i), t) for i, t in enumerate(TIMESTEPS)])


@pytest.mark.parametrize("reuse, order", ALL_REUSE)
def test_batched_and_split_guidance_give_the_same_images(model, reuse, order):
    apply_cache_to_dit(model, 3, reuse=reuse, order=order)
    batched, _ = generate(model, LABELS, 8, batched_guidance=True)
    split, _ = generate(model, LABELS, 8, batched_guidance=False)
    assert (batched - split).abs().max() < 1e-4 * split.abs().max()


@pytest.mark.parametrize("batched", [True, False])
def test_generate_equals_brute_force_fora_in_the_loop(model, batched):
    plain, _ = generate(model, LABELS, 7, sampler="ddim", batched_guidance=batched)
    reference, stores, visited = copy.deepcopy(model), {}, []

    def forward(x, timesteps, y):
        # one store for each condition: the null class, the labels, or both in one batch
        if int(timesteps[0]) not in visited:
            visited.append(int(timesteps[0]))
        store = stores.setdefault(tuple(y.tolist()), Store([0, 3, 6]))
        store.step = visited.index(int(timesteps[0]))
        return our_forward(model, x, timesteps, y, store, "branch")

    reference.forward = forward
    expected, _ = generate(reference, LABELS, 7, sampler="ddim", batched_guidance=batched)
    cached, _ = generate(apply_cache_to_dit(model, 3), LABELS, 7, sampler="ddim", batched_guidance=batched)
    assert torch.equal(cached, expected)
    assert not close(cached, plain)


# Where a run begins


def test_rising_timestep_begins_a_new_run(any_model):
    expected = trajectory(brute_force(any_model, [0, 3, 6]))
    apply_cache_to_dit(any_model, 3)
    for stop in (7, 2, 7):  # the second run is left off in the middle
        outputs = trajectory(lambda x, t: call(any_model, x, t), TIMESTEPS[:stop])
        assert_same(outputs, expected[:stop])


def test_another_loop_after_a_run_that_broke_off_goes_by_its_own_timesteps(model):
    def breaks(*_):
        raise InterruptedError

    expected = trajectory(brute_force(model, [0, 3, 6]))
    apply_cache_to_dit(model, 3)
    hook = model.final_layer.register_forward_pre_hook(breaks)
    with pytest.raises(InterruptedError):
        generate(model, LABELS, 7)
    hook.remove()
    assert_same(trajectory(lambda x, t: call(model, x, t)), expected)


def test_new_shape_begins_a_new_run(any_model):
    x = start(images=3, seed=2)
    expected = call(any_model, x, 100, [1, 2, 3])
    apply_cache_to_dit(any_model, 9)
    call(any_model, start(), 900)
    assert torch.equal(call(any_model, x, 100, [1, 2, 3]), expected)
    assert feature_cache(any_model).run.step == 0


def test_reset_begins_a_new_run(any_model):
    expected = call(any_model, start(), 100)
    apply_cache_to_dit(any_model, 9)
    call(any_model, start(), 900)
    reused = call(any_model, start(), 100)
    reset_all_caches(nn.ModuleDict({"transformer": any_model}))
    assert torch.equal(call(any_model, start(), 100), expected)
    assert not torch.equal(reused, expected)


def test_keyword_arguments_locate_the_step(any_model):
    expected = trajectory(brute_force(any_model, [0, 3, 6]))
    apply_cache_to_dit(any_model, 3)
    names = ("x", "timesteps", "y") if isinstance(any_model, DiT) else ("hidden_states", "timestep", "class_labels")

    def predict(x, t):
        out = any_model(**dict(zip(names, (x, torch.full((2,), t), torch.tensor(LABELS)))))
        return out if isinstance(out, torch.Tensor) else out.sample

    assert_same(trajectory(predict), expected)


# Diffusers' pipeline


def pipeline(transformer):
    torch.manual_seed(3)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",), block_out_channels=(8,),
        latent_channels=4, norm_num_groups=4, sample_size=8,
    )  # fmt: skip
    pipe = DiTPipeline(transformer, vae.eval(), DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images(pipe, steps):
    generator = torch.Generator().manual_seed(5)
    return torch.from_numpy(
        pipe(LABELS, num_inference_steps=steps, generator=generator, output_type="np").images
    )  # fmt: skip


def reference_images(model, steps, interval):
    """The pipeline over a transformer whose forward is the brute-force cache."""
    reference = copy.deepcopy(model)
    pipe = pipeline(reference)
    store, visited = Store(range(0, steps, interval)), []

    def forward(hidden_states, timestep, class_labels):
        if int(timestep[0]) not in visited:
            visited.append(int(timestep[0]))
        store.step = len(visited) - 1
        return Transformer2DModelOutput(
            sample=diffusers_forward(model, hidden_states, timestep, class_labels, store, "branch")
        )

    reference.forward = forward
    return images(pipe, steps)


def test_pipeline_equals_brute_force_over_successive_calls():
    model = tiny_diffusers(classes=1000)
    plain = images(pipeline(model), 7)
    seven, five = (reference_images(model, steps, 3) for steps in (7, 5))
    pipe = pipeline(apply_cache_to_dit(model, 3))
    for steps, expected in ((7, seven), (7, seven), (5, five), (7, seven)):  # no reset in between
        assert torch.equal(images(pipe, steps), expected)
    assert not torch.equal(seven, plain)
    remove_cache(pipe.transformer)
    assert torch.equal(images(pipe, 7), plain)


def test_pipeline_with_interval_one_is_bit_identical():
    model = tiny_diffusers(classes=1000)
    plain = images(pipeline(model), 4)
    assert torch.equal(images(pipeline(apply_cache_to_dit(model, 1)), 4), plain)


# Attach and detach


def traces(model):
    """Names of everything that attaching could leave on a module."""
    hooks = ("_forward_pre_hooks", "_forward_hooks", "_forward_pre_hooks_with_kwargs")
    return {
        name: (set(vars(module)), [len(vars(module)[hook]) for hook in hooks]) for name, module in model.named_modules()
    }


@pytest.mark.parametrize("reuse", ["branch", "block"])
@pytest.mark.parametrize("used", [False, True])
def test_remove_leaves_no_trace(any_model, reuse, used):
    before, expected = traces(any_model), trajectory(lambda x, t: call(any_model, x, t))
    assert apply_cache_to_dit(any_model, 3, reuse=reuse) is any_model
    assert traces(any_model) != before
    if used:
        trajectory(lambda x, t: call(any_model, x, t))
    assert remove_cache(any_model) is any_model
    assert traces(any_model) == before
    assert feature_cache(any_model) is None
    assert_same(trajectory(lambda x, t: call(any_model, x, t)), expected)
    remove_cache(any_model)
    assert traces(any_model) == before


def test_cache_keeps_parameters_and_state_dict(any_model):
    before = list(any_model.state_dict())
    apply_cache_to_dit(any_model, 3)
    call(any_model, start(), 900)
    assert list(any_model.state_dict()) == before


def test_remove_restores_a_forward_that_was_there(model):
    block = model.blocks[0]
    plain = block.forward

    def doubled(x, c):
        return 2 * plain(x, c)

    block.forward = doubled
    expected = call(model, start(), 900)
    apply_cache_to_dit(model, 3, reuse="block")
    assert torch.equal(call(model, start(), 900), expected)
    remove_cache(model)
    assert block.forward is doubled


def test_the_former_name_of_reuse_is_understood(model):
    assert feature_cache(apply_cache_to_dit(model, 3, mode="block")).reuse == "block"


@pytest.mark.parametrize("first, second", [("branch", "block"), ("block", "branch"), ("branch", "branch")])
def test_applying_twice_replaces(any_model, first, second):
    before = traces(any_model)
    expected = trajectory(brute_force(any_model, [0, 3, 6], second))
    apply_cache_to_dit(any_model, 2, reuse=first)
    trajectory(lambda x, t: call(any_model, x, t))
    apply_cache_to_dit(any_model, 3, reuse=second)
    assert_same(trajectory(lambda x, t: call(any_model, x, t)), expected)
    remove_cache(any_model)
    assert traces(any_model) == before


def test_refused_settings_leave_the_attached_cache(any_model):
    apply_cache_to_dit(any_model, 2)
    cache = feature_cache(any_model)
    with pytest.raises(ValueError):
        apply_cache_to_dit(any_model, 0)
    assert feature_cache(any_model) is cache


@pytest.mark.parametrize("reuse", ["branch", "block"])
def test_copy_owns_an_independent_cache(any_model, reuse):
    plain = trajectory(lambda x, t: call(any_model, x, t))
    expected = trajectory(brute_force(any_model, [0, 3, 6], reuse))
    apply_cache_to_dit(any_model, 3, reuse=reuse)
    call(any_model, start(), 950)  # copied in the middle of a run
    held = feature_cache(any_model).num_bytes
    twin = copy.deepcopy(any_model)
    assert feature_cache(twin) is not feature_cache(any_model)
    for p in any_model.parameters():
        p.zero_()  # shows any part of the copy that still runs the original
    assert_same(trajectory(lambda x, t: call(twin, x, t)), expected)
    assert feature_cache(any_model).num_bytes == held and feature_cache(any_model).run.step == 0
    remove_cache(twin)
    assert_same(trajectory(lambda x, t: call(twin, x, t)), plain)
    assert feature_cache(any_model) is not None


@pytest.mark.parametrize("removed", ["copy", "original"])
def test_removing_one_cache_leaves_the_other(any_model, removed):
    before = traces(any_model)
    expected = trajectory(brute_force(any_model, [0, 3, 6]))
    twin = copy.deepcopy(apply_cache_to_dit(any_model, 3))
    gone, kept = (twin, any_model) if removed == "copy" else (any_model, twin)
    remove_cache(gone)
    assert traces(gone) == before
    assert_same(trajectory(lambda x, t: call(kept, x, t)), expected)
    remove_cache(kept)
    assert traces(kept) == before


def test_copy_after_a_run_with_gradients(any_model):
    apply_cache_to_dit(any_model, 3)
    with torch.enable_grad():
        call(any_model, start(), 900)
        twin = copy.deepcopy(any_model)
    assert feature_cache(twin).num_bytes == 0 < feature_cache(any_model).num_bytes


def test_bypass_computes_everything_and_keeps_the_run(any_model):
    expected = trajectory(brute_force(any_model, [0, 3, 6]))
    probe = start(seed=9)
    plain = [call(any_model, probe, t) for t in (999, 5)]
    apply_cache_to_dit(any_model, 3)

    def predict(x, t):
        with cache_bypassed(any_model):
            assert_same([call(any_model, probe, t) for t in (999, 5)], plain)
        return call(any_model, x, t)

    assert_same(trajectory(predict), expected)


def test_bypass_nests_and_survives_exceptions(model):
    with cache_bypassed(model):  # nothing attached
        pass
    cache = feature_cache(apply_cache_to_dit(model, 3))
    with cache_bypassed(model):
        with cache_bypassed(model):
            pass
        assert not cache.enabled
    with pytest.raises(KeyError), cache_bypassed(model):
        raise KeyError
    assert cache.enabled


# Settings and schedules


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"cache_interval": 0}, "interval must be 1"),
        ({"reuse": "layer"}, "reuse must be one of branch, block, prediction, got 'layer'"),
        ({"order": 3}, "order must be 0, 1 or 2, got 3"),
        ({"cache_interval": 3, "steps": [0, 2]}, "`cache_interval` and `steps` both say which steps compute"),
        ({"cache_interval": 3, "steps": []}, "`cache_interval` and `steps` both say which steps compute"),
        ({"reuse": "branch", "mode": "block"}, "give `reuse` alone"),
    ],
)
def test_bad_settings_are_refused(model, kwargs, message):
    with pytest.raises(ValueError, match=message):
        apply_cache_to_dit(model, **kwargs)
    assert feature_cache(model) is None


def test_a_model_without_blocks_is_refused():
    with pytest.raises(ValueError, match="Linear has neither blocks nor transformer_blocks"):
        apply_cache_to_dit(nn.Linear(2, 2), 3)


@pytest.mark.parametrize("both_or_none", [{}, {"interval": 3, "steps": frozenset({2})}])
def test_computed_steps_are_said_in_one_way(both_or_none):
    with pytest.raises(ValueError, match="give one of them"):
        CacheConfig(**both_or_none)


@given(st.sets(st.integers(1, 20)))
def test_step_zero_computes_whether_listed_or_not(steps):
    config = CacheConfig(steps=frozenset(steps))
    assert {i for i in range(25) if config.computes(i)} == steps | {0}


def reuse_cost(distances, chosen):
    return sum(float(distances[max(s for s in chosen if s <= j), j]) for j in range(len(distances)) if j not in chosen)


@given(st.data())
@settings(deadline=None, max_examples=120)
def test_optimal_schedule_equals_brute_force(data):
    total = data.draw(st.integers(1, 7))
    count = data.draw(st.integers(1, total))
    seed = data.draw(st.integers(0, 2**31))
    distances = torch.rand(total, total, generator=torch.Generator().manual_seed(seed))
    if data.draw(st.booleans()):
        distances = (4 * distances).round()  # ties
    distances = distances.triu(1)
    schedule = optimal_schedule(distances, count)
    assert len(schedule) == count and schedule[0] == 0
    assert list(schedule) == sorted(set(schedule)) and max(schedule) < total
    best = min(reuse_cost(distances, (0, *rest)) for rest in combinations(range(1, total), count - 1))
    assert reuse_cost(distances, schedule) == pytest.approx(best, abs=1e-6)


def test_optimal_schedule_finds_the_jumps():
    position = torch.tensor([0.0, 0.1, 0.2, 5.0, 5.1, 9.0, 9.2, 9.3])
    distances = (position[None] - position[:, None]).abs()
    assert optimal_schedule(distances, 3) == (0, 3, 5)  # a full symmetric matrix: only the upper half is read


@pytest.mark.parametrize("count", [1, 5])
def test_optimal_schedule_of_one_and_of_all_steps(count):
    distances = torch.rand(5, 5, generator=torch.Generator().manual_seed(0)).triu(1)
    assert optimal_schedule(distances, count) == tuple(range(count))


@pytest.mark.parametrize(
    "distances, count, message",
    [
        (torch.zeros(4, 4), 0, "num_computed must be between 1 and the 4 steps, got 0"),
        (torch.zeros(4, 4), 5, "num_computed must be between 1 and the 4 steps, got 5"),
        (torch.zeros(4, 3), 2, r"finite \(T, T\) matrix, got shape \(4, 3\)"),
        (torch.zeros(4), 2, r"finite \(T, T\) matrix, got shape \(4,\)"),
        (torch.full((3, 3), float("nan")), 2, "finite"),
    ],
)
def test_optimal_schedule_refuses_bad_input(distances, count, message):
    with pytest.raises(ValueError, match=message):
        optimal_schedule(distances, count)


def test_the_schedule_drives_the_cache(model):
    distances = torch.rand(7, 7, generator=torch.Generator().manual_seed(1)).triu(1)
    schedule = optimal_schedule(distances, 3)
    expected = trajectory(brute_force(model, schedule))
    apply_cache_to_dit(model, steps=schedule)
    assert_same(trajectory(lambda x, t: call(model, x, t)), expected)


def test_a_step_evaluated_twice_counts_once_for_the_forecast():
    cache = FeatureCache(CacheConfig(3, order=1))
    for step, value in ((0, 1.0), (3, 5.0), (3, 7.0)):
        cache.place(step, ["a"])
        cache.store("branch", torch.full((1,), value))
    cache.place(4, ["a"])
    assert cache.recall("branch").item() == pytest.approx(9.0)  # the line through (0, 1) and (3, 7)


def test_conditions_keep_their_own_features_however_they_are_batched():
    cache = FeatureCache(CacheConfig(2))
    cache.place(0, ["a", "b"])
    cache.store("branch", torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert cache.place(1, ["b"]) and cache.recall("branch").tolist() == [3.0, 4.0]
    assert cache.place(1, ["b", "a"]) and cache.recall("branch").tolist() == [3.0, 4.0, 1.0, 2.0]
    assert not cache.place(1, ["a", "c"])


def test_what_the_latest_computed_step_did_not_evaluate_is_forgotten():
    """Step 4 computes "b" in the place of "a", and step 6 only "b": what "a" kept at step 3 is too old."""
    cache = FeatureCache(CacheConfig(3))
    for step, condition in ((3, "a"), (4, "b")):
        assert not cache.place(step, [condition])
        cache.store("branch", torch.ones(1))
    assert cache.place(5, ["a"]) and cache.place(5, ["b"])
    assert not cache.place(6, ["b"])
    cache.store("branch", torch.ones(1))
    assert cache.place(7, ["b"]) and not cache.place(7, ["a"])
    assert cache.num_bytes == 4
