import dataclasses
import json
import math
import time

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.speed import ceilings as ceilings_module
from benchmarks.speed import gemms as gemms_module
from benchmarks.speed import profile as profile_module
from benchmarks.speed.ceilings import Ceilings, best_rate, float32_products, measure_ceilings
from benchmarks.speed.clock import best_seconds, median_seconds, wall_seconds
from benchmarks.speed.gemms import Method, Problem, all_methods, gemm_table
from benchmarks.speed.profile import (
    ATTENTION,
    COPIES,
    DECODING,
    ELEMENTWISE,
    GROUPS,
    IDLE,
    KERNELS,
    OPERATORS,
    OTHER,
    PRODUCTS,
    ROUNDING,
    group_of,
    grouped,
    profile_step,
)
from benchmarks.speed.words import StepProfile, duration, explain, percent, times
from benchmarks.speed.work import (
    Gemm,
    activation_bytes,
    attention_bytes,
    floor_seconds,
    launches,
    product_ceiling,
    step_activation_bytes,
    step_weight_bytes,
    step_work,
    weight_bytes,
)
from qandc_core.models import DiT, DiTConfig, preset
from qandc_core.models.layers import DIT_SKIP, named_linears
from qandc_core.quantization.matmul import int_mm_is_fast, kitchen_is_available
from qandc_core.quantization.model import linear_weight_bytes, quantize_model
from qandc_core.quantization.native import NativeConfig, quantize_weight, stored_values

CPU = torch.device("cpu")
CEILINGS = Ceilings(float32=2e12, tf32=None, bfloat16=8e12, int8=16e12, bandwidth=4e11, launch=3e-6)
needs_kitchen = pytest.mark.skipif(not kitchen_is_available(), reason="no comfy-kitchen")
needs_int_mm = pytest.mark.skipif(not int_mm_is_fast(), reason="no exact int_mm on this CPU")

pytestmark = pytest.mark.usefixtures("no_grad")


def small_config(**overrides):
    sizes = {"input_size": 8, "in_channels": 3, "hidden_size": 64, "depth": 3, "num_heads": 4, "num_classes": 10}
    return DiTConfig(**{**sizes, **overrides})


def inputs(config, rows):
    x = torch.randn(rows, config.in_channels, config.input_size, config.input_size)
    return x, torch.full((rows,), 3), torch.zeros(rows, dtype=torch.long)


def counted_flops(config, rows):
    """What torch counts: the math backend, since it does not know the CPU's fused attention."""
    model = DiT(config).eval()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(*inputs(config, rows))
    return counter.get_total_flops(), {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}


# Work.


@pytest.mark.parametrize(
    "overrides", [{}, {"patch_size": 4, "mlp_ratio": 3.0, "learn_sigma": False}, {"hidden_size": 96, "num_heads": 6}]
)
@pytest.mark.parametrize("rows", [1, 6])
def test_flops_are_those_that_torch_counts(overrides, rows):
    config = small_config(**overrides)
    work = step_work(config, rows)
    total, by_operator = counted_flops(config, rows)
    assert work.flops == total
    assert work.attention.flops == by_operator["aten.bmm"]
    assert work.gemms[0].flops == by_operator["aten.convolution"]
    assert work.gemm_flops == by_operator["aten.convolution"] + by_operator["aten.addmm"]


def test_products_once_for_a_run_are_those_over_conditions():
    config, rows, steps = small_config(), 6, 20
    plain, run = step_work(config, rows), step_work(config, rows, steps)
    assert {gemm.name for gemm in plain.gemms} == {gemm.name for gemm in (*run.gemms, *run.once)}
    assert not any("adaLN" in gemm.name or "embedder.mlp" in gemm.name for gemm in run.gemms)
    modulation = next(gemm for gemm in run.once if gemm.name == "adaLN_modulation.1")
    assert modulation.shape == (steps * rows, 6 * 64, 64) and modulation.count == config.depth
    assert next(gemm for gemm in run.once if gemm.name == "t_embedder.mlp.0").rows == steps


