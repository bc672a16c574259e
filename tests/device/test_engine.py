"""The engine on a device that is not the host, against itself on the CPU."""

import copy
import gc

import pytest
import torch

from benchmarks.speed.plain import loop_of
from qandc_core import (
    SamplingConfig,
    VarianceCompensation,
    apply_cache_to_dit,
    fuse_dit,
    generate,
    quantize_model,
)
from qandc_core.caching.policies import ErrorBudget, Plan
from qandc_core.caching.run import SamplingRun
from qandc_core.calibration import statistics
from qandc_core.calibration.recorder import Recorder, RecordingConfig
from qandc_core.models.dit import DiT, DiTConfig
from qandc_core.models.layers import DIT_SKIP, named_linears
from qandc_core.numerics import _has_float64
from qandc_core.quantization.formats import ALL
from qandc_core.quantization.linear import QuantizedLinear
from qandc_core.quantization.matmul import int_mm, kitchen_is_available, simulated_matmul
from qandc_core.quantization.model import QuantizationConfig, quantized_layers
from qandc_core.quantization.native import NativeConfig, quantize_weight, working_bytes

from . import fake, real

pytestmark = pytest.mark.skipif(bool(fake.guard()), reason=fake.guard())
STEPS = 6
RUN = dict(class_labels=[3, 1], steps=STEPS, cfg_scale=1.5, sampler="ddim", seed=5)
ROUNDED = 0.01  # codes flip where inputs differ in the last digit


CONFIG = DiTConfig(
    input_size=8, in_channels=3, depth=2, hidden_size=64, num_heads=2, num_classes=10, learn_sigma=False
)  # fmt: skip


def small_dit(where, dtype=None):
    """A DiT that was made on the CPU, so that its weights are the same on every device."""
    torch.manual_seed(0)
    model = DiT(CONFIG, dtype=dtype).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.to(where)


@pytest.fixture
def device():
    with fake.device() as found:
        yield found


def relative(found, expected):
    found, expected = found.cpu().float(), expected.cpu().float()
    return float((found - expected).norm() / expected.norm())


def on_both(make, **changes):
    """Distance between the images of the device and of the CPU."""
    expected, _ = generate(make("cpu"), **{**RUN, **changes})
    found, report = generate(make("cuda:0"), **{**RUN, **changes})
    assert found.device.type == "cuda" and report.device == "cuda:0" and report.peak_memory > 0
    return relative(found, expected)


def test_the_device_behaves_as_cuda_does(device):
    x = torch.randn(3, 4).to("cuda:0")
    with pytest.raises(RuntimeError, match="same device"):
        x + torch.ones(4)
    assert (x + torch.tensor(2.0)).device.type == "cuda" and torch.empty(2, device="cuda:0").isnan().all()
    device.waits.clear()
    _ = x * 2 + 1, x[:, 1:].contiguous(), torch.cat([x, x])
    assert not device.waits
    x.sum().item()
    x.cpu()
    assert sum(device.waits.values()) == 2
    held = device.held
    y = torch.zeros(1000, device="cuda:0")
    assert device.held == held + y.nbytes
    del y
    assert device.held == held


