"""Calibration from runs: what is chosen while samples go by, and that runs add up to one pass over all of them."""

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qandc_core import DiT, DiTConfig, load_calibration
from qandc_core.calibration import recorder as recorder_module
from qandc_core.calibration.distances import prediction_distances
from qandc_core.calibration.file import Calibration, fingerprint
from qandc_core.calibration.gain import DAMPING, ENOUGH, LATEST, left_to_gain, lowered, rounding_error
from qandc_core.calibration.growth import RunSchedule, add_run, check_recording, with_run
from qandc_core.calibration.layer_inputs import HELD_OUT_TOKENS
from qandc_core.calibration.memory import StatisticsPlan, plan_statistics
from qandc_core.calibration.recorder import Recorder, RecordingConfig
from qandc_core.calibration.records import Drawn, LayerRecord, Room, RunRecord, Waiting
from qandc_core.calibration.statistics import SAMPLING_DAMPING, LayerStatistics
from qandc_core.calibration.stream import Reservoir, Strata
from qandc_core.models.layers import named_linears
from qandc_core.quantization.gptq import gptq_codes
from qandc_core.quantization.grids import Grid

CONFIG = DiTConfig(input_size=8, in_channels=3, hidden_size=32, depth=2, num_heads=2, num_classes=5, learn_sigma=False)
STEPS, IMAGES = 12, 2
SIGMAS = [float(s) for s in torch.linspace(10, 0, STEPS + 1)]
SUMS = ("low", "high", "mean", "histogram", "hessian", "inputs", "held_out")
PLAN = RecordingConfig(samples=4, tokens=40, held_out=3)


def generator(seed):
    return torch.Generator().manual_seed(seed)


@given(st.integers(1, 9), st.integers(0, 4), st.lists(st.integers(0, 7), max_size=12), st.integers(0, 99))
def test_every_stratum_has_one_chosen_however_calls_are_cut(size, apart, calls, seed):
    total, one = sum(calls), Strata(size, apart, generator(seed))
    whole, held = one.take(total)
    other, chosen, apart_now, at = Strata(size, apart, generator(seed)), [], [], 0
    for count in calls:
        for found, places in zip((chosen, apart_now), other.take(count)):
            found += [at + place for place in places]
        at += count
    assert (chosen, apart_now) == (whole, held)
    assert not set(whole) & set(held)
    strata = Counter(place // size for place in whole)
    assert all(strata[stratum] == 1 for stratum in range(total // size))
    with_two = [place // size for place in held]
    assert {b - a for a, b in zip(with_two, with_two[1:])} <= {apart} and (not held or (apart and size > 1))


def test_every_row_is_chosen_and_held_out_equally_often():
    size, apart, total, seeds = 7, 3, 40, 3000
    chosen, held = torch.zeros(total), torch.zeros(total)
    for seed in range(seeds):
        for counts, places in zip((chosen, held), Strata(size, apart, generator(seed)).take(total)):
            counts[places] += 1
    for counts, probability in ((chosen, 1 / size), (held, 1 / size / apart)):
        spread = math.sqrt(seeds * probability * (1 - probability))
        assert float((counts - seeds * probability).abs().max()) < 4.5 * spread


def keys_of(count, random):
    return torch.rand(count, dtype=torch.float64, generator=random)


def kept_by_brute_force(batches, capacity):
    """{key: row} of the lowest keys."""
    all_rows = {float(key): row for x, keys in batches for row, key in zip(x.bfloat16(), keys)}
    return {key: all_rows[key] for key in sorted(all_rows)[:capacity]}


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.integers(1, 12), st.integers(0, 99), st.booleans())
def test_a_reservoir_keeps_the_lowest_keys_in_any_order_and_merged(sizes, capacity, seed, merged):
    random = generator(seed)
    batches = [(torch.randn(n, 3, generator=random), keys_of(n, random)) for n in sizes]
    reservoir, other = Reservoir.empty(capacity, 3), Reservoir.empty(capacity, 3)
    for number, (x, keys) in enumerate(batches):
        (other if merged and number % 2 else reservoir).add(x, keys)
    reservoir.add(other.tokens, other.keys)
    wanted = kept_by_brute_force(batches, capacity)
    assert dict.fromkeys(reservoir.keys.tolist()).keys() == wanted.keys()
    assert all(torch.equal(row, wanted[float(key)]) for row, key in zip(reservoir.tokens, reservoir.keys))


def close(found, expected, tolerance=1e-4):
    assert float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())


def filled(parts, hessian, rows):
    record = LayerRecord(LayerStatistics.empty(4, hessian), {"inputs": Reservoir.empty(rows, 4)})
    for x, keys in parts:
        record.statistics.update(x)
        record.kept["inputs"].add(x, keys)
    return record


@given(
    st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=3), min_size=1, max_size=5),
    st.booleans(), st.integers(0, 99), st.floats(-6, 6),
)  # fmt: skip
@settings(deadline=None)
def test_records_of_runs_merge_to_that_of_one_pass(runs, hessian, seed, scale):
    random = generator(seed)
    data = [
        [(torch.randn(n, 4, generator=random) * 10**scale * (i + 1), keys_of(n, random)) for n in run]
        for i, run in enumerate(runs)
    ]
    one = filled([part for run in data for part in run], hessian, 16)
    merged = filled(data[0], hessian, 16)
    for run in data[1:]:
        later = filled(run, hessian, 16)
        later.merge(merged)
        merged = later
    ours, theirs = merged.statistics, one.statistics
    assert (ours.count, ours.reach) == (theirs.count, theirs.reach)
    for key in ("low", "high", "histogram"):
        assert torch.equal(getattr(ours, key), getattr(theirs, key)), key
    close(ours.mean, theirs.mean, 1e-5)
    if hessian:
        close(ours.hessian, theirs.hessian, 1e-5)
    assert sorted(merged.kept["inputs"].keys.tolist()) == sorted(one.kept["inputs"].keys.tolist())