@pytest.mark.parametrize("config", [small_config(), preset("DiT-B/4")])
def test_products_are_the_layers_of_the_model(config):
    model = DiT(config, device="meta")
    linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    quantized = {name for name, _ in named_linears(model, DIT_SKIP)}
    gemms = [gemm for gemm in step_work(config, 2).gemms if gemm.name != "x_embedder.proj"]
    assert sum(gemm.count for gemm in gemms) == len(linears)
    for gemm in gemms:
        name = gemm.name if gemm.name in linears else f"blocks.0.{gemm.name}"
        assert linears[name].weight.shape == (gemm.columns, gemm.inner)
        assert gemm.quantizable == (name in quantized)


def test_xl_shapes_and_multiplications():
    work = step_work(preset("DiT-XL/2"), 16, steps=50)
    assert work.shapes[:4] == (
        (4096, 3456, 1152), (4096, 1152, 1152), (4096, 4608, 1152), (4096, 1152, 4608),
    )  # fmt: skip
    # DiT's table 4 says 118.64 GFLOPs for an image, multiplications alone, with modulations.
    assert step_work(preset("DiT-XL/2"), 1).flops / 2 == pytest.approx(118.64e9, rel=1e-3)


@needs_kitchen
@pytest.mark.parametrize("format", ["W8A8", "W4A8"])
@pytest.mark.parametrize("outputs, width", [(96, 64), (64, 256), (36, 20), (128, 48), (6, 10)])
def test_weight_bytes_are_those_of_quantized_layers(format, outputs, width):
    layer = quantize_weight("layer", torch.randn(outputs, width), None, NativeConfig(format, "nearest"))
    gemm = Gemm("layer", 1, outputs, width, count=3, quantizable=True)
    if layer is None:
        assert weight_bytes(gemm, format, "bfloat16") == 3 * 2 * outputs * width
    else:
        held = sum(tensor.nbytes for name, tensor in layer.tensors.items() if name != "comfy_quant")
        assert weight_bytes(gemm, format) == 3 * held
    assert weight_bytes(dataclasses.replace(gemm, quantizable=False), format, "float32") == 3 * 4 * outputs * width


def test_float_weight_bytes_are_the_models():
    config = small_config()
    model, work = DiT(config), step_work(config, 2)
    expected = linear_weight_bytes(model) + model.x_embedder.proj.weight.nbytes
    assert step_weight_bytes(work, "float32") == step_weight_bytes(work, "tf32") == expected
    assert step_weight_bytes(work, "bfloat16") == expected // 2


def test_int8_weight_bytes_are_the_engines():
    config = small_config()
    work, model = step_work(config, 2), quantize_model(DiT(config), 8, 8, DIT_SKIP)
    assert (
        step_weight_bytes(work, "W8A8", "float32") == linear_weight_bytes(model) + model.x_embedder.proj.weight.nbytes
    )


def test_activation_bytes_by_hand():
    fc1 = Gemm("mlp.fc1", 10, 32, 8, count=2, quantizable=True, feeds_product=True)
    proj = dataclasses.replace(fc1, feeds_product=False)
    assert activation_bytes(fc1, "float32") == 2 * 4 * 10 * (8 + 32)
    assert activation_bytes(fc1, "bfloat16") == 2 * 2 * 10 * (8 + 32)
    assert activation_bytes(fc1, "W8A8") == 2 * 10 * (8 + 4 + 32)
    assert activation_bytes(proj, "W8A8", "bfloat16") == 2 * 10 * (8 + 4 + 2 * 32)
    work = step_work(small_config(), 2)
    assert attention_bytes(work.attention, "W4A8", "float32") == 4 * 4 * 3 * 2 * 16 * 64  # q, k, v, o of three blocks
    parts = sum(activation_bytes(gemm, "W8A8") for gemm in work.gemms) + attention_bytes(work.attention, "W8A8")
    assert step_activation_bytes(work, "W8A8") == parts


def test_launches_of_a_fused_step():
    work = step_work(small_config(), 2, steps=10)
    # Patch embedding, three blocks of two normalisations, four products and an attention, the final layer's two.
    assert launches(work, "bfloat16") == 1 + 3 * 7 + 2
    assert launches(work, "W8A8") == 1 + 3 * 8 + 2


# The floor.


def test_floor_with_free_memory_is_arithmetic():
    free = dataclasses.replace(CEILINGS, bandwidth=math.inf, launch=None)
    work = step_work(small_config(), 4)
    assert floor_seconds(work, free, "float32") == pytest.approx(work.flops / 2e12)
    quantized = sum(gemm.flops for gemm in work.gemms if gemm.quantizable)
    expected = quantized / 16e12 + (work.flops - quantized) / 8e12
    assert floor_seconds(work, free, "W8A8", "bfloat16") == pytest.approx(expected)