def test_a_graph_replays_addresses_and_freed_memory_is_garbage(device):
    weight, x, y = (torch.ones(4, device="cuda:0") for _ in range(3))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y.copy_(x * weight + 1)
    assert y.tolist() == [1.0] * 4  # a capture runs nothing
    x.fill_(3.0)
    graph.replay()
    assert y.tolist() == [4.0] * 4
    del weight
    graph.replay()
    assert y.isnan().all()
    with pytest.raises(RuntimeError, match="capturing"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        x.sum().item()


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fused", [False, True])
def test_samples_the_same_images(device, sampler, dtype, fused):
    def make(where):
        model = small_dit(where, dtype)
        return fuse_dit(model) if fused else model

    assert on_both(make, sampler=sampler) < (1e-5 if dtype is None else 0.05)


@pytest.mark.parametrize("reuse, order", [("branch", 0), ("branch", 1), ("block", 0)])
def test_caches_the_same_features(device, reuse, order):
    assert on_both(lambda where: apply_cache_to_dit(small_dit(where), 2, reuse=reuse, order=order)) < 1e-5


@pytest.mark.parametrize("order", [0, 1])
def test_features_wait_on_the_host_and_return(device, order):
    """Two conditions of a run that computes two steps and reuses two, against a run that keeps them on the device."""
    x, answers, kept = torch.randn(2, 3, 4, 4).to("cuda:0"), {}, {}
    for offload in (False, True):
        run = SamplingRun(Plan(4, order, {0, 1}), [8.0, 6.0, 4.0, 2.0, 0.0], offload=offload)
        for level in (8.0, 6.0, 4.0, 2.0):
            run.begin_prediction(level)
            run.sample = x[:1]
            call = torch.cat([x[:1], x[:1]])
            cache = run.place(call, run.identify(call, [("a", 0), ("b", 1)], ()))
            if not cache.run.reusing:
                cache.store("denoised", x * level)
        answers[offload] = cache.recall("denoised")
        kept[offload] = {t.device.type for history in cache.run.features.values() for _, t in history}
    assert kept == {False: {"cuda"}, True: {"cpu"}}
    assert answers[True].device.type == "cuda" and torch.equal(answers[True].cpu(), answers[False].cpu())


def backends():
    kitchen = pytest.mark.skipif(not kitchen_is_available(), reason="no comfy-kitchen")
    return ["auto", "simulated", "int_mm", pytest.param("kitchen", marks=kitchen)]


@pytest.mark.parametrize("backend", backends())
def test_every_backend_runs_or_is_replaced(device, backend):
    """One image without guidance, whose label and time have one row: fewer than CUDA's int8 matmul takes."""

    def make(where):
        own = backend if where != "cpu" else "simulated"
        return quantize_model(small_dit(where), 8, 8, ["pos_embed"], config=QuantizationConfig(backend=own))

    assert on_both(make, class_labels=[3], cfg_scale=1.0) < ROUNDED


@pytest.mark.parametrize("bits", [(4, 8), (4, 4), (7, 8)])
def test_other_bits(device, bits):
    assert on_both(lambda where: quantize_model(small_dit(where), *bits, DIT_SKIP)) < 0.05


@pytest.mark.parametrize("rows, columns, inner", [(1, 8, 8), (3, 5, 20), (16, 24, 9), (17, 16, 32), (40, 3, 7)])
def test_int_mm_takes_any_size(device, rows, columns, inner):
    a, b = (torch.randint(-127, 128, (n, inner), dtype=torch.int8) for n in (rows, columns))
    found = int_mm(a.to("cuda:0"), b.to("cuda:0"))
    assert found.shape == (rows, columns) and torch.equal(found.cpu(), simulated_matmul(a, b))


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("reuse", [None, "branch", "block", "prediction"])
def test_graphs_give_what_the_steps_give(device, quantized, reuse):
    def make(where):
        model = small_dit(where)
        if quantized:
            quantize_model(model, 8, 8, DIT_SKIP)
        fused = fuse_dit(model, "reference")
        return fused if reuse is None else apply_cache_to_dit(fused, 2, reuse=reuse)

    assert on_both(make, sampler="ddpm") < ROUNDED


def test_a_run_after_one_of_nan_is_as_before_it(device):
    for cache in ({"reuse": "prediction", "order": 1}, {"reuse": "branch"}, {"reuse": "block"}):
        fused = apply_cache_to_dit(fuse_dit(small_dit("cuda:0")), 3, **cache)
        first, _ = generate(fused, **RUN)
        largest = torch.finfo(torch.float32).max  # overflows on the way
        broken, _ = generate(fused, **RUN, noise=torch.full((2, 3, 8, 8), largest))
        assert not broken.cpu().isfinite().all()
        assert torch.equal(generate(fused, **RUN)[0].cpu(), first.cpu())


def other_weights(fused, how):
    """The same images times another factor in the last layer, put there in one of the ways a user may try."""
    final = fused.final
    if how == "replaced":
        final.weight = final.weight * 0.5
        final.bias = final.bias * 0.5
    elif how == "in place":
        final.weight.mul_(0.5)
        final.bias.mul_(0.5)
    else:  # moved away and back: other addresses
        fused.to("cpu").to("cuda:0")


@pytest.mark.parametrize("how", ["replaced", "in place", "moved"])
def test_graphs_follow_the_weights(device, how):
    if real.WANTED and how == "moved":
        pytest.skip("a model on Triton kernels stays on its GPU")
    fused = fuse_dit(small_dit("cuda:0"))
    before, _ = generate(fused, **RUN)
    other_weights(fused, how)
    gc.collect()
    found, _ = generate(fused, **RUN)
    fresh = copy.deepcopy(fused)
    assert not fresh.loops
    assert relative(found, generate(fresh, **RUN)[0]) < 1e-6
    assert (relative(found, before) < 1e-6) == (how == "moved")


def test_a_loop_refuses_a_model_that_left_its_device(device):
    model = small_dit("cuda:0")
    loop = loop_of(model, 1, SamplingConfig(3, 1.0, "ddim"))
    noise = [torch.randn(1, 3, 8, 8)]
    loop.run(torch.tensor([1], device="cuda:0"), noise)
    model.to("cpu")
    with pytest.raises(ValueError, match="make a new loop"):
        loop.run(torch.tensor([1], device="cuda:0"), noise)


def test_peak_memory_holds_the_weights(device):
    model = small_dit("cuda:0")
    _, report = generate(model, **RUN)
    assert report.peak_memory > sum(p.nbytes for p in model.parameters())


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@pytest.mark.parametrize("kind", ["plain", "cached", "cached, two calls", "fused", "fused and cached"])
def test_the_host_waits_at_most_once_for_a_prediction(device, sampler, kind):
    """ddpm's noise, which the CPU draws, is copied at every step."""
    model = small_dit("cuda:0")
    model = fuse_dit(model) if "fused" in kind else model
    model = apply_cache_to_dit(model, 2) if "cached" in kind else model

    def waits(steps, compensation=None):
        changes = dict(sampler=sampler, steps=steps, batched_guidance="two calls" not in kind)
        arguments = {**RUN, **changes, "compensation": compensation}
        generate(model, **arguments)  # captures, and finds what is kept between runs
        device.waits.clear()
        generate(model, **arguments)
        return sum(device.waits.values())

    assert (waits(12) - waits(4)) / 8 == (sampler == "ddpm")
    sigmas = torch.tensor(SamplingConfig(STEPS).schedule().sigmas[:-1])
    compensation = VarianceCompensation(sigmas, torch.zeros(STEPS, 3), torch.full((STEPS, 3), 1.01))
    assert waits(STEPS, compensation) <= waits(STEPS) + 2  # its two tables


def test_a_callback_costs_one_wait_a_step(device):
    model, seen = small_dit("cuda:0"), []
    generate(model, **RUN)
    device.waits.clear()
    generate(model, **RUN, callback=seen.append)
    assert len(seen) == STEPS and all(info.seconds > 0 for info in seen)
    assert sum(device.waits.values()) <= STEPS + 3  # labels, noise, the end


@pytest.mark.parametrize("order", [0, 1, 2])
def test_an_error_budget_waits_once_for_its_estimate(device, order):
    plans = {name: ErrorBudget(10.0, order=order).plan(12, flow=True) for name in ("cpu", "cuda:0")}
    values = torch.randn(7, 2, 3, 4, 4)
    for name, plan in plans.items():
        for step in range(7):
            plan.observe(float(step), values[step].to(name))
    device.waits.clear()
    plans["cuda:0"].begin(7, 7.0, 0.5, 0.4)
    assert sum(device.waits.values()) == 1
    plans["cpu"].begin(7, 7.0, 0.5, 0.4)
    assert plans["cuda:0"].spent == pytest.approx(plans["cpu"].spent) and plans["cpu"].spent > 0


def test_positions_of_another_size_are_copied_once(device):
    model = small_dit("cuda:0")
    x, t, y = torch.randn(2, 3, 12, 8), torch.full((2,), 500), torch.tensor([1, 2])
    expected = small_dit("cpu")(x, t, y)
    x, t, y = (v.to("cuda:0") for v in (x, t, y))
    device.waits.clear()
    assert relative(model(x, t, y), expected) < 1e-5
    first = sum(device.waits.values())
    device.waits.clear()
    model(x, t, y)
    assert not device.waits and first > 0
    for side in range(10, 40, 2):  # kept for a few sizes only
        model(torch.zeros(1, 3, side, 8, device="cuda:0"), t[:1], y[:1])
    assert len(model.other_positions) <= 4


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("parts", [("codes",), ("codes", "weight_scale", "bias", "input_scale", "row_sums")])
def test_layers_whose_weights_stayed_on_the_host(device, static, parts):
    """As a host leaves them that is short of memory: all of a layer's tensors, or some."""
    layer = next(iter(quantized_layers(quantize_model(small_dit("cpu"), 8, 8, DIT_SKIP)).values()))
    if static:
        layer = static_layer()
    x = torch.randn(2, 5, layer.in_features)
    expected = layer(x)
    device_layer = copy.deepcopy(layer).to("cuda:0")
    for name in parts:
        value = getattr(layer, name, None)
        if value is not None:
            setattr(device_layer, name, value)
    found = device_layer(x.to("cuda:0"))
    assert found.device.type == "cuda" and relative(found, expected) < ROUNDED
    assert device_layer.codes.device.type == "cpu"


def static_layer():
    from qandc_core.quantization.grids import affine_grid, quantize, weight_grid
    from qandc_core.quantization.linear import LinearFormat

    linear = torch.nn.Linear(96, 40)
    weights = weight_grid(linear.weight, 8, symmetric=True)
    inputs = affine_grid(torch.tensor(-4.0), torch.tensor(6.0), 8)
    codes = quantize(linear.weight, weights)
    return QuantizedLinear.from_codes(linear, codes, weights, LinearFormat(static=True), inputs, "auto")


@pytest.fixture
def not_asked_before():
    """Whether a device has float64 is asked once a process, and another device comes here under the same name."""
    _has_float64.cache_clear()
    yield
    _has_float64.cache_clear()


@pytest.mark.parametrize("fused", [False, True])
def test_a_device_without_float64(fused, not_asked_before):
    with fake.device(float64=False):
        with pytest.raises(TypeError, match="float64"):
            torch.zeros(2, dtype=torch.float64, device="cuda:0")
        model = quantize_model(small_dit("cuda:0"), 8, 8, DIT_SKIP)
        model = fuse_dit(model) if fused else model
        compensation = VarianceCompensation(torch.tensor([10.0, 1.0]), torch.zeros(2, 3), torch.full((2, 3), 1.01))
        images, _ = generate(model, [1], cfg_scale=1.5, sigmas=[10.0, 1.0, 0.0], compensation=compensation)
        assert images.cpu().isfinite().all()


def test_a_recorded_run_waits_once_it_has_ended(device):
    """Whatever is chosen and held out, and however much of it."""
    model = small_dit("cuda:0")
    t, labels = torch.tensor([900.0, 900.0], device="cuda:0"), torch.tensor([3, 1], device="cuda:0")

    def waits(room):
        recorder = Recorder(RecordingConfig(samples=9, memory_gb=0.01, tokens=300, held_out=4), 40, seed=1)
        x = torch.randn(2, 3, 8, 8).to("cuda:0")
        device.waits.clear()
        for _ in range(40):
            made = recorder.called(
                0, lambda: list(named_linears(model)), lambda: room, lambda: model(x, t, labels), x, t, {"y": labels}
            )
            recorder.predicted(t, made)
        during = sum(device.waits.values())
        record = recorder.result()
        assert record.samples == 8 and len(record.calls) == 2
        assert all(tensor.device.type == "cpu" for _, call in record.calls for tensor in (call.x, call.conditions["y"]))
        return during

    waits(2**30)  # what all runs share is copied once
    assert waits(2**30) == 0 < waits(0)


@pytest.mark.parametrize("outputs, inputs", [(1536, 256), (1344, 192), (192, 960), (256, 1024), (2048, 256)])
def test_rounding_a_layer_takes_no_more_memory_than_is_made_free_for_it(device, outputs, inputs, subtests):
    """Shapes of FLUX's and Qwen-Image's layers, smaller."""
    layer = statistics.LayerStatistics.empty(inputs, hessian=True, held_out=64)
    x = torch.randn(2 * inputs, inputs)
    layer.update(x)
    layer.keep_held_out(x[:64])
    for format in ALL:
        for rounding in ("nearest", "gptq") if format.available() else ():
            with subtests.test(f"{format.name}, {rounding}"):
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
                weight = torch.randn(outputs, inputs, dtype=torch.bfloat16).to("cuda")
                quantize_weight("layer", weight, None, NativeConfig(format.name, rounding), layer)
                assert torch.cuda.max_memory_allocated() - before < working_bytes(outputs, inputs)
                del weight


@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_looking_at_inputs_copies_a_part_of_them_at_a_time(device, where, monkeypatch):
    monkeypatch.setattr(statistics, "PART", 2**14)
    width = 64
    x = torch.randn(2**13, width, dtype=torch.bfloat16)
    layer, whole = (statistics.LayerStatistics.empty(width, hessian=True) for _ in range(2))
    layer.settle(torch.device(where), 2**30)
    given = x.to("cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    layer.update(given)
    assert torch.cuda.max_memory_allocated() - before < 2**18 + 4 * 4 * 2**14 < x.nbytes
    whole.update(x)
    layer.fetch()
    assert layer.count == whole.count and torch.equal(layer.histogram, whole.histogram)
    assert relative(layer.hessian, whole.hessian) < 1e-5 and relative(layer.mean, whole.mean) < 1e-4
