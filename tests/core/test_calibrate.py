"""calibrate(): both passes over a model's own trajectories, resumed, held out, and against plain hooks."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qandc_core import (
    CalibrationConfig,
    DiT,
    DiTConfig,
    DiTTrajectories,
    SamplingConfig,
    apply_cache_to_dit,
    calibrate,
    load_calibration,
    quantize_model,
)
from qandc_core.calibration.choice import Candidates, Choice, features_of, spread
from qandc_core.calibration.layer_inputs import HELD_OUT_TOKENS
from qandc_core.calibration.memory import LEAST, plan_statistics
from qandc_core.calibration.run import Calibrating
from qandc_core.calibration.statistics import observed

CONFIG = DiTConfig(input_size=8, in_channels=3, hidden_size=32, depth=2, num_heads=2, num_classes=5, learn_sigma=False)
STEPS, LABELS = 5, [0, 3, 1, 4]
PLAN = CalibrationConfig(trajectories=5, batch_size=2, samples=8, clusters=3, seed=3, tokens=40, held_out=4)
ALL = replace(PLAN, samples=16, surplus=1.5)  # takes all 20 samples of 4 trajectories, and samples each once
TENSORS = ("low", "high", "mean", "histogram", "hessian", "inputs", "held_out")


def dit(seed=0, cache=0):
    torch.manual_seed(seed)
    model = DiT(CONFIG).eval()
    for block in model.blocks:
        torch.nn.init.normal_(block.adaLN_modulation[-1].weight, std=0.1)
    torch.nn.init.normal_(model.final_layer.linear.weight, std=0.1)
    return apply_cache_to_dit(model, cache) if cache else model


def host(cache=0, cfg_scale=2.0, batched=True, **options):
    config = SamplingConfig(steps=STEPS, cfg_scale=cfg_scale, batched_guidance=batched)
    return DiTTrajectories(dit(cache=cache), LABELS, config, **options)


def same(found, expected):
    assert found.statistics.keys() == expected.statistics.keys() and len(found.held_out) == len(expected.held_out)
    for name, layer in found.statistics.items():
        other = expected.statistics[name]
        assert (layer.count, layer.reach) == (other.count, other.reach)
        for key in TENSORS:
            ours, theirs = getattr(layer, key), getattr(other, key)
            assert ours is theirs is None or torch.equal(ours, theirs), (name, key)
    for call, other in zip(found.held_out, expected.held_out):
        assert torch.equal(call.x, other.x) and torch.equal(call.sigma, other.sigma)
    assert (found.distances is None) == (expected.distances is None)
    assert found.distances is None or torch.equal(found.distances, expected.distances)


@pytest.mark.parametrize("cache", [0, 2])
@pytest.mark.parametrize("stop", [2, 9, 17, 22])
def test_an_interrupted_calibration_resumes_and_gives_the_same_bits(cache, stop, tmp_path):
    class Cancelled(Exception):
        pass

    def cancel(done, total):
        if done == stop:
            raise Cancelled

    partial = tmp_path / "c.partial"
    expected = calibrate(host(cache), PLAN)
    interrupted = host(cache, callback=cancel)
    with pytest.raises(Cancelled):
        calibrate(interrupted, PLAN, partial)
    assert not any(layer._forward_pre_hooks for _, layer in interrupted.layers)
    assert "forward" not in vars(interrupted.model) and partial.exists() == (stop > 15)
    resumed = host(cache)
    same(calibrate(resumed, PLAN, partial), expected)
    assert resumed.done < 6 * STEPS - 1 or stop <= 15


@pytest.mark.parametrize("plan", [PLAN, ALL])
@pytest.mark.parametrize("batched", [True, False])
def test_statistics_are_of_the_chosen_samples_alone(batched, plan):
    """Against hooks that see all calls, one image and one condition at a time."""
    made = Calibrating(subject := host(batched=batched), plan, None)
    state = made.first_pass()
    seen = []

    def note(name, choice):
        one = host(cfg_scale=2.0)
        for run, call, image, _ in choice.tolist():
            seed, size, first, _ = list(PLAN.batches())[run]
            samples = [x for _, x, _ in one.steps_of(seed, size, first)]
            t = torch.tensor([one.config.schedule().timesteps[call]])
            label = torch.tensor([LABELS[(first + image) % len(LABELS)]])
            layer = one.model.get_submodule(name)
            hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].reshape(-1, args[0].shape[-1])))
            with torch.inference_mode():
                for y in (label, torch.tensor([one.model.null_class])):
                    one.model(samples[call][image : image + 1], t, y)
            hook.remove()

    with torch.inference_mode():
        made.second_pass(state)
        for name in ("blocks.0.attn.qkv", "blocks.1.mlp.fc2"):
            seen.clear()
            note(name, state.choice.samples)
            x, layer = torch.cat(seen), state.statistics[name]
            assert layer.count == len(x)
            assert torch.allclose(layer.low, x.amin(0), atol=1e-5) and torch.allclose(layer.high, x.amax(0), atol=1e-5)
            assert torch.allclose(layer.mean, x.mean(0), atol=1e-5)
            if layer.hessian is not None:
                assert torch.allclose(layer.hessian, x.T @ x, atol=1e-2)
    assert len(state.choice.samples) == (20 if plan is ALL else 8)
    assert subject.done == subject.total == (1 if plan is ALL else 2) * 3 * STEPS


@pytest.mark.parametrize("samples, cached", [(15, 2), (25, 0)])
def test_one_pass_gives_the_bits_of_two(samples, cached, monkeypatch):
    """But for the kept inputs, which are others of the same samples; with as many samples nothing is left to choose."""
    plan = replace(PLAN, samples=samples, trajectories=6, held_out=5)
    once = calibrate(subject := host(cached), plan)
    assert subject.done == 4 * STEPS
    monkeypatch.setattr(Calibrating, "took_all", lambda *_: False)
    twice = calibrate(subject := host(cached), plan)
    assert subject.done == 8 * STEPS and once.notes["samples"] == twice.notes["samples"]
    for name, layer in once.statistics.items():
        if layer.inputs is not None:
            assert layer.inputs.shape == twice.statistics[name].inputs.shape
            layer.inputs = twice.statistics[name].inputs
    same(once, twice)


@pytest.mark.parametrize("plan", [PLAN, ALL])
def test_the_held_out_trajectory_replays(plan):
    subject = host()
    found = calibrate(subject, plan)
    assert len(found.held_out) == 4
    seed, size, first, _ = list(PLAN.batches())[-1]
    assert size == 1
    samples = [x for _, x, _ in subject.steps_of(seed, size, first)]
    for call in found.held_out:
        assert any(torch.equal(call.x, x) for x in samples)
        assert call.conditions["y"].tolist() in ([LABELS[first % len(LABELS)]], [subject.model.null_class])


def test_a_cache_leaves_no_distances_and_says_why():
    plain, cached = calibrate(host(), PLAN), calibrate(host(2), PLAN)
    assert plain.distances is not None and plain.distances.shape == (STEPS, STEPS)
    assert cached.distances is None and "made with a cache" in cached.missing_distances


def test_layers_that_a_cache_skips_see_computed_steps_alone():
    cached = calibrate(host(2), replace(PLAN, computed_only=False, samples=100, held_out=0))
    counts = {name: layer.count for name, layer in cached.statistics.items()}
    assert (
        counts["blocks.0.attn.qkv"] == counts["blocks.1.mlp.fc1"] == 5 * 3 * 2 * 16
    )  # images, steps, conditions, tokens
    assert counts["final_layer.linear"] == 5 * STEPS * 2 * 16


@pytest.mark.parametrize("spoil", [lambda b: b[:-100], lambda b: b"", lambda b: b.replace(b"samples", b"simples")])
def test_a_damaged_partial_file_is_set_aside_with_one_warning(spoil, tmp_path, caplog):
    partial, expected = tmp_path / "c.partial", calibrate(host(), PLAN)
    calibrate(host(), PLAN, partial)
    partial.write_bytes(spoil(partial.read_bytes()))
    same(calibrate(host(), PLAN, partial), expected)
    assert [r.levelname for r in caplog.records if "damaged" in r.message] == ["WARNING"]
    assert (tmp_path / "c.partial.damaged").is_file() and load_calibration(partial)
    caplog.clear()
    calibrate(host(), PLAN, partial)
    assert not caplog.records or "damaged" not in caplog.text


def test_a_partial_file_of_another_model_is_set_aside(tmp_path):
    partial = tmp_path / "c.partial"
    calibrate(host(), PLAN, partial)
    other = host()
    other.model.blocks[0].attn.qkv.weight.data.mul_(1.1)
    other = DiTTrajectories(other.model, LABELS, other.config)
    expected = calibrate(other, PLAN)
    same(calibrate(other, PLAN, partial), expected)


def test_a_partial_file_that_cannot_be_written_does_not_stop_the_calibration(tmp_path, caplog):
    (tmp_path / "file").write_bytes(b"")
    same(calibrate(host(), PLAN, tmp_path / "file" / "c.partial"), calibrate(host(), PLAN))
    assert caplog.text.count("was not saved") + caplog.text.count("is not saved") == 1


@pytest.mark.parametrize("selection", ["tap", "stratified", "random"])
def test_selections_take_as_many_samples(selection):
    found = Calibrating(host(), replace(PLAN, selection=selection), None).first_pass()
    assert (
        len(found.choice.samples) == 8 and not (found.choice.samples[:, 0] == 2).any() or len(found.choice.samples) == 8
    )
    last = len(list(PLAN.batches())) - 1
    assert not (found.choice.samples[:, 0] == last).any() and (found.choice.held_out[:, 0] == last).all()


def test_nothing_to_calibrate():
    with pytest.raises(ValueError, match="No linear layer is left"):
        host(skip_patterns=[""])
    with pytest.raises(ValueError, match="quantized already"):
        DiTTrajectories(quantize_model(dit()), LABELS, SamplingConfig(steps=STEPS))
    with pytest.raises(ValueError, match="need at least"):
        calibrate(host(), replace(PLAN, memory_gb=1e-6))


def test_sigmas_on_any_device_and_steps_without_prediction():
    candidates = Candidates()
    candidates.add(0, 0, 0, torch.tensor([2.0, 1.0, 0.0]), torch.ones(1, 4), torch.ones(1, 4), 1, computed=True)
    assert candidates.missing() == "steps" and candidates.distances() is None
    assert (
        0 in Choice(torch.tensor([[0, 0, 0, 1]]), torch.empty(0, 4))
        and features_of(torch.ones(2, 3, 200, 200)).shape[1] <= 16384
    )


def rows_of(x):
    return {row.view(torch.uint8).numpy().tobytes() for row in x.reshape(-1, x.shape[-1]).bfloat16().contiguous()}


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("cache", [0, 2])
@pytest.mark.parametrize("plan", [PLAN, ALL])
def test_kept_inputs_are_those_that_layers_see_and_the_held_out_image_is_not_among_them(cache, batched, plan):
    """Against hooks on all calls; inputs of attention and MLP differ for each image."""
    subject = host(cache, batched=batched)
    found, last = calibrate(subject, plan), len(list(PLAN.batches())) - 1
    seen = {name: [set() for _ in PLAN.batches()] for name in found.statistics}
    for run, batch in enumerate(PLAN.batches()):

        def note(name, x, run=run):
            seen[name][run] |= rows_of(x)

        with torch.inference_mode(), observed(subject.layers, note):
            list(subject.steps_of(*batch[:3]))
    for name, layer in found.statistics.items():
        rows, held_out = rows_of(layer.inputs), rows_of(layer.held_out)
        assert len(layer.inputs) <= PLAN.tokens and rows and rows <= set.union(*seen[name][:last]), name
        assert len(layer.held_out) <= HELD_OUT_TOKENS and held_out and held_out <= seen[name][last], name
        if ".attn." in name or ".mlp." in name:
            assert len(layer.inputs) == PLAN.tokens and not rows & seen[name][last], name


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_statistics_stay_within_the_memory_they_may_take(share):
    widths = [layer.in_features for _, layer in host().layers]
    least, most = (plan_statistics(widths, 2**40, tokens, HELD_OUT_TOKENS).bytes for tokens in (LEAST, 4096))
    budget = int(least + share * (most - least))
    found = calibrate(host(), replace(PLAN, tokens=4096, memory_gb=budget / 2**30))
    kept = [getattr(layer, key) for layer in found.statistics.values() for key in TENSORS]
    taken = sum(tensor.untyped_storage().nbytes() for tensor in kept if tensor is not None)
    assert least <= taken <= budget and len(found.statistics) == len(widths)


def test_one_trajectory_holds_out_computed_samples_that_were_not_chosen():
    one = replace(PLAN, trajectories=1, samples=2)
    for cache, steps in {0: range(STEPS), 2: range(0, STEPS, 2)}.items():
        choice = Calibrating(host(cache), one, None).first_pass().choice
        chosen, apart = (
            {(run, call) for run, call, *_ in places.tolist()} for places in (choice.samples, choice.held_out)
        )
        assert chosen | apart <= {(0, step) for step in steps} and not chosen & apart
        assert len(chosen) == 2 and len(apart) == min(PLAN.held_out, len(steps) - 2)
        assert len(calibrate(host(cache), replace(one, samples=100)).held_out) == 0
        assert len(calibrate(host(cache), replace(one, held_out=0)).held_out) == 0


@given(st.integers(0, 40), st.integers(1, 3), st.integers(0, 60))
@settings(deadline=None)
def test_held_out_calls_spread_over_the_run_and_no_condition_is_held_out_twice(calls, conditions, count):
    places = torch.tensor([[2, call, 0, conditions] for call in range(calls)], dtype=torch.long).reshape(-1, 4)
    found = [tuple(place) for place in spread(places, count).tolist()]
    assert len(found) == len(set(found)) == min(count, calls * conditions)
    assert all(run == 2 and image == 0 and 0 <= condition < conditions for run, _, image, condition in found)
    times = [sum(call == other for _, other, _, _ in found) for call in range(calls)]
    assert not times or max(times) - min(times) <= 1
    held = [call for call in range(calls) if times[call] == max(times)]
    gaps = [later - call for call, later in zip(held, held[1:])]
    assert not gaps or max(gaps) - min(gaps) <= 1


class Routed(torch.nn.Module):
    """A layer with an expert to which no token goes, and one that is never called."""

    def __init__(self, layer):
        super().__init__()
        self.always, self.rare, self.unused = layer, torch.nn.Linear(128, 32), torch.nn.Linear(128, 32)

    def forward(self, x):
        self.rare(x[x[..., 0] > 1e9])
        return self.always(x)


def routed(all_run):
    subject = host()
    subject.model.blocks[0].mlp.fc2 = Routed(subject.model.blocks[0].mlp.fc2)
    subject = DiTTrajectories(subject.model, LABELS, subject.config)
    subject.all_run = all_run
    return subject


def test_layers_without_inputs_get_no_statistics(caplog):
    found, names = calibrate(routed(all_run=False), PLAN), {name for name, _ in routed(False).layers}
    assert names - set(found.statistics) == {"blocks.0.mlp.fc2.rare", "blocks.0.mlp.fc2.unused"}
    assert all(layer.count > 0 for layer in found.statistics.values())
    assert [r.message for r in caplog.records if "blocks.0.mlp.fc2.rare no input; 1 such" in r.message]


def test_a_network_whose_calls_run_all_layers_refuses_samples_that_miss_one():
    said = r"^None of the selected samples falls on a step that computes blocks[.]0[.]mlp[.]fc2[.]rare .*samples[.]$"
    with pytest.raises(ValueError, match=said):
        calibrate(routed(all_run=True), PLAN)