@pytest.mark.parametrize("format", ["float32", "bfloat16", "W8A8", "W4A8"])
def test_floor_with_free_arithmetic_is_bytes(format):
    free = dataclasses.replace(CEILINGS, float32=math.inf, bfloat16=math.inf, int8=math.inf, launch=None)
    work = step_work(small_config(), 4)
    moved = step_weight_bytes(work, format) + step_activation_bytes(work, format)
    assert floor_seconds(work, free, format) == pytest.approx(moved / 4e11)


def test_floor_takes_the_larger_of_the_two_for_each_product():
    work = step_work(preset("DiT-XL/2"), 64)
    slow_memory = dataclasses.replace(CEILINGS, launch=None)
    arithmetic = work.flops / 8e12
    moved = (step_weight_bytes(work, "bfloat16") + step_activation_bytes(work, "bfloat16")) / 4e11
    floor = floor_seconds(work, slow_memory, "bfloat16")
    assert max(arithmetic, moved) < floor < arithmetic + moved


def test_launches_and_products_once_count_in_the_floor():
    config = small_config()
    plain, free = step_work(config, 2), dataclasses.replace(CEILINGS, launch=None)
    without = floor_seconds(plain, free, "bfloat16")
    assert floor_seconds(plain, CEILINGS, "bfloat16") - without == pytest.approx(3e-6 * launches(plain, "bfloat16"))
    run = step_work(config, 2, steps=50)
    none_once = floor_seconds(dataclasses.replace(run, once=()), free, "bfloat16")
    assert none_once < floor_seconds(run, free, "bfloat16") < without


def test_no_floor_without_a_ceiling():
    work, unknown = step_work(small_config(), 2), dataclasses.replace(CEILINGS, int8=None)
    assert floor_seconds(work, unknown, "W8A8") is None and product_ceiling(work, unknown, "W8A8") is None
    assert floor_seconds(work, CEILINGS, "tf32") is None
    assert floor_seconds(work, unknown, "bfloat16") is not None


def test_product_ceiling_lies_between_the_formats():
    work = step_work(small_config(), 2)
    assert product_ceiling(work, CEILINGS, "float32") == pytest.approx(2e12)
    assert 8e12 < product_ceiling(work, CEILINGS, "W8A8", "bfloat16") < 16e12


# Ceilings.


def test_ceilings_of_this_machine(monkeypatch):
    monkeypatch.setattr(ceilings_module, "SIZES", {"cpu": (128, 256)})
    monkeypatch.setattr(ceilings_module, "COPY_BYTES", {"cpu": 2**22})
    found = measure_ceilings("cpu")
    for value in (found.float32, found.bfloat16, found.bandwidth):
        assert value is not None and 1e7 < value < 1e15
    assert (found.int8 is not None) == int_mm_is_fast()
    assert found.tf32 is None and found.launch is None
    json.dumps(dataclasses.asdict(found))


def test_float32_precision_is_restored():
    before = torch.get_float32_matmul_precision()
    with pytest.raises(KeyError), float32_products("high"):
        assert torch.get_float32_matmul_precision() == "high"
        raise KeyError
    assert torch.get_float32_matmul_precision() == before


def test_best_rate_is_the_fastest_size_and_none_without_the_product(monkeypatch):
    seconds = {64: 1e-3, 128: 2e-3, 256: 1.0}
    tried = []
    monkeypatch.setattr(ceilings_module, "best_seconds", lambda size, device, repeats: seconds[size])

    def product(size, device):
        tried.append(size)
        return size

    assert best_rate(product, (64, 128, 256, 512), CPU, 1) == pytest.approx(2 * 128**3 / 2e-3)
    assert tried == [64, 128, 256]  # a slow one ends it

    def absent(size, device):
        raise RuntimeError("not implemented")

    assert best_rate(absent, (64, 128), CPU, 1) is None


def test_clock_measures_the_call_alone():
    calls = []

    def sleep():
        calls.append(1)
        time.sleep(0.01)

    assert 0.0095 < median_seconds(sleep, "cpu", repeats=3, cold=True) < 1
    assert len(calls) == 4  # the first warms up
    assert 0.0095 < wall_seconds(sleep, "cpu", repeats=3) < 1