# A run of a model, through a recorder and through hooks written by hand.


def dit(seed=0):
    torch.manual_seed(seed)
    model = DiT(CONFIG).eval()
    for block in model.blocks:
        torch.nn.init.normal_(block.adaLN_modulation[-1].weight, std=0.1)
    return model


class Sampled:
    """One run of a loop that nobody asked: two conditions side by side or one after the other, its inputs noted."""

    def __init__(self, model, recorder, seed, together=True, sigmas=SIGMAS, images=IMAGES):
        self.layers, self.seen, self.rows = list(named_linears(model)), [], []
        self.outputs, random = [], generator(seed)
        handles = [
            layer.register_forward_pre_hook(lambda _, args, name=name: self.seen[-1].setdefault(name, args[0].clone()))
            for name, layer in self.layers
        ]
        x = torch.randn(images, 3, 8, 8, generator=random)
        for step, sigma in enumerate(sigmas[:-1]):
            t = torch.full((images,), float(990 - 80 * step))
            labels = torch.tensor([[1, 3], [5, 5]])[:, :images]
            recorder.expect(2 * images)
            parts = [labels.flatten()] if together else list(labels)
            outs = [self.call(model, recorder, x, t, y) for y in parts]
            both = torch.cat(outs).view(2, images, 3, 8, 8)
            denoised = x - (1.5 * both[0] - 0.5 * both[1])
            recorder.predicted(torch.tensor([sigma]), denoised)
            self.outputs.append(denoised)
            x = x + 0.1 * (denoised - x)
        for handle in handles:
            handle.remove()

    def call(self, model, recorder, x, t, y):
        batch = x.repeat(len(y) // len(x), 1, 1, 1), t.repeat(len(y) // len(t)), y
        self.seen.append({})
        took = recorder.strata.take
        noted = {}

        def take(count):
            noted["rows"] = took(count)
            return noted["rows"]

        recorder.strata.take = take
        out = recorder.called("net", lambda: self.layers, lambda: 2**40, lambda: model(*batch), *batch[:2], {"y": y})
        recorder.strata.take = took
        self.rows.append((batch, *noted["rows"]))
        return out

    def inputs(self, name, which=1):
        """All inputs (M, K) of the layer on rows that were chosen (1) or held out (2)."""
        found = []
        for seen, (batch, *places) in zip(self.seen, self.rows):
            x, rows = seen[name], places[which - 1]
            found.append(x.reshape(len(batch[0]), -1, x.shape[-1])[rows].flatten(0, 1))
        return torch.cat(found)


def recorded(model, seed, config=PLAN, together=True, sigmas=SIGMAS):
    recorder = Recorder(config, len(sigmas) - 1, seed)
    with torch.inference_mode():
        return Sampled(model, recorder, seed, together, sigmas), recorder.result()


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("hessians", [True, False])
def test_statistics_are_those_of_hooks_written_by_hand(together, hessians):
    config = RecordingConfig(samples=4, hessians=hessians, tokens=40, held_out=3)
    sampled, run = recorded(dit(), 3, config, together)
    chosen = sum(len(rows) for _, rows, _ in sampled.rows)
    assert run.samples == chosen == 4 and len(run.calls) == sum(len(rows) for *_, rows in sampled.rows) > 0
    for name, _ in sampled.layers:
        x, layer = sampled.inputs(name), run.layers[name]
        found = layer.statistics
        assert found.count == len(x)
        assert torch.equal(found.low, x.amin(0)) and torch.equal(found.high, x.amax(0))
        close(found.mean, x.mean(0))
        histogram = torch.histc(x / found.reach, 2048, -1, 1).double()
        assert float((found.histogram - histogram).abs().sum()) <= 0.01 * x.numel()
        rows = {row.numpy().tobytes() for row in x.bfloat16().view(torch.int16)}
        held = {row.numpy().tobytes() for row in sampled.inputs(name, 2).bfloat16().view(torch.int16)}
        assert {row.numpy().tobytes() for row in layer.kept["held_out"].tokens.view(torch.int16)} <= held
        if found.hessian is not None:
            close(found.hessian, x.T @ x)
        elif hessians:
            assert len(layer.kept["inputs"].tokens) == min(40, len(x))
            assert {row.numpy().tobytes() for row in layer.kept["inputs"].tokens.view(torch.int16)} <= rows


def test_a_sample_of_many_inputs_adds_some_of_them_and_all_bounds(monkeypatch):
    monkeypatch.setattr(recorder_module, "FEWEST", 5)
    monkeypatch.setattr(recorder_module, "SHARE", 3)
    sampled, run = recorded(dit(), 3)
    name = "blocks.1.mlp.fc1"
    x, layer = sampled.inputs(name), run.layers[name]
    assert layer.statistics.count == 5 * run.samples < len(x)
    assert torch.equal(layer.statistics.low, x.amin(0)) and torch.equal(layer.statistics.high, x.amax(0))
    kept = {row.numpy().tobytes() for row in x.bfloat16().view(torch.int16)}
    for record in run.layers.values():
        if "probe" in record.kept and record.statistics.hessian is not None:
            rows = record.kept["probe"].tokens.float()
            assert len(rows) == record.statistics.count
            close(record.statistics.hessian, rows.T @ rows, 0.03)
    assert {row.numpy().tobytes() for row in layer.kept["held_out"].tokens.view(torch.int16)}.isdisjoint(kept)


@given(st.integers(1, 64), st.integers(64, 10**5), st.integers(1, 20))
def test_a_run_of_any_length_adds_one_token_in_forty_or_the_fewest(rows, tokens, samples):
    size = RecordingConfig(samples=samples).strata(rows)
    added = recorder_module.tokens_of(tokens, size / recorder_module.SPARSEST)
    fewest, share = recorder_module.FEWEST, recorder_module.SHARE * recorder_module.SPARSEST
    assert fewest <= added <= max(fewest, size * tokens / share)


def test_a_short_run_adds_fewer_tokens_of_its_sample(monkeypatch):
    monkeypatch.setattr(recorder_module, "FEWEST", 1)
    monkeypatch.setattr(recorder_module, "SHARE", 1)
    whole = len(Sampled(dit(), Recorder(PLAN, STEPS, 1), 7).seen[0]["blocks.1.mlp.fc1"][0])
    for steps, part in ((1, 0.2), (2, 0.4), (4, 0.8)):  # of two conditions of one image, as a part of ten samples
        recorder = Recorder(RecordingConfig(samples=4), steps, 3)
        with torch.inference_mode():
            Sampled(dit(), recorder, 3, sigmas=SIGMAS[-steps - 1 :], images=1)
        assert recorder.samples == 1
        assert recorder.result().layers["blocks.1.mlp.fc1"].statistics.count == int(part * whole)


@pytest.mark.parametrize("batches", [1, 9])
def test_sums_wait_for_the_end_of_the_run_as_far_as_memory_allows(batches):
    recorder, model = Recorder(RecordingConfig(samples=4, held_out=0), STEPS, 3), dit()
    with torch.inference_mode():
        for seed in range(batches):
            Sampled(model, recorder, seed)
    (place,) = recorder.places.values()
    assert bool(place.records) == (batches == 9)
    assert 0 < recorder.num_bytes <= place.space.bytes
    found = recorder.result()
    assert found.samples > 1 and not recorder.places
    assert all(record.statistics.count > 0 for record in found.layers.values())


@given(st.lists(st.integers(1, 99), max_size=20), st.integers(0, 40000), st.integers(0, 50))
def test_what_waits_takes_no_more_than_the_room_and_the_record(sizes, free, tokens):
    width, room = 4, Room(torch.device("cpu"), free)
    waiting = Waiting(width, StatisticsPlan(tokens, 9, 0), room)
    parts = [Drawn(torch.full((n, width), float(n)), torch.zeros(n, dtype=torch.float64)) for n in sizes]
    taken = [part for part in parts if waiting.takes(part)]
    held = sum(part.tokens.nbytes for part in taken)
    assert room.left == free - held >= 0 and held <= waiting.most
    smallest = min((part.tokens.nbytes for part in parts if not any(part is kept for kept in taken)), default=2**20)
    assert held + smallest > min(free, waiting.most)
    assert all(a is b for a, b in zip(waiting.emptied(), taken, strict=True))
    assert room.left == free and waiting.large == []


def test_recording_changes_no_output_and_leaves_no_hook():
    model = dit()
    plain = Sampled(model, Recorder(RecordingConfig(samples=1), STEPS, 1), 7).outputs
    seen, _ = recorded(model, 7, RecordingConfig(samples=100))
    assert all(torch.equal(a, b) for a, b in zip(plain, seen.outputs))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_tenth_of_the_samples_at_most_and_one_at_least():
    assert [RecordingConfig(samples=n).strata(rows) for n, rows in ((8, 400), (8, 40), (8, 4), (1, 7), (8, 1))] == [
        50, 10, 4, 7, 1,
    ]  # fmt: skip


def run_schedule(**changes):
    return RunSchedule(**{"sigmas": SIGMAS, "sampler": "euler", "noisy": False, **changes})


def test_a_file_after_several_runs_is_that_of_one_pass(tmp_path):
    """Sums of all chosen rows, the lowest keys of all kept ones, distances of all predictions side by side."""
    model, path = dit(), tmp_path / "runs.safetensors"
    model_id, seen, keys, calls = fingerprint(model), [], {}, []
    for seed in range(4):
        sampled, run = recorded(model, seed)
        seen.append(sampled)
        for name, record in run.layers.items():
            keys.setdefault(name, []).extend(record.kept["held_out"].keys.tolist())
        calls += [key for key, _ in run.calls]
        add_run(path, model_id, run, run_schedule(), PLAN)
    found = load_calibration(path)
    assert found.recording.runs == found.notes["runs"] == 4 and found.recording.samples == 16
    for name, _ in sampled.layers:
        x, layer = torch.cat([run.inputs(name) for run in seen]), found.statistics[name]
        assert layer.count == len(x)
        assert torch.equal(layer.low, x.amin(0)) and torch.equal(layer.high, x.amax(0))
        if layer.hessian is not None:
            close(layer.second_moment(), x.T @ x)
        assert found.recording.keys[f"{name}/held_out"].sort().values.tolist() == sorted(keys[name])[:256]
        assert len(layer.held_out) == min(256, len(keys[name]))
    assert found.recording.call_keys == sorted(calls)[:3] and len(found.held_out) == 3
    values = torch.stack([torch.cat([run.outputs[step].flatten() for run in seen]) for step in range(STEPS)])
    close(found.distances, prediction_distances(values, torch.tensor(SIGMAS)))


def test_runs_of_other_schedules_share_layers_and_have_their_own_distances(tmp_path):
    model = dit()
    short = run_schedule(sigmas=[float(s) for s in torch.linspace(10, 0, 7)])
    alone, together = tmp_path / "alone.safetensors", tmp_path / "together.safetensors"
    for seed, schedule in enumerate((run_schedule(), short, short)):
        for path in (together, alone)[: 1 + (schedule is short)]:
            add_run(path, "m", recorded(model, seed, sigmas=schedule.sigmas)[1], schedule, PLAN)
    found, only = load_calibration(together), load_calibration(alone)
    assert [schedule.runs for schedule in found.recording.schedules] == [1, 2]
    assert found.notes["steps"] == 6 and torch.equal(found.distances, only.distances)
    assert not found.schedule_mismatch(short.sigmas) and found.schedule_mismatch(SIGMAS)
    assert found.recording.runs == 3


@pytest.mark.parametrize(("schedule", "missing"), [
    (run_schedule(whole=False), "with a cache"), (run_schedule(sigmas=[*SIGMAS, -1.0]), "every step"),
    (run_schedule(sigmas=SIGMAS[::-1]), "every step"),
])  # fmt: skip
def test_a_run_without_all_steps_has_no_distances(schedule, missing, tmp_path):
    path = tmp_path / "runs.safetensors"
    add_run(path, "m", recorded(dit(), 0)[1], schedule, PLAN)
    found = load_calibration(path)
    assert found.distances is None and missing in found.missing_distances
    add_run(path, "m", recorded(dit(), 1)[1], run_schedule(), PLAN)
    assert load_calibration(path).distances is not None


def test_what_cannot_be_added_is_refused_and_leaves_the_file(tmp_path):
    path = tmp_path / "runs.safetensors"
    add_run(path, "a" * 32, recorded(dit(), 0)[1], run_schedule(), PLAN)
    before = path.read_bytes()
    broken = recorded(dit(), 1)[1]
    with torch.inference_mode():
        broken.layers["blocks.0.mlp.fc1"].statistics.update(torch.full((1, 32), math.nan))
    cases = {
        "runs of another model": ("b" * 32, recorded(dit(), 1)[1], PLAN),
        "started with hessians": ("a" * 32, recorded(dit(), 1)[1], RecordingConfig(tokens=99)),
        "not finite": ("a" * 32, broken, PLAN),
        "none of its model calls": ("a" * 32, RunRecord({}, samples=1), PLAN),
        "raise samples": ("a" * 32, RunRecord({}), PLAN),
    }
    for words, (model, run, config) in cases.items():
        with pytest.raises(ValueError, match=words) as raised:
            add_run(path, model, run, run_schedule(), config)
        assert str(raised.value).count(". ") == 0
        assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["runs.safetensors"]
    anew = RecordingConfig(samples=4, tokens=40, held_out=3, reset=1)
    assert add_run(path, "b" * 32, recorded(dit(), 1)[1], run_schedule(), anew).runs == 1
    replace(with_run(None, "m", recorded(dit(), 1)[1], run_schedule(), PLAN), schedule=(0,)).save(path)
    assert check_recording(path, "m", PLAN)["runs"] == 1


def test_a_calibration_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "c.safetensors"
    Calibration("m").save(path)
    with pytest.raises(ValueError, match="was not made by Calibrate from Runs"):
        add_run(path, "m", recorded(dit(), 0)[1], run_schedule(), PLAN)


# When runs are enough.


def test_rounding_error_is_what_gptq_leaves():
    """Against GPTQ itself, over many random weights on a coarse grid: the mean ratio to rounding to nearest."""
    random = generator(0)
    mix = torch.randn(24, 24, generator=random).double() * torch.logspace(0, -2, 24)[:, None]
    x = torch.randn(4000, 24, generator=random).double() @ mix
    moment = x.T @ x
    weight = torch.randn(3000, 24, generator=random)
    grid = Grid(torch.full((3000, 1), 0.05), torch.zeros(3000, 1), -127, 127)
    rounded = 0.05 * gptq_codes(weight, moment.float(), grid).double()
    nearest = 0.05 * (weight.double() / 0.05).round()
    errors = [float(((weight.double() - w) @ x.T).square().sum()) for w in (rounded, nearest)]
    assert errors[0] / errors[1] == pytest.approx(rounding_error(moment, x), rel=0.03)
    assert rounding_error(moment, x) < 0.6


def simulated(runs, seed, spread, width=16, tokens=60):
    """Moments of runs whose inputs differ from run to run, their inputs, and the moment of endlessly many."""
    random = generator(seed)
    base = torch.randn(width, width, generator=random).double() * torch.logspace(0, -1, width)[:, None]
    population, found = torch.zeros(width, width).double(), []
    for number in range(600):
        mix = base + spread * torch.randn(width, width, generator=random).double()
        population += mix.T @ mix
        if number < runs:
            x = torch.randn(tokens, width, generator=random).double() @ mix
            found.append((x.T @ x, x))
    return found, population / 600


@pytest.mark.parametrize("spread", [0.05, 0.3])
@pytest.mark.parametrize("runs", [6, 12, 30])
def test_what_is_left_to_gain_is_what_very_many_runs_gain(spread, runs):
    """Against GPTQ itself, damped as Quantize damps it, on these runs and on 600: averaged over seeds, the part of the
    error on held-out inputs by which it is lower.
    """
    tokens, width, estimates, gains = 60, 16, [], []
    weight = torch.randn(300, width, generator=generator(1))
    grid = Grid(torch.full((300, 1), 0.2), torch.zeros(300, 1), -127, 127)
    for seed in range(10):
        found, population = simulated(runs, seed, spread, width, tokens)
        history, total = [], found[0][0]
        damping = [DAMPING + SAMPLING_DAMPING * width / (tokens * number) for number in range(1, runs + 1)]
        for number, (moment, x) in enumerate(found[1:], 1):
            history.append(lowered((total, damping[number - 1]), (total + moment, damping[number]), x))
            total = total + moment
        estimates.append(left_to_gain(history, runs))
        factor = torch.linalg.cholesky(population)
        few, many = (
            float(((weight - 0.2 * gptq_codes(weight, moment.float(), grid, added)).double() @ factor).norm())
            for moment, added in ((total, damping[-1]), (population, DAMPING))
        )
        gains.append(1 - many / few)
    assert 0.6 < sum(estimates) / sum(gains) < 1.6, (sum(estimates) / 10, sum(gains) / 10)


def test_few_runs_are_not_said_to_be_enough():
    assert left_to_gain([0.0] * (LATEST - 1), 5) is None
    assert left_to_gain([0.5, *[0.01] * LATEST], 7) < ENOUGH < left_to_gain([0.01] * LATEST + [1.2], 7)
    assert left_to_gain([-1.0] * LATEST, 6) == 0.0
    assert left_to_gain([1 / (k - 1) + 1 / k for k in range(2, 41)], 40) == pytest.approx(1 - math.exp(-0.5 / 40))


def test_nothing_is_said_of_rounding_that_runs_do_not_guide(tmp_path):
    config, path = RecordingConfig(samples=4, hessians=False, tokens=40, held_out=3), tmp_path / "runs.safetensors"
    for seed in range(LATEST + 2):
        recording = add_run(path, "m", recorded(dit(), seed, config)[1], run_schedule(), config)
    assert recording.describe() == "7 runs, 28 samples"


def test_memory_stays_within_what_is_allowed():
    """Halfway between the least and all: what a run keeps, and what the file keeps after two."""
    widths = [layer.in_features for _, layer in named_linears(dit())]
    aside = recorder_module.PROBES * recorder_module.PROBE_TOKENS * 2 * max(widths)
    least, most = (plan_statistics(widths, 2**40, tokens, HELD_OUT_TOKENS).bytes for tokens in (64, 4096))
    budget = (least + most) // 2 + aside
    config = RecordingConfig(samples=100, memory_gb=budget / 2**30, held_out=4)
    runs = [recorded(dit(), seed, config)[1] for seed in (0, 1)]
    for run in runs:
        kept = [kept.memory.nbytes for record in run.layers.values() for kept in record.kept.values()]
        sums = [record.statistics for record in run.layers.values()]
        assert sum(kept) + sum(bytes_of(layer) for layer in sums) <= budget
        assert any(layer.hessian is None for layer in sums)
    first = with_run(None, "m", runs[0], run_schedule(), config)
    both = with_run(first, "m", runs[1], run_schedule(), config)
    assert sum(bytes_of(layer) for layer in both.statistics.values()) <= budget
    with pytest.raises(ValueError, match="allow more memory"):
        recorded(dit(), 0, RecordingConfig(memory_gb=1e-5))


def bytes_of(layer):
    tensors = [getattr(layer, key) for key in SUMS]
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


class Layer(torch.nn.Module):
    """Looks at the first of its inputs alone."""

    in_features = 4

    def forward(self, x):
        return x[:, :1] * 2


@pytest.mark.parametrize("endless", ["inputs", "calls"])
def test_an_image_goes_on_where_memory_runs_out(endless):
    """A tensor that is expanded costs nothing until somebody copies it, here 160 TB."""
    layer, few = Layer(), torch.ones(1, 3, 4)
    many = few[:, :1].expand(1, 10**13, 4)
    inputs, x = (many, few) if endless == "inputs" else (few, many)
    recorder = Recorder(RecordingConfig(samples=9, held_out=2), 40, seed=1)
    for _ in range(40):
        out = recorder.called(0, lambda: [("blocks.0.fc", layer)], lambda: 0, lambda: layer(inputs), x, few, {})
        assert torch.equal(out, inputs[:, :1] * 2)
    assert not any(place.records for place in recorder.places.values())
    with pytest.raises(ValueError, match="memory ran out while it was recorded"):
        recorder.result()


def test_a_run_whose_statistics_do_not_fit_is_not_added():
    """Inputs of 168 TB would be kept of each of two layers, which shows when the run has ended."""
    width, tokens = 6_500_000, 12_900_000
    layers = [Layer(), Layer()]
    for layer in layers:
        layer.in_features = width
    recorder = Recorder(RecordingConfig(samples=1, memory_gb=1e9, tokens=tokens, held_out=0), 1, seed=1)
    named, x = [(f"blocks.{i}.fc", layer) for i, layer in enumerate(layers)], torch.ones(1, 1, 4)
    inputs = torch.ones(1, 2, width)
    recorder.expect(1)
    recorder.called(0, lambda: named, lambda: 2**40, lambda: [layer(inputs) for layer in layers], x, x, {})
    assert all(place.waiting for place in recorder.places.values())
    with pytest.raises(ValueError, match="memory ran out while it was recorded"):
        recorder.result()