def test_the_fastest_call_is_what_a_cpu_can_do():
    durations = iter([0.0, 0.05, 0.01, 0.05])  # the first warms up

    assert 0.0095 < best_seconds(lambda: time.sleep(next(durations)), CPU, repeats=3) < 0.045


# Products.


@needs_kitchen
@needs_int_mm
def test_gemm_table_rates_and_shares():
    (row,) = gemm_table([(64, 96, 64)], CEILINGS, "cpu", repeats=2)
    assert (row["rows"], row["columns"], row["inner"]) == (64, 96, 64) and not row["error"]
    assert {"float32", "bfloat16", "int_mm", "kitchen_w4a8", "reference_int8_linear"} <= set(row["methods"])
    assert not any(name.startswith("triton") for name in row["methods"])
    for name, ceiling in (("float32", 2e12), ("bfloat16", 8e12), ("kitchen_int8_rotated", 16e12)):
        found = row["methods"][name]
        assert found["rate"] == pytest.approx(2 * 64 * 96 * 64 / found["seconds"])
        assert found["share"] == pytest.approx(found["rate"] / ceiling)
    rounding = row["methods"]["reference_quantize_rows"]
    assert rounding["rate"] == pytest.approx((4 * 64 * 64 + 64 * 64 + 4 * 64) / rounding["seconds"])
    json.dumps(row)


@needs_kitchen
@needs_int_mm
@pytest.mark.parametrize(
    "name, error",
    [("float32", 1e-5), ("bfloat16", 0.01), ("kitchen_int8_rotated", 0.03), ("kitchen_w4a8", 0.2),
     ("reference_int8_linear", 0.03)],
)  # fmt: skip
def test_methods_multiply_what_they_claim_to(name, error):
    problem = Problem(32, 48, 256, CPU)
    y = all_methods(CPU)[name].build(problem)().float()
    exact = problem.x @ problem.weight.T
    assert (y - exact).norm() / exact.norm() < error


@needs_kitchen
@needs_int_mm
def test_products_of_codes_are_those_of_the_codes():
    problem, methods = Problem(32, 48, 64, CPU), all_methods(CPU)
    weight = problem.int8["weight"]
    expected = problem.codes.long() @ weight.long().T
    assert (methods["int_mm"].build(problem)() == expected).all()
    scaled = expected * problem.row_scale[:, None] * problem.int8["weight_scale"].flatten()
    torch.testing.assert_close(methods["reference_int8_matmul"].build(problem)(), scaled)
    plain = problem.x @ stored_values(problem.int8).T
    y = methods["kitchen_int8"].build(problem)()
    assert (y - plain).norm() / plain.norm() < 0.02
    assert methods["reference_quantize_modulated"].build(problem)()[0].shape == (32, 64)


def test_a_method_that_raises_says_why(monkeypatch):
    def broken(problem):
        raise ValueError("no such kernel")

    methods = {"float32": all_methods(CPU)["float32"], "broken": Method(broken, "int8")}
    monkeypatch.setattr(gemms_module, "all_methods", lambda device: methods)
    (row,) = gemm_table([(32, 24, 16)], dataclasses.replace(CEILINGS, float32=None), "cpu", 1)
    assert row["methods"]["broken"] is None and row["error"] == {"broken": "ValueError: no such kernel"}
    assert row["methods"]["float32"]["seconds"] > 0 and row["methods"]["float32"]["share"] is None


def test_widths_that_no_group_divides_leave_the_float_methods():
    (row,) = gemm_table([(32, 24, 18)], CEILINGS, "cpu", 1)
    assert row["methods"]["float32"] is not None and row["methods"]["bfloat16"] is not None
    assert row["methods"]["kitchen_w4a8"] is None and row["methods"]["reference_int8_linear"] is None
    assert {"kitchen_w4a8", "reference_int8_linear"} <= set(row["error"])


# Profile.


KERNEL_NAMES = {
    "nvjet_sm90_tst_128x256_64x4_2x1_v_bz_coopA_bias_TNT": PRODUCTS,
    "void cutlass::Kernel2<cutlass_80_tensorop_i16832gemm_s8_256x128_64x3_tn_align16>(Params)": PRODUCTS,
    "sm90_xmma_gemm_i8i32_i8i32_i32_tn_n_tilesize128x128x128_execute_kernel__5x_cublas": PRODUCTS,
    "void cublasLt::splitKreduce_kernel<32, 16, int>(cublasSplitKParams<float>)": PRODUCTS,
    "int8_matmul_kernel": PRODUCTS,
    "_int8_matmul_dequant_per_row_kernel": PRODUCTS,
    "void (anonymous namespace)::int8_gemv_convrot_fused_kernel<__nv_bfloat16>(signed char const*)": PRODUCTS,
    "void cutlass::device_kernel<cutlass::gemm::kernel::GemmUniversal<cute::Copy_Atom>>": PRODUCTS,
    "triton_tem_fused_addmm_gelu_3": PRODUCTS,
    "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<96, 64, 64, 4, cutlass::bfloat16_t>>": ATTENTION,
    "fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel)": ATTENTION,
    "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x64x128_4x1x1_kernel0_0": ATTENTION,
    "void qk_int_sv_i8_attn_kernel<128, 64>": ATTENTION,
    "quantize_kernel": ROUNDING,
    "_quantize_rowwise_kernel": ROUNDING,
    "void (anonymous namespace)::quantize_int8_rowwise_convrot64_kernel<__nv_bfloat16, 256>(int)": ROUNDING,
    "void (anonymous namespace)::rotate_int8_convrot_groups64_amax_kernel<float>(float const*)": ROUNDING,
    "triton_per_fused__to_copy_abs_amax_clamp_div_native_layer_norm_round_1": ROUNDING,
    "void (anonymous namespace)::dequant_int4_grouped_to_int8_kernel<16>(unsigned char const*)": DECODING,
    "_dequant_int4_grouped_to_int8_kernel": DECODING,
    "triton_poi_fused_addmm_gelu_2": ELEMENTWISE,
    "triton_red_fused_add_mul_native_layer_norm_0": ELEMENTWISE,
    "void at::native::vectorized_elementwise_kernel<8, at::native::GeluCUDAKernelImpl>": ELEMENTWISE,
    "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<c10::BFloat16, float, false>": ELEMENTWISE,
    "void (anonymous namespace)::dequantize_int8_linear_kernel<__nv_bfloat16>(int const*)": ELEMENTWISE,
    "void at::native::elementwise_kernel<128, 4, at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&)>": COPIES,
    "Memcpy DtoD (Device -> Device)": COPIES,
    "Memset (Device)": COPIES,
    "void at::native::(anonymous namespace)::CatArrayBatchedCopy<unsigned int, 2, 128, 1>": COPIES,
    "void at::native::index_put_kernel<int>": OTHER,
}


@pytest.mark.parametrize("name, group", KERNEL_NAMES.items())
def test_kernels_are_sorted_by_name(name, group):
    assert group_of(name, KERNELS) == group


def test_groups_are_sums_in_order():
    sums = grouped({"aten::copy_": 1.0, "aten::addmm": 2.0, "aten::mm": 3.0, "aten::view": 4.0}, OPERATORS)
    assert list(sums.items()) == [(PRODUCTS, 5.0), (COPIES, 1.0), (OTHER, 4.0)]


def wide_dit():
    config = small_config(input_size=16, hidden_size=512, depth=2, num_heads=8)
    torch.manual_seed(0)
    return DiT(config).eval(), inputs(config, 4)


def test_products_take_most_of_a_wide_step_and_groups_add_up(monkeypatch):
    model, given = wide_dit()
    kept = []

    class Kept(profile_module.profile):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            kept.append(self)

    monkeypatch.setattr(profile_module, "profile", Kept)
    groups = profile_step(lambda: model(*given), "cpu", repeats=2)
    total = sum(event.self_cpu_time_total for event in kept[0].key_averages()) / 2e6
    assert sum(groups.values()) == pytest.approx(total, rel=0.1)
    assert groups[PRODUCTS] > 0.5 * total and groups.get(OTHER, 0.0) < 0.2 * total
    assert groups[ATTENTION] > 0 and groups[ELEMENTWISE] > 0
    assert set(groups) <= set(GROUPS) and IDLE not in groups


def test_rounding_is_seen_where_there_is_some():
    model, given = wide_dit()
    plain = profile_step(lambda: model(*given), "cpu", repeats=1)
    quantized = quantize_model(model, 8, 8, DIT_SKIP)
    groups = profile_step(lambda: quantized(*given), "cpu", repeats=1)
    assert groups[ROUNDING] / sum(groups.values()) > 5 * plain.get(ROUNDING, 0.0) / sum(plain.values())


def test_nothing_seen_is_nothing_said():
    assert profile_step(lambda: None, "cpu") == {}


# Words.


FULL = StepProfile(
    label="",
    computed=0.8123,
    reused=0.0032,
    groups={PRODUCTS: 0.71, ATTENTION: 0.12, ELEMENTWISE: 0.09, ROUNDING: 0.05, OTHER: 0.027, COPIES: 0.003},
    achieved=1.24e14,
    ceiling=2e14,
    floor=0.31,
    step_gain=1.52,
)


def test_sentences_of_a_whole_measurement():
    assert explain(FULL) == [
        "A computed step takes 812 ms; 71 % of it multiplies matrices, at 62 % of what this machine reaches, "
        "12 % is attention, 9 % normalisation and other elementwise work, 5 % rounding inputs to 8 bits, "
        "3 % other work.",
        "A reused step takes 0.4 % of a computed one.",
        "Computing a step takes this machine at least 310 ms, with arithmetic and memory at their measured best; "
        "the measured step is 2.6x as long.",
        "Against float32 the whole step is 1.5x faster.",
        "What would help most: matrix products nearer to what this machine reaches, at most 27 % of the step.",
    ]


def test_nothing_is_said_of_what_was_not_measured():
    assert explain(StepProfile("W8A8", 1.2)) == ["W8A8: a computed step takes 1.2 s."]
    (first, advice) = explain(StepProfile("", 0.01, groups={PRODUCTS: 1.0, ELEMENTWISE: 1.0}))
    assert first.endswith("50 % of it multiplies matrices, 50 % is normalisation and other elementwise work.")
    assert "reaches" not in first and "fusing element-wise work" in advice
    for field in ("reused", "floor", "groups", "step_gain", "achieved", "ceiling"):
        empty = dataclasses.replace(FULL, **{field: {} if field == "groups" else None})
        text = " ".join(explain(empty))
        assert "None" not in text and "nan" not in text
        absent = {
            "reused": "reused", "floor": "at least", "groups": "matrices", "step_gain": "whole",
            "achieved": "62 %", "ceiling": "62 %",
        }  # fmt: skip
        assert absent[field] not in text


def test_gains_alone_and_losses():
    alone = explain(StepProfile("", 1.0, step_gain=1.5, against="bf16 compiled"))
    assert alone[1] == "Against bf16 compiled the whole step is 1.5x faster."
    slower = explain(StepProfile("", 1.0, step_gain=0.8))
    assert slower[1] == "Against float32 the whole step is 1.2x slower."


def test_advice_follows_the_largest_part():
    waiting = dataclasses.replace(FULL, groups={PRODUCTS: 0.3, IDLE: 0.6, ELEMENTWISE: 0.1})
    assert "no time to wait" in explain(waiting)[-1] and "at most 60 %" in explain(waiting)[-1]
    attention = explain(dataclasses.replace(FULL, groups={PRODUCTS: 0.3, ATTENTION: 0.7}))[-1]
    assert attention == (
        "What would help most: a faster attention, 70 % of the step; how fast it could be was not measured."
    )
    best = dataclasses.replace(FULL, groups={PRODUCTS: 0.99, ELEMENTWISE: 0.01}, achieved=2.01e14)
    assert explain(best)[0].startswith("A computed step takes 812 ms; 99 % of it multiplies matrices, as fast as")
    assert explain(best)[-1] == "No single change would save more than 5 % of the step."
    decoding = dataclasses.replace(FULL, groups={PRODUCTS: 0.5, DECODING: 0.5}, achieved=None)
    assert "W8A8" in explain(decoding)[-1]


def test_numbers_are_rounded_for_reading():
    assert [duration(s) for s in (12.4, 1.23, 0.9996, 0.0812, 0.00199, 4.5e-4, 3e-6)] == [
        "12 s", "1.2 s", "1.0 s", "81 ms", "2.0 ms", "450 us", "3.0 us",
    ]  # fmt: skip
    assert [percent(s) for s in (0.714, 0.01, 0.0096, 0.004, 0.0002)] == [
        "71 %", "1 %", "1.0 %", "0.4 %", "less than 0.1 %",
    ]  # fmt: skip
    assert [times(x) for x in (1.94, 12.3)] == ["1.9x", "12x"]
